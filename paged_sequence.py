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
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial

import torch

from cache_settings import Paging
from device_page_table import DeviceReads
from lockstep import Lockstep
from page_store import PageStore, Ticket
from page_table import PageTable
from pool_reads import Stretch
from recorder import Recorder
from registry import POLICIES
from resolution import LooksAhead, Resolution, StandingAnswer
from yardstick import Asked, Yardstick


class PagedSequence:
    """One sequence's pages in one layer.

    Args:
        lane: this sequence's place in the device pool.
        paging: page size, budget and policies.
        store: the layer's store, shared by the sequences of a batch.
        recorder: counts for the whole cache.
        layer_idx: for the record.
        lockstep: of the layers that ask alike; None where this one goes its own way.

    Attributes:
        n_tokens: positions stored; padding is not.
        holes: positions of the context that are not stored, ascending.
        host_rows: where each sealed page lies on the host.
        count: adds to the record, as `Recorder.count` for this layer.
        arriving: the copies of staged pages that no request has taken up yet: pages copied ahead, and pages that a step
            did without (`_demanded`). They stay until they are asked for, or their slot is needed.
        shares_table: whether other layers hold the page table as well, so that it may not be changed.
    """

    def __init__(
        self, lane: int, paging: Paging, store: PageStore, recorder: Recorder, layer_idx: int, lockstep: Lockstep | None
    ):
        self.lane, self.paging, self.store, self.recorder, self.layer_idx = lane, paging, store, recorder, layer_idx
        self.count = partial(recorder.count, layer_idx)
        policy = POLICIES.create(paging.policy)
        self.table = PageTable(paging.max_gpu_pages, paging.staging_pages, policy, first_slot=lane * paging.slots)
        self.yardstick = Yardstick(recorder, layer_idx, paging.max_gpu_pages, paging.slots)
        self.n_tokens = 0
        self.holes: list[int] = []
        self.host_rows: list[int] = []
        self.arriving: dict[int, Ticket] = {}
        self._demanded: set[int] = set()
        self._evicted_for_prefetch: set[int] = set()
        self._unread_mass: tuple[Sequence[int], Callable[[], list[float]]] | None = None
        self._touches_are_idempotent = getattr(policy.touch, "idempotent", False)
        self._as_set = paging.access_order == "resident_first"
        self._standing: StandingAnswer | None = None
        self._pinned: tuple[int, set[int]] = (0, set())
        self._on_device: DeviceReads | None = None
        self.shares_table = False
        needs_no_mass = not getattr(policy, "needs_mass", False)  # attention differs from layer to layer
        is_alike = needs_no_mass and vars(type(policy)).get("comparable", False)
        self._lockstep = lockstep if is_alike and self._as_set and paging.on_miss == "wait" else None

    @property
    def n_pages(self) -> int:
        """Pages of the sequence, the open one included."""
        return -(-self.n_tokens // self.paging.page_size)

    @property
    def n_sealed(self) -> int:
        """Pages that are full."""
        return len(self.host_rows)

    @property
    def n_resident(self) -> int:
        """Pages that are resident, whoever knows where."""
        return len(self.table.resident) + (0 if self._on_device is None else self._on_device.n_held)

    def pinned_pages(self) -> set[int]:
        """Pages that stay resident: the first `sink_pages` and the last `recent_pages`. Not to be changed."""
        if self._pinned[0] != self.n_pages:
            self._pinned = self.n_pages, self._pinned_of(self.n_pages)
        return self._pinned[1]

    def _pinned_of(self, n_pages: int) -> set[int]:
        recent = range(max(0, n_pages - self.paging.recent_pages), n_pages)
        return {*range(min(self.paging.sink_pages, n_pages)), *recent}

    # --- writing ----------------------------------------------------------------------------------------------------

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write `[K, T, D]` into pages, and seal each page that fills. Gradients are not followed into them."""
        if keys.requires_grad or values.requires_grad:
            keys, values = keys.detach(), values.detach()
        size, length, written = self.paging.page_size, keys.shape[1], 0
        while written < length:
            page, offset = divmod(self.n_tokens, size)
            count = min(size - offset, length - written)
            slot = self._open(page) if offset == 0 else self.table.resident[page]
            page_now = self.store.pool[slot]
            if offset == 0 and count < size:
                self._blank(slot, count)
            part = (keys, values)
            if count < length:
                part = (keys.narrow(1, written, count), values.narrow(1, written, count))
            torch.stack(part, out=page_now.narrow(0, offset, count).permute(1, 2, 0, 3))  # [2, K, count, D]
            written += count
            self.n_tokens += count
            if offset + count == size:
                self._seal(slot)

    def own_table(self) -> PageTable:
        """The page table, to be changed: a copy of it, if other layers hold it too."""
        if self.shares_table:
            self.table, self.shares_table = self.table.fork(self.table.first_slot), False
        return self.table

    def _open(self, page: int) -> int:
        """A slot for a page that does not exist yet, by eviction if need be."""
        self.own_table()
        pinned = self._pinned_of(page + 1)
        if self.paging.on_miss == "skip":
            pinned.add(page - 1)  # its copy to the host has just begun, and a new page would wait until it is done
        if not self.table.makes_room and not self.give_up_one(pinned, only_arrived=True):
            self.give_up_one(pinned)
        slot, evicted = self.table.open(page, pinned)
        self.yardstick.opened(page, pinned)
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
        self._end_lease()
        self.own_table()
        kept_sealed, fill = divmod(n_tokens, self.paging.page_size)
        n_pages = kept_sealed + (fill > 0)
        for page in [page for page in self.arriving if page >= n_pages]:
            self._give_up(page)
        self.table.truncate(n_pages)
        self.yardstick.truncate(n_pages)
        self._evicted_for_prefetch = {page for page in self._evicted_for_prefetch if page < n_pages}
        self._unread_mass = None
        if fill and kept_sealed < self.n_sealed:
            self._reopen(kept_sealed, n_pages)
        for row in self.host_rows[kept_sealed:]:
            self.store.release(row)
        del self.host_rows[kept_sealed:]
        if fill:
            self._blank(self.table.resident[kept_sealed], fill)
        self.n_tokens = n_tokens

    def _blank(self, slot: int, n_written: int) -> None:
        """Attention takes what is not written of the open page times 0, which only NaN outlives."""
        self.store.pool[slot, n_written:].zero_()

    def _reopen(self, page: int, n_pages: int) -> None:
        """Make a sealed page resident and writable: no copy reads or writes its slot any more."""
        pinned = self._pinned_of(n_pages)
        if self.table.slot(page) is None:
            if not self.table.makes_room:
                self.give_up_one(pinned)
            slot, evicted = self.table.stage(page, pinned)
            self.arriving[page] = self.fetch("fetch", [page], [slot], evictions=int(evicted is not None))
        elif page in self.table.staged:
            self.count(prefetch_on_time=self.taken_up(page))
        if page in self.table.staged:
            self.recorder.waited(self.layer_idx, self.arriving.pop(page).wait())
            self.count(evictions=self.table.admit((page,), pinned))
        self.yardstick.opened(page, pinned)
        self.store.await_slot(self.table.resident[page])

    def clear(self) -> None:
        """Forget every position."""
        self._end_lease()
        self.own_table()
        self.drop()
        self.table.clear()
        self.yardstick.clear()
        self._evicted_for_prefetch.clear()
        self.n_tokens, self.holes, self._unread_mass = 0, [], None

    def fork(self, lane: int) -> PagedSequence:
        """A copy in another lane, whose slots hold the same bytes already. Sealed pages are shared with it on the host,
        as they never change. What was on its way to this sequence only is not copied."""
        other = PagedSequence(lane, self.paging, self.store, self.recorder, self.layer_idx, self._lockstep)
        other.table = self.table.fork(other.table.first_slot)
        other.yardstick = self.yardstick.copy()
        other.n_tokens, other.holes, other.host_rows = self.n_tokens, list(self.holes), list(self.host_rows)
        other._unread_mass = self._unread_mass
        other._evicted_for_prefetch = set(self._evicted_for_prefetch)
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

    def absent(self, pages: Iterable[int]) -> set[int]:
        """Those of the pages that would have to be copied: full, and neither on the device nor on their way."""
        resident, staged, n_sealed = self.table.resident, self.table.staged, self.n_sealed
        return {page for page in pages if page not in resident and page not in staged and 0 <= page < n_sealed}

    def prefetch(
        self, pages: Sequence[int], ranking: Iterable[int], kept: Collection[int] = (), may_evict: bool = False
    ) -> None:
        """Start copying pages ahead of need, as far as there are slots for them: free ones, those of pages that were
        copied ahead and are guessed less or not at all, and if `may_evict` those of resident pages not guessed.

        Args:
            pages: absent page ids, most wanted first.
            ranking: all pages that are guessed, most wanted first, those to be copied among them.
            kept: pages that are about to be attended, and so given up for none.
        """
        slots = self.own_table().stage_free(pages)
        if len(slots) < len(pages):
            rank = {page: place for place, page in enumerate(dict.fromkeys(ranking))}
            kept = {*kept, *self.pinned_pages()}
            for page in pages[len(slots) :]:
                # What is not guessed goes first, and a guess is given up for none that is worse.
                freed = self._give_up_behind(len(rank) - 1, rank, kept)
                freed = freed or (may_evict and self._evict_for_prefetch(kept.union(rank)))
                if not (freed or self._give_up_behind(rank[page], rank, kept)):
                    break
                slots += self.table.stage_free((page,))
        chosen = pages[: len(slots)]
        if chosen:
            ticket = self.fetch("prefetch", chosen, slots, prefetch_issued=len(chosen))
            self.arriving.update(dict.fromkeys(chosen, ticket))
            self._evicted_for_prefetch.difference_update(chosen)

    def _give_up_behind(self, place: int, rank: Mapping[int, int], kept: Collection[int]) -> bool:
        """Free the slot of the page in `arriving` that ranks last, if that is behind this place; whether one was. Those
        that are not ranked come last, all alike."""
        unranked, spare = len(rank), self._spare(kept, only_arrived=self.paging.on_miss == "skip")
        least = max(spare, key=lambda page: rank.get(page, unranked), default=None)
        if least is None or rank.get(least, unranked) <= place:
            return False
        self._give_up(least)
        return True

    def _evict_for_prefetch(self, kept: Collection[int]) -> bool:
        if all(page in kept for page in self.table.resident):
            return False
        self._evicted_for_prefetch.add(self.table.evict(kept))
        self.count(evictions=1)
        return True

    def resolve(
        self, wanted: Sequence[int], pinned: set[int], look_ahead: LooksAhead | None, decodes: bool = False
    ) -> Iterable[dict[int, int]]:
        """Ask for pages.

        Args:
            wanted: page ids, each once.
            pinned: pages that stay resident whatever happens.
            look_ahead: called once, when every wanted page is there or on its way; None if nobody looks ahead.
            decodes: whether for a decode step, to which `on_miss` applies, and which layers may make in lockstep.

        Returns:
            Waves of `{page: slot}`, as in `Resolution`.
        """
        if self._unread_mass is not None:
            self._tell_policy()
        self._end_lease()
        as_set = self._as_set
        order = wanted if as_set else sorted(wanted)
        self.recorder.asked(self.layer_idx, self.lane, order, self.table.resident)
        if self._standing is not None and self._standing.stands(self.table) and self._standing.wanted == order:
            return self._answer_again(self._standing, look_ahead)
        self._standing = None
        may_be_there = as_set and len(order) <= len(self.table.resident)
        wave = self.table.slots_of_residents(order) if may_be_there else None
        if wave is not None:
            return self._answer_at_once(wave, order, pinned, look_ahead)
        skips = decodes and self.paging.on_miss == "skip"
        must_move = 0 if skips else max(0, len(order) - self.table.max_resident)
        shares = decodes and self._lockstep and not self.arriving
        if shares and (waves := self._lockstep.ask(self, order, pinned, must_move)):
            return waves
        self.own_table()
        asked = self.yardstick.asked(order, pinned, as_set)
        if not as_set:
            return self._one_by_one(order, pinned, asked, look_ahead, must_move)
        return Resolution(self, order, pinned, asked, look_ahead, must_move, skips=skips)

    def _answer_at_once(
        self, wave: dict[int, int], order: Sequence[int], pinned: set[int], look_ahead: LooksAhead | None
    ) -> Iterable[dict[int, int]]:
        """Answer a request whose pages are all resident, as a `Resolution` would."""
        self.own_table().touch(reversed(order))
        self.yardstick.asked(order, pinned, resident_first=True, hits=order)
        self.count(hits=len(order))
        self.looked_up(order, ())
        if len(order) == self.n_pages and self.yardstick.holds_all:  # selected pages are hardly ever the same again
            self._standing = StandingAnswer(order, self.table.n_changes, wave)
        if look_ahead is not None:
            look_ahead(order)
        return (wave,)

    def standing_answer(self) -> StandingAnswer | None:
        """The answer to the last request, if asking the same again would be answered with it."""
        return self._standing if self._standing is not None and self._standing.stands(self.table) else None

    def ask_again(self, look_ahead: LooksAhead | None) -> None:
        """Make the last request once more, where there is a `standing_answer`."""
        self.recorder.asked(self.layer_idx, self.lane, self._standing.wanted, self.table.resident)
        self._answer_again(self._standing, look_ahead)

    def _answer_again(self, standing: StandingAnswer, look_ahead: LooksAhead | None) -> Iterable[dict[int, int]]:
        """Answer the request of the step before, which finds everything where it was. Plain LRU keeps its order by it,
        and so does a policy that says so of its touches."""
        if not self._touches_are_idempotent:
            self.own_table().touch(reversed(standing.wanted))
        n = len(standing.wanted)
        self.count(hits=n, lru_hits=n, shadow_hits=n, shadow_slots_hits=n)
        if look_ahead is not None:
            look_ahead(standing.wanted)
        return (standing.wave,)

    def _one_by_one(
        self, order: Sequence[int], pinned: set[int], asked: Asked, look_ahead: LooksAhead | None, must_move: int
    ) -> Iterator[dict[int, int]]:
        """Naive paging: no page is asked for before the one before it has been attended."""
        request = pinned.union(order)
        for page in order[:-1]:
            yield from Resolution(self, [page], pinned, asked, request=request)
        whole = None if look_ahead is None else lambda _: look_ahead(order)
        yield from Resolution(self, order[-1:], pinned, asked, whole, must_move)

    def bring_in(
        self, chosen: torch.Tensor, ranked: torch.Tensor, part_tokens: int, names_pages: bool
    ) -> list[Stretch]:
        """Have the device find and fetch pages that it has chosen; together with those always resident they are what a
        decode step attends to.

        Args:
            chosen, ranked: as from `choose_on_device`.
            part_tokens, names_pages: as for `DeviceReads.read`.

        Raises:
            ValueError: there are more of them than slots.
        """
        pinned, n_choosable = self.pinned_pages(), self.n_pages - self.paging.recent_pages
        if self._on_device is None:
            self._on_device = DeviceReads(self.table, self.store, pinned, self.host_rows[:n_choosable])
        slots = {page: self.table.resident[page] for page in sorted(pinned)}
        stretches, was_there = self._on_device.read(
            chosen, self.host_rows, n_choosable, slots, part_tokens, names_pages
        )
        counts = partial(self._on_device.counts, self.yardstick, pinned, chosen, was_there, ranked)
        self.recorder.count_later(self.layer_idx, counts, self._on_device.kept_bytes(chosen))
        return stretches

    def _end_lease(self) -> None:
        """The host's table serves all pages again."""
        if self._on_device is not None:
            self._on_device.end()
            self._on_device = None

    def attended(self, pages: Sequence[int], mass: Callable[[], list[float]]) -> None:
        """Note each page's share of a decode step's attention, for a policy that goes by it. It is read when pages are
        asked for next, by when it has reached the host."""
        self._unread_mass = (pages, mass)

    def _tell_policy(self) -> None:
        (pages, mass), self._unread_mass = self._unread_mass, None
        self.table.policy.observe(dict(zip(pages, mass(), strict=True)))

    def fetched_for_later(self, pages: Sequence[int], ticket: Ticket) -> None:
        """A step does without these pages, whose copies it has asked for."""
        self._demanded.update(pages)
        self.arriving.update(dict.fromkeys(pages, ticket))

    def taken_up(self, page: int) -> bool:
        """A request asks for a page in `arriving`; whether that page was copied ahead."""
        ahead = page not in self._demanded
        self._demanded.discard(page)
        return ahead

    def give_up_one(self, kept: Collection[int], only_arrived: bool = False) -> bool:
        """Free the slot of the page that has been in `arriving` longest and is not in `kept`; whether there was one.

        Args:
            only_arrived: spare pages whose copy is under way. Who waits for no copy has to: else ever more of them
                would be asked for and given up, and none would arrive before its slot is given to another.
        """
        page = next(self._spare(kept, only_arrived), None)
        if page is None:
            return False
        self._give_up(page)
        return True

    def _spare(self, kept: Collection[int], only_arrived: bool) -> Iterator[int]:
        """The pages in `arriving` that may be given up, those that have been there longest first."""
        return (
            page for page, ticket in self.arriving.items() if page not in kept and (not only_arrived or ticket.done())
        )

    def _give_up(self, page: int) -> None:
        """Free the slot of a page in `arriving`. A copy under way is not stopped, which no bus can; the slot is only
        written to by what is asked for later, and so copied later."""
        self.table.unstage(page)
        del self.arriving[page]
        self.count(prefetch_wasted=self.taken_up(page))

    def looked_up(self, wanted: Collection[int], missing: Collection[int]) -> None:
        """A request for the wanted pages found some of them missing. Whether evicting a page for a prefetch was wrong
        is settled by the next request for it."""
        if self._evicted_for_prefetch:
            self.count(pollution=len(self._evicted_for_prefetch.intersection(missing)))
            self._evicted_for_prefetch.difference_update(wanted)

    def fetch(self, name: str, pages: Sequence[int], slots: Sequence[int], **counts: float) -> Ticket:
        """Start copying sealed pages into slots, as one transfer; `name` is what the timeline calls it, and `counts` go
        with it."""
        started = time.perf_counter()
        ticket = self.store.fetch([(slot, self.host_rows[page]) for page, slot in zip(pages, slots, strict=True)])
        self.count(h2d_pages=len(pages), copy_ms=1000.0 * (time.perf_counter() - started), **counts)
        self.recorder.copying(self.layer_idx, name, ticket, len(pages))
        return ticket
