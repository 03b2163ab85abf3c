"""Results for other programs: a spreadsheet, a paper, a stream of steps; written beside the summary after every sweep.

    python exports.py logs/sample          write them for a folder of results

| file | what it holds |
|---|---|
| `results.csv` | one row per run, the columns of `result_frame.to_frame`; empty where not measured |
| `task_scores.csv` | one row per run and task, the columns of `quality_frame.task_scores`; only where there are tasks |
| `tables.md`, `tables.tex` | the tables of the console |
| `steps.jsonl` | one line per forward pass of a paged run: which run, and its `recorder.StepRecord` |

Each file is whole or not there: it is written under another name and renamed. The steps are written one by one, since
ten thousand runs have a million of them. A file that an earlier sweep left and this one has nothing for is removed, as
it would pass for this one's.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quality_frame import task_scores
from result_frame import Result, context_tokens, count_at, dig, is_finite, load_results, strategy_labels, to_frame
from result_tables import tables
from table_formats import latex_document, to_markdown
from utils import whole_file

if TYPE_CHECKING:
    import pandas as pd

OK, NO_RESULTS = 0, 1


def write_exports(results: Sequence[Result], frame: pd.DataFrame, folder: str | Path) -> list[Path]:
    """Write all of them into a folder; returns the files written.

    Args:
        frame: of `to_frame`, from these results.
    """
    folder, written = Path(folder), []
    scores = task_scores(results)
    made = tables(frame, scores)
    steps = step_lines(results)
    first = next(steps, None)
    for name, lines in (
        ("results.csv", None if frame.empty else [csv_text(frame)]),
        ("task_scores.csv", None if scores.empty else [csv_text(scores)]),
        ("tables.md", ["\n\n".join(map(to_markdown, made)), "\n"]),
        ("tables.tex", latex_document(made)),
        ("steps.jsonl", None if first is None else _after(first, steps)),
    ):
        path = folder / name
        if lines is None:
            path.unlink(missing_ok=True)
            continue
        # What no UTF-8 can hold, half a character in somebody's error message, becomes a question mark.
        with whole_file(path, errors="replace") as file:
            file.writelines(lines)
        written.append(path)
    return written


def csv_text(frame: pd.DataFrame) -> str:
    """A frame as comma-separated values with a line of names; missing values are empty."""
    return frame.to_csv(index=False, lineterminator="\n")


def step_lines(results: Sequence[Result]) -> Iterator[str]:
    """A line of strict JSON for each forward pass that was recorded: prefill chunks and decode steps, see `phase`."""
    for label, result in zip(strategy_labels(results), results, strict=True):
        run = {
            "run_id": result.get("run_id"),
            "strategy": label,
            "context_tokens": context_tokens(result),
            "repetition": count_at(result, "spec.repetition"),
        }
        steps = dig(result, "steps")
        for step in steps if isinstance(steps, list) else ():
            yield _json_line({**run, **step})


def _json_line(values: Mapping[str, Any]) -> str:
    try:
        return json.dumps(values, allow_nan=False) + "\n"
    except ValueError:  # a time that is no number: such a run was not written as a result either
        return json.dumps({key: _strict(value) for key, value in values.items()}, allow_nan=False) + "\n"


def _strict(value: Any) -> Any:
    return None if isinstance(value, float) and not is_finite(value) else value


def _after(first: str, others: Iterable[str]) -> Iterator[str]:
    yield first
    yield from others


def main(argv: Sequence[str] | None = None) -> int:
    """Write them for a folder of results; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="holds the results, and gets the files")
    folder = parser.parse_args(argv).folder
    results, problems = load_results(folder)
    print(*problems, sep="\n", end="\n" if problems else "", file=sys.stderr)
    if not results:
        print(f"{folder}: no results there; run main.py --output {folder}", file=sys.stderr)
        return NO_RESULTS
    print(*write_exports(results, to_frame(results), folder), sep="\n")
    return OK


if __name__ == "__main__":
    sys.exit(main())
