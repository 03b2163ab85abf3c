"""Tables of quality: what a cache costs in answers, beside the milliseconds and the bytes that it saves.

An approximate setting is fast for a reason, so its speed means nothing without the price. `quality_table` sets both
side by side for every strategy and context, and a strategy whose price nobody measured is listed as just that;
`reading_table` says how much of the context, and of the attention to it, was read for that.
`tasks_table` has the scores of tasks, each beside the baseline's on the same items: a small model fails some tasks with
all of its attention, and then the task says nothing of a cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from comparison import mean
from quality_frame import LEAST_NATS, approximate, nats_text, records
from result_frame import successful, unique, values
from text_tables import DASH, Table, caveats, number_text

if TYPE_CHECKING:
    import pandas as pd

NOT_MEASURED = "not measured"
NO_TELLING = "does not discriminate"
PERPLEXITY_NOTE = " Ppl: perplexity of the text's last tokens instead of a score, less is better."


def quality_table(frame: pd.DataFrame) -> Table:
    """Latency, memory and how far the answers are from the baseline's, of each strategy at each context.

    It has rows if any run is approximate or had its fidelity measured: then of every strategy with a successful run.
    """
    done = successful(frame)
    n_tokens = values(done, "fidelity_tokens")
    is_there = bool(n_tokens or values(done, "kl_mean") or len(approximate(frame)))
    return Table(
        "Quality beside what it costs: decode latency and KV cache on the device",
        (
            "context\ntokens",
            "strategy",
            "ms per\ntoken",
            "device\nKV MiB",
            "KL, nats\n[low-high]",
            "top-1 %\n[low-high]",
            "first\nother\ntoken",
        ),
        _by_context(done, _cost_and_fidelity) if is_there else [],
        f"Fidelity: measured once for all repetitions"
        f"{_how_many(n_tokens)}, both caches being read the same text; in brackets 95 % confidence over those tokens."
        " KL: mean divergence of what the model would say next from what it says with the baseline's cache; 0: the"
        " same. Top-1: steps with the same likeliest token. First other token: of the timed generation, from 0, where"
        f" it leaves the baseline's.{_reference_note(done)}{_error_note(done)}{caveats(done)}",
    )


def reading_table(frame: pd.DataFrame) -> Table:
    """What each strategy read of the text of which fidelity was measured, and how well it foresaw that text.

    It has rows where a run left pages out.
    """
    done = successful(frame)
    left_out = (done["fidelity_attended_pages"] < done["fidelity_pages"]).fillna(False)
    measured = done[done["kl_mean"].notna()]
    return Table(
        "What was read: pages, the attention on them, and the text they were to foresee",
        (
            "context\ntokens",
            "strategy",
            "pages read\nof there",
            "attention\nmass %",
            "page\nrecall %",
            "perplexity\n/ baseline",
        ),
        _by_context(measured, _what_was_read) if left_out.any() else [],
        "Pages: of each layer and sequence, means over decode steps. Attention mass: its recall, the share of true"
        " attention on the pages read. Page recall: of as many pages with the most attention as were read, the share"
        " read. Both of each key/value head by itself where heads choose their own pages. Perplexity: of the text, read"
        " with the run's cache and with the baseline's.",
    )


def _by_context(runs: pd.DataFrame, cells: Callable[[pd.DataFrame], tuple[str, ...]]) -> list[tuple[str, ...]]:
    """A row for each strategy at each context."""
    return [
        (str(context), strategy, *cells(own))
        for context in sorted(unique(runs, "context_tokens"))
        for strategy, own in runs[runs["context_tokens"] == context].groupby("strategy", sort=False)
    ]


def _cost_and_fidelity(runs: pd.DataFrame) -> tuple[str, ...]:
    first_other = values(runs, "first_divergent_token")
    return (
        number_text(mean(runs, "tpot_ms")),
        number_text(mean(runs, "device_kv_mb")),
        _divergence(runs),
        _between(runs, "top1_agreement", "top1", _percent),
        f"{min(first_other):.0f}" if first_other else DASH,
    )


def _what_was_read(runs: pd.DataFrame) -> tuple[str, ...]:
    read, there = (mean(runs, column) for column in ("fidelity_attended_pages", "fidelity_pages"))
    return (
        DASH if read is None or there is None else f"{read:.1f} / {there:.1f}",
        _percent(mean(runs, "attention_mass_recall")),
        _percent(mean(runs, "page_recall")),
        _perplexity(runs),
    )


def _divergence(runs: pd.DataFrame) -> str:
    divergence = mean(runs, "kl_mean")
    if divergence is None:
        return DASH if approximate(runs).empty else NOT_MEASURED
    if divergence < LEAST_NATS:  # what the order of additions makes, in which there is no more to see
        return nats_text(divergence)
    return _between(runs, "kl_mean", "kl", nats_text)


def _between(runs: pd.DataFrame, column: str, limits: str, text: Callable[[float | None], str]) -> str:
    """`0.12 [0.05-0.2]`; of a figure without an interval, the figure."""
    low, high = (mean(runs, f"{limits}_{limit}") for limit in ("low", "high"))
    figure = text(mean(runs, column))
    if low is None or high is None:
        return figure
    decimals = (lambda share: _percent(share, 0)) if text is _percent else text
    return f"{figure} [{decimals(low)}-{decimals(high)}]"


def _percent(share: float | None, decimals: int = 1) -> str:
    return DASH if share is None else f"{100.0 * share:.{decimals}f}"


def _perplexity(runs: pd.DataFrame) -> str:
    """`12.34/12.30`, the baseline's last."""
    own, other = (mean(runs, column) for column in ("perplexity", "baseline_perplexity"))
    return DASH if own is None else f"{_four_digits(own)}/{DASH if other is None else _four_digits(other)}"


