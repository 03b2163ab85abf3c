"""Quality as figures: what each strategy gives for what it costs, and where in a prompt its answers get lost.

* `pareto_figure`: divergence from the baseline, and the score of tasks, against latency and against device memory. Of
  each context the points that no other beats are joined by a line, the *Pareto front*: whoever wants less of one must
  take more of the other.
* `task_figure`: the mean score of a task by the depth at which the answer lies and the length of the prompt, a panel
  for each strategy beside the baseline's, all in one scale of colours.

An approximate strategy whose quality was not measured has no place in them, and the title says which one that is.
"""

from __future__ import annotations

import dataclasses
import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from comparison import baselines, mean
from plots import FAINT, HATCHES, INK, clear_frame, legend_below, strategy_styles, titled_grid
from quality_frame import LEAST_NATS, approximate
from result_frame import CELL, describe_setting, successful, unique

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COSTS = {  # column of the frame -> title, unit
    "tpot_ms": ("Quality against decode latency", "ms per token (lower is better)"),
    "device_kv_mb": ("Quality against KV cache on the device", "MiB, staging included (lower is better)"),
}
LOSSES = {  # measure of a `Point` -> what it is called
    "kl_nats": "KL divergence from the baseline, nats (lower is better)",
    "lost_share": "score below the baseline's, points (lower is better)",
}
MARKERS = ("o", "s", "^", "D", "v", "p", "h", "d")  # one for each context length
FILLS = dict(zip(HATCHES, ("full", "none", "left", "bottom"), strict=True))  # where bars have a hatch
LINES = ("-", "--", ":", "-.")
WIDE = 8.0  # the largest cost over the least, from which on costs are drawn in decades
MARKER_SIZE, RING = 9, 6  # of a point; and by how much one is larger that another one covers
SAME_PLACE = 0.02  # how near points lie that cover each other, as a share of the panel
MOST_NUMBERED_CELLS, MOST_COLUMNS = 80, 4


# ----------------------------------------------------------------------------------------------------------------------
# Quality against cost
# ----------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Point:
    """One strategy in one cell: its mean costs, by column of `COSTS`, its divergence from the baseline in nats, and
    how far its score is below the baseline's on the same items, mean over the tasks that tell something of a cache."""

    strategy: str
    workload: str
    context_tokens: int
    costs: dict[str, float | None]
    kl_nats: float | None
    lost_share: float | None

    @property
    def losses(self) -> dict[str, float | None]:
        return {measure: getattr(self, measure) for measure in LOSSES}


def quality_points(frame: pd.DataFrame, scores: pd.DataFrame | None = None) -> list[Point]:
    """A point for each strategy in each cell whose quality was measured; costs are means over repetitions.

    Args:
        scores: of `quality_frame.task_scores`, from the same results.
    """
    points, lost = [], {} if scores is None else _lost_shares(scores)
    chosen = baselines(frame)
    for _, workload, context in list(lost):  # its own score is what others are compared with, asked or not
        lost.setdefault((chosen.get(workload), workload, context), 0.0)
    for (strategy, workload, context), runs in successful(frame).groupby(["strategy", *CELL], sort=False):
        costs, divergence = {column: mean(runs, column) for column in COSTS}, mean(runs, "kl_mean")
        point = Point(strategy, workload, int(context), costs, divergence, lost.get((strategy, workload, context)))
        if any(loss is not None for loss in point.losses.values()) and any(cost is not None for cost in costs.values()):
            points.append(point)
    return points


