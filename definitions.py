"""What the figures of a summary mean: the formula of each, in the words that the summary itself carries.

One key may speak for several, such as `average_*`, whichever mode or strategy they are of.
"""

from __future__ import annotations

from intervals import RESAMPLES
from run_statistics import UNEVEN_PERCENT, WIDE_PERCENT

DEFINITIONS = {
    "total_experiments": "Runs made, also those that failed; each repetition at each context is one.",
    "total_duration_seconds": "Wall-clock seconds of the runs that the sweep made, with loading and quality; and of"
    " each of the reused_experiments the duration of its own run, without them.",
    "reused_experiments": "Results that were there before the sweep, which was resumed; or all, where results were put"
    " into a folder that no sweep has left its counts in.",
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
