"""Which pages attention asked for and which were there: one run as heat maps, layer by layer and page by page.

A hit rate is one number for a run. What a policy and a selector do shows only over time: pages that stay wanted for
many steps, pages evicted just before they are wanted again, layers that wander through the context. A run with
`record_pages` keeps every request (`recorder.PageRequest`), and a request says both things at once: the pages that a
layer asked for at a step, and those that were resident at that moment.

    result = json.loads(Path("reactive.json").read_text())
    draw_page_heatmap(result["cache"]["requests"], "pages.png", "SmolLM2, LRU, 8 pages")

Above stand all layers, a cell for each layer and decode step; below single layers, a cell for each page and step. A
prefetched page becomes resident only as it is asked for, so here it is one that was on its way.
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Mapping, Sequence
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from plots import COLOURS, INK, to_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

MOST_LAYERS = 6
SUBDUED = "#555555"


class PageState(IntEnum):
    """What a page was to one layer at one step, as that layer asked for its pages."""

    NOT_YET = 0  # the context had not come to it
    ABSENT = 1
    IDLE = 2
    HIT = 3
    FETCHED = 4


APPEARANCE = {
    PageState.NOT_YET: ("#FFFFFF", None),
    PageState.ABSENT: ("#E4E4E4", "not on the device"),
    PageState.IDLE: (COLOURS[5], "resident, not attended to"),
    PageState.HIT: (COLOURS[1], "attended to, was resident"),
    PageState.FETCHED: (COLOURS[6], "attended to, had to be fetched (or was on its way)"),
}


@dataclasses.dataclass(frozen=True)
class PageTrace:
    """The decode requests of one sequence.

    Attributes:
        requests: by layer and step; a layer need not have asked at every step.
        layers: those that asked, ascending.
        steps: from the first to the last of them, without gaps.
        n_sequences: how many sequences the run had.
    """

    requests: dict[tuple[int, int], Mapping[str, Any]]
    layers: list[int]
    steps: range
    n_sequences: int


def trace_of(requests: Sequence[Mapping[str, Any]]) -> PageTrace:
    """The decode requests of sequence 0, from the requests of a result.

    Raises:
        ValueError: there are none.
    """
    decode = [request for request in requests if request["phase"] == "decode"]
    first = {(request["layer"], request["step"]): request for request in decode if request["sequence"] == 0}
    if not first:
        raise ValueError("no requests of decode steps to draw; they need record_pages and 2 new tokens at least")
    steps = [step for _, step in first]
    return PageTrace(
        requests=first,
        layers=sorted({layer for layer, _ in first}),
        steps=range(min(steps), max(steps) + 1),
        n_sequences=len({request["sequence"] for request in decode}),
    )


def page_states(trace: PageTrace, layer: int) -> np.ndarray:
    """The `PageState` of every page at every step for one layer: uint8 [pages, steps].

    How many pages a context had at a step, all layers' requests of that step tell: its last page is always resident.
    """
    n_pages = dict.fromkeys(trace.steps, 0)
    for (_, step), request in trace.requests.items():
        n_pages[step] = max(n_pages[step], 1 + max([*request["pages"], *request["resident"]]))
    states = np.full((max(n_pages.values()), len(trace.steps)), PageState.NOT_YET, dtype=np.uint8)
    for column, step in enumerate(trace.steps):
        if (request := trace.requests.get((layer, step))) is None:
            continue
        states[: n_pages[step], column] = PageState.ABSENT
        states[request["resident"], column] = PageState.IDLE
        states[request["pages"], column] = PageState.FETCHED
        states[sorted(set(request["pages"]) & set(request["resident"])), column] = PageState.HIT
    return states


def hit_shares(trace: PageTrace) -> np.ndarray:
    """Of the pages that a layer attended to at a step, the share that was resident: [layers, steps], NaN for none."""
    shares = np.full((len(trace.layers), len(trace.steps)), np.nan)
    for place, request in _by_cell(trace):
        if wanted := set(request["pages"]):
            shares[place] = len(wanted & set(request["resident"])) / len(wanted)
    return shares


def attended_counts(trace: PageTrace) -> np.ndarray:
    """How many pages a layer attended to at a step: [layers, steps], NaN where it asked for none."""
    counts = np.full((len(trace.layers), len(trace.steps)), np.nan)
    for place, request in _by_cell(trace):
        counts[place] = len(request["pages"])
    return counts


def _by_cell(trace: PageTrace) -> list[tuple[tuple[int, int], Mapping[str, Any]]]:
    rows = {layer: row for row, layer in enumerate(trace.layers)}
    return [((rows[layer], step - trace.steps[0]), request) for (layer, step), request in trace.requests.items()]


def spread_layers(layers: Sequence[int], most: int = MOST_LAYERS) -> list[int]:
    """At most `most` of the layers, evenly spread, the first and the last among them."""
    if len(layers) <= most:
        return list(layers)
    return [layers[round(index * (len(layers) - 1) / (most - 1))] for index in range(most)]


# --- drawing ------------------------------------------------------------------------------------------------------


def draw_page_heatmap(requests: Sequence[Mapping[str, Any]], path: str | Path, title: str) -> Path:
    """Draw the requests of a result (`cache.requests`) as a PNG. Parent folders are made.

    Raises:
        ValueError: there are no requests of decode steps.
    """
    path, picture = Path(path), to_png(heatmap_figure(trace_of(requests), title))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture)
    return path


def heatmap_figure(trace: PageTrace, title: str) -> Figure:
    """The figure: two overviews of all layers, and below them up to `MOST_LAYERS` layers page by page."""
    from matplotlib.figure import Figure

    layers = spread_layers(trace.layers)
    columns = len(layers) if len(layers) <= 3 else 2 if len(layers) == 4 else 3
    rows = -(-len(layers) // columns)
    heading, words = textwrap.wrap(title, 115), textwrap.wrap(_reading(trace), 150)
    width, header = 13.0, 0.35 + 0.3 * len(heading) + 0.22 * len(words)
    height = header + 3.3 + 2.9 * rows + 0.5
    figure = Figure(figsize=(width, height), layout="constrained", dpi=120, facecolor="white")
    figure.get_layout_engine().set(rect=(0.005, 0.0, 0.99, 1 - header / height), hspace=0.03, wspace=0.03)
    left, top = 0.12 / width, 1 - 0.16 / height
    figure.text(left, top, "\n".join(heading), size=14, weight="bold", color=INK, va="top")
    below = top - (0.08 + 0.3 * len(heading)) / height
    figure.text(left, below, "\n".join(words), size=10, color=SUBDUED, va="top", linespacing=1.35)
    # Two figures within the figure, so that the colour bars above make no gaps between the panels below.
    above, beneath = figure.subfigures(2, height_ratios=[3.3, 2.9 * rows])
    _draw_overviews(above, trace)
    axes = list(beneath.subplots(rows, columns, squeeze=False).flat)
    for unused in axes[len(layers) :]:
        unused.set_axis_off()
    for index, (axis, layer) in enumerate(zip(axes, layers, strict=False)):
        _draw_pages(axis, page_states(trace, layer), f"Layer {layer}")
        axis.set_xlabel("decode step" if index + columns >= len(layers) else "", size=9.5, color=INK)
        axis.set_ylabel("page" if index % columns == 0 else "", size=9.5, color=INK)
    _draw_legend(figure)
    return figure


def _reading(trace: PageTrace) -> str:
    """How to read the panels, and of which sequence they are."""
    words = "Colours show what was where at the moment a layer asked for its pages. Page 0 is the start of the context."
    if trace.n_sequences == 1:
        return words
    return f"{words} Sequence 0 only; the run had {trace.n_sequences}."


def _draw_overviews(figure: SubFigure, trace: PageTrace) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

    axes, counts = figure.subplots(1, 2), attended_counts(trace)
    for axis, figures, heading, colours, top, ticks in (
        (axes[0], hit_shares(trace), "Attended pages that were resident", "cividis", 1.0, PercentFormatter(1.0)),
        (axes[1], counts, "Pages attended to", "YlGnBu", np.nanmax(counts), FuncFormatter(lambda n, _: f"{n:,.0f}")),
    ):
        image = axis.imshow(figures, cmap=colours, vmin=0.0, vmax=top, **_placed(figures))
        bar = figure.colorbar(image, ax=axis, ticks=MaxNLocator(5, integer=top > 1), format=ticks, pad=0.015, aspect=25)
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0, labelsize=9, colors=INK)
        _style(axis, heading)
        axis.yaxis.set_major_formatter(FuncFormatter(lambda row, _: _layer_at(trace.layers, row)))
        axis.set_xlabel("decode step", size=9.5, color=INK)
    axes[0].set_ylabel("layer", size=9.5, color=INK)


def _layer_at(layers: Sequence[int], row: float) -> str:
    """The label of a row; rows are layers that page, of which a model may skip some."""
    return f"{layers[int(row)]}" if row == int(row) and 0 <= row < len(layers) else ""


def _draw_pages(axis: Axes, states: np.ndarray, heading: str) -> None:
    """Colours rather than numbers are handed over, so that where cells are smaller than pixels, colours are mixed."""
    from matplotlib.colors import to_rgb

    palette = np.array([to_rgb(APPEARANCE[state][0]) for state in PageState])
    axis.imshow(palette[states], **_placed(states))
    _style(axis, heading)


def _placed(cells: np.ndarray) -> dict[str, Any]:
    """Rows count from 0 at the bottom and steps from 1, each number in the middle of its cell."""
    n_rows, n_steps = cells.shape[:2]
    return {"origin": "lower", "aspect": "auto", "extent": (0.5, n_steps + 0.5, -0.5, n_rows - 0.5)}


def _style(axis: Axes, heading: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_title(heading, loc="left", size=11.5, weight="bold", color=INK)
    axis.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    axis.yaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axis.tick_params(length=0, labelsize=9, colors=INK, pad=4)
    axis.spines[:].set_visible(False)


def _draw_legend(figure: Figure) -> None:
    from matplotlib.patches import Patch

    named = [(colour, name) for colour, name in APPEARANCE.values() if name is not None]
    entries = [Patch(facecolor=colour) for colour, _ in named]
    place = {"loc": "outside lower center", "ncols": len(named)}
    figure.legend(entries, [name for _, name in named], **place, frameon=False, fontsize=10)
