"""Plots for a paper: what they draw is worked out by hand here, nothing is drawn that was not measured, and files are
the same each time."""

from __future__ import annotations

import dataclasses
import logging
import statistics

import numpy as np
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

import paper_plots
import plot_list
import plots
import quality_budget
import run_statistics
from intervals import bootstrap
from result_frame import to_frame

STAGE_MS = {"select_ms": 100.0, "predict_ms": 50.0, "copy_ms": 30.0, "attend_ms": 200.0}


def with_stages(result, link_kind="simulated", **stages):
    """The same run of 10 steps with its stages measured; its stall is 50 ms."""
    cache = {
        **result["cache"],
        "stages": {**STAGE_MS, **stages},
        "link": {**result["cache"]["link"], "kind": link_kind},
    }
    return {**result, "cache": cache}


def lines(figure, gid):
    return [line for axis in figure.axes for line in axis.get_lines() if line.get_gid() == gid]


def header(figure):
    return " ".join(" ".join(text.get_text().split()) for text in figure.texts)


# --- one look for a strategy ------------------------------------------------------------------------------------


def test_every_line_differs_from_every_other_without_its_colour():
    styles = plots.line_styles([f"strategy {n}" for n in range(32)])
    marks = [(style["marker"], str(style["linestyle"]), style["fillstyle"]) for style in styles.values()]
    assert len(set(marks)) == 32
    assert len({(style["marker"], str(style["linestyle"])) for style in list(styles.values())[:8]}) == 8


def test_lines_have_the_colours_of_bars():
    names = ["baseline", "reactive", "predictive"]
    bars = plots.strategy_styles(names)
    assert all(style["color"] == bars[name]["color"] for name, style in plots.line_styles(names).items())


def test_a_strategy_looks_the_same_in_every_plot():
    results = make_sweep()
    frame = to_frame(results)
    wanted = plots.line_styles(["baseline", "reactive", "predictive"])["predictive"]
    for figure in (paper_plots.latency_figure(frame, results), paper_plots.speedup_figure(frame, results)):
        line = lines(figure, "medians")[-1]
        assert (line.get_color(), line.get_marker()) == (wanted["color"], wanted["marker"])


# --- by context -------------------------------------------------------------------------------------------------


def test_latency_is_the_median_with_its_bootstrap_interval():
    times_ms = [80.0, 81.0, 90.0, 83.0, 84.0]
    frame = to_frame([make_result("reactive", repetition=n, tpot_ms=time_ms) for n, time_ms in enumerate(times_ms)])
    (point,) = paper_plots.measured_by_cell(frame, "tpot_ms").values()
    assert (point.median, point.n) == (83.0, 5)
    assert (point.low, point.high) == bootstrap(times_ms, np.median)
    assert dataclasses.asdict(point) == run_statistics.median_with_interval(times_ms)


def test_a_speed_up_is_taken_pair_by_pair_of_the_same_repetition():
    baseline = [make_result(repetition=n, tpot_ms=100.0 * (n + 1)) for n in range(3)]
    reactive = [make_result("reactive", repetition=n, tpot_ms=50.0 * (n + 1)) for n in range(2)]
    alone = make_result("reactive", repetition=7, tpot_ms=1.0)  # no baseline of this repetition
    results = [*baseline, *reactive, alone]
    figure = paper_plots.speedup_figure(to_frame(results), results)
    (line,) = lines(figure, "medians")
    assert list(line.get_ydata()) == pytest.approx([2.0])
    assert "Median of n = 2 pairs" in header(figure)


def test_lines_go_through_the_medians_at_their_contexts():
    results = make_sweep(contexts=(500, 1000, 8000))
    figure = paper_plots.latency_figure(to_frame(results), results)
    assert len(lines(figure, "medians")) == 3
    line = lines(figure, "medians")[1]
    assert list(line.get_xdata()) == [500, 1000, 8000]
    assert list(line.get_ydata()) == [81.0, 81.0, 81.0]
    assert figure.axes[0].get_xscale() == "log"
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == ["500", "1,000", "8,000"]
    assert "Median of n = 3 runs; bars: its 95 % bootstrap interval." in header(figure)


