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
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from timeline import Copy, Timeline

EVENT_RESOLUTION_MS = 0.005  # two CUDA events next to each other are a few microseconds apart

Stall = float | Callable[[], float]


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

    The inference thread writes, any thread may read, and never sees half an event. Times on CUDA are pairs of events
    that can only be read once the device has passed them, so a time may be a callable: it is resolved in `settle`,
    after the run.

    Args:
        keep_requests: whether each request is kept as it is, in `requests`; else only counts are.
        timeline: is told when what is counted happened; None if nobody wants to know.
    """

    def __init__(self, keep_requests: bool = False, timeline: Timeline | None = None):
        self._lock = threading.Lock()
        self.keep_requests, self.timeline = keep_requests, timeline
        self.reset()

    def reset(self) -> None:
        """Forget everything; the next `begin_step` starts at step 0."""
        with self._lock:
            self.steps: list[StepRecord] = []
            self.by_layer: dict[int, StepRecord] = {}
            self.requests: list[PageRequest] = []
            self._unread: list[tuple[Callable[[float], None], Callable[[], float]]] = []
            if self.timeline is not None:
                self.timeline.reset()

    def begin_step(self, phase: str) -> None:
        """Open the record of the next forward pass; `phase` is `"prefill"` or `"decode"`."""
        with self._lock:
            self.steps.append(StepRecord(step=len(self.steps), phase=phase))

    def asked(self, layer: int, sequence: int, pages: Sequence[int], resident: Iterable[int]) -> None:
        """Keep a request, if requests are kept; see `PageRequest`."""
        if not self.keep_requests:
            return
        with self._lock:
            step = self.steps[-1]
            self.requests.append(PageRequest(step.step, step.phase, layer, sequence, list(pages), sorted(resident)))

    def count(self, layer: int, **counts: float) -> None:
        """Add to the current step, and for decode to its layer: `count(3, hits=7, misses=1)`."""
        with self._lock:
            for record in self._records(layer):
                held = record.__dict__  # this runs for every layer of every step, and is twice as fast as setattr
                for name, amount in counts.items():
                    held[name] += amount

    def waited(self, layer: int, stall: Stall, n_early: int = 0, n_prefetched: int = 0, n_lru_held: int = 0) -> None:
        """Add time that computing waited for a copy.

        Args:
            stall: milliseconds, or a function that gives them after the run.
            n_early: pages of that copy that were on their way as they were asked for; they are late, or hits if it
                turns out that nothing had to wait for them.
            n_prefetched: how many of these a prediction had asked for.
            n_lru_held: how many of these plain LRU would have held.
        """
        if self.timeline is not None:
            self.timeline.waited(layer, stall)
        with self._lock:
            add = partial(_add_wait, self._records(layer), n_early, n_prefetched, n_lru_held)
            if callable(stall):
                self._unread.append((add, stall))
            else:
                add(stall)

    def spent(self, layer: int, stage: str, time: Stall) -> None:
        """Add the time of a stage, `"select"`, `"predict"` or `"attend"`; in ms, or a function that gives it after the
        run."""
        if self.timeline is not None:
            self.timeline.spent(layer, stage, time)
        if callable(time):
            with self._lock:
                self._unread.append((partial(_add_time, self._records(layer), f"{stage}_ms"), time))
        else:
            self.count(layer, **{f"{stage}_ms": time})

    def hit_rate_so_far(self) -> float | None:
        """Hits / accesses of the decode steps so far, as far as they are known by now; None before the first."""
        with self._lock:
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
            for add, time in self._unread:
                add(time())
            self._unread = []

    def snapshot(self, phase: str) -> dict[str, Any]:
        """Totals over the steps of one phase; what depends on times is None while some are still on the device."""
        with self._lock:
            steps = [step for step in self.steps if step.phase == phase]
            totals = {"steps": len(steps), **_totals(steps)}
            if self._unread:
                totals |= dict.fromkeys(_KNOWN_AFTERWARDS)
            return totals

    def step_dicts(self) -> list[dict[str, Any]]:
        with self._lock:
            return [dataclasses.asdict(step) for step in self.steps]

    def request_dicts(self) -> list[dict[str, Any]]:
        with self._lock:
            return [dataclasses.asdict(request) for request in self.requests]

    def layer_dicts(self) -> list[dict[str, Any]]:
        """Decode totals by layer, in layer order."""
        with self._lock:
            return [{"layer": layer, **_totals([record])} for layer, record in sorted(self.by_layer.items())]

    def _records(self, layer: int) -> list[StepRecord]:
        if not self.steps:
            raise RuntimeError("a page event was reported before begin_step")
        current = self.steps[-1]
        if current.phase != "decode":
            return [current]
        of_layer = self.by_layer.get(layer)
        if of_layer is None:
            of_layer = self.by_layer[layer] = StepRecord(step=-1, phase="decode")
        return [current, of_layer]


def _add_time(records: Sequence[StepRecord], field: str, milliseconds: float) -> None:
    for record in records:
        setattr(record, field, getattr(record, field) + milliseconds)


def _add_wait(records: Sequence[StepRecord], n_early: int, n_prefetched: int, n_lru_held: int, stall_ms: float) -> None:
    for record in records:
        record.stall_ms += stall_ms
        if stall_ms > EVENT_RESOLUTION_MS:
            record.late += n_early
            record.prefetch_late += n_prefetched
        else:
            record.hits += n_early
            record.lru_hits += n_lru_held
            record.prefetch_on_time += n_prefetched


_KNOWN_AFTERWARDS = (
    *("accesses", "hits", "late", "lru_hits", "prefetch_on_time", "prefetch_late"),
    *("select_ms", "stall_ms", "attend_ms"),
)
_SUMMED = [field.name for field in dataclasses.fields(StepRecord) if field.name not in ("step", "phase")]


def _totals(records: Sequence[StepRecord]) -> dict[str, Any]:
    totals: dict[str, Any] = {name: sum(getattr(record, name) for record in records) for name in _SUMMED}
    totals["accesses"] = totals["hits"] + totals["late"] + totals["misses"]
    return totals
