"""Predictors: which pages a layer will ask for before it asks.

A predictor sees page ids and attention shares and nothing else: no tensors, no copies. One instance serves one
sequence. Its verbs, called by the scheduler in predictive_prefetch.py in this order for each layer of each decode
step:

    want(layer, step, pages)            the layer has asked for these pages
    predict(layer, step) -> guesses     what this layer (the next one) will ask for: (page, confidence), best first
    observe(layer, step, pages, mass)   the layer has attended to them; `mass()` gives each one's share of the attention

A predictor that says `uses_scores = True` is told before `predict` what the selector would make of the layer's pages,
except those of a step that has not begun:

    hint(layer, step, shares, n)        each page's estimated share of attention, of which the selector takes the n best

`mass` is a function because on CUDA the shares are still on their way to the host: a predictor that reads them one step
later does not wait. A predictor that never reads them says `needs_mass = False` as a class attribute, and `observe` is
not called. Pages that are on the device already may be named; they cost nothing.

Confidence, from 0 to 1, estimates how probable it is that the layer will ask for the page; only that of `last_step`, a
share of attention, estimates nothing. A predictor that learns over many steps keeps `FadingSums` per layer, one float
per page. When the context is cropped, the pages that are gone fade as any that is not asked for, and the scheduler
passes them over.

A predictor of your own derives from `QuietPredictor` and overrides the verbs that it cares for.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from fading import FadingShares, FadingSums, Guesses, Mass, inclusion_probabilities, require_smoothing


class Predictor(Protocol):
    """The verbs of a predictor; see the module's docstring.

    Attributes:
        needs_mass: whether `observe` is to be called. Computing the shares and bringing them to the host costs time in
            every layer, so a predictor that has no use for them says False.
        uses_scores: whether `hint` is to be called where there is a selector. It costs more than the rest: the query of
            a layer that has not begun has to be estimated, and scored against its digests.
        needs_scores: whether there is nothing to guess from without it.
        needs_recording: whether it is made with `requests`, those of the same generation recorded before.
    """

    needs_mass: ClassVar[bool]
    uses_scores: bool
    needs_scores: ClassVar[bool]
    needs_recording: ClassVar[bool]

    def want(self, layer: int, step: int, pages: Sequence[int]) -> None: ...
    def predict(self, layer: int, step: int) -> Guesses: ...
    def observe(self, layer: int, step: int, pages: Sequence[int], mass: Mass) -> None: ...
    def hint(self, layer: int, step: int, shares: Mapping[int, float], n: int) -> None: ...


class QuietPredictor:
    """The verbs with nothing in them: it heeds no page and guesses none. The base of the predictors below."""

    needs_mass: ClassVar[bool] = True
    uses_scores: ClassVar[bool] = False
    needs_scores: ClassVar[bool] = False
    needs_recording: ClassVar[bool] = False

    def want(self, layer: int, step: int, pages: Sequence[int]) -> None:
        pass

    def predict(self, layer: int, step: int) -> Guesses:
        return []

    def observe(self, layer: int, step: int, pages: Sequence[int], mass: Mass) -> None:
        pass

    def hint(self, layer: int, step: int, shares: Mapping[int, float], n: int) -> None:
        pass


@dataclass(frozen=True)
class NoPrediction(QuietPredictor):
    """Predict nothing: predictive mode then behaves as reactive mode, which is what the comparison needs."""

    needs_mass: ClassVar[bool] = False


@dataclass(frozen=True)
class LastStep(QuietPredictor):
    """The pages this layer attended to in the last step, those with the largest share of attention first.

    Confidence is the page's share. Attention moves slowly from token to token, so this is the natural first guess; and
    as LRU keeps just these pages, the natural guess may have little left to fetch.
    """

    _last: dict[int, tuple[Sequence[int], Mass]] = field(default_factory=dict, init=False, repr=False)

    def observe(self, layer: int, step: int, pages: Sequence[int], mass: Mass) -> None:
        self._last[layer] = (pages, mass)

    def predict(self, layer: int, step: int) -> Guesses:
        if layer not in self._last:
            return []
        pages, mass = self._last[layer]
        return sorted(zip(pages, mass(), strict=True), key=lambda guess: -guess[1])


@dataclass(frozen=True)
class LayerAhead(QuietPredictor):
    """The pages the layer before has just asked for: certain when every layer asks for all pages (exact attention).

    What remains to be fetched of them are the pages this layer does not hold. Confidence is 1.
    """

    needs_mass: ClassVar[bool] = False
    _latest: list[int] = field(default_factory=list, init=False, repr=False)

    def want(self, layer: int, step: int, pages: Sequence[int]) -> None:
        self._latest[:] = pages

    def predict(self, layer: int, step: int) -> Guesses:
        return [(page, 1.0) for page in self._latest]


@dataclass(frozen=True)
class Ema(QuietPredictor):
    """The pages with the largest share of attention, smoothed over the steps, the last ones counting most.

    A few pages draw attention at every step, the heavy hitters of H2O (Zhang et al., NeurIPS 2023,
    https://arxiv.org/abs/2306.14048), and one step without it does not mean that they are done with. A page that a step
    did not attend to had a share of 0 in it. Confidence is the probability of being among as many pages as the last
    step attended to, in proportion to the smoothed share (`inclusion_probabilities`), so all together add up to them.

    Args:
        smoothing: how much of the past is kept at each step, 0 <= smoothing < 1; at 0 only the last step counts.
    """

    smoothing: float = 0.8
    _layers: dict[int, FadingShares] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        require_smoothing(self.smoothing)

    def observe(self, layer: int, step: int, pages: Sequence[int], mass: Mass) -> None:
        self._layers.setdefault(layer, FadingShares(self.smoothing)).observe(pages, mass)

    def predict(self, layer: int, step: int) -> Guesses:
        if layer not in self._layers:
            return []
        shares = self._layers[layer].read().sums
        return inclusion_probabilities(shares, self._layers[layer].n_attended)


@dataclass(frozen=True)
class Frequency(QuietPredictor):
    """The pages this layer has asked for most often of late.

    The count of a page's requests fades with every request of the layer, as in LRFU, which lies between least recently
    and least frequently used (Lee et al. 2001, https://doi.org/10.1109/TC.2001.970573). Confidence is the share of the
    layer's requests, fading alike, that the page was in.

    Args:
        smoothing: how much of the count is kept at each request, 0 <= smoothing < 1; at 0 only the last one counts.
    """

    needs_mass: ClassVar[bool] = False

    smoothing: float = 0.8
    _layers: dict[int, FadingSums] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        require_smoothing(self.smoothing)

    def want(self, layer: int, step: int, pages: Sequence[int]) -> None:
        self._layers.setdefault(layer, FadingSums(self.smoothing)).add(dict.fromkeys(pages, 1.0))

    def predict(self, layer: int, step: int) -> Guesses:
        if layer not in self._layers:
            return []
        return sorted(self._layers[layer].means().items(), key=lambda guess: (-guess[1], guess[0]))


class GuessRecord:
    """What `Ranked` knows of one layer: its requests, its attention, and how far former guesses came true."""

    # A neutral start: as if one certain guess had been made, and had half come true.
    PRIOR: ClassVar[float] = 0.5

    def __init__(self, smoothing: float):
        self.requests, self.attention = FadingSums(smoothing), FadingShares(smoothing)
        self.promised, self.kept = FadingSums(smoothing), FadingSums(smoothing)

    def want(self, pages: Sequence[int]) -> None:
        """Judge what would have been guessed by frequency, then learn from the request."""
        chances = self.requests.means()
        self.promised.add({page: chance * chance for page, chance in chances.items()})
        self.kept.add({page: chances[page] for page in pages if page in chances})
        self.requests.add(dict.fromkeys(pages, 1.0))

    def reliability(self) -> dict[int, float]:
        """By page, requests over requests promised, each guess weighed by its frequency: the factor that would have
        made the squared error of the frequencies least. A page starts from the ratio of its layer."""
        promised, kept = self.promised.sums, self.kept.sums
        of_layer = (sum(kept.values()) + self.PRIOR) / (sum(promised.values()) + 1.0)
        return {page: (kept.get(page, 0.0) + of_layer) / (promised.get(page, 0.0) + 1.0) for page in self.requests.sums}


@dataclass(frozen=True)
class Ranked(QuietPredictor):
    """The pages with the highest product of confidence, attention weight and access frequency.

    That is the ranking which the project's user asked for. The score is the product of

        confidence ** confidence_weight         how far former guesses came true, the page's own and, as long as it has
                                                few, its layer's: requests over requests that the frequencies promised;
                                                1/2 at the start and for a page that was never asked for, above 1 for
                                                one on the rise
        attention ** attention_weight           its share of attention: of the coming step, as foreseen by the layer
                                                before (see `cross_layer`), where a selector chooses pages; else of the
                                                past steps, smoothed as in `ema`
        (1 + frequency) ** frequency_weight     the share of the layer's requests that it was in, as in `frequency`; 1
                                                is added so that a page may be guessed that was never asked for

    Guesses are judged by what became of them as in Feedback Directed Prefetching (Srinath et al., HPCA 2007,
    https://doi.org/10.1109/HPCA.2007.346185). What is returned as the confidence of a guess is a probability: where
    attention is foreseen, that of being among as many pages as the selector takes, in proportion to the score
    (`inclusion_probabilities`); else the first factor times the frequency, 1 at most, by which equal scores go. There
    the order is the score's, so a threshold on it has to look at every guess.

    Args:
        smoothing: how much of the past is kept at each step, 0 <= smoothing < 1; at 0 only the last step counts.
        confidence_weight, attention_weight, frequency_weight: exponents of the factors, 0 or more; 0 leaves one out.
        foresight: whether to use what is foreseen, which costs a projection and a scoring of the pages in each layer.
    """

    smoothing: float = 0.8
    confidence_weight: float = 1.0
    attention_weight: float = 1.0
    frequency_weight: float = 1.0
    foresight: bool = True
    _layers: dict[int, GuessRecord] = field(default_factory=dict, init=False, repr=False)
    _hints: dict[int, tuple[int, Mapping[int, float], int]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        require_smoothing(self.smoothing)
        for name in ("confidence_weight", "attention_weight", "frequency_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is a finite number, 0 or more; it is {getattr(self, name)}")

    @property
    def uses_scores(self) -> bool:
        return self.foresight

    def want(self, layer: int, step: int, pages: Sequence[int]) -> None:
        self._record(layer).want(pages)

    def observe(self, layer: int, step: int, pages: Sequence[int], mass: Mass) -> None:
        if layer not in self._hints:  # where attention is foreseen, that of the past is not looked at
            self._record(layer).attention.observe(pages, mass)

    def hint(self, layer: int, step: int, shares: Mapping[int, float], n: int) -> None:
        self._hints[layer] = step, shares, n

    def predict(self, layer: int, step: int) -> Guesses:
        hinted_step, foreseen, n = self._hints.get(layer, (-1, {}, 0))
        record = self._record(layer)
        frequencies = record.requests.means()
        reliability = record.reliability()

        def score(page: int, attention: float) -> float:
            return (
                reliability.get(page, record.PRIOR) ** self.confidence_weight
                * attention**self.attention_weight
                * (1.0 + frequencies.get(page, 0.0)) ** self.frequency_weight
            )

        if hinted_step == step:
            return inclusion_probabilities({page: score(page, share) for page, share in foreseen.items()}, n)
        shares = record.attention.read().sums  # their scale changes no order
        ranking = [
            (-score(page, shares.get(page, 0.0)), -min(1.0, reliability[page] * frequency), page)
            for page, frequency in frequencies.items()
        ]
        return [(page, -minus_confidence) for _, minus_confidence, page in sorted(ranking)]

    def _record(self, layer: int) -> GuessRecord:
        return self._layers.setdefault(layer, GuessRecord(self.smoothing))


@dataclass(frozen=True)
class CrossLayer(QuietPredictor):
    """The pages that a later layer's query would choose, were its input this layer's.

    From layer to layer the residual stream changes little, so the next layer's own projection of this layer's
    normalised input is near to the query that the next layer is going to ask with; held against that layer's digests by
    the selector in use, it names the pages before the layer begins. InfiniGen (Lee et al., OSDI 2024,
    https://arxiv.org/abs/2406.19707) does so for single keys. For the first layers of the next step, whose token is not
    known yet, it guesses nothing. Confidence is the probability of being among as many pages as the selector takes, in
    proportion to the estimated shares of attention (`inclusion_probabilities`).
    """

    needs_mass: ClassVar[bool] = False
    uses_scores: ClassVar[bool] = True
    needs_scores: ClassVar[bool] = True

    _hints: dict[int, tuple[int, Mapping[int, float], int]] = field(default_factory=dict, init=False, repr=False)

    def hint(self, layer: int, step: int, shares: Mapping[int, float], n: int) -> None:
        self._hints[layer] = step, shares, n

    def predict(self, layer: int, step: int) -> Guesses:
        of_step, shares, n = self._hints.get(layer, (-1, {}, 0))
        return inclusion_probabilities(shares, n) if of_step == step else []


@dataclass(frozen=True)
class Oracle(QuietPredictor):
    """What the layer is going to ask for, from a recording of the same generation: the bound for any other predictor.

    The generation is run twice, and the second one knows the first. What it does not reach the bound of is what no
    prediction can do: more pages than `prefetch_k` at a time, or than the link can move. Confidence is 1.

    Args:
        requests: as a recorder keeps them (`recorder.PageRequest`), those of all sequences; a run makes them itself.
        sequence: the one that this predictor is for.
    """

    needs_mass: ClassVar[bool] = False
    needs_recording: ClassVar[bool] = True

    requests: Sequence[Any] = ()
    sequence: int = 0
    _future: dict[tuple[int, int], list[int]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        decoding = [request for request in self.requests if request.phase == "decode"]
        if not decoding:
            raise ValueError("the oracle needs the recorded requests of a generation, with at least one decode step")
        first = min(request.step for request in decoding)
        for request in decoding:
            if request.sequence == self.sequence:
                self._future[request.layer, request.step - first] = request.pages

    def predict(self, layer: int, step: int) -> Guesses:
        return [(page, 1.0) for page in self._future.get((layer, step), ())]


@dataclass(frozen=True)
class Random(QuietPredictor):
    """Pages of the context at random: the floor that any other predictor has to beat.

    The context reaches to the last page that the layer has asked for so far. Confidence is the share of its pages that
    the layer asked for last. The order follows from seed, layer, step and number of pages alone.

    Args:
        seed: any integer; another one gives another order.
    """

    needs_mass: ClassVar[bool] = False

    seed: int = 0
    _layers: dict[int, tuple[int, int]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.seed, int):
            raise ValueError(f"seed is an integer; it is {self.seed!r}")

    def want(self, layer: int, step: int, pages: Sequence[int]) -> None:
        n_pages, _ = self._layers.get(layer, (0, 0))
        self._layers[layer] = max([n_pages, *(page + 1 for page in pages)]), len(pages)

    def predict(self, layer: int, step: int) -> Guesses:
        n_pages, n_wanted = self._layers.get(layer, (0, 0))
        order = random.Random(f"{self.seed} {layer} {step}").sample(range(n_pages), n_pages)
        return [(page, n_wanted / n_pages) for page in order]
