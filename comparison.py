"""Strategies against the baseline: only like with like, cell by cell, in pairs of runs made side by side.

Runs compare inside a **cell**, that is, one workload at one context length (see `result_frame.py`). In each cell the
medians over repetitions are compared, since one slow outlier moves a mean but not a median, and only then are cells
averaged. So a strategy that ran out of memory at the longest context is not made to look fast by it.

Runs are interleaved: repetition 3 of every strategy follows upon repetition 3 of the baseline. Such a pair shares
what the machine did meanwhile, so the spread of a speed-up is taken over pairs; a machine that slows down for a
minute slows down both. `Comparison.speedup` is the median of their ratios, with an interval (see `run_statistics.py`).

Where no baseline succeeded, a reactive strategy is what the predictive ones are compared with: the same cache, but for
the copying ahead.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from metrics import percent, ratio, speedup_percent, spread
from result_frame import CELL, successful, unique, values
from run_statistics import UNEVEN_PERCENT, WIDE_PERCENT, Ratio, log_ratio, paired_ratio, spread_percent

if TYPE_CHECKING:
    import pandas as pd

# Within a cell and a strategy, what tells one run from another. A folder may hold the runs of several seeds, and those
# of several contexts that one model's positions cut to the same length.
PAIR = ["repetition", "seed", "requested_tokens"]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One strategy in one cell against what it is compared with, `baseline`, which is a reactive strategy where no
    baseline succeeded; figures compare medians over repetitions.

    The `paired_…` figures have one entry per repetition of a seed that both ran; `paired_log_ratios` are of their TPOT,
    log(baseline's / own).
    """

    strategy: str
    mode: str
    baseline: str
    model: str
    context_tokens: int
    n: int
    baseline_n: int
    latency_ms: dict[str, Any]
    baseline_latency_ms: dict[str, Any]
    latency_speedup_percent: float | None
    throughput_speedup_percent: float | None
    gpu_memory_reduction_percent: float | None
    gpu_peak_reduction_percent: float | None
    device_kv_reduction_percent: float | None
    paired_speedups_percent: tuple[float, ...]
    paired_gains_percent: tuple[float, ...]
    paired_log_ratios: tuple[float, ...]

    @property
    def speedup(self) -> Ratio:
        """Median over pairs of baseline TPOT / own TPOT, above 1 where this strategy is faster."""
        return overall_speedup([self])


COMPARED = (
    "latency_speedup_percent",
    "throughput_speedup_percent",
    "gpu_memory_reduction_percent",
    "gpu_peak_reduction_percent",
    "device_kv_reduction_percent",
)
# Compared figure -> the same, one by one, for pairs of runs.
PAIRED = {
    "latency_speedup_percent": "paired_speedups_percent",
    "throughput_speedup_percent": "paired_gains_percent",
}


def baselines(frame: pd.DataFrame) -> dict[str, str]:
    """Workload -> the strategy to compare with: its first baseline with a dynamic cache, else its first baseline."""
    runs = successful(frame)
    runs = runs[runs["mode"] == "baseline"]
    dynamic = runs[runs["cache_implementation"].eq("dynamic").fillna(False)]
    chosen: dict[str, str] = {}
    for candidates in (dynamic, runs):
        for workload, strategy in zip(candidates["workload"], candidates["strategy"], strict=True):
            chosen.setdefault(workload, strategy)
    return chosen


def references(frame: pd.DataFrame) -> dict[str, str]:
    """Workload -> the strategy to compare with: its baseline, or, where none succeeded but predictive runs did, its
    first exact reactive strategy, else its first reactive one."""
    chosen, runs = baselines(frame), successful(frame)
    without = runs.loc[~runs["workload"].isin(list(chosen)), ["workload", "strategy", "mode", "exact"]]
    if without.empty:
        return chosen
    reactive = without[without["mode"] == "reactive"]
    reactive = reactive[reactive["workload"].isin(unique(without[without["mode"] == "predictive"], "workload"))]
    for candidates in (reactive[reactive["exact"].fillna(True)], reactive):
        for workload, strategy in zip(candidates["workload"], candidates["strategy"], strict=True):
            chosen.setdefault(workload, strategy)
    return chosen


