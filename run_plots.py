"""Single runs, token by token, layer by layer, step by step: what an average hides.

Each figure draws the run that says most about its strategy, the first successful one at its longest context
(`longest_runs`), and gives the strategy the colour that it has in `plots.comparison_figure`. Where pages travelled over
a simulated link, the title says so: waiting, lateness and time are then that link's.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from plots import COLOURS, INK, clear_frame, legend_below, line_styles
from quality_frame import describe_quality
from result_frame import Result, context_tokens, describe_link, dig, mode_rank, strategy_labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def longest_runs(results: Sequence[Result]) -> dict[str, Result]:
    """Each strategy's first successful run at its longest context: the one whose traces say most."""
    chosen: dict[str, Result] = {}
    for label, result in zip(strategy_labels(results), results, strict=True):
        best = chosen.get(label)
        if result.get("status") == "ok" and (best is None or context_tokens(result) > context_tokens(best)):
            chosen[label] = result
    return chosen


def latency_trace_figure(results: Sequence[Result]) -> Figure:
    """The time of every token after the first, one line per strategy, at its longest context."""
    looks, chosen = _looks_of(results), longest_runs(results)
    title = f"Time of each token{_link_words(chosen.values())}"
    figure, axis = _single_axis(title, "token", "ms since the token before")
    for name, run in chosen.items():
        times_ms = dig(run, "timing.itl_ms") or []
        look = looks[name] | {"markersize": 5, "markevery": (3 * len(axis.lines) % 10, 10)}
        axis.plot(range(2, len(times_ms) + 2), times_ms, **look, label=_label(name, run))
    axis.set_ylim(bottom=0)
    _legend_of_axis(figure)
    return figure


def _label(name: str, run: Result) -> str:
    """What a legend calls a strategy's run: its context, and of an approximate one its quality."""
    parts = (name, f"{context_tokens(run):,} tokens of context", describe_quality(run))
    return ", ".join(part for part in parts if part)


def _looks_of(results: Sequence[Result]) -> dict[str, dict[str, Any]]:
    """The colours that `comparison_figure` gives these strategies, also those without a successful run, as lines."""
    return line_styles(list(dict.fromkeys(strategy_labels(sorted(results, key=mode_rank)))))


def _link_words(runs: Iterable[Result]) -> str:
    """What a title adds where pages travelled over a simulated link."""
    links = dict.fromkeys(describe_link(run) for run in runs if dig(run, "cache.link.kind") == "simulated")
    return f" (link: {'; '.join(links)})" if links else ""


def step_figure(name: str, run: Result) -> Figure:
    """Where the wanted pages were at each decode step, and what became of prefetched ones."""
    steps = [step for step in run.get("steps") or [] if step["phase"] == "decode"]
    words = ", ".join(part for part in (name, describe_quality(run)) if part)
    title = f"Pages wanted at each step: {words}{_link_words([run])}"
    figure, axis = _single_axis(title, "decode step", "pages, all layers")
    axis.margins(x=0.01)
    places, floor = range(1, len(steps) + 1), [0] * len(steps)
    for key, label, colour in (
        ("hits", "hit: there in time", COLOURS[5]),
        ("late", "late: on its way, computing had to wait", COLOURS[7]),
        ("misses", "miss: asked for only then", COLOURS[6]),
    ):
        heights = [step[key] for step in steps]
        axis.bar(places, heights, 1.0, bottom=floor, color=colour, label=label, zorder=2)
        floor = [below + height for below, height in zip(floor, heights, strict=True)]
    for key, label, line in (
        ("prefetch_issued", "prefetches issued", "-"),
        ("prefetch_wasted", "prefetches wasted", ":"),
    ):
        if any(step[key] for step in steps):
            axis.plot(places, [step[key] for step in steps], line, color=INK, linewidth=1.4, label=label, zorder=3)
    _legend_of_axis(figure)
    return figure


def _single_axis(title: str, x_label: str, y_label: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), layout="constrained", dpi=110, facecolor="white")
    axis = figure.subplots()
    axis.set_title(textwrap.fill(title, 85), loc="left", size=12, weight="bold", color=INK)
    axis.set_xlabel(x_label, color=INK)
    axis.set_ylabel(y_label, color=INK)
    axis.xaxis.get_major_locator().set_params(integer=True)
    clear_frame(axis)
    return figure, axis


def _legend_of_axis(figure: Figure) -> None:
    entries, names = figure.axes[0].get_legend_handles_labels()
    if names:
        legend_below(figure, entries, names, handlelength=3.5)
