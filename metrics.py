"""What a run leaves behind, and the formulas that turn records into figures.

Two ideas:

* **Missing is None, never 0.** A figure that was not measured, or whose denominator is empty, is None.
* **A result is plain values.** `RunResult.to_dict()` is JSON as it stands, with `schema_version`.

The prefetch figures are those of hardware prefetching (Srinath et al., "Feedback Directed Prefetching", HPCA 2007):
accuracy = useful / issued, coverage = useful / (useful + misses), timeliness = on time / useful.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from recorder import Recorder

SCHEMA_VERSION = 1
ITL_PERCENTILES = (50, 90, 99)


def ratio(numerator: float | None, denominator: float | None) -> float | None:
    """`numerator / denominator`, or None where either is missing or the denominator is 0."""
    if numerator is None or not denominator:
        return None
    return numerator / denominator


def difference(one: float | None, other: float | None) -> float | None:
    """`one - other`, or None where either is missing."""
    return None if one is None or other is None else one - other


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


def percentile(values: Sequence[float], share: float) -> float | None:
    """The value below which `share` percent of them lie, between two of them in proportion; None of no values."""
    if not values:
        return None
    ordered = sorted(values)
    position = share / 100.0 * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


@dataclasses.dataclass(frozen=True)
class Timing:
    """Times of one generation. All from one clock, named in `clock`; `itl_ms` has one entry per token after the first.

    TTFT is prompt to first token, so it is the prefill. TPOT = (E2E - TTFT) / (N - 1): decode time per token, which is
    the mean of the ITLs. Their percentiles say what it hides: how long the slow tokens took.
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
            **{f"itl_p{share}_ms": percentile(self.itl_ms, share) for share in ITL_PERCENTILES},
            "tokens_per_second": per_second,
            "decode_tokens_per_second": ratio(1000.0, self.tpot_ms),
            "batch_tokens_per_second": None if per_second is None else per_second * self.batch_size,
        }


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
    hit_rate, shadow_rate, all_slots_rate = (
        ratio(decode[name], decode["accesses"]) for name in ("hits", "shadow_hits", "shadow_slots_hits")
    )
    return {
        "accesses": decode["accesses"],
        "hits": decode["hits"],
        "late": decode["late"],
        "misses": decode["misses"],
        "hit_rate": hit_rate,
        "late_rate": ratio(decode["late"], decode["accesses"]),
        "miss_rate": ratio(decode["misses"], decode["accesses"]),
        "lru_hits": decode["lru_hits"],
        "hits_beyond_lru": difference(decode["hits"], decode["lru_hits"]),
        "shadow_lru_hit_rate": shadow_rate,
        "gain_over_lru": difference(hit_rate, shadow_rate),
        "shadow_lru_all_slots_hit_rate": all_slots_rate,
        "gain_over_lru_all_slots": difference(hit_rate, all_slots_rate),
        "skipped": decode["skipped"],
        "skipped_rate": ratio(decode["skipped"], decode["accesses"]),
        "evictions": decode["evictions"],
        "h2d_bytes": h2d_bytes,
        "d2h_bytes": decode["d2h_pages"] * page_bytes,
        "stall_ms": decode["stall_ms"],
        "stall_percent": percent(decode["stall_ms"], timing.decode_ms),
        "stages": _stages(decode, timing, link),
        "transfer_ms": transfer_ms,
        "hidden_transfer_share": _hidden_share(decode["stall_ms"], transfer_ms),
        "effective_bandwidth_gb_s": measured_gb_s,
        "link": link,
        "floor": _floor(decode, timing, page_bytes, link, measured_gb_s),
        "by_layer": recorder.layer_dicts(),
        "prefill": _prefill_figures(recorder, page_bytes),
    }


def _hidden_share(stall_ms: float | None, transfer_ms: float | None) -> float | None:
    """The share of the link's busy time that computing did not wait for."""
    waited = ratio(stall_ms, transfer_ms)
    return None if waited is None else max(0.0, 1.0 - waited)


def _stages(decode: dict[str, Any], timing: Timing, link: dict[str, Any]) -> dict[str, float | None]:
    """Where decode time goes, in ms: the stages of paging (see `recorder.StepRecord`), and all the rest.

    On CUDA `copy_ms` and `predict_ms` are time of the host, which works while the device computes, so there is no rest
    to speak of.
    """
    stages = {
        "select_ms": decode["select_ms"],
        "predict_ms": decode["predict_ms"],
        "wait_ms": decode["stall_ms"],
        "copy_ms": decode["copy_ms"],
        "attend_ms": decode["attend_ms"],
    }
    if timing.decode_ms is None or None in stages.values() or link.get("kind") == "bus":
        return {**stages, "other_ms": None}
    return {**stages, "other_ms": timing.decode_ms - sum(stages.values())}


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

    Compute is what is left of a step without waiting for pages and choosing them, and on a CPU without predicting them
    and asking for copies. Attention in parts and its merging are still in it, so it is no less than what computing
    would take if all pages were there; the baseline's time per token, where there is one, says that. The bandwidth is
    the link's own where it is known, and for a real bus the one measured in this run.
    """
    must_move_bytes = ratio(decode["must_move"] * page_bytes, decode["steps"])
    bandwidth_gb_s = link.get("bandwidth_gb_s") or measured_gb_s
    tpot_ms = timing.tpot_ms
    of_the_host = (0.0, 0.0) if link.get("kind") == "bus" else (decode["copy_ms"], decode["predict_ms"])
    paging = [decode["stall_ms"], decode["select_ms"], *of_the_host]
    paging_ms = None if None in paging else ratio(sum(paging), decode["steps"])
    compute_ms = difference(tpot_ms, paging_ms)
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
    """The `prefetch` block of a result, over decode steps.

    A page that was copied ahead is useful once it is asked for, and wasted when its slot is given to another. Those of
    which neither has happened by the end are unresolved; accuracy and the wasted bytes count them as not used.
    """
    decode = recorder.snapshot("decode")
    issued = decode["prefetch_issued"]
    useful = decode["prefetch_on_time"] + decode["prefetch_late"]
    wasted_bytes = (issued - useful) * page_bytes
    return {
        "issued": issued,
        "useful": useful,
        "on_time": decode["prefetch_on_time"],
        "late": decode["prefetch_late"],
        "wasted": decode["prefetch_wasted"],
        "declined": decode["prefetch_declined"],
        "pollution": decode["pollution"],
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

    `status` is `"ok"`, `"out_of_memory"`, `"error"`, or `"crashed"` where the run's process died; if not ok, `error`
    says what happened.
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


def token_agreement(tokens: Sequence[Sequence[int]], reference: Sequence[Sequence[int]] | None) -> dict[str, Any]:
    """The first figures of the `quality` block: are these tokens the baseline's? `first_divergent_token` counts from 0,
    and is None if they agree.

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
