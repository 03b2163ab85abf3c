"""What the components' command lines print: the figures of one run, and policies side by side.

A run leaves far more in its result than fits a screen. `FIGURES` is the choice of it that a reader asks for first, one
row each; where a figure does not apply to a mode, or was not measured, its row is left out rather than filled with a
zero. Several repetitions of one run share a table: numbers become mean and standard deviation.

`policies_table` sets replacement policies beside each other, from runs that differ in nothing else. Their tokens must
then be the same, for a policy decides which pages move and never what is computed; the caption says whether they were.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from cache_settings import is_exact
from metrics import RunResult, ratio, spread

PoliciesResults = Mapping[str, Sequence[RunResult]]  # by policy, the same repetitions of each


# --- the figures of one run -------------------------------------------------------------------------------------


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
    "time to first token, ms",
    "time per output token, ms",
    "- selecting pages, ms per token",
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
    "hits / late / misses",
    "evictions",
    "to the device, MiB",
    "link",
    "stall, ms",
    "stall, % of decode",
    "prefetches issued",
    "prefetches on time / late / wasted",
    "prediction accuracy, %",
    "prefetch coverage, %",
)


def figures_of(result: RunResult) -> tuple[Any, ...]:
    """What a reader asks of one result, in the order of `FIGURES`; None where it is missing."""
    timing, memory, cache, prefetch = result.timing, result.memory, result.cache or {}, result.prefetch or {}
    paging = result.spec["paging"] or {}
    return (
        _as_hf(result.quality),
        timing["ttft_ms"],
        timing["tpot_ms"],
        *(ratio(cache.get("stages", {}).get(stage), len(timing["itl_ms"])) for stage in STAGES),
        cache.get("floor", {}).get("tpot_over_floor"),
        timing["e2e_ms"],
        timing["batch_tokens_per_second"],
        memory["gpu_memory_mb"],
        memory["gpu_peak_mb"],
        memory["gpu_delta_mb"],
        memory["rss_mb"],
        _mebibytes(memory["device_kv_bytes"]),
        _mebibytes(memory["digest_bytes"] or None),  # 0: this selector takes none
        _mebibytes(memory["host_kv_bytes"]),
        None if paging.get("host_pages") is None else _mebibytes(memory["disk_kv_bytes"]),
        cache.get("n_pages"),
        _selection_text(paging),
        f"{cache['attended_pages']:,} of {cache['n_pages']:,}" if cache else None,
        _percent(cache.get("hit_rate")),
        _percent(cache.get("shadow_lru_hit_rate")),
        _joined(cache, "hits", "late", "misses"),
        cache.get("evictions"),
        _mebibytes(cache.get("h2d_bytes")),
        _link_text(cache.get("link")),
        cache.get("stall_ms"),
        cache.get("stall_percent"),
        prefetch.get("issued"),
        _joined(prefetch, "on_time", "late", "wasted"),
        _percent(prefetch.get("accuracy")),
        _percent(prefetch.get("coverage")),
    )


STAGES = ("select_ms", "wait_ms", "copy_ms", "attend_ms")


def _as_hf(quality: Mapping[str, Any]) -> str | None:
    """Whether the tokens are those of transformers' cache. Where attention left pages out, others are no fault."""
    matches = quality["matches_baseline"]
    if matches is None or matches:
        return matches and "yes"
    return "NO" if quality["exact"] else f"no: first differs at token {quality['first_divergent_token']} (approximate)"


def _selection_text(paging: Mapping[str, Any]) -> str | None:
    """`quest, kv_head, dense_layers=2`; None where attention reads every page."""
    if not paging or is_exact(paging["selector"]):
        return None
    words = [choice_text(paging["selector"])]
    if paging["granularity"] != "layer":
        words.append(paging["granularity"])
    if paging["dense_layers"]:
        words.append(f"dense_layers={paging['dense_layers']}")
    return ", ".join(words)


def choice_text(choice: str | Mapping[str, Any]) -> str:
    """A policy or selector as a config names it: `lru`, or `s3fifo (small_fraction=0.2)`."""
    if isinstance(choice, str):
        return choice
    parameters = ", ".join(f"{key}={value}" for key, value in choice.items() if key != "name")
    return f"{choice['name']} ({parameters})" if parameters else choice["name"]


