"""Made-up results of paged runs with all their figures, easy to calculate with by hand. They are no measurements."""

from __future__ import annotations

from result_fixtures import LINK, MIB, make_result

from metrics import RunResult

CACHE = {
    "accesses": 1000,
    "hits": 900,
    "late": 40,
    "misses": 60,
    "hit_rate": 0.9,
    "shadow_lru_hit_rate": 0.8,
    "gain_over_lru": 0.1,
    "lru_hits": 780,
    "hits_beyond_lru": 120,
    "shadow_lru_all_slots_hit_rate": 0.92,
    "gain_over_lru_all_slots": -0.02,
    "evictions": 55,
    "h2d_bytes": 7 * MIB,
    "stall_ms": 12.5,
    "stall_percent": 5.0,
    "hidden_transfer_share": 0.625,
    "skipped": 0,
    "skipped_rate": 0.0,
    "attended_pages": 17,
    "n_pages": 65,
    "stages": {"select_ms": 60.0, "predict_ms": 25.0, "wait_ms": 12.5, "copy_ms": 5.0, "attend_ms": 100.0},
    "link": LINK,
    "floor": {"tpot_over_floor": 1.25},
}
PREFETCH = {
    "issued": 200,
    "on_time": 120,
    "late": 40,
    "wasted": 40,
    "unresolved": 5,
    "accuracy": 0.8,
    "coverage": 0.64,
    "timeliness": 0.75,
    "wasted_bytes": 3 * MIB,
    "declined": 1234,
    "pollution": 7,
}


def make_run(mode="predictive", tokens=(5, 6, 7), paging=None, cache=None, prefetch=None, quality=None, **spec):
    """A run of 10 decode steps under `quest`, with some of its figures replaced; None takes one away."""
    blocks = make_result(mode, tpot_ms=50.0, **spec)
    del blocks["schema_version"]
    blocks["spec"]["paging"] |= {"selector": "quest", "granularity": "layer", "dense_layers": 0} | (paging or {})
    blocks["memory"] |= {"gpu_delta_mb": None, "rss_mb": 100.0, "digest_bytes": 2 * MIB, "disk_kv_bytes": 0}
    blocks["cache"] = _without_none(CACHE | (cache or {}))
    blocks["prefetch"] = _without_none(PREFETCH | (prefetch or {})) if mode == "predictive" else None
    blocks["quality"] |= quality or {}
    return RunResult(**blocks, tokens={"ids": [list(tokens)], "text": None})


def _without_none(block):
    return {name: value for name, value in block.items() if value is not None}
