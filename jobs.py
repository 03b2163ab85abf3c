"""What there is to do in a sweep, and the worker that does it in one process.

Two kinds of job: a `TimedRun`, and the `QualityMeasurement` of a run that was made, apart from it so that it cannot
disturb what is timed. A job that goes wrong does not raise: its outcome is then a row with a status and a reason. So
whoever has jobs done, in this process or on another machine, needs one path only for good and for bad ends.

A `Worker` holds one model at a time and frees it before it loads the next, and knows for which runs the process is
warm. A process that begins in the middle of the repetitions, after a resume or because each run has a process of its
own, is cold, and then warms up as the first repetition does.
"""

from __future__ import annotations

import copy
import datetime
import gc
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from generation import WARMUP_TOKENS, failed_run
from metrics import RunResult
from models import LoadedModel, load_model
from planning import fit_positions
from quality import quality_figures
from registry import MODES
from run_specs import RunSpec
from utils import environment

log = logging.getLogger(__name__)


class Watcher(Protocol):
    """Told how a sweep goes on."""

    def resumed(self, results: Sequence[RunResult], note: str) -> None: ...
    def loading(self, model_name: str) -> None: ...
    def started(self, spec: RunSpec) -> None: ...
    def token(self, n_tokens: int, hit_rate: float | None) -> None: ...
    def finished(self, result: RunResult) -> None: ...


def moment() -> str:
    """Now, as results write it: ISO 8601 in UTC."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


@dataclass(frozen=True)
class Failure:
    """Why a job has no figures, and what else its row says.

    A job whose process died tells nothing of itself, so where it was and when are then what the sweep's process knows:
    its own machine, and the moment at which it began the job or learned of its end.
    """

    status: str
    reason: str
    environment: dict[str, Any] = field(default_factory=environment)
    started_at: str = field(default_factory=moment)


class Job(Protocol):
    """One thing to measure."""

    spec: RunSpec

    def make(self, model: LoadedModel, is_warm: bool, watcher: Watcher) -> Any:
        """Measure, with the model loaded. May raise."""

    def failed(self, failure: Failure) -> Any:
        """The outcome where that was not possible."""


@dataclass(frozen=True)
class TimedRun:
    """One run under the meters; its outcome is a `RunResult`, not yet compared with the baseline's tokens."""

    spec: RunSpec

    def __str__(self) -> str:
        return self.spec.slug

    def make(self, model: LoadedModel, is_warm: bool, watcher: Watcher) -> RunResult:
        spec, notes = fit_positions(self.spec, model.shape)
        for note in notes:
            log.info("%s: %s", spec.slug, note)
        run = MODES.load(spec.mode)
        if is_warm or not spec.repetition:  # the first repetition warms up itself
            return run(spec, model, on_token=watcher.token)
        started_at, started = moment(), time.perf_counter()
        short = replace(spec, max_new_tokens=min(WARMUP_TOKENS, spec.max_new_tokens))
        for _ in range(spec.warmup_runs):
            run(short, model, on_token=None)
        warm_up_seconds = time.perf_counter() - started
        result = run(spec, model, on_token=watcher.token)
        # As a first repetition has it, whose own time begins with its warm-up.
        return replace(result, started_at=started_at, duration_seconds=warm_up_seconds + result.duration_seconds)

    def failed(self, failure: Failure) -> RunResult:
        return RunResult(
            spec=self.spec.to_dict(),
            run_id=self.spec.run_id,
            status=failure.status,
            error=failure.reason,
            started_at=failure.started_at,
            environment=failure.environment,
        )


@dataclass(frozen=True)
class QualityMeasurement:
    """What a run's cache costs in answers; its outcome is what is added to the run's `quality` block."""

    spec: RunSpec

    def __str__(self) -> str:
        return f"quality of {self.spec.slug}"

    def make(self, model: LoadedModel, is_warm: bool, watcher: Watcher) -> dict[str, Any]:
        log.info("%s: measuring quality", self.spec.slug)
        return quality_figures(self.spec, model)

    def failed(self, failure: Failure) -> dict[str, Any]:
        return {"fidelity": None, "tasks": None, "error": f"{failure.status}: {failure.reason}"}


class Worker:
    """Does jobs in this process, one after another, with one model in memory at a time."""

    def __init__(self) -> None:
        self._model: LoadedModel | None = None
        self._model_key: tuple | None = None
        self._no_model: Failure | None = None
        self._warm: set[str] = set()

    def do(self, job: Job, watcher: Watcher) -> Any:
        """The outcome of a job, which is a failure's row where anything is raised. Ctrl-C is not caught."""
        if job.spec.model_key != self._model_key:
            self._change_model(job.spec, watcher)
        if self._model is None:
            return job.failed(self._no_model)
        if isinstance(job, TimedRun):
            watcher.started(job.spec)
        failure = None
        try:
            outcome = job.make(self._model, _alike(job.spec) in self._warm, watcher)
            if isinstance(job, TimedRun):
                self._warm.add(_alike(job.spec))
        except Exception as error:
            log.exception("%s failed", job)
            failure = _failure(job.spec, error)
        if failure is not None:
            outcome = job.failed(failure)
        if failure is not None or not isinstance(job, TimedRun):
            _give_back_memory()  # only here has the error let go of the tensors in its traceback
        return outcome

    def close(self) -> None:
        """Free the model."""
        self._model = self._model_key = self._no_model = None
        self._warm.clear()
        _give_back_memory()

    def _change_model(self, spec: RunSpec, watcher: Watcher) -> None:
        self.close()
        self._model_key = spec.model_key
        watcher.loading(spec.model_name)
        log.info("loading %s", spec.model_name)
        try:
            self._model = load_model(**spec.model_options)
        except Exception as error:
            log.exception("loading %s failed", spec.model_name)
            self._no_model = _failure(spec, error)


def do_alone(job: Job, watcher: Watcher, tell: Callable[[logging.LogRecord], None]) -> Any:
    """Do one job in a process that is there for nothing else, and pass on what is logged."""
    logging.basicConfig(level=logging.INFO, handlers=[_Teller(tell)], force=True)
    return Worker().do(job, watcher)


class _Teller(logging.Handler):
    """Passes records on in a form that can travel between processes: texts instead of objects and tracebacks."""

    def __init__(self, tell: Callable[[logging.LogRecord], None]):
        super().__init__()
        self.tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        try:
            told = copy.copy(record)
            told.msg, told.args = record.getMessage(), None
            if record.exc_info:
                told.exc_text, told.exc_info = logging.Formatter().formatException(record.exc_info), None
            self.tell(told)
        except Exception:  # as logging does it: a record that cannot be told must not end the run
            self.handleError(record)


def _failure(spec: RunSpec, error: Exception) -> Failure:
    row = failed_run(spec, error)
    return Failure(row.status, row.error, row.environment, row.started_at)


def _alike(spec: RunSpec) -> str:
    """The same for all repetitions of a run."""
    return replace(spec, repetition=0, seed=0).run_id


def _give_back_memory() -> None:
    """Free what nothing refers to any more, on the device too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
