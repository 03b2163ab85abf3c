"""What a few runs show: medians over runs, their spread, and ratios of pairs with an interval.

A run is one measurement. Its tokens follow upon each other in one process and share whatever the machine did then, so
fifty tokens are no fifty measurements, and every interval here is over **runs**.

Two runs that shared a moment, such as repetition 3 of two strategies, make a **pair**, and a pair has a ratio. What
slowed both down cancels in it. Ratios multiply, so all is done in logarithms:

    ratio of a cell     = exp(median over its pairs of log(numerator / denominator))
    ratio over cells    = exp(mean over cells of that logarithm), the geometric mean
    95 % interval       = the 2.5 % and 97.5 % quantiles of the same figure in resamples that draw, within each cell,
                          as many pairs with replacement as there are (Efron's percentile bootstrap, 1979)

Swapping numerator and denominator therefore gives exactly the inverse, and doubling both sides changes nothing.

**It is coarse for few pairs.** Up to n = 5 pairs the interval of a cell simply runs from the smallest ratio to the
largest, as a resample has either as its median more often than 2.5 times in 100: for n = 3 with a chance of
(1/3)^3 + 3 (1/3)^2 (2/3) = 26 %. That range holds the true median unless all n ratios fall on one side of it:

    chance that the range of n pairs holds the true median = 1 - 2^(1 - n)

that is 50 % for 2 pairs, 75 % for 3, 88 % for 4, 94 % for 5. From 6 pairs on the interval is narrower than the range,
and holds the true median in 88 to 95 % of simulated cases (normal logarithms, up to 20 pairs): about what it is named
for, a little less. With three repetitions "faster" thus means that all three pairs say so, which chance alone does one
time in four, one way or the other.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Sequence

import numpy as np

from intervals import RESAMPLES, bootstrap

NO_DIFFERENCE = "no difference shown"
WIDE_PERCENT = 10.0
"""A cell whose runs differ by more than this, in percent of their median, is warned of."""
UNEVEN_PERCENT = 25.0
"""A run whose mean time per token exceeds its median by more than this, in percent of it, is warned of."""


def median_with_interval(values: Sequence[float], seed: int = 0) -> dict[str, float | int | None]:
    """`n`, `median`, and the limits `low` and `high` of its 95 % bootstrap interval, None of fewer than two values."""
    low, high = bootstrap(values, np.median, seed) or (None, None)
    return {"n": len(values), "median": statistics.median(values) if values else None, "low": low, "high": high}


def spread_percent(values: Sequence[float]) -> float | None:
    """The spread of runs: 100 x (largest - smallest) / median; None of fewer than two, or where the median is not > 0.

    The range rather than the standard deviation, because it says for three runs what one sees; it grows with n.
    """
    if len(values) < 2 or not statistics.median(values) > 0:
        return None
    return 100.0 * (max(values) - min(values)) / statistics.median(values)


@dataclasses.dataclass(frozen=True)
class Ratio:
    """A ratio of pairs, and how sure it is.

    Attributes:
        ratio: None where there is no pair.
        low, high: of the 95 % interval; None where a cell has fewer than two pairs.
        n_pairs: in all cells together.
        n_cells: that have a pair.
    """

    ratio: float | None
    low: float | None
    high: float | None
    n_pairs: int
    n_cells: int

    @property
    def differs(self) -> bool | None:
        """Whether the interval leaves out 1; None where there is no interval."""
        if self.low is None or self.high is None:
            return None
        return not self.low <= 1.0 <= self.high

    @property
    def verdict(self) -> str | None:
        """In words, a ratio above 1 being `faster`; None where there is no pair."""
        if self.ratio is None:
            return None
        if self.differs is None:
            return "fewer than 2 pairs, so no interval"
        return ("faster" if self.ratio > 1.0 else "slower") if self.differs else NO_DIFFERENCE


def log_ratio(numerator: float | None, denominator: float | None) -> float | None:
    """log(numerator / denominator). Equal sides give 0, also if both are 0; a side of 0 alone gives plus or minus
    infinity; None where a side is missing or negative."""
    if numerator is None or denominator is None or numerator < 0 or denominator < 0:
        return None
    if numerator == denominator:
        return 0.0
    if numerator == 0:
        return -math.inf
    return math.inf if denominator == 0 else math.log(numerator) - math.log(denominator)


def paired_ratio(cells: Sequence[Sequence[float]], seed: int = 0) -> Ratio:
    """The ratio over cells, each given as the `log_ratio` of its pairs; cells without pairs are left out.

    An infinite ratio, of a side that is 0, has its place in the order of ratios like any other, so a median and the
    limits of an interval may be 0 or infinite.
    """
    cells = [np.asarray(logs, dtype=float) for logs in cells if len(logs)]
    n_pairs = sum(map(len, cells))
    if not cells:
        return Ratio(None, None, None, 0, 0)
    ratio = _exp(float(_mean_of_medians(logs[None] for logs in cells)[0]))
    if min(map(len, cells)) < 2:  # the spread of one pair is not known, and must not pass for none
        return Ratio(ratio, None, None, n_pairs, len(cells))
    rng = np.random.default_rng(seed)
    figures = _mean_of_medians(rng.choice(logs, size=(RESAMPLES, len(logs))) for logs in cells)
    if np.isfinite(figures).all():
        low, high = np.quantile(figures, (0.025, 0.975))
    else:  # nothing lies between a number and infinity: the next resample outwards
        low = np.quantile(figures, 0.025, method="lower")
        high = np.quantile(figures, 0.975, method="higher")
    return Ratio(ratio, _exp(float(low)), _exp(float(high)), n_pairs, len(cells))


def _mean_of_medians(resampled: Iterable[np.ndarray]) -> np.ndarray:
    """Mean over cells of the medians of arrays [resamples, pairs]; opposite infinities cancel to 0.

    Cells are drawn and summed one at a time, since the resamples of a thousand cells would fill half a gigabyte.
    """
    total, n_cells = np.zeros(1), 0
    for logs in resampled:
        ordered, n = np.sort(logs, axis=1), logs.shape[1]
        with np.errstate(invalid="ignore"):
            total = total + _midpoint(ordered[:, (n - 1) // 2], ordered[:, n // 2])
        n_cells += 1
    return np.nan_to_num(total / n_cells, nan=0.0, posinf=np.inf, neginf=-np.inf)


def _midpoint(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        middle = (one + other) / 2
    return np.where(np.isnan(middle), 0.0, middle)


def _exp(log: float) -> float:
    try:
        return math.exp(log)
    except OverflowError:
        return math.inf
