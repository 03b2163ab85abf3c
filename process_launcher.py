"""Each job in a process of its own: a crash ends that job, and the sweep goes on.

Nothing in a process survives `os.abort`, a segmentation fault or the out-of-memory killer, so what may die has to be
another process. It is started afresh (`spawn`, since a fork could not use CUDA any more), imports, loads the model,
does its one job, and sends tokens, log records and the outcome through a pipe; that takes some seconds more for each
run. When the pipe closes without an outcome, the exit code tells what happened.

No process is left behind. Ctrl-C is for the sweep alone, which then ends the process; and a process whose sweep was
killed outright notices that and ends itself.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from jobs import Failure, Job, Watcher, do_alone, moment
from run_specs import RunSpec

log = logging.getLogger(__name__)

SECONDS_TO_END = 30  # for a process that has given its outcome
ORPHANED = 3  # exit code of a process whose sweep is gone


class ProcessLauncher:
    """One job after another, each in a new process."""

    by_model = True
    name = "process"

    def __init__(self) -> None:
        self._process: BaseProcess | None = None

    def perform(self, jobs: Sequence[Job], watcher: Watcher) -> Iterator[tuple[Job, Any]]:
        for job in jobs:
            yield job, self._do(job, watcher)

    def _do(self, job: Job, watcher: Watcher) -> Any:
        started_at = moment()
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe(duplex=False)
        process = self._process = context.Process(target=_alone, args=(job, there), daemon=True)
        try:
            with _interrupts_held_back():
                process.start()
            there.close()  # so that the pipe ends when the process does
            outcomes = list(_listen(here, watcher))
            process.join(SECONDS_TO_END)
            exit_code = process.exitcode
        finally:
            here.close()
            self.close()
        if outcomes:
            return outcomes[0]
        failure = Failure("crashed", how_it_ended(exit_code), started_at=started_at)
        log.error("%s: %s", job, failure.reason)
        return job.failed(failure)

    def close(self) -> None:
        if self._process is not None and self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process = None


def how_it_ended(exit_code: int | None) -> str:
    """What the exit code of a process says that gave no outcome; negative is the signal that ended it."""
    if exit_code is None:
        return f"the run's process closed its pipe without a result, and did not end in {SECONDS_TO_END} s"
    if exit_code >= 0:
        return f"the run's process ended with exit code {exit_code} before it gave a result"
    number = -exit_code
    name = signal.Signals(number).name if number in set(signal.Signals) else "unknown"
    how = ", as the out-of-memory killer does" if number == signal.SIGKILL else ""
    return f"the run's process was killed by signal {number} ({name}){how}"


def _listen(pipe: Connection, watcher: Watcher) -> Iterator[Any]:
    """Pass on what a process tells until its pipe ends, and give the outcome where there is one."""
    while True:
        try:
            what, value = pipe.recv()
        except (EOFError, OSError):  # the latter in the midst of a message
            return
        if what == "outcome":
            yield value
        elif what == "record":
            logging.getLogger(value.name).handle(value)
        else:
            getattr(watcher, what)(*(value if what == "token" else (value,)))


@contextlib.contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """A process started inside is never interrupted by Ctrl-C, which here arrives when it has been started."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# --- in the other process ---------------------------------------------------------------------------------------


class _Telling:
    """A watcher that tells the one of the sweep; threads may tell at the same time."""

    def __init__(self, pipe: Connection):
        self.pipe, self.lock = pipe, threading.Lock()

    def tell(self, what: str, value: Any) -> None:
        with self.lock:
            self.pipe.send((what, value))

    def loading(self, model_name: str) -> None:
        self.tell("loading", model_name)

    def started(self, spec: RunSpec) -> None:
        self.tell("started", spec)

    def token(self, n_tokens: int, hit_rate: float | None) -> None:
        self.tell("token", (n_tokens, hit_rate))


def _alone(job: Job, pipe: Connection) -> None:
    """Do one job and send its outcome."""
    threading.Thread(target=_end_with_the_sweep, daemon=True).start()
    _be_killed_first()
    telling = _Telling(pipe)
    telling.tell("outcome", do_alone(job, telling, lambda record: telling.tell("record", record)))


def _end_with_the_sweep() -> None:
    wait([multiprocessing.parent_process().sentinel])
    os._exit(ORPHANED)


def _be_killed_first() -> None:
    """Where memory runs out, the system is to end this process and not the sweep."""
    with contextlib.suppress(OSError):  # no Linux, or not allowed
        Path("/proc/self/oom_score_adj").write_text("1000")
