"""The pages of one sequence in one layer: how they are filled, and how attention gets the ones it asks for.

`PagedSequence` joins the parts that each do one thing: the page table (where a page is), the store (moves bytes) and
the recorder (counts). `resolve` is the one door between attention and pages: it takes the whole set of wanted pages
and gives them back in *waves*, first those that are on the device, then each copy as it arrives.

Asked for one by one in position order, exact attention is a cyclic scan, and LRU evicts each page just before it is
needed again: it hits nothing but what is pinned. Asked for as a set, pages that are there are attended first and only
what is not there moves, which is the least any policy can do. `access_order` chooses between the two.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import torch

from page_store import PageStore, Ticket
from page_table import PageTable
from recorder import Recorder
from registry import POLICIES
from run_specs import Paging
from shadow_lru import ShadowLRU


class LooksAhead(Protocol):
    """Told when all pages of a request are there or on their way, so that the link has time."""

    def __call__(self, wanted: Sequence[int]) -> None: ...


class PagedSequence:
    """One sequence's pages in one layer.

    Args:
        lane: this sequence's place in the device pool.
        paging: page size, budget and policies.
        store: the layer's store, shared by the sequences of a batch.
        recorder: counts for the whole cache.
        layer_idx: for the record.

    Attributes:
        n_tokens: positions stored; padding is not.
        holes: positions of the context that are not stored, ascending.
        host_rows: where each sealed page lies on the host.
    """

    def __init__(self, lane: int, paging: Paging, store: PageStore, recorder: Recorder, layer_idx: int):
        self.lane, self.paging, self.store, self.recorder, self.layer_idx = lane, paging, store, recorder, layer_idx
        policy = POLICIES.create(paging.policy)
        self.table = PageTable(paging.max_gpu_pages, paging.staging_pages, policy, first_slot=lane * paging.slots)
        self.shadow = ShadowLRU(paging.max_gpu_pages)
        self.n_tokens = 0
        self.holes: list[int] = []
        self.host_rows: list[int] = []
        self.arriving: dict[int, Ticket] = {}
        self._unread_mass: tuple[Sequence[int], Callable[[], list[float]]] | None = None

    @property
    def n_pages(self) -> int:
        """Pages of the sequence, the open one included."""
        return -(-self.n_tokens // self.paging.page_size)

    @property
    def n_sealed(self) -> int:
        """Pages that are full."""
        return len(self.host_rows)

    def pinned_pages(self) -> set[int]:
        """Pages that stay resident: the first `sink_pages` and the last `recent_pages`."""
        return self._pinned_of(self.n_pages)

    def _pinned_of(self, n_pages: int) -> set[int]:
        recent = range(max(0, n_pages - self.paging.recent_pages), n_pages)
        return {*range(min(self.paging.sink_pages, n_pages)), *recent}

    # --- writing ----------------------------------------------------------------------------------------------------

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write `[K, T, D]` into pages, and seal each page that fills."""
        size, length, written = self.paging.page_size, keys.shape[1], 0
        while written < length:
            page, offset = divmod(self.n_tokens, size)
            count = min(size - offset, length - written)
            slot = self._open(page) if offset == 0 else self.table.resident[page]
            target = self.store.pool[slot]
            target[0, :, offset : offset + count] = keys[:, written : written + count].detach()
            target[1, :, offset : offset + count] = values[:, written : written + count].detach()
            written += count
            self.n_tokens += count
            if offset + count == size:
                self._seal(slot)

    def _open(self, page: int) -> int:
        """A slot for a page that does not exist yet, by eviction if need be."""
        pinned = self._pinned_of(page + 1)
        slot, evicted = self.table.open(page, pinned)
        self.shadow.insert(page, pinned)
        if evicted is not None:
            self.count(evictions=1)
        self.recorder.waited(self.layer_idx, self.store.await_slot(slot))
        return slot

    def _seal(self, slot: int) -> None:
        """The open page is full and will not change again: write it to the host, so that evicting it is free."""
        started = time.perf_counter()
        self.host_rows.append(self.store.seal(slot))
        self.count(d2h_pages=1, copy_ms=1000.0 * (time.perf_counter() - started))
        self.recorder.copying(self.layer_idx, "seal", self.store.seal_of(self.host_rows[-1]), 1)

    def truncate(self, n_tokens: int) -> None:
        """Forget all but the first `n_tokens` stored positions. A page that is then no longer full is open again."""
        kept_sealed, fill = divmod(n_tokens, self.paging.page_size)
        n_pages = kept_sealed + (fill > 0)
        for page in [page for page in self.arriving if page >= n_pages]:
            self._give_up(page)
        self.table.truncate(n_pages)
        self.shadow.truncate(n_pages)
        self._unread_mass = None
        if fill and kept_sealed < self.n_sealed:
            self._reopen(kept_sealed, n_pages)
        for row in self.host_rows[kept_sealed:]:
            self.store.release(row)
        del self.host_rows[kept_sealed:]
        self.n_tokens = n_tokens

    def _reopen(self, page: int, n_pages: int) -> None:
        """Make a sealed page resident and writable: no copy reads or writes its slot any more."""
        pinned = self._pinned_of(n_pages)
        if self.table.slot(page) is None:
            slot, evicted = self.table.stage(page, pinned)
            self.arriving[page] = self.fetch([page], [slot])
            self.recorder.copying(self.layer_idx, "fetch", self.arriving[page], 1)
            self.count(h2d_pages=1, evictions=int(evicted is not None))
        elif page in self.table.staged:
            self.count(prefetch_on_time=1)
        if page in self.table.staged:
            self.recorder.waited(self.layer_idx, self.arriving.pop(page).wait())
            self.count(evictions=int(self.table.admit(page, pinned) is not None))
        self.shadow.insert(page, pinned)
        self.store.await_slot(self.table.resident[page])

    def clear(self) -> None:
        """Forget every position."""
        self.drop()
        self.table.clear()
        self.shadow.clear()
        self.n_tokens, self.holes, self._unread_mass = 0, [], None

    def fork(self, lane: int) -> PagedSequence:
        """A copy in another lane, whose slots hold the same bytes already. Sealed pages are shared with it on the host,
        as they never change. What was on its way to this sequence only is not copied."""
        other = PagedSequence(lane, self.paging, self.store, self.recorder, self.layer_idx)
        other.table = self.table.fork(other.table.first_slot)
        other.shadow = self.shadow.copy()
        other.n_tokens, other.holes, other.host_rows = self.n_tokens, list(self.holes), list(self.host_rows)
        other._unread_mass = self._unread_mass
        for row in other.host_rows:
            self.store.host.share(row)
        return other

    def drop(self) -> None:
        """Give up what is on its way, and give back the host pages."""
        for page in list(self.arriving):
            self._give_up(page)
        for row in self.host_rows:
            self.store.release(row)
        self.host_rows = []

    # --- reading ----------------------------------------------------------------------------------------------------

    def prefetch(self, ranked: Sequence[int], limit: int) -> None:
        """Start copying the first `limit` of these pages that are not on the device, into free slots only, so fewer
        when slots run out.

        Args:
            ranked: page ids, most wanted first; ids that are no sealed page are passed over.
        """
        free = min(limit, len(self.table.free_slots))
        absent = [page for page in dict.fromkeys(ranked) if 0 <= page < self.n_sealed and self.table.slot(page) is None]
        chosen = absent[:free]
        if chosen:
            ticket = self.fetch(chosen, [self.table.stage(page, ())[0] for page in chosen])
            self.arriving.update(dict.fromkeys(chosen, ticket))
            self.recorder.copying(self.layer_idx, "prefetch", ticket, len(chosen))
            self.count(h2d_pages=len(chosen), prefetch_issued=len(chosen))

    def resolve(self, wanted: Sequence[int], pinned: set[int], look_ahead: LooksAhead) -> Iterable[dict[int, int]]:
        """Ask for pages.

        Args:
            wanted: page ids, each once.
            pinned: pages that stay resident whatever happens.
            look_ahead: called once, when every wanted page is there or on its way.

        Returns:
            Waves of `{page: slot}`, as in `Resolution`.
        """
        self._tell_policy()
        kept = set(wanted)
        for page in [page for page in self.arriving if page not in kept]:
            self._give_up(page)
        as_set = self.paging.access_order == "resident_first"
        order = wanted if as_set else sorted(wanted)
        self.recorder.asked(self.layer_idx, self.lane, order, self.table.resident)
        self.count(
            must_move=max(0, len(order) - self.table.max_resident),
            shadow_hits=self.shadow.ask(order, pinned, as_set),
        )
        return Resolution(self, order, pinned, look_ahead) if as_set else self._one_by_one(order, pinned, look_ahead)

    def _one_by_one(self, order: Sequence[int], pinned: set[int], look_ahead: LooksAhead) -> Iterator[dict[int, int]]:
        """Naive paging: no page is asked for before the one before it has been attended."""
        for page in order[:-1]:
            yield from Resolution(self, [page], pinned)
        yield from Resolution(self, order[-1:], pinned, lambda _: look_ahead(order))

    def attended(self, pages: Sequence[int], mass: Callable[[], list[float]]) -> None:
        """Note each page's share of a decode step's attention, for a policy that goes by it. It is read when pages are
        asked for next, by when it has reached the host."""
        self._unread_mass = (pages, mass)

    def _tell_policy(self) -> None:
        if self._unread_mass is not None:
            (pages, mass), self._unread_mass = self._unread_mass, None
            self.table.policy.observe(dict(zip(pages, mass(), strict=True)))

    def _give_up(self, page: int) -> None:
        """Free the slot of a page that was copied ahead and is not asked for."""
        self.table.unstage(page)
        del self.arriving[page]
        self.count(prefetch_wasted=1)

    def fetch(self, pages: Sequence[int], slots: Sequence[int]) -> Ticket:
        """Start copying sealed pages into slots, as one transfer."""
        started = time.perf_counter()
        ticket = self.store.fetch([(slot, self.host_rows[page]) for page, slot in zip(pages, slots, strict=True)])
        self.count(copy_ms=1000.0 * (time.perf_counter() - started))
        return ticket

    def count(self, **counts: float) -> None:
        self.recorder.count(self.layer_idx, **counts)


