"""Tables of quality: what a cache costs in answers, beside the milliseconds and the bytes that it saves.

An approximate setting is fast for a reason, so its speed means nothing without the price. `quality_table` sets both
side by side for every strategy and context, and a strategy whose price nobody measured is listed as just that.
`tasks_table` has the scores of tasks, each beside the baseline's on the same items: a small model fails some tasks with
all of its attention, and then the task says nothing of a cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from comparison import mean
from quality_frame import approximate, nats_text, records
from result_frame import successful, unique, values
from text_tables import DASH, Table, link_note, number_text

if TYPE_CHECKING:
    import pandas as pd

NOT_MEASURED = "not\nmeasured"
NO_TELLING = "does not discriminate"


def quality_table(frame: pd.DataFrame) -> Table:
    """Latency, memory and fidelity of each strategy at each context.

    It has rows if any run is approximate or had its fidelity measured: then of every strategy with a successful run.
    """
    done, approximations = successful(frame), approximate(frame)
    n_tokens = values(done, "fidelity_tokens")
    rows = []
    if n_tokens or values(done, "kl_mean") or len(approximations):
        for context in sorted(unique(done, "context_tokens")):
            at_context = done[done["context_tokens"] == context].groupby("strategy", sort=False)
            rows += [(str(context), strategy, *_cells(runs)) for strategy, runs in at_context]
    return Table(
        "Quality beside what it costs: decode latency and KV cache on the device",
        (
            "context\ntokens",
            "strategy",
            "ms per\ntoken",
            "device\nKV MiB",
            "KL\nnats",
            "top-1\n%",
            "perplexity\n/ baseline",
            "attn.\nmass\n%",
            "page\nrecall\n%",
        ),
        rows,
        f"{_approximations_note(done, approximations)} Fidelity: measured once for all repetitions"
        f"{_how_many(n_tokens)}, both caches being read the same text. KL: mean divergence of what the model would say"
        " next from what it says with the baseline's cache; 0: the same. Top-1: steps with the same likeliest token."
        " Perplexity: of the text. Attention mass: its recall, the share of true attention on the pages read. Page"
        " recall: of as many pages with the most attention as were read, the share read."
        f"{_error_note(done)}{link_note(done)}",
    )


def _cells(runs: pd.DataFrame) -> tuple[str, ...]:
    """Latency, memory and fidelity of one strategy's runs at one context, as text."""
    divergence = mean(runs, "kl_mean")
    unmeasured = DASH if approximate(runs).empty else NOT_MEASURED
    return (
        number_text(mean(runs, "tpot_ms")),
        number_text(mean(runs, "device_kv_mb")),
        unmeasured if divergence is None else nats_text(divergence),
        _percent(mean(runs, "top1_agreement")),
        _perplexity(runs),
        _percent(mean(runs, "attention_mass_recall")),
        _percent(mean(runs, "page_recall")),
    )


def _percent(share: float | None, decimals: int = 1) -> str:
    return DASH if share is None else f"{100.0 * share:.{decimals}f}"


def _perplexity(runs: pd.DataFrame) -> str:
    """`12.34/12.30`, the baseline's last."""
    own, other = (mean(runs, column) for column in ("perplexity", "baseline_perplexity"))
    return DASH if own is None else f"{_four_digits(own)}/{DASH if other is None else _four_digits(other)}"


def _four_digits(value: float) -> str:
    decimals = 2 if value < 99.995 else 1 if value < 999.95 else 0
    return f"{value:.{decimals}f}"


def _approximations_note(done: pd.DataFrame, approximations: pd.DataFrame) -> str:
    names = unique(approximations, "strategy")
    if not names:
        return "All of these are exact."
    some_exact = len(unique(done, "strategy")) > len(names)
    return f"Approximate: {', '.join(names)}{'; the others are exact' if some_exact else ''}."


def _how_many(n_tokens: list[float]) -> str:
    if not n_tokens:
        return ""
    between = dict.fromkeys(f"{n:,.0f}" for n in (min(n_tokens), max(n_tokens)))
    return f", over {' to '.join(between)} tokens"


def _error_note(done: pd.DataFrame) -> str:
    """Why something could not be measured, of each strategy once."""
    broken = done.dropna(subset=["quality_error"]).drop_duplicates(["strategy", "quality_error"])
    return "".join(f" Of {run.strategy} it could not be measured: {run.quality_error}." for run in broken.itertuples())


def tasks_table(scores: pd.DataFrame) -> Table:
    """The scores of every task at every length, the baseline's beside them.

    Args:
        scores: as `quality_frame.task_scores` makes it. Runs at several contexts that were asked the same items give
            the same line, which stands here once.
    """
    lines: dict[tuple[str, ...], None] = {}
    for _, asked in scores.groupby(["task", "tokens"], sort=False, dropna=False):
        for row in records(asked):
            note = NO_TELLING if row["discriminates"] is False else ""
            names = (_text(row[column]) for column in ("strategy", "task", "tokens", "n"))
            lines[(*names, _interval(row, ""), _interval(row, "baseline_"), note)] = None
    return Table(
        "Tasks: mean score in %, with its 95 % confidence interval in brackets",
        ("strategy", "task", "tokens", "n", "score %\n[low-high]", "baseline %\n[low-high]", "note"),
        list(lines),
        "Tokens: of the prompt in which the answer lies. Baseline: on the very same n items. A task that the baseline"
        f" fails ({NO_TELLING}) counts neither for nor against anybody.",
        sections=("task", "tokens"),
    )


def _text(value: str | int | None) -> str:
    return DASH if value is None else str(value)


def _interval(row: Mapping[str, Any], prefix: str) -> str:
    """`75 [41-93]`; of a score without an interval, the score."""
    score, low, high = (row[f"{prefix}{name}"] for name in ("score", "low", "high"))
    between = "" if score is None or low is None or high is None else f" [{_percent(low, 0)}-{_percent(high, 0)}]"
    return f"{_percent(score, 0)}{between}"
