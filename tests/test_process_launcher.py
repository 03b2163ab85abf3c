"""However a job's process ends, the sweep's process learns how, and no process is left."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time

import ending_processes
import pytest
from ending_processes import Job

import process_launcher
from process_launcher import ProcessLauncher, how_it_ended
from progress import Silent


def do(monkeypatch, ending, watcher=None):
    monkeypatch.setattr(process_launcher, "_alone", ending)
    ((_, outcome),) = ProcessLauncher().perform([Job()], watcher or Silent())
    return outcome


@pytest.mark.parametrize(
    ("ending", "reason"),
    [
        (ending_processes.abort, "killed by signal 6 (SIGABRT)"),
        (ending_processes.segmentation_fault, "killed by signal 11 (SIGSEGV)"),
        (ending_processes.killed, "killed by signal 9 (SIGKILL), as the out-of-memory killer does"),
        (ending_processes.killed_in_the_midst_of_a_message, "killed by signal 9 (SIGKILL), as the out-of-memory"),
        (ending_processes.exit_without_a_word, "ended with exit code 0 before it gave a result"),
        (ending_processes.exit_with_a_code, "ended with exit code 7 before it gave a result"),
    ],
)
def test_a_process_that_dies_is_a_failure_that_says_how(monkeypatch, ending, reason):
    failure = do(monkeypatch, ending)
    assert failure.status == "crashed"
    assert reason in failure.reason


def test_an_outcome_counts_though_the_process_crashes_afterwards(monkeypatch):
    assert do(monkeypatch, ending_processes.crash_after_the_outcome) == "measured"


def test_an_unknown_signal_is_said_by_its_number():
    assert "signal 99 (unknown)" in how_it_ended(-99)


class InterruptedAtTheFirstToken(Silent):
    """Does what Ctrl-C does, once the job is under way."""

    def token(self, n_tokens, hit_rate):
        threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGINT]).start()


def test_ctrl_c_ends_the_process_too(monkeypatch):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            do(monkeypatch, ending_processes.never_end, InterruptedAtTheFirstToken())
    finally:
        signal.signal(signal.SIGINT, before)
    assert multiprocessing.active_children() == []


def test_a_launcher_that_is_closed_in_the_midst_of_a_job_leaves_no_process(monkeypatch):
    monkeypatch.setattr(process_launcher, "_alone", ending_processes.never_end)
    launcher = ProcessLauncher()

    class CloseAtTheFirstToken(Silent):
        def token(self, n_tokens, hit_rate):
            self.process = launcher._process.pid
            launcher.close()

    watcher = CloseAtTheFirstToken()
    ((_, failure),) = launcher.perform([Job()], watcher)
    assert failure.status == "crashed"
    assert not is_alive(watcher.process)


def is_alive(pid: int) -> bool:
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.05)
    return True
