"""How a sweep is shown while it runs: a bar with an ETA on a terminal, a line for each run elsewhere.

Everything goes to stderr, so that stdout holds the tables and nothing else. What is logged goes to a file besides.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from metrics import RunResult
    from run_specs import RunSpec


class Silent:
    """Shows nothing."""

    def resumed(self, n_results: int, note: str) -> None:
        pass

    def loading(self, model_name: str) -> None:
        pass

    def started(self, spec: RunSpec) -> None:
        pass

    def token(self, n_tokens: int) -> None:
        pass

    def finished(self, result: RunResult) -> None:
        pass


class Lines(Silent):
    """One plain line for each run, for logs and pipes."""

    def __init__(self, n_runs: int):
        self.n_runs, self.n_finished = n_runs, 0

    def resumed(self, n_results: int, note: str) -> None:
        self.n_finished = n_results
        print(note, file=sys.stderr, flush=True)

    def loading(self, model_name: str) -> None:
        print(f"loading {model_name}", file=sys.stderr, flush=True)

    def finished(self, result: RunResult) -> None:
        self.n_finished += 1
        print(f"[{self.n_finished}/{self.n_runs}] {outcome(result)}", file=sys.stderr, flush=True)


class Bar(Silent):
    """A progress bar over the runs, with the run and token under way."""

    def __init__(self, progress: Progress, n_runs: int):
        self.progress = progress
        self.task = progress.add_task("starting", total=n_runs)
        self.now = ""

    def resumed(self, n_results: int, note: str) -> None:
        self.progress.reset(self.task, completed=n_results)  # and not an advance, which would spoil the ETA
        self.progress.console.print(note, markup=False)

    def loading(self, model_name: str) -> None:
        self.progress.update(self.task, description=f"loading {model_name}")

    def started(self, spec: RunSpec) -> None:
        self.now = f"{spec.label}, {spec.context_length} tokens, run {spec.repetition + 1}"
        self.progress.update(self.task, description=f"{self.now}: prefill")

    def token(self, n_tokens: int) -> None:
        self.progress.update(self.task, description=f"{self.now}: token {n_tokens}")

    def finished(self, result: RunResult) -> None:
        self.progress.advance(self.task)
        self.progress.console.print(outcome(result), markup=False)


def outcome(result: RunResult) -> str:
    """One line about a finished run."""
    spec = result.spec
    what = f"{spec['name']}, {spec['context_length']} tokens, run {spec['repetition'] + 1}"
    if not result.ok:
        return f"{what}: {result.status}: {(result.error or '').splitlines()[0].removesuffix(' Tried:')}"
    figures = [f"{result.timing['tpot_ms']:.1f} ms/token"] if result.timing["tpot_ms"] is not None else []
    if result.cache and result.cache["hit_rate"] is not None:
        figures.append(f"hit rate {100 * result.cache['hit_rate']:.0f} %")
    if result.quality["matches_baseline"] is False:
        first = result.quality["first_divergent_token"]
        exact = result.quality["exact"]
        figures.append("tokens DIFFER from the baseline's" if exact else f"tokens differ from number {first} on")
    return f"{what}: {', '.join(figures) or 'ok'}"


@contextmanager
def watch(n_runs: int, quiet: bool) -> Iterator[Silent]:
    """The watcher that suits where stderr goes."""
    if quiet:
        yield Silent()
        return
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield Lines(n_runs)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        yield Bar(progress, n_runs)


def log_to(folder: Path, verbose: bool) -> None:
    """Log to `run.log` in the results folder; warnings also on stderr, and everything with `-v`."""
    folder.mkdir(parents=True, exist_ok=True)
    to_file = logging.FileHandler(folder / "run.log", encoding="utf-8")
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    to_stderr = logging.StreamHandler()
    to_stderr.setLevel(logging.INFO if verbose else logging.WARNING)
    to_stderr.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    # A failure's traceback goes to the file; on the console its row in the table says enough.
    to_stderr.addFilter(lambda record: verbose or not (record.exc_info or record.exc_text))
    logging.basicConfig(level=logging.INFO, handlers=[to_file, to_stderr], force=True)
