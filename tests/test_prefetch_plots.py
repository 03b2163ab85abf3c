"""What the plots of prefetching draw is what hand-written results say; and what has no data is not drawn."""

from __future__ import annotations

import math

import pytest
from matplotlib.colors import to_hex
from result_fixtures import make_result

from plots import COLOURS, to_png
from prefetch_plots import (
    REST,
    SPAN_STYLES,
    access_shares,
    calibration,
    describe_run,
    draw_prefetch_plots,
    gaps,
    hit_rate_by_layer,
    prefetch_over_steps,
    timeline_figure,
    windowed_percent,
    within,
)

NAMES = ("hit_rate_by_layer", "over_steps", "calibration", "timeline")
LAYERS = [
    {"layer": 0, "hits": 6, "late": 1, "misses": 3, "accesses": 10, "shadow_hits": 5, "lru_hits": 4},
    {"layer": 2, "hits": 4, "late": 0, "misses": 12, "accesses": 16, "shadow_hits": 4, "lru_hits": 4},
    {"layer": 5, "hits": 0, "late": 0, "misses": 0, "accesses": 0, "shadow_hits": 0, "lru_hits": 0},
]
BINS = [
    {"low": 0.1, "high": 0.2, "n": 300, "confidence": 0.15, "used": 0.31},
    {"low": 0.8, "high": 0.9, "n": 100, "confidence": 0.84, "used": 0.8},
]
THRESHOLDS = [
    {"step": 1, "threshold": 0.10, "link_load": 0.5},
    {"step": 2, "threshold": 0.12, "link_load": 0.75},
    {"step": 3, "threshold": None, "link_load": 0.25},
]


def span(track, name, layer, step, start_ms, end_ms, **more):
    return {"track": track, "name": name, "layer": layer, "step": step, "start_ms": start_ms, "end_ms": end_ms, **more}


def spans_of_step(step, start_ms, n_layers=2):
    """Layers of 10 ms: 2 of attention, 3 of waiting, 2 of attention again, and 3 of the rest; a fetch of 5 ms under
    the first two, and a prefetch for the next layer that takes 4, so that one of them lies under its attention."""
    spans = []
    for layer in range(n_layers):
        start = start_ms + 10.0 * layer
        following = (layer + 1) % n_layers
        spans += [
            span("compute", "attention", layer, step, start, start + 2.0),
            span("to device", "fetch", layer, step, start, start + 5.0, pages=2),
            span("wait", "wait", layer, step, start + 2.0, start + 5.0),
            span("compute", "attention", layer, step, start + 5.0, start + 7.0),
            span("to device", "prefetch", following, step, start + 5.0, start + 9.0, pages=3),
        ]
    return spans


SPANS = [one for step in (1, 2, 3) for one in spans_of_step(step, 20.0 * (step - 1))]


def decode_step(step, hits, late, misses, on_time, late_ones, wasted, issued=4):
    return {
        **{"step": step, "phase": "decode", "hits": hits, "late": late, "misses": misses, "prefetch_issued": issued},
        **{"prefetch_on_time": on_time, "prefetch_late": late_ones, "prefetch_wasted": wasted},
    }


STEPS = [
    {"step": 0, "phase": "prefill", "hits": 900, "late": 0, "misses": 900, "prefetch_issued": 0},
    decode_step(1, hits=2, late=0, misses=8, on_time=0, late_ones=0, wasted=0),
    decode_step(2, hits=5, late=1, misses=4, on_time=2, late_ones=1, wasted=1),
    decode_step(3, hits=9, late=0, misses=1, on_time=3, late_ones=1, wasted=0),
]


def predictive(**blocks):
    """A result with hand-written data for every plot, of which some blocks may be replaced."""
    result = make_result("predictive", context=2000)
    result["cache"] |= {"by_layer": LAYERS, "timeline": SPANS}
    result["prefetch"] |= {"calibration": BINS, "thresholds": THRESHOLDS}
    result["steps"] = STEPS
    for path, value in blocks.items():
        block, _, key = path.partition("__")
        if key:
            result[block] = {**result[block], key: value}
        else:
            result[block] = value
    return result


