"""Medians, spreads and paired ratios: by hand, by all resamples there are, and what must hold of any."""

from __future__ import annotations

import itertools
import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intervals import bootstrap
from run_statistics import NO_DIFFERENCE, log_ratio, median_with_interval, paired_ratio, spread_percent

FEW = settings(max_examples=25)
positive = st.floats(0.01, 1e4)
pair = st.tuples(positive, positive)
some_cells = st.lists(st.lists(pair, min_size=1, max_size=5), min_size=1, max_size=3)


def ratio_of(cells):
    return paired_ratio([[log_ratio(*pair) for pair in cell] for cell in cells])


def all_resamples(cells):
    """The geometric mean over cells of the median ratio, of every way to draw as many pairs with replacement."""
    drawn = [list(itertools.product(np.log(cell), repeat=len(cell))) for cell in cells]
    return [math.exp(np.mean([np.median(logs) for logs in choice])) for choice in itertools.product(*drawn)]


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_up_to_five_pairs_the_interval_is_the_range(n):
    ratios = [1.1, 0.9, 1.3, 1.2, 1.05][:n]
    found = paired_ratio([np.log(ratios)])
    assert (found.low, found.high) == pytest.approx((min(ratios), max(ratios)))
    outer = np.quantile(all_resamples([ratios]), (0.025, 0.975), method="inverted_cdf")
    assert (found.low, found.high) == pytest.approx(tuple(outer))


def test_from_six_pairs_on_the_interval_is_that_of_all_resamples_and_narrower_than_the_range():
    ratios = [0.5, 1.0, 1.1, 1.2, 1.3, 3.0]
    found = paired_ratio([np.log(ratios)])
    assert (found.low, found.high) == pytest.approx(
        tuple(np.quantile(all_resamples([ratios]), (0.025, 0.975))), rel=0.02
    )
    assert 0.5 < found.low < 1.15 < found.high < 3.0


def test_pairs_are_resampled_within_their_cells():
    # Drawn across cells, medians of 4 would turn up; within them the figure stays near sqrt(1 x 4).
    cells = [[0.9, 1.0, 1.1], [3.8, 4.0, 4.3]]
    found = paired_ratio([np.log(cell) for cell in cells])
    assert found.ratio == pytest.approx(2.0)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(all_resamples(cells), (0.025, 0.975))), rel=0.01)
    assert (found.n_pairs, found.n_cells) == (6, 2)


def test_one_cell_has_the_plain_bootstrap_interval_of_its_median():
    logs = np.log([0.8, 1.0, 1.5, 1.1, 0.7, 0.9, 1.3])
    found = paired_ratio([logs])
    assert (math.log(found.low), math.log(found.high)) == pytest.approx(bootstrap(logs, np.median))


@pytest.mark.parametrize(("n", "chance"), [(2, 0.5), (3, 0.75), (5, 0.9375)])
def test_the_range_of_n_pairs_holds_the_true_median_as_often_as_the_formula_says(n, chance):
    assert 1 - 2.0 ** (1 - n) == chance
    draws = np.random.default_rng(0).normal(size=(20_000, n))
    held = (draws.min(axis=1) <= 0) & (draws.max(axis=1) >= 0)
    assert held.mean() == pytest.approx(chance, abs=0.01)


@pytest.mark.parametrize("n", [7, 9])
def test_of_more_pairs_the_interval_holds_the_true_median_about_nine_times_in_ten(n):
    found = [paired_ratio([logs]) for logs in np.random.default_rng(n).normal(size=(300, n))]
    assert 0.84 <= np.mean([ratio.low <= 1.0 <= ratio.high for ratio in found]) <= 0.98


def test_a_single_pair_in_any_cell_leaves_no_interval():
    found = paired_ratio([np.log([2.0, 2.0]), np.log([8.0])])
    assert (found.ratio, found.low, found.high) == (pytest.approx(4.0), None, None)
    assert found.differs is None and found.verdict == "fewer than 2 pairs, so no interval"


def test_no_pair_has_no_ratio():
    found = paired_ratio([[], []])
    assert (found.ratio, found.n_pairs, found.n_cells, found.verdict) == (None, 0, 0, None)


