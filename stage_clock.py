"""How long a stage of a step took, measured where it runs.

On a CPU a stage is over when its code returns, so the wall clock tells. On CUDA the code only hands work to the device:
a pair of events on the computing stream brackets it, and is read after the run, for reading it earlier would wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

from timeline import DeviceTime


class StageClock(Protocol):
    """Marks the start of a stage, and gives the time since it."""

    def now(self) -> Any:
        """The start of a stage."""
        ...

    def since(self, start: Any) -> float | Callable[[], float]:
        """Milliseconds from `start`, or a function that gives them after the run."""
        ...


class WallClock:
    """For work that is done when its code returns."""

    def now(self) -> float:
        return time.perf_counter()

    def since(self, start: float) -> float:
        return 1000.0 * (time.perf_counter() - start)


class StreamClock:
    """For work on the current stream of a CUDA device."""

    def __init__(self, device: torch.device):
        self.device = device

    def now(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def since(self, start: torch.cuda.Event) -> DeviceTime:
        return DeviceTime([(start, self.now())])


def clock_for(device: torch.device) -> StageClock:
    return StreamClock(device) if device.type == "cuda" else WallClock()
