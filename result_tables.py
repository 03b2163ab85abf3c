"""Tables of results: strategies, contexts, memory, prediction; with those of quality beside them.

What can stand in a row is written down once, in `CELLS`: heading -> text of a `Row`, which is one strategy, at one
context length or over all. A table is then a title, some headings, its rows, and a caption that says what they mean.

Every average stands beside its n. Its spread stands beside it too, or, where 80 columns leave no room, the largest of
its column in the caption (`SPREADS`). What was not measured is an em dash.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from comparison import (
    Comparison,
    all_match,
    average_over_cells,
    baselines,
    compare,
    mean,
    paired_std,
    repetition_std,
)
from quality_tables import quality_table, reading_table, tasks_table
from result_frame import describe_setting, failed, successful, unique, values
from text_tables import DASH, Table, decimals, link_note, number_text

if TYPE_CHECKING:  # both take long to import, and `main.py --help` should not wait for them
    import pandas as pd
    from rich.console import Console


def print_tables(frame: pd.DataFrame, console: Console, scores: pd.DataFrame | None = None) -> None:
    """The tables on a console, or in a pipe, of at least 80 columns; arguments as of `tables`."""
    for table in tables(frame, scores):
        console.print(table.to_rich(), "")


def markdown_tables(frame: pd.DataFrame, scores: pd.DataFrame | None = None) -> str:
    """The same tables as Markdown."""
    return "\n\n".join(table.to_markdown() for table in tables(frame, scores)) + "\n"


def tables(frame: pd.DataFrame, scores: pd.DataFrame | None = None) -> list[Table]:
    """All tables that have something to say: strategies, quality, reading, tasks, contexts, memory, paging, prediction,
    failures.

    Args:
        frame: of `to_frame`.
        scores: of `quality_frame.task_scores`, from the same results; None leaves out the table of tasks.
    """
    made = [strategy_table(frame), quality_table(frame), reading_table(frame)]
    made += [] if scores is None else [tasks_table(scores)]
    made += [make(frame) for make in (context_table, memory_table, paging_table, prediction_table, failure_table)]
    return [table for table in made if table.rows]


# ----------------------------------------------------------------------------------------------------------------------
# Rows, and what can stand in them
# ----------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Row:
    """What a row is about: a strategy's successful runs, at one context or over all, and how they compare."""

    strategy: str
    context: str
    n_started: int
    runs: pd.DataFrame
    is_reference: bool
    comparisons: list[Comparison]

    def count(self) -> str:
        n = len(self.runs)
        return str(n) if n == self.n_started else f"{n}/{self.n_started}"

    def mean(self, column: str) -> str:
        return number_text(mean(self.runs, column))

    def mean_percent(self, column: str) -> str:
        share = mean(self.runs, column)
        return DASH if share is None else f"{100.0 * share:.1f}"

    def mean_and_std(self, column: str) -> str:
        average, std = mean(self.runs, column), self.std(column)
        if average is None or std is None:
            return number_text(average)
        return f"{number_text(average)} ± {std:.{decimals(average)}f}"

    def std(self, column: str) -> float | None:
        return repetition_std(self.runs, column)

    def std_percent(self, column: str) -> float | None:
        std = self.std(column)
        return None if std is None else 100.0 * std

    def std_compared(self, figure: str) -> float | None:
        return paired_std(self.comparisons, figure)

    def compared(self, figure: str) -> str:
        if self.is_reference:
            return "ref."
        value = average_over_cells(self.comparisons)[figure]
        return DASH if value is None else f"{round(value, 1) + 0.0:+.1f}"  # + 0.0, or -0.04 would read -0.0

    def page_budget(self) -> str:
        sizes = self.runs[["page_size", "max_gpu_pages"]].dropna()
        return DASH if sizes.empty else "{} x {}".format(*sizes.iloc[0])


def _rows(frame: pd.DataFrame, by_context: bool) -> list[Row]:
    rows = []
    comparisons, references = compare(frame), set(baselines(frame).values())
    for context in sorted(unique(frame, "context_tokens")) if by_context else [None]:
        in_context = frame if context is None else frame[frame["context_tokens"] == context]
        for strategy, started in in_context.groupby("strategy", sort=False):
            own = [c for c in comparisons if c.strategy == strategy and context in (None, c.context_tokens)]
            rows.append(Row(strategy, str(context), len(started), successful(started), strategy in references, own))
    return rows


