"""Reading results: what is read is named, and nothing missing ever looks like a number."""

from __future__ import annotations

import math

import pytest
from result_fixtures import PAGED, make_failure, make_result, make_sweep, with_fidelity, write_results

import reporting
from result_frame import load_results, strategy_labels, to_frame, under_simulated_link


def test_a_folder_gives_its_results_baseline_first(tmp_path):
    write_results(tmp_path, make_sweep())
    results, problems = load_results(tmp_path)
    assert problems == []
    assert [result["spec"]["mode"] for result in results] == ["baseline"] * 6 + ["reactive"] * 6 + ["predictive"] * 6


def test_results_of_a_mode_come_in_the_order_they_were_run(tmp_path):
    first = {**make_result(name="z"), "started_at": "2030-01-01T00:00:00"}
    second = {**make_result(name="a"), "started_at": "2030-01-01T00:00:09"}
    write_results(tmp_path, [second, first])
    assert [result["spec"]["name"] for result in load_results(tmp_path)[0]] == ["z", "a"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"schema_version": 1, "spec": {"mode"', "line 1"),
        ("", "line 1"),
        ("[1, 2]", "no JSON object"),
        ('{"schema_version": 99}', "schema_version is 99, this program reads 1"),
        ("{}", "schema_version is None"),
        ('{"schema_version": 1, "spec": {"mode": "psychic"}}', "spec.mode is 'psychic'"),
        ('{"schema_version": 1, "spec": null}', "spec.mode is None"),
        ('{"schema_version": 1, "spec": {"mode": ["reactive"]}}', "spec.mode is ['reactive']"),
        ('{"schema_version": 1, "spec": {"mode": "reactive"}, "x": NaN}', "it holds NaN"),
        ("[" * 100_000, "recursion"),
    ],
)
def test_a_file_that_is_no_result_is_named_and_the_others_are_read(tmp_path, text, complaint):
    write_results(tmp_path, [make_result()])
    (tmp_path / "reactive_broken.json").write_text(text)
    results, problems = load_results(tmp_path)
    assert len(results) == 1
    assert len(problems) == 1
    assert "reactive_broken.json" in problems[0]
    assert complaint in problems[0]


def test_bytes_that_are_no_text_and_a_folder_with_a_results_name_are_named_too(tmp_path):
    (tmp_path / "baseline_bytes.json").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "predictive_folder.json").mkdir()
    results, problems = load_results(tmp_path)
    assert results == []
    assert ["baseline_bytes" in problems[0], "predictive_folder" in problems[1]] == [True, True]


def test_other_files_in_the_folder_are_no_results(tmp_path):
    write_results(tmp_path, [make_result()])
    reporting.write_summary(tmp_path, 1.0)
    (tmp_path / "notes_baseline_x.json").write_text("{}")
    assert len(load_results(tmp_path)[0]) == 1
    assert load_results(tmp_path)[1] == []


def test_a_folder_that_is_not_there_is_a_problem_and_no_traceback(tmp_path):
    assert load_results(tmp_path / "gone") == ([], [f"{tmp_path / 'gone'}: no such folder"])


def test_the_frame_has_one_row_per_run_with_figures_in_the_unit_of_their_name():
    row = to_frame([make_result("predictive")]).iloc[0]
    assert (row["strategy"], row["model"], row["context_tokens"], row["status"]) == (
        "predictive",
        "tiny",
        500,
        "ok",
    )
    assert row["tokens_per_second"] == pytest.approx(11 / 2.0)  # E2E = 1000 ms + 10 x 100 ms = 2 s
    assert (row["device_kv_mb"], row["staging_mb"]) == (40.0, 10.0)  # staging is a part of it
    assert row["host_kv_mb"] == 80.0
    assert row["prefetch_hit_rate"] == 0.6  # 12 on time / 20 issued
    assert row["link"] == "simulated pcie3-x16, 15.75 GB/s"
    assert (row["hit_rate"], row["late_rate"], row["miss_rate"]) == (0.75, 0.05, 0.2)
    assert row["machine"] == "Test CPU, 2 threads"


def test_what_was_not_measured_is_na_and_never_zero():
    frame = to_frame([make_result("baseline"), make_failure(make_result("reactive"))])
    for column in (
        "stall_percent",
        "hit_rate",
        "accuracy",
        "gpu_memory_mb",
        "host_kv_mb",
        "matches_baseline",
    ):
        assert frame[column].isna().all(), column
    assert frame["tpot_ms"].isna().tolist() == [False, True]
    assert frame["context_tokens"].tolist() == [500, 500]


