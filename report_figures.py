"""The figures of a report: every plot of `plot_list.PLOTS` that there is something for, then step by step a run of each
strategy; with words for who cannot see them, and as part of a page.

`SHOWS` says of a plot, by its name, what can be seen in it, from the same figures that it draws.

A page must show its figures without a network and in print, so `data_uri` puts the whole picture into its address: as
SVG, which is sharp in any size, or as PNG where the SVG would be larger than `MOST_SVG_BYTES`, as with the dots of
thousands of runs.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from comparison import compare, mean
from metrics import spread
from plot_list import drawn
from plots import comparison_figure, rendered, to_png
from quality_frame import task_items, task_scores
from quality_plots import heat_maps, placed_items, quality_points
from result_frame import Result, dig, successful, unique, values
from run_plots import longest_runs, step_figure
from text_tables import number_text, ratio_text

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

MOST_SVG_BYTES = 400_000


@dataclass(frozen=True)
class Drawn:
    """A figure on a page.

    Attributes:
        name: for anchors.
        caption: how to read it.
        shows: in words what can be seen in it.
    """

    name: str
    title: str
    caption: str
    shows: str
    figure: Figure


def drawings(results: Sequence[Result], frame: pd.DataFrame) -> Iterator[Drawn]:
    """Every figure that these results have something for, made one at a time."""
    for plot, figure in drawn(results, {"kv_cache_comparison": _in_two_columns}):
        if plot.name.startswith("task_"):
            shows = _task(plot.title.removeprefix("Task "), results, frame)
        else:
            shows = SHOWS[plot.name](results, frame) if plot.name in SHOWS else ""
        yield Drawn(plot.name, plot.title, plot.caption, shows or plot.caption, figure)
    yield from _steps(results)


def _in_two_columns(frame: pd.DataFrame, results: Sequence[Result]) -> Figure | None:
    """The comparison in the width of a page, where three columns would be small."""
    return None if successful(frame).empty else comparison_figure(frame, columns=2)


# --- a figure on a page -------------------------------------------------------------------------------------------


def data_uri(figure: Figure) -> str:
    """The picture itself as an address: `data:image/svg+xml;base64,...`, or PNG."""
    svg = rendered(figure, "svg")
    kind, picture = ("svg+xml", svg) if len(svg) <= MOST_SVG_BYTES else ("png", to_png(figure))
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode('ascii')}"


# --- what they show -----------------------------------------------------------------------------------------------


def _comparison(results: Sequence[Result], frame: pd.DataFrame) -> str:
    done = successful(frame)
    if not values(done, "tpot_ms"):
        return ""
    longest = max(unique(done, "context_tokens"))
    at_longest = done[done["context_tokens"] == longest]
    said = [
        f"{strategy} {number_text(mean(runs, 'tpot_ms'))} ms a token"
        + _besides(runs, "device_kv_mb", "{} MiB of KV cache on the device")
        + _besides(runs, "stall_percent", "{} % of decode spent waiting")
        for strategy, runs in at_longest.groupby("strategy", sort=False)
    ]
    return f"Bar charts by context length. At the longest, {longest:,} tokens: {'; '.join(said)}."


def _besides(runs: pd.DataFrame, column: str, words: str) -> str:
    average = mean(runs, column)
    return "" if average is None else f", {words.format(number_text(average))}"


def _speedups(results: Sequence[Result], frame: pd.DataFrame) -> str:
    said = [
        f"{one.strategy} at {one.context_tokens:,} tokens {ratio_text(one.speedup.ratio)} times"
        for one in compare(frame)
        if one.speedup.ratio is not None
    ]
    return f"Lines over context length, as fast as the baseline: {'; '.join(said)}."


def _pareto(results: Sequence[Result], frame: pd.DataFrame) -> str:
    said = [
        f"{point.strategy} at {point.context_tokens:,} tokens {point.kl_nats:.2g} nats"
        + ("" if point.costs["tpot_ms"] is None else f" for {number_text(point.costs['tpot_ms'])} ms a token")
        for point in quality_points(frame, task_scores(results))
        if point.kl_nats is not None
    ]
    return f"Scatter plots of divergence from the baseline against cost: {'; '.join(said)}." if said else ""


def _task(task: str, results: Sequence[Result], frame: pd.DataFrame) -> str:
    items = placed_items(task_items(results))
    said = [
        f"{' '.join(one.title.split())}: {100 * one.cells.stack().mean():.0f} %"
        for one in heat_maps(frame, items, task)
    ]
    return f"Heat maps of the score by depth and length. Mean over their cells: {'; '.join(said)}."


def _token_times(results: Sequence[Result], frame: pd.DataFrame) -> str:
    said = []
    for name, run in longest_runs(results).items():
        times = spread(dig(run, "timing.itl_ms") or [])
        if times["n"]:
            said.append(f"{name}: median {number_text(times['median'])} ms, slowest {number_text(times['max'])} ms")
    return f"Lines over the tokens. {'; '.join(said)}."


def _layers(results: Sequence[Result], frame: pd.DataFrame) -> str:
    said = []
    for name, run in longest_runs(results).items():
        layers = dig(run, "cache.by_layer") or []
        rates = [100.0 * layer["hits"] / layer["accesses"] for layer in layers if layer["accesses"]]
        if rates:
            ends = dict.fromkeys(f"{rate:.0f}" for rate in (min(rates), max(rates)))
            said.append(f"{name}: {' to '.join(ends)} %")
    return f"Lines over the layers, lowest to highest hit rate. {'; '.join(said)}."


SHOWS: Mapping[str, Callable[[Sequence[Result], pd.DataFrame], str]] = {
    "kv_cache_comparison": _comparison,
    "speedup_by_context": _speedups,
    "hit_rate_by_layer": _layers,
    "token_times": _token_times,
    "quality_pareto": _pareto,
}


# --- step by step -------------------------------------------------------------------------------------------------


def _steps(results: Sequence[Result]) -> Iterator[Drawn]:
    for name, run in longest_runs(results).items():
        steps = [step for step in run.get("steps") or [] if step["phase"] == "decode"]
        if steps:
            hits, late, misses = (sum(step[key] for step in steps) for key in ("hits", "late", "misses"))
            shows = f"Bars over {len(steps)} decode steps: {hits:,} hits, {late:,} late and {misses:,} misses in all."
            caption = "One run at its longest context, all layers together: pages there in time, and pages waited for."
            yield Drawn("steps", f"Pages wanted at each step: {name}", caption, shows, step_figure(name, run))
