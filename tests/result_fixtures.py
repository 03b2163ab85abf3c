"""Made-up results for tests, easy to calculate with by hand. They are no measurements.

`make_result` is one run, `make_failure` one that did not finish, `make_sweep` a small experiment of three strategies,
`write_results` its folder. They hold what reports read; `whole_result` is a run as the schema has it, with every block.
"""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path

from metrics import RunResult
from utils import write_json

PAGED = {
    "page_size": 128,
    "max_gpu_pages": 4,
    "staging_pages": 2,
    "policy": "lru",
    "selector": "all",
    "link": "auto",
}
LINK = {"kind": "simulated", "name": "pcie3-x16", "bandwidth_gb_s": 15.75, "latency_us": 10.0}
MIB = 2**20
MEASURED = (
    "environment",
    "model",
    "context",
    "timing",
    "memory",
    "power",
    "cache",
    "prefetch",
    "quality",
    "steps",
)


def make_result(mode="baseline", context=500, repetition=0, tpot_ms=100.0, ttft_ms=1000.0, n_tokens=11, **spec):
    """A successful run whose every token takes `tpot_ms`, so that E2E = TTFT + (N - 1) x TPOT."""
    e2e_ms = ttft_ms + (n_tokens - 1) * tpot_ms
    return {
        "schema_version": 1,
        "run_id": f"{mode[:4]}-{spec.get('name', mode)}-{context}-{repetition}",
        "status": "ok",
        "error": None,
        "started_at": f"2030-01-01T00:00:{repetition:02d}",
        "spec": {
            "mode": mode,
            "name": mode,
            "model_name": "tiny",
            "context_length": context,
            "requested_context_length": context,
            "repetition": repetition,
            "seed": 0,
            "max_new_tokens": n_tokens,
            "batch_size": 1,
            "do_sample": False,
            "quantization": None,
            "cache_implementation": "dynamic" if mode == "baseline" else None,
            "paging": None if mode == "baseline" else dict(PAGED),
            "prefetch": {"predictor": "layer_ahead", "prefetch_k": 2} if mode == "predictive" else None,
            **spec,
        },
        "environment": {"cpu": "Test CPU", "torch_threads": 2, "gpus": []},
        "model": {"random_weights": False, "device": "cpu"},
        "context": {"requested_tokens": context, "tokens": context, "clamped": False, "reason": None},
        "timing": {
            "n_tokens": n_tokens,
            "ttft_ms": ttft_ms,
            "e2e_ms": e2e_ms,
            "itl_ms": [tpot_ms] * (n_tokens - 1),
            "tpot_ms": tpot_ms,
            "tokens_per_second": 1000.0 * n_tokens / e2e_ms,
            "batch_tokens_per_second": 1000.0 * n_tokens / e2e_ms,
        },
        "memory": {
            "gpu_memory_mb": None,
            "gpu_peak_mb": None,
            "device_kv_bytes": 80 * MIB if mode == "baseline" else 40 * MIB,
            "staging_bytes": None if mode == "baseline" else 10 * MIB,
            "host_kv_bytes": None if mode == "baseline" else 80 * MIB,
        },
        "power": {"mean_power_w": None, "energy_j": None},
        "cache": None if mode == "baseline" else make_cache(n_tokens - 1),
        "prefetch": make_prefetch() if mode == "predictive" else None,
        "quality": {
            "exact": True,
            "matches_baseline": None if mode == "baseline" else True,
            "first_divergent_token": None,
        },
        "steps": None if mode == "baseline" else [make_step(step) for step in range(n_tokens)],
    }


@cache
def _of_the_sample(mode):
    folder = Path(__file__).parent.parent / "logs" / "sample"
    return json.loads(min(folder.glob(f"{mode}_*.json")).read_text())


def whole_result(spec, ids=((1, 2),), **blocks):
    """The result of a `RunSpec` with every block, all but the spec and the tokens from the sample of that mode.

    Of the blocks given, dicts are laid over the sample's.
    """
    result = copy.deepcopy(_of_the_sample(spec.mode))
    del result["schema_version"]
    result |= {"spec": spec.to_dict(), "run_id": spec.run_id}
    result["timing"] |= {"n_tokens": len(ids[0]), "tpot_ms": 1.0}
    result["tokens"] = {"sha256": "0" * 64, "ids": [list(row) for row in ids], "text": None}
    result["quality"] = {"exact": spec.exact, "matches_baseline": None, "first_divergent_token": None}
    for name, block in blocks.items():
        result[name] = {**result[name], **block} if isinstance(block, dict) else block
    return RunResult(**result)