@pytest.mark.parametrize(
    ("ratios", "verdict"),
    [
        ((1.1, 1.2, 1.3), "faster"),
        ((0.9, 0.8, 0.7), "slower"),
        ((0.9, 1.2, 1.3), NO_DIFFERENCE),
        ((1, 1), NO_DIFFERENCE),
    ],
)
def test_the_verdict_is_whether_1_lies_within_the_interval(ratios, verdict):
    assert paired_ratio([np.log(ratios)]).verdict == verdict


def test_many_cells_take_no_more_memory_than_one():
    cells = np.random.default_rng(0).normal(size=(100, 5))
    tracemalloc.start()
    try:
        assert paired_ratio(cells).n_cells == 100
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20  # the resamples of all cells are 38 MiB
    finally:
        tracemalloc.stop()


def test_zeros_have_their_place_in_the_order_of_ratios():
    assert log_ratio(0.0, 0.0) == 0.0
    assert ratio_of([[(0.0, 0.0)] * 3]).verdict == NO_DIFFERENCE
    appeared = ratio_of([[(1.0, 0.0), (2.0, 0.0), (3.0, 0.0)]])
    assert (appeared.ratio, appeared.low, appeared.high) == (math.inf, math.inf, math.inf)
    gone = ratio_of([[(0.0, 1.0), (0.0, 2.0), (3.0, 2.0)]])
    assert (gone.ratio, gone.low, gone.high) == (0.0, 0.0, pytest.approx(1.5))
    assert ratio_of([[(0.0, 1.0), (1.0, 0.0)]]).ratio == 1.0


@pytest.mark.parametrize("sides", [(None, 1.0), (1.0, None), (-1.0, 1.0), (1.0, -1.0)])
def test_what_is_missing_or_negative_has_no_ratio(sides):
    assert log_ratio(*sides) is None


@FEW
@given(some_cells)
def test_swapped_sides_give_the_inverse(cells):
    found, swapped = ratio_of(cells), ratio_of([[pair[::-1] for pair in cell] for cell in cells])
    assert swapped.ratio == pytest.approx(1 / found.ratio)
    if found.low is not None:
        assert (1 / swapped.high, 1 / swapped.low) == pytest.approx((found.low, found.high))
        assert found.low <= found.ratio * (1 + 1e-9) and found.ratio <= found.high * (1 + 1e-9)


@FEW
@given(some_cells, st.floats(0.01, 100.0))
def test_another_unit_on_both_sides_changes_nothing(cells, unit):
    found, scaled = ratio_of(cells), ratio_of([[(unit * a, unit * b) for a, b in cell] for cell in cells])
    assert scaled.ratio == pytest.approx(found.ratio)
    assert (scaled.low, scaled.high) == ((None, None) if found.low is None else pytest.approx((found.low, found.high)))


@FEW
@given(some_cells, st.floats(0.1, 10.0))
def test_a_side_that_is_x_times_as_large_makes_the_ratio_x_times_as_large(cells, x):
    assert ratio_of([[(x * a, b) for a, b in cell] for cell in cells]).ratio == pytest.approx(x * ratio_of(cells).ratio)


def test_a_median_has_the_interval_of_all_its_resamples():
    times = [41.0, 44.0, 90.0]
    medians = [np.median(sample) for sample in itertools.product(times, repeat=3)]
    low, high = np.quantile(medians, (0.025, 0.975))
    assert median_with_interval(times) == {"n": 3, "median": 44.0, "low": low, "high": high}
    assert median_with_interval([41.0]) == {"n": 1, "median": 41.0, "low": None, "high": None}
    assert median_with_interval([]) == {"n": 0, "median": None, "low": None, "high": None}


def test_the_spread_is_the_range_in_percent_of_the_median():
    assert spread_percent([95.0, 100.0, 107.0]) == pytest.approx(12.0)
    assert spread_percent([3.0, 3.0]) == 0.0
    assert spread_percent([3.0]) is None and spread_percent([]) is None
    assert spread_percent([0.0, 0.0, 1.0]) is None
