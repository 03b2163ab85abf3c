"""The figures that a paper would print: each answers one question and says how sure the answer is.

* `latency_figure`, `speedup_figure`, `floor_figure`: time per token, speed against the baseline and distance to the
  floor, by context; medians with their 95 % bootstrap interval;
* `stage_figure`: where the time of a decode step goes, stacked;
* `layer_rate_figure`: the hit rate of each layer.

Quality against what is read or held is in quality_budget.py, and `plot_list.PLOTS` names all plots.

A speed-up is taken over pairs: repetition 3 of a strategy against repetition 3 of the baseline, which the machine made
under like conditions. Whatever was not measured is not drawn, and of a figure that has nothing to draw the maker gives
None: an empty axis would look like a zero.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from comparison import compare
from metrics import ratio
from plots import COLOURS, INK, Cell, clear_frame, legend_below, line_styles, titled_grid
from quality_frame import quality_note
from result_frame import (
    Result,
    context_tokens,
    describe_setting,
    dig,
    mode_rank,
    strategy_labels,
    successful,
    unique,
    values,
)
from run_statistics import median_with_interval

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDE = 8.0  # the longest context over the shortest, from which on contexts are drawn in octaves
OWN_SCALES = 4.0  # the longest step of one context over another's, from which on panels do not share a scale
DODGE_POINTS = 3.0  # between strategies at one context, so that their intervals do not hide each other
REST = "rest"
STAGES = {  # stage of a decode step, from the bottom up -> legend, colour, hatch
    REST: ("computing: all the rest of the model", "#D3E4F0", ""),
    "attend_ms": ("attention over pages", COLOURS[1], ""),
    "select_ms": ("choosing pages", COLOURS[4], "///"),
    "predict_ms": ("predicting the next pages", COLOURS[7], "..."),
    "copy_ms": ("asking for copies", COLOURS[2], "xxx"),
    "stall_ms": ("stall: waiting for pages", COLOURS[6], "\\\\\\"),
}
ON_A_BUS = (REST, "select_ms", "stall_ms")  # there the host predicts and asks while the device computes


@dataclasses.dataclass(frozen=True)
class Measured:
    """The median of `n` runs, and its 95 % interval where there are runs enough for one."""

    median: float
    low: float | None
    high: float | None
    n: int

    @classmethod
    def of(cls, figures: Sequence[float]) -> Measured:
        return cls(**median_with_interval(figures))


def measured_by_cell(frame: pd.DataFrame, column: str) -> dict[Cell, Measured]:
    """A column of the frame of runs for each strategy at each context that has it."""
    cells = successful(frame).groupby(["strategy", "context_tokens"], sort=False)
    figures = {cell: values(runs, column) for cell, runs in cells}
    return {cell: Measured.of(found) for cell, found in figures.items() if found}


# ----------------------------------------------------------------------------------------------------------------------
# By context
# ----------------------------------------------------------------------------------------------------------------------


def latency_figure(frame: pd.DataFrame, results: Sequence[Result]) -> Figure | None:
    """Median time per token of every strategy, by context."""
    return _context_figure(frame, "Decode latency by context", "ms per token", measured_by_cell(frame, "tpot_ms"))


def speedup_figure(frame: pd.DataFrame, results: Sequence[Result]) -> Figure | None:
    """Median of the paired speed-ups of every strategy over the baseline, by context, with a line at 1."""
    points = {
        (compared.strategy, compared.context_tokens): Measured(paired.ratio, paired.low, paired.high, paired.n_pairs)
        for compared in compare(frame)
        if (paired := compared.speedup).ratio is not None
    }
    words = "Each run against the baseline's of the same repetition; above 1 is faster."
    unit = "times as fast as the baseline"
    return _context_figure(frame, "Decode speed-up by context", unit, points, (1.0, "the baseline"), words, "pairs")


def floor_figure(frame: pd.DataFrame, results: Sequence[Result]) -> Figure | None:
    """How many times the floor of a decode step a token took, by context, with a line at 1."""
    points = measured_by_cell(frame, "tpot_over_floor")
    words = "Floor: the larger of a step's computing and the bytes that must move over the link's bandwidth."
    unit = "time per token / floor"
    return _context_figure(
        frame, "Distance to the floor by context", unit, points, (1.0, "the floor"), words, from_zero=False
    )


def _context_figure(
    frame: pd.DataFrame,
    title: str,
    unit: str,
    points: Mapping[Cell, Measured],
    reference: tuple[float, str] | None = None,
    words: str = "",
    sample: str = "runs",
    from_zero: bool = True,
) -> Figure | None:
    if not points:
        return None
    sentences = [
        describe_setting(frame),
        f"{words} {_interval_note(points.values(), sample)}".strip(),
        quality_note(frame),
    ]
    figure, (axis,) = titled_grid(title, sentences, 1, 1, (9.0, 4.4))
    styles = line_styles(unique(frame, "strategy"))
    drawn = [name for name in styles if any(strategy == name for strategy, _ in points)]
    for place, name in enumerate(drawn):
        contexts = sorted(context for strategy, context in points if strategy == name)
        dodge = DODGE_POINTS * (place - (len(drawn) - 1) / 2)
        _draw_line(axis, contexts, [points[name, context] for context in contexts], styles[name], dodge)
    _scale_contexts(axis, sorted({context for _, context in points}))
    top = max(point.median if point.high is None else point.high for point in points.values())
    least = min(point.median if point.low is None else point.low for point in points.values())
    if reference is not None:
        level, meaning = reference
        top, least = max(top, level), min(least, level)
        axis.axhline(level, color=INK, linewidth=1.0, zorder=2, gid="reference")
        place = {"xytext": (-2, 3), "textcoords": "offset points", "ha": "right", "va": "bottom"}
        axis.annotate(f"{level:g}: {meaning}", (1.0, level), xycoords=("axes fraction", "data"), **place, size=9)
    bottom = 0.0 if from_zero else max(0.0, least - 0.12 * (top - least or 1.0))
    axis.set_ylim(bottom, top + 0.08 * (top - bottom or 1.0))
    axis.set_ylabel(unit, size=10, color=INK)
    clear_frame(axis)
    draw_line_legend(figure, styles, drawn)
    return figure


def _draw_line(
    axis: Axes, contexts: Sequence[int], points: Sequence[Measured], style: Mapping[str, Any], dodge: float
) -> None:
    """Medians joined by a line, with their intervals, moved aside by some points on the page."""
    from matplotlib.transforms import ScaledTranslation

    moved = axis.transData + ScaledTranslation(dodge / 72, 0, axis.figure.dpi_scale_trans)
    middles = [point.median for point in points]
    axis.plot(contexts, middles, **style, zorder=3, transform=moved, clip_on=False, gid="medians")
    known = [(context, point) for context, point in zip(contexts, points, strict=True) if point.low is not None]
    if known:
        reach = [[p.median - p.low for _, p in known], [p.high - p.median for _, p in known]]
        bars = {"fmt": "none", "ecolor": style["color"], "elinewidth": 1.6, "capsize": 3.5, "zorder": 2.5}
        axis.errorbar([c for c, _ in known], [p.median for _, p in known], yerr=reach, **bars, transform=moved)


def _scale_contexts(axis: Axes, contexts: Sequence[int]) -> None:
    """Ticks at the contexts that were run; octaves where short ones would lie in a heap."""
    from matplotlib.ticker import FixedLocator, NullLocator

    least, most = contexts[0], contexts[-1]
    if most >= WIDE * least:
        axis.set_xscale("log", base=2)
        axis.set_xlim(least / 1.25, most * 1.25)
    else:
        room = 0.08 * (most - least) or 0.5 * least
        axis.set_xlim(least - room, most + room)
    axis.xaxis.set_major_locator(FixedLocator(contexts))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xticks(contexts, [f"{context:,}" for context in contexts])
    axis.set_xlabel("context, tokens", size=10, color=INK)


def _interval_note(points: Iterable[Measured], sample: str) -> str:
    """What the marks are, with the number of runs behind each."""
    counts = {point.n for point in points}
    if counts == {1}:
        return f"Each point is of n = 1 of {sample}, so there is no interval to show."
    n = str(min(counts)) if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
    alone = " (none where n is 1)" if 1 in counts else ""
    return f"Median of n = {n} {sample}; bars: its 95 % bootstrap interval{alone}."


def draw_line_legend(figure: Figure, styles: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    legend_below(figure, [Line2D([], [], **styles[name]) for name in names], list(names), handlelength=3.5)


def panel_grid(n_panels: int) -> tuple[int, float]:
    """How many columns of panels, and how many inches wide each."""
    columns = n_panels if n_panels <= 3 else 2
    return columns, {1: 9.0, 2: 6.2, 3: 4.8}[columns]


# ----------------------------------------------------------------------------------------------------------------------
# Where the time goes
# ----------------------------------------------------------------------------------------------------------------------


def step_stages(frame: pd.DataFrame) -> dict[Cell, dict[str, float]]:
    """Mean ms per token by stage, for each cell; together they are the time per token.

    A stage is left out where it was not measured, and its time is then in the rest: of a baseline that is all of it. On
    a real bus, where the host predicts and asks for copies while the device computes, the rest holds these as well.
    """
    found: dict[Cell, list[dict[str, float]]] = {}
    for run in successful(frame).astype(object).to_dict("records"):
        stages = _stages_of(run)
        if stages is not None:
            found.setdefault((run["strategy"], int(run["context_tokens"])), []).append(stages)
    return {
        cell: {
            stage: statistics.fmean(stages[stage] for stages in runs)
            for stage in STAGES
            if all(stage in stages for stages in runs)
        }
        for cell, runs in found.items()
    }


def _stages_of(run: Mapping[str, Any]) -> dict[str, float] | None:
    """The stages of one run in ms per token; None where its time per token is not known."""
    tpot_ms, e2e_ms, ttft_ms = (_number(run[column]) for column in ("tpot_ms", "e2e_ms", "ttft_ms"))
    if tpot_ms is None or e2e_ms is None or ttft_ms is None:
        return None
    n_steps = ratio(e2e_ms - ttft_ms, tpot_ms)
    wanted = ON_A_BUS if run["link_kind"] == "bus" else tuple(STAGES)
    totals = {stage: _number(run[stage]) for stage in wanted if stage != REST}
    parts = {stage: total / n_steps for stage, total in totals.items() if total is not None} if n_steps else {}
    return {REST: max(0.0, tpot_ms - sum(parts.values())), **parts}


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def stage_figure(frame: pd.DataFrame, results: Sequence[Result]) -> Figure | None:
    """A stacked bar for each strategy, a panel for each context; None unless a stage of paging was measured."""
    cells = step_stages(frame)
    if not any(len(stages) > 1 for stages in cells.values()):
        return None
    from matplotlib.patches import Patch

    contexts, names = sorted({context for _, context in cells}), unique(frame, "strategy")
    names = [name for name in names if any((name, context) in cells for context in contexts)]
    counts = {len(runs) for _, runs in successful(frame).groupby(["strategy", "context_tokens"])}
    n = str(min(counts)) if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
    note = f"Mean of n = {n} runs. The numbers are ms per token, of all stages together."
    if "bus" in unique(frame, "link_kind"):
        note += " On a real bus the host predicts and asks for copies while the device computes."
    scales = {c: max(sum(cells[cell].values()) for cell in cells if cell[1] == c) for c in contexts}
    if max(scales.values()) > OWN_SCALES * min(scales.values()):
        note += " Each panel has a scale of its own."
    else:
        scales = dict.fromkeys(scales, max(scales.values()))
    sentences = [describe_setting(frame), note, quality_note(frame)]
    columns, width = panel_grid(len(contexts))
    size = (width, 1.1 + 0.36 * len(names))
    figure, axes = titled_grid("Where the time of a decode step goes", sentences, len(contexts), columns, size)
    for index, (axis, context) in enumerate(zip(axes, contexts, strict=True)):
        _draw_stages(axis, [cells.get((name, context)) for name in names], scales[context])
        axis.set_title(f"{context:,} tokens of context", loc="left", size=11, weight="bold", color=INK)
        axis.set_yticks(range(len(names)), names if index % columns == 0 else [""] * len(names))
        axis.set_xlabel("ms per token", size=9.5, color=INK)
    present = [stage for stage in STAGES if any(stages.get(stage) for stages in cells.values())]
    entries = [Patch(facecolor=STAGES[s][1], hatch=STAGES[s][2], edgecolor=INK, linewidth=0.5) for s in present]
    legend_below(figure, entries, [STAGES[stage][0] for stage in present])
    return figure


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.3g}"


def _draw_stages(axis: Axes, bars: Sequence[Mapping[str, float] | None], longest: float) -> None:
    for row, stages in enumerate(bars):
        if stages is None:
            axis.annotate("\N{EM DASH} not measured", (0, row), xytext=(3, 0), textcoords="offset points", va="center")
            continue
        start = 0.0
        for stage, (_, colour, hatch) in STAGES.items():
            if stages.get(stage):
                look = {"color": colour, "hatch": hatch, "edgecolor": INK, "linewidth": 0.5}
                axis.barh(row, stages[stage], 0.7, left=start, **look, zorder=2, gid=stage)
                start += stages[stage]
        place = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
        axis.annotate(_short(start), (start, row), **place, size=8.5, color=INK)
    axis.set_ylim(len(bars) - 0.45, -0.55)  # the first strategy on top
    axis.set_xlim(0.0, 1.12 * longest)
    clear_frame(axis)
    axis.grid(visible=False, axis="y")
    axis.grid(axis="x", color="#DDDDDD", linewidth=0.7, zorder=0)


# ----------------------------------------------------------------------------------------------------------------------
# By layer
# ----------------------------------------------------------------------------------------------------------------------


def layer_rates(results: Sequence[Result]) -> dict[Cell, dict[int, list[float]]]:
    """Hit rates of decode in percent by layer, one for each repetition; of layers that nothing was asked of, none."""
    results = sorted(results, key=mode_rank)
    found: dict[Cell, dict[int, list[float]]] = {}
    for label, result in zip(strategy_labels(results), results, strict=True):
        if result.get("status") != "ok":
            continue
        for layer in dig(result, "cache.by_layer") or []:
            if layer.get("accesses"):
                by_layer = found.setdefault((label, context_tokens(result)), {})
                by_layer.setdefault(layer["layer"], []).append(100.0 * layer["hits"] / layer["accesses"])
    return found


def layer_rate_figure(frame: pd.DataFrame, results: Sequence[Result]) -> Figure | None:
    """The mean hit rate of every layer, a panel for each context, with the lowest and highest run around it."""
    rates = layer_rates(results)
    if not rates:
        return None
    contexts, styles = sorted({context for _, context in rates}), line_styles(unique(frame, "strategy"))
    counts = {len(of_layer) for by_layer in rates.values() for of_layer in by_layer.values()}
    n = str(min(counts)) if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
    note = f"Decode steps. Mean of n = {n} runs" + ("; shaded: lowest to highest run." if counts != {1} else ".")
    columns, width = panel_grid(len(contexts))
    sentences = [describe_setting(frame), note, quality_note(frame)]
    figure, axes = titled_grid("Hit rate by layer", sentences, len(contexts), columns, (width, 3.3))
    drawn = [name for name in styles if any(strategy == name for strategy, _ in rates)]
    for axis, context in zip(axes, contexts, strict=True):
        for place, name in enumerate(drawn):
            by_layer = rates.get((name, context), {})
            layers = sorted(by_layer)
            if layers:
                step = max(1, len(layers) // 10)  # markers apart from each other's, where lines coincide
                means = [statistics.fmean(by_layer[layer]) for layer in layers]
                sparse = styles[name] | {"markersize": 5, "markevery": (place % step, step)}
                axis.plot(layers, means, **sparse, zorder=3, clip_on=False)
                ends = [[end(by_layer[layer]) for layer in layers] for end in (min, max)]
                axis.fill_between(layers, *ends, color=styles[name]["color"], alpha=0.2, linewidth=0, zorder=2)
        axis.set_title(f"{context:,} tokens of context", loc="left", size=11, weight="bold", color=INK)
        axis.set_xlabel("layer", size=9.5, color=INK)
        axis.set_ylabel("% of accesses", size=9.5, color=INK)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_ylim(0.0, 105.0)
        clear_frame(axis)
    draw_line_legend(figure, styles, drawn)
    return figure
