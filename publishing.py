"""What a sweep leaves behind besides its result files: summary, tables, plots, exports and the report on one page.

All of it is made from results alone, so it can be made again of any folder that has some, of one sweep or put together
from several. The front door for whoever wants one of these only is the module of its own: reporting.py, plot_list.py,
exports.py, report_html.py.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exports import write_exports
from plot_list import save_all_plots
from report_html import write_report
from reporting import SUMMARY_FILE, earlier_counts, load_results, print_tables, task_scores, to_frame, write_summary
from result_frame import Result, number_at, text_at
from result_store import whole

if TYPE_CHECKING:
    from rich.console import Console


def publish(
    blocks: Sequence[Result],
    folder: Path,
    console: Console,
    plot_formats: Sequence[str],
    **counts: Any,
) -> None:
    """Write the summary, the plots, the exports and the report, and print the tables.

    Args:
        blocks: results, as their files hold them.
        folder: where to.
        plot_formats: of `plots.FORMATS`; none for no plots, in the report neither.
        **counts: as for `reporting.write_summary`.
    """
    summary = write_summary(folder, results=blocks, **counts)
    frame = to_frame(blocks)
    print_tables(frame, console, task_scores(blocks))
    if plot_formats:
        save_all_plots(blocks, folder, plot_formats)
    write_exports(blocks, frame, folder)
    report = write_report(blocks, frame, summary, folder, plots=bool(plot_formats))
    for reason, n_runs in Counter(filter(None, (text_at(block, "quality.error") for block in blocks))).items():
        print(
            f"quality of {n_runs} run{'s' if n_runs > 1 else ''}, which counts as a failure: {reason}", file=sys.stderr
        )
    console.print(f"results: {folder}, summary: {folder / SUMMARY_FILE}, report: {report}", soft_wrap=True)


def publish_folder(folder: Path, console: Console, plot_formats: Sequence[str]) -> bool:
    """Publish what a folder holds, into it; files that hold no result are named on stderr.

    Returns:
        Whether all of it is whole: each file a result, and each result good.

    Raises:
        ValueError: there is nothing.
    """
    blocks, problems = load_results(folder)
    for problem in problems:
        print(f"left out: {problem}", file=sys.stderr)
    if not blocks:
        raise ValueError(f"{folder}: there are no results; name a folder that a run has written to")
    seconds = sum(number_at(block, "duration_seconds") or 0.0 for block in blocks)
    counts = {"duration_seconds": seconds, "reused": len(blocks)} | earlier_counts(folder, blocks)
    publish(blocks, folder, console, plot_formats, problems=problems, **counts)
    return whole(blocks) and not problems
