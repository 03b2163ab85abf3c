"""What the paged cache does, counted step by step.

One recorder counts: the cache reports its events to a `Recorder`, and nothing else keeps a count. Events are split into
the two phases of inference: *prefill* (the prompt, many tokens at once) and *decode* (one token a step). Rates such as
the hit rate are about decode, where paging decides the speed.

An *access* is one page wanted by one layer in one step for one sequence. It is a *miss* when its copy has to be asked
for then and there, *late* when the copy was on its way already and computing had to wait for it, and else a *hit*.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from timeline import Copy, Timeline

EVENT_RESOLUTION_MS = 0.005  # two CUDA events next to each other are a few microseconds apart
MOST_LATER_BYTES = 2**28  # kept for counting later; less would have long contexts counted in the midst of a run

Stall = float | Callable[[], float]
Counts = Mapping[str, float]  # by field of StepRecord


@dataclasses.dataclass
class StepRecord:
    """Page traffic of one forward pass, a prefill chunk or a decode step, summed over layers and sequences.

    `prefetch_issued` counts copies asked for ahead of need in this step; `prefetch_on_time`, `prefetch_late` and
    `prefetch_wasted` are counted in the step in which the page was used, or dropped without having been used.
    `prefetch_declined` counts guesses that would have had to be copied and were not worth it. `pollution` counts misses
    on pages that had been evicted for a prefetch. `skipped` are the accesses, late or missed, that a step did without.

    `must_move` is the least number of pages any policy has to fetch in this step, given the budget. `shadow_hits` are
    the hits that plain LRU of the same size would have had on the same requests, `shadow_slots_hits` those of an LRU
    that held pages in the staging slots too, and `lru_hits` are the hits that were among `shadow_hits`.

    The time that a step's paging takes, in ms, by stage: `select_ms` choosing the pages to attend to, `predict_ms`
    guessing those of the next, `stall_ms` waiting for pages, `copy_ms` asking for copies (what the copies themselves
    take is the link's time), `attend_ms` attention over pages and its merging.
    """

    step: int
    phase: str
    hits: int = 0
    late: int = 0
    misses: int = 0
    evictions: int = 0
    prefetch_issued: int = 0
    prefetch_on_time: int = 0
    prefetch_late: int = 0
    prefetch_wasted: int = 0
    prefetch_declined: int = 0
    pollution: int = 0
    skipped: int = 0
    h2d_pages: int = 0
    d2h_pages: int = 0
    must_move: int = 0
    shadow_hits: int = 0
    shadow_slots_hits: int = 0
    lru_hits: int = 0
    select_ms: float = 0.0
    predict_ms: float = 0.0
    stall_ms: float = 0.0
    copy_ms: float = 0.0
    attend_ms: float = 0.0

    @property
    def accesses(self) -> int:
        return self.hits + self.late + self.misses


@dataclasses.dataclass(frozen=True)
class PageRequest:
    """What one layer asked for in one step for one sequence.

    Attributes:
        pages: the pages asked for, in that order.
        resident: those of the sequence's pages that were resident then, asked for or not, ascending.
    """

    step: int
    phase: str
    layer: int
    sequence: int
    pages: list[int]
    resident: list[int]


class Recorder:
    """Counts what the paged cache does; the only place that counts.

    Events come for every layer of every step, so an event is only noted, and a step's events are summed as the next one
    begins or somebody reads. The inference thread writes, any thread may read, and never sees half an event.

    Times on CUDA are pairs of events that can only be read once the device has passed them, so a time may be a
    callable: it is resolved in `settle`, after the run.

    Args:
        keep_requests: whether each request is kept as it is, in `requests`; else only counts are.
        timeline: is told when what is counted happened; None if nobody wants to know.
    """

    def __init__(self, keep_requests: bool = False, timeline: Timeline | None = None):
        self._lock = threading.Lock()
        self.keep_requests, self.timeline = keep_requests, timeline
        # Each with the step and the layer that it belongs to:
        self._noted: deque[tuple[StepRecord, int, Counts]] = deque()
        self._later: deque[tuple[StepRecord, int, Callable[[], Counts]]] = deque()
        self._unread: list[tuple[StepRecord, int, Callable[[], float], Callable[[float], Counts]]] = []
        self.reset()

    def reset(self) -> None:
        """Forget everything; the next `begin_step` starts at step 0."""
        self.catch_up()
        with self._lock:
            self.steps: list[StepRecord] = []
            self.by_layer: dict[int, StepRecord] = {}
            self.requests: list[PageRequest] = []
            self._now: StepRecord | None = None
            self._noted.clear()
            self._unread = []
            if self.timeline is not None:
                self.timeline.reset()

    def begin_step(self, phase: str) -> None:
        """Open the record of the next forward pass; `phase` is `"prefill"` or `"decode"`."""
        with self._lock:
            self._sum_up()
            self._now = StepRecord(step=len(self.steps), phase=phase)
            self.steps.append(self._now)

    def asked(self, layer: int, sequence: int, pages: Sequence[int], resident: Iterable[int]) -> None:
        """Keep a request, if requests are kept; see `PageRequest`."""
        if not self.keep_requests:
            return
        with self._lock:
            step = self.steps[-1]
            self.requests.append(PageRequest(step.step, step.phase, layer, sequence, list(pages), sorted(resident)))

    def count(self, layer: int, **counts: float) -> None:
        """Add to the current step, and for decode to its layer: `count(3, hits=7, misses=1)`."""
        self._noted.append((self._now or _no_step(), layer, counts))

    def count_later(self, layer: int, counts: Callable[[], Counts], n_bytes: int) -> None:
        """Add to the current step what takes time to find out and is wanted after the run: `counts` is called when the
        counts are read, or when there is much to be kept until then. First come, first called.

        Args:
            n_bytes: about what it keeps, on the host or the device.
        """
        self._later.append((self._now or _no_step(), layer, counts))
        self._later_bytes += n_bytes
        if self._later_bytes > MOST_LATER_BYTES:
            self.catch_up()

    def catch_up(self) -> None:
        """Count what was left for later."""
        with self._lock:
            self._catch_up()

    def waited(
        self,
        layer: int,
        stall: Stall,
        n_early: int = 0,
        n_prefetched: int = 0,
        hit: Callable[[], int] = int,
    ) -> None:
        """Add time that computing waited for a copy.

        Args:
            stall: milliseconds, or a function that gives them after the run.
            n_early: pages of that copy that were on their way as they were asked for; they are late, or hits if it
                turns out that nothing had to wait for them.
            n_prefetched: how many of these a prediction had asked for.
            hit: told if they are hits; gives how many of them plain LRU would have held.
        """
        if self.timeline is not None:
            self.timeline.waited(layer, stall)
        if callable(stall):
            self._find_out(layer, stall, partial(_wait, n_early, n_prefetched, hit))
        else:
            self._noted.append((self._now or _no_step(), layer, _wait(n_early, n_prefetched, hit, stall)))

    def spent(self, layer: int, stage: str, time: Stall) -> None:
        """Add the time of a stage, `"select"`, `"predict"` or `"attend"`; in ms, or a function that gives it after the
        run."""
        if self.timeline is not None:
            self.timeline.spent(layer, stage, time)
        field = _SPENT[stage]
        if callable(time):
            self._find_out(layer, time, lambda milliseconds: {field: milliseconds})
        else:
            self._noted.append((self._now or _no_step(), layer, {field: time}))

    def _find_out(self, layer: int, time: Callable[[], float], counts: Callable[[float], Counts]) -> None:
        with self._lock:
            self._unread.append((self._now or _no_step(), layer, time, counts))

    def hit_rate_so_far(self) -> float | None:
        """Hits / accesses of the decode steps so far, as far as they are known by now; None before the first."""
        with self._lock:
            self._sum_up()
            hits = sum(record.hits for record in self.by_layer.values())
            accesses = sum(record.accesses for record in self.by_layer.values())
        return hits / accesses if accesses else None

    def copying(self, layer: int, name: str, copy: Copy, n_pages: int) -> None:
        """Note a copy that was asked for, if there is a timeline; see `Timeline.copying`."""
        if self.timeline is not None:
            self.timeline.copying(layer, name, copy, n_pages)

    def settle(self) -> None:
        """Read the times that were still on the device. Call after the device has finished the run."""
        with self._lock:
            for step, layer, time, counts in self._unread:
                self._add(step, layer, counts(time()))
            self._unread = []
            self._catch_up()

    def snapshot(self, phase: str) -> dict[str, Any]:
        """Totals over the steps of one phase; what depends on times is None while some are still on the device."""
        with self._lock:
            self._catch_up()
            steps = [step for step in self.steps if step.phase == phase]
            totals = {"steps": len(steps), **_totals(steps)}
            if self._unread:
                totals |= dict.fromkeys(_KNOWN_AFTERWARDS)
            return totals

    def step_dicts(self) -> list[dict[str, Any]]:
        with self._lock:
            self._catch_up()
            return [dataclasses.asdict(step) for step in self.steps]

    def request_dicts(self) -> list[dict[str, Any]]:
        with self._lock:
            return [dataclasses.asdict(request) for request in self.requests]

    def layer_dicts(self) -> list[dict[str, Any]]:
        """Decode totals by layer, in layer order."""
        with self._lock:
            self._catch_up()
            return [{"layer": layer, **_totals([record])} for layer, record in sorted(self.by_layer.items())]

    def _catch_up(self) -> None:
        self._sum_up()
        while self._later:
            step, layer, counts = self._later.popleft()
            self._add(step, layer, counts())
        self._later_bytes = 0

    def _sum_up(self) -> None:
        noted, add = self._noted, self._add
        while noted:
            add(*noted.popleft())

    def _add(self, step: StepRecord, layer: int, counts: Counts) -> None:
        of_step = step.__dict__  # twice as fast as setattr
        if step.phase != "decode":
            for name, amount in counts.items():
                of_step[name] += amount
            return
        if layer not in self.by_layer:
            self.by_layer[layer] = StepRecord(step=-1, phase="decode")
        of_layer = self.by_layer[layer].__dict__
        for name, amount in counts.items():
            of_step[name] += amount
            of_layer[name] += amount


def _no_step() -> NoReturn:
    raise RuntimeError("a page event was reported before begin_step")


_SPENT = {"select": "select_ms", "predict": "predict_ms", "attend": "attend_ms"}


def _wait(n_early: int, n_prefetched: int, hit: Callable[[], int], stall_ms: float) -> Counts:
    if n_early == 0:
        return {"stall_ms": stall_ms}
    if stall_ms > EVENT_RESOLUTION_MS:
        return {"stall_ms": stall_ms, "late": n_early, "prefetch_late": n_prefetched}
    return {"stall_ms": stall_ms, "hits": n_early, "prefetch_on_time": n_prefetched, "lru_hits": hit()}


_KNOWN_AFTERWARDS = (
    *("accesses", "hits", "late", "lru_hits", "prefetch_on_time", "prefetch_late"),
    *("select_ms", "stall_ms", "attend_ms"),
)
_SUMMED = [field.name for field in dataclasses.fields(StepRecord) if field.name not in ("step", "phase")]


def _totals(records: Sequence[StepRecord]) -> dict[str, Any]:
    totals: dict[str, Any] = {name: sum(getattr(record, name) for record in records) for name in _SUMMED}
    totals["accesses"] = totals["hits"] + totals["late"] + totals["misses"]
    return totals
