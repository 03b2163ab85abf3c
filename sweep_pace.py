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

A sweep may have thousands of runs, so none is gone through again at each start and end. Whatever an estimate is made
of, the work to do and the mean speed, is a sum kept by model, by strategy and by cell, and a run changes its own only.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metrics import RunResult
    from run_specs import RunSpec

Cell = tuple[str, str, int]
"""Model, strategy, and the context length asked for."""

Kind = tuple[()] | tuple[str] | tuple[str, str] | Cell
"""All runs, those of a model, of a strategy, or of a cell: the beginning of a cell."""


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


class Work:
    """What runs to come have to do, added up."""

    def __init__(self) -> None:
        self.n_runs = self.n_warmups = self.prompt_tokens = self.decode_tokens = 0

    def add(self, other: Work, sign: int = 1) -> None:
        self.n_runs += sign * other.n_runs
        self.n_warmups += sign * other.n_warmups
        self.prompt_tokens += sign * other.prompt_tokens
        self.decode_tokens += sign * other.decode_tokens

    @classmethod
    def of(cls, spec: RunSpec) -> Work:
        """Of one run; the prompt is read again for each warm-up."""
        work = cls()
        work.n_runs, work.n_warmups = 1, spec.warmup_runs if spec.repetition == 0 else 0
        work.prompt_tokens = (1 + work.n_warmups) * spec.context_length
        work.decode_tokens = spec.max_new_tokens - 1
        return work


class Speeds:
    """Sums over finished runs, in milliseconds: as good as their means, and as quickly brought up to date."""

    def __init__(self) -> None:
        self.n_runs = 0
        self.ttft_ms = self.e2e_ms = self.prefill_ms_per_token = self.tpot_ms = 0.0

    def add(self, timing: Mapping[str, Any], context: int) -> None:
        self.n_runs += 1
        self.ttft_ms += timing["ttft_ms"]
        self.e2e_ms += timing["e2e_ms"]
        self.prefill_ms_per_token += timing["ttft_ms"] / context
        self.tpot_ms += timing.get("tpot_ms") or 0.0  # one token has no decode

    def of_the_same(self, work: Work) -> float:
        """Seconds of runs of the same strategy at the same context."""
        return (work.n_runs * self.e2e_ms + work.n_warmups * self.ttft_ms) / self.n_runs / 1000.0

    def of_others(self, work: Work) -> float:
        """Seconds of runs of other contexts or strategies."""
        all_ms = work.prompt_tokens * self.prefill_ms_per_token + work.decode_tokens * self.tpot_ms
        return all_ms / self.n_runs / 1000.0


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
        self._to_come: dict[tuple[Cell, int], list[RunSpec]] = {}  # by cell and repetition
        self._work: defaultdict[Kind, Work] = defaultdict(Work)  # of all runs to come of that kind
        self._own: defaultdict[Kind, Work] = defaultdict(Work)  # of those that are estimated from this kind's speeds
        self._speeds: defaultdict[Kind, Speeds] = defaultdict(Speeds)  # only of kinds that have a finished run
        self._seconds: dict[Kind, float] = {}  # of the runs in `_own`, where there are any and their speed is known
        self._rough: set[Kind] = set()  # kinds in `_seconds` that are no cells
        self._current: RunSpec | None = None
        for spec in specs:
            self._to_come.setdefault((_cell_of(spec), spec.repetition), []).append(spec)
            work = Work.of(spec)
            self._own[()].add(work)
            for kind in _kinds(_cell_of(spec)):
                self._work[kind].add(work)
        self._estimate, self._rest = UNKNOWN, self._sum()
        self._forget_tokens()

    def resumed(self, results: Iterable[RunResult]) -> None:
        """Runs of the sweep that were finished before it began."""
        for result in results:
            self._take(_cell_in(result.spec), result.spec["repetition"])
            self._learn(result)
        self._rest = self._sum()

    def started(self, spec: RunSpec) -> None:
        """A run begins. It is no longer among those to come, nor is it done."""
        self._forget_tokens()
        self._take(_cell_of(spec), spec.repetition)
        self._estimate, self._rest = self._estimate_of(spec), self._sum()
        self._current = spec

    def token(self, n_tokens: int) -> None:
        """The run under way has made a token."""
        now = self._now()
        if n_tokens == 1:
            self._first_token = now
        self._latest = (n_tokens, now)

    def finished(self, result: RunResult) -> None:
        """A run has ended, or could not even begin."""
        if self._current is None:
            self._take(_cell_in(result.spec), result.spec["repetition"])
        self._learn(result)
        self._current = None
        self._rest = self._sum()

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
        alike = self._to_come.get((cell, repetition))
        if not alike:
            return
        work = Work.of(alike.pop(0))
        for kind in _kinds(cell):
            self._work[kind].add(work, -1)
        nearest = self._nearest_known(cell)
        self._own[nearest].add(work, -1)
        self._estimate_kind(nearest)

    def _learn(self, result: RunResult) -> None:
        """Add what a run took to the speeds of its cell, its strategy and its model."""
        timing = result.timing or {}
        if not result.ok or timing.get("ttft_ms") is None or timing.get("e2e_ms") is None:
            return
        cell = _cell_in(result.spec)
        for kind in _kinds(cell)[1:]:
            if kind not in self._speeds:  # from now on it has a speed of its own
                self._own[kind].add(self._work[kind])
                self._own[kind[:-1]].add(self._work[kind], -1)
                self._estimate_kind(kind[:-1])
            self._speeds[kind].add(timing, cell[2])
            self._estimate_kind(kind)

    def _nearest_known(self, cell: Cell) -> Kind:
        return next((kind for kind in reversed(_kinds(cell)) if kind in self._speeds), ())

    def _estimate_kind(self, kind: Kind) -> None:
        """Estimate the runs to come that have to rely on this kind's speeds."""
        if kind not in self._speeds:
            return
        if not self._own[kind].n_runs:
            self._seconds.pop(kind, None)
            self._rough.discard(kind)
            return
        estimate = self._from(kind, self._own[kind])
        self._seconds[kind] = estimate.seconds
        if estimate.rough:
            self._rough.add(kind)

    def _sum(self) -> TimeLeft:
        """Of all runs to come. Added up anew, as sums that are corrected for ever gather rounding errors."""
        return TimeLeft(math.fsum(self._seconds.values()), bool(self._rough), self._own[()].n_runs > 0)

    def _estimate_of(self, spec: RunSpec) -> TimeLeft:
        return self._from(self._nearest_known(_cell_of(spec)), Work.of(spec))

    def _from(self, kind: Kind, work: Work) -> TimeLeft:
        """The time of some work at the mean speed of a kind."""
        if kind == ():
            return UNKNOWN
        if len(kind) == 3:
            return TimeLeft(self._speeds[kind].of_the_same(work))
        return TimeLeft(self._speeds[kind].of_others(work), rough=True)


def _kinds(cell: Cell) -> tuple[Kind, ...]:
    """The kinds that a run belongs to, from all runs to its cell."""
    return (), cell[:1], cell[:2], cell


def _cell_of(spec: RunSpec) -> Cell:
    return spec.model_name, spec.name, spec.requested_context_length


def _cell_in(spec: Mapping[str, Any]) -> Cell:
    """The same of a spec as it stands in a result."""
    return spec["model_name"], spec["name"], spec["requested_context_length"]
