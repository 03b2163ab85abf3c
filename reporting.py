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
from intervals import RESAMPLES
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
from run_statistics import UNEVEN_PERCENT, WIDE_PERCENT, Ratio, median_with_interval
from utils import write_json

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
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

DEFINITIONS = {
    "total_experiments": "Runs made, also those that failed; each repetition at each context is one.",
    "total_duration_seconds": "Wall-clock seconds of the runs that this command made, with loading and quality; and of"
    " each of the reused_experiments the duration of its own run, without them.",
    "reused_experiments": "Results that were there before, of a sweep that was resumed or of a folder that was only"
    " summarised.",
    "planned_experiments": "Runs there were to be; an interrupted sweep made fewer. Null where it was not said.",
    "average_*": "Arithmetic mean over the successful runs of the mode or strategy, all contexts together. Where a mode"
    " has exact and approximate strategies, over the exact ones; approximate_left_out names the others.",
    "std": "Standard deviation between repetitions, in the unit of the figure, pooled over context lengths; of the"
    " successful_runs, or for a compared figure of the pairs that paired_* are.",
    "latency_ms": "TPOT = (E2E - TTFT) / (N - 1): decode time per token in milliseconds, for N tokens.",
    "latency_std_ms": "Standard deviation of latency between repetitions, pooled over context lengths.",
    "itl_p50_ms, itl_p90_ms, itl_p99_ms": "Percentiles of the times between a run's tokens in decode, each run's own;"
    " averaged over runs.",
    "by_context": "Of the successful runs at one context length n, mean, median, std, min and max; low and high: 95 %"
    f" percentile bootstrap interval of the median over runs, {RESAMPLES} resamples, null of fewer than two runs.",
    "warmup_runs": "Runs made and thrown away before the first repetition of a strategy at a context length; no figure"
    " here has them in it.",
    "warnings": "Cells whose runs differ by more than"
    f" {WIDE_PERCENT:g} %: 100 x (largest - smallest) / median of latency_ms over runs; and cells with a run whose"
    f" latency_ms is more than {UNEVEN_PERCENT:g} % above its itl_p50_ms, as a few of its tokens took very long.",
    "ttft_ms": "Time from start to first token in milliseconds: the prefill.",
    "tokens_per_second": "N / E2E of one sequence, prefill included; batch_tokens_per_second: x batch.",
    "cache_hit_rate": "Hits / accesses in decode, 0 to 1; an access is a page wanted by a layer in a step, a hit one"
    " that was there in time.",
    "cache_late_rate": "Late / accesses in decode, 0 to 1; late is a page whose copy was already on its way and for"
    " which computing had to wait.",
    "cache_miss_rate": "Misses / accesses in decode, 0 to 1; a miss is a page whose copy was asked for only then.",
    "stall_percent": "100 x time compute waited for pages in decode / decode time.",
    "prediction_accuracy": "Useful / issued prefetches in decode, 0 to 1; useful: on time or late.",
    "prefetch_coverage": "Useful prefetches / (useful prefetches + misses), 0 to 1.",
    "prefetch_timeliness": "Prefetches on time / useful prefetches, 0 to 1.",
    "misprediction_cost_percent": "100 x bytes prefetched and not used by the end / bytes copied to the device.",
    "gain_over_lru": "cache_hit_rate less shadow_lru_hit_rate, which plain LRU of the same max_gpu_pages would have had"
    " on the same requests; gain_over_lru_all_slots: less that of an LRU that held pages in the staging slots too.",
    "select_percent, predict_percent": "100 x time for choosing pages, for predicting them / decode time.",
    "hidden_transfer_share": "Share of the time in which pages moved to the device that computing did not wait for.",
    "skipped_rate": "Accesses that a step did without ('on_miss: skip') / accesses, 0 to 1.",
    "tpot_over_floor": "TPOT / max(compute per step, bytes that must move per step / link bandwidth).",
    "kl_mean": "Kullback-Leibler divergence of the run's next-token distribution from the baseline's, in nats, mean"
    " over the steps in which both read the same text; 0: the same.",
    "kl_max": "Largest of those divergences in a run, in nats.",
    "top1_agreement": "Steps in which run and baseline find the same token likeliest / steps, 0 to 1.",
    "perplexity": "exp of the mean negative log-likelihood of the text's tokens, read with the run's cache.",
    "baseline_perplexity": "The same, read with the baseline's cache.",
    "attention_mass_recall": "True attention on the pages that were read / all of it, mean over steps, 0 to 1.",
    "page_recall": "Of the k pages with the most true attention, k being how many were read, the share read, 0 to 1.",
    "task_scores": "Of each task and prompt length (tokens) the mean score of its n items, 0 to 1, its 95 % confidence"
    " interval from low to high, and the baseline's on the same items; discriminates: false where the baseline's own"
    " score is so low that the task tells nothing of a cache.",
    "*_mb": "MiB: 2^20 bytes.",
    "device_kv_mb": "Bytes of KV cache on the device, page pool and staging slots together, / 2^20.",
    "cell": "Runs of one workload (model, batch, generation settings, dtype, device) at one context length.",
    "latency_speedup_percent": "100 x (baseline latency_ms / latency_ms - 1), medians over the repetitions"
    " of a cell, averaged over cells; negative is slower.",
    "throughput_speedup_percent": "100 x (tokens_per_second / baseline tokens_per_second - 1), medians"
    " over the repetitions of a cell, averaged over cells.",
    "speedup_ratio": "Latency of compared_with / latency_ms of each repetition against the same one of compared_with,"
    " above 1 is faster; ratio: median over the pairs of a cell, over cells the geometric mean of the medians; low and"
    " high: its 95 % interval, resampling pairs within cells; verdict: 'no difference shown' where 1 lies within. Up to"
    " 5 pairs the interval of a cell is their range, which holds the true median in 1 - 2^(1 - n) of cases: 75 % for"
    " n = 3.",
    "*_reduction_percent": "100 x (1 - MiB / baseline MiB), medians over the repetitions of a cell, averaged.",
    "paired_speedup_percent": "latency_speedup_percent of each repetition against the baseline's same one.",
    "paired_throughput_percent": "throughput_speedup_percent of each repetition against the baseline's same one.",
    "link": "What pages travelled over, of each strategy that pages; null for one that does not.",
    "compared_with": "Of each workload the first baseline with a dynamic cache, else the first baseline; where no"
    " baseline succeeded, the first reactive strategy, with which the predictive ones are compared, and 'baseline' in"
    " comparative_analysis means that one.",
    "matches_baseline": "Whether all runs that were checked gave the baseline's tokens; null if none was.",
}
SIMULATED = (
    "The link was simulated: real copies, delayed as a bus of that bandwidth and latency would delay them. Stall, hits,"
    " lateness and whatever is derived from waiting (latency, tokens per second, speed-up, coverage, timeliness, floor)"
    " are under that link, not measurements of a bus. Strategies: "
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
    """Write `experiment_summary.json`, for the results in the folder or those given, and return it."""
    source = folder if results is None else results
    summary = summarise(source, duration_seconds, planned, interrupted, reused, problems)
    write_json(Path(folder) / "experiment_summary.json", summary)
    return summary


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