def words_of(figure):
    return " ".join(text.get_text() for text in figure.texts).replace("\n", " ")


def lines_of(axis):
    """First words of the label -> the line's values."""
    lines = [line for line in axis.lines if not line.get_label().startswith("_")]
    return {line.get_label().split(":")[0]: [float(value) for value in line.get_ydata()] for line in lines}


# --- which are drawn ----------------------------------------------------------------------------------------------


def paths_in(folder, names):
    return [folder / f"prefetch_{name}.png" for name in names]


def test_all_four_are_written_where_there_is_data(tmp_path):
    folder = tmp_path / "new" / "plots"
    written = draw_prefetch_plots(predictive(), folder)
    assert written == paths_in(folder, NAMES)
    assert sorted(folder.iterdir()) == sorted(written)
    for path in written:
        header = path.read_bytes()[:24]  # https://www.w3.org/TR/png/#11IHDR
        assert header[:8] == b"\x89PNG\r\n\x1a\n"
        assert 700 <= int.from_bytes(header[16:20], "big") <= 2000
        assert 350 <= int.from_bytes(header[20:24], "big") <= 2000


NO_DATA = {
    "hit_rate_by_layer": [
        {"cache__by_layer": []},
        {"cache__by_layer": LAYERS[2:]},
        {"cache__by_layer": [{key: value for key, value in LAYERS[0].items() if key != "lru_hits"}]},
    ],
    "over_steps": [{"steps": None}, {"steps": STEPS[:1]}, {"steps": [STEPS[1] | {"prefetch_issued": 0}]}],
    "calibration": [{"prefetch__calibration": []}, {"prefetch__calibration": None}],
    "timeline": [{"cache__timeline": None}, {"cache__timeline": [SPANS[1]]}],
}


@pytest.mark.parametrize(("name", "blocks"), [(name, one) for name, several in NO_DATA.items() for one in several])
def test_what_has_no_data_is_left_out_and_no_older_plot_passes_for_it(name, blocks, tmp_path):
    draw_prefetch_plots(predictive(), tmp_path)
    others = paths_in(tmp_path, [other for other in NAMES if other != name])
    assert draw_prefetch_plots(predictive(**blocks), tmp_path) == others
    assert sorted(tmp_path.iterdir()) == sorted(others)


def test_without_prefetch_only_the_timeline_is_drawn(tmp_path):
    result = predictive() | {"prefetch": None}
    result["steps"] = [step | {"prefetch_issued": 0} for step in STEPS]
    assert draw_prefetch_plots(result, tmp_path) == paths_in(tmp_path, ["timeline"])


@pytest.mark.parametrize("result", [make_result("baseline") | {"cache": None}, {}], ids=["baseline", "nothing"])
def test_of_a_run_without_pages_nothing_is_drawn(result, tmp_path):
    assert draw_prefetch_plots(result, tmp_path / "plots") == []
    assert not (tmp_path / "plots").exists()


@pytest.mark.parametrize("figure_of", [hit_rate_by_layer, prefetch_over_steps, calibration, timeline_figure])
def test_every_title_says_what_the_run_was_and_that_its_link_is_simulated(figure_of):
    words = words_of(figure_of(predictive()))
    for part in (
        *("tiny", "2,000 tokens of context", "predictor: layer_ahead", "selector: all"),
        "link: simulated pcie3-x16, 15.75 GB/s",
    ):
        assert part in words


def test_a_predictor_with_parameters_is_described_with_them():
    result = predictive(spec__prefetch={"predictor": {"name": "ema", "decay": 0.5}, "prefetch_k": 2})
    assert "predictor: ema (decay=0.5) ·" in describe_run(result)
    assert describe_run({}) == ""


# --- hits by layer ------------------------------------------------------------------------------------------------


