"""Strategies against the baseline: only like with like, median against median, and then averaged.

Runs compare inside a **cell**, that is, one workload at one context length (see `result_frame.py`). In each cell the
medians over repetitions are compared, since one slow outlier moves a mean but not a median, and only then are cells
averaged. So a strategy that ran out of memory at the longest context is not made to look fast by it.

Runs are interleaved: repetition 3 of every strategy follows upon repetition 3 of the baseline. Such a pair shares
what the machine did meanwhile, so the spread of a speed-up is taken over pairs; a machine that slows down for a
minute slows down both.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from metrics import percent, speedup_percent, spread
from result_frame import CELL, successful, values

if TYPE_CHECKING:
    import pandas as pd


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One strategy against the baseline in one cell; figures compare medians over repetitions.

    The `paired_…` figures have one entry per repetition that both ran.
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


def compare(frame: pd.DataFrame) -> list[Comparison]:
    """Every strategy against its baseline, in every cell in which both have a successful run."""
    references, comparisons = baselines(frame), []
    for (workload, _), cell in successful(frame).groupby(CELL, sort=False):
        by_strategy = dict(iter(cell.groupby("strategy", sort=False)))
        reference = by_strategy.pop(references.get(workload), None)
        if reference is not None:
            comparisons += [_compare_runs(runs, reference) for runs in by_strategy.values()]
    return comparisons


def _compare_runs(runs: pd.DataFrame, reference: pd.DataFrame) -> Comparison:
    first = runs.iloc[0]
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
        paired_speedups_percent=_paired(runs, reference, "tpot_ms", lambda own, other: speedup_percent(other, own)),
        paired_gains_percent=_paired(runs, reference, "tokens_per_second", _gain_percent),
    )


def _gain_percent(own: float | None, other: float | None) -> float | None:
    share = percent(own, other)
    return None if share is None else share - 100.0


def _reduction_percent(runs: pd.DataFrame, reference: pd.DataFrame, column: str) -> float | None:
    share = percent(_median(runs, column), _median(reference, column))
    return None if share is None else 100.0 - share


def _paired(
    runs: pd.DataFrame,
    reference: pd.DataFrame,
    column: str,
    formula: Callable[[float, float], float | None],
) -> tuple[float, ...]:
    """`formula(own, baseline's)` for every repetition that both ran."""
    needed = ["repetition", column]  # to merge all of a hundred columns takes ten times as long
    pairs = runs[needed].merge(reference[needed], on="repetition", suffixes=("", "_baseline"))
    measured = pairs[[column, f"{column}_baseline"]].dropna().itertuples(index=False)
    figures = [formula(own, other) for own, other in measured]
    return tuple(figure for figure in figures if figure is not None)


def _median(frame: pd.DataFrame, column: str) -> float | None:
    return spread(values(frame, column))["median"]


def average_over_cells(comparisons: Sequence[Comparison]) -> dict[str, float | None]:
    """Each compared figure, averaged over the cells that have it."""
    return {figure: spread([getattr(c, figure) for c in comparisons])["mean"] for figure in COMPARED}


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
