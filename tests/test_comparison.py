"""How strategies compare: each expected figure is worked out by hand beside it."""

from __future__ import annotations

import math

import pytest
from result_fixtures import approximately, make_failure, make_result, make_sweep

import reporting
from comparison import (
    baselines,
    compare,
    overall_speedup,
    own_speedups,
    paired_std,
    references,
    repetition_std,
    uneven_cells,
    wide_cells,
)
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


def test_a_speedup_is_the_median_ratio_of_pairs_and_not_the_ratio_of_medians():
    # Pairs: 100 / 50 = 2, 400 / 160 = 2.5, 300 / 100 = 3. Medians: 300 / 100 = 3.
    baseline = [make_result(repetition=r, tpot_ms=t) for r, t in enumerate((100.0, 400.0, 300.0))]
    reactive = [make_result("reactive", repetition=r, tpot_ms=t) for r, t in enumerate((50.0, 160.0, 100.0))]
    (comparison,) = compare(to_frame(baseline + reactive))
    assert comparison.speedup.ratio == pytest.approx(2.5)
    assert (comparison.speedup.low, comparison.speedup.high) == pytest.approx((2.0, 3.0))
    assert comparison.speedup.verdict == "faster"
    assert comparison.latency_speedup_percent == pytest.approx(200.0)  # 100 x (300 / 100 - 1), of medians


def test_what_slows_both_of_a_pair_cancels_in_its_ratio():
    baseline = [make_result(repetition=r, tpot_ms=t) for r, t in enumerate((100.0, 250.0, 400.0))]
    reactive = [make_result("reactive", repetition=r, tpot_ms=t) for r, t in enumerate((80.0, 200.0, 320.0))]
    speedup = compare(to_frame(baseline + reactive))[0].speedup
    assert (speedup.ratio, speedup.low, speedup.high) == pytest.approx((1.25, 1.25, 1.25))


def test_a_repetition_that_only_one_side_finished_is_no_pair():
    results = [make_result(), make_result(repetition=1), make_result("reactive"), make_result("reactive", repetition=2)]
    speedup = compare(to_frame(results))[0].speedup
    assert (speedup.n_pairs, speedup.low, speedup.verdict) == (1, None, "fewer than 2 pairs, so no interval")


def test_cells_are_combined_by_the_geometric_mean():
    results = make_sweep()
    for result in results:  # at 1000 tokens the baseline is twice as fast as at 500, the others are not
        if (result["spec"]["mode"], result["spec"]["context_length"]) == ("baseline", 1000):
            result["timing"]["tpot_ms"] /= 2
    comparisons = [c for c in compare(to_frame(results)) if c.strategy == "reactive"]
    overall = overall_speedup(comparisons)
    assert overall.ratio == pytest.approx(math.sqrt(101 / 81 * (101 / 81 / 2)))  # median pair: the second
    assert (overall.n_pairs, overall.n_cells) == (6, 2)


def test_each_run_has_its_own_speedup_over_the_same_repetition_of_the_baseline():
    results = [make_result(repetition=0, tpot_ms=100.0), make_result(repetition=1, tpot_ms=300.0)]
    results += [make_result("reactive", repetition=r, tpot_ms=t) for r, t in enumerate((50.0, 75.0, 80.0))]
    results += [make_failure(make_result("predictive"))]
    assert own_speedups(to_frame(results)) == [None, None, 2.0, 4.0, None, None]
    assert own_speedups(to_frame([])) == []
    assert set(own_speedups(to_frame(without_baseline()))) == {None}


def two_seeds():
    """Repetitions 0 and 1 of seeds 3 and 4; each reactive run is twice as fast as its own baseline's."""
    places = [(repetition, seed) for seed in (3, 4) for repetition in (0, 1)]
    baseline = [make_result(repetition=r, seed=s, tpot_ms=100.0 * s + r) for r, s in places]
    return baseline + [make_result("reactive", repetition=r, seed=s, tpot_ms=50.0 * s + r / 2) for r, s in places]


