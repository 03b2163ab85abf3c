"""How sure a figure of a few measurements is: its 95 % confidence interval.

Eight questions, all answered rightly, do not show that a model is always right, and three runs do not show how fast a
strategy is. An interval says what they do show. Scores have the interval of a proportion; the textbook's normal one has
no width where all are right, Wilson's has. For anything else the measurements themselves are resampled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

Z_95 = 1.959963984540054
"""Of a standard normal variable, 95 % lies within plus and minus this."""

RESAMPLES = 10_000

Statistic = Callable[..., np.ndarray]


def score_with_interval(scores: Sequence[float]) -> dict[str, float | int | None]:
    """Mean of scores of 0 to 1 as `n`, `mean`, and the limits `low` and `high` of its 95 % confidence interval.

    The interval is Wilson's for a proportion (1927), which is sound for few samples and for means of 0 and 1. Scores
    between right and wrong vary less around the same mean than those do, so for them it is if anything too wide. No
    scores have no mean: None.
    """
    n = len(scores)
    if n == 0:
        return {"n": 0, "mean": None, "low": None, "high": None}
    mean = math.fsum(scores) / n
    low, high = wilson(mean, n)
    return {"n": n, "mean": mean, "low": low, "high": high}


def mean_with_interval(values: Sequence[float]) -> dict[str, float | int | None]:
    """The same of figures of any size, with the bootstrap's interval; of fewer than two there is none."""
    low, high = bootstrap(values, np.mean) or (None, None)
    return {"n": len(values), "mean": math.fsum(values) / len(values) if values else None, "low": low, "high": high}


def bootstrap(values: Sequence[float], statistic: Statistic, seed: int = 0) -> tuple[float, float] | None:
    """The limits of a statistic's 95 % confidence interval by the percentile bootstrap (Efron 1979).

    Args:
        values: measurements that do not depend on each other.
        statistic: of an array along `axis`, such as `np.mean` and `np.median`.

    Returns:
        None of fewer than two values, which say nothing of their spread.
    """
    n = len(values)
    if n < 2:
        return None
    rng = np.random.default_rng(seed)
    measured = np.asarray(values, dtype=float)
    chunk = max(1, 4_000_000 // n)  # values in memory at once
    resampled = [
        statistic(rng.choice(measured, size=(min(chunk, RESAMPLES - start), n)), axis=1)
        for start in range(0, RESAMPLES, chunk)
    ]
    low, high = np.quantile(np.concatenate(resampled), (0.025, 0.975))
    return float(low), float(high)


def wilson(share: float, n: int) -> tuple[float, float]:
    """The proportions p from which a share of n is at most `Z_95` standard deviations sqrt(p (1 - p) / n) away."""
    centre = (share + Z_95**2 / (2 * n)) / (1 + Z_95**2 / n)
    reach = Z_95 * math.sqrt(share * (1 - share) / n + Z_95**2 / (4 * n**2)) / (1 + Z_95**2 / n)
    low, high = max(centre - reach, 0.0), min(centre + reach, 1.0)
    return (0.0 if share == 0 else low), (1.0 if share == 1 else high)  # which rounding misses