def _link_text(link: dict[str, Any] | None) -> str | None:
    if link is None:
        return None
    width = f", {link['bandwidth_gb_s']:g} GB/s" if link["bandwidth_gb_s"] else ""
    return f"{link['kind']} {link['name']}{width}" if link["name"] != link["kind"] else f"{link['kind']}{width}"


def _mebibytes(n_bytes: int | None) -> float | None:
    return None if n_bytes is None else n_bytes / 2**20


def _percent(share: float | None) -> float | None:
    return None if share is None else 100.0 * share


def _joined(block: dict[str, Any], *names: str) -> str | None:
    return " / ".join(f"{block[name]:,}" for name in names) if block else None


# --- policies side by side --------------------------------------------------------------------------------------

POLICY_COLUMNS = (  # broken where they must be for nine columns to fit a screen of 80 characters
    *("hits,\n%", "plain\nLRU, %", "misses", "evicted", "moved,\nMiB"),
    *("stall,\nms", "ms per\ntoken", "unlike\nHF's"),
)


def policies_table(results: PoliciesResults, why_this_selector: str = "") -> Table:
    """Policies on the same prompt, the highest hit rate first.

    Args:
        results: of one context length, by policy.
        why_this_selector: a sentence for the caption, where nobody chose the selector.
    """
    runs = next(iter(results.values()))
    one, means = runs[0], f", means of {len(runs)} runs" if len(runs) > 1 else ""
    paging, cache = one.spec["paging"], one.cache
    title = (
        f"Policies: {one.context['tokens']:,} tokens of context in pages of {paging['page_size']:,},"
        f" {paging['max_gpu_pages']:,} of them on the device{means}"
    )
    columns = (
        "Plain LRU: what LRU of the same size would have hit on the same requests. Unlike HF's: the first token,"
        " counted from 0, that transformers' own cache would not have given."
    )
    seen = f"{cache['attended_pages']:,} of {cache['n_pages']:,} pages a step"
    read = f"Attention reads {seen}: selector {_selection_text(paging) or 'all'}. {why_this_selector}".strip()
    same = "All policies gave the same tokens, as they must: a policy decides what moves, never what is computed."
    if odd := deviating_policies(results):
        same = f"WRONG: NOT THE SAME TOKENS FROM {', '.join(odd)} AS FROM {next(iter(results))}. This is a fault."
    table = Table(
        title=title,
        caption="\n".join((read, columns, same)),
        title_justify="left",
        caption_justify="left",
        caption_style="",
        box=SIMPLE,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("policy", overflow="fold")
    for name in POLICY_COLUMNS:
        table.add_column(name, justify="right", overflow="fold")
    for policy in sorted(results, key=lambda policy: _mean_hit_rate(results[policy]), reverse=True):
        figures = zip(*map(_policy_figures, results[policy]), strict=True)
        table.add_row(policy, *(summary(_mean(values)) or "\N{EM DASH}" for values in figures))
    return table


def deviating_policies(results: PoliciesResults) -> list[str]:
    """The policies whose tokens are not those of the first one, in any repetition."""
    tokens = {policy: [result.tokens["ids"] for result in runs] for policy, runs in results.items()}
    first = next(iter(tokens.values()))
    return [policy for policy, rows in tokens.items() if rows != first]


def _mean_hit_rate(runs: Sequence[RunResult]) -> float:
    mean = spread([result.cache["hit_rate"] for result in runs])["mean"]
    return -1.0 if mean is None else mean


def _mean(values: Sequence[Any]) -> Sequence[Any]:
    """The mean alone of numbers that differ, for want of room; anything else as it is."""
    if len(set(values)) > 1 and all(isinstance(value, int | float) for value in values):
        return [spread(values)["mean"]]
    return values


def _policy_figures(result: RunResult) -> tuple[Any, ...]:
    """The cells of one policy, in the order of `POLICY_COLUMNS`."""
    cache, quality = result.cache, result.quality
    return (
        _percent(cache["hit_rate"]),
        _percent(cache["shadow_lru_hit_rate"]),
        cache["misses"],
        cache["evictions"],
        _mebibytes(cache["h2d_bytes"]),
        cache["stall_ms"],
        result.timing["tpot_ms"],
        "never" if quality["matches_baseline"] else f"token {quality['first_divergent_token']}",
    )
