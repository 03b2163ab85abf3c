"""The summary: the promised keys, strict JSON, and a reason for every null."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from result_fixtures import (
    MEASURED,
    approximately,
    make_failure,
    make_result,
    make_sweep,
    make_task,
    with_fidelity,
    with_tasks,
    write_results,
)

import reporting
from quality_frame import FIDELITY


def test_the_summary_has_the_promised_keys(tmp_path):
    write_results(tmp_path, make_sweep())
    summary = reporting.write_summary(tmp_path, duration_seconds=12.5)
    assert json.loads((tmp_path / "experiment_summary.json").read_text()) == summary
    assert summary["experiment_summary"] == {
        "total_experiments": 18,
        "successful_experiments": 18,
        "total_duration_seconds": 12.5,
        "planned_experiments": None,
        "interrupted": False,
        "reused_experiments": 0,
    }
    assert summary["mode_summaries"]["baseline"]["average_latency_ms"] == pytest.approx(101.0)  # 100, 101, 102
    assert summary["mode_summaries"]["baseline"]["average_tokens_per_second"] > 0
    assert summary["mode_summaries"]["reactive"]["average_cache_hit_rate"] == 0.75
    assert summary["mode_summaries"]["predictive"]["average_prediction_accuracy"] == pytest.approx(0.8)
    for mode in ("reactive", "predictive"):
        assert {"latency_speedup_percent", "throughput_speedup_percent"} <= set(summary["comparative_analysis"][mode])


def test_the_summary_gives_every_context_with_n_and_spread():
    summary = reporting.summarise(make_sweep())
    (short, long) = summary["strategy_summaries"]["reactive"]["by_context"]
    assert (short["context_tokens"], long["context_tokens"]) == (500, 1000)
    assert (short["latency_ms"]["n"], short["latency_ms"]["std"]) == (3, pytest.approx(1.0))  # 80, 81, 82
    compared = summary["comparative_analysis"]["by_strategy"]["reactive"]["by_context"][0]
    assert (compared["n"], compared["baseline_n"], compared["baseline"]) == (3, 3, "baseline")
    assert compared["paired_speedup_percent"]["n"] == 3


def test_an_interrupted_sweep_says_so_and_how_many_runs_there_were_to_be(tmp_path):
    summary = reporting.write_summary(tmp_path, 1.0, [make_result()], planned=9, interrupted=True)
    assert summary["experiment_summary"]["planned_experiments"] == 9
    assert summary["experiment_summary"]["total_experiments"] == 1
    assert summary["experiment_summary"]["interrupted"] is True


def test_averages_that_matter_have_their_spread_between_repetitions_beside_them():
    results = []
    for context in (500, 1000):  # the second half is twice as high: that contexts differ is no spread
        for repetition, stall_percent in enumerate((4.0, 5.0, 6.0)):
            result = make_result("predictive", context, repetition)
            result["cache"].update(stall_percent=stall_percent * context / 500, hit_rate=0.7)
            result["prefetch"]["accuracy"] = 0.8 + 0.1 * (repetition - 1)
            results.append(result)
    std = reporting.summarise(results)["mode_summaries"]["predictive"]["std"]
    assert std["average_stall_percent"] == pytest.approx(math.sqrt((1 + 4) / 2))  # variances 1 and 4, pooled
    assert std["average_cache_hit_rate"] == 0.0
    assert std["average_prediction_accuracy"] == pytest.approx(0.1)
    assert std["average_tokens_per_second"] == 0.0


def test_compared_figures_have_the_spread_of_their_pairs_beside_them():
    results = [make_result(repetition=r) for r in (0, 1)]
    results += [make_result("reactive", repetition=r, tpot_ms=t) for r, t in enumerate((80.0, 100.0))]
    std = reporting.summarise(results)["comparative_analysis"]["reactive"]["std"]
    assert std["latency_speedup_percent"] == pytest.approx(25.0 / math.sqrt(2))  # +25 % and 0 %


def test_a_speed_up_is_a_ratio_of_pairs_with_its_interval_and_verdict():
    analysis = reporting.summarise(make_sweep())["comparative_analysis"]
    # Pairs of predictive: 100 / 50, 101 / 51, 102 / 52 at both contexts, so the geometric mean is that of one.
    for found, n_cells in (
        (analysis["predictive"]["speedup_ratio"], 2),
        (analysis["by_strategy"]["predictive"]["speedup_ratio"], 2),
        (analysis["by_strategy"]["predictive"]["by_context"][0]["speedup_ratio"], 1),
    ):
        assert found["ratio"] == pytest.approx(101 / 51)
        assert 1.96 < found["low"] < found["ratio"] < found["high"] < 2.01  # the range of the pairs, or within it
        assert (found["n_pairs"], found["n_cells"], found["verdict"]) == (3 * n_cells, n_cells, "faster")
    assert analysis["predictive"]["latency_speedup_percent"] == pytest.approx(100 * (101 / 51 - 1))


def test_no_difference_is_said_to_be_none_that_was_shown():
    results = [make_result(repetition=r) for r in (0, 1)]
    results += [make_result("reactive", repetition=r, tpot_ms=t) for r, t in enumerate((90.0, 110.0))]
    ratio = reporting.summarise(results)["comparative_analysis"]["reactive"]["speedup_ratio"]
    assert ratio["low"] < 1 < ratio["high"]
    assert ratio["verdict"] == "no difference shown"


def test_an_interval_that_is_missing_has_its_reason():
    summary = reporting.summarise([make_result(), make_result("reactive")])
    ratio = summary["comparative_analysis"]["reactive"]["speedup_ratio"]
    assert (ratio["ratio"], ratio["low"], ratio["verdict"]) == (1.0, None, "fewer than 2 pairs, so no interval")
    reasons = summary["not_measured"]
    assert "fewer than two pairs" in reasons["comparative_analysis.reactive.speedup_ratio.low"]
    assert "no cell holds both" in reasons["comparative_analysis.predictive.speedup_ratio.ratio"]


def test_without_a_baseline_the_summary_says_what_was_compared_with_instead():
    summary = reporting.summarise([result for result in make_sweep() if result["spec"]["mode"] != "baseline"])
    analysis = summary["comparative_analysis"]
    assert analysis["compared_with"] == ["reactive"]
    assert analysis["predictive"]["latency_speedup_percent"] == pytest.approx(100 * (81 / 51 - 1))
    assert analysis["reactive"]["latency_speedup_percent"] is None
    reason = summary["not_measured"]["comparative_analysis.reactive.latency_speedup_percent"]
    assert reason == "no baseline run succeeded; predictive runs were compared with reactive"
    assert "first reactive strategy" in summary["definitions"]["compared_with"]


def test_medians_over_runs_have_an_interval_and_percentiles_of_token_times_stand_beside_latency():
    summary = reporting.summarise(make_sweep())
    short = summary["strategy_summaries"]["reactive"]["by_context"][0]
    assert (short["latency_ms"]["median"], short["latency_ms"]["low"], short["latency_ms"]["high"]) == (
        81.0,
        80.0,
        82.0,
    )
    for share in (50, 90, 99):  # every token of a made-up run takes as long
        assert short[f"itl_p{share}_ms"]["median"] == 81.0
        assert summary["mode_summaries"]["reactive"][f"average_itl_p{share}_ms"] == pytest.approx(81.0)


def test_runs_that_differ_much_are_warned_of():
    results = [make_result(repetition=r, tpot_ms=t) for r, t in enumerate((100.0, 112.0))]
    assert reporting.summarise(results)["warnings"] == [
        "baseline at 500 tokens: runs differ by 11.3 % of their median latency"  # 12 / 106
    ]
    assert reporting.summarise(make_sweep())["warnings"] == []


def test_how_often_a_strategy_was_warmed_up_is_said():
    summary = reporting.summarise([make_result(warmup_runs=2), make_result("reactive")])["strategy_summaries"]
    assert (summary["baseline"]["warmup_runs"], summary["reactive"]["warmup_runs"]) == (2, None)


def test_what_was_made_under_a_simulated_link_says_so():
    summary = reporting.summarise(make_sweep())
    assert summary["strategy_summaries"]["reactive"]["link"] == "simulated pcie3-x16, 15.75 GB/s"
    assert summary["strategy_summaries"]["baseline"]["link"] is None
    assert "Stall" in summary["definitions"]["simulated"]
    assert "reactive, predictive (simulated pcie3-x16" in summary["definitions"]["simulated"]
    assert "simulated" not in reporting.summarise([make_result()])["definitions"]


def test_late_and_missed_pages_are_counted_apart():
    reactive = reporting.summarise(make_sweep())["mode_summaries"]["reactive"]
    assert reactive["average_cache_late_rate"] == pytest.approx(0.05)
    assert reactive["average_cache_miss_rate"] == pytest.approx(0.2)


def test_a_failed_run_is_counted_named_and_left_out_of_averages():
    failure = make_failure(make_result("reactive", repetition=9, tpot_ms=1.0))
    summary = reporting.summarise([make_result(), make_result("reactive"), failure])
    assert summary["experiment_summary"]["total_experiments"] == 3
    assert summary["experiment_summary"]["successful_experiments"] == 2
    assert summary["mode_summaries"]["reactive"]["average_latency_ms"] == 100.0
    assert summary["failures"] == [
        {
            "run_id": failure["run_id"],
            "strategy": "reactive",
            "context_tokens": 500,
            "repetition": 9,
            "status": "out_of_memory",
            "error": "CUDA out of memory",
        }
    ]


def test_a_mode_that_was_not_run_is_null_and_the_summary_says_why():
    summary = reporting.summarise([make_result()])
    assert summary["mode_summaries"]["predictive"]["average_latency_ms"] is None
    assert summary["comparative_analysis"]["predictive"]["latency_speedup_percent"] is None
    reasons = summary["not_measured"]
    assert reasons["mode_summaries.predictive.average_latency_ms"] == "no predictive run succeeded"
    assert "does not page" in reasons["mode_summaries.baseline.average_cache_hit_rate"]
    assert "no cell" in reasons["comparative_analysis.predictive.latency_speedup_percent"]


def test_every_null_average_has_its_reason():
    summary = reporting.summarise(make_sweep())
    for mode, figures in summary["mode_summaries"].items():
        for key in (key for key, value in figures.items() if value is None):
            assert f"mode_summaries.{mode}.{key}" in summary["not_measured"]


def test_no_reason_denies_what_another_mode_has_measured():
    reasons = reporting.summarise(make_sweep())["not_measured"]
    of_baseline = {key: why for key, why in reasons.items() if key.startswith("mode_summaries.baseline.average_")}
    for figure in ("shadow_lru_hit_rate", "gain_over_lru", "select_percent", "skipped_rate", "hidden_transfer_share"):
        assert of_baseline[f"mode_summaries.baseline.average_{figure}"] == "the baseline does not page its cache"
    assert not [why for why in of_baseline.values() if why.startswith("no run has")]


def test_every_null_spread_has_its_reason():
    not_measured = reporting.summarise([make_result(), make_result("reactive")])["not_measured"]
    for path, reason in (
        ("mode_summaries.reactive.std.average_stall_percent", "two successful repetitions"),
        ("mode_summaries.reactive.std.average_prediction_accuracy", "do not prefetch"),
        ("mode_summaries.predictive.std.average_stall_percent", "no predictive run succeeded"),
        ("comparative_analysis.reactive.std.latency_speedup_percent", "two successful repetitions"),
        ("comparative_analysis.predictive.std.latency_speedup_percent", "no cell holds both"),
    ):
        assert reason in not_measured[path]


def test_unreadable_files_are_named_in_the_summary(tmp_path):
    (tmp_path / "reactive_torn.json").write_text("{")
    assert "reactive_torn.json" in reporting.summarise(tmp_path)["unreadable_files"][0]


def test_a_wrong_token_anywhere_is_not_averaged_away():
    wrong = make_result("reactive", repetition=1)
    wrong["quality"]["matches_baseline"] = False
    assert (
        reporting.summarise([make_result("reactive"), wrong])["mode_summaries"]["reactive"]["matches_baseline"] is False
    )


def test_fidelity_is_averaged_over_the_runs_in_which_it_was_measured():
    results = [
        with_fidelity(approximately(make_result("reactive", context)), kl_mean=kl, kl_max=4 * kl, top1_agreement=1 - kl)
        for context, kl in ((500, 0.25), (1000, 0.75))
    ]
    summary = reporting.summarise([make_result(), *results, approximately(make_result("reactive", repetition=1))])
    for averages in (summary["mode_summaries"]["reactive"], summary["strategy_summaries"]["reactive"]):
        assert averages["average_kl_mean"] == 0.5
        assert averages["average_kl_max"] == 2.0
        assert averages["average_top1_agreement"] == 0.5
        assert averages["average_perplexity"] == pytest.approx(12.3)
        assert averages["average_page_recall"] == 1.0
    (short, long) = summary["strategy_summaries"]["reactive"]["by_context"]
    assert (short["kl_mean"]["mean"], short["kl_mean"]["n"], long["kl_mean"]["mean"]) == (0.25, 1, 0.75)
    reasons = summary["not_measured"]
    assert "quality block" in reasons["mode_summaries.baseline.average_kl_mean"]
    assert reasons["mode_summaries.baseline.average_page_recall"] == "the baseline reads all of its cache"


def test_scores_of_tasks_stand_with_their_strategy():
    asked = with_tasks(make_result("reactive"), make_task([1.0, 0.0], [1.0, 1.0]))
    strategies = reporting.summarise([make_result(), asked])["strategy_summaries"]
    assert strategies["baseline"]["task_scores"] == []
    assert strategies["reactive"]["task_scores"] == [
        {
            "model": "tiny",
            "context_tokens": 500,
            "task": "passkey",
            "unit": "share",
            "reference": None,
            "tokens": 1000,
            "n": 2,
            "score": 0.5,
            "low": 0.25,
            "high": 0.75,
            "baseline_score": 1.0,
            "baseline_low": 0.75,
            "baseline_high": 1.0,
            "discriminates": True,
            "attended_pages": 4.0,
            "pages": 16.0,
        }
    ]


def test_every_figure_of_quality_has_its_definition():
    definitions = reporting.summarise([])["definitions"]
    assert {*FIDELITY, "task_scores"} <= set(definitions)


def numbers_in(value):
    if isinstance(value, dict):
        yield from (number for inner in value.values() for number in numbers_in(inner))
    elif isinstance(value, list):
        yield from (number for inner in value for number in numbers_in(inner))
    elif isinstance(value, float):
        yield value


anything = st.one_of(
    st.none(),
    st.booleans(),
    st.text(max_size=3),
    st.sampled_from([math.nan, math.inf, -math.inf, 10**30, 10**400]),
    st.floats(-1e12, 1e12),
    st.integers(0, 10**9),
)


@settings(max_examples=40)
@given(st.data())
def test_whatever_results_hold_the_summary_is_strict_json_and_tables_can_be_made(data):
    results = []
    for result in make_sweep(contexts=(500,), repetitions=2):
        result = copy.deepcopy(with_tasks(with_fidelity(result), make_task([1.0, 0.0], [1.0, 1.0])))
        for block in (result["quality"]["fidelity"], *result["quality"]["tasks"]):
            for key in data.draw(st.lists(st.sampled_from(sorted(block)), max_size=2), label="quality"):
                block[key] = data.draw(anything, label=key)
        for block in data.draw(st.lists(st.sampled_from(MEASURED), max_size=4), label="blocks lost"):
            result[block] = data.draw(st.sampled_from([None, "torn", []]), label="what is there instead")
        for block in ("timing", "memory", "cache", "prefetch", "context", "quality"):
            if isinstance(result[block], dict):
                for key in data.draw(st.lists(st.sampled_from(sorted(result[block])), max_size=2), label=block):
                    result[block][key] = data.draw(anything, label=key)
        result["status"] = data.draw(st.sampled_from(["ok", "ok", "error", None]), label="status")
        results.append(result)
    summary = reporting.summarise(results, data.draw(anything, label="duration"))
    json.dumps(summary, allow_nan=False)
    assert all(math.isfinite(number) for number in numbers_in(summary))
    tables = reporting.markdown_tables(reporting.to_frame(results), reporting.task_scores(results))
    assert "nan" not in tables.lower()


def test_importing_the_reports_loads_nothing_heavy():
    heavy = "{'torch', 'pandas', 'matplotlib', 'rich'}"
    probe = f"import sys, reporting, plots, run_plots, quality_plots; print(*(sys.modules.keys() & {heavy}))"
    folder = Path(reporting.__file__).parent
    done = subprocess.run([sys.executable, "-c", probe], cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
