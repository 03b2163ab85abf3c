"""What the components' command lines print of one run: its figures, one below the other.

A run leaves far more in its result than fits a screen. `FIGURES` is the choice of it that a reader asks for first, one
row each; where a figure does not apply to a mode, or was not measured, its row is left out rather than filled with a
zero. Several repetitions of one run share a table: numbers become mean and standard deviation.

Runs that differ in one part, side by side, are the business of variant_tables.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from cache_settings import is_exact
from metrics import RunResult, ratio, spread
from registry import choice_text

DASH = "\N{EM DASH}"


def figures_table(results: Sequence[RunResult]) -> Table:
    """The figures of the repetitions of one run."""
    first = results[0]
    runs = f", mean ± std of {len(results)} runs" if len(results) > 1 else ""
    title = f"{first.spec['mode']}, {first.context['tokens']} tokens of context{runs}"
    table = Table(title=title, title_justify="left")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, values in zip(FIGURES, zip(*map(figures_of, results), strict=True), strict=True):
        if (text := summary(values)) is not None:
            table.add_row(name, text)
    return table


def summary(values: Sequence[Any]) -> str | None:
    """One cell: mean and spread of numbers, else the values that occur; None if nothing is there."""
    present = [value for value in values if value is not None]
    if not present:
        return None
    if not all(isinstance(value, int | float) for value in present):
        return ", ".join(dict.fromkeys(map(str, present)))
    if len(set(present)) == 1:
        return f"{present[0]:,}" if isinstance(present[0], int) else f"{present[0]:,.2f}"
    figures = spread(present)
    return f"{figures['mean']:,.2f} ± {figures['std']:,.2f}"


FIGURES = (
    "tokens equal to HF's",
    "KL divergence from HF's cache, nats",
    "same likeliest token as HF's, %",
    "perplexity (with HF's cache)",
    "attention mass recall, %",
    "quality: what went wrong",
    "time to first token, ms",
    "time per output token, ms",
    "- selecting pages, ms per token",
    "- predicting pages, ms per token",
    "- waiting for pages, ms per token",
    "- asking for copies, ms per token",
    "- attention over pages, ms per token",
    "time per output token, of its floor",
    "total, ms",
    "tokens per second, all sequences",
    "GPU memory allocated, MiB",
    "GPU memory peak, MiB",
    "GPU memory delta, MiB",
    "process memory (RSS), MiB",
    "KV cache on the device, MiB",
    "digests of pages, MiB",
    "KV cache on the host, MiB",
    "KV cache on disk, MiB",
    "pages",
    "selector",
    "pages attended to per step",
    "hit rate, %",
    "hit rate of plain LRU, %",
    "hit rate of LRU with all slots, %",
    "hits / late / misses",
    "hits of LRU / beyond it",
    "skipped accesses, %",
    "evictions",
    "to the device, MiB",
    "link",
    "stall, ms",
    "stall, % of decode",
    "transfer hidden behind computing, %",
    "prefetches issued",
    "prefetches on time / late / wasted / unused yet",
    "guesses held back by the threshold",
    "pollution, misses",
    "prediction accuracy, %",
    "prefetch coverage, %",
)


def figures_of(result: RunResult) -> tuple[Any, ...]:
    """What a reader asks of one result, in the order of `FIGURES`; None where it is missing."""
    timing, memory, cache, prefetch = result.timing, result.memory, result.cache or {}, result.prefetch or {}
    paging = result.spec["paging"] or {}
    return (
        _as_hf(result.quality),
        *_fidelity(result.quality),
        timing["ttft_ms"],
        timing["tpot_ms"],
        ms_per_token(result, "select_ms"),
        ms_per_token(result, "predict_ms") if prefetch else None,  # there is nothing to predict without it
        *(ms_per_token(result, stage) for stage in ("wait_ms", "copy_ms", "attend_ms")),
        cache.get("floor", {}).get("tpot_over_floor"),
        timing["e2e_ms"],
        timing["batch_tokens_per_second"],
        memory["gpu_memory_mb"],
        memory["gpu_peak_mb"],
        memory["gpu_delta_mb"],
        memory["rss_mb"],
        mebibytes(memory["device_kv_bytes"]),
        mebibytes(memory["digest_bytes"] or None),  # 0: this selector takes none
        mebibytes(memory["host_kv_bytes"]),
        None if paging.get("host_pages") is None else mebibytes(memory["disk_kv_bytes"]),
        cache.get("n_pages"),
        selection_text(paging),
        f"{cache['attended_pages']:,} of {cache['n_pages']:,}" if cache else None,
        as_percent(cache.get("hit_rate")),
        as_percent(cache.get("shadow_lru_hit_rate")),
        as_percent(cache.get("shadow_lru_all_slots_hit_rate")),
        _joined(cache, "hits", "late", "misses"),
        _joined(cache, "lru_hits", "hits_beyond_lru") if prefetch else None,
        as_percent(cache.get("skipped_rate")) if paging.get("on_miss") == "skip" else None,
        cache.get("evictions"),
        mebibytes(cache.get("h2d_bytes")),
        link_text(cache.get("link")),
        cache.get("stall_ms"),
        cache.get("stall_percent"),
        as_percent(cache.get("hidden_transfer_share")),
        prefetch.get("issued"),
        _joined(prefetch, "on_time", "late", "wasted", "unresolved"),
        prefetch.get("declined"),
        prefetch.get("pollution"),
        as_percent(prefetch.get("accuracy")),
        as_percent(prefetch.get("coverage")),
    )


def ms_per_token(result: RunResult, stage: str) -> float | None:
    """What a stage of decode steps took, over the tokens they gave."""
    return ratio((result.cache or {}).get("stages", {}).get(stage), len(result.timing["itl_ms"]))


def _as_hf(quality: Mapping[str, Any]) -> str | None:
    """Whether the tokens are those of transformers' cache. Where attention left pages out, others are no fault."""
    matches = quality["matches_baseline"]
    if matches is None or matches:
        return matches and "yes"
    return "NO" if quality["exact"] else f"no: first differs at token {quality['first_divergent_token']} (approximate)"


