"""The page table keeps every page and every slot in exactly one place, whatever is done to it."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from test_page_policies import NAMES, NaivePolicy

from page_table import NothingToEvict, PageTable
from registry import POLICIES

PAGES = st.integers(0, 8)
PINNED = st.sets(PAGES)


class TableAgainstModel(RuleBasedStateMachine):
    """The model: a place for each page that is on the device, a set of free slots, and the naive policy."""

    @initialize(
        name=st.sampled_from(NAMES), max_resident=st.integers(1, 4), staging=st.integers(1, 3), first=st.integers(0, 20)
    )
    def make(self, name, max_resident, staging, first):
        self.table = PageTable(max_resident, staging, POLICIES.create(name), first_slot=first)
        self.policy = NaivePolicy(name)
        self.max_resident = max_resident
        self.all_slots = set(range(first, first + max_resident + staging))
        self.free = set(self.all_slots)
        self.resident: dict[int, int] = {}
        self.staged: dict[int, int] = {}

    def expect_eviction(self, pinned) -> int | None:
        """Evict from the model; None if it cannot."""
        page = self.policy.victim(pinned)
        if page is not None:
            self.policy.remove(page)
            self.free.add(self.resident.pop(page))
        return page

    def expect_refusal(self, act) -> None:
        with pytest.raises(NothingToEvict):
            act()

    @rule(page=PAGES, pinned=PINNED)
    def stage(self, page, pinned):
        if page in self.resident or page in self.staged:
            with pytest.raises(RuntimeError, match="on the device already"):
                self.table.stage(page, pinned)
            return
        assert self.table.can_stage(pinned) == (bool(self.free) or self.policy.victim(pinned) is not None)
        expected = None
        if not self.free and (expected := self.expect_eviction(pinned)) is None:
            self.expect_refusal(lambda: self.table.stage(page, pinned))
            return
        slot, evicted = self.table.stage(page, pinned)
        assert evicted == expected
        self.free.remove(slot)
        self.staged[page] = slot

    @rule(pages=st.lists(PAGES, unique=True))
    def stage_free(self, pages):
        absent = [page for page in pages if page not in self.resident and page not in self.staged]
        slots = self.table.stage_free(absent)
        assert slots == sorted(self.free)[: len(absent)]  # the lowest free slot first, as far as there are any
        self.free -= set(slots)
        self.staged |= dict(zip(absent, slots, strict=False))

    @precondition(lambda self: self.staged)
    @rule(pages=st.lists(PAGES, unique=True), pinned=PINNED)
    def admit(self, pages, pinned):
        """Those of them that are staged, one after the other; it stops where one finds no room."""
        n_evicted = 0
        for page in [page for page in pages if page in self.staged]:
            if len(self.resident) == self.max_resident:
                if self.expect_eviction(pinned) is None:
                    self.expect_refusal(lambda: self.table.admit(pages, pinned))
                    return
                n_evicted += 1
            self.resident[page] = self.staged.pop(page)  # where it lies: no slot changes
            self.policy.insert(page)
        assert self.table.admit(pages, pinned) == n_evicted

    @rule(page=PAGES, pinned=PINNED)
    def open(self, page, pinned):
        if page in self.resident or page in self.staged:
            with pytest.raises(RuntimeError, match="on the device already"):
                self.table.open(page, pinned)
            return
        expected = None
        full = len(self.resident) == self.max_resident or not self.free
        if full and (expected := self.expect_eviction(pinned)) is None:
            self.expect_refusal(lambda: self.table.open(page, pinned))
            return
        slot, evicted = self.table.open(page, pinned)
        assert evicted == expected
        self.free.remove(slot)
        self.resident[page] = slot
        self.policy.insert(page)

    @rule(pinned=PINNED)
    def evict(self, pinned):
        expected = self.expect_eviction(pinned)
        if expected is None:
            self.expect_refusal(lambda: self.table.evict(pinned))
        else:
            assert self.table.evict(pinned) == expected

    @precondition(lambda self: self.staged)
    @rule(data=st.data())
    def unstage(self, data):
        page = data.draw(st.sampled_from(sorted(self.staged)))
        self.table.unstage(page)
        self.free.add(self.staged.pop(page))

    @precondition(lambda self: self.resident)
    @rule(data=st.data())
    def touch(self, data):
        page = data.draw(st.sampled_from(sorted(self.resident)))
        self.table.touch([page])
        self.policy.touch(page)

    @precondition(lambda self: len(self.resident) + len(self.staged) > 2)
    @rule()
    def clear(self):
        self.table.clear()
        for page in self.resident:
            self.policy.remove(page)
        self.free = set(self.all_slots)
        self.resident.clear()
        self.staged.clear()

    @invariant()
    def pages_are_where_the_model_has_them(self):
        assert self.table.resident == self.resident
        assert self.table.staged == self.staged
        for page in range(9):
            assert self.table.slot(page) == {**self.resident, **self.staged}.get(page)

    @invariant()
    def no_more_is_resident_than_the_budget_allows(self):
        assert len(self.table.resident) <= self.max_resident

    @invariant()
    def every_slot_is_in_exactly_one_place(self):
        places = [*self.table.free_slots, *self.table.resident.values(), *self.table.staged.values()]
        assert sorted(places) == sorted(self.all_slots)

    @invariant()
    def no_page_is_in_two_places(self):
        assert not self.table.resident.keys() & self.table.staged.keys()


TestTableAgainstModel = TableAgainstModel.TestCase
TestTableAgainstModel.settings = settings(max_examples=150, stateful_step_count=40)


class Hostile:
    """A policy that names whatever page it was told to."""

    def __init__(self, choice: int):
        self.choice = choice

    def insert(self, page: int) -> None: ...
    def touch(self, page: int) -> None: ...
    def remove(self, page: int) -> None: ...

    def victim(self, pinned) -> int:
        return self.choice


@pytest.mark.parametrize(("choice", "why"), [(1, "pinned"), (99, "not resident"), (3, "staged only")])
@pytest.mark.parametrize("verb", ["evict", "open", "stage", "admit"])
def test_a_policy_that_names_a_page_it_may_not_is_refused_and_nothing_changes(choice, why, verb):
    table = PageTable(2, 1, Hostile(choice))
    table.open(1, ())
    table.open(2, ())
    table.stage(3, ())

    def places():
        return dict(table.resident), dict(table.staged), list(table.free_slots)

    before = places()
    act = {
        "evict": lambda: table.evict({1}),
        "open": lambda: table.open(4, {1}),
        "stage": lambda: table.stage(4, {1}),
        "admit": lambda: table.admit((3,), {1}),
    }[verb]
    with pytest.raises(RuntimeError, match=f"Hostile chose page {choice}, which is pinned or not resident"):
        act()
    assert places() == before


@pytest.mark.parametrize(("max_resident", "staging"), [(0, 1), (1, 0), (-1, 1)])
def test_a_table_too_small_to_move_a_page_is_refused_with_the_numbers(max_resident, staging):
    with pytest.raises(ValueError, match=f"not {max_resident}, {staging}"):
        PageTable(max_resident, staging, POLICIES.create("lru"))


def test_a_cleared_table_serves_every_slot_again():
    table = PageTable(2, 1, POLICIES.create("lru"), first_slot=5)
    for round_of_use in range(3):
        first = 10 * round_of_use
        slots = [table.open(first, ())[0], table.open(first + 1, ())[0], table.stage(first + 2, ())[0]]
        assert sorted(slots) == [5, 6, 7]
        table.clear()


def test_the_lowest_free_slot_is_used_first_so_that_pages_keep_together():
    table = PageTable(3, 2, POLICIES.create("lru"))
    slots = {page: table.open(page, ())[0] for page in (1, 2, 3)}
    assert table.stage(4, ())[0] == 3
    table.evict({1, 3})
    table.evict({3})
    table.unstage(4)
    assert [table.stage(page, ())[0] for page in (5, 6, 7, 8)] == [slots[1], slots[2], 3, 4]


def test_a_staged_page_is_never_evicted():
    table = PageTable(1, 2, POLICIES.create("lru"))
    for page in (1, 2, 3):
        table.stage(page, ())
    assert not table.can_stage(())
    with pytest.raises(NothingToEvict):
        table.stage(4, ())
    assert set(table.staged) == {1, 2, 3}