def test_the_baseline_and_the_floor_are_lines_at_1_within_the_axis():
    results = make_sweep()
    frame = to_frame(results)
    for make in (paper_plots.speedup_figure, paper_plots.floor_figure):
        figure = make(frame, results)
        (reference,) = lines(figure, "reference")
        assert set(reference.get_ydata()) == {1.0}
        low, high = figure.axes[0].get_ylim()
        assert low < 1.0 < high


def test_a_single_run_has_no_interval_and_says_so():
    results = [make_result(), make_result("reactive")]
    figure = paper_plots.latency_figure(to_frame(results), results)
    assert not figure.axes[0].collections  # what error bars are made of
    assert "n = 1 of runs, so there is no interval to show" in header(figure)


def test_a_simulated_link_and_an_approximation_are_said_above():
    results = [make_result(), with_fidelity(approximately(make_result("reactive")), kl_mean=0.25)]
    frame = to_frame(results)
    for make in (paper_plots.latency_figure, paper_plots.speedup_figure, paper_plots.layer_rate_figure):
        assert "link: simulated pcie3-x16, 15.75 GB/s" in header(make(frame, results))
        assert "Approximate: reactive (KL 0.25 nats)." in header(make(frame, results))


# --- where the time goes ----------------------------------------------------------------------------------------


def test_stages_add_up_to_the_time_per_token_and_the_rest_is_what_is_left():
    results = [make_result(), with_stages(make_result("reactive"))]  # 100 ms a token, 10 steps
    cells = paper_plots.step_stages(to_frame(results))
    assert cells["baseline", 500] == {"rest": 100.0}
    assert cells["reactive", 500] == pytest.approx(
        {"rest": 57.0, "attend_ms": 20.0, "select_ms": 10.0, "predict_ms": 5.0, "copy_ms": 3.0, "stall_ms": 5.0}
    )
    assert sum(cells["reactive", 500].values()) == pytest.approx(100.0)


def test_on_a_real_bus_the_work_of_the_host_is_no_part_of_the_step():
    cells = paper_plots.step_stages(to_frame([with_stages(make_result("reactive"), link_kind="bus")]))
    assert cells["reactive", 500] == pytest.approx({"rest": 85.0, "select_ms": 10.0, "stall_ms": 5.0})


def test_the_bars_of_stages_end_at_the_time_per_token():
    results = [make_result(), with_stages(make_result("reactive")), with_stages(make_result("reactive", repetition=1))]
    figure = paper_plots.stage_figure(to_frame(results), results)
    (axis,) = figure.axes
    ends = {}
    for bar in axis.patches:
        row = round(bar.get_y() + bar.get_height() / 2)
        ends[row] = max(ends.get(row, 0.0), bar.get_x() + bar.get_width())
    assert ends == {0: pytest.approx(100.0), 1: pytest.approx(100.0)}
    assert {bar.get_gid() for bar in axis.patches} == set(paper_plots.STAGES)


def test_panels_share_a_scale_unless_one_would_vanish_in_it():
    def limits(long_ms):
        results = [
            with_stages(make_result("reactive", 500)),
            with_stages(make_result("reactive", 9000, tpot_ms=long_ms)),
        ]
        figure = paper_plots.stage_figure(to_frame(results), results)
        return {axis.get_xlim()[1] for axis in figure.axes}, "a scale of its own" in header(figure)

    assert (len(limits(150.0)[0]), limits(150.0)[1]) == (1, False)
    assert (len(limits(900.0)[0]), limits(900.0)[1]) == (2, True)


# --- by layer ---------------------------------------------------------------------------------------------------


def test_the_rate_of_a_layer_is_its_own_hits_of_its_own_accesses():
    one, other = make_result("reactive"), make_result("reactive", repetition=1)
    one["cache"]["by_layer"] = [{"layer": 0, "hits": 1, "accesses": 4}, {"layer": 1, "hits": 0, "accesses": 0}]
    other["cache"]["by_layer"] = [{"layer": 0, "hits": 3, "accesses": 4}, {"layer": 1, "hits": 2, "accesses": 2}]
    assert paper_plots.layer_rates([make_result(), one, other]) == {("reactive", 500): {0: [25.0, 75.0], 1: [100.0]}}
    figure = paper_plots.layer_rate_figure(to_frame([one, other]), [one, other])
    (line,) = figure.axes[0].get_lines()
    assert list(line.get_ydata()) == [statistics.fmean([25.0, 75.0]), 100.0]