# Heading -> what stands below it.
CELLS: dict[str, Callable[[Row], str]] = {
    "context\ntokens": lambda row: row.context,
    "strategy": lambda row: row.strategy,
    "n": Row.count,
    "prefill\nms": lambda row: row.mean("ttft_ms"),
    "latency\nms": lambda row: row.mean_and_std("tpot_ms"),
    "speed-up\n%": lambda row: row.compared("latency_speedup_percent"),
    "tokens\nper s": lambda row: row.mean("tokens_per_second"),
    "tok/s\ngain %": lambda row: row.compared("throughput_speedup_percent"),
    "stall\n%": lambda row: row.mean("stall_percent"),
    "hit\nrate %": lambda row: row.mean_percent("hit_rate"),
    "same\ntokens": lambda row: _same_tokens(row.runs),
    "GPU\nMiB": lambda row: row.mean("gpu_memory_mb"),
    "GPU\nsaved %": lambda row: row.compared("gpu_memory_reduction_percent"),
    "device\nKV MiB": lambda row: row.mean("device_kv_mb"),
    "KV\nsaved %": lambda row: row.compared("device_kv_reduction_percent"),
    "host\nKV MiB": lambda row: row.mean("host_kv_mb"),
    "page size\nx budget": Row.page_budget,
    "issued\na run": lambda row: row.mean("prefetch_issued"),
    "prefetch\nhits %": lambda row: row.mean_percent("prefetch_hit_rate"),
    "accuracy\n%": lambda row: row.mean_percent("accuracy"),
    "coverage\n%": lambda row: row.mean_percent("coverage"),
    "timeliness\n%": lambda row: row.mean_percent("timeliness"),
    "mispred.\ncost %": lambda row: row.mean("misprediction_cost_percent"),
    "over\nLRU": lambda row: row.mean_percent("gain_over_lru"),
    "over LRU\n+ staging": lambda row: row.mean_percent("gain_over_lru_all_slots"),
    "choosing\n%": lambda row: row.mean("select_percent"),
    "predicting\n%": lambda row: row.mean("predict_percent"),
    "waiting\n%": lambda row: row.mean("stall_percent"),
}


# Heading -> unit and name of its figures, and a row's std between repetitions.
SPREADS: dict[str, tuple[str, str, Callable[[Row], float | None]]] = {
    "prefill\nms": (" ms", "prefill", lambda row: row.std("ttft_ms")),
    "speed-up\n%": (" points", "speed-up (paired)", lambda row: row.std_compared("latency_speedup_percent")),
    "tokens\nper s": ("", "tokens per s", lambda row: row.std("tokens_per_second")),
    "tok/s\ngain %": (" points", "gain (paired)", lambda row: row.std_compared("throughput_speedup_percent")),
    "stall\n%": (" points", "stall", lambda row: row.std("stall_percent")),
    "hit\nrate %": (" points", "hit rate", lambda row: row.std_percent("hit_rate")),
    "GPU\nMiB": (" MiB", "GPU", lambda row: row.std("gpu_memory_mb")),
    "device\nKV MiB": (" MiB", "device KV", lambda row: row.std("device_kv_mb")),
    "host\nKV MiB": (" MiB", "host KV", lambda row: row.std("host_kv_mb")),
    "issued\na run": ("", "pages issued", lambda row: row.std("prefetch_issued")),
    "prefetch\nhits %": (" points", "prefetch hits", lambda row: row.std_percent("prefetch_hit_rate")),
    "accuracy\n%": (" points", "accuracy", lambda row: row.std_percent("accuracy")),
    "coverage\n%": (" points", "coverage", lambda row: row.std_percent("coverage")),
    "timeliness\n%": (" points", "timeliness", lambda row: row.std_percent("timeliness")),
    "mispred.\ncost %": (" points", "mispred. cost", lambda row: row.std("misprediction_cost_percent")),
    "over\nLRU": (" points", "over LRU", lambda row: row.std_percent("gain_over_lru")),
    "over LRU\n+ staging": (" points", "over LRU + staging", lambda row: row.std_percent("gain_over_lru_all_slots")),
    "choosing\n%": (" points", "choosing", lambda row: row.std("select_percent")),
    "predicting\n%": (" points", "predicting", lambda row: row.std("predict_percent")),
    "waiting\n%": (" points", "waiting", lambda row: row.std("stall_percent")),
}


def _table(title: str, headings: tuple[str, ...], rows: Sequence[Row], caption: str) -> Table:
    body = [tuple(CELLS[heading](row) for heading in headings) for row in rows]
    return Table(title, headings, body, caption + _spread_note(headings, rows))


def _spread_note(headings: tuple[str, ...], rows: Sequence[Row]) -> str:
    """The largest spread of each column that shows none beside its figures."""
    largest, same = [], []
    for unit, name, std_of in (SPREADS[heading] for heading in headings if heading in SPREADS):
        stds = [std for std in map(std_of, rows) if std is not None]
        if any(stds):
            largest.append(f"{_std_text(max(stds))}{unit} for {name}")
        elif stds:
            same.append(name)
    notes = [", ".join(largest)] if largest else []
    notes += [f"0 for {', '.join(same)}"] if same else []
    return f" Std between repetitions at most {'; '.join(notes)}." if notes else ""


def _std_text(std: float) -> str:
    """One decimal; a spread too small for it is not shown as none."""
    return "<0.1" if std < 0.05 else f"{std:.{1 if std < 99.95 else 0}f}"


# ----------------------------------------------------------------------------------------------------------------------
# The tables
# ----------------------------------------------------------------------------------------------------------------------


