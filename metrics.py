"""What a run records, and the formulas that turn records into figures.

Three ideas:

* **One recorder counts.** The paged cache reports its events to a `Recorder`; nothing else keeps a count. Events
  are split into the two phases of inference: *prefill* (the prompt, many tokens at once) and *decode* (one token a
  step). Rates such as the hit rate are about decode, where paging decides the speed.
* **Missing is None, never 0.** A figure that was not measured, or whose denominator is empty, is None.
* **A result is plain values.** `RunResult.to_dict()` is JSON as it stands, with `schema_version`.

An *access* is one page wanted by one layer in one step for one sequence. It is a *miss* when its copy has to be asked
for then and there, *late* when the copy was on its way already and computing had to wait for it, and else a *hit*.

The prefetch figures are those of hardware prefetching (Srinath et al., "Feedback Directed Prefetching", HPCA 2007):
accuracy = useful / issued, coverage = useful / (useful + misses), timeliness = on time / useful.
"""

from __future__ import annotations

import dataclasses
import statistics
import threading
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

SCHEMA_VERSION = 1
EVENT_RESOLUTION_MS = 0.005  # two CUDA events next to each other are a few microseconds apart

Stall = float | Callable[[], float]


def ratio(numerator: float | None, denominator: float | None) -> float | None:
    """`numerator / denominator`, or None where either is missing or the denominator is 0."""
    if numerator is None or not denominator:
        return None
    return numerator / denominator


def percent(part: float | None, whole: float | None) -> float | None:
    """`part` as a percentage of `whole`, or None."""
    share = ratio(part, whole)
    return None if share is None else 100.0 * share


def speedup_percent(baseline: float | None, other: float | None) -> float | None:
    """How much faster `other` is than `baseline`, both times: 100 * (baseline / other - 1). Negative is slower."""
    share = ratio(baseline, other)
    return None if share is None else 100.0 * (share - 1.0)


def spread(values: Sequence[float | None]) -> dict[str, float | int | None]:
    """`n`, mean, median, standard deviation, minimum and maximum of the values that are there."""
    present = [value for value in values if value is not None]
    if not present:
        return {"n": 0, "mean": None, "median": None, "std": None, "min": None, "max": None}
    return {
        "n": len(present),
        "mean": statistics.fmean(present),
        "median": statistics.median(present),
        "std": statistics.stdev(present) if len(present) > 1 else None,
        "min": min(present),
        "max": max(present),
    }


@dataclasses.dataclass(frozen=True)
class Timing:
    """Times of one generation. All from one clock, named in `clock`; `itl_ms` has one entry per token after the first.

    TTFT is prompt to first token, so it is the prefill. TPOT = (E2E - TTFT) / (N - 1): decode time per token.
    """

    n_tokens: int
    batch_size: int
    ttft_ms: float | None
    e2e_ms: float | None
    itl_ms: list[float]
    clock: str

    @classmethod
    def from_token_times(cls, token_times_ms: Sequence[float], batch_size: int, clock: str) -> Timing:
        """Args: `token_times_ms`, when each token of a sequence was there, in ms since the start, ascending."""
        times = list(token_times_ms)
        return cls(
            n_tokens=len(times),
            batch_size=batch_size,
            ttft_ms=times[0] if times else None,
            e2e_ms=times[-1] if times else None,
            itl_ms=[later - earlier for earlier, later in pairwise(times)],
            clock=clock,
        )

    @property
    def prefill_ms(self) -> float | None:
        return self.ttft_ms

    @property
    def decode_ms(self) -> float | None:
        return sum(self.itl_ms) if self.itl_ms else None

    @property
    def tpot_ms(self) -> float | None:
        return ratio(self.decode_ms, len(self.itl_ms))

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens of one sequence over the whole generation, prefill included."""
        return ratio(1000.0 * self.n_tokens, self.e2e_ms)

    def to_dict(self) -> dict[str, Any]:
        per_second = self.tokens_per_second
        return {
            **dataclasses.asdict(self),
            "prefill_ms": self.prefill_ms,
            "decode_ms": self.decode_ms,
            "tpot_ms": self.tpot_ms,
            "tokens_per_second": per_second,
            "decode_tokens_per_second": ratio(1000.0, self.tpot_ms),
            "batch_tokens_per_second": None if per_second is None else per_second * self.batch_size,
        }


@dataclasses.dataclass
class StepRecord:
    """Page traffic of one forward pass, a prefill chunk or a decode step, summed over layers and sequences.

    `prefetch_issued` counts copies asked for ahead of need in this step; `prefetch_on_time`, `prefetch_late` and
    `prefetch_wasted` are counted in the step in which the page was used, or dropped without having been used.
    `must_move` is the least number of pages any policy has to fetch in this step, given the budget.
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
    h2d_pages: int = 0
    d2h_pages: int = 0
    must_move: int = 0
    stall_ms: float = 0.0

    @property
    def accesses(self) -> int:
        return self.hits + self.late + self.misses