# --- quality against the budget ---------------------------------------------------------------------------------


def reading(share_of_pages, name, **figures):
    """A run that attends to so many of 100 pages, with its fidelity measured."""
    result = with_fidelity(make_result("reactive", name=name), **figures)
    result["cache"] |= {"n_pages": 100, "attended_pages": share_of_pages}
    result["spec"]["paging"] |= {"attention_fraction": share_of_pages / 100}
    return result


def test_quality_is_set_against_the_share_of_pages_read_and_like_settings_are_joined():
    results = [reading(10, "a", kl_mean=0.5, top1_agreement=0.5), reading(50, "b", kl_mean=0.1, top1_agreement=0.75)]
    results.append(reading(100, "c", kl_mean=1e-9))
    results[2]["spec"]["paging"]["policy"] = "mru"  # another family
    figure = quality_budget.attended_figure(to_frame(results), results)
    divergence, agreement = figure.axes
    points = [
        (line.get_xdata()[0], line.get_ydata()[0]) for line in divergence.get_lines() if line.get_gid() == "answer"
    ]
    assert points == [(10.0, 0.5), (50.0, 0.1), (100.0, 0.0)]
    assert [line.get_ydata()[0] for line in agreement.get_lines() if line.get_gid() == "answer"] == [50.0, 75.0, 100.0]
    (family,) = [line for line in divergence.get_lines() if line.get_gid() == "family"]
    assert list(family.get_xdata()) == [10.0, 50.0]


def test_a_score_has_its_interval_and_the_baselines_on_the_same_items():
    task = make_task([1, 0, 1, 1], [1, 1, 1, 1], tokens=500)
    results = [with_tasks(reading(10, "a"), task), with_tasks(reading(50, "b"), {**task, "tokens": 2000})]
    figure = quality_budget.attended_figure(to_frame(results), results)
    labels = [axis.get_ylabel() for axis in figure.axes]
    assert labels[2:] == ["passkey,\n% right", "passkey at 2,000 tokens,\n% right"]
    score = figure.axes[2]
    assert [line.get_ydata()[0] for line in score.get_lines() if line.get_gid() == "baseline"] == [100.0]
    (bar,) = [bars for bars in score.collections]
    assert sorted(bar.get_segments()[0][:, 1]) == [50.0, 100.0]
    assert "mean score of n = 4 items" in header(figure)


def test_the_budget_decides_about_answers_only_where_missing_pages_are_skipped():
    def budget(pages, **paging):
        result = reading(100, f"{pages} pages", kl_mean=1.0 / pages)
        result["spec"]["paging"] |= {"max_gpu_pages": pages, **paging}
        return result

    waiting = [budget(10), budget(20)]
    assert quality_budget.resident_figure(to_frame(waiting), waiting) is None
    skipping = [budget(10, on_miss="skip"), budget(200, on_miss="skip")]
    found = quality_budget.answers(skipping, quality_budget.resident_share, ("max_gpu_pages",))
    assert {answer.share for answer in found} == {10.0, 100.0}
    assert quality_budget.resident_figure(to_frame(skipping), skipping) is not None
    assert quality_budget.attended_share(waiting[0]) == 100.0
    assert quality_budget.attended_share(skipping[0]) is None  # it leaves out some of those that it chose


# --- the list ---------------------------------------------------------------------------------------------------


def everything():
    """A sweep that has something for every plot but that of skipped pages."""
    sweep = make_sweep(contexts=(500,), repetitions=2)
    results = [result if result["cache"] is None else with_stages(result) for result in sweep]
    task = make_task([1, 0], [1, 1], tokens=500)
    return [*results, with_tasks(reading(10, "a"), task), reading(50, "b")]


def test_every_plot_of_the_list_has_a_file_name_of_its_own_and_says_what_it_shows():
    names = [plot.name for plot in plot_list.PLOTS]
    assert len(set(names)) == len(names)
    assert all(plot.title and plot.caption.endswith(".") for plot in plot_list.PLOTS)


