"""How strategies compare: each expected figure is worked out by hand beside it."""

from __future__ import annotations

import math

import pytest
from result_fixtures import make_failure, make_result, make_sweep

import reporting
from comparison import baselines, compare, paired_std, repetition_std
from metrics import spread
from result_frame import to_frame


def test_latency_speedup_compares_medians():
    baseline = [make_result(repetition=r, tpot_ms=t) for r, t in enumerate((99.0, 100.0, 900.0))]  # median 100
    reactive = [make_result("reactive", repetition=r, tpot_ms=t) for r, t in enumerate((1.0, 80.0, 81.0))]  # 80
    (comparison,) = compare(to_frame(baseline + reactive))
    assert comparison.latency_speedup_percent == pytest.approx(25.0)  # 100 x (100 / 80 - 1)
    assert (comparison.n, comparison.baseline_n) == (3, 3)


def test_a_slower_strategy_has_a_negative_speedup():
    (comparison,) = compare(to_frame([make_result(), make_result("reactive", tpot_ms=200.0)]))
    assert comparison.latency_speedup_percent == pytest.approx(-50.0)  # 100 x (100 / 200 - 1)


def test_throughput_speedup_is_of_tokens_per_second_with_prefill():
    # Baseline: 11 tokens in 1000 + 10 x 100 = 2000 ms, 5.5 /s. Reactive: 1000 + 10 x 60 = 1600 ms, 6.875 /s.
    (comparison,) = compare(to_frame([make_result(), make_result("reactive", tpot_ms=60.0)]))
    assert comparison.throughput_speedup_percent == pytest.approx(25.0)  # 100 x (6.875 / 5.5 - 1)


def test_reductions_count_the_staging_slots_and_are_null_without_a_gpu():
    (comparison,) = compare(to_frame([make_result(), make_result("reactive")]))
    assert comparison.device_kv_reduction_percent == pytest.approx(50.0)  # 100 x (1 - 40 / 80)
    assert comparison.gpu_memory_reduction_percent is None


def test_gpu_memory_reduction_is_against_the_baseline():
    baseline, reactive = make_result(), make_result("reactive")
    baseline["memory"]["gpu_memory_mb"], reactive["memory"]["gpu_memory_mb"] = 1000.0, 360.0
    (comparison,) = compare(to_frame([baseline, reactive]))
    assert comparison.gpu_memory_reduction_percent == pytest.approx(64.0)  # 100 x (1 - 360 / 1000)


def test_the_spread_of_a_speedup_is_that_of_pairs_run_side_by_side():
    # The machine slows down by half in the second repetition, for both: each pair still says exactly +25 %.
    baseline = [make_result(repetition=0, tpot_ms=100.0), make_result(repetition=1, tpot_ms=150.0)]
    reactive = [make_result("reactive", repetition=r, tpot_ms=t) for r, t in enumerate((80.0, 120.0))]
    (comparison,) = compare(to_frame(baseline + reactive))
    assert comparison.paired_speedups_percent == pytest.approx((25.0, 25.0))
    assert spread(comparison.paired_speedups_percent)["std"] == pytest.approx(0.0)


def test_the_spread_of_a_gain_in_tokens_per_second_is_that_of_pairs_too():
    # E2E = TTFT + 10 x TPOT. Repetition 0: 2000 / 1600 = +25 %. Repetition 1, twice as slow for both: the same.
    baseline = [make_result(), make_result(repetition=1, tpot_ms=200.0, ttft_ms=2000.0)]
    reactive = [make_result("reactive", tpot_ms=60.0)]
    reactive.append(make_result("reactive", repetition=1, tpot_ms=120.0, ttft_ms=2000.0))
    (comparison,) = compare(to_frame(baseline + reactive))
    assert comparison.paired_gains_percent == pytest.approx((25.0, 25.0))


