"""Tables of results: strategies, contexts, memory, prediction; with those of quality beside them.

What can stand in a row is written down once, in `CELLS`: heading -> text of a `Row`, which is one strategy, at one
context length or over all. A table is then a title, some headings, its rows, and a caption that says what they mean.

Every average stands beside its n. Its spread stands beside it too, or, where 80 columns leave no room, the largest of
its column in the caption (`SPREADS`). A median or a ratio has its 95 % interval beneath it. What was not measured is an
em dash.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from comparison import (
    Comparison,
    all_match,
    average_over_cells,
    compare,
    mean,
    overall_speedup,
    paired_std,
    references,
    repetition_std,
    uneven_cells,
    wide_cells,
)
from quality_tables import quality_table, reading_table, tasks_table
from result_frame import describe_setting, failed, successful, unique, values
from run_statistics import NO_DIFFERENCE, UNEVEN_PERCENT, WIDE_PERCENT, median_with_interval
from text_tables import DASH, Table, caveats, decimals, number_text, ratio_text

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
    """All tables that have something to say: strategies, quality, reading, tasks, contexts, times of tokens, memory,
    paging, prediction, failures.

    Args:
        frame: of `to_frame`.
        scores: of `quality_frame.task_scores`, from the same results; None leaves out the table of tasks.
    """
    made = [strategy_table(frame), quality_table(frame), reading_table(frame)]
    made += [] if scores is None else [tasks_table(scores)]
    others = (context_table, token_time_table, memory_table, paging_table, prediction_table, failure_table)
    made += [make(frame) for make in others]
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

    def median_and_interval(self, column: str) -> str:
        found = median_with_interval(values(self.runs, column))
        return with_interval(number_text, found["median"], found["low"], found["high"])

    def speedup(self) -> str:
        if self.is_reference:
            return "ref."
        found = overall_speedup(self.comparisons)
        return with_interval(ratio_text, found.ratio, found.low, found.high)

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


def with_interval(text: Callable[[float], str], value: float | None, low: float | None, high: float | None) -> str:
    """A figure, and on a line of its own its interval, where it has one."""
    if value is None:
        return DASH
    return text(value) if low is None else f"{text(value)}\n{text(low)}-{text(high)}"


def _rows(frame: pd.DataFrame, by_context: bool) -> list[Row]:
    rows = []
    comparisons, compared_with = compare(frame), set(references(frame).values())
    for context in sorted(unique(frame, "context_tokens")) if by_context else [None]:
        in_context = frame if context is None else frame[frame["context_tokens"] == context]
        for strategy, started in in_context.groupby("strategy", sort=False):
            own = [c for c in comparisons if c.strategy == strategy and context in (None, c.context_tokens)]
            rows.append(Row(strategy, str(context), len(started), successful(started), strategy in compared_with, own))
    return rows


# Heading -> what stands below it.
CELLS: dict[str, Callable[[Row], str]] = {
    "context\ntokens": lambda row: row.context,
    "strategy": lambda row: row.strategy,
    "n": Row.count,
    "prefill\nms": lambda row: row.mean("ttft_ms"),
    "latency\nms": lambda row: row.mean_and_std("tpot_ms"),
    "latency\nmedian ms": lambda row: row.median_and_interval("tpot_ms"),
    "speed-up\nx": Row.speedup,
    "tokens\nper s": lambda row: row.mean("tokens_per_second"),
    "tok/s\ngain %": lambda row: row.compared("throughput_speedup_percent"),
    "p50\nms": lambda row: row.median_and_interval("itl_p50_ms"),
    "p90\nms": lambda row: row.median_and_interval("itl_p90_ms"),
    "p99\nms": lambda row: row.median_and_interval("itl_p99_ms"),
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
    rows = _rows(frame, by_context=False)
    columns = "strategy", "n", "latency\nms", "speed-up\nx", "tokens\nper s", "stall\n%", "hit\nrate %"
    return _table(
        "Strategies: decode latency in ms per token (mean ± std of n runs)",
        (*columns, "mispred.\ncost %", "same\ntokens"),
        rows,
        f"{describe_setting(frame)}\n"
        "Over all contexts, std between repetitions. Speed-up: latency of"
        f" {_reference_names(frame)} / latency, in pairs of runs made side by side: median of each context, geometric"
        f" mean over contexts, with its 95 % interval.{_verdict_note(rows, by_context=False)}{_wide_note(frame)}"
        f"{_coverage_note(frame)}{caveats(frame)}",
    )


def context_table(frame: pd.DataFrame) -> Table:
    rows = _rows(frame, by_context=True)
    columns = "context\ntokens", "strategy", "n", "prefill\nms", "latency\nmedian ms", "speed-up\nx", "tok/s\ngain %"
    return _table(
        "By context length: decode latency in ms per token (median of n runs, interval)",
        (*columns, "stall\n%", "hit\nrate %"),
        rows,
        f"Speed-up: of decode, latency of {_reference_names(frame)} / latency, median of the pairs of runs made side by"
        f" side; with 95 % intervals.{_verdict_note(rows, by_context=True)} Gain: of tokens/s, prefill included,"
        f" from medians. Prefill and the last columns: means.{_wide_note(frame)}{_clamp_note(frame)}{caveats(frame)}",
    )


def token_time_table(frame: pd.DataFrame) -> Table:
    done = successful(frame)
    return _table(
        "Times between tokens in decode: percentiles of a run, median of n runs, interval",
        ("context\ntokens", "strategy", "n", "p50\nms", "p90\nms", "p99\nms"),
        _rows(done[done["itl_p50_ms"].notna()], by_context=True),
        f"p90: nine tokens of ten took no longer. Beneath: 95 % interval.{caveats(done)}",
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
        f"{'' if used_gpu else ' No GPU was used, so there is no GPU memory to report.'}{caveats(frame)}",
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
        f"{caveats(paged)}",
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
        f" copied in and not used / all bytes copied in.{caveats(done[done['prefetch_issued'].notna()])}",
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
    return ", ".join(dict.fromkeys(references(frame).values())) or "a baseline that succeeded (there is none)"


def _verdict_note(rows: Sequence[Row], by_context: bool) -> str:
    """Which speed-ups show no difference, which have no interval, and of how many pairs the others' are."""
    named: dict[str, list[str]] = {}
    pairs: set[int] = set()
    for row in rows:
        speedup = overall_speedup(row.comparisons)
        name = f"{row.strategy} at {row.context}" if by_context else row.strategy
        if speedup.ratio is not None and speedup.differs is not True:
            named.setdefault(speedup.verdict or "", []).append(name)
        if speedup.differs is not None:
            pairs |= {len(comparison.paired_log_ratios) for comparison in row.comparisons}
    within = {NO_DIFFERENCE: " (1 lies within the interval)"}
    notes = [f" {words.capitalize()}{within.get(words, '')}: {', '.join(names)}." for words, names in named.items()]
    if by_context and (few := sorted(n for n in pairs if 2 <= n <= 5)):
        notes.append(
            f" Of {few[0]} pairs the interval is their range, which holds the truth in {range_chance(few[0])}."
        )
    return "".join(notes)


def range_chance(n_pairs: int) -> str:
    """How often the range of so few pairs holds the true median; see `run_statistics`."""
    return f"{100.0 * (1.0 - 2.0 ** (1 - n_pairs)):.0f} of 100 cases"


def _wide_note(frame: pd.DataFrame) -> str:
    """Warnings of figures that more runs, or a quieter machine, may change."""
    return _warning(
        wide_cells(frame), f"runs differ by more than {WIDE_PERCENT:.0f} % ((largest - smallest) / median latency)"
    ) + _warning(
        uneven_cells(frame),
        f"a few tokens took so long that a run's mean is more than {UNEVEN_PERCENT:.0f} % above its median, as when"
        " something else runs beside it",
    )


def _warning(cells: Sequence[tuple[str, int, float]], what: str) -> str:
    named = ", ".join(f"{strategy} at {context} ({percent:.1f} %)" for strategy, context, percent in cells)
    return f" WARNING: {what}: {named}." if cells else ""


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