def test_shares_of_accesses_are_those_computed_by_hand():
    assert access_shares(LAYERS[0]) == {
        **{"lru_hits": 0.4, "hits_beyond_lru": 0.2, "late": 0.1, "misses": 0.3, "skipped": 0.0}
    }
    assert access_shares(LAYERS[0] | {"skipped": 4}) == {  # all that was late or missed
        **{"lru_hits": 0.4, "hits_beyond_lru": 0.2, "late": 0.0, "misses": 0.0, "skipped": 0.4}
    }


def drawn_bars(axis):
    """(layer, from, to) of every bar that has a height, in %."""
    return {
        (round(bar.get_x() + bar.get_width() / 2), round(bar.get_y(), 6), round(bar.get_y() + bar.get_height(), 6))
        for bar in axis.patches
        if bar.get_height()
    }


def test_the_bars_of_a_layer_are_its_shares_one_above_the_other():
    (axis,) = hit_rate_by_layer(predictive()).axes
    assert drawn_bars(axis) == {
        *((0, 0.0, 40.0), (0, 40.0, 60.0), (0, 60.0, 70.0), (0, 70.0, 100.0)),
        *((2, 0.0, 25.0), (2, 25.0, 100.0)),
    }
    by_height = {round(bar.get_y()): to_hex(bar.get_facecolor()) for bar in axis.patches if round(bar.get_x()) == 0}
    assert by_height[40] == COLOURS[3].lower()  # hits by prefetch


def test_skipped_accesses_are_drawn_only_where_there_are_some():
    labels = [text.get_text() for text in hit_rate_by_layer(predictive()).legends[0].texts]
    assert len(labels) == 4
    skipping = predictive(cache__by_layer=[LAYERS[0] | {"skipped": 4}])
    figure = hit_rate_by_layer(skipping)
    assert len(figure.legends[0].texts) == 5
    assert (0, 60.0, 100.0) in drawn_bars(figure.axes[0])


# --- over steps ---------------------------------------------------------------------------------------------------


def test_a_window_adds_up_parts_and_wholes_before_it_divides():
    assert windowed_percent([1, 0, 3], [2, 2, 4], window=2) == [50.0, 25.0, 50.0]
    assert windowed_percent([1, 0, 3], [2, 2, 4], window=9) == [50.0, 25.0, 50.0]
    first, *others = windowed_percent([0, 0, 3], [0, 2, 4], window=2)
    assert math.isnan(first)
    assert others == [0.0, 50.0]


def test_steps_are_drawn_from_decode_steps_alone():
    above, below = prefetch_over_steps(predictive()).axes
    lines = lines_of(above)
    assert lines["accuracy so far"] == pytest.approx([0.0, 100.0 * 3 / 8, 100.0 * 7 / 12])
    assert lines["hit rate"] == pytest.approx([20.0, 35.0, 100.0 * 16 / 30])
    of_each_step = [list(line.get_ydata()) for line in above.lines if line.get_label().startswith("_")]
    assert of_each_step == [[20.0, 50.0, 90.0]]
    lines = lines_of(below)
    assert lines["threshold"][:2] == pytest.approx([10.0, 12.0])
    assert math.isnan(lines["threshold"][2])
    assert lines["load of the link"] == [50.0, 75.0, 25.0]


def test_without_thresholds_there_is_one_panel():
    assert len(prefetch_over_steps(predictive(prefetch__thresholds=None)).axes) == 1


# --- calibration --------------------------------------------------------------------------------------------------


def test_a_bin_is_a_marker_at_its_confidence_and_use_with_an_area_by_its_size():
    above, below = calibration(predictive()).axes
    markers = above.collections[0]
    assert markers.get_offsets().tolist() == [[0.15, 0.31], [0.84, 0.8]]
    large, small = markers.get_sizes()
    assert large == pytest.approx(3 * small)
    assert lines_of(above) == {"as often as predicted": [0.0, 1.0]}
    bars = [(bar.get_x(), bar.get_x() + bar.get_width(), bar.get_height()) for bar in below.patches]
    assert bars == [pytest.approx((0.1, 0.2, 300)), pytest.approx((0.8, 0.9, 100))]


