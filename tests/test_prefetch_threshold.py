"""Which guesses are worth a copy, against counting by hand over the list of all that was judged."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import CONFIGS, continue_prompt, make_model, make_prompt

from metrics import Timing
from predictive_prefetch import PrefetchingKVCache
from prefetch_threshold import EDGES, Calibration, ConfidenceThreshold

ANYTHING = st.floats(allow_nan=True, allow_infinity=True)
FADES = 0.9  # of each count, by step
LOAD_FADES = 0.8
WORD = 2.0  # guesses that a predictor's own word counts for
BINS = [(0.0, 0.02), (0.02, 0.05), (0.05, 0.1), (0.1, 0.2), (0.2, 0.3)]
BINS += [(0.3, 0.4), (0.4, 0.5), (0.5, 0.7), (0.7, 0.9), (0.9, 1.0)]


def bin_of(confidence):
    """Its lower and upper bound; the lower one is in the bin, the upper one in the next, if there is one."""
    return next((each for each in BINS if each[0] <= confidence < each[1]), BINS[-1])


def bounded(number):
    """What is no number is no confidence."""
    return 0.0 if math.isnan(number) else sorted([0.0, number, 1.0])[1]


def probability_by_counting(judged, now, confidence):
    """Args: `judged`, all (step, confidence, whether it came true)."""
    alike = [(FADES ** (now - step), true) for step, said, true in judged if bin_of(said) == bin_of(confidence)]
    came_true = sum(weight for weight, true in alike if true)
    return (came_true + WORD * confidence) / (sum(weight for weight, _ in alike) + WORD)


CONFIDENCES = st.floats(0, 1) | st.sampled_from(EDGES)


@given(st.lists(st.lists(st.tuples(CONFIDENCES, st.booleans()), max_size=6), max_size=12), CONFIDENCES)
def test_a_probability_is_the_share_that_came_true_the_last_ones_counting_most(steps, confidence):
    calibration, judged = Calibration(), []
    for now, guesses in enumerate(steps):
        calibration.fade()
        for said, true in guesses:
            calibration.learn(said, true)
            judged.append((now, said, true))
    expected = probability_by_counting(judged, len(steps) - 1, confidence)
    assert calibration.probability(confidence) == pytest.approx(expected)
    for each in calibration.bins():
        alike = [(said, true) for _, said, true in judged if bin_of(said) == (each["low"], each["high"])]
        assert each["n"] == len(alike) > 0
        assert each["confidence"] == pytest.approx(sum(said for said, _ in alike) / len(alike))
        assert each["used"] == pytest.approx(sum(true for _, true in alike) / len(alike))
    assert sum(each["n"] for each in calibration.bins()) == len(judged)


def test_a_confidence_of_1_has_its_bin_with_those_just_below():
    calibration = Calibration()
    calibration.learn(1.0, True)
    calibration.learn(0.95, False)
    calibration.learn(0.0, False)
    low, high = calibration.bins()
    assert low == {"low": 0.0, "high": 0.02, "n": 1, "confidence": 0.0, "used": 0.0}
    assert high == {"low": 0.9, "high": 1.0, "n": 2, "confidence": pytest.approx(0.975), "used": 0.5}


@given(st.lists(st.none() | st.floats(-1, 3), max_size=15))
def test_the_threshold_is_where_a_copy_in_vain_costs_as_much_as_one_in_time_saves(loads):
    """At that probability p * t of waiting is saved, and as much is lost by (1 - p) * load * t."""
    threshold, smoothed = ConfidenceThreshold("adaptive"), None
    for step, load in enumerate(loads):
        threshold.begin_step(load)
        if load is not None:
            now = bounded(load)
            smoothed = now if smoothed is None else LOAD_FADES * smoothed + (1 - LOAD_FADES) * now
        p = threshold.threshold
        assert p == pytest.approx((1 - p) * (smoothed or 0.0))
        assert threshold.history[-1] == {"step": step, "threshold": p, "link_load": pytest.approx(smoothed)}
    assert len(threshold.history) == len(loads)


@given(st.floats(0, 1), st.lists(ANYTHING, max_size=20), st.lists(st.booleans(), max_size=20))
def test_a_fixed_number_applies_to_what_the_predictor_says_whatever_came_of_it(least, confidences, outcomes):
    threshold = ConfidenceThreshold(least)
    for true in outcomes:
        threshold.begin_step(1.0)
        threshold.worth_copying("a", [(7, 1.0)], 1)
        threshold.judge("a", [7] if true else [])
    kept = [page for page, said in enumerate(confidences) if bounded(said) >= least]
    assert threshold.worth_copying("a", list(enumerate(confidences)), 20) == kept


def judged_by(threshold):
    return sum(each["n"] for each in threshold.calibration.bins())


def chosen_and_judged(confidences, least, limit):
    """The places that are chosen, the first `limit` of those confident enough; and those that are judged, which are
    these and the first `limit` of all."""
    chosen = [place for place, said in enumerate(confidences) if bounded(said) >= least][:limit]
    return chosen, {*chosen, *range(min(limit, len(confidences)))}


@given(st.sampled_from([0.0, 0.3, 0.9]) | st.floats(0, 1), st.lists(CONFIDENCES, max_size=20), st.integers(1, 6))
def test_at_most_so_many_are_chosen_and_only_the_first_and_those_chosen_are_judged(least, confidences, limit):
    threshold = ConfidenceThreshold(least)
    chosen, judged = chosen_and_judged(confidences, least, limit)
    assert threshold.worth_copying("a", list(enumerate(confidences)), limit) == chosen
    threshold.judge("a", [place for place in judged if place % 2])
    expected, true = Counter(bin_of(confidences[place]) for place in judged), Counter()
    true.update(bin_of(confidences[place]) for place in judged if place % 2)
    learnt = {(each["low"], each["high"]): each for each in threshold.calibration.bins()}
    assert {bounds: each["n"] for bounds, each in learnt.items()} == expected
    assert {bounds: each["used"] * each["n"] for bounds, each in learnt.items()} == pytest.approx(
        {bounds: true[bounds] for bounds in learnt}
    )


def test_guesses_are_judged_once_by_the_asker_that_they_were_made_for_copied_or_not():
    threshold = ConfidenceThreshold(0.5)
    assert threshold.worth_copying("a", [(1, 0.9), (2, 0.4)], 2) == [1]
    assert threshold.worth_copying("b", [(3, 0.9)], 2) == [3]
    threshold.judge("c", [1, 2, 3])
    assert judged_by(threshold) == 0
    threshold.judge("a", [2, 3])
    assert [(each["low"], each["used"]) for each in threshold.calibration.bins()] == [(0.4, 1.0), (0.9, 0.0)]
    threshold.judge("a", [1])
    assert judged_by(threshold) == 2


def test_guesses_that_are_made_anew_or_forgotten_are_not_judged():
    threshold = ConfidenceThreshold(0)
    threshold.worth_copying("a", [(1, 0.9), (2, 0.9)], 2)
    threshold.worth_copying("a", [(3, 0.1)], 2)
    threshold.judge("a", [1])
    assert [(each["n"], each["low"]) for each in threshold.calibration.bins()] == [(1, 0.1)]
    threshold.worth_copying("a", [(1, 0.9)], 2)
    threshold.worth_copying("b", [(1, 0.9)], 2)
    threshold.forget()
    threshold.judge("a", [1])
    threshold.judge("b", [1])
    assert judged_by(threshold) == 1


def steps_of(threshold, load, comes_true, n_steps=30):
    """For each step, whether a guess that its predictor is certain of is copied."""
    copied = []
    for step in range(n_steps):
        threshold.begin_step(load)
        copied.append(threshold.worth_copying("a", [(7, 1.0)], 1) == [7])
        threshold.judge("a", [7] if comes_true(step) else [8])
    return copied


def test_over_a_saturated_link_who_is_always_wrong_is_soon_held_back_and_who_is_right_is_not():
    wrong = steps_of(ConfidenceThreshold("adaptive"), 1.0, lambda step: False)
    assert wrong[0] and not any(wrong[3:])  # (0 + 2) / (2 fading + 2) is less than 1/2 from there
    assert all(steps_of(ConfidenceThreshold("adaptive"), 1.0, lambda step: True))


def test_over_an_idle_link_every_guess_is_worth_a_try():
    assert all(steps_of(ConfidenceThreshold("adaptive"), 0.0, lambda step: False))
    assert all(steps_of(ConfidenceThreshold("adaptive"), None, lambda step: False))


def test_a_confidence_that_was_held_back_earns_its_way_as_its_guesses_come_true():
    copied = steps_of(ConfidenceThreshold("adaptive"), 1.0, lambda step: step >= 15, n_steps=40)
    assert not any(copied[3:15]) and all(copied[30:])


@pytest.mark.parametrize("said", [0.3, 0.6])
def test_who_is_right_nine_times_in_ten_is_not_held_back_for_a_long_tail_that_is_wrong(said):
    """The tail says the same of itself, but is too far down to be copied. After one step over a saturated link, where
    the threshold is 1/2, the probability is (9 * 0.9 + 2 * said) / (10 * 0.9 + 2), 0.79 at least. Were the tail judged
    too, which is never asked for, it would be (9 * 0.9 + 2 * said) / (100 * 0.9 + 2), 0.10 at most."""
    threshold, best = ConfidenceThreshold("adaptive"), list(range(10))
    for step in range(30):
        threshold.begin_step(1.0)
        copied = threshold.worth_copying("a", [(page, said) for page in range(100)], 10)
        assert copied == (best if step or said >= 0.5 else [])  # at first its own word counts
        threshold.judge("a", [page for page in best if page != step % 10])
    assert judged_by(threshold) == 30 * 10


@settings(max_examples=20)
@given(st.integers(0, 1000), st.floats(0.05, 0.95))
def test_what_is_let_through_comes_true_more_often_than_not(seed, share):
    """Guesses of the ten confidences that are told apart, each true so often, over a saturated link: where the
    threshold is 1/2."""
    chances, draw = [min(1.0, share * 2 * place / 9) for place in range(10)], random.Random(seed)
    threshold, came_true = ConfidenceThreshold("adaptive"), []
    for step in range(300):
        threshold.begin_step(1.0)
        true = [page for page in range(10) if draw.random() < chances[page]]
        passed = threshold.worth_copying("a", [(page, sum(BINS[page]) / 2) for page in range(10)], 10)
        threshold.judge("a", true)
        if step >= 50:
            came_true += [page in true for page in passed]
    worth_it = sum(max(0.0, 2 * chance - 1) for chance in chances)
    gain = sum(1 if true else -1 for true in came_true) / 250
    assert gain >= worth_it - 1.0  # of at most 10: near to what is known to be worth it, without knowing it
    assert gain >= -0.4


# --- in a cache -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama():
    return make_model(CONFIGS["llama_gqa"])


SMALL = {"page_size": 8, "max_gpu_pages": 4, "staging_pages": 3, "selector": "quest", "attention_pages": 5}


@pytest.mark.parametrize("min_confidence", ["adaptive", 0, 0.3, 1])
@pytest.mark.parametrize("prefetch_k", [1, 2, 3])
def test_of_as_many_absent_guesses_as_may_be_copied_those_not_chosen_are_declined(
    llama, min_confidence, prefetch_k, monkeypatch
):
    asked, passed, copied = [], [], []
    worth_copying, plan = ConfidenceThreshold.worth_copying, PrefetchingKVCache._plan_copies

    def noting_worth(self, asker, guesses, limit):
        assert limit == prefetch_k
        asked.append(guesses)
        passed.append(worth_copying(self, asker, guesses, limit))
        return passed[-1]

    def noting_plan(self, *given):
        copied.append(plan(self, *given))
        return copied[-1]

    monkeypatch.setattr(ConfidenceThreshold, "worth_copying", noting_worth)
    monkeypatch.setattr(PrefetchingKVCache, "_plan_copies", noting_plan)
    settings = {"prefetch_k": prefetch_k, "min_confidence": min_confidence, "predictor": "ema", "link": "memory"}
    cache = PrefetchingKVCache(llama.config, **SMALL, **settings)
    with cache.attached(llama):
        continue_prompt(llama, make_prompt(90), 20, past_key_values=cache)
    figures = cache.figures(Timing.from_token_times([1.0, 2.0], 1, "wall"))["prefetch"]
    assert any(len(guesses) > prefetch_k for guesses in asked)
    possible = sum(min(prefetch_k, len(guesses)) for guesses in asked)
    assert figures["declined"] + sum(map(len, passed)) == possible
    assert copied == passed
    assert figures["issued"] <= sum(map(len, copied))
    assert min_confidence != 0 or figures["declined"] == 0
    assert min_confidence != 1 or figures["declined"] > 0
    judged = zip(asked[:-1], passed[:-1], strict=True)  # the last ones are for a step that never comes
    n_judged = sum(len({page for page, _ in guesses[:prefetch_k]}.union(chosen)) for guesses, chosen in judged)
    assert judged_by(cache.threshold) == sum(each["n"] for each in figures["calibration"]) == n_judged
    assert [each["step"] for each in figures["thresholds"]] == list(range(19))


def test_unjudged_guesses_are_forgotten_as_rows_change(llama):
    cache = PrefetchingKVCache(llama.config, **SMALL, predictor="random", prefetch_k=2, link="memory")
    with cache.attached(llama):
        continue_prompt(llama, make_prompt(60), 5, past_key_values=cache)
        assert any(cache.threshold._pending.values())
        cache.batch_repeat_interleave(2)
    assert not cache.threshold._pending
    learnt = cache.threshold
    cache.reset()
    assert cache.threshold is not learnt and cache.threshold.history == []


def test_the_load_of_a_link_that_takes_longer_than_computing_holds_wrong_guesses_back(llama):
    """A page takes 5 ms, and each of the steps copies some on demand: the link is busy nearly all the time."""
    link = {"bandwidth_gb_s": 2048e-9 / 0.005, "latency_us": 0}
    cache = PrefetchingKVCache(llama.config, **SMALL, predictor="random", prefetch_k=3, link=link)
    with cache.attached(llama):
        continue_prompt(llama, make_prompt(90), 25, past_key_values=cache)
    first, *_, last = cache.threshold.history
    assert (first["threshold"], first["link_load"]) == (0.0, None)
    assert 0.3 < last["threshold"] <= 0.5 and last["link_load"] > 0.5
    assert cache.recorder.snapshot("decode")["prefetch_declined"] > 0
