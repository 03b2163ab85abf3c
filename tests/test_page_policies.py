"""Each replacement policy evicts the page that its name promises, and never a pinned one."""

from __future__ import annotations

from collections.abc import Collection

import pytest
from hypothesis import given
from hypothesis import strategies as st

from page_policies import NothingToEvict
from registry import POLICIES

NAMES = ("lru", "mru", "fifo")
PAGES = st.integers(0, 5)


class NaivePolicy:
    """What each policy means, from the times of every page's arrival and last use."""

    def __init__(self, name: str):
        self.name, self.clock = name, 0
        self.arrived: dict[int, int] = {}
        self.used: dict[int, int] = {}

    def insert(self, page: int) -> None:
        self.clock += 1
        self.arrived[page] = self.used[page] = self.clock

    def touch(self, page: int) -> None:
        self.clock += 1
        self.used[page] = self.clock

    def remove(self, page: int) -> None:
        del self.arrived[page], self.used[page]

    def victim(self, pinned: Collection[int]) -> int | None:
        """The page to evict; None if all are pinned."""
        candidates = [page for page in self.arrived if page not in pinned]
        if self.name == "fifo":
            return min(candidates, key=self.arrived.__getitem__, default=None)
        choose = min if self.name == "lru" else max
        return choose(candidates, key=self.used.__getitem__, default=None)


def n_hits(policy, accesses: list[int], capacity: int) -> int:
    """Hits of a cache of `capacity` pages under `policy`."""
    resident: set[int] = set()
    hits = 0
    for page in accesses:
        if page in resident:
            hits += 1
            policy.touch(page)
            continue
        if len(resident) == capacity:
            evicted = policy.victim(())
            policy.remove(evicted)
            resident.remove(evicted)
        resident.add(page)
        policy.insert(page)
    return hits


def belady_hits(accesses: list[int], capacity: int) -> int:
    """The most hits any policy can have: evict the page whose next use is farthest away (Belady 1966)."""
    resident: set[int] = set()
    hits = 0
    for now, page in enumerate(accesses):
        if page in resident:
            hits += 1
            continue
        if len(resident) == capacity:
            future = accesses[now:]
            resident.remove(max(resident, key=lambda p, f=future: f.index(p) if p in f else len(f)))
        resident.add(page)
    return hits


@pytest.mark.parametrize("name", NAMES)
@given(events=st.lists(st.tuples(st.sampled_from(["use", "use", "victim", "remove"]), PAGES, st.sets(PAGES))))
def test_the_victim_is_the_one_the_name_promises(name, events):
    policy, naive = POLICIES.create(name), NaivePolicy(name)
    for verb, page, pinned in events:
        if verb == "victim":
            expected = naive.victim(pinned)
            if expected is None:
                with pytest.raises(NothingToEvict):
                    policy.victim(pinned)
            else:
                assert policy.victim(pinned) == expected
        elif verb == "use":
            verb = "touch" if page in naive.arrived else "insert"
            getattr(policy, verb)(page)
            getattr(naive, verb)(page)
        elif page in naive.arrived:
            policy.remove(page)
            naive.remove(page)


@pytest.mark.parametrize("name", NAMES)
@given(resident=st.sets(PAGES, min_size=1), pinned=st.sets(PAGES))
def test_a_pinned_page_is_never_the_victim(name, resident, pinned):
    policy = POLICIES.create(name)
    for page in resident:
        policy.insert(page)
    if resident <= pinned:
        with pytest.raises(NothingToEvict, match="pinned"):
            policy.victim(pinned)
    else:
        assert policy.victim(pinned) in resident - pinned


@pytest.mark.parametrize("name", NAMES)
def test_naming_a_victim_removes_nothing(name):
    policy = POLICIES.create(name)
    for page in (3, 1, 2):
        policy.insert(page)
    assert policy.victim(()) == policy.victim(())


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_policy_has_nothing_to_evict(name):
    with pytest.raises(NothingToEvict):
        POLICIES.create(name).victim(())


@pytest.mark.parametrize("name", NAMES)
def test_two_instances_share_nothing(name):
    one, other = POLICIES.create(name), POLICIES.create(name)
    one.insert(1)
    with pytest.raises(NothingToEvict):
        other.victim(())


@pytest.mark.parametrize("name", NAMES)
@given(accesses=st.lists(PAGES, max_size=40), capacity=st.integers(1, 5))
def test_no_policy_beats_the_one_that_knows_the_future(name, accesses, capacity):
    assert n_hits(POLICIES.create(name), accesses, capacity) <= belady_hits(accesses, capacity)


@given(n_pages=st.integers(3, 9), turns=st.integers(2, 6), missing=st.integers(1, 4))
def test_a_scan_round_and_round_more_pages_than_fit_never_hits_under_lru_and_is_optimal_under_mru(
    n_pages, turns, missing
):
    capacity = max(1, n_pages - missing)
    scan = list(range(n_pages)) * turns
    assert n_hits(POLICIES.create("lru"), scan, capacity) == 0
    assert n_hits(POLICIES.create("mru"), scan, capacity) == belady_hits(scan, capacity)


def test_fifo_does_not_care_how_often_a_page_is_used_and_lru_does():
    evicted = {}
    for name in ("fifo", "lru"):
        policy = POLICIES.create(name)
        policy.insert(1)
        policy.insert(2)
        policy.touch(1)
        evicted[name] = policy.victim(())
    assert evicted == {"fifo": 1, "lru": 2}


@given(accesses=st.lists(PAGES, max_size=40), capacity=st.integers(1, 5))
def test_a_larger_lru_cache_hits_whatever_a_smaller_one_does(accesses, capacity):
    smaller, larger = (n_hits(POLICIES.create("lru"), accesses, size) for size in (capacity, capacity + 1))
    assert smaller <= larger
