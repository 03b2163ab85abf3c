"""The pages of one sequence in one layer, and how attention gets the ones it asks for.

`PagedSequence` joins the three parts that each do one thing: the page table (where a page is), the store (moves bytes)
and the recorder (counts). `resolve` is the one door between attention and pages: it takes the whole set of wanted pages
and gives them back in *waves*, first those that are on the device, then each copy as it arrives.

Asked for one by one in position order, exact attention is a cyclic scan, and LRU evicts each page just before it is
needed again: it hits nothing. Asked for as a set, pages that are there are attended first and only what is not there
moves, which is the least any policy can do.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Protocol

from metrics import Recorder
from page_store import PageStore, Ticket
from page_table import PageTable


class LooksAhead(Protocol):
    """Told when all pages of a request are there or on their way, so that the link has time."""

    def __call__(self, wanted: Sequence[int]) -> None: ...


class PagedSequence:
    """One sequence's pages in one layer.

    Args:
        table: where this sequence's pages are.
        store: the layer's store, shared by the sequences of a batch.
        recorder: counts for the whole cache.
        layer_idx: for the record.
        row, n_rows: this sequence's place in the batch, which decides where its host pages lie.
    """

    def __init__(self, table: PageTable, store: PageStore, recorder: Recorder, layer_idx: int, row: int, n_rows: int):
        self.table, self.store, self.recorder, self.layer_idx = table, store, recorder, layer_idx
        self.row, self.n_rows = row, n_rows
        self.arriving: dict[int, Ticket] = {}

    def host_row(self, page: int) -> int:
        """Where a page lies among the store's host pages."""
        return page * self.n_rows + self.row

    def writable_slot(self, page: int, pinned: set[int]) -> int:
        """The slot of the open page; a page that does not exist yet is opened, by eviction if need be."""
        slot = self.table.slot(page)
        if slot is None:
            slot, evicted = self.table.open(page, pinned)
            if evicted is not None:
                self.count(evictions=1)
            self.recorder.waited(self.layer_idx, self.store.await_slot(slot))
        return slot

    def seal(self, page: int) -> None:
        """The open page is full and will not change again: write it to the host, so that evicting it is free."""
        self.store.seal(self.table.resident[page], self.host_row(page))
        self.count(d2h_pages=1)

    def prefetch(self, ranked: Sequence[int], limit: int, n_sealed: int) -> int:
        """Start copying the first `limit` of these pages that are not on the device, into free slots only.

        Args:
            ranked: page ids, most wanted first; ids that are no sealed page (0..n_sealed-1) are passed over.

        Returns:
            How many copies were started; fewer than `limit` when slots run out.
        """
        free = min(limit, len(self.table.free_slots))
        absent = [page for page in dict.fromkeys(ranked) if 0 <= page < n_sealed and self.table.slot(page) is None]
        chosen = absent[:free]
        if chosen:
            ticket = self.store.fetch([(self.table.stage(page, ())[0], self.host_row(page)) for page in chosen])
            self.arriving.update(dict.fromkeys(chosen, ticket))
            self.count(h2d_pages=len(chosen), prefetch_issued=len(chosen))
        return len(chosen)

    def resolve(self, wanted: Sequence[int], pinned: set[int], look_ahead: LooksAhead) -> Resolution:
        """Ask for pages; see `Resolution`."""
        return Resolution(self, wanted, pinned, look_ahead)

    def clear(self) -> None:
        """Forget every page."""
        self.arriving.clear()
        self.table.clear()

    def count(self, **counts: int) -> None:
        self.recorder.count(self.layer_idx, **counts)