def test_all_plots_that_there_is_something_for_are_written(tmp_path):
    paths = plot_list.save_all_plots(everything(), tmp_path)
    assert sorted(paths) == sorted((tmp_path / "plots").iterdir())
    wanted = {plot.name for plot in plot_list.PLOTS} - {"quality_by_budget"} | {"task_passkey"}
    assert {path.stem for path in paths} == wanted
    assert {path.suffix for path in paths} == {".png"}


def test_where_nothing_was_measured_nothing_is_drawn_and_older_plots_go(tmp_path):
    folder = tmp_path / "plots"
    folder.mkdir()
    for name in ("latency_by_context.png", "latency_by_context.pdf", "task_old.svg", "mine.png"):
        (folder / name).write_text("old")
    assert plot_list.save_all_plots([make_failure(make_result())], tmp_path) == []
    assert [path.name for path in folder.iterdir()] == ["mine.png"]


def test_a_baseline_alone_has_a_latency_and_nothing_to_compare():
    results = [make_result()]
    assert [plot.name for plot, _ in plot_list.drawn(results)] == [
        "kv_cache_comparison",
        "latency_by_context",
        "token_times",
    ]


def test_plots_that_so_many_strategies_would_make_unreadable_are_left_out_with_a_word(caplog):
    results = [make_result(), *(make_result("reactive", name=f"budget {n}") for n in range(32))]
    with caplog.at_level(logging.WARNING):
        names = [plot.name for plot, _ in plot_list.drawn(results)]
    assert names == ["kv_cache_comparison"]
    assert "latency_by_context is not drawn: it has room for 32 strategies" in caplog.text


def test_every_legend_and_every_sentence_stays_inside_its_figure():
    sweep = [
        with_stages(make_result("reactive", context, n, 80.0 + n, name=f"reactive max_gpu_pages={n} policy=s3fifo"))
        for context in (500, 4000)
        for n in range(12)
    ]
    results = [make_result(), make_result(context=4000), *(approximately(result) for result in sweep)]
    for plot, figure in plot_list.drawn(results):
        plots.to_png(figure)
        width, height = figure.get_size_inches() * figure.dpi
        inside = [*figure.texts, *figure.legends, *(axis.yaxis.label for axis in figure.axes)]
        for artist in inside:
            box = artist.get_window_extent()
            assert box.x0 >= -1 and box.y0 >= -1, (plot.name, artist)
            assert box.x1 <= width + 1 and box.y1 <= height + 1, (plot.name, artist)
        panels = [axis.get_window_extent() for axis in figure.axes if axis.axison]
        assert min(panel.height for panel in panels) > 100, plot.name
        lowest_word = min((text.get_window_extent().y0 for text in figure.texts), default=height)
        assert max(panel.y1 for panel in panels) < lowest_word + 1, plot.name


def test_a_sentence_on_more_strategies_than_fit_ends_with_where_to_find_the_others():
    figure, _ = plots.titled_grid("Title", [", ".join(f"strategy {n} (KL 0.1 nats)" for n in range(200))], 1, 1)
    (_, words) = figure.texts
    assert len(words.get_text().split("\n")) == plots.MOST_LINES
    assert words.get_text().endswith("and more, see the tables")


# --- formats ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("file_format", "start"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_a_format_is_what_it_says_and_the_same_bytes_each_time(file_format, start):
    def content():
        results = make_sweep(repetitions=2)
        figure = paper_plots.latency_figure(to_frame(results), results)
        return plots.rendered(figure, file_format)

    first = content()
    assert first.startswith(start)
    assert b"dc:date" not in first and b"CreationDate" not in first
    assert content() == first


def test_every_format_that_is_asked_for_is_written(tmp_path):
    paths = plot_list.save_all_plots([make_result()], tmp_path, ["svg", "pdf"])
    assert {path.name for path in paths if path.stem == "token_times"} == {"token_times.svg", "token_times.pdf"}


def test_formats_are_read_with_commas_and_an_unknown_one_is_refused():
    assert plots.parse_formats("PNG, svg,png") == ["png", "svg"]
    with pytest.raises(ValueError, match="unknown plot format 'jpg'; write png, pdf, svg"):
        plots.parse_formats("png,jpg")