def _four_digits(value: float) -> str:
    decimals = 2 if value < 99.995 else 1 if value < 999.95 else 0
    return f"{value:.{decimals}f}"


def _how_many(n_tokens: list[float]) -> str:
    if not n_tokens:
        return ""
    between = dict.fromkeys(f"{n:,.0f}" for n in (min(n_tokens), max(n_tokens)))
    return f", over {' to '.join(between)} tokens"


def _reference_note(done: pd.DataFrame) -> str:
    """What the baseline of the fidelity was, where it was not transformers' own cache."""
    repeats = " Of the longest the text begins again, and can be copied." if done["text_repeats"].eq(True).any() else ""
    return _stand_in_note(unique(done, "quality_reference")) + repeats


def _stand_in_note(references: list[str]) -> str:
    stood_in = [reference for reference in references if "paging" in reference]
    return f" The baseline of some is {'; '.join(stood_in)}." if stood_in else ""


def _error_note(done: pd.DataFrame) -> str:
    """Why something could not be measured, of each strategy once."""
    broken = done.dropna(subset=["quality_error"]).drop_duplicates(["strategy", "quality_error"])
    return "".join(f" Of {run.strategy}: {run.quality_error}." for run in broken.itertuples())


def tasks_table(scores: pd.DataFrame) -> Table:
    """The scores of every task at every length, the baseline's beside them.

    Args:
        scores: as `quality_frame.task_scores` makes it. Runs at several contexts that were asked the same items give
            the same line, which stands here once.
    """
    lines: dict[tuple[str, ...], None] = {}
    several = len(unique(scores, "model")) > 1
    for _, asked in scores.groupby(["model", "task", "tokens"], sort=False, dropna=False):
        for row in records(asked):
            names = [_text(row[column]) for column in ("strategy", "task", "tokens", "n")]
            models = [_text(row["model"])] if several else []
            note = NO_TELLING if row["discriminates"] is False else ""
            lines[(*models, *names, _interval(row, ""), _interval(row, "baseline_"), _pages(row), note)] = None
    headings = ("strategy", "task", "tokens", "n", "score\n[low-high]", "baseline\n[low-high]", "pages\nread", "note")
    return Table(
        "Tasks: mean score in %, with its 95 % confidence interval in brackets",
        (*(["model"] if several else []), *headings),
        list(lines),
        "Tokens: of the prompt in which the answer lies. Baseline: on the very same n items. A task that the baseline"
        f" fails ({NO_TELLING}) counts neither for nor against anybody. Pages read: of those there, means over the"
        f" steps of question and answer.{PERPLEXITY_NOTE if (scores['unit'] == 'perplexity').any() else ''}"
        f"{_stand_in_note(unique(scores, 'reference'))}",
        sections=("model", "task", "tokens"),
    )


def _text(value: str | int | None) -> str:
    return DASH if value is None else str(value)


def _interval(row: Mapping[str, Any], prefix: str) -> str:
    """`75 [41-93]`, or for a perplexity `ppl 13.2 [11.0-15.9]`; of a score without an interval, the score."""
    score, low, high = (row[f"{prefix}{name}"] for name in ("score", "low", "high"))
    is_perplexity = row["unit"] == "perplexity"
    if score is None:
        return DASH
    text = _three_digits if is_perplexity else (lambda share: _percent(share, 0))
    between = "" if low is None or high is None else f" [{text(low)}-{text(high)}]"
    return f"{'ppl ' if is_perplexity else ''}{text(score)}{between}"


def _three_digits(value: float) -> str:
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}"


def _pages(row: Mapping[str, Any]) -> str:
    """`16/63`; a dash of a cache without pages."""
    read, there = row["attended_pages"], row["pages"]
    return DASH if read is None or there is None else f"{read:.0f}/{there:.0f}"