def _lost_shares(scores: pd.DataFrame) -> dict[tuple, float]:
    """By strategy and cell the baseline's score less its own, means over such tasks and lengths as all of the cell were
    asked."""
    telling = scores[scores["unit"].ne("perplexity").fillna(True) & scores["discriminates"].ne(False).fillna(True)]
    telling = telling.dropna(subset=["score", "baseline_score"])
    lost = {}
    for (workload, context), cell in telling.groupby(CELL, sort=False):
        asked = [set(zip(own["task"], own["tokens"], strict=True)) for _, own in cell.groupby("strategy")]
        common = set.intersection(*asked)
        for strategy, own in cell.groupby("strategy", sort=False):
            columns = own[["task", "tokens", "score", "baseline_score"]].values
            losses = [baseline - score for task, n, score, baseline in columns if (task, n) in common]
            if losses:
                lost[strategy, workload, context] = sum(losses) / len(losses)
    return lost


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The indices of the points that none dominates, by their first coordinate; of both coordinates less is better.

    A point dominates another if it is at least as good in both and better in one; so equal points stay together.
    """
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda index: points[index]):
        # Whatever came before costs no more, so that it dominates unless this one is better in the other.
        if not front or points[index][1] < points[front[-1]][1] or points[index] == points[front[-1]]:
            front.append(index)
    return front


def pareto_figure(frame: pd.DataFrame, scores: pd.DataFrame | None = None) -> Figure:
    """A panel for each cost that was measured, and each measure of what it costs in answers; arguments as of
    `quality_points`.

    Raises:
        ValueError: no run's quality was measured, so there is nothing to draw.
    """
    points = quality_points(frame, scores)
    panels = [
        (column, measure)
        for measure in LOSSES
        for column in COSTS
        if any(point.costs[column] is not None and point.losses[measure] is not None for point in points)
    ]
    if not panels:
        raise ValueError("no run whose quality was measured")
    n_columns = len({column for column, _ in panels})
    styles = strategy_styles(unique(frame, "strategy"))
    contexts = sorted({point.context_tokens for point in points})
    sentences = [describe_setting(frame), _reading(frame, points)]
    figure, axes = titled_grid("Quality against cost", sentences, len(panels), n_columns, (6.2, 4.4))
    for axis, (column, measure) in zip(axes, panels, strict=True):
        _draw_points(axis, column, measure, points, contexts, styles)
    _draw_legend(figure, points, contexts, styles)
    return figure


def _reading(frame: pd.DataFrame, points: Sequence[Point]) -> str:
    drawn = {point.strategy for point in points}
    unknown = [name for name in unique(approximate(frame), "strategy") if name not in drawn]
    missing = f" Approximate, quality not measured, and so not here: {', '.join(unknown)}." if unknown else ""
    return f"Lower left is better; 0 is the baseline's own answer. Lines join what no other point beats.{missing}"


def _draw_points(
    axis: Axes,
    column: str,
    measure: str,
    points: Sequence[Point],
    contexts: Sequence[int],
    styles: dict[str, dict[str, str]],
) -> None:
    drawn = [point for point in points if point.costs[column] is not None and point.losses[measure] is not None]
    least = LEAST_NATS if measure == "kl_nats" else 0.0
    for place, context in enumerate(contexts):
        at_context = [point for point in drawn if point.context_tokens == context]
        for workload in dict.fromkeys(point.workload for point in at_context):
            cell = [point for point in at_context if point.workload == workload]
            places = [(point.costs[column], point.losses[measure]) for point in cell]
            ranks = [(cost, 0.0 if 0.0 <= loss < least else loss) for cost, loss in places]
            front = [places[index] for index in pareto_front(ranks)]
            line = {"color": "#777777", "linewidth": 1.1, "linestyle": LINES[place % len(LINES)], "zorder": 2}
            axis.plot(*zip(*front, strict=True), **line, gid="front")
        for point in at_context:
            marker = _marker(styles[point.strategy], place)
            axis.plot(point.costs[column], point.losses[measure], **marker, zorder=3, clip_on=False, gid="point")
    title, unit = COSTS[column]
    axis.set_title(title, loc="left", size=12, weight="bold", color=INK)
    axis.set_xlabel(unit, size=9.5, color=INK)
    axis.set_ylabel(LOSSES[measure], size=9.5, color=INK)
    clear_frame(axis)
    axis.grid(axis="x", color=FAINT, linewidth=0.7, zorder=0)
    losses = [point.losses[measure] for point in drawn]
    if measure == "kl_nats":
        _scale_divergence(axis, losses)
    else:
        _scale_share(axis, losses)
    _scale_cost(axis, [point.costs[column] for point in drawn])
    _ring_the_covered(axis)


def _marker(style: dict[str, str], place: int) -> dict[str, Any]:
    return {
        "marker": MARKERS[place % len(MARKERS)],
        "color": style["color"],
        "fillstyle": FILLS[style["hatch"]],
        "markerfacecoloralt": "white",
        "markeredgecolor": style["color"] if FILLS[style["hatch"]] != "full" else "white",
        "markersize": MARKER_SIZE,
        "linestyle": "",
    }


def _ring_the_covered(axis: Axes) -> None:
    """A point that later ones cover shows as a ring around them. Of a panel whose scales are set."""
    points = [line for line in axis.lines if line.get_gid() == "point"]
    in_panel = axis.transScale + axis.transLimits  # from figures to shares of the panel's width and height
    places = [in_panel.transform(line.get_xydata()[0]) for line in points]
    for nth, (line, (x, y)) in enumerate(zip(points, places, strict=True)):
        n_above = sum(abs(x - right) < SAME_PLACE and abs(y - up) < SAME_PLACE for right, up in places[nth + 1 :])
        line.set(markersize=MARKER_SIZE + RING * n_above, zorder=3 - 0.01 * n_above)


def _scale_cost(axis: Axes, costs: Sequence[float]) -> None:
    """From 0; but where contexts differ so much that the short ones would lie in a heap, in decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    least, most = min(costs), max(costs)
    if least <= 0.0 or most < WIDE * least:
        axis.set_xlim(0.0, 1.06 * most or 1.0)
        return
    axis.set_xscale("log")
    axis.set_xlim(least / 1.3, most * 1.3)
    axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda cost, _: f"{cost:,.6g}"))
    axis.xaxis.set_minor_locator(NullLocator())


