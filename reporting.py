"""The report on results: the summary as JSON, and the front door to frame and tables. No torch, no running of models.

Values flow one way: result files -> `result_frame.py` (one row per run) -> `comparison.py` (strategies against the
baseline) -> `result_tables.py` (text) and this module (JSON), with figures drawn in `plots.py` and
`quality_plots.py`. Scores of tasks have a frame of their own, from `quality_frame.py`. Whoever only wants a report
imports this module.

The summary is for other programs, so it explains itself: `definitions` gives the formula of every figure, and
`not_measured` says of every null why there is no figure. It is strict JSON, without NaN.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comparison import (
    PAIRED,
    Comparison,
    all_match,
    average_over_cells,
    baselines,
    compare,
    mean,
    overall_speedup,
    paired_std,
    references,
    repetition_std,
    uneven_cells,
    wide_cells,
)
from definitions import DEFINITIONS, SIMULATED
from metrics import SCHEMA_VERSION, spread
from quality_frame import FIDELITY, records, task_scores
from registry import MODES
from result_frame import (
    Result,
    failed,
    is_finite,
    load_results,
    successful,
    to_frame,
    under_simulated_link,
    unique,
    values,
)
from result_tables import markdown_tables, print_tables, tables
from run_statistics import Ratio, median_with_interval
from utils import write_json

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "earlier_counts",
    "load_results",
    "markdown_tables",
    "print_tables",
    "summarise",
    "tables",
    "task_scores",
    "to_frame",
    "write_summary",
]

# Key of the summary -> the frame's column, of all that is averaged over successful runs.
SUMMARY_FILE = "experiment_summary.json"
AVERAGES = {
    "average_latency_ms": "tpot_ms",
    "average_itl_p50_ms": "itl_p50_ms",
    "average_itl_p90_ms": "itl_p90_ms",
    "average_itl_p99_ms": "itl_p99_ms",
    "average_ttft_ms": "ttft_ms",
    "average_total_ms": "e2e_ms",
    "average_tokens_per_second": "tokens_per_second",
    "average_batch_tokens_per_second": "batch_tokens_per_second",
    "average_stall_ms": "stall_ms",
    "average_stall_percent": "stall_percent",
    "average_cache_hit_rate": "hit_rate",
    "average_cache_late_rate": "late_rate",
    "average_cache_miss_rate": "miss_rate",
    "average_prediction_accuracy": "accuracy",
    "average_prefetch_coverage": "coverage",
    "average_prefetch_timeliness": "timeliness",
    "average_misprediction_cost_percent": "misprediction_cost_percent",
    "average_shadow_lru_hit_rate": "shadow_lru_hit_rate",
    "average_gain_over_lru": "gain_over_lru",
    "average_gain_over_lru_all_slots": "gain_over_lru_all_slots",
    "average_hidden_transfer_share": "hidden_transfer_share",
    "average_select_percent": "select_percent",
    "average_predict_percent": "predict_percent",
    "average_skipped_rate": "skipped_rate",
    "average_tpot_over_floor": "tpot_over_floor",
    **{f"average_{column}": column for column in FIDELITY},
    "average_gpu_memory_mb": "gpu_memory_mb",
    "average_gpu_peak_mb": "gpu_peak_mb",
    "average_device_kv_mb": "device_kv_mb",
    "average_host_kv_mb": "host_kv_mb",
    "average_rss_mb": "rss_mb",
    "average_power_w": "mean_power_w",
    "average_energy_j": "energy_j",
}
# Those whose median over runs has an interval in `by_context`.
WITH_INTERVAL = ("tpot_ms", "itl_p50_ms", "itl_p90_ms", "itl_p99_ms", "ttft_ms", "tokens_per_second")
# Those whose spread stands beside them; `by_context` has the spread of all. Latency has its own `latency_std_ms`.
SPREAD_AVERAGES = (
    "average_tokens_per_second",
    "average_stall_percent",
    "average_cache_hit_rate",
    "average_prediction_accuracy",
)


def write_summary(
    folder: str | Path,
    duration_seconds: float | None = None,
    results: Iterable[Result] | None = None,
    planned: int | None = None,
    interrupted: bool = False,
    reused: int = 0,
    problems: Sequence[str] = (),
) -> dict[str, Any]:
    """Write the summary of the results in the folder, or of those given, into `SUMMARY_FILE` there, and return it."""
    source = folder if results is None else results
    summary = summarise(source, duration_seconds, planned, interrupted, reused, problems)
    write_json(Path(folder) / SUMMARY_FILE, summary)
    return summary


def earlier_counts(folder: Path, results: Sequence[Result]) -> dict[str, Any]:
    """How a folder's results came about, as `summarise` takes it, as far as the summary that their sweep has left there
    tells; empty if there is none, or it is of other results by their number or how many succeeded."""
    try:
        counts = json.loads((folder / SUMMARY_FILE).read_text(encoding="utf-8"))["experiment_summary"]
        n_successful = sum(result.get("status") == "ok" for result in results)
        if (counts["total_experiments"], counts["successful_experiments"]) != (len(results), n_successful):
            return {}
        kept = {name: counts[f"{name}_experiments"] for name in ("planned", "reused")}
        kept |= {"duration_seconds": counts["total_duration_seconds"], "interrupted": counts["interrupted"]}
    except (OSError, ValueError, TypeError, KeyError):
        return {}
    return {} if kept["duration_seconds"] is None else kept


def summarise(
    source: str | Path | Iterable[Result],
    duration_seconds: float | None = None,
    planned: int | None = None,
    interrupted: bool = False,
    reused: int = 0,
    problems: Sequence[str] = (),
) -> dict[str, Any]:
    """The summary of a folder or of results already read, as strict JSON: no NaN, null where missing.

    Args:
        planned: how many runs there were to be, where that is known.
        interrupted: whether the sweep was stopped before it made them all.
        reused: how many of the results were there before.
        problems: a line for each file that could not be read, of results already read.
    """
    results, problems = load_results(source) if isinstance(source, str | Path) else (source, list(problems))
    results = list(results)
    frame, scores = to_frame(results), task_scores(results)
    mode_summaries = {mode: _mode_summary(frame[frame["mode"] == mode]) for mode in MODES}
    comparative_analysis = _comparative_analysis(frame)
    failures = failed(frame)[["run_id", "strategy", "context_tokens", "repetition", "status", "error"]]
    summary = {
        "schema_version": SCHEMA_VERSION,
        "experiment_summary": {
            "total_experiments": len(frame),
            "successful_experiments": len(successful(frame)),
            "total_duration_seconds": duration_seconds,
            "planned_experiments": planned,
            "interrupted": interrupted,
            "reused_experiments": reused,
        },
        "mode_summaries": mode_summaries,
        "strategy_summaries": {
            strategy: {
                "mode": runs["mode"].iloc[0],
                "link": "; ".join(unique(runs, "link")) or None,
                "warmup_runs": max(unique(runs, "warmup_runs"), default=None),
                **_averages(runs),
                "by_context": _by_context(runs),
                "task_scores": records(
                    scores[scores["strategy"] == strategy].drop(columns=["strategy", "run_id", "workload", "exact"])
                ),
            }
            for strategy, runs in frame.groupby("strategy", sort=False)
        },
        "comparative_analysis": comparative_analysis,
        "machines": unique(frame, "machine"),
        "links": unique(frame, "link"),
        "warnings": _warnings(frame),
        "failures": failures.to_dict("records"),
        "unreadable_files": problems,
        "not_measured": _not_measured(mode_summaries, comparative_analysis, _reactive_references(frame)),
        "definitions": {**DEFINITIONS, **_simulated(frame)},
    }
    return _strict(summary)


def _approximate_besides(frame: pd.DataFrame, mode: str) -> list[str]:
    """The approximate strategies of a mode that has exact ones too: its averages leave them out, for a mean over both
    would be of nothing."""
    of_mode = frame[frame["mode"] == mode]
    is_exact = of_mode["exact"].fillna(True)
    return unique(of_mode[~is_exact], "strategy") if is_exact.any() else []


def _mode_summary(runs: pd.DataFrame) -> dict[str, Any]:
    left_out = _approximate_besides(runs, runs["mode"].iloc[0]) if len(runs) else []
    return {**_averages(runs[~runs["strategy"].isin(left_out)]), "approximate_left_out": left_out}


def _averages(runs: pd.DataFrame) -> dict[str, Any]:
    done = successful(runs)
    return {
        "runs": len(runs),
        "successful_runs": len(done),
        **{key: mean(done, column) for key, column in AVERAGES.items()},
        "latency_std_ms": repetition_std(done, "tpot_ms"),
        "std": {key: repetition_std(done, AVERAGES[key]) for key in SPREAD_AVERAGES},
        "matches_baseline": all_match(done),
    }


def _simulated(frame: pd.DataFrame) -> dict[str, str]:
    """The definition of `simulated`, where some of the figures are."""
    links = [f"{', '.join(strategies)} ({link})" for link, strategies in under_simulated_link(frame).items()]
    return {"simulated": f"{SIMULATED}{'; '.join(links)}."} if links else {}


def _by_context(runs: pd.DataFrame) -> list[dict[str, Any]]:
    """For each context length, n and spread of whatever was measured there."""
    contexts = []
    for context, at_context in successful(runs).groupby("context_tokens"):
        spreads = {key.removeprefix("average_"): _spread(at_context, column) for key, column in AVERAGES.items()}
        measured = {key: figures for key, figures in spreads.items() if figures["n"]}
        contexts.append({"context_tokens": context, **measured})
    return contexts


def _spread(runs: pd.DataFrame, column: str) -> dict[str, Any]:
    measured = values(runs, column)
    return {**spread(measured), **(median_with_interval(measured) if column in WITH_INTERVAL else {})}


def _warnings(frame: pd.DataFrame) -> list[str]:
    return [
        f"{strategy} at {context} tokens: runs differ by {wide:.1f} % of their median latency"
        for strategy, context, wide in wide_cells(frame)
    ] + [
        f"{strategy} at {context} tokens: a run's mean time per token is {above:.1f} % above its median"
        for strategy, context, above in uneven_cells(frame)
    ]


def _reactive_references(frame: pd.DataFrame) -> list[str]:
    """The reactive strategies that stand in for a baseline."""
    own = baselines(frame)
    return list(dict.fromkeys(name for workload, name in references(frame).items() if workload not in own))


def _comparative_analysis(frame: pd.DataFrame) -> dict[str, Any]:
    comparisons = compare(frame)
    left_out = {mode: _approximate_besides(frame, mode) for mode in MODES if mode != "baseline"}
    by_mode = {
        mode: [c for c in comparisons if c.mode == mode and c.strategy not in besides]
        for mode, besides in left_out.items()
    }
    by_strategy: dict[str, list[Comparison]] = {}
    for comparison in comparisons:
        by_strategy.setdefault(comparison.strategy, []).append(comparison)
    return {
        "compared_with": list(dict.fromkeys(references(frame).values())),
        **{mode: _compared(own) for mode, own in by_mode.items()},
        "by_strategy": {
            strategy: {**_compared(own), "by_context": [_comparison_figures(c) for c in own]}
            for strategy, own in by_strategy.items()
        },
    }


def _compared(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    overall = overall_speedup(comparisons)
    stds = {figure: paired_std(comparisons, figure) for figure in PAIRED}
    return {"cells": len(comparisons), **average_over_cells(comparisons), "std": stds, "speedup_ratio": _ratio(overall)}


def _ratio(ratio: Ratio) -> dict[str, Any]:
    return {**dataclasses.asdict(ratio), "verdict": ratio.verdict}


def _comparison_figures(comparison: Comparison) -> dict[str, Any]:
    figures = dataclasses.asdict(comparison)
    figures["paired_speedup_percent"] = spread(figures.pop("paired_speedups_percent"))
    figures["paired_throughput_percent"] = spread(figures.pop("paired_gains_percent"))
    del figures["paired_log_ratios"]
    figures["speedup_ratio"] = _ratio(comparison.speedup)
    return figures


NO_REPETITIONS = "no context has two successful repetitions, which a spread needs"
ONLY_PAGED = ("cache", "stall", "host_kv", "floor", "lru", "transfer", "select", "skipped")  # in keys of paged modes
NO_PAIR = "no repetition succeeded on both sides with a latency"
FEW_PAIRS = "a cell has fewer than two pairs, which an interval needs"


def _not_measured(
    mode_summaries: dict[str, Any], comparative_analysis: dict[str, Any], reactive_references: Sequence[str]
) -> dict[str, str]:
    """Why a figure is null, by its path in the summary."""
    reasons = {}
    for mode, figures in mode_summaries.items():
        for key in (key for key, value in figures.items() if value is None):
            reasons[f"mode_summaries.{mode}.{key}"] = _why_null(mode, key, figures["successful_runs"])
        for key in (key for key, value in figures["std"].items() if value is None):
            reason = NO_REPETITIONS if figures[key] is not None else reasons[f"mode_summaries.{mode}.{key}"]
            reasons[f"mode_summaries.{mode}.std.{key}"] = reason
        compared = comparative_analysis.get(mode, {})
        for key in (key for key, value in compared.items() if value is None):
            reasons[f"comparative_analysis.{mode}.{key}"] = _why_not_compared(
                mode, compared["cells"], reactive_references
            )
        for key in (key for key, value in compared.get("std", {}).items() if value is None):
            unknown = compared[key] is None
            reason = _why_not_compared(mode, compared["cells"], reactive_references) if unknown else NO_REPETITIONS
            reasons[f"comparative_analysis.{mode}.std.{key}"] = reason
        ratio = compared.get("speedup_ratio", {})
        for key in (key for key, value in ratio.items() if value is None):
            reason = NO_PAIR if compared["cells"] else _why_not_compared(mode, 0, reactive_references)
            reasons[f"comparative_analysis.{mode}.speedup_ratio.{key}"] = FEW_PAIRS if ratio["n_pairs"] else reason
    return reasons


def _why_null(mode: str, key: str, successful_runs: int) -> str:
    if not successful_runs:
        return f"no {mode} run succeeded"
    if mode == "baseline" and key == "matches_baseline":
        return "the baseline is what tokens are compared with"
    if key == "latency_std_ms":
        return NO_REPETITIONS
    if mode == "baseline" and "recall" in key:
        return "the baseline reads all of its cache"
    if AVERAGES.get(key) in FIDELITY:
        return "no run's fidelity was measured, which a quality block asks for"
    if mode == "baseline" and any(word in key for word in ONLY_PAGED):
        return "the baseline does not page its cache"
    if mode != "predictive" and any(word in key for word in ("predict", "prefetch")):
        return f"{mode} runs do not prefetch"
    if "gpu" in key:
        return "no run recorded GPU memory, which needs a CUDA device"
    if "power" in key or "energy" in key:
        return "no run recorded power, which needs a GPU that NVML can read"
    return f"no {mode} run has a value for it"


def _why_not_compared(mode: str, cells: int, reactive_references: Sequence[str]) -> str:
    if not cells and mode == "reactive" and reactive_references:
        return f"no baseline run succeeded; predictive runs were compared with {', '.join(reactive_references)}"
    if not cells:
        return f"no cell holds both a successful {mode} run and one of its baseline"
    return "no cell has a value for it on both sides"


def _strict(value: Any) -> Any:
    """Plain JSON values, with null for NA, NaN and infinity."""
    if isinstance(value, Mapping):
        return {str(key): _strict(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(inner) for inner in value]
    if value is None or isinstance(value, str | bool):
        return value
    number = value.item() if hasattr(value, "item") else value  # numpy's numbers are not JSON's
    return number if isinstance(number, int | float) and is_finite(number) else None