def _fidelity(quality: Mapping[str, Any]) -> tuple[str | None, ...]:
    """How far what the model says is from what it says with transformers' cache, with 95 % confidence; and what went
    wrong in measuring it."""
    fidelity, error = quality.get("fidelity"), quality.get("error")
    if fidelity is None:
        return None, None, None, None, error
    mass = as_percent(fidelity["attention_mass_recall"])
    perplexities = (fidelity["perplexity"], fidelity["baseline_perplexity"])
    return (
        f"{_interval([fidelity[f'kl_{name}'] for name in ('mean', 'low', 'high')], '.2g')}, n = {fidelity['n_tokens']}",
        _interval([as_percent(fidelity[name]) for name in ("top1_agreement", "top1_low", "top1_high")], ".1f"),
        None if None in perplexities else "{:.2f} ({:.2f})".format(*perplexities),
        None if mass is None else f"{mass:.1f}",
        error,
    )


def _interval(figures: Sequence[float | None], form: str) -> str:
    """`0.12 [0.05-0.2]`; of a mean without limits, the mean."""
    mean, low, high = (None if figure is None else format(figure, form) for figure in figures)
    return str(mean) if low is None or high is None else f"{mean} [{low}-{high}]"


def quality_words(result: RunResult) -> str | None:
    """What an approximation costs in answers, in a line; None where that was not measured."""
    divergence, same, *_, error = _fidelity(result.quality)
    if divergence is None:
        return error and f"quality: {error}"
    return f"KL divergence from HF's cache, nats, {divergence}; same likeliest token {same} %"


def selection_text(paging: Mapping[str, Any]) -> str | None:
    """What attention reads: `quest, kv_head, dense_layers=2`; None where attention reads every page."""
    if not paging or is_exact(paging["selector"]):
        return None
    words = [choice_text(paging["selector"])]
    if paging["granularity"] != "layer":
        words.append(paging["granularity"])
    if paging["dense_layers"]:
        words.append(f"dense_layers={paging['dense_layers']}")
    return ", ".join(words)


def link_text(link: Mapping[str, Any] | None) -> str | None:
    """What pages travelled over: `simulated pcie3-x16, 15.75 GB/s`; None where that is not known."""
    if link is None:
        return None
    width = f", {link['bandwidth_gb_s']:g} GB/s" if link["bandwidth_gb_s"] else ""
    return f"{link['kind']} {link['name']}{width}" if link["name"] != link["kind"] else f"{link['kind']}{width}"


def mebibytes(n_bytes: float | None) -> float | None:
    return None if n_bytes is None else n_bytes / 2**20


def as_percent(share: float | None) -> float | None:
    return None if share is None else 100.0 * share


def _joined(block: dict[str, Any], *names: str) -> str | None:
    values = [block.get(name) for name in names]
    return None if None in values else " / ".join(f"{value:,}" for value in values)