def test_the_spread_of_paired_speedups_is_pooled_over_cells():
    # At 500 tokens +25 and +0 % (variance 312.5), at 1000 -50 and -50 % (variance 0): sqrt(312.5 / 2) = 12.5.
    baseline = [make_result(context=c, repetition=r) for c in (500, 1000) for r in (0, 1)]
    times_ms = {(500, 0): 80.0, (500, 1): 100.0, (1000, 0): 200.0, (1000, 1): 200.0}
    reactive = [make_result("reactive", context=c, repetition=r, tpot_ms=t) for (c, r), t in times_ms.items()]
    comparisons = compare(to_frame(baseline + reactive))
    assert paired_std(comparisons, "latency_speedup_percent") == pytest.approx(12.5)
    assert paired_std(comparisons[:0], "latency_speedup_percent") is None
    assert paired_std(comparisons, "device_kv_reduction_percent") is None


def test_cells_are_compared_first_and_averaged_after():
    # +25 % at 500 tokens, -50 % at 1000: (25 - 50) / 2 = -12.5. The ratio of overall means would say -18.2 %.
    results = [
        make_result(context=500, tpot_ms=100.0),
        make_result(context=1000, tpot_ms=100.0),
        make_result("reactive", context=500, tpot_ms=80.0),
        make_result("reactive", context=1000, tpot_ms=200.0),
    ]
    analysis = reporting.summarise(results)["comparative_analysis"]["reactive"]
    assert analysis["cells"] == 2
    assert analysis["latency_speedup_percent"] == pytest.approx(-12.5)


def test_a_context_that_only_one_side_finished_is_not_compared():
    results = [
        *make_sweep(contexts=(500,)),
        make_failure(make_result(context=4000)),
        make_result("reactive", 4000),
    ]
    comparisons = compare(to_frame(results))
    assert {comparison.context_tokens for comparison in comparisons} == {500}


@pytest.mark.parametrize(
    "difference",
    [{"model_name": "other"}, {"batch_size": 4}, {"quantization": "8bit"}, {"max_new_tokens": 99}],
)
def test_runs_that_did_other_work_are_not_compared(difference):
    results = [make_result(), make_result("reactive", **difference)]
    assert compare(to_frame(results)) == []


def test_the_baseline_is_the_first_with_a_dynamic_cache():
    static = make_result(name="fixed", cache_implementation="static", tpot_ms=50.0)
    summary = reporting.summarise([static, make_result(name="plain"), make_result("reactive", tpot_ms=50.0)])
    assert summary["comparative_analysis"]["compared_with"] == ["plain"]
    assert summary["comparative_analysis"]["reactive"]["latency_speedup_percent"] == pytest.approx(100.0)
    assert set(summary["comparative_analysis"]["by_strategy"]) == {"fixed", "reactive"}


def test_without_a_dynamic_cache_the_baseline_is_the_first_there_is():
    static = make_result(name="fixed", cache_implementation="static")
    frame = to_frame([static, make_result(name="other", cache_implementation="quantized")])
    assert list(baselines(frame).values()) == ["fixed"]


def test_each_model_has_its_own_baseline():
    results = [make_result(mode, model_name=model) for model in ("a", "b") for mode in ("baseline", "reactive")]
    compared = {(c.strategy, c.baseline) for c in compare(to_frame(results))}
    assert compared == {(f"reactive (model_name={model})", f"baseline (model_name={model})") for model in "ab"}


def test_the_spread_between_repetitions_leaves_out_that_contexts_differ():
    # Within 500: 10, 12 (variance 2). Within 1000: 100, 104 (variance 8). Pooled: sqrt((2 + 8) / 2) = 2.236.
    results = [make_result(context=500, repetition=r, tpot_ms=t) for r, t in enumerate((10.0, 12.0))]
    results += [make_result(context=1000, repetition=r, tpot_ms=t) for r, t in enumerate((100.0, 104.0))]
    assert repetition_std(to_frame(results), "tpot_ms") == pytest.approx(math.sqrt(5.0))


def test_the_spread_of_single_runs_is_missing():
    assert repetition_std(to_frame([make_result()]), "tpot_ms") is None
