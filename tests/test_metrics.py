"""Every figure of a result is its formula, shown here with numbers worked out by hand."""

from __future__ import annotations

import json
import math
import sys
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metrics import (
    RunResult,
    Timing,
    cache_figures,
    percent,
    percentile,
    prefetch_figures,
    ratio,
    speedup_percent,
    spread,
    token_agreement,
)
from recorder import Recorder

PAGE_BYTES = 1_000_000
TIMING = Timing.from_token_times([100.0, 190.0, 280.0], batch_size=1, clock="perf_counter")  # 180 ms for two steps


def recorded_decode() -> Recorder:
    """A prompt chunk, then two decode steps of two layers."""
    recorder = Recorder()
    recorder.begin_step("prefill")
    recorder.count(0, hits=50, misses=50, evictions=3, h2d_pages=7, d2h_pages=9, prefetch_issued=100)
    recorder.waited(0, 1000.0)
    recorder.begin_step("decode")
    recorder.count(0, hits=6, late=1, misses=1, h2d_pages=2, must_move=2, evictions=1)
    recorder.waited(0, 10.0)
    recorder.count(1, hits=8)
    recorder.waited(1, 20.0)
    recorder.begin_step("decode")
    recorder.count(0, hits=5, misses=3, h2d_pages=3, d2h_pages=1, must_move=2, evictions=2)
    recorder.waited(0, 6.0)
    return recorder


def figures(bandwidth_gb_s: float | None, transfer_ms: float | None = None) -> dict:
    return cache_figures(recorded_decode(), TIMING, PAGE_BYTES, {"bandwidth_gb_s": bandwidth_gb_s}, transfer_ms)


# --- times --------------------------------------------------------------------------------------------------


def test_ttft_itl_and_tpot_come_from_the_times_of_the_tokens():
    timing = Timing.from_token_times([200.0, 250.0, 310.0, 340.0], batch_size=2, clock="perf_counter")
    assert timing.ttft_ms == timing.prefill_ms == 200.0
    assert timing.e2e_ms == 340.0
    assert timing.itl_ms == [50.0, 60.0, 30.0]
    assert timing.decode_ms == 140.0  # 340 - 200
    assert timing.tpot_ms == pytest.approx((340 - 200) / (4 - 1))


def test_tokens_per_second_count_the_prefill_or_decode_alone_or_the_whole_batch():
    row = Timing.from_token_times([200.0, 250.0, 310.0, 340.0], batch_size=2, clock="perf_counter").to_dict()
    assert row["tokens_per_second"] == pytest.approx(4 / 0.340)
    assert row["decode_tokens_per_second"] == pytest.approx(3 / 0.140)  # three tokens came after the first
    assert row["batch_tokens_per_second"] == pytest.approx(2 * 4 / 0.340)


def test_one_token_has_no_time_per_token():
    row = Timing.from_token_times([70.0], batch_size=1, clock="perf_counter").to_dict()
    assert (row["ttft_ms"], row["e2e_ms"], row["itl_ms"]) == (70.0, 70.0, [])
    assert [row[key] for key in ("decode_ms", "tpot_ms", "decode_tokens_per_second")] == [None] * 3
    assert row["tokens_per_second"] == pytest.approx(1 / 0.070)


def test_without_tokens_every_time_and_rate_is_missing():
    row = Timing.from_token_times([], batch_size=1, clock="perf_counter").to_dict()
    given_values = {"n_tokens": 0, "batch_size": 1, "itl_ms": [], "clock": "perf_counter"}
    assert {key: value for key, value in row.items() if value is not None} == given_values


# --- ratios and spreads ---------------------------------------------------------------------------------------


def test_a_speedup_is_the_time_saved_as_a_share_of_the_faster_time():
    assert speedup_percent(100.0, 50.0) == 100.0  # half the time: twice as fast
    assert speedup_percent(100.0, 125.0) == pytest.approx(-20.0)  # 100 / 125 = 0.8
    assert speedup_percent(80.0, 80.0) == 0.0


@pytest.mark.parametrize("formula", [ratio, percent, speedup_percent])
@pytest.mark.parametrize("operands", [(None, 1.0), (1.0, None), (1.0, 0), (0, 0), (None, None)])
def test_a_ratio_without_both_sides_or_over_zero_is_missing(formula, operands):
    assert formula(*operands) is None


