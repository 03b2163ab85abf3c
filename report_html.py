"""`report.html`: everything about a set of results on one page that needs nothing else, no network and no script.

    python report_html.py logs/sample      write it for a folder of results

The order is that of a paper's supplement: what was run and on what, the tables, the figures, what failed, how to make
it again, and what every figure means. What a reader must know before believing a number stands first: that a link was
simulated, that runs failed, that weights were random. Tables are those of the console (`result_tables.tables`), figures
those of `report_figures.drawings`; this module decides about neither.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from html_text import Html, element, joined
from quality_frame import approximate, task_scores
from report_facts import commit, dates, duration, environments, models
from report_figures import data_uri, drawings
from report_parts import Marks, code_part, figure_part, notice_part, section_part, table_part, terms_part
from report_style import STYLE
from reporting import earlier_counts, summarise
from result_frame import (
    Result,
    describe_setting,
    dig,
    failed,
    load_results,
    text_at,
    to_frame,
    under_simulated_link,
    unique,
)
from result_tables import failure_table, tables
from run_settings import experiment_list, first_seed, settings_table, shared_settings
from text_tables import DASH, Table
from utils import atomic_write_text

if TYPE_CHECKING:
    import pandas as pd

MOST_FIGURE_BYTES = 2_600_000  # of all figures together; a page of more is slow to open
OK, NO_RESULTS = 0, 1


def write_report(
    results: Sequence[Result], frame: pd.DataFrame, summary: Mapping[str, Any], folder: str | Path, plots: bool = True
) -> Path:
    """Write `report.html` into a folder; returns its path.

    Args:
        frame, summary: of `to_frame` and `reporting.summarise`, from these results.
        plots: whether there are figures in it.
    """
    path = Path(folder) / "report.html"
    atomic_write_text(path, report_page(results, frame, summary, plots))
    return path


def report_page(results: Sequence[Result], frame: pd.DataFrame, summary: Mapping[str, Any], plots: bool = True) -> str:
    """The whole page; arguments as of `write_report`."""
    sections = list(_sections(results, frame, summary, plots))
    title = "KV cache strategies, measured"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", f"{title}: {', '.join(unique(frame, 'model')) or 'no runs'}"),
        element("style", Html(STYLE)),
    )
    contents = element(
        "nav",
        element("p", "Contents"),
        element("ol", [element("li", element("a", name, href=f"#{place}")) for place, name, _ in sections]),
        aria_label="Contents",
    )
    main = element("main", [section_part(place, name, inner) for place, name, inner in sections])
    page = element(
        "div",
        _header(title, results, frame, summary),
        _notices(results, frame, summary),
        element("div", contents, main, class_="body"),
        element("footer", "Written by KV Prefetch from the result files beside it."),
        class_="page",
    )
    return f"<!DOCTYPE html>\n{element('html', head, element('body', page), lang='en')}\n"


def _sections(
    results: Sequence[Result], frame: pd.DataFrame, summary: Mapping[str, Any], plots: bool
) -> Iterator[tuple[str, str, Any]]:
    """Anchor, title and inner of each section that has something to say."""
    marks, settings = _marks(frame), settings_table(results)
    numbered = [settings] if len(settings.headings) > 1 else []
    numbered += _result_tables(results, frame)
    parts = [table_part(table, number, marks) for number, table in enumerate(numbered, 1)]
    if results:
        first = [parts.pop(0)] if numbered[0] is settings else []
        shared = element("p", "Settings that do not differ stand ", element("a", "further down", href="#settings"), ".")
        yield "run", "What was run", [element("p", _sentence(frame)), first, shared]
    if parts:
        yield "tables", "Results", [_legend(marks), parts]
    if plots and (figures := list(_figures(results, frame))):
        yield "figures", "Figures", figures
    yield "failures", "Failures", _failures(frame, len(numbered) + 1, marks)
    if results:
        blocks = (*models(results), *environments(results))
        yield "machine", "Model, machine and versions", [terms_part(facts, "machine") for facts in blocks]
        yield "settings", "Settings that do not differ", list(_same_settings(results))
        yield "again", "Making it again", _again(results)
    spelled = ((element("code", name), said) for name, said in summary["definitions"].items())
    yield "definitions", "What the figures mean", [element("p", _DEFINED), terms_part(spelled, "terms")]
    if summary["not_measured"]:
        yield "missing", "What was not measured, and why", terms_part(_reasons(summary["not_measured"]), "machine")


_DEFINED = "Named as in experiment_summary.json, which has the same figures for other programs."


# --- the head of the page -----------------------------------------------------------------------------------------


def _header(title: str, results: Sequence[Result], frame: pd.DataFrame, summary: Mapping[str, Any]) -> Html:
    counts = summary["experiment_summary"]
    seconds = counts["total_duration_seconds"]
    runs = f"{counts['successful_experiments']} of {counts['total_experiments']} succeeded"
    planned = counts["planned_experiments"]
    runs += f"; {planned} were planned" if planned not in (None, counts["total_experiments"]) else ""
    commits = dict.fromkeys(commit(result) for result in results)
    facts = {
        "Date": dates(results),
        "Runs": runs + (f", in {duration(seconds)}" if seconds is not None else ""),
        "Models": ", ".join(unique(frame, "model")) or DASH,
        "Context, tokens": ", ".join(f"{tokens:,}" for tokens in sorted(unique(frame, "context_tokens"))) or DASH,
        "Machine": "; ".join(summary["machines"]) or DASH,
        "Link": "; ".join(summary["links"]) or "no pages travelled",
        "Program, git commit": "; ".join(commits) or DASH,
    }
    lead = "What keeping, paging and prefetching the KV cache cost in time, in memory and in answers."
    return element(
        "header",
        element("p", "KV Prefetch · report", class_="eyebrow"),
        element("h1", title),
        element("p", lead, class_="lead"),
        terms_part(facts, "facts"),
    )


def _notices(results: Sequence[Result], frame: pd.DataFrame, summary: Mapping[str, Any]) -> Iterator[Html]:
    """What to know before believing a number."""
    counts, links = summary["experiment_summary"], under_simulated_link(frame)
    if links:
        names = "; ".join(link.removeprefix("simulated ") for link in links)
        yield notice_part("warn", f"Simulated link: {names}", summary["definitions"]["simulated"])
    n_failed = len(failed(frame))
    if not results:
        yield notice_part("bad", "No run was made", "So there is nothing to report.")
    elif n_failed == len(frame):
        yield notice_part("bad", "No run succeeded", _see_failures(f"All {n_failed} runs failed."))
    elif n_failed:
        yield notice_part("bad", f"{n_failed} of {len(frame)} runs failed", _see_failures("Means are over the others."))
    if counts["interrupted"]:
        yield notice_part("bad", "Interrupted", "The sweep was stopped before it had made all its runs.")
    if problems := summary["unreadable_files"]:
        yield notice_part("bad", f"{_count(len(problems), 'file')} could not be read", *problems)
    random = unique(frame[frame["random_weights"].fillna(False)], "model")
    if random:
        words = "Their figures of speed and memory mean something, their answers do not."
        yield notice_part("warn", f"Random weights: {', '.join(random)}", words)
    by_strategy = approximate(frame).groupby("strategy", sort=False)
    unsaid = [strategy for strategy, runs in by_strategy if runs["kl_mean"].isna().all()]
    if unsaid:
        words = "Approximate, and nobody measured what that costs in answers: their speed alone says little."
        yield notice_part("warn", f"Quality not measured: {', '.join(unsaid)}", words)


def _see_failures(words: str) -> Html:
    return joined([words, " ", element("a", "Their reasons", href="#failures"), "."])


# --- what was run and what came of it -----------------------------------------------------------------------------


def _sentence(frame: pd.DataFrame) -> str:
    """`36 runs: 4 strategies, at 500 and 1,000 tokens of context, 3 times each.`, with what else is the same."""
    lengths = [f"{tokens:,}" for tokens in sorted(unique(frame, "context_tokens"))]
    repetitions = frame["repetition"].nunique()
    times = f", {repetitions} times each" if repetitions > 1 else ""
    at = f" at {_and(lengths)} tokens of context" if lengths else ""
    counted = f"{_count(len(frame), 'run')}: {_count(frame['strategy'].nunique(), 'strategy')}"
    return f"{counted}{at}{times}. {describe_setting(frame)}."


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what.removesuffix('y')}{'ies' if what.endswith('y') else 's'}"


def _and(words: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _same_settings(results: Sequence[Result]) -> Iterator[Html]:
    for who, settings in shared_settings(results).items():
        yield element("h3", f"The same in {who}")
        yield terms_part(((element("code", key), value) for key, value in settings.items()), "settings")


def _marks(frame: pd.DataFrame) -> Marks:
    simulated = (name for strategies in under_simulated_link(frame).values() for name in strategies)
    return Marks(frozenset(unique(approximate(frame), "strategy")), frozenset(simulated))


def _result_tables(results: Sequence[Result], frame: pd.DataFrame) -> list[Table]:
    """Those of the console but for the failures, which have a section of their own."""
    title = failure_table(frame).title
    return [table for table in tables(frame, task_scores(results)) if table.title != title]


def _legend(marks: Marks) -> Html:
    words = [f"{DASH} stands for a figure that was not measured, or that there is none of; it is never a zero."]
    if marks.approximate:
        words += [" ", element("span", "approx.", class_="tag"), " reads only a part of what the baseline reads."]
    if marks.simulated:
        words += [
            " ",
            element("span", "sim. link", class_="tag sim"),
            " waited for a simulated link: its times are no measurement of a bus.",
        ]
    return element("p", words)


def _figures(results: Sequence[Result], frame: pd.DataFrame) -> Iterator[Html]:
    taken, left_out = 0, []
    for number, drawn in enumerate(drawings(results, frame), 1):
        address = data_uri(drawn.figure)
        if taken + len(address) > MOST_FIGURE_BYTES:
            left_out.append(drawn.title)
            continue
        taken += len(address)
        place, inches = number - len(left_out), drawn.figure.get_figwidth()
        yield figure_part(place, drawn.name, drawn.title, drawn.caption, drawn.shows, address, inches)
    if left_out:
        yield element("p", f"Left out, to keep this page small: {', '.join(left_out)}.")


def _failures(frame: pd.DataFrame, number: int, marks: Marks) -> Html:
    """Every reason, once for each strategy and context that it stopped, with how many runs that were."""
    table = failure_table(frame)
    if not table.rows:
        return element("p", "No run failed." if len(frame) else "No run was made.")
    strategy, context, *reason = table.headings
    rows = [(name, length, str(n), *said) for (name, length, *said), n in Counter(table.rows).items()]
    return table_part(Table(table.title, (strategy, context, "runs", *reason), rows, sections=()), number, marks)


# --- making it again, and what it all means -----------------------------------------------------------------------


def _again(results: Sequence[Result]) -> list[Any]:
    """The commands and the list that make these runs again, and the commands that made them."""
    commits = {text_at(result, "environment.git_commit") for result in results}
    seeds = {first_seed(result) for result in results}
    seed = f" --seed {seeds.pop()}" if len(seeds) == 1 else ""
    steps = [f"python main.py --config experiments.yaml{seed} --output results"]
    notes = ["It was written back from the results, so it holds what was run, whatever became of the file it stood in."]
    if len(commits) == 1 and None not in commits:
        steps.insert(0, f"git checkout {commits.pop()}")
    else:
        notes.append("The results are not of one known commit of the program.")
    if any(dig(result, "environment.git_dirty") for result in results):
        notes.append("Tracked files differed from the commit, so that the commit alone is not the program that ran.")
    made_with = [command for command in dict.fromkeys(map(_command, results)) if command]
    return [
        element("p", "Save the list below as ", element("code", "experiments.yaml"), ". ", " ".join(notes)),
        code_part("\n".join(steps)),
        code_part(experiment_list(results).rstrip()),
        [element("p", "These results were made with:"), code_part("\n".join(made_with))] if made_with else None,
    ]


def _command(result: Result) -> str | None:
    words = dig(result, "environment.argv")
    return f"python {shlex.join(map(str, words))}" if isinstance(words, list) and words else None


def _reasons(not_measured: Mapping[str, str]) -> dict[str, str]:
    """Reason -> the figures that it explains."""
    reasons: dict[str, dict[str, None]] = {}
    for key, reason in not_measured.items():
        reasons.setdefault(reason[:1].upper() + reason[1:], {})[key.rpartition(".")[2].removeprefix("average_")] = None
    return {reason: ", ".join(figures) for reason, figures in reasons.items()}


# --- the command --------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report for a folder of results; returns the exit code."""
    parser = argparse.ArgumentParser(
        description="Write report.html, which needs nothing else, for a folder of results."
    )
    parser.add_argument("folder", type=Path, help="holds the results, and gets the report")
    parser.add_argument("--no-plots", action="store_true", help="no figures in it")
    arguments = parser.parse_args(argv)
    results, problems = load_results(arguments.folder)
    if not results:
        print(*problems, f"{arguments.folder}: no results there", sep="\n", file=sys.stderr)
        return NO_RESULTS
    summary = summarise(results, **earlier_counts(arguments.folder, results), problems=problems)
    print(write_report(results, to_frame(results), summary, arguments.folder, not arguments.no_plots))
    return OK


if __name__ == "__main__":
    sys.exit(main())