class Recorder:
    """Counts what the paged cache does; the only place that counts.

    The inference thread writes, any thread may read through `snapshot`. Stalls on CUDA are pairs of events that can
    only be read once the device has passed them, so a stall may be a callable: it is resolved in `settle`, after the
    run.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Forget everything; the next `begin_step` starts at step 0."""
        with self._lock:
            self.steps: list[StepRecord] = []
            self.by_layer: dict[int, StepRecord] = {}
            self._unread: list[tuple[list[StepRecord], Callable[[], float], int]] = []

    def begin_step(self, phase: str) -> None:
        """Open the record of the next forward pass; `phase` is `"prefill"` or `"decode"`."""
        with self._lock:
            self.steps.append(StepRecord(step=len(self.steps), phase=phase))

    def count(self, layer: int, **counts: int) -> None:
        """Add to the current step, and for decode to its layer: `count(3, hits=7, misses=1)`."""
        with self._lock:
            for record in self._records(layer):
                for name, amount in counts.items():
                    setattr(record, name, getattr(record, name) + amount)

    def waited(self, layer: int, stall: Stall, n_prefetched: int = 0) -> None:
        """Add time that computing waited for a copy.

        Args:
            stall: milliseconds, or a function that gives them after the run.
            n_prefetched: pages of that copy that were made ahead and have been asked for; they are late, or hits if it
                turns out that nothing had to wait for them.
        """
        with self._lock:
            records = self._records(layer)
            if callable(stall):
                self._unread.append((records, stall, n_prefetched))
            else:
                _add_wait(records, stall, n_prefetched)

    def settle(self) -> None:
        """Read the stalls that were still on the device. Call after the device has finished the run."""
        with self._lock:
            unread, self._unread = self._unread, []
            for records, stall, n_prefetched in unread:
                _add_wait(records, stall(), n_prefetched)

    def snapshot(self, phase: str) -> dict[str, Any]:
        """Totals over the steps of one phase; what depends on stalls is None while some are still on the device."""
        with self._lock:
            steps = [step for step in self.steps if step.phase == phase]
            totals = {"steps": len(steps), **_totals(steps)}
            if self._unread:
                totals |= dict.fromkeys(("accesses", "hits", "late", "prefetch_on_time", "prefetch_late", "stall_ms"))
            return totals

    def step_dicts(self) -> list[dict[str, Any]]:
        with self._lock:
            return [dataclasses.asdict(step) for step in self.steps]

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
        return [current, self.by_layer.setdefault(layer, StepRecord(step=-1, phase="decode"))]


def _add_wait(records: Sequence[StepRecord], stall_ms: float, n_prefetched: int) -> None:
    for record in records:
        record.stall_ms += stall_ms
        if stall_ms > EVENT_RESOLUTION_MS:
            record.late += n_prefetched
            record.prefetch_late += n_prefetched
        else:
            record.hits += n_prefetched
            record.prefetch_on_time += n_prefetched


_SUMMED = [field.name for field in dataclasses.fields(StepRecord) if field.name not in ("step", "phase")]


def _totals(records: Sequence[StepRecord]) -> dict[str, Any]:
    totals: dict[str, Any] = {name: sum(getattr(record, name) for record in records) for name in _SUMMED}
    totals["accesses"] = totals["hits"] + totals["late"] + totals["misses"]
    return totals


def cache_figures(
    recorder: Recorder, timing: Timing, page_bytes: int, link: dict[str, Any], transfer_ms: float | None
) -> dict[str, Any]:
    """The `cache` block of a result: decode figures, with prefill traffic beside them.

    Args:
        page_bytes: bytes of one page, K and V, of one layer of one sequence.
        link: what the pages travelled over; `bandwidth_gb_s` gives the floor where it is known.
        transfer_ms: time the link was busy during decode, or None where it was not measured.
    """
    decode = recorder.snapshot("decode")
    h2d_bytes = decode["h2d_pages"] * page_bytes
    measured_gb_s = ratio(h2d_bytes / 1e6, transfer_ms)
    return {
        "accesses": decode["accesses"],
        "hits": decode["hits"],
        "late": decode["late"],
        "misses": decode["misses"],
        "hit_rate": ratio(decode["hits"], decode["accesses"]),
        "late_rate": ratio(decode["late"], decode["accesses"]),
        "miss_rate": ratio(decode["misses"], decode["accesses"]),
        "evictions": decode["evictions"],
        "h2d_bytes": h2d_bytes,
        "d2h_bytes": decode["d2h_pages"] * page_bytes,
        "stall_ms": decode["stall_ms"],
        "stall_percent": percent(decode["stall_ms"], timing.decode_ms),
        "transfer_ms": transfer_ms,
        "effective_bandwidth_gb_s": measured_gb_s,
        "link": link,
        "floor": _floor(decode, timing, page_bytes, link, measured_gb_s),
        "by_layer": recorder.layer_dicts(),
        "prefill": _prefill_figures(recorder, page_bytes),
    }