def test_a_measured_zero_stays_zero():
    assert ratio(0, 5) == 0.0
    assert percent(0.0, 5.0) == 0.0


def test_the_spread_of_eight_numbers():
    assert spread([2, 4, None, 4, 4, 5, 5, 7, 9]) == {
        "n": 8,
        "mean": 5.0,  # 40 / 8
        "median": 4.5,  # between 4 and 5
        "std": pytest.approx(math.sqrt(32 / 7)),  # squares of the deviations: 9+1+1+1+0+0+4+16 = 32; n - 1 = 7
        "min": 2,
        "max": 9,
    }


def test_one_value_has_no_spread_and_none_has_no_mean():
    assert spread([3.0]) == {"n": 1, "mean": 3.0, "median": 3.0, "std": None, "min": 3.0, "max": 3.0}
    assert spread([None]) == {"n": 0, "mean": None, "median": None, "std": None, "min": None, "max": None}


# --- cache and prefetch ---------------------------------------------------------------------------------------


def test_hit_and_miss_rates_are_shares_of_the_accesses_of_decode():
    cache = figures(bandwidth_gb_s=None)
    assert cache["accesses"] == 24  # 8 pages asked for three times; the prompt's 100 are not among them
    assert (cache["hits"], cache["late"], cache["misses"]) == (19, 1, 4)
    assert cache["hit_rate"] == pytest.approx(19 / 24)
    assert (cache["late_rate"], cache["miss_rate"]) == (pytest.approx(1 / 24), pytest.approx(4 / 24))
    assert cache["evictions"] == 3


def test_stall_percent_is_the_share_of_decode_spent_waiting():
    cache = figures(bandwidth_gb_s=None)
    assert cache["stall_ms"] == 36.0  # 10 + 20 + 6
    assert cache["stall_percent"] == pytest.approx(20.0)  # 36 of 180 ms


@pytest.mark.parametrize(("transfer_ms", "share"), [(None, None), (0.0, None), (30.0, 0.0), (36.0, 0.0), (90.0, 0.6)])
def test_the_hidden_share_of_the_transfer_is_what_computing_did_not_wait_for(transfer_ms, share):
    """It waited 36 ms; at worst all of the transfer was waited for, and its start as well."""
    hidden = figures(bandwidth_gb_s=None, transfer_ms=transfer_ms)["hidden_transfer_share"]
    assert hidden == (share if share is None else pytest.approx(share))


def test_the_stages_and_the_rest_make_up_decode_on_a_cpu_and_the_host_works_beside_the_device_on_cuda():
    recorder = Recorder()
    recorder.begin_step("decode")
    recorder.spent(0, "select", 3.0)
    recorder.spent(0, "predict", 1.0)
    recorder.spent(0, "attend", lambda: 20.0)
    recorder.waited(0, 5.0)
    recorder.count(0, copy_ms=2.0)
    timing = Timing.from_token_times([10.0, 110.0], batch_size=1, clock="perf_counter")
    assert cache_figures(recorder, timing, 1, {"kind": "simulated"}, None)["stages"]["attend_ms"] is None
    recorder.settle()
    on_cpu = cache_figures(recorder, timing, 1, {"kind": "simulated"}, None)
    stages = {"select_ms": 3.0, "predict_ms": 1.0, "wait_ms": 5.0, "copy_ms": 2.0, "attend_ms": 20.0, "other_ms": 69.0}
    assert on_cpu["stages"] == stages
    assert on_cpu["floor"]["compute_ms_per_step"] == 89.0  # 100 without choosing, predicting, waiting and asking
    on_cuda = cache_figures(recorder, timing, 1, {"kind": "bus"}, None)
    assert on_cuda["stages"]["other_ms"] is None
    assert on_cuda["floor"]["compute_ms_per_step"] == 92.0


def test_requests_are_kept_where_that_is_asked_for_and_only_there():
    for keep in (True, False):
        recorder = Recorder(keep_requests=keep)
        recorder.begin_step("prefill")
        recorder.begin_step("decode")
        recorder.asked(layer=3, sequence=1, pages=[4, 0], resident={9: 1, 2: 5})
        expected = {"step": 1, "phase": "decode", "layer": 3, "sequence": 1, "pages": [4, 0], "resident": [2, 9]}
        assert recorder.request_dicts() == ([expected] if keep else [])
        recorder.reset()
        assert recorder.request_dicts() == []


