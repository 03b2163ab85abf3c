"""Quality in frames and tables: every cell by hand, and no approximate strategy without a word on it."""

from __future__ import annotations

import io

import pytest
from result_fixtures import (
    approximately,
    make_failure,
    make_result,
    make_sweep,
    make_task,
    with_fidelity,
    with_tasks,
)
from rich.console import Console

import run_plots
from plots import comparison_figure
from quality_frame import describe_quality, nats_text, quality_note, task_items, task_scores
from quality_tables import NO_TELLING, quality_table, reading_table, tasks_table
from result_frame import to_frame
from result_tables import markdown_tables, print_tables, tables


def quest(context=500, repetition=0, **figures):
    """An approximate run with `figures` of fidelity; without any, its quality was not measured."""
    result = approximately(make_result("reactive", context, repetition, tpot_ms=60.0 + repetition, name="quest"))
    return with_fidelity(result, **figures) if figures else result


MEASURED = {
    "kl_mean": 0.0123,
    "kl_low": 0.0045,
    "kl_high": 0.0211,
    "kl_max": 0.5,
    "top1_agreement": 0.96875,  # 62 of 64
    "top1_low": 0.893,
    "perplexity": 12.5,
    "attention_mass_recall": 0.875,
    "page_recall": 0.75,
    "attended_pages": 4.0,
    "pages": 15.5,
}


def row_of(table, strategy, context="500"):
    (row,) = (row for row in table.rows if row[:2] == (context, strategy))
    return dict(zip(table.headings, row, strict=True))


def test_a_measured_approximation_has_its_fidelity_beside_latency_and_memory():
    results = [with_fidelity(make_result()), quest(**MEASURED), quest(repetition=1)]
    results[1]["quality"]["first_divergent_token"] = 7
    frame = to_frame(results)
    table = quality_table(frame)
    assert row_of(table, "quest") == {
        "context\ntokens": "500",
        "strategy": "quest",
        "ms per\ntoken": "60.5",  # of both repetitions, 60 and 61; fidelity of the one that has it
        "device\nKV MiB": "40.0",
        "KL, nats\n[low-high]": "0.012 [0.0045-0.021]",
        "top-1 %\n[low-high]": "96.9 [89-100]",
        "first\nother\ntoken": "7",
    }
    assert row_of(reading_table(frame), "quest") == {
        "context\ntokens": "500",
        "strategy": "quest",
        "pages read\nof there": "4.0 / 15.5",
        "attention\nmass %": "87.5",
        "page\nrecall %": "75.0",
        "perplexity\n/ baseline": "12.50/12.30",
    }
    assert "Approximate: quest (KL 0.012 nats)." in table.caption
    assert "over 64 tokens" in table.caption


def test_an_exact_run_shows_the_zeros_that_were_measured_of_it():
    frame = to_frame([make_result(), with_fidelity(make_result("reactive"))])
    exact = row_of(quality_table(frame), "reactive")
    assert (exact["KL, nats\n[low-high]"], exact["top-1 %\n[low-high]"]) == ("0", "100.0 [94-100]")
    assert reading_table(frame).rows == []  # all was read, and nothing is to be told of it


def test_a_divergence_of_rounding_has_no_interval():
    frame = to_frame([with_fidelity(make_result("reactive"), kl_mean=3.4e-8, kl_low=1e-8, kl_high=9e-8)])
    assert row_of(quality_table(frame), "reactive")["KL, nats\n[low-high]"] == "3.4e-8"


def test_another_reference_than_transformers_own_cache_is_named():
    stood_in = with_fidelity(make_result("reactive"), reference="exact paging: the whole cache does not fit")
    caption = quality_table(to_frame([stood_in])).caption
    assert "The baseline of some is exact paging: the whole cache does not fit." in caption
    assert "baseline of some" not in quality_table(to_frame([with_fidelity(make_result("reactive"))])).caption


def test_an_approximation_that_nobody_measured_is_listed_as_not_measured():
    table = quality_table(to_frame([make_result(), make_result("predictive"), quest()]))
    assert row_of(table, "quest")["KL, nats\n[low-high]"] == "not measured"
    assert row_of(table, "predictive")["KL, nats\n[low-high]"] == "—"  # exact, and not measured either
    assert all(row_of(table, "quest")[heading] == "—" for heading in table.headings[5:])
    assert "| 500 | quest | 60.0 | 40.0 | not measured |" in table.to_markdown()


def test_an_approximation_measured_at_one_context_only_is_not_measured_at_the_other():
    table = quality_table(to_frame([quest(**MEASURED), quest(1000)]))
    assert row_of(table, "quest", "500")["KL, nats\n[low-high]"] == "0.012 [0.0045-0.021]"
    assert row_of(table, "quest", "1000")["KL, nats\n[low-high]"] == "not measured"