def _prefill_figures(recorder: Recorder, page_bytes: int) -> dict[str, Any]:
    prefill = recorder.snapshot("prefill")
    return {
        "chunks": prefill["steps"],
        "evictions": prefill["evictions"],
        "h2d_bytes": prefill["h2d_pages"] * page_bytes,
        "d2h_bytes": prefill["d2h_pages"] * page_bytes,
        "stall_ms": prefill["stall_ms"],
    }


def _floor(
    decode: dict[str, Any], timing: Timing, page_bytes: int, link: dict[str, Any], measured_gb_s: float | None
) -> dict[str, Any]:
    """Roofline of a decode step: max(compute, bytes that must move / bandwidth), and how far the run is above it.

    Compute is what is left of a step without its stall, so it holds everything that is not waiting for a page. The
    bandwidth is the link's own where it is known, and for a real bus the one measured in this run.
    """
    must_move_bytes = ratio(decode["must_move"] * page_bytes, decode["steps"])
    bandwidth_gb_s = link.get("bandwidth_gb_s") or measured_gb_s
    tpot_ms = timing.tpot_ms
    stall_ms = ratio(decode["stall_ms"], decode["steps"])
    compute_ms = None if tpot_ms is None or stall_ms is None else tpot_ms - stall_ms
    transfer_ms = None
    if must_move_bytes is not None and bandwidth_gb_s:
        transfer_ms = must_move_bytes / bandwidth_gb_s / 1e6
    floor_ms = None if compute_ms is None or transfer_ms is None else max(compute_ms, transfer_ms)
    return {
        "must_move_bytes_per_step": must_move_bytes,
        "bandwidth_gb_s": bandwidth_gb_s,
        "bandwidth_from": None if bandwidth_gb_s is None else "link" if link.get("bandwidth_gb_s") else "measured",
        "transfer_ms_per_step": transfer_ms,
        "compute_ms_per_step": compute_ms,
        "floor_ms_per_step": floor_ms,
        "tpot_over_floor": ratio(tpot_ms, floor_ms),
    }


def prefetch_figures(recorder: Recorder, page_bytes: int) -> dict[str, Any]:
    """The `prefetch` block of a result, over decode steps."""
    decode = recorder.snapshot("decode")
    issued = decode["prefetch_issued"]
    useful = decode["prefetch_on_time"] + decode["prefetch_late"]
    wasted_bytes = decode["prefetch_wasted"] * page_bytes
    return {
        "issued": issued,
        "useful": useful,
        "on_time": decode["prefetch_on_time"],
        "late": decode["prefetch_late"],
        "wasted": decode["prefetch_wasted"],
        "unresolved": issued - useful - decode["prefetch_wasted"],
        "accuracy": ratio(useful, issued),
        "coverage": ratio(useful, useful + decode["misses"]),
        "timeliness": ratio(decode["prefetch_on_time"], useful),
        "wasted_bytes": wasted_bytes,
        "misprediction_cost_percent": percent(wasted_bytes, decode["h2d_pages"] * page_bytes),
    }


@dataclasses.dataclass
class RunResult:
    """Everything one run leaves behind. Blocks that do not apply to a mode, or were not measured, are None.

    `status` is `"ok"`, `"out_of_memory"` or `"error"`; if not ok, `error` says what happened.
    """

    spec: dict[str, Any]
    run_id: str
    status: str = "ok"
    error: str | None = None
    started_at: str | None = None
    duration_seconds: float | None = None
    environment: dict[str, Any] | None = None
    model: dict[str, Any] | None = None
    context: dict[str, Any] | None = None
    timing: dict[str, Any] | None = None
    memory: dict[str, Any] | None = None
    power: dict[str, Any] | None = None
    cache: dict[str, Any] | None = None
    prefetch: dict[str, Any] | None = None
    quality: dict[str, Any] | None = None
    tokens: dict[str, Any] | None = None
    steps: list[dict[str, Any]] | None = None

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    def to_dict(self) -> dict[str, Any]:
        return {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(self)}


def fidelity(tokens: Sequence[Sequence[int]], reference: Sequence[Sequence[int]] | None) -> dict[str, Any]:
    """The `quality` block: are these tokens the baseline's? `first_divergent_token` counts from 0; None if they agree.

    Without a baseline to compare with, both are None.
    """
    if reference is None:
        return {"matches_baseline": None, "first_divergent_token": None}
    divergent = [_first_difference(row, other) for row, other in zip(tokens, reference, strict=True)]
    found = [position for position in divergent if position is not None]
    return {"matches_baseline": not found, "first_divergent_token": min(found) if found else None}


def _first_difference(row: Sequence[int], other: Sequence[int]) -> int | None:
    for position, (token, expected) in enumerate(zip(row, other, strict=False)):
        if token != expected:
            return position
    return None if len(row) == len(other) else min(len(row), len(other))