def test_bytes_are_pages_times_the_size_of_a_page():
    cache = figures(bandwidth_gb_s=None, transfer_ms=50.0)
    assert (cache["h2d_bytes"], cache["d2h_bytes"]) == (5 * PAGE_BYTES, 1 * PAGE_BYTES)
    assert cache["effective_bandwidth_gb_s"] == pytest.approx(0.1)  # 5 MB in 50 ms


def test_the_traffic_of_the_prompt_stands_apart():
    assert figures(bandwidth_gb_s=None)["prefill"] == {
        "chunks": 1,
        "evictions": 3,
        "h2d_bytes": 7 * PAGE_BYTES,
        "d2h_bytes": 9 * PAGE_BYTES,
        "stall_ms": 1000.0,
    }


@pytest.mark.parametrize(
    ("bandwidth_gb_s", "transfer_ms", "floor_ms", "above"),
    [
        (0.1, 20.0, 72.0, 90 / 72),  # computing is the limit
        (0.025, 80.0, 80.0, 90 / 80),  # the link is the limit
    ],
)
def test_the_floor_of_a_step_is_the_longer_of_computing_and_moving(bandwidth_gb_s, transfer_ms, floor_ms, above):
    floor = figures(bandwidth_gb_s)["floor"]
    assert floor["must_move_bytes_per_step"] == 2 * PAGE_BYTES  # 4 pages in 2 steps
    assert floor["transfer_ms_per_step"] == pytest.approx(transfer_ms)  # 2 MB over the bandwidth
    assert floor["compute_ms_per_step"] == pytest.approx(90 - 36 / 2)  # a step less its stall
    assert floor["floor_ms_per_step"] == pytest.approx(floor_ms)
    assert floor["tpot_over_floor"] == pytest.approx(above)


def test_a_link_of_unknown_width_is_as_wide_as_it_was_measured_to_be():
    floor = figures(bandwidth_gb_s=None, transfer_ms=200.0)["floor"]
    assert (floor["bandwidth_gb_s"], floor["bandwidth_from"]) == (pytest.approx(0.025), "measured")  # 5 MB in 200 ms
    assert floor["floor_ms_per_step"] == pytest.approx(80.0)
    assert figures(bandwidth_gb_s=0.1, transfer_ms=200.0)["floor"]["bandwidth_from"] == "link"


def test_a_link_of_unknown_width_that_was_not_measured_gives_no_floor():
    floor = figures(bandwidth_gb_s=None)["floor"]
    assert floor["compute_ms_per_step"] == pytest.approx(72.0)
    missing = ("bandwidth_gb_s", "bandwidth_from", "transfer_ms_per_step", "floor_ms_per_step", "tpot_over_floor")
    assert [floor[key] for key in missing] == [None] * 5


def test_stalls_that_are_not_read_yet_are_missing_and_not_zero():
    recorder = recorded_decode()
    recorder.waited(0, lambda: 5.0)
    cache = cache_figures(recorder, TIMING, PAGE_BYTES, {"bandwidth_gb_s": 0.1}, None)
    assert [cache[key] for key in ("stall_ms", "stall_percent")] == [None] * 2
    assert [cache["floor"][key] for key in ("compute_ms_per_step", "floor_ms_per_step")] == [None] * 2


def test_a_run_without_decode_has_no_rates():
    recorder = Recorder()
    recorder.begin_step("prefill")
    recorder.count(0, hits=5, h2d_pages=2)
    timing = Timing.from_token_times([70.0], batch_size=1, clock="perf_counter")
    cache = cache_figures(recorder, timing, PAGE_BYTES, {"bandwidth_gb_s": None}, None)
    rates = ("hit_rate", "miss_rate", "stall_percent", "transfer_ms", "effective_bandwidth_gb_s")
    assert [cache[key] for key in rates] == [None] * len(rates)
    assert set(cache["floor"].values()) == {None}
    prefetch = prefetch_figures(recorder, PAGE_BYTES)
    rates = ("accuracy", "coverage", "timeliness", "misprediction_cost_percent")
    assert [prefetch[key] for key in rates] == [None] * len(rates)


