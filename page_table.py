"""The page table: the one place that knows where each page of a layer of a sequence is.

A page is in one of three places:

    resident   in a device slot, counted against the budget, known to the replacement policy
    staged     in a device slot, its copy on the way or arrived, but not yet asked for or not yet attended
    absent     only in host memory

There are `max_resident + staging` slots. Residency is capped by `max_resident`; staging slots are what lets a copy be
under way while every budgeted page is in use. Slots are interchangeable: a staged page becomes resident where it lies,
and the slot of the page evicted for it becomes free. So nothing is ever moved within the device.

Eviction drops a slot and copies nothing: a page is written to the host once, when it fills, and never changes again.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Sequence
from heapq import heappop, heappush

from page_policies import NothingToEvict, ReplacementPolicy


class PageTable:
    """Where the pages of one layer of one sequence are.

    Args:
        max_resident: most pages that may be resident at a time.
        staging: slots on top of that.
        policy: picks the page to evict; owned by this table.
        first_slot: number of this table's first slot in the device pool.

    Attributes:
        n_lent: slots that others use for now; residency is capped by so many less.
        n_changes: how often a page has come, gone or changed its place. While it stays the same, so does where all are.
    """

    def __init__(self, max_resident: int, staging: int, policy: ReplacementPolicy, first_slot: int = 0):
        if max_resident < 1 or staging < 1:
            raise ValueError(
                f"a page table needs 1 resident and 1 staging page at least, not {max_resident}, {staging}"
            )
        self.max_resident, self.staging, self.first_slot = max_resident, staging, first_slot
        self.policy = policy
        self.n_changes = self.n_lent = 0
        self.resident: dict[int, int] = {}
        self.staged: dict[int, int] = {}
        # A heap, as the lowest free slot is taken first: so pages keep together, and pages that are taken in ascending
        # order lie in it, which makes one copy of them, and one stretch for attention to read.
        self.free_slots = list(range(first_slot, first_slot + max_resident + staging))

    def slot(self, page: int) -> int | None:
        """The device slot of a resident or staged page, or None."""
        found = self.resident.get(page)
        return self.staged.get(page) if found is None else found

    def slots_of_residents(self, pages: Iterable[int]) -> dict[int, int] | None:
        """The device slots of pages, by page; None if not all of them are resident."""
        resident = self.resident
        try:
            return {page: resident[page] for page in pages}
        except KeyError:
            return None

    @property
    def makes_room(self) -> bool:
        """Whether a page more has a slot, or an eviction that is due with it frees one."""
        return bool(self.free_slots) or self._is_full

    @property
    def _is_full(self) -> bool:
        return len(self.resident) >= self.max_resident - self.n_lent

    def can_stage(self, pinned: Collection[int]) -> bool:
        """Whether `stage` would find a slot, by eviction if need be."""
        return bool(self.free_slots) or any(page not in pinned for page in self.resident)

    def stage(self, page: int, pinned: Collection[int]) -> tuple[int, int | None]:
        """Take a slot for an absent page whose copy is about to start.

        Returns:
            The slot, and the page evicted to free it (None if a slot was free).

        Raises:
            NothingToEvict: no slot is free and every resident page is pinned.
        """
        self._require_absent(page)
        evicted = None if self.free_slots else self.evict(pinned)
        return self.stage_free((page,))[0], evicted

    def stage_free(self, pages: Sequence[int]) -> list[int]:
        """Take slots for absent pages whose copies are about to start, as far as some are free; returns those of the
        first pages."""
        staged, free_slots, slots = self.staged, self.free_slots, []
        for page in pages[: len(free_slots)]:
            self._require_absent(page)
            slots.append(heappop(free_slots))
            staged[page] = slots[-1]
        self.n_changes += len(slots)
        return slots

    def admit(self, pages: Iterable[int], pinned: Collection[int]) -> int:
        """Make those of the pages resident that are staged, one after the other; returns how many pages were evicted
        to stay within the budget."""
        staged, resident, insert = self.staged, self.resident, self.policy.insert
        most, evicted = self.max_resident - self.n_lent, 0
        self.n_changes += 1
        for page in pages:
            if page in staged:
                if len(resident) >= most:
                    self.evict(pinned)
                    evicted += 1
                resident[page] = staged.pop(page)
                insert(page)
        return evicted

    def open(self, page: int, pinned: Collection[int]) -> tuple[int, int | None]:
        """Make an absent page resident at once, to be written by computation; returns its slot and the page evicted."""
        self._require_absent(page)
        self.n_changes += 1
        must_evict = self._is_full or not self.free_slots
        evicted = self.evict(pinned) if must_evict else None
        self.resident[page] = heappop(self.free_slots)
        self.policy.insert(page)
        return self.resident[page], evicted

    def touch(self, pages: Iterable[int]) -> None:
        """Tell the policy that resident pages were asked for, one after the other."""
        touch = self.policy.touch
        for page in pages:
            touch(page)

    def evict(self, pinned: Collection[int]) -> int:
        """Drop the policy's victim and free its slot; returns the page. Raises NothingToEvict if all are pinned."""
        page, slot = self._drop(pinned)
        heappush(self.free_slots, slot)
        return page

    def _drop(self, pinned: Collection[int]) -> tuple[int, int]:
        """The policy's victim, resident no more, and the slot it lay in."""
        page = self.policy.victim(pinned)
        if page in pinned or page not in self.resident:
            raise RuntimeError(f"{type(self.policy).__name__} chose page {page}, which is pinned or not resident")
        self.n_changes += 1
        self.policy.remove(page)
        return page, self.resident.pop(page)

    def unstage(self, page: int) -> None:
        """Give up a staged page and free its slot."""
        self.n_changes += 1
        heappush(self.free_slots, self.staged.pop(page))

    def lend(self, n_slots: int, kept: Collection[int]) -> dict[int, int | None]:
        """Hand out slots, with the pages that lie in them, which are resident no more; None for a slot without one.
        Slots of `kept` pages are not handed out. Raises NothingToEvict where there are not as many slots."""
        lent: dict[int, int | None] = {}
        while len(lent) < n_slots and self.resident.keys() - kept:
            page, slot = self._drop(kept)
            lent[slot] = page
        while len(lent) < n_slots:
            if not self.free_slots:
                raise NothingToEvict(f"there are no {n_slots} slots to lend")
            lent[heappop(self.free_slots)] = None
        self.n_lent += n_slots
        return lent

    def take_back(self, slots: Collection[int]) -> None:
        """Slots that were lent are free again."""
        self.n_changes += 1
        self.n_lent -= len(slots)
        for slot in slots:
            heappush(self.free_slots, slot)

    def truncate(self, n_pages: int) -> None:
        """Forget the resident pages from number `n_pages` on; their slots are free again."""
        self.n_changes += 1
        for page in [page for page in self.resident if page >= n_pages]:
            self.policy.remove(page)
            heappush(self.free_slots, self.resident.pop(page))
        if hasattr(self.policy, "truncate"):
            self.policy.truncate(n_pages)

    def clear(self) -> None:
        """Forget every page; all slots are free again."""
        self.truncate(0)
        for page in list(self.staged):
            self.unstage(page)

    def is_like(self, other: PageTable) -> bool:
        """Whether another table has the same pages in the same slots, none of them staged, under a policy that knows
        the same: then the same requests make the same of both. For policies that can be compared."""
        return (
            not (self.staged or other.staged or self.n_lent or other.n_lent)
            and (self.first_slot, self.max_resident, self.staging)
            == (other.first_slot, other.max_resident, other.staging)
            and self.resident == other.resident
            and self.policy == other.policy
        )

    def fork(self, first_slot: int) -> PageTable:
        """The same resident pages in the slots from `first_slot` on, under a policy that knows what this one knows.
        Staged pages are left out: their copies are on the way to this table's slots."""
        other = PageTable(self.max_resident, self.staging, copy.deepcopy(self.policy), first_slot)
        shift = first_slot - self.first_slot
        other.n_changes = self.n_changes
        other.resident = {page: slot + shift for page, slot in self.resident.items()}
        taken = set(other.resident.values())
        other.free_slots = [slot for slot in other.free_slots if slot not in taken]
        return other

    def _require_absent(self, page: int) -> None:
        if page in self.resident or page in self.staged:
            raise RuntimeError(f"page {page} is on the device already")


__all__ = ["NothingToEvict", "PageTable"]
