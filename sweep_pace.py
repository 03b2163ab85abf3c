"""How long a sweep will still take, and how sure that is.

Runs of one sweep differ in length by orders of magnitude: a baseline at 500 tokens, a paged run at 8,000. So "so many
runs are done, hence the rest takes so long" is wrong for most of the time. Here each run that is still to come is
estimated from the nearest that is known:

1. finished runs of the same strategy at the same context: their mean time;
2. else finished runs of the same strategy, or if there are none of any strategy, of the same model: their prefill time
   for each prompt token and their decode time for each new one. Prefill grows faster than the prompt, and decode
   slows down with it, so this is rough;
3. else nothing. What is said is then the least it will take, or `?` before anything is known.

The run under way is estimated from its own tokens as soon as there are some. Warm-ups count, as another prefill. The
loading of a model does not, and neither does the measuring of quality, whose length no run tells.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metrics import RunResult
    from run_specs import RunSpec

Cell = tuple[str, str, int]
"""Model, strategy, and the context length asked for."""


@dataclass(frozen=True)
class TimeLeft:
    """An estimate in seconds, and what it rests on.

    Attributes:
        seconds: of the runs that could be estimated.
        rough: whether some of it was carried over from other contexts or strategies.
        missing: whether there are runs about which nothing is known; then `seconds` is the least.
    """

    seconds: float = 0.0
    rough: bool = False
    missing: bool = False

    def __add__(self, other: TimeLeft) -> TimeLeft:
        return TimeLeft(self.seconds + other.seconds, self.rough or other.rough, self.missing or other.missing)

    def __str__(self) -> str:
        """`3:10` from runs of the same kind, `~3:10` also from others, `>3:10` as the least, `?` if nothing is known"""
        if self.missing and not self.seconds:
            return "?"
        return f"{'>' if self.missing else '~' if self.rough else ''}{clock_text(self.seconds)}"


@dataclass(frozen=True)
class Speed:
    """What a finished run took, in milliseconds."""

    ttft_ms: float
    tpot_ms: float
    e2e_ms: float


UNKNOWN = TimeLeft(missing=True)


def clock_text(seconds: float) -> str:
    """`0:07`, `3:10`, `1:02:30`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Pace:
    """The time left of a sweep, from what its runs have taken so far.

    `token` is called inside of the measured loop, so it only notes the time. `left` may be called from another thread.

    Args:
        specs: all runs of the sweep.
        now: the clock, in seconds.
    """

    def __init__(self, specs: Sequence[RunSpec], now: Callable[[], float] = time.monotonic):
        self._now = now
        self._to_come = list(specs)
        self._speeds: dict[Cell, list[Speed]] = {}
        self._current: RunSpec | None = None
        self._estimate, self._rest = UNKNOWN, self._sum_of(self._to_come)
        self._forget_tokens()

    def started(self, spec: RunSpec) -> None:
        """A run begins. It is no longer among those to come, nor is it done."""
        self._forget_tokens()
        self._take(_cell_of(spec), spec.repetition)
        self._estimate, self._rest = self._estimate_of(spec), self._sum_of(self._to_come)
        self._current = spec

    def token(self, n_tokens: int) -> None:
        """The run under way has made a token."""
        now = self._now()
        if n_tokens == 1:
            self._first_token = now
        self._latest = (n_tokens, now)

    def finished(self, result: RunResult) -> None:
        """A run has ended, or could not even begin."""
        cell = _cell_in(result.spec)
        if self._current is None:
            self._take(cell, result.spec["repetition"])
        if result.ok and (speed := _speed_of(result)) is not None:
            self._speeds.setdefault(cell, []).append(speed)
        self._current = None
        self._rest = self._sum_of(self._to_come)

    def tokens_per_second(self) -> float | None:
        """Decode speed of the run under way, for one sequence; None before its second token."""
        n_tokens, latest = self._latest
        if self._first_token is None or n_tokens < 2 or latest <= self._first_token:
            return None
        return (n_tokens - 1) / (latest - self._first_token)

    def left(self) -> TimeLeft:
        """What is left of the run under way, and all runs to come."""
        return self._rest if self._current is None else self._rest + self._left_of_current(self._current)

    def _left_of_current(self, spec: RunSpec) -> TimeLeft:
        speed = self.tokens_per_second()
        if speed is not None:
            return TimeLeft(max(0.0, (spec.max_new_tokens - self._latest[0]) / speed))
        if self._estimate.missing:
            return UNKNOWN
        elapsed = self._now() - self._begun
        return TimeLeft(max(0.0, self._estimate.seconds - elapsed), self._estimate.rough)

    def _forget_tokens(self) -> None:
        self._begun = self._now()
        self._first_token: float | None = None
        self._latest: tuple[int, float] = (0, self._begun)

    def _take(self, cell: Cell, repetition: int) -> None:
        """Take one run from those to come; by what it is, as a run that was clamped has another id."""
        for place, spec in enumerate(self._to_come):
            if (_cell_of(spec), spec.repetition) == (cell, repetition):
                del self._to_come[place]
                return

    def _sum_of(self, specs: Sequence[RunSpec]) -> TimeLeft:
        return sum((self._estimate_of(spec) for spec in specs), start=TimeLeft())

    def _estimate_of(self, spec: RunSpec) -> TimeLeft:
        cell = _cell_of(spec)
        warmups = spec.warmup_runs if spec.repetition == 0 else 0
        if alike := self._speeds.get(cell):
            return TimeLeft((_mean(alike, "e2e_ms") + warmups * _mean(alike, "ttft_ms")) / 1000.0)
        near = self._known(cell[:2]) or self._known(cell[:1])
        if not near:
            return UNKNOWN
        prefill_ms = spec.context_length * fmean(speed.ttft_ms / context for context, speed in near)
        decode_ms = (spec.max_new_tokens - 1) * fmean(speed.tpot_ms for _, speed in near)
        return TimeLeft(((1 + warmups) * prefill_ms + decode_ms) / 1000.0, rough=True)

    def _known(self, start: tuple[str, ...]) -> list[tuple[int, Speed]]:
        """Contexts and speeds of the finished runs whose cell begins so."""
        return [
            (cell[2], speed) for cell, speeds in self._speeds.items() for speed in speeds if cell[: len(start)] == start
        ]


def _cell_of(spec: RunSpec) -> Cell:
    return spec.model_name, spec.name, spec.requested_context_length


def _cell_in(spec: Mapping[str, Any]) -> Cell:
    """The same of a spec as it stands in a result."""
    return spec["model_name"], spec["name"], spec["requested_context_length"]


def _speed_of(result: RunResult) -> Speed | None:
    timing = result.timing or {}
    ttft_ms, tpot_ms, e2e_ms = (timing.get(name) for name in ("ttft_ms", "tpot_ms", "e2e_ms"))
    if ttft_ms is None or e2e_ms is None:
        return None
    return Speed(ttft_ms, 0.0 if tpot_ms is None else tpot_ms, e2e_ms)  # one token has no decode


def _mean(speeds: Sequence[Speed], name: str) -> float:
    return fmean(getattr(speed, name) for speed in speeds)
