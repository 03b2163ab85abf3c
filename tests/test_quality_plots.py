"""Quality drawn: the Pareto front against brute force, heat maps against means by hand, and of nothing no frame."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from result_fixtures import MIB, approximately, make_failure, make_result, make_task, with_fidelity, with_tasks

import plot_list
from plots import strategy_styles, to_png
from quality_frame import task_items, task_scores
from quality_plots import (
    LEAST_NATS,
    heat_maps,
    pareto_figure,
    pareto_front,
    placed_items,
    quality_points,
    task_figure,
)
from result_frame import to_frame

coordinate = st.one_of(st.integers(0, 4).map(float), st.floats(0.0, 1e6))


@given(st.lists(st.tuples(coordinate, coordinate), max_size=12))
def test_the_front_is_what_no_other_point_dominates(points):
    def dominates(one, other):
        return one[0] <= other[0] and one[1] <= other[1] and one != other

    undominated = {i for i, point in enumerate(points) if not any(dominates(other, point) for other in points)}
    front = pareto_front(points)
    assert len(front) == len(set(front))
    assert set(front) == undominated
    assert [points[index][0] for index in front] == sorted(points[index][0] for index in front)


def measured(name, tpot_ms, device_mib, kl_nats, context=500, mode="reactive"):
    result = make_result(mode, context, tpot_ms=tpot_ms, name=name)
    result["memory"]["device_kv_bytes"] = device_mib * MIB
    return with_fidelity(result if kl_nats == 0.0 else approximately(result), kl_mean=kl_nats)


SWEEP = [
    measured("baseline", 100.0, 80, 0.0, mode="baseline"),
    measured("exact", 140.0, 40, 0.0),
    measured("quest", 60.0, 40, 0.125),
    measured("window", 50.0, 30, 1.0),
    measured("worse", 70.0, 45, 0.5),  # than quest in everything
]


def lines_of(axis, gid):
    return [[tuple(map(float, place)) for place in line.get_xydata()] for line in axis.lines if line.get_gid() == gid]


def test_a_point_is_a_strategy_in_a_cell_with_its_mean_costs():
    again = make_result("reactive", repetition=1, tpot_ms=64.0, name="quest")  # its fidelity is not measured again
    (point,) = (
        point for point in quality_points(to_frame([*SWEEP, approximately(again)])) if point.strategy == "quest"
    )
    assert (point.context_tokens, point.kl_nats) == (500, 0.125)
    assert point.costs == {"tpot_ms": 62.0, "device_kv_mb": 40.0}


def test_the_figure_has_a_marker_for_each_point_and_a_line_through_the_front():
    latency, memory = pareto_figure(to_frame(SWEEP)).axes
    assert sorted(place for (place,) in lines_of(latency, "point")) == [
        (50.0, 1.0),
        (60.0, 0.125),
        (70.0, 0.5),
        (100.0, 0.0),
        (140.0, 0.0),
    ]
    assert lines_of(latency, "front") == [[(50.0, 1.0), (60.0, 0.125), (100.0, 0.0)]]
    assert lines_of(memory, "front") == [[(30.0, 1.0), (40.0, 0.0)]]


def test_contexts_have_fronts_and_markers_of_their_own_and_strategies_keep_their_colours():
    frame = to_frame([*SWEEP, measured("quest", 90.0, 80, 0.25, context=1000)])
    latency = pareto_figure(frame).axes[0]
    assert lines_of(latency, "front")[1] == [(90.0, 0.25)]
    points = {tuple(line.get_xydata()[0]): line for line in latency.lines if line.get_gid() == "point"}
    short, long = points[60.0, 0.125], points[90.0, 0.25]
    assert short.get_color() == long.get_color() == strategy_styles(list(frame["strategy"].unique()))["quest"]["color"]
    assert short.get_marker() != long.get_marker()


def sizes_of(*points):
    """The sizes of markers by milliseconds, of points (ms, nats) beside a baseline of 100 ms."""
    results = [measured(f"at {ms}", ms, 40, nats) for ms, nats in points]
    axis = pareto_figure(to_frame([SWEEP[0], *results])).axes[0]
    return {line.get_xydata()[0][0]: line.get_markersize() for line in axis.lines if line.get_gid() == "point"}


def test_points_in_one_place_lie_in_one_another_as_rings():
    sizes = sizes_of((60.0, 0.5), (61.0, 0.505), (62.0, 0.9), (60.5, 0.05))
    assert sizes[60.0] > sizes[61.0] == sizes[62.0] == sizes[60.5]


def test_points_that_decades_set_apart_are_no_rings():
    sizes = sizes_of((2.0, 0.5), (4.0, 0.5), (305.0, 0.1))  # 1 % of the largest cost apart, and a tenth of the panel
    assert len(set(sizes.values())) == 1


@pytest.mark.parametrize("kl_nats", [0.0, 1e-12, 0.004, 0.9, 30.0])
def test_zero_and_every_divergence_lie_inside_the_panel_and_apart_if_rounding_does_not_explain_them(kl_nats):
    figure = pareto_figure(to_frame([SWEEP[0], measured("quest", 60.0, 40, kl_nats)]))
    to_png(figure)
    axis = figure.axes[0]
    low, high = axis.get_ylim()
    assert low < 0.0 <= kl_nats < high
    zero_px, point_px = (axis.transData.transform((60.0, value))[1] for value in (0.0, kl_nats))
    assert zero_px > axis.bbox.y0
    if kl_nats >= LEAST_NATS:
        assert point_px - zero_px > 20


def test_what_rounding_can_make_is_no_loss_against_zero():
    noisy = measured("noisy", 90.0, 40, 1e-9)
    (front,) = lines_of(pareto_figure(to_frame([SWEEP[0], noisy])).axes[0], "front")
    assert front == [(90.0, 1e-9)]


def test_costs_far_apart_are_drawn_in_decades_and_others_from_zero():
    near, far = pareto_figure(to_frame([*SWEEP, measured("baseline", 200.0, 8000, 0.0, 1000, "baseline")])).axes
    assert (near.get_xscale(), near.get_xlim()[0]) == ("linear", 0.0)
    assert far.get_xscale() == "log"


def test_an_approximation_that_was_not_measured_is_named_above_the_figure():
    unmeasured = approximately(make_result("reactive", name="nobody knows"))
    words = pareto_figure(to_frame([*SWEEP, unmeasured])).texts[1].get_text().replace("\n", " ")
    assert "quality not measured, and so not here: nobody knows." in words
    assert "not measured" not in pareto_figure(to_frame(SWEEP)).texts[1].get_text()


def scored(result, scores, baseline=(1.0, 1.0), **task):
    return with_tasks(result, make_task(list(scores), list(baseline), **task))


def test_lost_answers_have_panels_of_their_own_and_count_only_tasks_that_tell_something():
    quest = scored(SWEEP[2], (1.0, 0.5))
    quest["quality"]["tasks"].append(make_task([0.0, 0.0], [0.0, 1.0 / 3], task="too hard"))
    quest["quality"]["tasks"].append({**make_task([9.0, 9.0], [8.0, 8.0], task="prose"), "unit": "perplexity"})
    results = [scored(SWEEP[0], (1.0, 1.0)), quest, scored(SWEEP[4], (1.0, 0.5))]
    points = quality_points(to_frame(results), task_scores(results))
    assert {point.strategy: point.lost_share for point in points} == {"baseline": 0.0, "quest": 0.25, "worse": 0.25}
    axes = pareto_figure(to_frame(results), task_scores(results)).axes
    assert len(axes) == 4
    assert lines_of(axes[2], "front") == [[(60.0, 0.25), (100.0, 0.0)]]
    assert "score below" in axes[2].get_ylabel() and "KL" in axes[0].get_ylabel()


def test_a_baseline_that_was_not_asked_itself_has_lost_nothing():
    results = [SWEEP[0], scored(SWEEP[2], (1.0, 0.5))]
    lost = {point.strategy: point.lost_share for point in quality_points(to_frame(results), task_scores(results))}
    assert lost == {"baseline": 0.0, "quest": 0.25}


def test_strategies_are_compared_over_tasks_that_all_of_them_were_asked():
    results = [scored(SWEEP[0], (1.0, 1.0)), scored(SWEEP[2], (1.0, 0.5))]
    results[1]["quality"]["tasks"].append(make_task([0.0, 0.0], [1.0, 1.0], tokens=2000))
    lost = {point.strategy: point.lost_share for point in quality_points(to_frame(results), task_scores(results))}
    assert lost == {"baseline": 0.0, "quest": 0.25}


def test_a_cost_that_nobody_measured_has_no_panel():
    result = with_fidelity(make_result())
    result["memory"]["device_kv_bytes"] = None
    assert len(pareto_figure(to_frame([result])).axes) == 1
    result["timing"]["tpot_ms"] = None
    with pytest.raises(ValueError, match="no run whose quality was measured"):
        pareto_figure(to_frame([result]))


# --- tasks --------------------------------------------------------------------------------------------------------

DEPTHS = [0.0, 0.5, 0.5, 1.0]


def asked(result, scores, baseline_scores=(1.0, 1.0, 0.5, 1.0), tokens=1000, task="passkey"):
    return make_task(list(scores), list(baseline_scores), task, tokens, DEPTHS), result


def run_with(*tasks):
    return with_tasks(tasks[0][1], *(task for task, _ in tasks))


def maps_of(results, task="passkey"):
    return heat_maps(to_frame(results), placed_items(task_items(results)), task)


def cells(heat_map):
    numbers = heat_map.cells.to_numpy(dtype=float, na_value=math.nan)
    return [[None if math.isnan(value) else value for value in row] for row in numbers]


def test_cells_are_means_over_items_of_one_depth_and_length():
    quest = approximately(make_result("reactive", name="quest"))
    results = [
        run_with(asked(make_result(), (1.0, 1.0, 0.5, 1.0))),
        run_with(asked(quest, (1.0, 0.0, 0.5, 0.0)), asked(quest, (0.0, 1.0, 1.0, 0.0), tokens=4000)),
    ]
    baseline, panel = maps_of(results)
    assert list(panel.cells.index) == [0.0, 0.5, 1.0]
    assert list(panel.cells.columns) == [1000, 4000]
    assert cells(panel) == [[1.0, 0.0], [0.25, 1.0], [0.0, 0.0]]
    assert panel.title == "quest, n = 8"
    assert cells(baseline) == [[1.0, 1.0], [0.75, 0.75], [1.0, 1.0]]
    assert baseline.title == "baseline, n = 8"  # four items at each length, however many strategies were asked them


def test_a_length_that_a_strategy_was_not_asked_is_empty_and_not_zero():
    short, long = (make_result("reactive", name=name) for name in ("short", "long"))
    results = [run_with(asked(short, (1.0,) * 4)), run_with(asked(long, (0.0,) * 4, tokens=4000))]
    _, of_short, of_long = maps_of(results)
    assert cells(of_short) == [[1.0, None]] * 3
    assert cells(of_long) == [[None, 0.0]] * 3


def test_items_asked_again_at_another_context_count_once():
    results = [run_with(asked(make_result("reactive", context), (1.0, 0.0, 1.0, 1.0))) for context in (500, 1000)]
    assert [panel.n for panel in maps_of(results)] == [4, 4]


def test_a_panel_says_where_the_baseline_fails_too():
    quest = make_result("reactive", name="quest")
    fails = asked(quest, (0.0,) * 4, (0.0, 0.0, 0.0, 1.0), tokens=4000)
    everywhere = maps_of([run_with(fails)])
    assert [panel.title for panel in everywhere] == [
        "baseline, n = 4\nbaseline: does not discriminate",
        "quest, n = 4\nbaseline: does not discriminate",
    ]
    at_one = maps_of([run_with(asked(quest, (1.0,) * 4), fails)])
    assert all(panel.title.endswith("\nbaseline: does not discriminate at 4,000 tokens") for panel in at_one)


def test_two_models_have_a_baseline_panel_each():
    results = [run_with(asked(make_result("reactive", model_name=name), (1.0,) * 4)) for name in ("tiny", "small")]
    assert [panel.title for panel in maps_of(results)] == [
        "baseline, tiny, n = 4",
        "reactive (model_name=tiny), n = 4",
        "baseline, small, n = 4",
        "reactive (model_name=small), n = 4",
    ]


def test_titles_of_long_names_do_not_run_into_the_next_panel():
    names = ("quest that keeps a rather long name (max_gpu_pages=4)", "another that is just as long as the first one")
    results = [run_with(asked(make_result("reactive", name=name), (1.0,) * 4, (0.0,) * 4)) for name in names]
    figure = task_figure(to_frame(results), placed_items(task_items(results)), "passkey")
    to_png(figure)
    titles = [axis._left_title.get_window_extent() for axis in figure.axes[:3]]
    assert all(left.x1 < right.x0 for left, right in pairwise(titles))
    assert titles[-1].x1 <= figure.bbox.x1


def test_all_panels_have_one_scale_of_colours_from_0_to_1():
    results = [run_with(asked(make_result("reactive", name=name), (0.25,) * 4)) for name in "abcde"]
    figure = task_figure(to_frame(results), placed_items(task_items(results)), "passkey")
    images = [axis.images[0] for axis in figure.axes if axis.images]
    assert len(images) == 6
    assert {image.get_clim() for image in images} == {(0.0, 1.0)}


# --- files --------------------------------------------------------------------------------------------------------


def drawn(results):
    """The names of the plots of quality that there is something for."""
    names = [plot.name for plot, _ in plot_list.drawn(results)]
    return [name for name in names if name == "quality_pareto" or name.startswith("task_")]


def test_what_there_is_is_drawn_under_names_that_files_can_have():
    results = [*SWEEP, run_with(asked(make_result("reactive"), (1.0,) * 4), asked(None, (1.0,) * 4, task="my:Task"))]
    assert drawn(results) == ["quality_pareto", "task_passkey", "task_my_Task"]
    assert drawn(results[:1]) == ["quality_pareto"]


@pytest.mark.parametrize(
    "results",
    [
        [],
        [make_result(), approximately(make_result("reactive"))],
        [make_failure(SWEEP[2])],
        [with_tasks(make_result(), make_task([0.0, 0.0], [0.0, 0.0], depths=[None, None]))],
        [with_tasks(make_result(), {"task": "passkey", "tokens": 1000, "items": "torn"})],
    ],
)
def test_of_nothing_there_is_no_frame(results):
    assert drawn(results) == []
