"""Sums and shares that fade: what is remembered of past steps, the last ones counting most.

Predictors learn which pages a layer asks for, and what attention each page draws, from steps that count the less the
longer they are past. `FadingSums` is the one idea; `FadingShares` reads the shares of attention as late as can be, as
on CUDA they are still on their way to the host; `inclusion_probabilities` turns weights into probabilities of being
among so many pages.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate

Guesses = list[tuple[int, float]]
Mass = Callable[[], list[float]]


def require_smoothing(smoothing: float) -> None:
    """Raise ValueError unless 0 <= smoothing < 1."""
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing is at least 0 and less than 1; it is {smoothing}")


class FadingSums:
    """Sums by page, in which what a step added counts `smoothing` times as much one step later.

    A sum divided by `weight`, which is what a page has that got 1 in every step, is a mean over the steps in which the
    later ones weigh more. Unlike a mean that starts from 0 it is not too small in the first steps (Kingma and Ba, Adam,
    ICLR 2015, https://arxiv.org/abs/1412.6980, section 3).
    """

    def __init__(self, smoothing: float):
        self.smoothing = smoothing
        self.sums: dict[int, float] = {}
        self.weight = 0.0

    def add(self, amounts: Mapping[int, float]) -> None:
        """Take in one step. A page that is not in `amounts` got 0."""
        sums, smoothing = self.sums, self.smoothing
        for page in sums:
            sums[page] *= smoothing
        for page, amount in amounts.items():
            sums[page] = sums.get(page, 0.0) + amount
        self.weight = smoothing * self.weight + 1.0

    def means(self) -> dict[int, float]:
        return {page: total / self.weight for page, total in self.sums.items()}


class FadingShares:
    """The fading sums of each page's share of attention in one layer, each step's shares read as late as can be; and
    how many pages were attended to in the last step that has been read."""

    def __init__(self, smoothing: float):
        self._sums = FadingSums(smoothing)
        self._unread: tuple[Sequence[int], Mass] | None = None
        self.n_attended = 0

    def observe(self, pages: Sequence[int], mass: Mass) -> None:
        self.read()  # no step is lost if nobody has asked since the one before
        self._unread = pages, mass

    def read(self) -> FadingSums:
        """The sums, with all steps in them; this waits for the last step's shares if they are still on their way."""
        if self._unread is not None:
            (pages, mass), self._unread = self._unread, None
            self._sums.add(dict(zip(pages, mass(), strict=True)))
            self.n_attended = len(pages)
        return self._sums


def inclusion_probabilities(weights: Mapping[int, float], n_chosen: int) -> Guesses:
    """`(page, probability)`, heaviest first, when `n_chosen` pages are drawn with probability proportional to weight.

    Where that would exceed 1 it is 1, and the others share what is left in proportion. Pages without weight have 0; the
    sum is `n_chosen` if there are as many with weight.
    """
    heaviest = sorted(weights.items(), key=lambda item: (-item[1], item[0]))
    # What each page weighs together with all that are lighter, added up from the lightest, so that nothing is lost.
    rests = list(accumulate(weight for _, weight in reversed(heaviest)))[::-1]
    n_certain = 0
    while n_certain < n_chosen and (n_chosen - n_certain) * heaviest[n_certain][1] >= rests[n_certain] > 0:
        n_certain += 1
    certain, others = heaviest[:n_certain], heaviest[n_certain:]
    rest = rests[n_certain] if others else 0.0
    scale = (n_chosen - n_certain) / rest if rest > 0 else 0.0
    return [(page, 1.0) for page, _ in certain] + [(page, scale * weight) for page, weight in others]
