"""How a sweep is shown while it runs: two lines at the foot of a terminal, a line for each run elsewhere.

Everything goes to stderr, so that stdout holds the tables and nothing else. The first line of the two is the whole
sweep with the time left (sweep_pace.py says what `~`, `>` and `?` mean there), the second the run under way. They are
cut to the width of the terminal, for a line that wraps cannot be drawn over and would flicker. They are drawn from
another thread, four times a second: showing a token costs the measured loop no more than noting it.

The hit rate beside the run under way is that of its decode steps so far.

What is logged goes to a file besides (`log_to`).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Column
from rich.text import Text

from quality_frame import describe_quality
from sweep_pace import Pace

if TYPE_CHECKING:
    from metrics import RunResult
    from run_specs import RunSpec

DRAWINGS_PER_SECOND = 4
SHORTEST_NAME = 12


class Silent:
    """Shows nothing."""

    def resumed(self, results: Sequence[RunResult], note: str) -> None:
        pass

    def loading(self, model_name: str) -> None:
        pass

    def started(self, spec: RunSpec) -> None:
        pass

    def token(self, n_tokens: int, hit_rate: float | None = None) -> None:
        pass

    def finished(self, result: RunResult) -> None:
        pass


class Lines(Silent):
    """One plain line for each run, for logs and pipes; when verbose, one as it starts too.

    Args:
        specs: all runs of the sweep.
    """

    def __init__(self, specs: Sequence[RunSpec], verbose: bool = False):
        self.n_runs, self.n_finished, self.verbose = len(specs), 0, verbose
        self.pace = Pace(specs)
        self.plus_quality = _plus_quality(specs)

    def resumed(self, results: Sequence[RunResult], note: str) -> None:
        self.n_finished = len(results)
        self.pace.resumed(results)
        self._say(note)

    def loading(self, model_name: str) -> None:
        self._say(f"loading {model_name}")

    def started(self, spec: RunSpec) -> None:
        self.pace.started(spec)
        if self.verbose:
            self._say(f"{spec.label}, {_of_its_runs(spec)} starts{self._eta()}")

    def token(self, n_tokens: int, hit_rate: float | None = None) -> None:
        self.pace.token(n_tokens)

    def finished(self, result: RunResult) -> None:
        self.n_finished += 1
        self.pace.finished(result)
        eta = self._eta() if self.n_finished < self.n_runs else ""
        self._say(f"[{self.n_finished}/{self.n_runs}] {outcome(result)}{eta}")

    def _eta(self) -> str:
        return f"; ETA {self.pace.left()}{self.plus_quality}"

    def _say(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)


class Bar(Silent):
    """Two lines that stay: the sweep, and the run under way. Above them a line for each run that has ended.

    Args:
        specs: all runs of the sweep.
    """

    def __init__(self, specs: Sequence[RunSpec], console: Console):
        self.specs, self.n_finished = specs, 0
        self.pace = Pace(specs)
        self.plus_quality = _plus_quality(specs)
        self.spec: RunSpec | None = None
        self.now, self.n_tokens = "starting", 0
        self.hit_rate: float | None = None
        self.progress = _TwoLines(self, console)
        self.task = self.progress.add_task("runs", total=len(specs))

    def resumed(self, results: Sequence[RunResult], note: str) -> None:
        self.n_finished = len(results)
        self.pace.resumed(results)
        self.progress.update(self.task, completed=len(results))
        self.progress.console.print(note, markup=False)

    def loading(self, model_name: str) -> None:
        self.spec, self.now = None, f"loading {model_name}"

    def started(self, spec: RunSpec) -> None:
        self.pace.started(spec)
        self.n_tokens, self.hit_rate, self.spec = 0, None, spec

    def token(self, n_tokens: int, hit_rate: float | None = None) -> None:
        self.n_tokens, self.hit_rate = n_tokens, hit_rate
        self.pace.token(n_tokens)

    def finished(self, result: RunResult) -> None:
        self.n_finished += 1
        self.spec, self.now = None, self._what_follows(result)
        self.pace.finished(result)
        self.progress.advance(self.task)
        self.progress.console.print(outcome(result), markup=False)

    def _what_follows(self, result: RunResult) -> str:
        """What the sweep does after this run, if it is the last one of its model."""
        rest = self.specs[self.n_finished :]
        if rest and rest[0].model_name == result.spec["model_name"]:
            return ""
        return "measuring quality" if self.plus_quality else "finishing"

    def line_of_run(self) -> str:
        """What is going on now."""
        spec = self.spec
        if spec is None:
            return self.now
        if not self.n_tokens:
            figures = ["prefill"]
        else:
            figures = [f"token {self.n_tokens} of {spec.max_new_tokens}"]
            if (speed := self.pace.tokens_per_second()) is not None:
                figures.append(f"{speed:.1f} tokens/s")
        if not spec.exact:
            figures.append("approximate")
        if self.hit_rate is not None:
            figures.append(f"hit rate {100 * self.hit_rate:.0f} %")
        width = self.progress.console.width
        rest = _rest_of_line(spec, figures)
        if len(figures) > 1 and SHORTEST_NAME + len(rest) > width:  # a figure left out is better than half of one
            rest = _rest_of_line(spec, figures[:-1])
        return _fitted(spec.label, rest, width)

    def eta(self) -> str:
        if self.n_finished == len(self.specs):
            return ""
        return f"ETA {self.pace.left()}{self.plus_quality}"


class _TwoLines(Progress):
    """rich's progress, with the line of the run under way below it."""

    def __init__(self, bar: Bar, console: Console):
        self.bar = bar
        columns = (TextColumn("runs"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), _TimeLeft(bar))
        super().__init__(*columns, console=console, refresh_per_second=DRAWINGS_PER_SECOND)

    def get_renderable(self) -> RenderableType:
        line = Text(self.bar.line_of_run(), no_wrap=True, overflow="ellipsis")
        return Group(self.make_tasks_table(self.tasks), line)