def _scale_divergence(axis: Axes, divergences_nats: Sequence[float]) -> None:
    """Decades, and 0 below them: linear from 0 to the decade of the least divergence that is not 0."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    above = [value for value in divergences_nats if value >= LEAST_NATS]
    first = math.floor(math.log10(min(above))) if above else round(math.log10(LEAST_NATS))
    last = max(first + 1, math.ceil(math.log10(max(above)))) if above else first + 1
    decades = list(range(first, last + 1, -(-(last - first) // 7)))
    axis.set_yscale("symlog", linthresh=10.0**first, linscale=0.6)
    axis.set_ylim(-0.12 * 10.0**first, 1.3 * 10.0**last)  # below 0 only to show the whole of a marker there
    axis.yaxis.set_major_locator(FixedLocator([0.0, *(10.0**decade for decade in decades)]))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.axhline(0.0, color=INK, linewidth=0.8, zorder=1)


def _scale_share(axis: Axes, shares: Sequence[float]) -> None:
    """Percent from 0 on, or from what is better than the baseline; a little below, to show the whole of a marker."""
    from matplotlib.ticker import MultipleLocator, PercentFormatter

    top = max(0.1, 1.15 * max(shares))
    axis.set_ylim(1.15 * min(0.0, *shares) - 0.04 * top, top)
    axis.yaxis.set_major_locator(MultipleLocator(0.02 if top <= 0.1 else 0.1 if top <= 0.6 else 0.2))
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
    axis.axhline(0.0, color=INK, linewidth=0.8, zorder=1)


def _draw_legend(
    figure: Figure, points: Sequence[Point], contexts: Sequence[int], styles: dict[str, dict[str, str]]
) -> None:
    from matplotlib.lines import Line2D

    strategies = list(dict.fromkeys(point.strategy for point in points))
    entries = [Line2D([], [], **_marker(styles[name], 0)) for name in strategies]
    for place, _ in enumerate(contexts):
        marker, line = MARKERS[place % len(MARKERS)], LINES[place % len(LINES)]
        entries.append(Line2D([], [], color="#777777", marker=marker, linestyle=line, markersize=8))
    legend_below(figure, entries, [*strategies, *(f"{context:,} tokens of context" for context in contexts)])


# ----------------------------------------------------------------------------------------------------------------------
# Scores by depth and length
# ----------------------------------------------------------------------------------------------------------------------


def placed_items(items: pd.DataFrame) -> pd.DataFrame:
    """The items that have a depth and a score, each once: several runs of a strategy may be asked the same ones."""
    items = items.dropna(subset=["task", "tokens", "depth"])
    items = items[items["score"].notna() | items["baseline_score"].notna()]
    first = items.groupby(["strategy", "workload", "task", "tokens"])["run_id"].transform("first")
    return items[(items["run_id"] == first).fillna(True)]


@dataclasses.dataclass(frozen=True)
class HeatMap:
    """A panel: mean scores, 0 to 1, a row for each depth and a column for each length; NA where nothing was asked."""

    title: str
    cells: pd.DataFrame
    n: int


def heat_maps(frame: pd.DataFrame, items: pd.DataFrame, task: str) -> list[HeatMap]:
    """Of each workload the baseline's panel, then one for each strategy other than the baseline itself.

    Args:
        frame: of all runs, which says what strategy is the baseline.
        items: of `placed_items`.
    """
    asked, references = items[items["task"] == task], baselines(frame)
    depths, lengths = (sorted(unique(asked, column)) for column in ("depth", "tokens"))
    several_models = len(unique(asked, "model")) > 1
    maps = []
    for workload, own in asked.groupby("workload", sort=False):
        note = _discrimination_note(own)
        first = own.groupby("tokens")["strategy"].transform("first")  # all were asked the same: those of one will do
        reference = f"baseline, {own['model'].iloc[0]}" if several_models else "baseline"
        panels = [(reference, own[own["strategy"] == first], "baseline_score")]
        for strategy, answered in own.groupby("strategy", sort=False):
            if strategy != references.get(workload):
                panels.append((strategy, answered, "score"))
        for name, answered, column in panels:
            scored = answered.dropna(subset=[column])
            cells = scored.pivot_table(values=column, index="depth", columns="tokens", aggfunc="mean")
            title = "\n".join(part for part in (f"{name}, n = {len(scored)}", note) if part)
            maps.append(HeatMap(title, cells.reindex(index=depths, columns=lengths), len(scored)))
    return [one for one in maps if one.n]


def _discrimination_note(items: pd.DataFrame) -> str:
    """Where the baseline fails, so that the scores tell nothing of a cache."""
    fails = items[items["discriminates"].eq(False).fillna(False)]
    lengths = sorted(unique(fails, "tokens"))
    if not lengths:
        return ""
    everywhere = len(lengths) == items["tokens"].nunique()
    where = "" if everywhere else f" at {', '.join(f'{tokens:,}' for tokens in lengths)} tokens"
    return f"baseline: does not discriminate{where}"


def task_figure(frame: pd.DataFrame, items: pd.DataFrame, task: str) -> Figure:
    """The heat maps of one task, of the items that `placed_items` gives, in one scale of colours."""
    maps = heat_maps(frame, items, task)
    n_depths, n_lengths = maps[0].cells.shape
    rows = -(-len(maps) // MOST_COLUMNS)
    columns = -(-len(maps) // rows)
    size = (min(6.0, max(3.6, 1.2 + 0.7 * n_lengths)), min(5.2, max(2.4, 1.2 + 0.3 * n_depths)))
    sentences = [
        describe_setting(frame),
        "Mean score by where in the prompt the answer lies and how long the prompt is.",
    ]
    figure, axes = titled_grid(f"Task {task}", sentences, len(maps), columns, size)
    n_letters = int(11 * (figure.get_figwidth() / columns - 0.7))  # that fit above a panel
    for index, (axis, one) in enumerate(zip(axes, maps, strict=True)):
        title = "\n".join(textwrap.fill(line, n_letters) for line in one.title.split("\n"))
        image = _draw_heat_map(axis, one.cells, title)
        axis.set_ylabel("depth, % of the prompt" if index % columns == 0 else "", size=9.5, color=INK)
        axis.set_xlabel("prompt, tokens" if index + columns >= len(maps) else "", size=9.5, color=INK)
    bar = figure.colorbar(image, ax=axes, pad=0.015, aspect=30, label="score")
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=9, colors=INK)
    return figure


def _draw_heat_map(axis: Axes, cells: pd.DataFrame, title: str) -> Any:
    scores = cells.to_numpy(dtype=float, na_value=math.nan)
    axis.set_facecolor(FAINT)  # what was not asked
    image = axis.imshow(scores, cmap="cividis", vmin=0.0, vmax=1.0, aspect="auto")
    if scores.size <= MOST_NUMBERED_CELLS:
        for row, column in np.argwhere(np.isfinite(scores)):
            score = scores[row, column]
            ink = "white" if score < 0.5 else INK
            axis.text(column, row, f"{score:.2g}", ha="center", va="center", size=8.5, color=ink)
    every = -(-len(cells.index) // 12)
    shown = range(0, len(cells.index), every)
    axis.set_yticks(shown, [f"{100.0 * cells.index[row]:.0f}" for row in shown])
    axis.set_xticks(range(len(cells.columns)), [f"{tokens:,}" for tokens in cells.columns])
    axis.set_title(title, loc="left", size=10.5, weight="bold", color=INK)
    axis.tick_params(length=0, labelsize=9, colors=INK, pad=4)
    axis.spines[:].set_visible(False)
    return image
