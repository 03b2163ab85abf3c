"""Result files, and the frame they make: one row per run. Everything a report says is a view of that frame.

`load_results` reads what runs left behind and names what it could not read; `to_frame` lays results out in typed
columns. Two columns say which rows belong together:

* `strategy` is the way of keeping the cache, the same over repetitions and context lengths;
* `workload` is what a run was asked to do (model, batch, generation settings, dtype, device). A workload at one
  context length is a **cell**, and only runs of one cell did the same work.

Missing stays missing: whatever is not a finite number of the right type is NA, and never 0.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metrics import ITL_PERCENTILES, SCHEMA_VERSION, percent, percentile, ratio
from registry import MODES, choice_text

if TYPE_CHECKING:  # takes long to import, and whoever only asks for help should not wait for it
    import pandas as pd

Result = Mapping[str, Any]

BYTES_PER_MIB = 2**20  # as GPU memory is counted

# The fields that make a workload. The seed is left out: it differs between the repetitions of a sampled run, which
# belong together.
WORKLOAD_FIELDS = (
    "model_name",
    "batch_size",
    "max_new_tokens",
    "dtype",
    "device",
    "device_map",
    "quantization",
    "do_sample",
    "temperature",
    "top_p",
    "top_k",
    "stop_at_eos",
)
CELL = ["workload", "context_tokens"]
# What differs between the runs of one strategy.
_PER_RUN_FIELDS = ("name", "context_length", "requested_context_length", "repetition", "seed")


# ----------------------------------------------------------------------------------------------------------------------
# Files -> results
# ----------------------------------------------------------------------------------------------------------------------


def load_results(folder: str | Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The results in a folder, and a line for each file that could not be read as one.

    Files are `<mode>_*.json`; results come baseline first, then in the order in which they were run.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return [], [f"{folder}: no such folder"]
    results, problems = [], []
    for path in sorted(path for mode in MODES for path in folder.glob(f"{mode}_*.json")):
        try:
            results.append(read_result(path))
        except (OSError, ValueError, RecursionError) as error:
            problems.append(f"{path}: {error}")
    return sorted(results, key=lambda result: (mode_rank(result), str(result.get("started_at") or ""))), problems


def read_result(path: Path) -> dict[str, Any]:
    result = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    if not isinstance(result, dict):
        raise ValueError("not a result: the file holds no JSON object")
    version = result.get("schema_version")
    if version != SCHEMA_VERSION:
        raise ValueError(f"schema_version is {version!r}, this program reads {SCHEMA_VERSION}; run it again to compare")
    mode = dig(result, "spec.mode")
    if mode not in list(MODES):
        raise ValueError(f"not a result: spec.mode is {mode!r}, not one of {', '.join(MODES)}")
    return result


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"not strict JSON: it holds {name}")


def mode_rank(result: Result) -> int:
    """Baseline, reactive, predictive: the order of the registry, and of every table and plot."""
    return list(MODES).index(result["spec"]["mode"])


# ----------------------------------------------------------------------------------------------------------------------
# Results -> frame
# ----------------------------------------------------------------------------------------------------------------------

# Column of the frame -> where its value stands in a result.
_TEXT = {
    "mode": "spec.mode",
    "run_id": "run_id",
    "model": "spec.model_name",
    "cache_implementation": "spec.cache_implementation",
    "clamp_reason": "context.reason",
    "link_kind": "cache.link.kind",
    "error": "error",
    "quality_error": "quality.error",
    "quality_reference": "quality.fidelity.reference",
}
# What a config names, with its parameters; or a number that only some strategies have.
_CHOICES = {
    "policy": "spec.paging.policy",
    "selector": "spec.paging.selector",
    "predictor": "spec.prefetch.predictor",
}
_COUNTS = {
    "repetition": "spec.repetition",
    "seed": "spec.seed",
    "batch_size": "spec.batch_size",
    "max_new_tokens": "spec.max_new_tokens",
    "warmup_runs": "spec.warmup_runs",
    "requested_tokens": "context.requested_tokens",
    "page_size": "spec.paging.page_size",
    "n_pages": "cache.n_pages",
    "attended_pages": "cache.attended_pages",
    "max_gpu_pages": "spec.paging.max_gpu_pages",
    "staging_pages": "spec.paging.staging_pages",
    "attention_pages": "spec.paging.attention_pages",
    "prefetch_k": "spec.prefetch.prefetch_k",
    "prefetch_issued": "prefetch.issued",
    "prefetch_useful": "prefetch.useful",
    "prefetch_on_time": "prefetch.on_time",
    "prefetch_late": "prefetch.late",
    "prefetch_wasted": "prefetch.wasted",
    "prefetch_declined": "prefetch.declined",
    "pollution": "prefetch.pollution",
    "fidelity_tokens": "quality.fidelity.n_tokens",
    "first_divergent_token": "quality.first_divergent_token",
}
_NUMBERS = {
    "attention_fraction": "spec.paging.attention_fraction",
    "link_gb_s": "cache.link.bandwidth_gb_s",
    "ttft_ms": "timing.ttft_ms",
    "tpot_ms": "timing.tpot_ms",
    "e2e_ms": "timing.e2e_ms",
    "tokens_per_second": "timing.tokens_per_second",
    "batch_tokens_per_second": "timing.batch_tokens_per_second",
    "stall_ms": "cache.stall_ms",
    "stall_percent": "cache.stall_percent",
    "hit_rate": "cache.hit_rate",
    "late_rate": "cache.late_rate",
    "miss_rate": "cache.miss_rate",
    "shadow_lru_hit_rate": "cache.shadow_lru_hit_rate",
    "gain_over_lru": "cache.gain_over_lru",
    "shadow_lru_all_slots_hit_rate": "cache.shadow_lru_all_slots_hit_rate",
    "gain_over_lru_all_slots": "cache.gain_over_lru_all_slots",
    "skipped_rate": "cache.skipped_rate",
    "hidden_transfer_share": "cache.hidden_transfer_share",
    "select_ms": "cache.stages.select_ms",
    "predict_ms": "cache.stages.predict_ms",
    "copy_ms": "cache.stages.copy_ms",
    "attend_ms": "cache.stages.attend_ms",
    "tpot_over_floor": "cache.floor.tpot_over_floor",
    "accuracy": "prefetch.accuracy",
    "coverage": "prefetch.coverage",
    "timeliness": "prefetch.timeliness",
    "misprediction_cost_percent": "prefetch.misprediction_cost_percent",
    "kl_mean": "quality.fidelity.kl_mean",
    "kl_low": "quality.fidelity.kl_low",
    "kl_high": "quality.fidelity.kl_high",
    "kl_max": "quality.fidelity.kl_max",
    "top1_agreement": "quality.fidelity.top1_agreement",
    "top1_low": "quality.fidelity.top1_low",
    "top1_high": "quality.fidelity.top1_high",
    "perplexity": "quality.fidelity.perplexity",
    "baseline_perplexity": "quality.fidelity.baseline_perplexity",
    "attention_mass_recall": "quality.fidelity.attention_mass_recall",
    "page_recall": "quality.fidelity.page_recall",
    "fidelity_attended_pages": "quality.fidelity.attended_pages",
    "fidelity_pages": "quality.fidelity.pages",
    "gpu_memory_mb": "memory.gpu_memory_mb",
    "gpu_peak_mb": "memory.gpu_peak_mb",
    "gpu_delta_mb": "memory.gpu_delta_mb",
    "rss_mb": "memory.rss_mb",
    "rss_delta_mb": "memory.rss_delta_mb",
    "mean_power_w": "power.mean_power_w",
    "energy_j": "power.energy_j",
}
_BYTES = {
    "device_kv_mb": "memory.device_kv_bytes",
    "staging_mb": "memory.staging_bytes",
    "digest_mb": "memory.digest_bytes",
    "host_kv_mb": "memory.host_kv_bytes",
    "disk_kv_mb": "memory.disk_kv_bytes",
    "kv_total_mb": "memory.kv_bytes_total",
}
_FLAGS = {
    "clamped": "context.clamped",
    "exact": "quality.exact",
    "text_repeats": "quality.fidelity.text_repeats",
    "matches_baseline": "quality.matches_baseline",
    "random_weights": "model.random_weights",
}


def to_frame(results: Iterable[Result]) -> pd.DataFrame:
    """One row per run, baseline first; missing values are NA.

    The columns are those named above, and `strategy` (its label), `status`, `workload`, `context_tokens` (what the
    prompt had, or, for a run that did not get so far, was to have), `prefetch_hit_rate`, `itl_p50_ms`, `itl_p90_ms` and
    `itl_p99_ms` (percentiles of the run's own times between tokens), and `link` and `machine` in words. Rates are
    fractions; `_mb` is MiB, 2^20 bytes. Of an experiment's repetitions only the first has its fidelity measured
    (`kl_mean` in nats, and so on), since the others give the same; scores of tasks are in `quality_frame.py`.
    """
    import pandas as pd

    results = sorted(results, key=mode_rank)
    columns = {"strategy": pd.array(strategy_labels(results), dtype="string")}
    for name, read, dtype in (
        ("status", _status, "string"),
        ("workload", workload, "string"),
        ("context_tokens", context_tokens, "Int64"),
        ("prefetch_hit_rate", _prefetch_hit_rate, "Float64"),
        ("select_percent", partial(_stage_percent, "select_ms"), "Float64"),
        ("predict_percent", partial(_stage_percent, "predict_ms"), "Float64"),
        *((f"itl_p{share}_ms", partial(_itl_percentile, share), "Float64") for share in ITL_PERCENTILES),
        ("link", describe_link, "string"),
        ("machine", _describe_machine, "string"),
    ):
        columns[name] = pd.array([read(result) for result in results], dtype=dtype)
    for paths, read_at, dtype in (
        (_TEXT, text_at, "string"),
        (_CHOICES, _choice_at, "string"),
        (_COUNTS, count_at, "Int64"),
        (_NUMBERS, number_at, "Float64"),
        (_BYTES, _megabytes, "Float64"),
        (_FLAGS, flag_at, "boolean"),
    ):
        for name, path in paths.items():
            columns[name] = pd.array([read_at(result, path) for result in results], dtype=dtype)
    return pd.DataFrame(columns)


def strategy_labels(results: Sequence[Result]) -> list[str]:
    """The label of each result's strategy: its name.

    Where one name stands for several settings, as when a folder holds the results of two experiments, the settings
    that differ are added: `reactive (max_gpu_pages=8)`.
    """
    names = [text_at(result, "spec.name") or result["spec"]["mode"] for result in results]
    settings = [_strategy_setting(result["spec"]) for result in results]
    namesakes: dict[str, list[dict[str, str]]] = {}
    for name, setting in zip(names, settings, strict=True):
        namesakes.setdefault(name, []).append(setting)
    differing = {name: _differing_keys(group) for name, group in namesakes.items()}
    labels = []
    for name, setting in zip(names, settings, strict=True):
        details = [f"{key}={setting[key]}" for key in differing[name] if key in setting]
        labels.append(f"{name} ({', '.join(details)})" if details else name)
    return labels


def _strategy_setting(spec: Mapping[str, Any]) -> dict[str, str]:
    """The spec without what varies from run to run, its blocks laid flat."""
    flat: dict[str, Any] = {}
    for key, value in spec.items():
        flat.update(value if key in ("paging", "prefetch") and isinstance(value, Mapping) else {key: value})
    return {key: _setting_text(value) for key, value in flat.items() if key not in _PER_RUN_FIELDS}


def _setting_text(value: Any) -> str:
    """`lru`, or for a part with parameters `lru(k=2)`."""
    if not isinstance(value, Mapping):
        return str(value)
    parameters = ", ".join(f"{key}={parameter}" for key, parameter in value.items() if key != "name")
    return f"{value.get('name', '')}({parameters})"


def _differing_keys(settings: Sequence[Mapping[str, str]]) -> list[str]:
    keys = dict.fromkeys(key for setting in settings for key in setting)
    return [key for key in keys if len({setting.get(key) for setting in settings}) > 1]


def _status(result: Result) -> str:
    return text_at(result, "status") or "unknown"


def workload(result: Result) -> str:
    """What a run was asked to do, as one comparable text."""
    return json.dumps({field: result["spec"].get(field) for field in WORKLOAD_FIELDS})


def context_tokens(result: Result) -> int | None:
    """Tokens of prompt that the run had, or, if it did not get so far, was to have."""
    tokens = count_at(result, "context.tokens")
    return tokens if tokens is not None else count_at(result, "spec.context_length")


def _prefetch_hit_rate(result: Result) -> float | None:
    """Prefetched pages that were there in time, so that nothing waited for them / prefetches issued."""
    return ratio(number_at(result, "prefetch.on_time"), number_at(result, "prefetch.issued"))


def _stage_percent(stage: str, result: Result) -> float | None:
    """A stage of paging, as a percentage of decode time."""
    return percent(number_at(result, f"cache.stages.{stage}"), number_at(result, "timing.decode_ms"))


def _itl_percentile(share: float, result: Result) -> float | None:
    """From the times themselves, which every result has; one that is no number makes them all suspect."""
    times_ms = dig(result, "timing.itl_ms")
    if not isinstance(times_ms, list) or any(number_at({"ms": ms}, "ms") is None for ms in times_ms):
        return None
    return percentile(times_ms, share)


def describe_link(result: Result) -> str | None:
    """`simulated pcie3-x16, 15.75 GB/s`, as far as it is known."""
    kind, name = text_at(result, "cache.link.kind"), text_at(result, "cache.link.name")
    words = " ".join(dict.fromkeys(word for word in (kind, name) if word))
    bandwidth_gb_s = number_at(result, "cache.link.bandwidth_gb_s")
    return f"{words}, {bandwidth_gb_s:g} GB/s" if bandwidth_gb_s else words or None


def _describe_machine(result: Result) -> str | None:
    """The GPUs of a run that used them, else the CPU and its threads."""
    gpus, device = dig(result, "environment.gpus"), text_at(result, "model.device") or ""
    if isinstance(gpus, list) and gpus and not device.startswith("cpu"):
        return " + ".join(map(str, gpus))
    cpu, threads = text_at(result, "environment.cpu"), count_at(result, "environment.torch_threads")
    return f"{cpu}, {threads} thread{'s' if threads > 1 else ''}" if cpu and threads else cpu


# ----------------------------------------------------------------------------------------------------------------------
# Single values of a result, by dotted path; None where there is none of the kind
# ----------------------------------------------------------------------------------------------------------------------


def dig(value: Any, path: str) -> Any:
    """The value at a dotted path, or None where the path ends early."""
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def text_at(result: Result, path: str) -> str | None:
    value = dig(result, path)
    is_no_number = isinstance(value, float) and not is_finite(value)
    return None if value is None or is_no_number else str(value)


def _choice_at(result: Result, path: str) -> str | None:
    """`lru`, or `s3fifo (small_fraction=0.2)`."""
    choice = dig(result, path)
    named = isinstance(choice, str) or (isinstance(choice, Mapping) and "name" in choice)
    return choice_text(choice) if named else None


def number_at(result: Result, path: str) -> float | None:
    value = dig(result, path)
    if isinstance(value, bool) or not isinstance(value, int | float) or not is_finite(value):
        return None
    return float(value)


def count_at(result: Result, path: str) -> int | None:
    value = number_at(result, path)
    return None if value is None or abs(value) >= 2**63 else int(value)  # Int64 holds no more


def _megabytes(result: Result, path: str) -> float | None:
    return ratio(number_at(result, path), BYTES_PER_MIB)


def flag_at(result: Result, path: str) -> bool | None:
    value = dig(result, path)
    return value if isinstance(value, bool) else None


def is_finite(value: float) -> bool:
    """As `math.isfinite`, but an integer that no float can hold is False, where that one raises."""
    return abs(value) <= sys.float_info.max


# ----------------------------------------------------------------------------------------------------------------------
# Views of a frame
# ----------------------------------------------------------------------------------------------------------------------


def successful(frame: pd.DataFrame) -> pd.DataFrame:
    return frame[frame["status"] == "ok"]


def failed(frame: pd.DataFrame) -> pd.DataFrame:
    return frame[frame["status"] != "ok"]


def unique(frame: pd.DataFrame, column: str) -> list[Any]:
    """The values of a column that are there, in order of appearance."""
    return list(dict.fromkeys(frame[column].dropna()))


def under_simulated_link(frame: pd.DataFrame) -> dict[str, list[str]]:
    """Simulated link, in words -> the strategies whose pages travelled over it."""
    runs = frame[frame["link_kind"].eq("simulated").fillna(False)]
    return {link: unique(over_link, "strategy") for link, over_link in runs.groupby("link", sort=False)}


def values(frame: pd.DataFrame, column: str) -> list[float]:
    return [float(value) for value in frame[column].dropna()]


def describe_setting(frame: pd.DataFrame) -> str:
    """What the runs did and where, in one line: models, batch, tokens, machine, link."""
    random = set(unique(frame[frame["random_weights"].fillna(False)], "model"))
    models = [f"{model} (random weights)" if model in random else model for model in unique(frame, "model")]
    batches = [f"batch {size}" for size in unique(frame, "batch_size")]
    tokens = [f"{count} new tokens" for count in unique(frame, "max_new_tokens")]
    links = [f"link: {link}" for link in unique(frame, "link")]
    parts = (models, batches, tokens, unique(frame, "machine"), links)
    return " · ".join("; ".join(part) for part in parts if part)