class Resolution:
    """A request for pages: starts the copies it needs, and gives the pages in waves.

    Iterating gives `{page: slot}` of pages that may be attended now. Asking for the next wave says that the last one
    has been attended, so that its pages may be evicted for others. Until then a page is pinned: it is never evicted
    between being found and being attended.

    Args:
        sequence: whose pages.
        wanted: page ids, each once.
        pinned: pages that stay resident whatever happens.
        look_ahead: called once, when every wanted page is there or on its way.
    """

    def __init__(self, sequence: PagedSequence, wanted: Sequence[int], pinned: set[int], look_ahead: LooksAhead):
        self.sequence, self.table, self.wanted = sequence, sequence.table, wanted
        self.look_ahead, self.always_pinned = look_ahead, pinned
        self.pinned = pinned | set(wanted)
        self.ready: list[int] = []
        self.missing: deque[int] = deque()
        self.under_way: deque[tuple[Ticket, list[int], int]] = deque()  # copy, its pages, how many were prefetched
        self._drop_unwanted()
        self._find()
        self._fetch_missing()

    def __iter__(self) -> Iterator[dict[int, int]]:
        if self.ready:
            yield self._slots(self.ready)
            self._release(self.ready)
        while self.under_way:
            pages = self._next_arrivals()
            yield self._slots(pages)
            self._release(pages)

    def _drop_unwanted(self) -> None:
        """Give up copies made ahead for pages that are not asked for: their slots are needed."""
        wanted = set(self.wanted)
        for page in [page for page in self.table.staged if page not in wanted]:
            self.table.unstage(page)
            del self.sequence.arriving[page]
            self.sequence.count(prefetch_wasted=1)

    def _find(self) -> None:
        """Sort the wanted pages into hits, misses and those still on their way, which are counted as they are waited
        for: on CUDA only the device knows whether it had to wait."""
        late: dict[int, tuple[Ticket, list[int]]] = {}
        on_time = 0
        for page in self.wanted:
            if page in self.table.resident:
                self.table.touch(page)
                self.ready.append(page)
            elif page not in self.table.staged:
                self.missing.append(page)
            elif (ticket := self.sequence.arriving.pop(page)).done():
                ticket.wait()  # takes no time, but raises if the copy failed
                self.ready.append(page)
                on_time += 1
            else:
                late.setdefault(id(ticket), (ticket, []))[1].append(page)
        self.under_way.extend((ticket, pages, len(pages)) for ticket, pages in late.values())
        self.sequence.count(
            hits=len(self.ready),
            misses=len(self.missing),
            prefetch_on_time=on_time,
            must_move=max(0, len(self.wanted) - self.table.max_resident),
        )

    def _fetch_missing(self) -> None:
        """Start copying as many missing pages as there are slots for, as one transfer."""
        pages: list[int] = []
        moves: list[tuple[int, int]] = []
        evictions = 0
        while self.missing and self.table.can_stage(self.pinned):
            page = self.missing.popleft()
            slot, evicted = self.table.stage(page, self.pinned)
            evictions += evicted is not None
            pages.append(page)
            moves.append((slot, self.sequence.host_row(page)))
        if pages:
            self.under_way.append((self.sequence.store.fetch(moves), pages, 0))
            self.sequence.count(h2d_pages=len(pages), evictions=evictions)
        if not self.missing:
            self.look_ahead(self.wanted)

    def _next_arrivals(self) -> list[int]:
        """Wait for the oldest copy, and take along those that have arrived with it."""
        pages: list[int] = []
        while not pages or (self.under_way and self.under_way[0][0].done()):
            ticket, arrived, n_prefetched = self.under_way.popleft()
            self.sequence.recorder.waited(self.sequence.layer_idx, ticket.wait(), n_prefetched)
            pages += arrived
        return pages

    def _release(self, pages: Sequence[int]) -> None:
        """These pages have been attended: those that were staged become resident, and room is made for the next."""
        self.pinned.difference_update(page for page in pages if page not in self.always_pinned)
        evictions = 0
        for page in pages:
            if page in self.table.staged:
                evictions += self.table.admit(page, self.pinned) is not None
        if evictions:
            self.sequence.count(evictions=evictions)
        if self.missing:
            self._fetch_missing()

    def _slots(self, pages: Sequence[int]) -> dict[int, int]:
        resident, staged = self.table.resident, self.table.staged
        return {page: resident[page] if page in resident else staged[page] for page in pages}
