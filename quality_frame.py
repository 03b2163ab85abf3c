"""Quality, laid out as result_frame.py lays out runs: a row for each run and task, and a row for each item of a task.

Fidelity is one figure for a run and has its columns in the frame of runs. A *task* has many items, put at several
depths of prompts of several lengths, and its scores have frames of their own: `task_scores` for tables, with the
baseline's score on the very same items beside each, and `task_items` for whoever asks where in a prompt it fails.

`describe_quality` is the word that goes with an approximate result where there is room for a word only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from comparison import mean
from result_frame import (
    Result,
    context_tokens,
    count_at,
    dig,
    flag_at,
    mode_rank,
    number_at,
    strategy_labels,
    successful,
    text_at,
    workload,
)

if TYPE_CHECKING:
    import pandas as pd

# The columns of the frame of runs that say what a cache costs in answers, known once the sweep is over.
FIDELITY = (
    "kl_mean",
    "kl_max",
    "top1_agreement",
    "perplexity",
    "baseline_perplexity",
    "attention_mass_recall",
    "page_recall",
)
LEAST_NATS = 1e-6  # less is what rounding alone can make, and as good as 0

Block = Mapping[str, Any]
Reader = Callable[[Any, str], Any]

# Column -> where its value stands in the block of a task, how it is read, and its dtype.
_OF_TASK: dict[str, tuple[str, Reader, str]] = {
    "task": ("task", text_at, "string"),
    "unit": ("unit", text_at, "string"),
    "reference": ("reference", text_at, "string"),
    "tokens": ("tokens", count_at, "Int64"),
    "n": ("n", count_at, "Int64"),
    "score": ("mean", number_at, "Float64"),
    "low": ("low", number_at, "Float64"),
    "high": ("high", number_at, "Float64"),
    "baseline_score": ("baseline.mean", number_at, "Float64"),
    "baseline_low": ("baseline.low", number_at, "Float64"),
    "baseline_high": ("baseline.high", number_at, "Float64"),
    "discriminates": ("discriminates", flag_at, "boolean"),
    "attended_pages": ("attended_pages", number_at, "Float64"),
    "pages": ("pages", number_at, "Float64"),
}
_OF_ITEM: dict[str, tuple[str, Reader, str]] = {
    "depth": ("depth", number_at, "Float64"),
    "score": ("score", number_at, "Float64"),
    "baseline_score": ("baseline_score", number_at, "Float64"),
}


def task_scores(results: Iterable[Result]) -> pd.DataFrame:
    """A row for each successful run and each task at each length that it was asked, baseline first.

    The columns are `strategy`, `run_id`, `model`, `workload` and `context_tokens` (of the timed run), `task`, its
    `unit` (`share`, 0 to 1, or `perplexity`, of which less is better), `reference` (what the baseline was), `tokens`
    (of the task's prompts), `n` items, `score` (their mean) between `low` and `high` (95 % confidence), the same of the
    baseline on the same items, `discriminates` (False where the baseline fails too, so that the task tells nothing of a
    cache; NA of a perplexity), `attended_pages` of `pages` (means over the decode steps of questions and answers) and
    `exact`.
    """
    import pandas as pd

    rows = _asked(results)
    columns = {
        "strategy": pd.array([label for label, _, _ in rows], dtype="string"),
        "run_id": pd.array([text_at(result, "run_id") for _, result, _ in rows], dtype="string"),
        "model": pd.array([text_at(result, "spec.model_name") for _, result, _ in rows], dtype="string"),
        "workload": pd.array([workload(result) for _, result, _ in rows], dtype="string"),
        "context_tokens": pd.array([context_tokens(result) for _, result, _ in rows], dtype="Int64"),
        **_columns([task for _, _, task in rows], _OF_TASK),
        "exact": pd.array([flag_at(result, "quality.exact") for _, result, _ in rows], dtype="boolean"),
    }
    return pd.DataFrame(columns)


def task_items(results: Iterable[Result]) -> pd.DataFrame:
    """A row for each item of each task of `task_scores`, with its `depth` in the prompt, 0 (start) to 1 (end).

    The other columns are `strategy`, `run_id`, `model`, `workload`, `task`, `unit`, `tokens` and `discriminates`, which
    the items of a task share, and `score` and `baseline_score`.
    """
    import pandas as pd

    rows = [(*asked, item) for asked in _asked(results) for item in _mappings(asked[-1].get("items"))]
    of_items = ("task", "unit", "tokens", "discriminates")
    columns = {
        "strategy": pd.array([label for label, _, _, _ in rows], dtype="string"),
        "run_id": pd.array([text_at(result, "run_id") for _, result, _, _ in rows], dtype="string"),
        "model": pd.array([text_at(result, "spec.model_name") for _, result, _, _ in rows], dtype="string"),
        "workload": pd.array([workload(result) for _, result, _, _ in rows], dtype="string"),
        **_columns([task for _, _, task, _ in rows], {name: _OF_TASK[name] for name in of_items}),
        **_columns([item for _, _, _, item in rows], _OF_ITEM),
    }
    return pd.DataFrame(columns)


def _asked(results: Iterable[Result]) -> list[tuple[str, Result, Block]]:
    """Strategy, result and block of every task that a successful run was asked."""
    results = sorted(results, key=mode_rank)
    return [
        (label, result, task)
        for label, result in zip(strategy_labels(results), results, strict=True)
        if result.get("status") == "ok"
        for task in _mappings(dig(result, "quality.tasks"))
    ]


def _mappings(value: Any) -> list[Block]:
    return [inner for inner in value if isinstance(inner, Mapping)] if isinstance(value, list) else []


def _columns(blocks: list[Block], columns: Mapping[str, tuple[str, Reader, str]]) -> dict[str, Any]:
    import pandas as pd

    return {
        name: pd.array([read(block, path) for block in blocks], dtype=dtype)
        for name, (path, read, dtype) in columns.items()
    }


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a frame as plain values, None where one is missing."""
    return frame.astype(object).where(frame.notna(), None).to_dict("records")


# ----------------------------------------------------------------------------------------------------------------------
# A word on quality
# ----------------------------------------------------------------------------------------------------------------------


def approximate(frame: pd.DataFrame) -> pd.DataFrame:
    """The successful runs that did not attend to everything that the baseline attends to."""
    done = successful(frame)
    return done[done["exact"].eq(False).fillna(False)]


def quality_note(frame: pd.DataFrame) -> str:
    """Of every approximate strategy its divergence from the baseline, or that it was not measured; "" without any."""
    words = [
        f"{strategy} ({divergence_text(mean(runs, 'kl_mean'))})"
        for strategy, runs in approximate(frame).groupby("strategy", sort=False)
    ]
    return f"Approximate: {', '.join(words)}." if words else ""


def describe_quality(result: Result) -> str | None:
    """`approximate, KL 0.12 nats`; None of a run that is exact."""
    if flag_at(result, "quality.exact") is not False:
        return None
    return f"approximate, {divergence_text(number_at(result, 'quality.fidelity.kl_mean'))}"


def divergence_text(kl_nats: float | None) -> str:
    return "KL not measured" if kl_nats is None else f"KL {nats_text(kl_nats)} nats"


def nats_text(kl_nats: float) -> str:
    """Two digits of a divergence: `0.012`, `1.2e-9`, and `0` of none at all."""
    if kl_nats == 0.0 or kl_nats >= 0.001:
        return f"{kl_nats:.2g}"
    digits, exponent = f"{kl_nats:.1e}".split("e")
    return f"{digits}e{int(exponent)}"