def test_prefetch_accuracy_coverage_timeliness_and_the_cost_of_mispredictions():
    recorder = recorded_decode()
    recorder.begin_step("decode")
    # with the two steps before: 12 pages copied in, 2 + 4 of them on demand
    recorder.count(1, prefetch_issued=10, prefetch_on_time=6, prefetch_late=2, prefetch_wasted=1, h2d_pages=7, misses=2)
    figures = prefetch_figures(recorder, PAGE_BYTES)
    assert (figures["issued"], figures["useful"], figures["on_time"], figures["late"]) == (10, 8, 6, 2)
    assert figures["accuracy"] == pytest.approx(8 / 10)
    assert figures["coverage"] == pytest.approx(8 / (8 + 6))
    assert figures["timeliness"] == pytest.approx(6 / 8)
    assert figures["unresolved"] == 1  # 10 - 8 - 1: neither used nor dropped by the end
    assert figures["wasted_bytes"] == 2 * PAGE_BYTES  # one given up, one not used by the end
    assert figures["misprediction_cost_percent"] == pytest.approx(100 * 2 / 12)


# --- the recorder ---------------------------------------------------------------------------------------------


def test_layers_are_listed_in_order_and_hold_decode_alone():
    layers = recorded_decode().layer_dicts()
    assert [(row["layer"], row["hits"], row["accesses"], row["stall_ms"]) for row in layers] == [
        (0, 11, 16, 16.0),
        (1, 8, 8, 20.0),
    ]
    assert all("steps" not in row for row in layers)  # a layer's record is a sum over steps and does not count them


def test_steps_are_numbered_and_keep_their_phase():
    steps = recorded_decode().step_dicts()
    assert [(step["step"], step["phase"], step["hits"]) for step in steps] == [
        (0, "prefill", 50),
        (1, "decode", 14),
        (2, "decode", 5),
    ]


def test_a_stall_still_on_the_device_is_read_once_and_only_after_the_run():
    readings = iter([7.0])
    recorder = Recorder()
    recorder.begin_step("decode")
    recorder.waited(4, lambda: next(readings))
    recorder.begin_step("decode")
    recorder.waited(4, 1.5)
    assert recorder.snapshot("decode")["stall_ms"] is None  # one of them is not known yet
    recorder.settle()
    recorder.settle()  # a second reading would exhaust the iterator
    assert [step["stall_ms"] for step in recorder.step_dicts()] == [7.0, 1.5]
    assert [row["stall_ms"] for row in recorder.layer_dicts()] == [8.5]


@pytest.mark.parametrize(
    ("stall", "late", "hits"),
    [
        (3.0, 2, 0),
        (lambda: 3.0, 2, 0),
        (lambda: 0.001, 0, 2),  # two events with nothing between them: the device did not wait
    ],
    ids=["waited on the host", "waited on the device", "did not wait on the device"],
)
def test_pages_made_ahead_are_late_if_computing_had_to_wait_for_them_and_hits_if_not(stall, late, hits):
    recorder = Recorder()
    recorder.begin_step("decode")
    recorder.waited(1, stall, n_early=2, n_prefetched=2)
    recorder.settle()
    for totals in (recorder.snapshot("decode"), recorder.layer_dicts()[0]):
        assert (totals["late"], totals["prefetch_late"]) == (late, late)
        assert (totals["hits"], totals["prefetch_on_time"]) == (hits, hits)
        assert totals["accesses"] == 2


def test_an_event_before_the_first_step_is_refused():
    with pytest.raises(RuntimeError, match="before begin_step"):
        Recorder().count(0, hits=1)


def test_a_reset_recorder_has_seen_nothing():
    recorder = recorded_decode()
    recorder.waited(0, lambda: pytest.fail("a forgotten stall was read"))
    recorder.reset()
    recorder.settle()
    assert recorder.step_dicts() == recorder.layer_dicts() == []
    assert not any(recorder.snapshot("decode").values())


def test_a_snapshot_never_sees_half_an_event():
    recorder = Recorder()
    recorder.begin_step("decode")
    writing, torn = threading.Event(), []
    writing.set()

    def read():
        while writing.is_set():
            totals = recorder.snapshot("decode")
            if totals["hits"] != totals["misses"]:
                torn.append(totals)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    reader = threading.Thread(target=read)
    reader.start()
    try:
        for step in range(4000):
            if step % 100 == 0:
                recorder.begin_step("decode")
            recorder.count(0, hits=1, misses=1)
    finally:
        writing.clear()
        reader.join()
        sys.setswitchinterval(interval)
    assert not torn
    assert recorder.snapshot("decode")["accesses"] == 8000


