"""Tables, of results and of a plan: what stands in them, at any width, on a console and in Markdown."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
from result_fixtures import make_failure, make_result, make_sweep
from rich.console import Console

from plan_table import print_plan
from planning import PlannedRun
from result_frame import describe_setting, to_frame
from result_tables import (
    context_table,
    failure_table,
    markdown_tables,
    memory_table,
    paging_table,
    prediction_table,
    print_tables,
    strategy_table,
    tables,
    token_time_table,
)


def printed(results, width=80) -> str:
    pipe = io.StringIO()
    print_tables(to_frame(results), Console(width=width, file=pipe))
    return pipe.getvalue()


def printed_table(table, width) -> str:
    pipe = io.StringIO()
    Console(width=width, file=pipe).print(table.to_rich())
    return pipe.getvalue()


def row_of(table, strategy):
    (row,) = [row for row in table.rows if strategy in row]
    return dict(zip(table.headings, row, strict=True))


def test_the_strategy_table_says_speed_spread_waiting_and_cost():
    table = strategy_table(to_frame(make_sweep()))
    predictive = row_of(table, "predictive")
    assert predictive["latency\nms"] == "51.0 ± 1.0"  # 50, 51, 52 at each context
    # Pairs 100 / 50, 101 / 51, 102 / 52: median 1.98, in both contexts. Nearly all resamples lie between the outer two.
    assert predictive["speed-up\nx"] == "1.98\n1.96-2.00"
    assert (predictive["n"], predictive["stall\n%"], predictive["hit\nrate %"]) == ("6", "5.00", "75.0")
    assert (predictive["mispred.\ncost %"], predictive["same\ntokens"]) == ("16.0", "yes")
    assert row_of(table, "reactive")["mispred.\ncost %"] == "—"
    assert row_of(table, "baseline")["speed-up\nx"] == "ref."
    assert "link: simulated pcie3-x16, 15.75 GB/s" in table.caption


def test_the_context_table_has_a_row_per_context_and_strategy():
    table = context_table(to_frame(make_sweep()))
    assert [row[:2] for row in table.rows] == [
        (context, mode) for context in ("500", "1000") for mode in ("baseline", "reactive", "predictive")
    ]


def test_the_memory_table_shows_a_dash_where_there_is_no_gpu():
    table = memory_table(to_frame(make_sweep(contexts=(500,))))
    reactive = row_of(table, "reactive")
    assert (reactive["GPU\nMiB"], reactive["GPU\nsaved %"]) == ("—", "—")
    assert (reactive["device\nKV MiB"], reactive["KV\nsaved %"]) == ("40.0", "+50.0")
    assert reactive["page size\nx budget"] == "128 x 4"
    assert row_of(table, "baseline")["page size\nx budget"] == "—"
    assert "No GPU" in table.caption


def test_the_prediction_table_lists_only_strategies_that_prefetch():
    table = prediction_table(to_frame(make_sweep()))
    assert [row[0] for row in table.rows] == ["predictive"]
    assert table.rows[0][2:] == ("20.0", "60.0", "80.0", "64.0", "75.0", "16.0")


def test_the_paging_table_says_what_was_hit_and_where_the_time_went():
    table = paging_table(to_frame(make_sweep()))
    assert [row[0] for row in table.rows] == ["reactive", "predictive"]
    assert table.rows[0][2:] == ("75.0", "12.5", "—", "—", "—", "5.00")


def test_failures_have_their_table_and_lower_the_count_of_their_strategy():
    results = [
        *make_sweep(contexts=(500,)),
        make_failure(make_result("reactive", repetition=3), error="line 1\nfix"),
    ]
    frame = to_frame(results)
    assert failure_table(frame).rows == [("reactive", "500", "out_of_memory", "line 1\nfix")]
    assert row_of(strategy_table(frame), "reactive")["n"] == "3/4"


def with_stalls(*stalls_percent, context=500):
    """A baseline, and a repetition of `reactive` for each stall; its hit rates are 0.75, 0.752, 0.754 and so on."""
    results = [make_result(context=context, repetition=r) for r in range(len(stalls_percent))]
    for repetition, stall_percent in enumerate(stalls_percent):
        result = make_result("reactive", context, repetition, tpot_ms=80.0)
        result["cache"].update(stall_percent=stall_percent, hit_rate=0.75 + 0.002 * repetition)
        results.append(result)
    return results


@pytest.mark.parametrize("make_table", [strategy_table, context_table])
def test_a_column_without_room_for_its_spread_has_it_in_the_caption(make_table):
    # Stalls 5 and 6 %: std 0.71. Hit rates 75.0 and 75.2 %: std 0.14. All runs are as fast: 0.
    caption = make_table(to_frame(with_stalls(5.0, 6.0))).caption
    assert "at most 0.7 points for stall, 0.1 points for hit rate; 0 for" in caption
    assert ("tokens per s" if make_table is strategy_table else "gain (paired)") in caption.split("; 0 for")[1]


def test_the_spread_in_a_caption_is_that_of_the_row_with_the_most():
    results = with_stalls(5.0, 6.0) + with_stalls(5.0, 9.0, context=1000)
    assert "2.8 points for stall" in context_table(to_frame(results)).caption  # 4 / sqrt(2)
    # Over all contexts: the variances 0.5 and 8, each of one degree of freedom; sqrt(8.5 / 2) = 2.06.
    assert "2.1 points for stall" in strategy_table(to_frame(results)).caption


def test_a_spread_that_rounds_to_nothing_is_not_said_to_be_none():
    assert "<0.1 points for stall" in strategy_table(to_frame(with_stalls(5.0, 5.01))).caption


def with_speeds(*times_ms, mode="reactive", context=500):
    """A baseline of 100 ms a token, and a repetition of another mode for each time."""
    results = [make_result(context=context, repetition=r) for r in range(len(times_ms))]
    return results + [make_result(mode, context, r, tpot_ms=t) for r, t in enumerate(times_ms)]


def test_a_speed_up_is_the_median_ratio_of_pairs_with_its_interval_beneath():
    # Ratios 100 / 80, 100 / 100, 100 / 50 = 1.25, 1, 2. Of three pairs the interval is their range.
    table = context_table(to_frame(with_speeds(80.0, 100.0, 50.0)))
    assert row_of(table, "reactive")["speed-up\nx"] == "1.25\n1.000-2.00"
    assert row_of(table, "reactive")["latency\nmedian ms"] == "80.0\n50.0-100.0"
    assert "Of 3 pairs the interval is their range, which holds the truth in 75 of 100 cases." in table.caption


@pytest.mark.parametrize(
    ("make_table", "name"), [(strategy_table, "reactive"), (context_table, "reactive at 500")], ids=["all", "context"]
)
def test_a_speed_up_whose_interval_holds_1_shows_no_difference_and_one_pair_has_no_interval(make_table, name):
    even = make_table(to_frame(with_speeds(80.0, 100.0, 120.0)))
    assert f"No difference shown (1 lies within the interval): {name}." in even.caption
    faster = make_table(to_frame(with_speeds(80.0, 90.0, 70.0)))
    assert "o difference shown" not in faster.caption
    single = make_table(to_frame(with_speeds(80.0)))
    assert f"Fewer than 2 pairs, so no interval: {name}." in single.caption
    assert row_of(single, "reactive")["speed-up\nx"] == "1.25"


def test_over_contexts_a_speed_up_is_the_geometric_mean():
    # 4 times faster at 500, as fast at 1000: sqrt(4 x 1) = 2.
    frame = to_frame(with_speeds(25.0, 25.0) + with_speeds(100.0, 100.0, context=1000))
    assert row_of(strategy_table(frame), "reactive")["speed-up\nx"] == "2.00\n2.00-2.00"


@pytest.mark.parametrize("make_table", [strategy_table, context_table])
def test_runs_that_differ_by_more_than_a_tenth_are_warned_of(make_table):
    # (90 - 80) / 85 = 11.8 %; (88 - 80) / 84 = 9.5 %
    caption = make_table(to_frame(with_speeds(80.0, 90.0) + with_speeds(80.0, 88.0, context=1000))).caption
    assert (
        "WARNING: runs differ by more than 10 % ((largest - smallest) / median latency): reactive at 500 (11.8 %)."
        in (caption)
    )
    assert "WARNING" not in make_table(to_frame(with_speeds(80.0, 88.0))).caption


@pytest.mark.parametrize("make_table", [strategy_table, context_table])
def test_a_single_run_is_warned_of_whose_mean_a_few_slow_tokens_have_raised(make_table):
    result = make_result()
    result["timing"]["itl_ms"][0], result["timing"]["tpot_ms"] = 500.0, 140.0  # of ten, the others 100
    assert "more than 25 % above its median, as when something else runs beside it: baseline at 500 (40.0 %)." in (
        make_table(to_frame([result])).caption
    )


@pytest.mark.parametrize("make_table", [strategy_table, context_table])
def test_without_a_baseline_predictive_runs_are_compared_with_reactive_ones_by_name(make_table):
    pairs = [
        make_result(m, repetition=r, tpot_ms=t) for r in (0, 1) for m, t in (("reactive", 90.0), ("predictive", 60.0))
    ]
    table = make_table(to_frame(pairs))
    assert row_of(table, "predictive")["speed-up\nx"] == "1.50\n1.50-1.50"
    assert row_of(table, "reactive")["speed-up\nx"] == "ref."
    assert "latency of reactive / latency" in table.caption


def test_the_table_of_token_times_has_the_percentiles_of_each_runs_own_times():
    result = make_result(n_tokens=12)
    result["timing"]["itl_ms"] = [10.0 * k for k in range(1, 12)]  # 10 to 110: every 10th percentile is one of them
    table = token_time_table(to_frame([result]))
    assert table.rows == [("500", "baseline", "1", "60.0", "100.0", "109.0")]
    result["timing"]["itl_ms"] = None
    assert token_time_table(to_frame([result])).rows == []


def test_single_runs_have_no_spread_to_tell_of():
    frame = to_frame([make_result(), make_result("reactive"), make_result("predictive")])
    assert not any("at most" in table.caption for table in tables(frame))


@pytest.mark.parametrize("make_table", [strategy_table, context_table, prediction_table])
def test_every_table_of_a_simulated_link_says_so_and_whose_figures_it_made(make_table):
    bus = make_result("predictive", name="on a bus")
    bus["cache"]["link"] = {"kind": "bus", "name": "pcie", "bandwidth_gb_s": None}
    simulated = make_table(to_frame([make_result(), make_result("predictive"), bus])).caption
    assert "Figures of predictive are under a simulated link (pcie3-x16, 15.75 GB/s)." in simulated
    assert "simulated" not in make_table(to_frame([make_result(), bus])).caption


def plan_text(*runs):
    pipe = io.StringIO()
    print_plan(runs, Console(width=80, file=pipe))
    assert max(map(len, pipe.getvalue().splitlines())) <= 80
    return " ".join(pipe.getvalue().split())


def planned_run(floor_ms, mode="reactive", link="pcie4-x16"):
    paging = None if mode == "baseline" else SimpleNamespace(link=link)
    names = {"run_id": "0123456789ab", "label": mode, "model_name": "tiny"}
    sizes = {"context_length": 500, "max_new_tokens": 11, "repetition": 0}
    return PlannedRun(SimpleNamespace(**names, **sizes, paging=paging), transfer_floor_ms=floor_ms)


def test_a_plan_names_the_simulated_link_of_its_floors_and_leaves_computing_out():
    slow = {"bandwidth_gb_s": 1.0, "latency_us": 0.0}
    text = plan_text(planned_run(17.69), planned_run(64.88, link=slow))
    assert "2 runs" in text
    assert "over the simulated link (pcie4-x16, 31.51 GB/s; custom, 1 GB/s); computing is not in it." in text
    assert "0.00:" not in text


def test_a_plan_of_one_baseline_has_one_run_and_says_why_its_floor_is_0():
    text = plan_text(planned_run(0.0, "baseline"))
    assert "1 run " in text
    assert "1 runs" not in text
    assert "0.00: what a step reads fits on the device." in text
    assert "simulated" not in text


def test_a_plan_says_what_a_dash_stands_for():
    assert "—: not known before the run." in plan_text(planned_run(None))


def test_a_clamped_context_is_said_under_the_table():
    result = make_result(context=974)
    result["context"].update(requested_tokens=1000, clamped=True, reason="the model has 1024 positions")
    caption = context_table(to_frame([result])).caption
    assert "Asked for 1000 tokens, ran with 974: the model has 1024 positions." in caption


def test_random_weights_are_said_wherever_the_model_is_named():
    result = make_result()
    result["model"]["random_weights"] = True
    assert "tiny (random weights)" in describe_setting(to_frame([result]))


def test_strategies_that_finished_different_contexts_carry_a_warning():
    results = [*make_sweep(), make_failure(make_result("reactive", 4000)), make_result(context=4000)]
    assert "compare them by context" in strategy_table(to_frame(results)).caption
    assert "compare them by context" not in strategy_table(to_frame(make_sweep())).caption


@pytest.mark.parametrize("width", [80, 100, 120])
def test_a_pipe_of_80_to_120_columns_cuts_no_number(width):
    long_name = "reactive-with-a-remarkably-long-name"
    results = [
        *make_sweep((1000, 128_000)),
        *(make_result("reactive", 128_000, r, tpot_ms=12_345.6 + 2 * r, name=long_name) for r in range(2)),
    ]
    results += [make_failure(make_result("predictive", repetition=7), error="[/red] out of memory, see [bold]docs")]
    text = printed(results, width)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    for number in ("12347 ± 1", "128000", "1.96-2.00", "51.0 ± 1.0", "128 x 4", "[/red]"):
        assert number in text, number


@pytest.mark.parametrize("width", [80, 100, 120])
def test_neither_headings_nor_mode_names_are_broken_inside_a_word(width):
    slow_ms = {"baseline": 1560.9, "reactive": 2113.3, "predictive": 1943.4}
    results = [make_result(mode, 32_000, r, (1 + r) * tpot_ms) for mode, tpot_ms in slow_ms.items() for r in range(2)]
    results.append(make_failure(make_result("predictive", 32_000, repetition=7)))
    for table in tables(to_frame(results)):
        words = printed_table(table, width).split()
        expected = {*" ".join(table.headings).split(), *(row[table.headings.index("strategy")] for row in table.rows)}
        assert expected <= set(words)


def test_a_number_just_below_zero_is_not_minus_zero():
    text = printed([make_result(tpot_ms=100.0), make_result("reactive", tpot_ms=100.001)])
    assert "-0.0" not in text


def test_markdown_holds_the_same_rows_and_survives_pipes_and_line_breaks():
    results = [*make_sweep((500,)), make_failure(make_result("reactive", repetition=5), error="a | b\nc")]
    markdown = markdown_tables(to_frame(results))
    assert "| predictive | 3 | 51.0 ± 1.0 | 1.98 [1.96-2.00] |" in markdown
    assert "| reactive | 500 | out_of_memory | a \\| b c |" in markdown
    assert "speed-up x" in markdown


def test_no_results_give_no_tables():
    assert tables(to_frame([])) == []