# --- timeline -----------------------------------------------------------------------------------------------------


def drawn_spans(axis, track, name):
    """(start, end) of the spans that a panel draws, in ms since the step began."""
    label = SPAN_STYLES[track, name][0]
    return stretches(next(one for one in axis.collections if one.get_label() == label))


def stretches(collection):
    boxes = [path.get_extents() for path in collection.get_paths()]
    return [(box.x0, box.x1) for box in boxes]


def test_one_step_is_drawn_from_its_own_start_with_what_reaches_into_it():
    (axis,) = timeline_figure(predictive()).axes  # step 2, in the middle, from 20 to 40 ms
    assert drawn_spans(axis, "compute", "attention") == [(0.0, 2.0), (5.0, 7.0), (10.0, 12.0), (15.0, 17.0)]
    assert drawn_spans(axis, "wait", "wait") == [(2.0, 5.0), (12.0, 15.0)]
    assert drawn_spans(axis, "to device", "fetch") == [(0.0, 5.0), (10.0, 15.0)]
    assert drawn_spans(axis, "to device", "prefetch") == [(5.0, 9.0), (15.0, 19.0)]
    assert axis.get_xlim() == (0.0, 20.0)
    assert [label.get_text() for label in axis.get_yticklabels()] == ["compute", "wait", "to device", "to host"]
    assert stretches(next(one for one in axis.collections if one.get_label() == "the rest of the step")) == [
        *((7.0, 10.0), (17.0, 20.0))
    ]


def test_colours_tell_kinds_of_spans_apart():
    colours = [colour for _, colour in SPAN_STYLES.values()]
    assert len({*colours, REST}) == len(colours) + 1


def test_any_step_can_be_chosen_and_a_missing_one_is_refused():
    assert "step 3 of 1 to 3" in words_of(timeline_figure(predictive(), step=3))
    (axis,) = timeline_figure(predictive(), step=3).axes
    assert axis.get_xlim() == (0.0, 17.0)  # no step after it tells where it ends, so its last span does
    with pytest.raises(ValueError, match="the timeline has no step 9; its steps are 1 to 3"):
        timeline_figure(predictive(), step=9)


def test_of_many_layers_some_in_the_middle_are_enlarged():
    spans = [one for step in (1, 2) for one in spans_of_step(step, 200.0 * (step - 1), n_layers=20)]
    figure = timeline_figure(predictive(cache__timeline=spans), step=1)
    whole, enlarged = figure.axes
    assert whole.get_xlim() == (0.0, 200.0)
    assert enlarged.get_title(loc="left") == "Layers 8 to 10 of it"
    assert enlarged.get_xlim() == (80.0, 107.0)
    assert drawn_spans(enlarged, "compute", "attention") == [
        *((80.0, 82.0), (85.0, 87.0), (90.0, 92.0), (95.0, 97.0), (100.0, 102.0), (105.0, 107.0))
    ]
    assert {text.get_text() for text in enlarged.texts} == {"8", "9", "10", "11"}  # a prefetch is for the layer after
    assert to_png(figure)


def test_a_window_holds_what_reaches_into_it_and_not_what_touches_it():
    spans = [span("wait", "wait", layer, 1, *ends) for layer, ends in enumerate([(0, 2), (1, 3), (4, 6), (5, 7)])]
    assert [one["layer"] for one in within(spans, (2, 5))] == [1, 2]


def test_gaps_are_what_no_computation_and_no_wait_covers():
    spans = [
        span("compute", "attention", 0, 1, 1.0, 3.0),
        span("wait", "wait", 0, 1, 3.0, 4.0),
        span("to device", "fetch", 0, 1, 4.0, 9.0),
        span("compute", "attention", 0, 1, 6.0, 7.0),
    ]
    assert gaps(spans, (0.0, 8.0)) == [(0.0, 1.0), (4.0, 2.0), (7.0, 1.0)]
    assert gaps(spans, (1.0, 4.0)) == []
    assert gaps(spans, (2.0, 6.5)) == [(4.0, 2.0)]