def test_what_went_wrong_in_measuring_is_said():
    broken = quest()
    broken["quality"]["error"] = "ValueError: the model has no tokenizer"
    caption = quality_table(to_frame([make_result(), broken])).caption
    assert "Of quest: ValueError: the model has no tokenizer." in caption


@pytest.mark.parametrize("none", [None, {}, "torn", 3])
def test_a_block_of_fidelity_that_holds_nothing_counts_as_not_measured(none):
    result = quest()
    result["quality"]["fidelity"] = none
    assert row_of(quality_table(to_frame([result])), "quest")["KL, nats\n[low-high]"] == "not measured"


def test_exact_runs_without_quality_need_no_table_of_it():
    results = [*make_sweep(), make_failure(quest())]
    assert quality_table(to_frame(results)).rows == []
    assert not any("Quality" in table.title for table in tables(to_frame(results), task_scores(results)))


def test_latencies_under_a_simulated_link_say_so_here_too():
    assert "Figures of quest are under a simulated link" in quality_table(to_frame([make_result(), quest()])).caption


@pytest.mark.parametrize(
    ("kl_nats", "text"),
    [(0.0, "0"), (0.0123, "0.012"), (1.26, "1.3"), (12.6, "13"), (0.00012, "1.2e-4"), (3.3e-12, "3.3e-12")],
)
def test_a_divergence_has_two_digits_and_only_none_at_all_is_0(kl_nats, text):
    assert nats_text(kl_nats) == text


# --- tasks --------------------------------------------------------------------------------------------------------


def with_passkey(result, scores, baseline_scores=(1.0, 1.0, 1.0, 1.0), **task):
    return with_tasks(result, make_task(list(scores), list(baseline_scores), **task))


def test_scores_of_tasks_are_a_row_for_each_run_and_task():
    results = [
        with_passkey(quest(), (1.0, 0.0, 1.0, 1.0)),
        with_tasks(make_result(), make_task([1.0, 1.0], [1.0, 1.0]), make_task([0.0, 0.0], [0.0, 0.0], "multi_key")),
        make_result(repetition=1),
    ]
    scores = task_scores(results)
    assert scores["strategy"].tolist() == ["baseline", "baseline", "quest"]
    assert scores["task"].tolist() == ["passkey", "multi_key", "passkey"]
    last = scores.iloc[2]
    assert (last["context_tokens"], last["tokens"], last["n"], last["score"]) == (500, 1000, 4, 0.75)
    assert (last["low"], last["high"]) == (0.5, 1.0)
    assert (last["baseline_score"], last["baseline_low"], last["baseline_high"]) == (1.0, 0.75, 1.0)
    assert scores["discriminates"].tolist() == [True, False, True]
    assert scores["exact"].tolist() == [True, True, False]


def test_items_of_tasks_keep_their_depth_and_what_the_baseline_scored():
    items = task_items([with_passkey(quest(), (1.0, 0.0), (1.0, 0.5), depths=[0.25, None])])
    assert items[["strategy", "model", "task"]].drop_duplicates().values.tolist() == [["quest", "tiny", "passkey"]]
    assert items["depth"].isna().tolist() == [False, True]
    assert items["score"].tolist() == [1.0, 0.0]
    assert items["baseline_score"].tolist() == [1.0, 0.5]


@pytest.mark.parametrize("tasks", [None, [], "torn", [None, 3], {"task": "passkey"}])
def test_tasks_that_are_none_give_no_rows_but_all_columns(tasks):
    result = make_result()
    result["quality"]["tasks"] = tasks
    for make in (task_scores, task_items):
        assert len(make([result])) == 0
        assert list(make([result]).columns) == list(make([with_passkey(result, (1.0, 1.0), (1.0, 1.0))]).columns)


def test_a_score_that_is_missing_is_a_dash_and_never_zero():
    torn = make_task([1.0, 1.0], [1.0, 1.0])
    torn.update(mean=None, n="many", baseline=None, discriminates=None)
    (row,) = tasks_table(task_scores([with_tasks(make_result(), torn)])).rows
    assert row == ("baseline", "passkey", "1000", "—", "—", "—", "4/16", "")


def test_a_failed_run_has_no_scores():
    failed = {**with_passkey(quest(), (1.0, 1.0), (1.0, 1.0)), "status": "error"}
    assert len(task_scores([failed])) == 0


def test_the_tasks_table_has_the_interval_of_each_score_and_the_baselines_beside_it():
    table = tasks_table(task_scores([with_passkey(quest(), (1.0, 0.0, 1.0, 1.0))]))
    assert table.rows == [("quest", "passkey", "1000", "4", "75 [50-100]", "100 [75-100]", "4/16", "")]


def test_a_task_that_the_baseline_fails_is_said_to_tell_nothing():
    table = tasks_table(task_scores([with_passkey(quest(), (1.0, 0.0, 0.0, 0.0), (1.0, 0.0, 0.0, 0.0))]))
    assert table.rows[0][-1] == NO_TELLING
    assert "counts neither for nor against anybody" in table.caption


