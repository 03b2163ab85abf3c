"""What `--compare A B` prints: what differs, what has no partner, how many verdicts of each kind, and every figure.

The digest comes before the figures, because a reader wants to know first whether anything became worse. What the
verdicts are worth stands beside it: of few pairs an interval is narrow by chance as often as `run_statistics.py` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from comparison import wide_cells
from folder_comparison import (
    BETTER,
    METRICS,
    MISSING,
    TOO_FEW,
    WORSE,
    Folder,
    FolderComparison,
    Metric,
    MetricComparison,
    compare_folders,
)
from regression_gate import Outcome, judge, parse_condition
from result_frame import successful, under_simulated_link
from run_statistics import NO_DIFFERENCE, WIDE_PERCENT
from text_tables import DASH, Table, number_text, ratio_text

if TYPE_CHECKING:
    from rich.console import Console


def print_comparison(folders: Sequence[Path], conditions: Sequence[str], console: Console) -> bool:
    """Compare two folders, print the tables, then what became of each condition; whether all passed.

    Raises:
        ValueError: a condition is no condition, or the folders cannot be compared.
    """
    parsed = [parse_condition(text) for text in conditions]
    compared = compare_folders(*folders)
    console.print(header(compared), soft_wrap=True)
    console.print()
    for table in folder_tables(compared):
        console.print(table.to_rich(), "")
    outcomes = [judge(condition, compared) for condition in parsed]
    for outcome in outcomes:
        console.print(outcome_text(outcome), soft_wrap=True)
    return all(outcome.passed for outcome in outcomes)


def header(compared: FolderComparison) -> str:
    """The folders, what could not be read in them, and how many runs belong together."""
    lines = []
    for side, folder in (("A", compared.a), ("B", compared.b)):
        lines.append(f"{side}: {folder.path}, {_runs(folder)}")
        lines += [f"   not read: {problem}" for problem in folder.problems]
        wide = [f"{strategy} at {context} ({percent:.0f} %)" for strategy, context, percent in wide_cells(folder.frame)]
        if wide:
            lines.append(
                f"   WARNING: runs of {side} differ by more than {WIDE_PERCENT:g} % ((largest - smallest) / median"
                f" latency): {', '.join(wide)}"
            )
    same, known = compared.same_tokens
    tokens = f"; the same tokens in {same} of {known}" if known else ""
    lines.append(f"{len(compared.pairs)} pairs of runs{tokens}")
    if not compared.differences():
        lines.append("Machine, versions, commit, links and settings are the same.")
    return "\n".join(lines)


def _runs(folder: Folder) -> str:
    n, done = len(folder.results), len(successful(folder.frame))
    times = sorted(str(result["started_at"])[:16] for result in folder.results if result.get("started_at"))
    when = f", from {times[0]} to {times[-1]}" if times else ""
    return f"{n} runs{'' if done == n else f', {n - done} of them failed'}{when}"


def folder_tables(compared: FolderComparison) -> list[Table]:
    """All that have something to say: what differs, runs without a partner, the digest, and a table per metric."""
    made = [difference_table(compared), unmatched_table(compared), digest_table(compared)]
    made += [metric_table(compared, metric) for metric in METRICS.values()]
    return [table for table in made if table.rows]


def difference_table(compared: FolderComparison) -> Table:
    return Table(
        "What differs besides the figures", ("what differs", "in A", "in B"), compared.differences(), sections=()
    )


def unmatched_table(compared: FolderComparison) -> Table:
    rows = [
        (
            entry.side,
            str(entry.context_tokens),
            entry.strategy,
            ", ".join(map(str, entry.repetitions)),
            entry.reason,
        )
        for entry in compared.unmatched
    ]
    return Table(
        "Runs without a partner, left out of all that follows",
        ("only\nin", "context\ntokens", "strategy", "repetitions", "why"),
        rows,
        "Partners have the same spec, or else the same mode, name, model, batch, generation settings, context and"
        " repetition.",
        sections=("only\nin",),
    )


def digest_table(compared: FolderComparison) -> Table:
    """How many strategies and contexts got each verdict, by metric; the rows over all contexts are not counted."""
    rows = []
    for metric in METRICS.values():
        verdicts = [c.verdict for c in compared.figures if c.metric is metric and c.context_tokens is not None]
        if verdicts:
            kinds = [verdicts.count(kind) for kind in (BETTER, WORSE, NO_DIFFERENCE, TOO_FEW)]
            missing = sum(verdict.startswith(MISSING) for verdict in verdicts)
            rows.append((metric.name, *(str(count) for count in (*kinds, missing))))
    headings = "metric", "better", "worse", "no difference\nshown", "too few\nruns", "missing on\none side"
    return Table(
        "B against A: how many strategies and contexts are",
        headings,
        rows,
        "Better and worse: the 95 % interval of the ratio B / A leaves out 1."
        f"{_chance_note(compared)} The runs of A and B were not made side by side: a machine that was slower on one day"
        f" is in no interval.{_once_note(compared)}{_link_note(compared)}\nBelow, n counts pairs of runs; A and B are"
        " medians over runs; B / A is the median over pairs, and over all contexts the geometric mean of those.",
        sections=(),
    )


def _chance_note(compared: FolderComparison) -> str:
    judged = [c for c in compared.figures if c.context_tokens is not None and not c.metric.once and c.ratio.n_pairs > 1]
    few = sorted({c.ratio.n_pairs for c in judged if c.ratio.n_pairs <= 5})
    if not few:
        return " It does so by chance alone in 5 to 12 of 100 cases where nothing differs." if judged else ""
    return (
        f" Of {few[0]} pairs it is their range, which leaves out 1 by chance alone in {200 * 0.5 ** few[0]:.0f} of 100"
        " cases where nothing differs."
    )


def _once_note(compared: FolderComparison) -> str:
    names = [
        metric.name for metric in METRICS.values() if metric.once and any(c.metric is metric for c in compared.figures)
    ]
    return f" One pair decides for {', '.join(names)}, the same in all repetitions." if names else ""


def _link_note(compared: FolderComparison) -> str:
    links = dict.fromkeys(link for side in (compared.a, compared.b) for link in under_simulated_link(side.frame))
    return f" Figures of strategies that page are under a simulated link ({'; '.join(links)})." if links else ""


def metric_table(compared: FolderComparison, metric: Metric) -> Table:
    """A, B, their ratio and the verdict, by context and strategy."""
    own = [c for c in compared.figures if c.metric is metric]
    better = "lower" if metric.lower_is_better else "higher"
    negligible = f"Values up to {metric.negligible:g} {metric.unit} count as equal." if metric.negligible else ""
    return Table(
        f"{metric.name}: {metric.title}; {better} is better",
        (
            "context\ntokens",
            "strategy",
            "n",
            f"A\n{metric.unit}",
            f"B\n{metric.unit}",
            "B / A",
            "95 %\ninterval",
            "verdict",
        ),
        [_metric_row(metric, c) for c in own],
        negligible,
    )


def _metric_row(metric: Metric, c: MetricComparison) -> tuple[str, ...]:
    ratio, has_interval = c.ratio, c.ratio.low is not None and not metric.once
    return (
        "all" if c.context_tokens is None else str(c.context_tokens),
        c.strategy,
        str(ratio.n_pairs),
        _figure_text(metric, c.a),
        _figure_text(metric, c.b),
        DASH if ratio.ratio is None else ratio_text(ratio.ratio),
        f"{ratio_text(ratio.low)}-{ratio_text(ratio.high)}" if has_interval else DASH,
        c.verdict,
    )


def _figure_text(metric: Metric, value: float | None) -> str:
    """As in all tables, but that a divergence of a millionth is not shown as 0."""
    shown = None if value is None else metric.scale * value
    return f"{shown:#.2g}" if shown is not None and 0 < abs(shown) < 0.995 else number_text(shown)


def outcome_text(outcome: Outcome) -> str:
    """`--fail-if tpot_ms>5%: FAILED`, and where and why."""
    verdict = "passed" if outcome.passed else "FAILED"
    if not outcome.lost and not outcome.holds_at and not outcome.n_judged:
        verdict += ", as there was nothing to judge"
    lines = [f"--fail-if {outcome.condition}: {verdict} ({outcome.n_judged} figures judged)"]
    lines += [f"  lost: {what}" for what in outcome.lost]
    lines += [f"  {place}" for place in outcome.holds_at]
    lines += [f"  not judged: {place}" for place in outcome.not_judged]
    return "\n".join(lines)
