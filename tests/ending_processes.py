"""What can become of a process that was to do a job: stand-ins for `process_launcher._alone` that import no torch."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Job:
    """Stands for a job: one that dies has its failure as outcome."""

    def failed(self, failure: Any) -> Any:
        return failure


def abort(job, pipe):
    os.abort()


def segmentation_fault(job, pipe):
    ctypes.string_at(0)


def killed(job, pipe):
    os.kill(os.getpid(), signal.SIGKILL)


def exit_without_a_word(job, pipe):
    os._exit(0)


def exit_with_a_code(job, pipe):
    os._exit(7)


def killed_in_the_midst_of_a_message(job, pipe):
    os.write(pipe.fileno(), (1000).to_bytes(4, "big") + b"half")
    os.kill(os.getpid(), signal.SIGKILL)


def crash_after_the_outcome(job, pipe):
    pipe.send(("outcome", "measured"))
    os.abort()


def never_end(job, pipe):
    pipe.send(("token", (1, None)))
    time.sleep(1000)
