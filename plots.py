"""The comparison of strategies at a glance, as one figure.

`comparison_figure` has one panel per question: how fast, how much faster, how much memory, how much waiting,
how often there already, how well predicted. All panels read alike: contexts along the x axis, a bar per
strategy in the strategy's own colour, a dot for every run, a whisker for the standard deviation. Where a
strategy ran but has no such figure stands an em dash, where it failed a cross. A panel for which nothing was
measured is left out.

Figures are made without pyplot, so nothing global changes and no window is opened: `to_png` renders with Agg
wherever it runs, `rendered` also as PDF and SVG. Colours are those of Okabe and Ito, which people with colour blindness
can tell apart (https://jfly.uni-koeln.de/color/). `strategy_styles` and `line_styles` are the one place that gives a
strategy its look.
"""

from __future__ import annotations

import dataclasses
import io
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from comparison import baselines, compare, references
from metrics import spread
from quality_frame import quality_note
from result_frame import describe_setting, successful, unique, values

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Grey for what others are compared with, then blue, orange, green, purple, sky, vermillion, yellow.
COLOURS = ("#999999", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
HATCHES = ("", "///", "...", "xxx")  # from the ninth strategy on, colours return with a hatch
INK, FAINT = "#222222", "#DDDDDD"
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")  # with the lines, what tells strategies apart in grey print
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (7, 2)), (0, (1, 1)), (0, (3, 1)))
FILLS = ("full", "none", "left", "bottom")  # of markers, where bars have a hatch
FORMATS = ("png", "pdf", "svg")
MOST_LABELLED_BARS, MOST_UPRIGHT_LABELS = 40, 10
MOST_LINES = 6  # of a sentence above a figure: of a sweep's many strategies one could fill a page
LEGEND_ROW, ROWS_ALLOWED_FOR = 0.235, 2  # inches; rows of a legend that a figure has room for as it is made

Cell = tuple[str, int]  # a strategy at a context length


@dataclasses.dataclass(frozen=True)
class Bar:
    """What one strategy shows at one context: the bar's height, and the runs behind it."""

    height: float
    std: float | None
    dots: tuple[float, ...]

    def reach(self) -> tuple[float, float]:
        """The lowest and the highest ink."""
        std = self.std or 0.0
        inks = (0.0, self.height, self.height - std, self.height + std, *self.dots)
        return min(inks), max(inks)


@dataclasses.dataclass(frozen=True)
class Panel:
    """One question, its unit, and the bars that answer it. `to_hundred`: drawn on a scale to 100 %."""

    title: str
    unit: str
    bars: dict[Cell, Bar]
    to_hundred: bool = False
    signed: bool = False


def to_png(figure: Figure) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def rendered(figure: Figure, file_format: str) -> bytes:
    """A figure as a file in one of `FORMATS`; the same figure gives the same bytes, for neither date nor chance is in
    them. Letters in a PDF are TrueType, which journals ask for; in an SVG they are outlines, so that no font is missed.
    """
    if file_format == "png":
        return to_png(figure)
    import matplotlib

    undated = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}[file_format]
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "kv-prefetch", "pdf.fonttype": 42}):
        figure.savefig(buffer, format=file_format, metadata=undated)
    return buffer.getvalue()


def parse_formats(text: str) -> list[str]:
    """`png,svg` as a list of formats.

    Raises:
        ValueError: a word is no format, or there is none.
    """
    words = [word.strip().lower() for word in text.split(",")]
    for word in words:
        if word not in FORMATS:
            raise ValueError(
                f"unknown plot format {word!r}; write {', '.join(FORMATS)}, or several with commas between"
            )
    return list(dict.fromkeys(words))


# ----------------------------------------------------------------------------------------------------
# The comparison
# ----------------------------------------------------------------------------------------------------


