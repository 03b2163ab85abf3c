"""The shadow counts what a plain LRU would have hit, and never evicts a pinned page."""

from __future__ import annotations

from collections.abc import Collection

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from test_page_policies import n_hits

from registry import POLICIES
from shadow_lru import ShadowLRU

PAGES = st.integers(0, 9)
REQUESTS = st.lists(PAGES, unique=True, max_size=10)
PINNED = st.sets(PAGES)


class NaiveLRU:
    """A list of pages, the least recently used one first."""

    def __init__(self, capacity: int):
        self.capacity, self.pages = capacity, []

    def access(self, page: int, pinned: Collection[int]) -> bool:
        """Whether it was a hit."""
        if page in self.pages:
            self.pages.remove(page)
            self.pages.append(page)
            return True
        if len(self.pages) == self.capacity:
            evictable = [other for other in self.pages if other not in pinned]
            if not evictable:
                return False
            self.pages.remove(evictable[0])
        self.pages.append(page)
        return False

    def ask(self, pages: list[int], pinned: Collection[int], resident_first: bool) -> int:
        if resident_first:
            kept = tuple(self.pages)
            pages = [page for page in pages[::-1] if page in kept] + [page for page in pages if page not in kept]
        return sum(self.access(page, pinned) for page in pages)


class ShadowAgainstList(RuleBasedStateMachine):
    @initialize(capacity=st.integers(1, 6))
    def make(self, capacity):
        self.shadow, self.model = ShadowLRU(capacity), NaiveLRU(capacity)

    @rule(pages=REQUESTS, pinned=PINNED, resident_first=st.booleans())
    def ask(self, pages, pinned, resident_first):
        expected = self.model.ask(pages, pinned, resident_first)
        assert len(self.shadow.ask(pages, pinned, resident_first)) == expected

    @rule(page=PAGES, pinned=PINNED)
    def insert(self, page, pinned):
        self.shadow.insert(page, pinned)
        self.model.access(page, pinned)

    @rule(n_pages=st.integers(0, 10))
    def truncate(self, n_pages):
        self.shadow.truncate(n_pages)
        self.model.pages = [page for page in self.model.pages if page < n_pages]

    @rule()
    def clear(self):
        self.shadow.truncate(0)
        self.model.pages = []

    @rule(pages=REQUESTS)
    def go_on_with_a_copy(self, pages):
        left_behind, self.shadow = self.shadow, self.shadow.copy()
        left_behind.ask(pages, ())

    @invariant()
    def what_is_kept_shows_in_hits(self):
        if hasattr(self, "shadow"):
            assert [page for page in range(10) if self.shadow.copy().ask([page], ())] == sorted(self.model.pages)


test_the_shadow_hits_and_keeps_what_a_list_of_pages_does = ShadowAgainstList.TestCase


@given(accesses=st.lists(PAGES, max_size=60), capacity=st.integers(1, 6))
def test_page_by_page_the_shadow_hits_what_the_lru_policy_does(accesses, capacity):
    shadow = ShadowLRU(capacity)
    assert sum(len(shadow.ask([page], ())) for page in accesses) == n_hits(POLICIES.create("lru"), accesses, capacity)


def test_a_scan_asked_for_as_a_set_hits_all_that_fits_and_page_by_page_nothing():
    scan = list(range(8))
    for resident_first, hits in ((True, 5), (False, 0)):
        shadow = ShadowLRU(5)
        assert len(shadow.ask(scan, (), resident_first)) == 0
        assert [len(shadow.ask(scan, (), resident_first)) for _ in range(3)] == [hits] * 3


def test_pages_of_a_request_may_be_evicted_for_its_missing_ones():
    """2 goes for 3, as it was asked for after 1, which so counts as the more recently used."""
    shadow = ShadowLRU(2)
    shadow.ask([1, 2], ())
    assert len(shadow.ask([1, 2, 3], ())) == 2
    assert len(shadow.copy().ask([2], ())) == 0
    assert len(shadow.ask([1, 3], ())) == 2


@pytest.mark.parametrize("best", [[1, 2, 3], [3, 1, 2], [2, 3, 1]])
def test_of_hits_the_most_wanted_are_kept_longest_and_of_misses_the_least_wanted(best):
    """Hits are touched last to first, so the next three requests evict them in that order; misses come in as they are
    asked for."""
    shadow = ShadowLRU(3)
    shadow.ask([1, 2, 3], ())
    shadow.ask(best, ())
    for page, gone in zip([4, 5, 6], best[::-1], strict=True):
        shadow.ask([page], ())
        assert shadow.copy().ask([gone], ()) == set()
    assert shadow.ask([7, 8, 4, 5, 6], {4, 5, 6}) == {4, 5, 6}  # for 7 and 8 there is no room
    shadow.truncate(0)
    shadow.ask(best, ())
    shadow.ask([4], ())
    assert shadow.ask(best, {1, 2, 3}) == set(best[1:])


def test_a_page_for_which_there_is_no_room_is_not_kept():
    shadow = ShadowLRU(2)
    shadow.ask([1, 2], ())
    assert len(shadow.ask([3], {1, 2})) == 0
    assert len(shadow.ask([1, 2, 3], ())) == 2


def test_a_page_opened_by_computation_is_the_most_recent_and_no_access():
    shadow = ShadowLRU(2)
    shadow.insert(1, ())
    shadow.insert(2, ())
    shadow.insert(1, ())
    shadow.insert(3, ())
    assert len(shadow.ask([1, 2, 3], ())) == 2
    assert len(shadow.ask([2], ())) == 1


@pytest.mark.parametrize("capacity", [0, -1])
def test_a_cache_without_room_is_refused(capacity):
    with pytest.raises(ValueError, match="room for 1 page at least"):
        ShadowLRU(capacity)
