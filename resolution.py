"""A request for pages: what is there, what has to be waited for, and in which waves they come.

The wanted pages fall into three kinds. Those on the device are attended at once; meanwhile those under way arrive, and
the missing ones are copied into whatever slots there are, as one transfer, and wait for slots where there are too few.
So a context of any length streams through a fixed budget. Under `on_miss: skip` a request gives the first kind only,
and has the missing pages copied for a later step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from page_store import Ticket
from page_table import PageTable
from recorder import Recorder
from yardstick import Asked


class LooksAhead(Protocol):
    """Told when all pages of a request are there or on their way, so that the link has time."""

    def __call__(self, wanted: Sequence[int]) -> None: ...


class HasPages(Protocol):
    """What a request needs of the sequence whose pages it asks for."""

    table: PageTable
    recorder: Recorder
    layer_idx: int
    arriving: dict[int, Ticket]

    def fetch(self, name: str, pages: Sequence[int], slots: Sequence[int], **counts: float) -> Ticket: ...
    def fetched_for_later(self, pages: Sequence[int], ticket: Ticket) -> None: ...
    def taken_up(self, page: int) -> bool: ...
    def give_up_one(self, kept: Collection[int], only_arrived: bool = False) -> bool: ...
    def looked_up(self, wanted: Collection[int], missing: Collection[int]) -> None: ...
    def count(self, **counts: float) -> None: ...


class Resolution:
    """A request for pages: starts the copies it needs, and gives the pages in waves.

    Iterating gives `{page: slot}` of pages that may be attended now. Asking for the next wave says that the last one
    has been attended, so that its pages may be evicted for others. Until then a page is pinned: it is never evicted
    between being found and being attended.

    Args:
        sequence: whose pages.
        wanted, pinned, look_ahead: as for `PagedSequence.resolve`.
        asked: is told which of the pages are hits.
        must_move: how many of them any policy would have to fetch, for the record.
        request: pages of the request that are not to be given up for these, where `wanted` is a part of it.
        skips: do without the pages that are not there, and have them copied for a later step.
    """

    def __init__(
        self,
        sequence: HasPages,
        wanted: Sequence[int],
        pinned: set[int],
        asked: Asked,
        look_ahead: LooksAhead | None = None,
        must_move: int = 0,
        request: set[int] | None = None,
        skips: bool = False,
    ):
        self.sequence, self.table, self.wanted, self.asked = sequence, sequence.table, wanted, asked
        self.look_ahead, self.always_pinned, self.skips = look_ahead, pinned, skips
        self.pinned = pinned.union(wanted)
        self._request = request
        self.ready: dict[int, int] = {}  # slots, by page
        self.missing: list[int] = []
        # Copies with their pages; and how many of these were on their way already, how many of them prefetched, and who
        # is told if they are hits.
        self.under_way: deque[tuple[Ticket, list[int], int, int, Callable[[], int]]] = deque()
        self._fetch_missing(self._find(must_move))

    def __iter__(self) -> Iterator[dict[int, int]]:
        if self.ready:
            yield self.ready
            self._release(self.ready)
        while self.under_way:
            pages = self._next_arrivals()
            staged = self.table.staged
            yield {page: staged[page] for page in pages}
            self._release(pages)
        if self.missing:
            raise RuntimeError(f"layer {self.sequence.layer_idx}: no slot was to be had for pages {[*self.missing]}")

    def _find(self, must_move: int) -> dict[str, float]:
        """Sort the wanted pages into hits, misses and those still on their way, which are counted as they are waited
        for: on CUDA only the device knows whether it had to wait. Returns the counts of the others."""
        on_their_way: dict[int, tuple[Ticket, list[int]]] = {}
        n_on_their_way = on_time = 0
        resident, staged, arriving = self.table.resident, self.table.staged, self.sequence.arriving
        self.ready = {page: resident[page] for page in self.wanted if page in resident}
        self.table.touch(reversed(self.ready))  # the most wanted last, so that it counts as the most recently used
        last, is_done = None, False  # pages come by the transfer
        for page in [page for page in self.wanted if page not in resident]:
            slot = staged.get(page)
            if slot is None:
                self.missing.append(page)
                continue
            ticket = arriving[page]
            if ticket is not last:
                last, is_done = ticket, ticket.done()
                if is_done:
                    ticket.wait()  # takes no time, but raises if the copy failed
            if is_done:
                del arriving[page]
                self.ready[page] = slot
                on_time += self.sequence.taken_up(page)
            else:
                n_on_their_way += 1
                on_their_way.setdefault(id(ticket), (ticket, []))[1].append(page)
        counts: dict[str, float] = {"hits": len(self.ready), "misses": len(self.missing), "must_move": must_move}
        if on_time:
            counts["prefetch_on_time"] = on_time
        if self.skips:
            counts |= {"late": n_on_their_way, "skipped": n_on_their_way + len(self.missing)}
        else:
            for ticket, pages in on_their_way.values():
                for page in pages:
                    self.sequence.arriving.pop(page)
                n_prefetched = sum(map(self.sequence.taken_up, pages))
                self.under_way.append((ticket, pages, len(pages), n_prefetched, partial(self.asked.hit, pages)))
        self.asked.hit(self.ready)
        self.sequence.looked_up(self.wanted, self.missing)
        return counts

    def _fetch_missing(self, counts: dict[str, float]) -> None:
        """Start copying as many missing pages as there are slots for, as one transfer; and add the counts."""
        slots = self.table.stage_free(self.missing)
        evictions = 0
        while len(slots) < len(self.missing) and self._has_room():
            slot, evicted = self.table.stage(self.missing[len(slots)], self.pinned)
            slots.append(slot)
            evictions += evicted is not None
        if evictions:
            counts["evictions"] = counts.get("evictions", 0) + evictions
        if slots:
            pages, self.missing = self.missing[: len(slots)], self.missing[len(slots) :]
            ticket = self.sequence.fetch("fetch", pages, slots, **counts)
            if self.skips:
                self.sequence.fetched_for_later(pages, ticket)
            else:
                self.under_way.append((ticket, pages, 0, 0, int))
        elif counts:
            self.sequence.count(**counts)
        if self.skips:
            self.missing = []
        if not self.missing and self.look_ahead is not None:
            self.look_ahead(self.wanted)

    def _has_room(self) -> bool:
        """Whether a page can be staged: in a free slot, or in that of a page evicted for it, which it is going to evict
        anyway as it becomes resident; else in that of a page copied ahead that this request does not want. Where pages
        are asked for one by one, and those copied ahead hold every slot, one that is wanted later has to go too.

        A request that skips evicts nothing before the page is there, and so leaves a new page its slot."""
        if self.table.free_slots:
            return True
        if self.skips:
            return self.sequence.give_up_one(self._whole_request(), only_arrived=True)
        if self.table.makes_room and self.table.can_stage(self.pinned):
            return True
        give_up_one = self.sequence.give_up_one
        return give_up_one(self._whole_request()) or self.table.can_stage(self.pinned) or give_up_one(self.pinned)

    def _whole_request(self) -> set[int]:
        if self._request is None:
            self._request = self.always_pinned.union(self.wanted)
        return self._request

    def _next_arrivals(self) -> list[int]:
        """Wait for the oldest copy, and take along those that have arrived with it; but while pages are missing, the
        sooner a wave has been attended, the sooner there is room for them."""
        pages: list[int] = []
        while not pages or (self.under_way and not self.missing and self.under_way[0][0].done()):
            ticket, arrived, *n_early = self.under_way.popleft()
            self.sequence.recorder.waited(self.sequence.layer_idx, ticket.wait(), *n_early)
            pages += arrived
        return pages

    def _release(self, pages: Collection[int]) -> None:
        """These pages have been attended: those that were staged become resident, and room is made for the next."""
        self.pinned.difference_update(pages)
        self.pinned.update(self.always_pinned)
        evictions = self.table.admit(pages, self.pinned) if self.table.staged else 0
        counts = {"evictions": evictions} if evictions else {}
        if self.missing:
            self._fetch_missing(counts)
        elif counts:
            self.sequence.count(**counts)


@dataclass(frozen=True)
class StandingAnswer:
    """The answer to a request whose pages were all resident, for plain LRU too: it stays the answer while the same is
    asked and no page moves, as in every step of exact attention where all fits.

    Attributes:
        wanted: the pages asked for.
        n_changes: the page table's count of changes then.
        wave: `{page: slot}` of all of them.
    """

    wanted: Sequence[int]
    n_changes: int
    wave: dict[int, int]

    def stands(self, table: PageTable) -> bool:
        """Whether it would be the answer again: no page has moved."""
        return self.n_changes == table.n_changes
