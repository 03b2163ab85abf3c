"""Each predictor guesses what its name promises, and says how sure it is.

The models here keep every request and every step's shares, and work out from the whole history, in the plainest way,
what the predictors keep up to date step by step.
"""

from __future__ import annotations

import copy
import math
import random
from collections import Counter, defaultdict
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fading import inclusion_probabilities
from recorder import PageRequest
from registry import PREDICTORS, UnknownName

LEARNING = ("ema", "frequency", "ranked", "random")
N_LAYERS = 2


@st.composite
def histories(draw):
    """Steps of (layer, pages, shares): what each layer asked for and attended to, layer by layer."""
    steps = []
    for _ in range(draw(st.integers(1, 8))):
        for layer in range(N_LAYERS):
            pages = draw(st.lists(st.integers(0, 7), unique=True, min_size=1, max_size=8))
            weights = draw(st.lists(st.integers(0, 20), min_size=len(pages), max_size=len(pages)))
            steps.append((layer, pages, [weight / (sum(weights) + 1) for weight in weights]))
    return steps


SMOOTHINGS = st.sampled_from([0.0, 0.3, 0.9])


def played(choice, history, reader=lambda shares: lambda: shares):
    """A predictor after a history: it has been asked for guesses as the scheduler does, and not about the end of it."""
    predictor = PREDICTORS.create(choice)
    for number, (layer, pages, shares) in enumerate(history):
        predictor.want(layer, number // N_LAYERS, pages)
        predictor.predict((layer + 1) % N_LAYERS, (number + 1) // N_LAYERS)
        if predictor.needs_mass:
            predictor.observe(layer, number // N_LAYERS, pages, reader(shares))
    return predictor


def requests_of(history, layer):
    return [set(pages) for one, pages, _ in history if one == layer]


def shares_of(history, layer):
    return [dict(zip(pages, shares, strict=True)) for one, pages, shares in history if one == layer]


def faded(values, smoothing):
    """Sum of values, the last at full weight and each earlier one at `smoothing` times that of the next."""
    return math.fsum(value * smoothing**age for age, value in enumerate(reversed(values)))


def mean(values, smoothing):
    return faded(values, smoothing) / faded([1] * len(values), smoothing)


def pages_of(history, layer):
    return set().union(*requests_of(history, layer))


def naive_frequency(requests, page, smoothing):
    return mean([page in request for request in requests], smoothing)


def naive_share(shares, page, smoothing):
    return mean([step.get(page, 0.0) for step in shares], smoothing)


def naive_inclusion(weights, n_chosen):
    """The scale at which probabilities that are cut off at 1 add up to `n_chosen`, found by halving an interval."""
    low, high = 0.0, 1e18  # the lightest page here weighs 1e-12
    for _ in range(300):
        scale = (low + high) / 2
        if sum(min(1.0, scale * weight) for weight in weights.values()) < n_chosen:
            low = scale
        else:
            high = scale
    return {page: min(1.0, high * weight) for page, weight in weights.items()}


def naive_reliability(requests, page, smoothing):
    """Every former guess by frequency, with what became of it."""
    promised, kept = defaultdict(list), defaultdict(list)
    for number, request in enumerate(requests):
        for one in set().union(*requests):
            guess = naive_frequency(requests[:number], one, smoothing) if number else 0.0
            promised[one].append(guess**2)
            kept[one].append(guess * (one in request))
    promised = {one: faded(values, smoothing) for one, values in promised.items()}
    kept = {one: faded(values, smoothing) for one, values in kept.items()}
    of_layer = (0.5 + sum(kept.values())) / (1 + sum(promised.values()))
    return (of_layer + kept[page]) / (1 + promised[page])


def require(guesses, confidence, score):
    """The guesses are the pages of `confidence`, with these values, in falling order of `score`; near-equals in any."""
    assert sorted(page for page, _ in guesses) == sorted(confidence)
    assert dict(guesses) == pytest.approx(confidence, abs=1e-9)
    scores = [score[page] for page, _ in guesses]
    assert all(first >= second - 1e-12 for first, second in pairwise(scores))


# --- against the whole history --------------------------------------------------------------------------------------


@given(history=histories(), smoothing=SMOOTHINGS, layer=st.integers(0, N_LAYERS - 1))
def test_frequency_is_the_share_of_the_requests_that_a_page_was_in(history, smoothing, layer):
    guesses = played({"name": "frequency", "smoothing": smoothing}, history).predict(layer, 99)
    requests = requests_of(history, layer)
    expected = {page: naive_frequency(requests, page, smoothing) for page in pages_of(history, layer)}
    require(guesses, expected, expected)


@given(history=histories(), smoothing=SMOOTHINGS, layer=st.integers(0, N_LAYERS - 1))
def test_ema_ranks_by_smoothed_shares_and_expects_as_many_pages_as_last_time(history, smoothing, layer):
    guesses = played({"name": "ema", "smoothing": smoothing}, history).predict(layer, 99)
    shares = shares_of(history, layer)
    expected = {page: naive_share(shares, page, smoothing) for page in pages_of(history, layer)}
    n_pages = len(requests_of(history, layer)[-1])
    if sum(share > 0 for share in expected.values()) > n_pages:
        confidence = naive_inclusion(expected, n_pages)
    else:
        confidence = {page: float(share > 0) for page, share in expected.items()}
    require(guesses, confidence, expected)


EXPONENTS = st.sampled_from([0, 1.0, 2])


@given(
    history=histories(),
    smoothing=SMOOTHINGS,
    exponents=st.tuples(EXPONENTS, EXPONENTS, EXPONENTS),
    layer=st.integers(0, N_LAYERS - 1),
)
def test_ranked_orders_by_the_product_of_its_three_factors(history, smoothing, exponents, layer):
    names = ("confidence_weight", "attention_weight", "frequency_weight")
    choice = {"name": "ranked", "smoothing": smoothing} | dict(zip(names, exponents, strict=True))
    guesses = played(choice, history).predict(layer, 99)
    requests, shares = requests_of(history, layer), shares_of(history, layer)
    confidence, score = {}, {}
    for page in pages_of(history, layer):
        reliability, frequency = (naive(requests, page, smoothing) for naive in (naive_reliability, naive_frequency))
        factors = (reliability, naive_share(shares, page, smoothing), 1 + frequency)
        confidence[page] = min(1.0, reliability * frequency)
        score[page] = math.prod(factor**exponent for factor, exponent in zip(factors, exponents, strict=True))
    require(guesses, confidence, score)


@given(
    history=histories(),
    foreseen=st.dictionaries(st.integers(0, 11), st.floats(1e-6, 1), min_size=1),
    exponents=st.tuples(EXPONENTS, EXPONENTS, EXPONENTS),
    chosen=st.floats(0, 1),
)
def test_ranked_takes_the_attention_that_is_foreseen_where_there_is_any(history, foreseen, exponents, chosen):
    names = ("confidence_weight", "attention_weight", "frequency_weight")
    predictor = played({"name": "ranked"} | dict(zip(names, exponents, strict=True)), history)
    requests, n_chosen = requests_of(history, 0), int(chosen * len(foreseen))
    weights = {}
    for page, share in foreseen.items():
        known = page in pages_of(history, 0)  # of one that was never asked for there is no record
        reliability = naive_reliability(requests, page, predictor.smoothing) if known else 0.5
        factors = (reliability, share, 1 + naive_frequency(requests, page, predictor.smoothing))
        weights[page] = math.prod(factor**exponent for factor, exponent in zip(factors, exponents, strict=True))
    without = predictor.predict(0, 99)
    predictor.hint(0, 99, foreseen, n_chosen)
    require(predictor.predict(0, 99), naive_inclusion(weights, n_chosen), weights)
    assert predictor.predict(0, 100) == without  # of another step than the one that was foreseen


@given(
    history=histories(),
    foreseen=st.dictionaries(st.integers(0, 11), st.floats(1e-6, 1), min_size=1),
    chosen=st.floats(0, 1),
)
def test_ranked_takes_what_is_foreseen_of_a_layer_that_was_never_asked_for_anything(history, foreseen, chosen):
    """Nothing else is known of its pages, so their shares of attention alone decide."""
    predictor, n_chosen = played("ranked", history), int(chosen * len(foreseen))
    assert predictor.predict(N_LAYERS, 5) == []
    predictor.hint(N_LAYERS, 5, foreseen, n_chosen)
    require(predictor.predict(N_LAYERS, 5), naive_inclusion(foreseen, n_chosen), foreseen)
    assert predictor.predict(N_LAYERS, 6) == []


@given(
    foreseen=st.dictionaries(st.integers(0, 11), st.floats(1e-6, 1), min_size=1),
    chosen=st.floats(0, 1),
)
def test_cross_layer_expects_the_pages_that_the_selector_would_take(foreseen, chosen):
    predictor, n_chosen = PREDICTORS.create("cross_layer"), int(chosen * len(foreseen))
    predictor.hint(3, 5, foreseen, n_chosen)
    require(predictor.predict(3, 5), naive_inclusion(foreseen, n_chosen), foreseen)
    assert predictor.predict(3, 6) == predictor.predict(2, 5) == []


@given(history=histories(), sequence=st.integers(0, 1))
def test_the_oracle_knows_every_request_of_its_sequence_to_come(history, sequence):
    prefill = [PageRequest(step, "prefill", 0, sequence, [99], []) for step in range(3)]
    decode = [
        PageRequest(3 + number // N_LAYERS, "decode", layer, row, [page + 10 * row for page in pages], [])
        for number, (layer, pages, _) in enumerate(history)
        for row in range(2)
    ]
    oracle = PREDICTORS.create({"name": "oracle", "requests": prefill + decode, "sequence": sequence})
    for number, (layer, pages, _) in enumerate(history):
        guesses = oracle.predict(layer, number // N_LAYERS)
        assert guesses == [(page + 10 * sequence, 1.0) for page in pages]
    assert oracle.predict(0, 99) == oracle.predict(N_LAYERS, 0) == []


def test_an_oracle_without_a_recording_is_refused():
    with pytest.raises(ValueError, match="the oracle needs the recorded requests"):
        PREDICTORS.create("oracle")


@given(history=histories(), seed=st.integers(0, 3), layer=st.integers(0, N_LAYERS - 1))
def test_random_names_every_page_up_to_the_last_one_asked_for(history, seed, layer):
    guesses = played({"name": "random", "seed": seed}, history).predict(layer, 99)
    n_pages = max(pages_of(history, layer)) + 1
    share = len(requests_of(history, layer)[-1]) / n_pages
    assert sorted(guesses) == [(page, share) for page in range(n_pages)]


@given(weights=st.dictionaries(st.integers(0, 9), st.floats(1e-6, 1e3), min_size=1), chosen=st.floats(0, 1))
def test_probabilities_of_being_drawn_add_up_to_the_number_drawn(weights, chosen):
    n_chosen = int(chosen * len(weights))
    guesses = inclusion_probabilities(weights, n_chosen)
    assert sum(probability for _, probability in guesses) == pytest.approx(n_chosen)
    require(guesses, naive_inclusion(weights, n_chosen), weights)


# --- by hand --------------------------------------------------------------------------------------------------------


def test_ema_fades_what_was_not_attended_to():
    """Sums of page 1: 0.6 / 2 + 0.1 = 0.4; of page 2: 0.4 / 2 = 0.2; of page 3: 0.6. Two pages are expected, and 2 of
    the sum 1.2 exceeds 1 for none of them but page 3, where it is just 1."""
    steps = [(0, [1, 2], [0.6, 0.4]), (1, [1], [1.0]), (0, [3, 1], [0.6, 0.1])]
    guesses = played({"name": "ema", "smoothing": 0.5}, steps).predict(0, 2)
    assert [page for page, _ in guesses] == [3, 1, 2]
    assert [confidence for _, confidence in guesses] == pytest.approx([1, 0.4 / 0.6, 0.2 / 0.6])


def test_frequency_counts_the_last_requests_most():
    """The weights of three requests are 1/4, 1/2 and 1, together 7/4."""
    steps = [(0, [1, 2], []), (1, [9], []), (0, [1], []), (1, [9], []), (0, [2, 3], [])]
    guesses = played({"name": "frequency", "smoothing": 0.5}, steps).predict(0, 3)
    assert guesses == [(2, pytest.approx(5 / 7)), (3, pytest.approx(4 / 7)), (1, pytest.approx(3 / 7))]


def test_ranked_learns_how_far_its_guesses_come_true():
    """After one request of pages 1 and 2, both have frequency 1, and nothing is known of guesses: 1/2. Then page 1 is
    asked for alone. Of the two guesses one came true: (1/2 + 1) / (1 + 2) = 1/2 for the layer; (1/2 + 1) / 2 = 3/4 for
    page 1 and (1/2 + 0) / 2 = 1/4 for page 2. At a smoothing of 1/2, page 1 keeps frequency 1 and page 2 has 1/3."""
    predictor = PREDICTORS.create({"name": "ranked", "smoothing": 0.5})
    predictor.want(0, 0, [1, 2])
    predictor.observe(0, 0, [1, 2], lambda: [0.3, 0.7])
    assert predictor.predict(0, 1) == [(2, 0.5), (1, 0.5)]  # equal in all but attention
    predictor.want(0, 1, [1])
    assert predictor.predict(0, 2) == [(1, pytest.approx(3 / 4)), (2, pytest.approx(1 / 4 / 3))]


@pytest.mark.parametrize(
    ("exponents", "first"), [({}, 1), ({"attention_weight": 9}, 2), ({"attention_weight": 0}, 1)], ids=str
)
def test_the_exponents_say_which_factor_decides(exponents, first):
    """Page 1 is asked for in every step, page 2 in every second one, where it gets thrice the attention."""
    rare = [(layer, [1, 2], [0.25, 0.75]) for layer in range(N_LAYERS)]
    often = [(layer, [1], [0.2]) for layer in range(N_LAYERS)]
    guesses = played({"name": "ranked"} | exponents, (rare + often) * 6).predict(0, 99)
    assert guesses[0][0] == first


@pytest.mark.parametrize("name", ["ema", "frequency", "ranked"])
def test_when_every_page_is_asked_for_every_time_all_are_as_good_as_certain(name):
    steps = [(layer, [0, 1, 2, 3], [0.4, 0.3, 0.2, 0.1]) for _ in range(40) for layer in range(N_LAYERS)]
    guesses = played(name, steps).predict(0, 40)
    assert all(confidence > 0.97 for _, confidence in guesses)


def test_the_confidence_of_ranked_is_how_often_pages_are_asked_for():
    """Of 40 pages, page p is asked for with probability p / 40, whatever was asked for before. The guesses of ten
    pages next to each other come true as often as they say, up to the noise of a short memory."""
    chance = random.Random(5)
    predictor, said, came = PREDICTORS.create("ranked"), Counter(), Counter()
    for step in range(300):
        pages = [page for page in range(40) if chance.random() < page / 40]
        for page, confidence in predictor.predict(0, step) if step > 30 else ():
            said[page // 10] += confidence
            came[page // 10] += page in pages
        predictor.want(0, step, pages)
    for group in range(4):
        assert said[group] / 2690 == pytest.approx(came[group] / 2690, abs=0.07)


# --- of all ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LEARNING)
@given(history=histories())
def test_confidence_is_a_probability_and_no_page_is_named_twice(name, history):
    predictor = played(name, history)
    for layer in range(N_LAYERS):
        guesses = predictor.predict(layer, 99)
        assert all(0 <= confidence <= 1 for _, confidence in guesses)
        assert len(dict(guesses)) == len(guesses) > 0


@pytest.mark.parametrize("name", [name for name in PREDICTORS if name != "oracle"])
def test_nothing_is_guessed_from_nothing(name):
    assert PREDICTORS.create(name).predict(0, 0) == []


@pytest.mark.parametrize("name", LEARNING)
@given(history=histories(), more=histories())
def test_a_copy_learns_by_itself(name, history, more):
    original = played(name, history)
    twin, before = copy.deepcopy(original), copy.deepcopy(original).predict(0, 99)
    for layer, pages, shares in more:
        twin.want(layer, 50, pages)
        twin.observe(layer, 50, pages, lambda shares=shares: shares)
        twin.predict(layer, 51)
    assert original.predict(0, 99) == before == played(name, history).predict(0, 99)


@pytest.mark.parametrize("name", ["ema", "ranked"])
def test_shares_are_read_once_and_not_before_they_are_needed(name):
    reads = Counter()

    def mass_of(step):
        return lambda: reads.update([step]) or [1.0]

    predictor = PREDICTORS.create(name)
    predictor.want(0, 0, [3])
    predictor.observe(0, 0, [3], mass_of(0))
    predictor.want(0, 1, [3])
    assert not reads
    predictor.predict(0, 1)
    predictor.predict(0, 1)
    assert reads == {0: 1}
    predictor.observe(0, 1, [3], mass_of(1))
    predictor.observe(0, 2, [3], mass_of(2))  # nobody asked between them: the first has arrived by now
    assert reads == {0: 1, 1: 1}
    predictor.predict(0, 3)
    assert reads == {0: 1, 1: 1, 2: 1}


def test_random_is_the_same_again_for_the_same_seed_and_another_for_another():
    steps = [(layer, list(range(30)), []) for layer in range(N_LAYERS)]

    def orders(seed):
        predictor = played({"name": "random", "seed": seed}, steps)
        return [[page for page, _ in predictor.predict(layer, step)] for layer in (0, 1) for step in (1, 2)]

    assert orders(0) == orders(0)
    assert len({tuple(order) for seed in (0, 1) for order in orders(seed)}) == 8  # by layer, step and seed


def test_each_page_is_as_likely_as_another_to_be_the_first_that_random_names():
    predictor = played("random", [(0, [4], [])])
    first = Counter(predictor.predict(0, step)[0][0] for step in range(5000))
    assert all(first[page] == pytest.approx(1000, abs=130) for page in range(5))  # 4.6 standard deviations


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        *(({"name": name, "smoothing": 1.0}, "smoothing is at least 0") for name in ("ema", "frequency", "ranked")),
        ({"name": "ema", "smoothing": -0.1}, "it is -0.1"),
        ({"name": "ranked", "confidence_weight": -1}, "confidence_weight is a finite number, 0 or more; it is -1"),
        ({"name": "ranked", "attention_weight": math.nan}, "attention_weight is a finite number"),
        ({"name": "ranked", "frequency_weight": math.inf}, "frequency_weight is a finite number"),
        ({"name": "random", "seed": 0.5}, "seed is an integer; it is 0.5"),
    ],
)
def test_parameters_out_of_range_are_refused(choice, message):
    with pytest.raises(ValueError, match=message):
        PREDICTORS.create(choice)


def test_a_parameter_that_there_is_not_is_refused_with_those_there_are():
    with pytest.raises(UnknownName, match=r"no parameter 'smothing'; did you mean 'smoothing'"):
        PREDICTORS.create({"name": "ranked", "smothing": 0.5})