def _same_tokens(runs: pd.DataFrame) -> str:
    """Whether all runs that were checked gave the baseline's tokens; an approximate one need not."""
    same = all_match(runs)
    if same is not False:
        return DASH if same is None else "yes"
    return "no" if runs["exact"].fillna(True).any() else "no,\napprox."


def strategy_table(frame: pd.DataFrame) -> Table:
    columns = "strategy", "n", "latency\nms", "speed-up\n%", "tokens\nper s", "stall\n%", "hit\nrate %"
    return _table(
        "Strategies: decode latency in ms per token (mean ± std of n runs)",
        (*columns, "mispred.\ncost %", "same\ntokens"),
        _rows(frame, by_context=False),
        f"{describe_setting(frame)}\n"
        f"Over all contexts, std between repetitions; speed-up from medians, against {_reference_names(frame)}."
        f"{_coverage_note(frame)}{link_note(frame)}",
    )


def context_table(frame: pd.DataFrame) -> Table:
    columns = "context\ntokens", "strategy", "n", "prefill\nms", "latency\nms", "speed-up\n%", "tok/s\ngain %"
    return _table(
        "By context length: decode latency in ms per token (mean ± std of n runs)",
        (*columns, "stall\n%", "hit\nrate %"),
        _rows(frame, by_context=True),
        "Speed-up: of decode. Gain: of tokens/s, prefill included. Both from medians, against"
        f" {_reference_names(frame)}."
        f"{_clamp_note(frame)}{link_note(frame)}",
    )


def memory_table(frame: pd.DataFrame) -> Table:
    columns = "context\ntokens", "strategy", "n", "GPU\nMiB", "GPU\nsaved %", "device\nKV MiB", "KV\nsaved %"
    used_gpu = bool(values(frame, "gpu_memory_mb"))
    return _table(
        "Memory in MiB, 2^20 bytes (mean of n runs)",
        (*columns, "host\nKV MiB", "page size\nx budget"),
        _rows(successful(frame), by_context=True),
        f"Saved: compared with {_reference_names(frame)}. Device KV: page pool and staging slots together."
        " Page size x budget: tokens a page x pages per layer and sequence."
        f"{'' if used_gpu else ' No GPU was used, so there is no GPU memory to report.'}",
    )


def paging_table(frame: pd.DataFrame) -> Table:
    done = successful(frame)
    paged = done[done["hit_rate"].notna()]
    columns = "strategy", "n", "hit\nrate %", "over\nLRU", "over LRU\n+ staging"
    return _table(
        "Paging in decode: what it hit, and where its time went (mean of n runs over all contexts)",
        (*columns, "choosing\n%", "predicting\n%", "waiting\n%"),
        _rows(paged, by_context=False),
        "Over LRU: hit rate above that of plain LRU with the same budget on the same requests, in points; + staging: of"
        " an LRU that held pages in the staging slots too. Choosing, predicting and waiting for pages: of decode time."
        f"{link_note(paged)}",
    )


def prediction_table(frame: pd.DataFrame) -> Table:
    done = successful(frame)
    columns = "strategy", "n", "issued\na run", "prefetch\nhits %", "accuracy\n%", "coverage\n%", "timeliness\n%"
    return _table(
        "Prediction in decode, counted in pages (mean of n runs over all contexts)",
        (*columns, "mispred.\ncost %"),
        _rows(done[done["prefetch_issued"].notna()], by_context=False),
        "Prefetch hits: there in time, so that computing did not wait / issued. Accuracy: wanted / issued."
        " Coverage: wanted / (wanted + misses). Timeliness: there in time / wanted. Misprediction cost: bytes"
        f" copied in and not used / all bytes copied in.{link_note(done[done['prefetch_issued'].notna()])}",
    )


def failure_table(frame: pd.DataFrame) -> Table:
    failures = failed(frame)[["strategy", "context_tokens", "status", "error"]].astype("string").fillna(DASH)
    return Table(
        f"Runs that did not finish: {len(failures)} of {len(frame)}",
        ("strategy", "context\ntokens", "status", "error"),
        list(failures.itertuples(index=False, name=None)),
        sections=(),
    )


def _reference_names(frame: pd.DataFrame) -> str:
    return ", ".join(dict.fromkeys(baselines(frame).values())) or "a baseline that succeeded (there is none)"


def _coverage_note(frame: pd.DataFrame) -> str:
    """A warning where the means of strategies are not over the same contexts."""
    groups = successful(frame).groupby("strategy")
    covered = {frozenset(unique(runs, "context_tokens")) for _, runs in groups}
    return " Not all strategies finished the same contexts: compare them by context." if len(covered) > 1 else ""


def _clamp_note(frame: pd.DataFrame) -> str:
    clamped = frame[frame["clamped"].fillna(False)].drop_duplicates(["model", "requested_tokens"])
    return "".join(
        f" Asked for {run.requested_tokens} tokens, ran with {run.context_tokens}: {run.clamp_reason}."
        for run in clamped.itertuples()
    )