def make_cache(n_steps):
    return {
        "hit_rate": 0.75,
        "late_rate": 0.05,
        "miss_rate": 0.2,
        "gain_over_lru": 0.125,
        "stall_ms": 50.0,
        "stall_percent": 5.0,
        "link": dict(LINK),
        "floor": {"tpot_over_floor": 1.25},
        "by_layer": [{"layer": layer, "hits": 3 * n_steps, "accesses": 4 * n_steps} for layer in range(3)],
    }


def make_prefetch():
    """20 issued, 12 on time, 4 late, 4 wasted; 9 pages were missed besides."""
    return {
        "issued": 20,
        "useful": 16,
        "on_time": 12,
        "late": 4,
        "wasted": 4,
        "accuracy": 0.8,
        "coverage": 0.64,
        "timeliness": 0.75,
        "misprediction_cost_percent": 16.0,
    }


def make_step(step):
    counts = {"hits": 9, "late": 1, "misses": 2, "prefetch_issued": 4, "prefetch_wasted": 1}
    return {"step": step, "phase": "decode" if step else "prefill", **counts}


def make_failure(result, status="out_of_memory", error="CUDA out of memory"):
    return {**result, "status": status, "error": error, **dict.fromkeys(MEASURED)}


FIDELITY = {
    "reference": "transformers' dynamic cache",
    "n_tokens": 64,
    "kl_mean": 0.0,
    "kl_low": 0.0,
    "kl_high": 0.0,
    "kl_max": 0.0,
    "top1_agreement": 1.0,
    "top1_low": 0.943,  # Wilson's of 64 in 64
    "top1_high": 1.0,
    "perplexity": 12.3,
    "baseline_perplexity": 12.3,
    "attention_mass_recall": 1.0,
    "page_recall": 1.0,
    "attended_pages": 16.0,
    "pages": 16.0,
}


def with_fidelity(result, **figures):
    """The same run, with its fidelity measured: that of an exact one, but for the figures given."""
    return {**result, "quality": {**result["quality"], "fidelity": {**FIDELITY, **figures}}}


def with_tasks(result, *tasks):
    return {**result, "quality": {**result["quality"], "tasks": list(tasks)}}


def approximately(result, matches_baseline=False):
    """The same run, of a setting that reads only a part of its pages."""
    quality = {**result["quality"], "exact": False, "matches_baseline": matches_baseline}
    return {**result, "quality": quality}


def make_task(scores, baseline_scores, task="passkey", tokens=1000, depths=None):
    """A task whose items lie at equal distances, or at the depths given. Its intervals are the mean +- 0.25."""
    depths = [index / (len(scores) - 1) for index in range(len(scores))] if depths is None else depths
    baseline = make_score(baseline_scores)
    return {
        "task": task,
        "unit": "share",
        "tokens": tokens,
        **make_score(scores),
        "baseline": baseline,
        "discriminates": baseline["mean"] >= 0.5,
        "attended_pages": 4.0,
        "pages": 16.0,
        "items": [
            {"depth": depth, "score": score, "baseline_score": baseline_score}
            for depth, score, baseline_score in zip(depths, scores, baseline_scores, strict=True)
        ],
    }


def make_score(scores):
    mean = sum(scores) / len(scores)
    return {"n": len(scores), "mean": mean, "low": max(0.0, mean - 0.25), "high": min(1.0, mean + 0.25)}


def make_sweep(contexts=(500, 1000), repetitions=3):
    """Baseline 100 ms a token, reactive 80 ms, predictive 50 ms; each repetition takes 1 ms more."""
    speeds_ms = {"baseline": 100.0, "reactive": 80.0, "predictive": 50.0}
    return [
        make_result(mode, context, repetition, tpot_ms + repetition)
        for context in contexts
        for repetition in range(repetitions)
        for mode, tpot_ms in speeds_ms.items()
    ]


def write_results(folder: Path, results) -> Path:
    for result in results:
        write_json(folder / f"{result['spec']['mode']}_{result['run_id']}.json", result)
    return folder