class _TimeLeft(ProgressColumn):
    """The last column of the first line."""

    def __init__(self, bar: Bar):
        super().__init__(Column(no_wrap=True))
        self.bar = bar

    def render(self, task: Task) -> Text:
        return Text(self.bar.eta())


def _of_its_runs(spec: RunSpec) -> str:
    return f"{spec.context_length} tokens, run {spec.repetition + 1}"


def _rest_of_line(spec: RunSpec, figures: Sequence[str]) -> str:
    return f", {_of_its_runs(spec)}: {', '.join(figures)}"


def _fitted(name: str, rest: str, width: int) -> str:
    """Name and rest within a width; it is the name that is cut, as far as that helps."""
    room = max(SHORTEST_NAME, width - len(rest))
    return (name if len(name) <= room else f"{name[: room - 1]}…") + rest


def outcome(result: RunResult) -> str:
    """One line about a finished run. Its quality is measured only after it."""
    spec = result.spec
    what = f"{spec['name']}, {spec['context_length']} tokens, run {spec['repetition'] + 1}"
    if not result.ok:
        reason, _, _ = (result.error or "").partition("\n")
        return f"{what}: {result.status}: {reason.removesuffix(' Tried:')}"
    figures = [f"{result.timing['tpot_ms']:.1f} ms/token"] if result.timing["tpot_ms"] is not None else []
    if (hit_rate := _hit_rate(result)) is not None:
        figures.append(hit_rate)
    if result.quality["matches_baseline"] is False:
        first = result.quality["first_divergent_token"]
        exact = result.quality["exact"]
        figures.append("tokens DIFFER from the baseline's" if exact else f"tokens differ from number {first} on")
    if (quality := _quality(result)) is not None:
        figures.append(quality)
    return f"{what}: {', '.join(figures) or 'ok'}"


def _quality(result: RunResult) -> str | None:
    """`approximate, KL 0.12 nats`, or that it is yet to be measured; None of a run that is exact.

    It is measured once for all repetitions, so of the later ones nothing is said but that they are approximate.
    """
    described = describe_quality(result.to_dict())
    asked = result.spec.get("quality")
    if described is None or "fidelity" in result.quality or not (asked and asked["fidelity_tokens"]):
        return described
    return "approximate, quality to be measured" if result.spec["repetition"] == 0 else "approximate"


def _plus_quality(specs: Sequence[RunSpec]) -> str:
    return " + quality" if any(spec.quality is not None for spec in specs) else ""


def _hit_rate(result: RunResult) -> str | None:
    rate = (result.cache or {}).get("hit_rate")
    return None if rate is None else f"hit rate {100 * rate:.0f} %"


@contextmanager
def watch(specs: Sequence[RunSpec], quiet: bool, verbose: bool = False) -> Iterator[Silent]:
    """The watcher that suits where stderr goes.

    Args:
        specs: all runs of the sweep.
    """
    if quiet:
        yield Silent()
        return
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield Lines(specs, verbose)
        return
    bar = Bar(specs, console)
    with _logging_above(bar.progress), bar.progress:
        yield bar


@contextmanager
def _logging_above(progress: Progress) -> Iterator[None]:
    """Let log lines be printed above the bar; written to the stream itself they would tear it apart."""
    handlers = [handler for handler in logging.getLogger().handlers if type(handler) is logging.StreamHandler]
    streams = {handler: handler.stream for handler in handlers if handler.stream is sys.stderr}
    for handler in streams:
        handler.setStream(_Above(progress))
    try:
        yield
    finally:
        for handler, stream in streams.items():
            handler.setStream(stream)


class _Above:
    """A text stream that ends up above the bar, line by line."""

    def __init__(self, progress: Progress):
        self.progress = progress

    def write(self, text: str) -> None:
        if text.strip():
            self.progress.console.print(text.rstrip("\n"), markup=False, soft_wrap=True)

    def flush(self) -> None:
        pass


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