@pytest.mark.parametrize("value", ["fast", True, [1], {}, math.nan, math.inf, 10**400])
def test_a_value_that_is_no_finite_number_counts_as_not_measured(value):
    result = make_result()
    result["timing"]["tpot_ms"] = value
    assert to_frame([result])["tpot_ms"].isna().all()


def test_a_count_too_large_to_be_one_is_missing():
    result = make_result()
    result["context"]["requested_tokens"] = 10**30
    assert to_frame([result])["requested_tokens"].isna().all()


def test_fidelity_has_its_columns_of_the_run_in_which_it_was_measured_and_of_no_other():
    measured = with_fidelity(make_result("reactive"), kl_mean=0.25, kl_max=2.0, top1_agreement=0.5, page_recall=None)
    failed = make_result("reactive", repetition=2)
    failed["quality"]["error"] = "ValueError: no tokenizer"
    frame = to_frame([measured, make_result("reactive", repetition=1), failed])
    row = frame.iloc[0]
    assert (row["fidelity_tokens"], row["kl_mean"], row["kl_max"], row["top1_agreement"]) == (64, 0.25, 2.0, 0.5)
    assert (row["perplexity"], row["baseline_perplexity"], row["attention_mass_recall"]) == (12.3, 12.3, 1.0)
    for column in ("kl_mean", "kl_max", "top1_agreement", "perplexity", "baseline_perplexity", "attention_mass_recall"):
        assert frame[column].isna().tolist() == [False, True, True], column
    assert frame["page_recall"].isna().all()
    assert frame["quality_error"].fillna("").tolist() == ["", "", "ValueError: no tokenizer"]


def test_no_results_give_an_empty_frame_with_all_its_columns():
    empty, full = to_frame([]), to_frame(make_sweep())
    assert len(empty) == 0
    assert list(empty.columns) == list(full.columns)


def test_only_strategies_whose_link_was_simulated_are_named_as_such():
    bus = make_result("reactive", name="on a bus")
    bus["cache"]["link"] = {"kind": "bus", "name": "pcie", "bandwidth_gb_s": None, "latency_us": 0.0}
    frame = to_frame([make_result(), bus, make_result("predictive"), make_result("predictive", repetition=1)])
    assert under_simulated_link(frame) == {"simulated pcie3-x16, 15.75 GB/s": ["predictive"]}


def test_a_run_on_the_cpu_of_a_machine_with_a_gpu_names_the_cpu():
    result = make_result()
    result["environment"]["gpus"] = ["Some GPU"]
    assert to_frame([result])["machine"].tolist() == ["Test CPU, 2 threads"]
    result["model"]["device"] = "cuda:0"
    assert to_frame([result])["machine"].tolist() == ["Some GPU"]


def test_one_name_for_two_settings_becomes_two_labels_that_say_what_differs():
    wide = make_result("reactive", paging={**PAGED, "max_gpu_pages": 8})
    labels = strategy_labels([make_result("reactive"), wide, make_result("reactive", repetition=1)])
    assert labels == [
        "reactive (max_gpu_pages=4)",
        "reactive (max_gpu_pages=8)",
        "reactive (max_gpu_pages=4)",
    ]


def test_a_policy_with_parameters_is_told_from_the_plain_one():
    tuned = make_result("reactive", paging={**PAGED, "policy": {"name": "lru", "k": 2}})
    labels = strategy_labels([make_result("reactive"), tuned])
    assert labels == ["reactive (policy=lru)", "reactive (policy=lru(k=2))"]


def test_context_repetition_and_seed_do_not_split_a_strategy():
    results = [make_result(context=c, repetition=r, seed=r) for c in (1, 2) for r in (0, 1)]
    assert set(strategy_labels(results)) == {"baseline"}


def test_what_a_run_was_set_to_has_columns_of_its_own():
    result = make_result("predictive")
    result["spec"]["paging"] |= {"policy": {"name": "s3fifo", "small_fraction": 0.2}, "selector": "quest"}
    result["spec"]["paging"] |= {"attention_fraction": 0.25, "staging_pages": 6}
    row = to_frame([result]).iloc[0]
    assert (row["policy"], row["selector"]) == ("s3fifo (small_fraction=0.2)", "quest")
    assert (row["predictor"], row["attention_fraction"], row["staging_pages"]) == ("layer_ahead", 0.25, 6)
    assert to_frame([make_result()]).iloc[0][["policy", "predictor", "link_gb_s"]].isna().all()
