"""One table for the variants of a run: what differs between them is one part, and nothing else.

A *variant* is a run with another policy or another predictor, on the same prompt and with the same budget. That makes
the table more than a list, for it can be held to a law: neither part decides what is computed, so all variants must
give the same tokens. The caption says that they did, or shouts which did not. Only under `on_miss: skip` may they
differ, as a page that is not there in time is then left out, and the caption says that instead.

What can be compared is a `SideBySide`: `POLICIES_COMPARED` and `PREDICTORS_COMPARED`. Both have their columns, the
order of their rows and the words around them here; how a table is made of them is the same for both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from component_tables import DASH, as_percent, link_text, mebibytes, ms_per_token, selection_text
from metrics import RunResult, percent, spread
from registry import POLICIES, PREDICTORS, Registry

Variants = Mapping[str, Sequence[RunResult]]  # by the name of what differs, the same repetitions of each


def plain(value: float | int | str) -> str:
    """A cell where there is room: whole numbers as they are, others with two decimals."""
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"


def short(number: float | int) -> str:
    """Two digits or more of a number that is not negative, in five characters at most: `0.06`, `98.7`, `12.3k`."""
    if isinstance(number, int) and number < 10_000:
        return str(number)
    scales = ((9_999.5, 1, ""), (999.5e3, 1e3, "k"), (999.5e6, 1e6, "M"), (math.inf, 1e9, "G"))
    unit, suffix = next((unit, suffix) for limit, unit, suffix in scales if number < limit)
    scaled = number / unit
    decimals = 2 if 0 < scaled < 0.995 else 1 if scaled < 99.95 else 0
    return f"{scaled:.{decimals}f}{suffix}"


def signed(number: float) -> str:
    """A difference in percentage points: `+4.2`, `-0.3`, `+0.0`."""
    rounded = round(number, 1) + 0.0  # + 0.0, or -0.04 would read -0.0
    return f"{rounded:+.1f}" if abs(rounded) < 99.95 else f"{rounded:+.0f}"


@dataclass(frozen=True)
class Column:
    """What stands below one heading: a figure of each result, their mean over repetitions as text."""

    heading: str
    figure: Callable[[RunResult], float | int | str | None]
    text: Callable[[Any], str] = plain

    def cell(self, runs: Sequence[RunResult]) -> str:
        """The mean alone, for want of room; values that are no numbers as they occur; a dash for none."""
        present = [value for value in map(self.figure, runs) if value is not None]
        if not present:
            return DASH
        if any(isinstance(value, str) for value in present):
            return ", ".join(dict.fromkeys(map(str, present)))
        return self.text(present[0] if len(set(present)) == 1 else spread(present)["mean"])


@dataclass(frozen=True)
class SideBySide:
    """Which part differs, and how its variants are set side by side.

    Attributes:
        registry: the parts there are; its kind is also the key of an experiment that chooses one.
        plural: of that kind.
        columns: beside the one that names the variant.
        legend: what the headings leave unsaid, from the results.
        law: why all variants must give the same tokens.
        why_quest: why this needs a selector that leaves pages out.
        rank: of a variant and its runs; rows go by it, the largest first.
    """

    registry: Registry
    plural: str
    columns: tuple[Column, ...]
    legend: Callable[[Variants], str]
    law: str
    why_quest: str
    rank: Callable[[str, Sequence[RunResult]], tuple[float, ...]]

    @property
    def kind(self) -> str:
        return self.registry.kind


def variants_table(
    comparison: SideBySide, results: Variants, chose_quest: bool = False, left_out: Mapping[str, str] | None = None
) -> Table:
    """The variants of one run, best first.

    Args:
        comparison: which part differs.
        results: of one context length, by variant; tokens are compared with those of the first.
        chose_quest: whether nobody chose the selector, so that it was set to `quest`.
        left_out: variants that cannot be run with these settings, and why.
    """
    runs = next(iter(results.values()))
    one, means = runs[0], f", means of {len(runs)} runs" if len(runs) > 1 else ""
    paging, cache = one.spec["paging"], one.cache
    title = (
        f"{comparison.plural.capitalize()}: {one.context['tokens']:,} tokens of context in pages of"
        f" {paging['page_size']:,}, {paging['max_gpu_pages']:,} of them on the device{means}"
    )
    seen = f"{cache['attended_pages']:,} of {cache['n_pages']:,} pages a step"
    read = f"Attention reads {seen}: selector {selection_text(paging) or 'all'}. Link: {link_text(cache['link'])}."
    caption = [
        f"{read} {comparison.why_quest}" if chose_quest else read,
        comparison.legend(results),
        *(f"Left out: {variant} ({why})." for variant, why in (left_out or {}).items()),
        _tokens_text(comparison, results),
    ]
    table = Table(
        title=title,
        caption="\n".join(caption),
        title_justify="left",
        caption_justify="left",
        caption_style="",
        box=SIMPLE,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1 if len(comparison.columns) < 10 else 0, 0, 0),  # more of them leave room for a single space
    )
    table.add_column(comparison.kind, overflow="fold")
    for column in comparison.columns:  # only names may wrap: a number that was cut would still look like a number
        table.add_column(column.heading, justify="right", no_wrap=True)
    for variant in sorted(results, key=lambda variant: comparison.rank(variant, results[variant]), reverse=True):
        table.add_row(variant, *(column.cell(results[variant]) for column in comparison.columns))
    return table


def _tokens_text(comparison: SideBySide, results: Variants) -> str:
    """Whether the law holds; where pages are skipped there is none to hold to."""
    first, odd = next(iter(results)), deviating(results)
    if next(iter(results.values()))[0].spec["paging"].get("on_miss") == "skip":
        skipped = f", {rate} % of what was asked for" if (rate := _between(results, "skipped_rate")) else ""
        differ = f"here they do: {', '.join(odd)} from {first}" if odd else "here they do not"
        return f"What is not there in time is left out (on_miss: skip){skipped}. So tokens may differ; {differ}."
    if odd:
        return f"WRONG: NOT THE SAME TOKENS FROM {', '.join(odd)} AS FROM {first}. This is a fault."
    return f"All {comparison.plural} gave the same tokens, as they must: {comparison.law}."


def deviating(results: Variants) -> list[str]:
    """The variants whose tokens are not those of the first one, in any repetition."""
    tokens = {variant: [result.tokens["ids"] for result in runs] for variant, runs in results.items()}
    first = next(iter(tokens.values()))
    return [variant for variant, rows in tokens.items() if rows != first]


def _between(results: Variants, name: str) -> str:
    """The shares of all results as percentages: the one there is, or the least to the largest."""
    found = [result.cache.get(name) for runs in results.values() for result in runs]
    shares = [100.0 * share for share in found if share is not None]
    return " to ".join(dict.fromkeys(f"{share:.1f}" for share in (min(shares), max(shares)))) if shares else ""


def _mean_hit_rate(runs: Sequence[RunResult]) -> float:
    mean = spread([result.cache["hit_rate"] for result in runs])["mean"]
    return -1.0 if mean is None else mean


# --- policies ---------------------------------------------------------------------------------------------------


def _unlike_hf(result: RunResult) -> str:
    quality = result.quality
    return "never" if quality["matches_baseline"] else f"token {quality['first_divergent_token']}"


POLICIES_COMPARED = SideBySide(
    registry=POLICIES,
    plural="policies",
    columns=(  # headings are broken where they must be for nine columns to fit a screen of 80 characters
        Column("hits,\n%", lambda result: as_percent(result.cache["hit_rate"])),
        Column("plain\nLRU, %", lambda result: as_percent(result.cache["shadow_lru_hit_rate"])),
        Column("misses", lambda result: result.cache["misses"]),
        Column("evicted", lambda result: result.cache["evictions"]),
        Column("moved,\nMiB", lambda result: mebibytes(result.cache["h2d_bytes"])),
        Column("stall,\nms", lambda result: result.cache["stall_ms"]),
        Column("ms per\ntoken", lambda result: result.timing["tpot_ms"]),
        Column("unlike\nHF's", _unlike_hf),
    ),
    legend=lambda results: (
        "Plain LRU: what LRU of the same size would have hit on the same requests. Unlike HF's: the first token,"
        " counted from 0, that transformers' own cache would not have given."
    ),
    law="a policy decides what moves, never what is computed",
    why_quest=(
        "Exact attention wants every page at every step, and then all policies move nearly the same pages; so quest"
        " was taken, with a part of the pages. --selector chooses another."
    ),
    rank=lambda policy, runs: (_mean_hit_rate(runs),),
)


# --- predictors -------------------------------------------------------------------------------------------------

UNPREDICTED, BOUND = "none", "oracle"


def _of_cache(name: str, unit: Callable[[Any], Any] = as_percent) -> Callable[[RunResult], Any]:
    return lambda result: unit(result.cache.get(name))


def _of_prefetch(name: str, unit: Callable[[Any], Any] = as_percent) -> Callable[[RunResult], Any]:
    return lambda result: unit((result.prefetch or {}).get(name))


def _as_it_is(value: Any) -> Any:
    return value


def _predictors_legend(results: Variants) -> str:
    rates = [
        f"{whose} would have hit {rate} %"
        for whose, name in (
            ("plain LRU of the same size", "shadow_lru_hit_rate"),
            ("one with the staging slots on top", "shadow_lru_all_slots_hit_rate"),
        )
        if (rate := _between(results, name))
    ]
    known = f"Of the same requests, {', '.join(rates)}. " if rates else ""
    bound = f" {BOUND} knows what will be asked for: the bound for this prefetch_k." if BOUND in results else ""
    return (
        f"{known}Hits: pages there when asked for. Not LRU's: the part of them that plain LRU would have missed. Over"
        " LRU, slots: hits above those of the two LRUs, in points. Acc: used of those issued. Cov: prefetched of those"
        " that had to move. Time: there in time of those used. Waste: MiB copied for nothing. Stall: ms in all."
        " Predict: ms per token."
        f" {UNPREDICTED} is reactive paging.{bound}"
    )


def _order_of_predictor(predictor: str, runs: Sequence[RunResult]) -> tuple[float, ...]:
    """Reactive paging on top, the bound at the bottom, the others by hit rate."""
    name = predictor.partition(" (")[0]
    return {UNPREDICTED: 1.0, BOUND: -1.0}.get(name, 0.0), _mean_hit_rate(runs)


PREDICTORS_COMPARED = SideBySide(
    registry=PREDICTORS,
    plural="predictors",
    columns=(  # 80 characters at most: no cell takes more than five, and a longer name wraps
        Column("hits\n%", _of_cache("hit_rate"), short),
        Column("not\nLRU's", lambda run: percent(run.cache.get("hits_beyond_lru"), run.cache["accesses"]), short),
        Column("over\nLRU", _of_cache("gain_over_lru"), signed),
        Column("over\nslots", _of_cache("gain_over_lru_all_slots"), signed),
        Column("acc\n%", _of_prefetch("accuracy"), short),
        Column("cov\n%", _of_prefetch("coverage"), short),
        Column("time\n%", _of_prefetch("timeliness"), short),
        Column("issued", _of_prefetch("issued", _as_it_is), short),
        Column("waste\nMiB", _of_prefetch("wasted_bytes", mebibytes), short),
        Column("stall\nms", _of_cache("stall_ms", _as_it_is), short),
        Column("ms/\ntoken", lambda result: result.timing["tpot_ms"], short),
        Column("pre-\ndict", lambda result: ms_per_token(result, "predict_ms"), short),
    ),
    legend=_predictors_legend,
    law="prefetch moves pages earlier and changes no answer",
    why_quest=(
        "Exact attention wants every page at every step, and then layer_ahead is always right; so quest was taken, with"
        " a part of the pages. --selector chooses another."
    ),
    rank=_order_of_predictor,
)