class Resolution:
    """A request for pages: starts the copies it needs, and gives the pages in waves.

    Iterating gives `{page: slot}` of pages that may be attended now. Asking for the next wave says that the last one
    has been attended, so that its pages may be evicted for others. Until then a page is pinned: it is never evicted
    between being found and being attended.

    Args: as for `PagedSequence.resolve`.
    """

    def __init__(
        self, sequence: PagedSequence, wanted: Sequence[int], pinned: set[int], look_ahead: LooksAhead | None = None
    ):
        self.sequence, self.table, self.wanted = sequence, sequence.table, wanted
        self.look_ahead, self.always_pinned = look_ahead, pinned
        self.pinned = pinned | set(wanted)
        self.ready: list[int] = []
        self.missing: deque[int] = deque()
        self.under_way: deque[tuple[Ticket, list[int], int]] = deque()  # copy, its pages, how many were prefetched
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
        self.sequence.count(hits=len(self.ready), misses=len(self.missing), prefetch_on_time=on_time)

    def _fetch_missing(self) -> None:
        """Start copying as many missing pages as there are slots for, as one transfer."""
        pages: list[int] = []
        slots: list[int] = []
        evictions = 0
        while self.missing and self.table.can_stage(self.pinned):
            slot, evicted = self.table.stage(self.missing[0], self.pinned)
            pages.append(self.missing.popleft())
            slots.append(slot)
            evictions += evicted is not None
        if pages:
            self.under_way.append((self.sequence.fetch(pages, slots), pages, 0))
            self.sequence.recorder.copying(self.sequence.layer_idx, "fetch", self.under_way[-1][0], len(pages))
            self.sequence.count(h2d_pages=len(pages), evictions=evictions)
        if not self.missing and self.look_ahead is not None:
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
