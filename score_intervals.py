"""How sure a mean of a few scores is: the mean with its 95 % confidence interval.

Eight questions, all answered rightly, do not show that a model is always right. An interval says what they do show.
The textbook's normal interval has no width there; Wilson's has. Scores that are shares, such as two answers out of
four, are no proportion of right and wrong, so their interval is taken from resampling the scores themselves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Z_95 = 1.959963984540054
"""Of a standard normal variable, 95 % lies within plus and minus this."""

RESAMPLES = 10_000


def mean_with_interval(scores: Sequence[float], seed: int = 0) -> dict[str, float | int | None]:
    """Mean of scores of 0 to 1 as `n`, `mean`, and the limits `low` and `high` of its 95 % confidence interval.

    Right-or-wrong scores get Wilson's interval for a proportion (1927), which is sound for few samples and for means
    of 0 and 1. Others get the percentile bootstrap (Efron 1979). No scores have no mean, and one score
    that is neither 0 nor 1 has no interval: None.
    """
    n = len(scores)
    if n == 0:
        return {"n": 0, "mean": None, "low": None, "high": None}
    mean = math.fsum(scores) / n
    if all(score in (0, 1) for score in scores):
        low, high = wilson(mean, n)
    elif n == 1:
        low = high = None
    else:
        rng = np.random.default_rng(seed)
        resampled = rng.choice(np.asarray(scores, dtype=float), size=(RESAMPLES, n)).mean(axis=1)
        low, high = (float(limit) for limit in np.quantile(resampled, (0.025, 0.975)))
    return {"n": n, "mean": mean, "low": low, "high": high}


def wilson(share: float, n: int) -> tuple[float, float]:
    """The proportions p from which a share of n is at most `Z_95` standard deviations sqrt(p (1 - p) / n) away."""
    centre = (share + Z_95**2 / (2 * n)) / (1 + Z_95**2 / n)
    reach = Z_95 * math.sqrt(share * (1 - share) / n + Z_95**2 / (4 * n**2)) / (1 + Z_95**2 / n)
    return max(centre - reach, 0.0), min(centre + reach, 1.0)
