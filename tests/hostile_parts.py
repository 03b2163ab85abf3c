"""Policies of a user's own that do what a run must survive, or that a sweep must; for tests of launchers."""

from __future__ import annotations

import logging
import os
import signal
from dataclasses import dataclass
from pathlib import Path

from page_policies import FIFO


@dataclass(frozen=True)
class Killed(FIFO):
    """Ends its process as the out-of-memory killer would."""

    def victim(self, pinned):
        os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class KilledOnce(FIFO):
    """The same, but only where the file `marker` is not there yet."""

    marker: str = ""

    def victim(self, pinned):
        if not Path(self.marker).exists():
            Path(self.marker).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().victim(pinned)


@dataclass(frozen=True)
class Aborting(FIFO):
    """Ends its process as a failed assertion in a library does."""

    def victim(self, pinned):
        os.abort()


@dataclass(frozen=True)
class Raising(FIFO):
    """Has a bug."""

    def victim(self, pinned):
        logging.getLogger("hostile").warning("about to %s", "raise")
        raise ZeroDivisionError("a bug")