# --- results --------------------------------------------------------------------------------------------------


def strictly(value):
    """A value as any JSON reader would get it."""
    return json.loads(json.dumps(value, allow_nan=False))


def test_a_result_is_strict_json_as_it_stands():
    cache = figures(bandwidth_gb_s=0.1, transfer_ms=50.0)
    result = RunResult({"mode": "reactive"}, "0" * 12, timing=TIMING.to_dict(), cache=cache)
    assert strictly(result.to_dict()) == result.to_dict()
    assert strictly(result.to_dict())["schema_version"] == 1


def test_what_a_result_does_not_have_is_null():
    row = RunResult({"mode": "baseline"}, "0" * 12).to_dict()
    known = {"schema_version", "spec", "run_id", "status"}
    assert {key for key, value in row.items() if value is not None} == known


def test_only_a_run_with_status_ok_is_ok():
    statuses = ("ok", "out_of_memory", "interrupted", "error")
    assert [RunResult({}, "", status=status).ok for status in statuses] == [True, False, False, False]


def test_without_a_baseline_token_agreement_is_missing():
    assert token_agreement([[1, 2]], None) == {"matches_baseline": None, "first_divergent_token": None}


@pytest.mark.parametrize(
    ("tokens", "reference", "position"),
    [
        ([[5, 6, 7]], [[5, 6, 7]], None),
        ([[5, 6, 7]], [[5, 9, 7]], 1),
        ([[5, 6]], [[5, 6, 7]], 2),  # it ends where the baseline goes on
        ([[5, 6, 7]], [[5, 6]], 2),
        ([[]], [[5]], 0),
        ([[5, 6, 7], [1, 2, 3]], [[5, 6, 8], [1, 9, 3]], 1),  # the earliest of all rows
    ],
)
def test_the_first_divergent_token_is_found(tokens, reference, position):
    assert token_agreement(tokens, reference) == {
        "matches_baseline": position is None,
        "first_divergent_token": position,
    }


tokens = st.lists(st.integers(0, 2), max_size=6)


@given(row=tokens, other=tokens)
def test_the_first_divergent_token_ends_the_longest_common_beginning(row, other):
    common = max(n for n in range(len(row) + 1) if row[:n] == other[:n])
    assert token_agreement([row], [other])["first_divergent_token"] == (None if row == other else common)


def test_batches_of_different_sizes_cannot_be_compared():
    with pytest.raises(ValueError):
        token_agreement([[1], [2]], [[1]])


@pytest.mark.parametrize("share", [0, 10, 50, 90, 99, 100])
def test_percentiles_are_those_of_numpy(share):
    for n in (1, 2, 3, 10, 49):
        times_ms = list(np.random.default_rng(n).exponential(50.0, n))
        assert percentile(times_ms, share) == pytest.approx(np.percentile(times_ms, share))
    assert percentile([], share) is None


def test_a_timing_has_the_percentiles_of_its_times_between_tokens():
    # 10, 20, ..., 110 ms: p50 is the 6th, p90 the 10th, p99 lies nine tenths from the 10th to the 11th.
    block = Timing.from_token_times([5.0, *(5.0 + 10.0 * k * (k + 1) / 2 for k in range(1, 12))], 1, "test").to_dict()
    assert [block[f"itl_p{share}_ms"] for share in (50, 90, 99)] == pytest.approx([60.0, 100.0, 109.0])
    assert Timing.from_token_times([5.0], 1, "test").to_dict()["itl_p99_ms"] is None


def test_the_hit_rate_so_far_is_that_of_decode_steps():
    recorder = Recorder()
    recorder.begin_step("prefill")
    recorder.count(0, hits=5)
    assert recorder.hit_rate_so_far() is None
    recorder.begin_step("decode")
    recorder.count(0, hits=1, misses=3)
    recorder.count(1, hits=3, late=1)
    assert recorder.hit_rate_so_far() == 0.5
    recorder.begin_step("decode")
    recorder.count(0, hits=2)
    assert recorder.hit_rate_so_far() == 0.6
