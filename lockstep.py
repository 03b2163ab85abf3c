"""Layers in lockstep: what one layer has found out about a decode step's pages serves the others.

Under exact attention all layers of a model ask for the same in a step: every page. They began with the same pages and
keep the same policy, so they decide the same as well: which pages are there, which have to come, into which slots, and
which go for them. That is so until one of them goes its own way: it chooses pages, is told of copies ahead, or has
another policy. What differs from layer to layer are the bytes.

So the first layer that asks in a step makes the request (resolution.py), and what came of it is kept until the next
step begins. A layer whose page table was just like that one's has the same pages copied into the same slots of its own
pool, in the same waves, and takes over the page table as it is afterwards. vLLM's block table is one for all layers in
the same way (Kwon et al. 2023, https://arxiv.org/abs/2309.06180).

A page table that several layers hold is never changed: who is about to, changes a copy of it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from page_store import Ticket
from page_table import PageTable
from resolution import HasPages, Resolution
from yardstick import Asked, Yardstick


class InLockstep(HasPages, Protocol):
    """What a request in lockstep needs of the sequence whose pages it asks for."""

    lane: int
    yardstick: Yardstick
    shares_table: bool

    def own_table(self) -> PageTable: ...


@dataclass(frozen=True)
class MadeRequest:
    """A request that a layer has made, and what came of it.

    Attributes:
        wanted: the pages asked for.
        before, after: the page table; neither is changed any more.
        ready: `{page: slot}` of those that were there.
        fetched: `{page: slot}` of those copied at once, and then of those copied after each wave while some were
            missing.
        must_move: as for `Resolution`.
    """

    wanted: Sequence[int]
    before: PageTable
    after: PageTable
    ready: dict[int, int]
    fetched: list[dict[int, int]]
    must_move: int

    @cached_property
    def counts(self) -> dict[str, float]:
        """What it adds to the record, beside copies and waiting for them."""
        misses = sum(map(len, self.fetched))
        evictions = len(self.before.resident) + misses - len(self.after.resident)
        return {"hits": len(self.ready), "misses": misses, "must_move": self.must_move, "evictions": evictions}


class FirstRequest(Resolution):
    """A request of the first layer that asks in a step, which notes what it has copied when."""

    def __init__(self, sequence: InLockstep, wanted: Sequence[int], pinned: set[int], asked: Asked, must_move: int):
        self.fetched: list[dict[int, int]] = []
        self.must_move = must_move
        super().__init__(sequence, wanted, pinned, asked, must_move=must_move)

    def _fetch_missing(self, counts: dict[str, float]) -> None:
        missing = self.missing
        super()._fetch_missing(counts)
        self.fetched.append({page: self.table.staged[page] for page in missing[: len(missing) - len(self.missing)]})


class RepeatedRequest:
    """A request that another layer has made already, for the pages of this one. Iterating gives waves, and asking for
    the next one says that the last has been attended, as with a `Resolution`."""

    def __init__(self, sequence: InLockstep, made: MadeRequest):
        self.sequence, self.ready = sequence, made.ready
        self.left = deque(made.fetched)  # to be copied, one after each wave
        self.under_way: deque[tuple[Ticket, dict[int, int]]] = deque()
        self._fetch_next(**made.counts)

    def __iter__(self) -> Iterator[dict[int, int]]:
        if self.ready:
            yield self.ready
            self._release()
        while self.under_way:
            yield self._next_arrivals()
            self._release()

    def _fetch_next(self, **counts: float) -> None:
        pages = self.left.popleft()
        if pages:
            self.under_way.append((self.sequence.fetch("fetch", pages.keys(), pages.values(), **counts), pages))
        elif counts:
            self.sequence.count(**counts)

    def _next_arrivals(self) -> dict[int, int]:
        wave: dict[int, int] = {}
        while not wave or (self.under_way and not self.left and self.under_way[0][0].done()):
            ticket, arrived = self.under_way.popleft()
            self.sequence.recorder.waited(self.sequence.layer_idx, ticket.wait())
            wave = {**wave, **arrived} if wave else arrived
        return wave

    def _release(self) -> None:
        if self.left:
            self._fetch_next()


class Lockstep:
    """The requests that the layers of a cache have made in the step under way, one for each sequence of a batch."""

    def __init__(self) -> None:
        self._made: dict[int, MadeRequest | None] = {}  # by lane; None while it is being made

    def begin_step(self) -> None:
        """Forget the step before."""
        self._made.clear()

    def ask(
        self, sequence: InLockstep, wanted: Sequence[int], pinned: set[int], must_move: int
    ) -> Iterable[dict[int, int]] | None:
        """Make a request as another layer has made it, or as the first to make it; None where the layer is neither.

        Args:
            sequence: nothing of it is on its way, and its policy can be compared.
            wanted, pinned, must_move: as for `Resolution`.
        """
        if sequence.lane not in self._made:
            self._made[sequence.lane] = None
            return self._first(sequence, wanted, pinned, must_move)
        made = self._made[sequence.lane]
        if made is None or made.wanted != wanted:
            return None
        if made.before is not sequence.table and not made.before.is_like(sequence.table):
            return None
        sequence.table, sequence.shares_table = made.after, True
        sequence.yardstick.asked(wanted, pinned, resident_first=True, hits=made.ready)
        return RepeatedRequest(sequence, made)

    def _first(
        self, sequence: InLockstep, wanted: Sequence[int], pinned: set[int], must_move: int
    ) -> Iterator[dict[int, int]]:
        before, sequence.shares_table = sequence.table, True
        sequence.own_table()
        asked = sequence.yardstick.asked(wanted, pinned, resident_first=True)
        return self._kept(FirstRequest(sequence, wanted, pinned, asked, must_move), before)

    def _kept(self, request: FirstRequest, before: PageTable) -> Iterator[dict[int, int]]:
        """The waves of a request; when the last has been attended, others may repeat it."""
        yield from request
        sequence = request.sequence
        self._made[sequence.lane] = MadeRequest(
            request.wanted, before, sequence.table, request.ready, request.fetched, request.must_move
        )
        sequence.shares_table = True
