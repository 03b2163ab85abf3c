"""When computation and copies happened: spans of a run's decode steps, so that overlap can be seen and not only summed.

A hidden copy is one that lies under computation. Totals cannot show that; spans can. A *span* is plain data: on which
track it lies, what it is, for which layer, in which decode step it was asked for, and from when to when, in ms since
the first decode step began:

    {"track": "to device", "name": "prefetch", "layer": 3, "step": 7, "start_ms": 81.2, "end_ms": 83.9, "pages": 4}

Tracks: `compute` (attention over pages, page selection, prediction), `wait` (computation waiting for pages), `to
device` and `to host` (copies, from when the link begins on one until it has delivered it). What a step computes
besides, such as its projections and MLPs, is no span: it is what lies between them.

A moment is what the clock of a device gives: `time.perf_counter()` on a CPU, an event on CUDA, which is read after the
run. Time that is known on a CPU is reported as it ends, so its end is the moment of the report; time on CUDA brings its
events along, as a `DeviceTime`. `chrome_trace` makes of spans what https://ui.perfetto.dev and chrome://tracing open:
https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from utils import atomic_write_text

COMPUTE, WAIT, TO_DEVICE, TO_HOST = TRACKS = ("compute", "wait", "to device", "to host")
STAGE_NAMES = {"attend": "attention", "select": "page selection", "predict": "prediction"}
COPY_TRACKS = {"fetch": TO_DEVICE, "prefetch": TO_DEVICE, "seal": TO_HOST}

Span = Mapping[str, Any]
Moments = tuple[Any, Any]  # from, to


@dataclass(frozen=True)
class DeviceTime:
    """Milliseconds between pairs of CUDA events, added up; can be read once the device has passed them."""

    pairs: Sequence[Moments]

    def __call__(self) -> float:
        return sum(start.elapsed_time(end) for start, end in self.pairs)


class Copy(Protocol):
    """A copy under way or done."""

    def moments(self) -> Moments | None:
        """When the link began on it and when it had delivered it; None before that, and if it failed."""
        ...


class Timeline:
    """Records the spans of decode steps. Whoever counts tells it; see recorder.py.

    Nothing is read from a device before `spans`. On CUDA only what happens on the device is recorded: its host runs
    ahead of it, on a clock of its own. CUDA gives times as float32, so 100 s into a run they are good to 8 us.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything; the next decode step is the first."""
        self._step: int | None = None
        self._starts: dict[Any, Any] = {}  # device -> moment at which the first decode step began there
        self._kept: list[tuple[dict[str, Any], Callable[[], Moments | None]]] = []

    def begin_step(self, step: int, decoding: bool, now: Callable[[], Iterable[Any]]) -> None:
        """A forward pass begins.

        Args:
            step: its number in the record.
            decoding: whether it is a decode step; others are not recorded.
            now: gives this moment on each device. Recording begins with the first decode step that has devices, which
                a cache has that has written pages, or has been told where to.
        """
        if decoding and not self._starts:
            self._starts = {_device_of(moment): moment for moment in now()}
        self._step = step if decoding and self._starts else None

    def waited(self, layer: int, stall: float | DeviceTime) -> None:
        """Computation has waited, until now, for a copy."""
        self._add_time(WAIT, "wait", layer, stall)

    def spent(self, layer: int, stage: str, duration: float | DeviceTime) -> None:
        """A stage of a layer, a key of `STAGE_NAMES`, is over now."""
        self._add_time(COMPUTE, STAGE_NAMES[stage], layer, duration)

    def copying(self, layer: int, name: str, copy: Copy, n_pages: int) -> None:
        """A copy was asked for: a `"fetch"` of missing pages, a `"prefetch"`, or the `"seal"` of a full page."""
        if self._step is not None:
            self._keep(COPY_TRACKS[name], name, layer, copy.moments, pages=n_pages)

    def _add_time(self, track: str, name: str, layer: int, duration: float | DeviceTime) -> None:
        if self._step is None or duration == 0.0:
            return
        now = time.perf_counter()
        pairs = duration.pairs if isinstance(duration, DeviceTime) else [(now - duration / 1000.0, now)]
        for pair in pairs:
            self._keep(track, name, layer, lambda pair=pair: pair)

    def _keep(self, track: str, name: str, layer: int, moments: Callable[[], Moments | None], **more: int) -> None:
        span = {"track": track, "name": name, "layer": layer, "step": self._step}
        self._kept.append((span | more, moments))

    def spans(self) -> list[dict[str, Any]]:
        """What was recorded, by start. Call after the devices have finished; copies that failed are left out."""
        spans = []
        for span, read in self._kept:
            moments = read()
            if moments is None or (began := self._starts.get(_device_of(moments[0]))) is None:
                continue
            start_ms, end_ms = (_ms_between(began, moment) for moment in moments)
            spans.append({**span, "start_ms": start_ms, "end_ms": end_ms})
        return sorted(spans, key=lambda span: span["start_ms"])


def _device_of(moment: Any) -> Any:
    """The device whose clock a moment is of: that of an event, None for a CPU. Events of two devices do not compare."""
    return getattr(moment, "device", None)


def _ms_between(start: Any, end: Any) -> float:
    return 1000.0 * (end - start) if isinstance(start, float) else start.elapsed_time(end)


# --- for trace viewers --------------------------------------------------------------------------------------------


def chrome_trace(spans: Iterable[Span], title: str) -> dict[str, Any]:
    """Spans in the Trace Event Format: complete events ("X") in microseconds, a named thread for each track.

    Args:
        spans: as `Timeline.spans` gives them.
        title: names the process, under which viewers group the tracks.
    """
    threads = {track: number for number, track in enumerate(TRACKS, 1)}
    events: list[dict[str, Any]] = [{"ph": "M", "pid": 1, "name": "process_name", "args": {"name": title}}]
    for track, number in threads.items():
        thread = {"ph": "M", "pid": 1, "tid": number}
        events.append({**thread, "name": "thread_name", "args": {"name": track}})
        events.append({**thread, "name": "thread_sort_index", "args": {"sort_index": number}})
    events += [_complete_event(span, threads[span["track"]]) for span in spans]
    return {"displayTimeUnit": "ms", "traceEvents": events}


def _complete_event(span: Span, thread: int) -> dict[str, Any]:
    # Both ends are rounded rather than the duration, so that spans that touch still touch and do not overlap.
    start_us, end_us = (round(1000.0 * span[end], 3) for end in ("start_ms", "end_ms"))
    return {
        "ph": "X",
        "pid": 1,
        "tid": thread,
        "name": span["name"],
        "cat": span["track"],
        "ts": start_us,
        "dur": round(end_us - start_us, 3),
        "args": {key: span[key] for key in ("layer", "step", "pages") if key in span},
    }


def write_chrome_trace(path: str | Path, spans: Iterable[Span], title: str) -> Path:
    """Write `chrome_trace` as a JSON file, whole or not at all. Parent folders are made."""
    path = Path(path)
    atomic_write_text(path, json.dumps(chrome_trace(spans, title), allow_nan=False) + "\n")
    return path
