"""Intervals hold what they promise: against the definition, simulated coins, and all resamples there are."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from intervals import Z_95, bootstrap, mean_with_interval, score_with_interval, wilson


@pytest.mark.parametrize("n", [1, 2, 5, 8, 30])
def test_wilsons_interval_is_every_proportion_that_the_share_does_not_speak_against(n):
    proportions = np.linspace(0, 1, 4001)
    for right in range(n + 1):
        low, high = wilson(right / n, n)
        plausible = proportions[(right / n - proportions) ** 2 <= Z_95**2 * proportions * (1 - proportions) / n + 1e-12]
        assert (plausible.min(), plausible.max()) == pytest.approx((low, high), abs=1 / 2000)


@pytest.mark.parametrize("proportion", [0.3, 0.5, 0.9])
def test_wilsons_interval_holds_the_truth_about_95_times_in_100(proportion):
    rng, n = np.random.default_rng(0), 40
    limits = [wilson(right / n, n) for right in range(n + 1)]
    held = [limits[right][0] <= proportion <= limits[right][1] for right in rng.binomial(n, proportion, 20_000)]
    assert 0.93 <= np.mean(held) <= 0.98  # a binomial takes steps, so not exactly 0.95


@pytest.mark.parametrize("n", [1, 2, 3, 7, 40])
def test_nothing_right_and_nothing_wrong_end_wilsons_interval_at_0_and_1(n):
    assert (wilson(0.0, n)[0], wilson(1.0, n)[1]) == (0.0, 1.0)


def test_right_or_wrong_scores_have_wilsons_interval():
    # 8 of 8: the lower limit is n / (n + z ** 2) = 8 / (8 + 3.8415)
    result = score_with_interval([1.0] * 8)
    assert result == {"n": 8, "mean": 1.0, "low": pytest.approx(0.67559, abs=1e-5), "high": 1.0}
    result = score_with_interval([0, 0])
    assert (result["mean"], result["low"]) == (0.0, 0.0) and 0.6 < result["high"] < 0.7


def test_scores_between_right_and_wrong_have_an_interval_that_is_wide_enough():
    scores = [0.0, 0.25, 0.75, 1.0, 0.5]
    result = score_with_interval(scores)
    means = [np.mean(sample) for sample in itertools.product(scores, repeat=5)]  # 3125, all equally likely
    low, high = np.quantile(means, (0.025, 0.975))
    assert result["low"] <= low < result["mean"] == 0.5 < high <= result["high"]
    alike = score_with_interval([0.75] * 4)
    assert alike["low"] < 0.5 < 0.75 < alike["high"]  # four scores that happen to be alike prove little


def test_figures_have_the_interval_of_all_their_resamples():
    values = [0.0, 2.5, 7.5, 10.0, 5.0]
    result = mean_with_interval(values)
    means = [np.mean(sample) for sample in itertools.product(values, repeat=5)]
    exact = np.quantile(means, (0.025, 0.975))
    assert (result["low"], result["high"]) == pytest.approx(exact, abs=0.5)  # one step of the mean is 2.5 / 5
    assert result["mean"] == 5.0
    assert result == mean_with_interval(values)


def test_figures_that_are_all_zero_are_no_proportion():
    assert mean_with_interval([0.0] * 32) == {"n": 32, "mean": 0.0, "low": 0.0, "high": 0.0}


def test_an_interval_has_its_mean_inside_and_narrows_with_more_scores():
    for interval in (score_with_interval, mean_with_interval):
        few, many = (interval([0.25, 0.75] * n) for n in (4, 100))
        assert few["low"] < many["low"] < 0.5 < many["high"] < few["high"]


def test_what_is_unknown_is_none():
    nothing = {"n": 0, "mean": None, "low": None, "high": None}
    assert score_with_interval([]) == mean_with_interval([]) == nothing
    assert mean_with_interval([0.4]) == {"n": 1, "mean": 0.4, "low": None, "high": None}


def test_the_bootstrap_of_a_median_is_that_of_all_resamples():
    values = [41.0, 44.0, 45.0, 47.0, 90.0]
    medians = [np.median(sample) for sample in itertools.product(values, repeat=5)]
    assert bootstrap(values, np.median) == pytest.approx(np.quantile(medians, (0.025, 0.975)))


def test_one_value_says_nothing_of_its_spread():
    assert bootstrap([3.0], np.median) is None and bootstrap([], np.median) is None
    assert bootstrap([3.0, 3.0], np.median) == (3.0, 3.0)
