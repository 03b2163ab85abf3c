"""Predictors: which pages a layer will ask for before it asks.

A predictor sees page ids and attention shares and nothing else: no tensors, no copies. One instance serves one
sequence. Its verbs, called by the scheduler in predictive_prefetch.py in this order for each layer of each decode
step:

    want(layer, step, pages)            the layer has asked for these pages
    predict(layer, step) -> guesses     what this layer (the next one) will ask for: (page, confidence), best first
    observe(layer, step, pages, mass)   the layer has attended to them; `mass()` gives each one's share of the attention

`mass` is a function because on CUDA the shares are still on their way to the host: a predictor that reads them one step
later does not wait. A predictor that never reads them says `needs_mass = False` as a class attribute, and `observe` is
not called. Pages that are on the device already may be named; they cost nothing.

A predictor of your own derives from `QuietPredictor` and overrides the verbs that it cares for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

Guesses = list[tuple[int, float]]


class Predictor(Protocol):
    """The verbs of a predictor; see the module's docstring.

    Attributes:
        needs_mass: whether `observe` is to be called. Computing the shares and bringing them to the host costs time in
            every layer, so a predictor that has no use for them says False.
    """

    needs_mass: ClassVar[bool]

    def want(self, layer: int, step: int, pages: Sequence[int]) -> None: ...
    def predict(self, layer: int, step: int) -> Guesses: ...
    def observe(self, layer: int, step: int, pages: Sequence[int], mass: Callable[[], list[float]]) -> None: ...


class QuietPredictor:
    """The verbs with nothing in them: it heeds no page and guesses none. The base of the predictors below."""

    needs_mass: ClassVar[bool] = True

    def want(self, layer: int, step: int, pages: Sequence[int]) -> None:
        pass

    def predict(self, layer: int, step: int) -> Guesses:
        return []

    def observe(self, layer: int, step: int, pages: Sequence[int], mass: Callable[[], list[float]]) -> None:
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

    _last: dict[int, tuple[Sequence[int], Callable[[], list[float]]]] = field(
        default_factory=dict, init=False, repr=False
    )

    def observe(self, layer: int, step: int, pages: Sequence[int], mass: Callable[[], list[float]]) -> None:
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
