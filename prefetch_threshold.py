"""Which guesses are worth a copy: a threshold on confidence that follows what came of former guesses, and the link.

A page that is guessed and asked for has to be copied anyway; ahead of need its copy costs nothing, and saves waiting. A
page that is guessed and not asked for holds up other copies, as far as the link is busy. With p the probability that
the page is asked for, t the time of a copy, and `load` the share of the time in which the link is busy, copying ahead
pays where

    p * t >= (1 - p) * load * t,    that is    p >= load / (1 + load)

So over an idle link every guess is worth a try, and over a busy one those that are more likely right than wrong.
Feedback Directed Prefetching (Srinath et al., HPCA 2007, https://doi.org/10.1109/HPCA.2007.346185) throttles hardware
prefetchers by the same two measurements, accuracy and bandwidth.

What a predictor says of its guesses is taken for p only at first. `Calibration` records how often guesses of each
confidence came true. It does so for the guesses that would have to be copied, of which far fewer come true than of
those that are on the device already; and of these for the first ones, copied or held back, so that a confidence that is
held back today can earn its way. Guesses too far down the ranking to be copied would only spoil the record.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Collection, Mapping
from typing import Any

from cache_settings import ADAPTIVE
from fading import Guesses

EDGES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9, 1.0)  # of the bins, narrow where most guesses are
PRIOR_GUESSES = 2.0  # what a predictor's own word counts for, in guesses
CALIBRATION_SMOOTHING = 0.9  # half of what is known of guesses is from the last 7 steps
LOAD_SMOOTHING = 0.8  # and half of what is known of the load from the last 3


class Calibration:
    """How often guesses come true, by their confidence, in bins between `EDGES`; of all layers together."""

    def __init__(self) -> None:
        n_bins = len(EDGES) - 1
        self._guessed, self._used = [0.0] * n_bins, [0.0] * n_bins  # fading
        self._n, self._n_used, self._confidence = [0] * n_bins, [0] * n_bins, [0.0] * n_bins  # of the whole run

    def learn(self, confidence: float, used: bool) -> None:
        """A guess of that confidence, from 0 to 1, was judged."""
        place = _bin(confidence)
        self._guessed[place] += 1
        self._used[place] += used
        self._n[place] += 1
        self._n_used[place] += used
        self._confidence[place] += confidence

    def fade(self) -> None:
        """A step is over: what was learnt before counts less from here."""
        self._guessed = [count * CALIBRATION_SMOOTHING for count in self._guessed]
        self._used = [count * CALIBRATION_SMOOTHING for count in self._used]

    def probability(self, confidence: float) -> float:
        """How probable it is that a guess of that confidence comes true."""
        place = _bin(confidence)
        return (self._used[place] + PRIOR_GUESSES * confidence) / (self._guessed[place] + PRIOR_GUESSES)

    def bins(self) -> list[dict[str, Any]]:
        """The whole run: for each bin with guesses its bounds, the guesses `n`, their mean `confidence`, and the share
        of them that came true, `used`."""
        return [
            {
                "low": EDGES[place],
                "high": EDGES[place + 1],
                "n": n,
                "confidence": self._confidence[place] / n,
                "used": self._n_used[place] / n,
            }
            for place, n in enumerate(self._n)
            if n
        ]


def _bin(confidence: float) -> int:
    return min(len(EDGES) - 2, bisect.bisect_right(EDGES, confidence) - 1)


class ConfidenceThreshold:
    """Decides for one cache which guesses are copied, and learns what became of them.

    Args:
        min_confidence: the least confidence, from 0 to 1; or `"adaptive"`, as above.

    Attributes:
        history: by decode step, `threshold` and the `link_load` that it was made for; None where that was not known.
    """

    def __init__(self, min_confidence: float | str):
        self.adaptive = min_confidence == ADAPTIVE
        self.threshold = 0.0 if self.adaptive else float(min_confidence)
        self.calibration = Calibration()
        self.history: list[dict[str, float | int | None]] = []
        self._load: float | None = None
        self._pending: dict[Any, Mapping[int, float]] = {}

    def begin_step(self, link_load: float | None) -> None:
        """A decode step begins.

        Args:
            link_load: the share of the time since the last step that the link was busy; None if there was none.
        """
        if link_load is not None:
            load = min(1.0, max(0.0, link_load))
            self._load = load if self._load is None else LOAD_SMOOTHING * self._load + (1 - LOAD_SMOOTHING) * load
        if self.adaptive and self._load is not None:
            self.threshold = self._load / (1 + self._load)
        self.calibration.fade()
        self.history.append({"step": len(self.history), "threshold": self.threshold, "link_load": self._load})

    def worth_copying(self, asker: Any, guesses: Guesses, limit: int) -> list[int]:
        """The first pages among the guesses that are worth a copy, in their order.

        Args:
            asker: who will ask for them, as `judge` is told later.
            guesses: pages that are not on the device, each once.
            limit: most pages to copy.
        """
        probability = self.calibration.probability if self.adaptive else float
        chosen: list[int] = []
        judged: dict[int, float] = {}
        for page, guessed in guesses:
            if len(chosen) == limit:
                break
            confidence = _between_0_and_1(guessed)
            is_worth_it = probability(confidence) >= self.threshold
            if is_worth_it:
                chosen.append(page)
            if is_worth_it or len(judged) < limit:
                judged[page] = confidence
        self._pending[asker] = judged
        return chosen

    def judge(self, asker: Any, wanted: Collection[int]) -> None:
        """The asker has asked for these pages: learn from the guesses that were made for it."""
        guesses = self._pending.pop(asker, None)
        if guesses:
            asked_for = set(wanted)
            for page, confidence in guesses.items():
                self.calibration.learn(confidence, page in asked_for)

    def forget(self) -> None:
        """Drop the guesses that were not judged: nobody will ask for them as they were meant."""
        self._pending.clear()


def _between_0_and_1(confidence: float) -> float:
    """A predictor of anybody's may say anything; what is no number is no confidence."""
    return 0.0 if math.isnan(confidence) else min(1.0, max(0.0, float(confidence)))