def compare(frame: pd.DataFrame) -> list[Comparison]:
    """Every strategy against that of `references`, in every cell in which both have a successful run; where that is a
    reactive one, only the predictive strategies."""
    chosen, comparisons = references(frame), []
    for (workload, _), cell in successful(frame).groupby(CELL, sort=False):
        by_strategy = dict(iter(cell.groupby("strategy", sort=False)))
        reference = by_strategy.pop(chosen.get(workload), None)
        if reference is not None:
            only_predictive = reference["mode"].iloc[0] != "baseline"
            comparisons += [
                _compare_runs(runs, reference)
                for runs in by_strategy.values()
                if not only_predictive or runs["mode"].iloc[0] == "predictive"
            ]
    return comparisons


def _compare_runs(runs: pd.DataFrame, reference: pd.DataFrame) -> Comparison:
    first = runs.iloc[0]
    pairs = _pairs(runs, reference)
    return Comparison(
        strategy=first["strategy"],
        mode=first["mode"],
        baseline=reference["strategy"].iloc[0],
        model=first["model"],
        context_tokens=int(first["context_tokens"]),
        n=len(runs),
        baseline_n=len(reference),
        latency_ms=spread(values(runs, "tpot_ms")),
        baseline_latency_ms=spread(values(reference, "tpot_ms")),
        latency_speedup_percent=speedup_percent(_median(reference, "tpot_ms"), _median(runs, "tpot_ms")),
        throughput_speedup_percent=_gain_percent(*(_median(side, "tokens_per_second") for side in (runs, reference))),
        gpu_memory_reduction_percent=_reduction_percent(runs, reference, "gpu_memory_mb"),
        gpu_peak_reduction_percent=_reduction_percent(runs, reference, "gpu_peak_mb"),
        device_kv_reduction_percent=_reduction_percent(runs, reference, "device_kv_mb"),
        paired_speedups_percent=_paired(pairs, "tpot_ms", lambda own, other: speedup_percent(other, own)),
        paired_gains_percent=_paired(pairs, "tokens_per_second", _gain_percent),
        paired_log_ratios=_paired(pairs, "tpot_ms", lambda own, other: log_ratio(other, own)),
    )


def _gain_percent(own: float | None, other: float | None) -> float | None:
    share = percent(own, other)
    return None if share is None else share - 100.0


def _reduction_percent(runs: pd.DataFrame, reference: pd.DataFrame, column: str) -> float | None:
    share = percent(_median(runs, column), _median(reference, column))
    return None if share is None else 100.0 - share


def _pairs(runs: pd.DataFrame, reference: pd.DataFrame) -> pd.DataFrame:
    """A row for every run that both sides have, the reference's columns ending in `_baseline`."""
    sides = [_told_apart(side, PAIR)[[*PAIR, "tpot_ms", "tokens_per_second"]] for side in (runs, reference)]
    return sides[0].merge(sides[1], on=PAIR, suffixes=("", "_baseline"), validate="one_to_one")


def _told_apart(runs: pd.DataFrame, key: Sequence[str]) -> pd.DataFrame:
    """The runs without those that share a key, as two copies of one file do: which of them belongs to a pair?"""
    return runs.drop_duplicates(list(key), keep=False)


def _paired(pairs: pd.DataFrame, column: str, formula: Callable[[float, float], float | None]) -> tuple[float, ...]:
    """`formula(own, baseline's)` for every pair that has the column on both sides."""
    measured = pairs[[column, f"{column}_baseline"]].dropna().itertuples(index=False)
    figures = [formula(own, other) for own, other in measured]
    return tuple(figure for figure in figures if figure is not None)


def _median(frame: pd.DataFrame, column: str) -> float | None:
    return spread(values(frame, column))["median"]


def average_over_cells(comparisons: Sequence[Comparison]) -> dict[str, float | None]:
    """Each compared figure, averaged over the cells that have it."""
    return {figure: spread([getattr(c, figure) for c in comparisons])["mean"] for figure in COMPARED}


