"""The figures of a report: one list of what can be drawn of results, and how a figure becomes part of a page.

`FIGURES` is the list. Each kind has a name, a caption that says how to read it, and a maker, which yields a `Drawn` for
every figure there is something to draw for: title, words that say what can be seen in it, for who cannot see it, and
the figure itself. To add a figure to every report, add an entry.

A page must show its figures without a network and in print, so `data_uri` puts the whole picture into its address: as
SVG, which is sharp in any size, or as PNG where the SVG would be larger than `MOST_SVG_BYTES`, as with the dots of
thousands of runs.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from comparison import mean
from metrics import spread
from plots import comparison_figure, to_png
from quality_frame import task_items
from quality_plots import heat_maps, pareto_figure, placed_items, quality_points, task_figure
from result_frame import Result, dig, successful, unique, values
from run_plots import latency_trace_figure, layer_figure, longest_runs, step_figure
from text_tables import number_text

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

MOST_SVG_BYTES = 400_000


@dataclass(frozen=True)
class Drawn:
    """A figure, its title, and in words what it shows."""

    title: str
    shows: str
    figure: Figure


@dataclass(frozen=True)
class FigureKind:
    """What can be drawn of results.

    Attributes:
        name: for anchors, unique in the list.
        caption: how to read it.
        make: from results and their frame (`to_frame`) to the figures, none if there is nothing to draw.
    """

    name: str
    caption: str
    make: Callable[[Sequence[Result], Any], Iterator[Drawn]]


def drawings(results: Sequence[Result], frame: pd.DataFrame) -> Iterator[tuple[FigureKind, Drawn]]:
    """Every figure that these results have something for, in the order of the list, made one at a time."""
    for kind in FIGURES:
        for drawn in kind.make(results, frame):
            yield kind, drawn


# --- a figure on a page -------------------------------------------------------------------------------------------


def data_uri(figure: Figure) -> str:
    """The picture itself as an address: `data:image/svg+xml;base64,...`, or PNG."""
    svg = to_svg(figure)
    kind, picture = ("svg+xml", svg) if len(svg) <= MOST_SVG_BYTES else ("png", to_png(figure))
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode('ascii')}"


def to_svg(figure: Figure) -> bytes:
    """The figure as SVG with its letters as outlines, so that it looks the same wherever it is read."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "kv-prefetch"}):
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


# --- the makers ---------------------------------------------------------------------------------------------------


def _comparison(results: Sequence[Result], frame: pd.DataFrame) -> Iterator[Drawn]:
    done = successful(frame)
    if not values(done, "tpot_ms"):
        return
    longest = max(unique(done, "context_tokens"))
    at_longest = done[done["context_tokens"] == longest]
    said = [
        f"{strategy} {number_text(mean(runs, 'tpot_ms'))} ms a token"
        + _besides(runs, "device_kv_mb", "{} MiB of KV cache on the device")
        + _besides(runs, "stall_percent", "{} % of decode spent waiting")
        for strategy, runs in at_longest.groupby("strategy", sort=False)
    ]
    shows = f"Bar charts by context length. At the longest, {longest:,} tokens: {'; '.join(said)}."
    yield Drawn("The strategies side by side", shows, comparison_figure(frame, columns=2))


def _besides(runs: pd.DataFrame, column: str, words: str) -> str:
    average = mean(runs, column)
    return "" if average is None else f", {words.format(number_text(average))}"


def _pareto(results: Sequence[Result], frame: pd.DataFrame) -> Iterator[Drawn]:
    points = quality_points(frame)
    if not points:
        return
    said = [
        f"{point.strategy} at {point.context_tokens:,} tokens {point.kl_nats:.2g} nats"
        + ("" if point.costs["tpot_ms"] is None else f" for {number_text(point.costs['tpot_ms'])} ms a token")
        for point in points
    ]
    shows = f"Scatter plots of divergence from the baseline against cost: {'; '.join(said)}."
    yield Drawn("Quality against cost", shows, pareto_figure(frame))


def _tasks(results: Sequence[Result], frame: pd.DataFrame) -> Iterator[Drawn]:
    items = placed_items(task_items(results))
    for task in unique(items, "task"):
        said = [
            f"{' '.join(one.title.split())}: {100 * one.cells.stack().mean():.0f} %"
            for one in heat_maps(frame, items, task)
        ]
        shows = f"Heat maps of the score by depth and length. Mean over their cells: {'; '.join(said)}."
        yield Drawn(f"Task {task}", shows, task_figure(frame, items, task))


def _token_times(results: Sequence[Result], frame: pd.DataFrame) -> Iterator[Drawn]:
    said = []
    for name, run in longest_runs(results).items():
        times = spread(dig(run, "timing.itl_ms") or [])
        if times["n"]:
            said.append(f"{name}: median {number_text(times['median'])} ms, slowest {number_text(times['max'])} ms")
    if said:
        yield Drawn("Time of each token", f"Lines over the tokens. {'; '.join(said)}.", latency_trace_figure(results))


def _layers(results: Sequence[Result], frame: pd.DataFrame) -> Iterator[Drawn]:
    said = []
    for name, run in longest_runs(results).items():
        layers = dig(run, "cache.by_layer") or []
        rates = [100.0 * layer["hits"] / layer["accesses"] for layer in layers if layer["accesses"]]
        if rates:
            ends = dict.fromkeys(f"{rate:.0f}" for rate in (min(rates), max(rates)))
            said.append(f"{name}: {' to '.join(ends)} %")
    if said:
        shows = f"Lines over the layers, lowest to highest hit rate. {'; '.join(said)}."
        yield Drawn("Hit rate by layer", shows, layer_figure(results))


def _steps(results: Sequence[Result], frame: pd.DataFrame) -> Iterator[Drawn]:
    for name, run in _paged_runs(results):
        steps = [step for step in run["steps"] if step["phase"] == "decode"]
        hits, late, misses = (sum(step[key] for step in steps) for key in ("hits", "late", "misses"))
        shows = f"Bars over {len(steps)} decode steps: {hits:,} hits, {late:,} late and {misses:,} misses in all."
        yield Drawn(f"Pages wanted at each step: {name}", shows, step_figure(name, run))


def _paged_runs(results: Sequence[Result]) -> Iterator[tuple[str, Result]]:
    for name, run in longest_runs(results).items():
        if any(step["phase"] == "decode" for step in run.get("steps") or []):
            yield name, run


FIGURES = (
    FigureKind(
        "comparison",
        "A panel for each question, a bar for each strategy. An em dash: no such figure; a cross: no run succeeded.",
        _comparison,
    ),
    FigureKind(
        "quality",
        "Lower left is better. What is approximate is fast for a reason, and this is the price.",
        _pareto,
    ),
    FigureKind("task", "By where in the prompt the answer lies, and how long the prompt is.", _tasks),
    FigureKind("tokens", "The first successful run of each strategy at its longest context.", _token_times),
    FigureKind("layers", "Decode steps of the same runs, each layer by itself.", _layers),
    FigureKind("steps", "The same run, all layers together: pages there in time, and pages waited for.", _steps),
)