def test_a_run_is_paired_with_the_same_repetition_of_its_own_seed_alone():
    (comparison,) = compare(to_frame(two_seeds()))
    assert comparison.paired_speedups_percent == pytest.approx((100.0,) * 4)
    assert (comparison.speedup.n_pairs, len(comparison.paired_gains_percent)) == (4, 4)
    assert own_speedups(to_frame(two_seeds())) == [None] * 4 + [2.0] * 4


def test_contexts_that_were_cut_to_one_length_are_not_paired_with_each_other():
    results = [make_result(tpot_ms=100.0), make_result("reactive", tpot_ms=50.0)]
    results += [make_result(tpot_ms=300.0), make_result("reactive", tpot_ms=100.0)]
    for result in results[2:]:
        result["context"]["requested_tokens"] = 9000
    (comparison,) = compare(to_frame(results))
    assert comparison.paired_speedups_percent == pytest.approx((100.0, 200.0))
    assert own_speedups(to_frame(results)) == [None, None, 2.0, 3.0]


def test_a_run_that_is_there_twice_is_in_no_pair():
    results = [make_result(), make_result(), make_result("reactive")]
    (comparison,) = compare(to_frame(results))
    assert (comparison.speedup.n_pairs, own_speedups(to_frame(results))) == (0, [None] * 3)


def without_baseline():
    return [result for result in make_sweep() if result["spec"]["mode"] != "baseline"]


def test_without_a_baseline_predictive_runs_are_compared_with_the_reactive_ones_of_their_cell():
    comparisons = compare(to_frame(without_baseline()))
    assert {(c.strategy, c.baseline, c.context_tokens) for c in comparisons} == {
        ("predictive", "reactive", 500),
        ("predictive", "reactive", 1000),
    }
    assert comparisons[0].speedup.ratio == pytest.approx(81 / 51)


def test_a_baseline_that_failed_is_none_and_one_that_succeeded_once_is_enough():
    failed = [make_failure(result) for result in make_sweep() if result["spec"]["mode"] == "baseline"]
    frame = to_frame(without_baseline() + failed)
    assert list(references(frame).values()) == ["reactive"]
    assert list(references(to_frame([*without_baseline(), *failed[1:], make_result()])).values()) == ["baseline"]


def test_an_exact_reactive_strategy_stands_in_before_an_approximate_one():
    results = [
        approximately(make_result("reactive", name="part")),
        make_result("reactive", name="all"),
        make_result("predictive"),
    ]
    assert list(references(to_frame(results)).values()) == ["all"]
    assert list(references(to_frame([results[0], results[2]])).values()) == ["part"]
    assert references(to_frame(results[:2])) == {}  # without a predictive run there is nothing to compare


def test_wide_cells_are_those_whose_range_exceeds_a_tenth_of_the_median():
    results = [make_result(repetition=r, tpot_ms=t) for r, t in enumerate((95.0, 100.0, 105.1))]
    results += [make_result("reactive", repetition=r, tpot_ms=t) for r, t in enumerate((95.0, 100.0, 104.9))]
    assert wide_cells(to_frame(results)) == [("baseline", 500, pytest.approx(10.1))]


def test_uneven_cells_are_those_of_which_a_run_took_much_longer_on_average_than_in_the_middle():
    # One of ten tokens took 360 ms more than the others: a mean of 100 + 36 against a median of 100. With 240 ms 124.
    disturbed, hardly = make_result(), make_result("reactive", name="hardly")
    for result, more_ms in ((disturbed, 360.0), (hardly, 240.0)):
        result["timing"]["itl_ms"][3] += more_ms
        result["timing"]["tpot_ms"] += more_ms / 10
    frame = to_frame([disturbed, hardly, make_result(repetition=1)])
    assert uneven_cells(frame) == [("baseline", 500, pytest.approx(36.0))]
    assert uneven_cells(to_frame([make_result(n_tokens=1)])) == []