def own_speedups(frame: pd.DataFrame) -> list[float | None]:
    """Of each run, in the frame's order, the baseline's TPOT in the same cell, repetition and seed / its own TPOT.

    None of the baseline itself, of runs that failed, and where there is no such pair; nothing stands in for a baseline
    here, so that the figure means the same in any folder.
    """
    chosen, place = baselines(frame), [*CELL, *PAIR]
    runs = successful(frame).dropna(subset=["tpot_ms", *place])
    of_baseline = runs[runs["strategy"] == runs["workload"].map(chosen).astype("string")]
    alone = _told_apart(of_baseline, place)
    tpot_ms = dict(zip(alone[place].itertuples(index=False, name=None), alone["tpot_ms"], strict=True))
    speedups: list[float | None] = [None] * len(frame)
    for run, *own, own_ms in runs.drop(of_baseline.index)[[*place, "tpot_ms"]].itertuples(name=None):
        speedups[run] = ratio(tpot_ms.get(tuple(own)), own_ms)
    return speedups


def overall_speedup(comparisons: Sequence[Comparison]) -> Ratio:
    """The geometric mean over cells of the median speed-up of their pairs."""
    return paired_ratio([comparison.paired_log_ratios for comparison in comparisons])


def wide_cells(frame: pd.DataFrame) -> list[tuple[str, int, float]]:
    """Strategy, context and spread in percent of each cell whose runs' TPOT has a spread above `WIDE_PERCENT`."""
    return _cells_above(WIDE_PERCENT, frame, lambda runs: spread_percent(values(runs, "tpot_ms")))


def uneven_cells(frame: pd.DataFrame) -> list[tuple[str, int, float]]:
    """Strategy, context and percent of each cell with a run whose mean time per token lies more than `UNEVEN_PERCENT`
    above its median: a few of its tokens took very long, as when something else ran on the machine. It shows in a
    single run as well, and the mean is what speed-ups are made of. The percent are those of the worst run."""
    return _cells_above(UNEVEN_PERCENT, frame, _most_above_median)


def _most_above_median(runs: pd.DataFrame) -> float | None:
    timed = runs[["tpot_ms", "itl_p50_ms"]].dropna().astype(float)
    shares = [percent(mean_ms, median_ms) for mean_ms, median_ms in timed.itertuples(index=False)]
    return max((share - 100.0 for share in shares if share is not None), default=None)


def _cells_above(
    limit: float, frame: pd.DataFrame, figure: Callable[[pd.DataFrame], float | None]
) -> list[tuple[str, int, float]]:
    """Strategy, context and figure of each cell of successful runs whose figure is above the limit."""
    cells = []
    for (strategy, _, context), runs in successful(frame).groupby(["strategy", *CELL], sort=False):
        found = figure(runs)
        if found is not None and found > limit:
            cells.append((strategy, int(context), found))
    return cells


def mean(frame: pd.DataFrame, column: str) -> float | None:
    return spread(values(frame, column))["mean"]


def repetition_std(frame: pd.DataFrame, column: str) -> float | None:
    """Standard deviation between repetitions, pooled over cells so that context lengths do not inflate it."""
    return _pooled_std(values(cell, column) for _, cell in frame.groupby(["strategy", *CELL]))


def paired_std(comparisons: Sequence[Comparison], figure: str) -> float | None:
    """Standard deviation of a compared figure between pairs of runs, pooled over cells; None where it is not paired."""
    return _pooled_std(getattr(comparison, PAIRED[figure]) for comparison in comparisons) if figure in PAIRED else None


def _pooled_std(groups: Iterable[Sequence[float]]) -> float | None:
    """Each group's deviations are from its own mean; None where no group has two values."""
    groups = [group for group in groups if len(group) > 1]
    squares = sum((len(group) - 1) * statistics.variance(group) for group in groups)
    return math.sqrt(squares / sum(len(group) - 1 for group in groups)) if groups else None


def all_match(frame: pd.DataFrame) -> bool | None:
    """Whether every run that was checked gave the baseline's tokens; None where none was checked."""
    checked = frame["matches_baseline"].dropna()
    return bool(checked.all()) if len(checked) else None