def comparison_figure(frame: pd.DataFrame, columns: int | None = None) -> Figure:
    """All strategies at all contexts, one panel per question that the results answer.

    Args:
        columns: panels side by side at most; three, or two of a few, unless said.

    Raises:
        ValueError: no run succeeded, so there is nothing to draw.
    """
    panels = [panel for panel in _panels(frame) if panel.bars]
    if not panels:
        raise ValueError("no successful run to draw")
    styles, failed = strategy_styles(unique(frame, "strategy")), _failed_cells(frame)
    contexts = sorted(unique(frame, "context_tokens"))
    columns = min(len(panels), columns or (3 if len(panels) > 4 else 2))
    sentences = [describe_setting(frame), _reading(frame), quality_note(frame)]
    figure, axes = titled_grid("KV cache strategies compared", sentences, len(panels), columns)
    for axis, panel in zip(axes, panels, strict=True):
        _draw_panel(axis, panel, contexts, styles, failed)
    _draw_legend(figure, styles, references(frame).values(), bool(failed))
    return figure


def strategy_styles(strategies: Sequence[str]) -> dict[str, dict[str, str]]:
    """One colour per strategy, the same in every figure of these results."""
    return {
        name: {"color": COLOURS[index % len(COLOURS)], "hatch": HATCHES[index // len(COLOURS) % len(HATCHES)]}
        for index, name in enumerate(strategies)
    }


def line_styles(strategies: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The same colours for lines, each with its own marker and dashes, so that a print in grey can be read."""
    styles = {}
    for index, (name, style) in enumerate(strategy_styles(strategies).items()):
        of_colour, turn = index % len(COLOURS), index // len(COLOURS) % len(FILLS)
        styles[name] = {
            "color": style["color"],
            "marker": MARKERS[of_colour],
            "linestyle": DASHES[(of_colour + turn) % len(DASHES)],
            "fillstyle": FILLS[turn],
            "markerfacecoloralt": "white",
            "markeredgecolor": INK if turn == 0 else style["color"],
            "markeredgewidth": 0.7 if turn == 0 else 1.6,
            "markersize": 7.5,
            "linewidth": 1.7,
        }
    return styles


def _panels(frame: pd.DataFrame) -> list[Panel]:
    latency = _bars_of_runs(frame, "tpot_ms")
    memory = _bars_of_runs(frame, "device_kv_mb")
    stall = _bars_of_runs(frame, "stall_percent")
    hits = _bars_of_runs(frame, "hit_rate", 100.0)
    accuracy = _bars_of_runs(frame, "accuracy", 100.0)
    against = "the baseline" if baselines(frame) else ", ".join(references(frame).values())
    return [
        Panel("Decode latency", "ms per token (lower is better)", latency),
        Panel("Decode speed-up", f"% against {against} (above 0 is faster)", _speedup_bars(frame), signed=True),
        Panel("KV cache on the device, staging included", "MiB (lower is better)", memory),
        Panel("Stall: compute waiting for pages", "% of decode time (lower is better)", stall),
        Panel("Hit rate: pages there in time", "% of accesses (higher is better)", hits, to_hundred=True),
        Panel("Prediction accuracy", "% of prefetched pages used", accuracy, to_hundred=True),
    ]


def _bars_of_runs(frame: pd.DataFrame, column: str, scale: float = 1.0) -> dict[Cell, Bar]:
    bars = {}
    for cell, runs in successful(frame).groupby(["strategy", "context_tokens"]):
        dots = tuple(scale * value for value in values(runs, column))
        if dots:
            figures = spread(dots)
            bars[cell] = Bar(figures["mean"], figures["std"], dots)
    return bars


def _speedup_bars(frame: pd.DataFrame) -> dict[Cell, Bar]:
    bars = {}
    for c in compare(frame):
        if c.latency_speedup_percent is not None:
            std = spread(c.paired_speedups_percent)["std"]
            bars[c.strategy, c.context_tokens] = Bar(c.latency_speedup_percent, std, c.paired_speedups_percent)
    return bars


def _failed_cells(frame: pd.DataFrame) -> set[Cell]:
    """Where runs were tried and none succeeded."""
    tried = frame.dropna(subset=["context_tokens"]).groupby(["strategy", "context_tokens"])
    return {cell for cell, runs in tried if successful(runs).empty}


def titled_grid(
    title: str,
    sentences: Sequence[str],
    n_panels: int,
    columns: int,
    panel_inches: tuple[float, float] = (5.4, 3.7),
) -> tuple[Figure, list[Axes]]:
    """A figure with the title and those sentences that say something above, room for a legend below, and its panels."""
    from matplotlib.figure import Figure

    rows = -(-n_panels // columns)
    width = max(9.0, panel_inches[0] * columns)
    lines = {
        "width": int(width * 11),
        "max_lines": MOST_LINES,
        "placeholder": " \N{HORIZONTAL ELLIPSIS} and more, see the tables",
    }
    words = [line for sentence in sentences for line in textwrap.wrap(sentence, **lines)]
    header = 0.75 + 0.22 * len(words)
    height = panel_inches[1] * rows + header + 0.5
    figure = Figure(figsize=(width, height), layout="constrained", dpi=120, facecolor="white")
    figure.get_layout_engine().set(rect=(0.005, 0.0, 0.99, 1 - header / height), hspace=0.08, wspace=0.04)
    left, top = 0.12 / width, 1 - 0.16 / height
    figure.text(left, top, title, size=17, weight="bold", color=INK, va="top")
    below = top - 0.42 / height
    figure.text(left, below, "\n".join(words), size=10, color="#555555", va="top", linespacing=1.35)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in axes[n_panels:]:
        unused.set_axis_off()
    return figure, axes[:n_panels]


def _reading(frame: pd.DataFrame) -> str:
    """How to read the bars, with the number of runs behind each."""
    counts = [len(runs) for _, runs in successful(frame).groupby(["strategy", "context_tokens"])]
    if max(counts) == 1:
        return "Each bar is one run (n = 1), so there is no spread to show."
    n = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    words = f"Bars: mean of n = {n} runs (speed-up: from medians)."
    return f"{words} Whiskers: standard deviation (speed-up: of pairs). Dots: single runs."


def _draw_panel(
    axis: Axes,
    panel: Panel,
    contexts: Sequence[int],
    styles: Mapping[str, Mapping[str, str]],
    failed: set[Cell],
) -> None:
    strategies = [name for name in styles if any((name, context) in panel.bars for context in contexts)]
    width = min(0.84 / len(strategies), 0.3)
    drawn = []
    for index, name in enumerate(strategies):
        for group, context in enumerate(contexts):
            x, bar = group + (index - (len(strategies) - 1) / 2) * width, panel.bars.get((name, context))
            if bar is None:
                _mark_missing(axis, x, styles[name]["color"] if (name, context) in failed else None)
            else:
                _draw_bar(axis, x, 0.9 * width, bar, styles[name])
                drawn.append((x, bar))
    turned = len(drawn) > MOST_UPRIGHT_LABELS
    _style_axis(axis, panel, contexts)
    _scale(axis, panel, room=0.2 if turned else 0.14)
    if len(drawn) <= MOST_LABELLED_BARS:
        _label_bars(axis, drawn, panel.signed, turned)


def _mark_missing(axis: Axes, x: float, failed_colour: str | None) -> None:
    place = {"xytext": (0, 1), "textcoords": "offset points", "ha": "center", "va": "bottom"}
    if failed_colour is None:
        axis.annotate("\N{EM DASH}", (x, 0), **place, color="#777777")
    else:
        axis.annotate("\N{MULTIPLICATION SIGN}", (x, 0), **place, color=failed_colour, size=16, weight="bold")


def _draw_bar(axis: Axes, x: float, width: float, bar: Bar, style: Mapping[str, str]) -> None:
    axis.bar(x, bar.height, width, **style, edgecolor="white", linewidth=0.5, zorder=2)
    if len(set(bar.dots)) > 1:
        offsets = [width * 0.5 * (index / (len(bar.dots) - 1) - 0.5) for index in range(len(bar.dots))]
        places = [x + offset for offset in offsets]
        axis.scatter(places, bar.dots, s=9, color="white", edgecolor=INK, linewidth=0.6, zorder=4, clip_on=False)
        axis.errorbar(x, bar.height, yerr=bar.std, color=INK, linewidth=1, capsize=2.5, zorder=3)


def _scale(axis: Axes, panel: Panel, room: float) -> None:
    """From 0, so that heights compare; below it only where figures have a sign. Room beyond for the numbers."""
    reaches = [bar.reach() for bar in panel.bars.values()]
    low = min(low for low, _ in reaches) if panel.signed else 0.0
    high = 100.0 if panel.to_hundred else max(high for _, high in reaches)
    if low == high == 0.0:
        high = 1.0
    span = high - low
    axis.set_ylim(low - room * span if low < 0 else 0.0, high + room * span)


def _label_bars(axis: Axes, drawn: Sequence[tuple[float, Bar]], signed: bool, turned: bool) -> None:
    """The number beside each bar's end: upright, or turned where bars are narrow."""
    gap = 5 if turned else 3
    for x, bar in drawn:
        low, high = bar.reach()
        goes_down = bar.height < 0
        axis.annotate(
            _short(bar.height, signed),
            (x, low if goes_down else high),
            xytext=(0, -gap if goes_down else gap),
            textcoords="offset points",
            ha="center",
            va="top" if goes_down else "bottom",
            rotation=90 if turned else 0,
            size=7.5 if turned else 9,
            color=INK,
            zorder=5,
        )


def _short(value: float, signed: bool) -> str:
    digits = 0 if value == 0 or abs(value) >= 99.5 else 1 if abs(value) >= 0.995 else 2
    text = f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"
    return text.replace("-", "\N{MINUS SIGN}")


def _style_axis(axis: Axes, panel: Panel, contexts: Sequence[int]) -> None:
    axis.set_title(panel.title, loc="left", size=12, weight="bold", color=INK)
    axis.set_ylabel(panel.unit, size=9.5, color=INK)
    axis.set_xlabel("context, tokens", size=9.5, color=INK)
    axis.set_xticks(range(len(contexts)), [f"{context:,}" for context in contexts])
    axis.set_xlim(-0.55, len(contexts) - 0.45)
    axis.axhline(0, color=INK, linewidth=0.8, zorder=3)
    clear_frame(axis)


def clear_frame(axis: Axes) -> None:
    axis.grid(axis="y", color=FAINT, linewidth=0.7, zorder=0)
    axis.set_axisbelow(True)
    axis.tick_params(length=0, labelsize=9.5, colors=INK, pad=5)
    axis.spines[["top", "right", "left", "bottom"]].set_visible(False)


def _draw_legend(
    figure: Figure,
    styles: Mapping[str, Mapping[str, str]],
    references: Iterable[str],
    has_failures: bool,
) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    entries: list[Any] = [
        Patch(facecolor=style["color"], hatch=style["hatch"], edgecolor="white") for style in styles.values()
    ]
    names = [f"{name} (the reference)" if name in references else name for name in styles]
    if has_failures:
        entries.append(Line2D([], [], color=INK, marker="x", linestyle="", markeredgewidth=2))
        names.append("no run succeeded")
    legend_below(figure, entries, names)


def legend_below(figure: Figure, entries: Sequence[Any], names: Sequence[str], **look: Any) -> None:
    """A legend under the panels, in as many columns as the longest name leaves room for. The figure grows with it."""
    most = max(1, int(figure.get_figwidth() * 11 / (max(map(len, names)) + 7)))
    rows = -(-len(names) // most)
    columns = -(-len(names) // rows)
    _grow(figure, LEGEND_ROW * max(0, rows - ROWS_ALLOWED_FOR))
    figure.legend(entries, names, loc="outside lower center", ncols=columns, frameon=False, fontsize=10, **look)


def _grow(figure: Figure, inches: float) -> None:
    """Make a figure higher at its foot: what stands above the panels stays as far from the top as it was."""
    old, engine = figure.get_figheight(), figure.get_layout_engine()
    new = old + inches
    for text in figure.texts:
        x, y = text.get_position()
        text.set_position((x, 1 - (1 - y) * old / new))
    left, bottom, width, height = engine.get()["rect"]
    engine.set(rect=(left, bottom, width, 1 - bottom - (1 - bottom - height) * old / new))
    figure.set_figheight(new)