def test_a_perplexity_is_no_percentage_and_says_so():
    task = make_task([11.5, 12.5], [10.0, 11.0], "prose_perplexity")
    task |= {"unit": "perplexity", "low": 11.5, "high": 112.0, "discriminates": None}
    table = tasks_table(task_scores([with_tasks(quest(), task)]))
    assert table.rows[0][4:] == ("ppl 12.0 [11.5-112]", "ppl 10.5 [10.2-1.00]", "4/16", "")
    assert "less is better" in table.caption
    plain = tasks_table(task_scores([with_passkey(quest(), (1.0, 0.0, 1.0, 1.0))]))
    assert "less is better" not in plain.caption


def test_of_two_models_each_line_names_its_own():
    one, other = (with_passkey(make_result(), (1.0, 0.0, 1.0, 1.0)) for _ in range(2))
    other["spec"]["model_name"] = "bigger"
    table = tasks_table(task_scores([one, other]))
    assert table.headings[0] == "model" and [row[0] for row in table.rows] == ["tiny", "bigger"]


def test_strategies_asked_the_same_stand_together_and_the_same_line_stands_once():
    def run(result):
        tasks = [make_task([1.0, 1.0], [1.0, 1.0], tokens=tokens) for tokens in (1000, 2000)]
        return with_tasks(result, *tasks)

    results = [run(make_result(context=context)) for context in (500, 1000)] + [run(quest())]
    rows = tasks_table(task_scores(results)).rows
    assert [(row[0], row[2]) for row in rows] == [
        ("baseline", "1000"),
        ("quest", "1000"),
        ("baseline", "2000"),
        ("quest", "2000"),
    ]


# --- wherever results are shown -------------------------------------------------------------------------------------


def test_all_tables_hold_the_quality_and_the_tasks_in_both_forms():
    results = [make_result(), with_passkey(quest(**MEASURED), (1.0, 0.0, 1.0, 1.0))]
    frame, scores = to_frame(results), task_scores(results)
    pipe = io.StringIO()
    print_tables(frame, Console(width=80, file=pipe), scores)
    for text in (pipe.getvalue(), markdown_tables(frame, scores)):
        assert "12.50/12.30" in text
        assert "75 [50-100]" in text
    assert [table.title.split()[0] for table in tables(frame, scores)][:4] == [
        "Strategies:",
        "Quality",
        "What",
        "Tasks:",
    ]
    assert "no, approx." in markdown_tables(frame, scores)


def test_80_columns_break_no_name_of_a_mode_and_cut_no_number():
    results = []
    for mode in ("baseline", "reactive", "predictive"):
        for context in (1000, 128_000):
            tasks = [make_task([0.0, 1.0, 0.0], [0.0, 1.0, 0.0], "multi_key", tokens) for tokens in (128_000,)]
            result = with_tasks(approximately(make_result(mode, context, tpot_ms=1234.5)), *tasks)
            figures = {"kl_mean": 1.234e-5, "kl_low": 2e-6, "kl_high": 1.2e-5, "attended_pages": 15.5}
            figures |= {"perplexity": 1234.0, "baseline_perplexity": 1230.0}
            results.append(with_fidelity(result, **figures) if context > 1000 else result)
            result["memory"]["device_kv_bytes"] = 123_456 * 2**20
    frame, scores = to_frame(results), task_scores(results)
    for table in (quality_table(frame), reading_table(frame), tasks_table(scores)):
        pipe = io.StringIO()
        Console(width=80, file=pipe).print(table.to_rich())
        text = pipe.getvalue()
        assert max(map(len, text.splitlines())) <= 80
        assert "…" not in text
        cells = {word for row in table.rows for cell in row for word in cell.split()}
        assert cells <= set(text.split())


def test_plots_of_speed_say_how_approximate_what_they_show_is():
    results = [make_result(), make_result("predictive"), quest(**MEASURED), approximately(make_result("reactive"))]
    note = "Approximate: quest (KL 0.012 nats), reactive (KL not measured)."
    assert quality_note(to_frame(results)) == note
    assert note in comparison_figure(to_frame(results)).texts[1].get_text().replace("\n", " ")
    assert "Approximate" not in comparison_figure(to_frame(make_sweep())).texts[1].get_text()
    labels = [text.get_text() for text in run_plots.latency_trace_figure(results).legends[0].get_texts()]
    assert labels == [
        "baseline, 500 tokens of context",
        "predictive, 500 tokens of context",
        "quest, 500 tokens of context, approximate, KL 0.012 nats",
        "reactive, 500 tokens of context, approximate, KL not measured",
    ]
    title = run_plots.step_figure("quest", results[2]).axes[0].get_title(loc="left")
    assert "quest, approximate, KL 0.012 nats" in title.replace("\n", " ")
    assert describe_quality(results[1]) is None
