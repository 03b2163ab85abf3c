"""What prefetching did in one run: how often it helped, how well it guessed, and what it hid under computation.

Four figures, each for one question, drawn from one result:

* `hit_rate_by_layer`: how many accesses became hits by prefetch that plain LRU would not have had;
* `prefetch_over_steps`: whether guesses were right and pages there, step by step, and what the threshold did about it;
* `calibration`: whether a confidence of 0.8 means that four out of five such pages are asked for;
* `timeline_figure`: one decode step as it happened, copies under computation (see timeline.py).

Each is a pure function from a result to a figure, which raises ValueError where the result has nothing for it.
`draw_prefetch_plots` writes those that there is something for. Every title says which model, context, predictor,
selector and link, for lateness and waiting are a link's.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plots import COLOURS, FAINT, INK, clear_frame, legend_below, to_png
from registry import choice_text
from result_frame import Result, context_tokens, describe_link, dig
from timeline import COMPUTE, TO_DEVICE, TO_HOST, TRACKS, WAIT, Span

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUBDUED = "#555555"
SMOOTHED_STEPS = 8
LIGHT = COLOURS[7]  # of the spans' colours, the one on which white cannot be read
LABELLED_SHARE = 0.022  # of a panel's width that a span needs to hold its layer's number
DETAIL_LAYERS = 3

SEGMENTS = {  # of a layer's accesses, from the bottom up
    "lru_hits": ("hit that plain LRU would have had", COLOURS[5]),
    "hits_beyond_lru": ("hit that it would not have had", COLOURS[3]),
    "late": ("late: on its way, computing had to wait", COLOURS[7]),
    "misses": ("miss: asked for only then", COLOURS[6]),
    "skipped": ("skipped: left out rather than waited for", COLOURS[0]),
}
REST = "#D3E4F0"  # a pale shade of attention's colour: computation as well
SPAN_STYLES = {  # (track, name) -> legend, colour
    (COMPUTE, "attention"): ("attention over pages", COLOURS[1]),
    (COMPUTE, "page selection"): ("page selection", COLOURS[4]),
    (COMPUTE, "prediction"): ("prediction", COLOURS[7]),
    (WAIT, "wait"): ("computing waits for pages", COLOURS[6]),
    (TO_DEVICE, "prefetch"): ("prefetch", COLOURS[3]),
    (TO_DEVICE, "fetch"): ("fetch of missing pages", COLOURS[2]),
    (TO_HOST, "seal"): ("seal: a full page to the host", COLOURS[0]),
}


def draw_prefetch_plots(result: Result, folder: str | Path) -> list[Path]:
    """Write as PNG what there is something to draw for, and return the paths. The folder is made.

    A file of the same name that an earlier run left is removed where there is nothing to draw: it would pass for this
    run's.
    """
    written = []
    for name, figure_of in FIGURES.items():
        path = Path(folder) / f"{name}.png"
        try:
            figure = figure_of(result)
        except NothingToDraw:
            path.unlink(missing_ok=True)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(to_png(figure))
        written.append(path)
    return written


class NothingToDraw(ValueError):
    """The result lacks what a figure is drawn from."""


def describe_run(result: Result) -> str:
    """Model, context, predictor, selector and link in one line, as far as they are known."""
    tokens, link = context_tokens(result), describe_link(result)
    words = [dig(result, "spec.model_name"), None if tokens is None else f"{tokens:,} tokens of context"]
    for name, path in (("predictor", "spec.prefetch.predictor"), ("selector", "spec.paging.selector")):
        choice = dig(result, path)
        words.append(None if choice is None else f"{name}: {choice_text(choice)}")
    words.append(None if link is None else f"link: {link}")
    return " · ".join(str(word) for word in words if word is not None)


# --- hits by layer ------------------------------------------------------------------------------------------------


def access_shares(layer: Mapping[str, Any]) -> dict[str, float]:
    """What became of a layer's accesses, by the keys of `SEGMENTS`, as shares of them all; together they are 1.

    `hits_beyond_lru` are the hits less those that plain LRU of the same size would have had as well. A step that skips
    what is not there waits for nothing, so what was late or missed is skipped then.
    """
    skipped = layer.get("skipped", 0)
    counts = {
        "lru_hits": layer["lru_hits"],
        "hits_beyond_lru": layer["hits"] - layer["lru_hits"],
        "late": 0 if skipped else layer["late"],
        "misses": 0 if skipped else layer["misses"],
        "skipped": skipped,
    }
    total = sum(counts.values())
    return {name: count / total for name, count in counts.items()}


def hit_rate_by_layer(result: Result) -> Figure:
    """The accesses of every layer, stacked by what became of them."""
    layers = [layer for layer in dig(result, "cache.by_layer") or [] if layer["accesses"] and "lru_hits" in layer]
    if not layers or not result.get("prefetch"):
        raise NothingToDraw("no accesses of a predictive run by layer")
    figure, (axis,) = _panels(result, "What became of each layer's accesses", [3.8])
    shares = [access_shares(layer) for layer in layers]
    places, floor = [layer["layer"] for layer in layers], [0.0] * len(layers)
    for name, (label, colour) in SEGMENTS.items():
        heights = [100.0 * share[name] for share in shares]
        if name != "skipped" or any(heights):
            axis.bar(places, heights, 0.86, bottom=floor, color=colour, label=label, zorder=2)
        floor = [below + height for below, height in zip(floor, heights, strict=True)]
    _whole_numbers(axis, "layer")
    axis.set_ylabel("% of accesses", color=INK)
    axis.set_ylim(0, 100)
    axis.set_xlim(min(places) - 0.6, max(places) + 0.6)
    _legend(figure, [axis])
    return figure


# --- over steps ---------------------------------------------------------------------------------------------------


def windowed_percent(parts: Sequence[float], wholes: Sequence[float], window: int) -> list[float]:
    """At each step, the parts of the last `window` steps as a percentage of their wholes; NaN where those are 0."""
    percentages = []
    for step in range(1, len(parts) + 1):
        last = slice(max(0, step - window), step)
        whole = sum(wholes[last])
        percentages.append(100.0 * sum(parts[last]) / whole if whole else float("nan"))
    return percentages


def prefetch_over_steps(result: Result) -> Figure:
    """Accuracy of prefetches and hit rate over decode steps; below them the threshold and the load of the link."""
    steps = [step for step in result.get("steps") or [] if step["phase"] == "decode"]
    if not steps or not any(step["prefetch_issued"] for step in steps):
        raise NothingToDraw("no decode step has issued a prefetch")
    thresholds = dig(result, "prefetch.thresholds") or []
    figure, axes = _panels(result, "Prefetching, step by step", [2.6, 2.2][: 2 if thresholds else 1])
    useful = [step["prefetch_on_time"] + step["prefetch_late"] for step in steps]
    issued = [step["prefetch_issued"] for step in steps]
    accesses = [step["hits"] + step["late"] + step["misses"] for step in steps]
    places = range(1, len(steps) + 1)
    hits = [step["hits"] for step in steps]
    # A page is used steps after it was issued, so a few steps by themselves have no accuracy.
    so_far = windowed_percent(useful, issued, len(steps))
    axes[0].plot(places, so_far, color=COLOURS[3], linewidth=1.8, label="accuracy so far: prefetches used / issued")
    label = f"hit rate: hits / accesses, over the last {SMOOTHED_STEPS} steps (thin: each step)"
    axes[0].plot(places, windowed_percent(hits, accesses, 1), color=COLOURS[1], linewidth=0.8, alpha=0.35)
    axes[0].plot(places, windowed_percent(hits, accesses, SMOOTHED_STEPS), color=COLOURS[1], linewidth=1.8, label=label)
    _percent_axis(axes[0], "% of prefetches, of accesses", 100.0)
    if thresholds:
        # Its steps count decode steps; those of the records count prefill chunks as well.
        places = range(1, len(thresholds) + 1)
        for key, label, colour in (
            (
                "threshold",
                "threshold: least probability that is worth a copy (of a fixed one: least confidence)",
                COLOURS[6],
            ),
            ("link_load", "load of the link: the share of time in which it is busy", COLOURS[4]),
        ):
            values = [_percent_or_nan(one.get(key)) for one in thresholds]
            axes[1].plot(places, values, color=colour, linewidth=1.6, label=label)
        highest = max(one.get(key) or 0.0 for one in thresholds for key in ("threshold", "link_load"))
        _percent_axis(axes[1], "confidence and load, %", max(10.0, 100.0 * highest))
    for axis in axes:
        axis.set_xlim(0.5, max(len(steps), len(thresholds)) + 0.5)
    _whole_numbers(axes[-1], "decode step")
    _legend(figure, axes)
    return figure


def _percent_or_nan(share: float | None) -> float:
    return float("nan") if share is None else 100.0 * share


def _percent_axis(axis: Axes, label: str, top: float) -> None:
    axis.set_ylim(0, 1.04 * top)
    axis.set_ylabel(label, color=INK)


# --- calibration --------------------------------------------------------------------------------------------------


def calibration(result: Result) -> Figure:
    """Predicted confidence against observed use, a marker for each bin; below, how many guesses a bin holds."""
    bins = dig(result, "prefetch.calibration") or []
    if not bins:
        raise NothingToDraw("no guesses of pages that were not on the device")
    figure, (above, below) = _panels(result, "Does confidence mean what it says?", [4.0, 1.3], width=7.0)
    above.plot([0, 1], [0, 1], color=INK, linewidth=1, linestyle="--", label="as often as predicted", zorder=2)
    most = max(one["n"] for one in bins)
    above.plot(
        [one["confidence"] for one in bins], [one["used"] for one in bins], color=COLOURS[3], linewidth=1, zorder=3
    )
    above.scatter(
        [one["confidence"] for one in bins],
        [one["used"] for one in bins],
        s=[max(12, 200 * one["n"] / most) for one in bins],
        color=COLOURS[3],
        edgecolor="white",
        label="a bin of guesses; the larger, the more guesses",
        zorder=4,
        clip_on=False,
    )
    for one in bins:
        width = one["high"] - one["low"]
        below.bar(one["low"], one["n"], width, align="edge", color=COLOURS[3], edgecolor="white", zorder=2)
    above.set_ylabel("share that the layer asked for", color=INK)
    above.set_ylim(0, 1)
    below.set_ylabel("guesses", color=INK)
    below.set_xlabel("predicted confidence (guesses that were not on the device, issued or not)", color=INK)
    below.yaxis.get_major_locator().set_params(integer=True, nbins=4)
    below.set_xlim(0, max(1.0, *(one["high"] for one in bins)))
    _legend(figure, [above])
    return figure


# --- timeline -----------------------------------------------------------------------------------------------------


def timeline_figure(result: Result, step: int | None = None) -> Figure:
    """One decode step as it happened, a row for each track; below it, a few of its layers enlarged.

    Args:
        step: its number in the record; None for the one in the middle of the run.

    Raises:
        ValueError: the result has no timeline, or no such step.
    """
    spans = dig(result, "cache.timeline") or []
    starts = step_starts(spans)
    if not starts:
        raise NothingToDraw("no spans of decode steps; they need record_timeline")
    steps = sorted(starts)
    step = steps[len(steps) // 2] if step is None else step
    if step not in starts:
        raise ValueError(f"the timeline has no step {step}; its steps are {steps[0]} to {steps[-1]}")
    start_ms = starts[step]
    own = [span for span in spans if span["track"] in (COMPUTE, WAIT) and span["step"] == step]
    # After its last attention a step still has work, and copies to hide, until the next one asks for its first pages.
    windows = [(start_ms, starts.get(step + 1, max(span["end_ms"] for span in own)))]
    layers = sorted({span["layer"] for span in own})
    if len(layers) > 2 * DETAIL_LAYERS:
        first = (len(layers) - DETAIL_LAYERS) // 2
        enlarged = [span for span in own if span["layer"] in layers[first : first + DETAIL_LAYERS]]
        windows.append((min(span["start_ms"] for span in enlarged), max(span["end_ms"] for span in enlarged)))
    title = f"One decode step in time: step {step} of {steps[0]} to {steps[-1]}"
    figure, axes = _panels(result, title, [2.3] * len(windows), share=False)
    for axis, window in zip(axes, windows, strict=True):
        _draw_spans(axis, spans, window, start_ms)
    if len(windows) > 1:
        axes[1].set_title(
            f"Layers {layers[first]} to {layers[first + DETAIL_LAYERS - 1]} of it", loc="left", size=11, color=INK
        )
    axes[-1].set_xlabel("ms since the step began (numbers: the layer that attention or a copy is for)", color=INK)
    _legend(figure, axes)
    return figure


def step_starts(spans: Sequence[Span]) -> dict[int, float]:
    """Step -> start of its first span of computation or waiting, in ms."""
    starts: dict[int, float] = {}
    for span in spans:
        if span["track"] in (COMPUTE, WAIT):
            starts[span["step"]] = min(span["start_ms"], starts.get(span["step"], float("inf")))
    return starts


def within(spans: Sequence[Span], window: tuple[float, float]) -> list[Span]:
    """The spans, of any step, that lie in a window of time or reach into it."""
    return [span for span in spans if span["end_ms"] > window[0] and span["start_ms"] < window[1]]


def gaps(spans: Sequence[Span], window: tuple[float, float]) -> list[tuple[float, float]]:
    """The parts of a window in which no span of computation or waiting lies: (start, length), in ms."""
    free, reached = [], window[0]
    own = [span for span in within(spans, window) if span["track"] in (COMPUTE, WAIT)]
    for start, end in [*sorted((span["start_ms"], span["end_ms"]) for span in own), (window[1], window[1])]:
        if start > reached:
            free.append((reached, start - reached))
        reached = max(reached, end)
    return free


def _draw_spans(axis: Axes, spans: Sequence[Span], window: tuple[float, float], zero_ms: float) -> None:
    """Time from `window`, in ms, is drawn as ms since `zero_ms`."""
    seen, first_ms, last_ms = within(spans, window), window[0] - zero_ms, window[1] - zero_ms
    rest = [(start - zero_ms, length) for start, length in gaps(spans, window)]
    axis.broken_barh(rest, (TRACKS.index(COMPUTE) - 0.38, 0.76), facecolor=REST, label="the rest of the step", zorder=2)
    for (track, name), (label, colour) in SPAN_STYLES.items():
        row = TRACKS.index(track)
        drawn = [span for span in seen if span["track"] == track and span["name"] == name]
        if not drawn:
            continue
        stretches = [(span["start_ms"] - zero_ms, span["end_ms"] - span["start_ms"]) for span in drawn]
        # An edge of its own colour keeps a span visible that is narrower than a pixel.
        edge = colour if len(drawn) > 60 else "white"
        axis.broken_barh(
            stretches, (row - 0.38, 0.76), facecolor=colour, edgecolor=edge, linewidth=0.4, label=label, zorder=3
        )
        if track == WAIT:
            for start, length in stretches:
                axis.axvspan(start, start + length, color=colour, alpha=0.1, linewidth=0, zorder=1)
        else:
            for span in drawn:
                _label_span(axis, span, row, (first_ms, last_ms), zero_ms, colour)
    axis.set_yticks(range(len(TRACKS)), TRACKS)
    axis.set_ylim(len(TRACKS) - 0.5, -0.5)
    axis.set_xlim(first_ms, last_ms)
    clear_frame(axis)
    axis.grid(False)
    for row in range(1, len(TRACKS)):
        axis.axhline(row - 0.5, color=FAINT, linewidth=0.7)


def _label_span(axis: Axes, span: Span, row: int, shown: tuple[float, float], zero_ms: float, background: str) -> None:
    """The number of its layer, in the part of a span that is shown, where that is wide enough."""
    start, end = max(span["start_ms"] - zero_ms, shown[0]), min(span["end_ms"] - zero_ms, shown[1])
    if end - start >= LABELLED_SHARE * (shown[1] - shown[0]):
        ink = INK if background == LIGHT else "white"
        axis.text((start + end) / 2, row, str(span["layer"]), size=8, color=ink, ha="center", va="center", zorder=4)


# --- what all share -----------------------------------------------------------------------------------------------


FIGURES: dict[str, Callable[[Result], Figure]] = {
    "prefetch_hit_rate_by_layer": hit_rate_by_layer,
    "prefetch_over_steps": prefetch_over_steps,
    "prefetch_calibration": calibration,
    "prefetch_timeline": timeline_figure,
}


def _panels(
    result: Result, title: str, heights: Sequence[float], width: float = 10.0, share: bool = True
) -> tuple[Figure, list[Axes]]:
    """A figure with panels one above the other, of these heights in inches, below a title and what the run was."""
    from matplotlib.figure import Figure

    words = textwrap.wrap(describe_run(result), int(12.5 * width))
    header = 0.45 + 0.22 * len(words)
    height = header + sum(heights) + 1.1
    figure = Figure(figsize=(width, height), layout="constrained", dpi=110, facecolor="white")
    figure.get_layout_engine().set(rect=(0.005, 0.0, 0.99, 1 - header / height), hspace=0.06)
    left, top = 0.12 / width, 1 - 0.13 / height
    figure.text(left, top, title, size=13, weight="bold", color=INK, va="top")
    figure.text(left, top - 0.29 / height, "\n".join(words), size=9.5, color=SUBDUED, va="top", linespacing=1.35)
    axes = figure.subplots(len(heights), 1, squeeze=False, sharex=share, height_ratios=heights)[:, 0]
    for axis in axes:
        clear_frame(axis)
    return figure, list(axes)


def _whole_numbers(axis: Axes, label: str) -> None:
    axis.set_xlabel(label, color=INK)
    axis.xaxis.get_major_locator().set_params(integer=True)


def _legend(figure: Figure, axes: Sequence[Axes]) -> None:
    named = {}
    for axis in axes:
        named.update({name: entry for entry, name in zip(*axis.get_legend_handles_labels(), strict=True)})
    if named:
        legend_below(figure, list(named.values()), list(named))
