"""Heat maps: what a page was at a step is read off hand-written requests, and the picture is one."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from page_heatmap import (
    MOST_LAYERS,
    attended_counts,
    draw_page_heatmap,
    heatmap_figure,
    hit_shares,
    page_states,
    spread_layers,
    trace_of,
)
from recorder import PageRequest

NOT_YET, ABSENT, IDLE, HIT, FETCHED = range(5)


def request(step, layer, pages, resident, sequence=0, phase="decode"):
    return dataclasses.asdict(PageRequest(step, phase, layer, sequence, pages, resident))


# Two layers, three decode steps after a prefill in two chunks; the context comes to its fourth page at the last step.
REQUESTS = [
    request(2, 0, pages=[0, 2], resident=[0, 2]),
    request(2, 1, pages=[2, 0, 1], resident=[0, 2]),
    request(3, 0, pages=[2, 1], resident=[0, 2]),
    request(3, 1, pages=[2], resident=[1, 2]),
    request(4, 0, pages=[0, 3], resident=[1, 3]),
    request(4, 1, pages=[3, 2, 1, 0], resident=[2, 3]),
]


def test_a_page_is_absent_idle_hit_or_fetched_and_before_the_context_comes_to_it_nothing():
    by_step = [
        [HIT, ABSENT, HIT, NOT_YET],
        [IDLE, FETCHED, HIT, NOT_YET],
        [FETCHED, IDLE, ABSENT, HIT],
    ]
    np.testing.assert_array_equal(page_states(trace_of(REQUESTS), 0), np.transpose(by_step))


def test_the_overviews_have_a_row_for_each_layer_and_a_column_for_each_step():
    trace = trace_of(REQUESTS)
    np.testing.assert_allclose(hit_shares(trace), [[1.0, 1 / 2, 1 / 2], [2 / 3, 1.0, 2 / 4]])
    np.testing.assert_array_equal(attended_counts(trace), [[2, 2, 2], [3, 1, 4]])


@given(
    st.lists(
        st.tuples(st.sets(st.integers(0, 9), min_size=1), st.sets(st.integers(0, 9), min_size=1)),
        min_size=1,
        max_size=5,
    )
)
def test_states_of_pages_and_overviews_tell_the_same(steps):
    requests = [request(step, 7, sorted(pages), sorted(resident)) for step, (pages, resident) in enumerate(steps)]
    trace = trace_of(requests)
    states = page_states(trace, 7)
    hits, fetched, idle = ((states == state).sum(0) for state in (HIT, FETCHED, IDLE))
    np.testing.assert_array_equal(hits + fetched, attended_counts(trace)[0])
    np.testing.assert_allclose(hits / (hits + fetched), hit_shares(trace)[0])
    np.testing.assert_array_equal(hits + idle, [len(resident) for _, resident in steps])


def test_a_layer_that_did_not_ask_at_a_step_has_nothing_there():
    trace = trace_of([request(1, 0, [0], [0]), request(3, 0, [0, 1], [1]), request(1, 4, [0], [0])])
    assert list(trace.steps) == [1, 2, 3]
    np.testing.assert_array_equal(page_states(trace, 0), [[HIT, NOT_YET, FETCHED], [NOT_YET, NOT_YET, HIT]])
    np.testing.assert_array_equal(hit_shares(trace), [[1.0, math.nan, 0.5], [1.0, math.nan, math.nan]])


def test_only_decode_steps_of_the_first_sequence_are_taken():
    others = [request(2, 0, [5], [5], sequence=1), request(0, 0, [9], [9], phase="prefill")]
    alone, among = trace_of(REQUESTS), trace_of([*others, *REQUESTS])
    assert among == dataclasses.replace(alone, n_sequences=2)


def test_a_figure_of_one_sequence_among_several_says_so():
    def words(requests):
        return " ".join(text.get_text() for text in heatmap_figure(trace_of(requests), "pages").texts)

    assert "Sequence 0 only; the run had 2." in words([*REQUESTS, request(2, 0, [5], [5], sequence=1)])
    assert "Sequence" not in words(REQUESTS)


@pytest.mark.parametrize(
    "requests", [[], [request(0, 0, [0], [0], phase="prefill")]], ids=["none at all", "prefill only"]
)
def test_requests_without_a_decode_step_are_refused(requests, tmp_path):
    with pytest.raises(ValueError, match="no requests of decode steps to draw; they need record_pages"):
        draw_page_heatmap(requests, tmp_path / "pages.png", "nothing")
    assert not (tmp_path / "pages.png").exists()


@pytest.mark.parametrize("n_layers", [1, 2, 4, 5, 30])
def test_the_figure_is_a_png_large_enough_to_read_with_its_first_and_last_layer(n_layers, tmp_path):
    requests = [request(step, layer, [0, step % 3], [0, 2]) for layer in range(n_layers) for step in range(1, 9)]
    path = draw_page_heatmap(requests, tmp_path / "new" / "pages.png", "a title of some length " * 6)
    header = path.read_bytes()[:24]  # https://www.w3.org/TR/png/#11IHDR
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = int.from_bytes(header[16:20], "big"), int.from_bytes(header[20:24], "big")
    assert 1200 <= width <= 4000
    assert 600 <= height <= 3000
    figure = heatmap_figure(trace_of(requests), "pages")
    titles = [axis.get_title(loc="left") for axis in figure.get_axes() if axis.get_title(loc="left")]
    assert titles[:2] == ["Attended pages that were resident", "Pages attended to"]
    assert len(titles) == 2 + min(n_layers, MOST_LAYERS)
    assert (titles[2], titles[-1]) == ("Layer 0", f"Layer {n_layers - 1}")


@given(st.sets(st.integers(0, 200), min_size=1), st.integers(2, 8))
def test_layers_are_spread_evenly_from_the_first_to_the_last(layers, most):
    layers = sorted(layers)
    chosen = spread_layers(layers, most)
    assert len(set(chosen)) == len(chosen) == min(most, len(layers))
    assert chosen == sorted(chosen)
    assert (chosen[0], chosen[-1]) == (layers[0], layers[-1])
    gaps = np.diff([layers.index(layer) for layer in chosen])
    assert gaps.size == 0 or gaps.max() - gaps.min() <= 1
