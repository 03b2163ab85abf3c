"""Each replacement policy evicts the page that its name promises, and never a pinned one."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from page_policies import LRU, NothingToEvict
from page_table import PageTable
from registry import POLICIES

# Those that can be modelled by the times and number of a page's uses, so that asking for a victim changes nothing.
NAMES = ("lru", "mru", "fifo", "lfu")
ALL_NAMES = tuple(POLICIES)
PAGES = st.integers(0, 5)


class NaivePolicy:
    """What each policy means, from the times of every page's arrival and last use, and the number of its uses."""

    def __init__(self, name: str):
        self.name, self.clock = name, 0
        self.arrived: dict[int, int] = {}
        self.used: dict[int, int] = {}
        self.uses: dict[int, int] = {}

    def insert(self, page: int) -> None:
        self.clock += 1
        self.arrived[page] = self.used[page] = self.clock
        self.uses[page] = 1

    def touch(self, page: int) -> None:
        self.clock += 1
        self.used[page] = self.clock
        self.uses[page] += 1

    def remove(self, page: int) -> None:
        del self.arrived[page], self.used[page], self.uses[page]

    def victim(self, pinned: Collection[int]) -> int | None:
        """The page to evict; None if all are pinned."""
        candidates = [page for page in self.arrived if page not in pinned]
        if self.name == "fifo":
            return min(candidates, key=self.arrived.__getitem__, default=None)
        if self.name == "lfu":
            ranked = sorted((self.uses[page], self.used[page], page) for page in candidates)
            return ranked[0][2] if ranked else None
        choose = min if self.name == "lru" else max
        return choose(candidates, key=self.used.__getitem__, default=None)


class NaiveClock:
    """A circle of [page, reference bit], and the number of the place that the hand points to."""

    def __init__(self):
        self.circle: list[list] = []
        self.hand = 0

    def insert(self, page: int) -> None:
        self.circle.insert(self.hand, [page, False])
        self.hand = (self.hand + 1) % len(self.circle)

    def touch(self, page: int) -> None:
        self.circle[self.place(page)][1] = True

    def remove(self, page: int) -> None:
        place = self.place(page)
        del self.circle[place]
        if place < self.hand:
            self.hand -= 1
        if self.hand == len(self.circle):
            self.hand = 0

    def victim(self, pinned: Collection[int]) -> int | None:
        for _ in range(2 * len(self.circle)):  # the second time round, no bit of an unpinned page is set
            page, referenced = self.circle[self.hand]
            if page not in pinned and not referenced:
                return page
            if page not in pinned:
                self.circle[self.hand][1] = False
            self.hand = (self.hand + 1) % len(self.circle)
        return None

    def place(self, page: int) -> int:
        return [page for page, _ in self.circle].index(page)


class NaiveS3FIFO:
    """Algorithm 1 of the paper on plain lists, heads first; with pins, and one page evicted at a time."""

    def __init__(self, small_fraction: float = 0.1):
        self.small_fraction = small_fraction
        self.small: list[int] = []
        self.main: list[int] = []
        self.ghost: list[int] = []
        self.freq: dict[int, int] = {}
        self.last_victim: int | None = None

    def sizes(self) -> tuple[int, int]:
        """Of the small and of the main queue."""
        capacity = len(self.small) + len(self.main)
        small = max(1, round(self.small_fraction * capacity))
        return small, capacity - small

    def insert(self, page: int) -> None:
        if page in self.ghost:
            self.ghost.remove(page)
            self.main.insert(0, page)
        else:
            self.small.insert(0, page)
        self.freq[page] = 0

    def touch(self, page: int) -> None:
        self.freq[page] = min(self.freq[page] + 1, 3)

    def victim(self, pinned: Collection[int]) -> int | None:
        if not set(self.small + self.main) - set(pinned):
            return None
        self.last_victim = self.evict(pinned)
        return self.last_victim

    def evict(self, pinned: Collection[int]) -> int:
        """The same choice again after every move: the small queue if it is as long as its share, else the main one."""
        small_size, _ = self.sizes()
        may_leave_main = [page for page in self.main if page not in pinned]
        from_small = [page for page in self.small if page not in pinned or self.freq[page] > 1]
        if from_small and (len(self.small) >= small_size or not may_leave_main):
            tail = from_small[-1]
            if self.freq[tail] <= 1:
                return tail
            self.small.remove(tail)
            self.main.insert(0, tail)
            self.freq[tail] = 0
        else:
            tail = may_leave_main[-1]
            if self.freq[tail] == 0:
                return tail
            self.main.remove(tail)
            self.main.insert(0, tail)
            self.freq[tail] -= 1
        return self.evict(pinned)

    def remove(self, page: int) -> None:
        evicted = page == self.last_victim
        _, ghost_size = self.sizes()
        if page in self.main:
            self.main.remove(page)
        else:
            self.small.remove(page)
            if evicted:
                self.ghost = [page, *self.ghost][:ghost_size]
        if not evicted and not self.small + self.main:
            self.ghost = []
        self.last_victim = None


class NaiveAttention:
    """Every page's shares of attention so far, smoothed from the first on whenever a victim is asked for."""

    def __init__(self, smoothing: float = 0.9):
        self.smoothing = smoothing
        self.by_last_use: list[int] = []
        self.shares: dict[int, list[float]] = {}
        self.last_victim: int | None = None

    def insert(self, page: int) -> None:
        self.by_last_use.append(page)

    def touch(self, page: int) -> None:
        self.by_last_use.remove(page)
        self.by_last_use.append(page)

    def observe(self, masses: Mapping[int, float]) -> None:
        for page in {*self.by_last_use, *masses}:
            self.shares.setdefault(page, []).append(masses.get(page, 0.0))

    def mass(self, page: int) -> float:
        if page not in self.shares:
            return math.inf
        smoothed, *later = self.shares[page]
        for share in later:
            smoothed = self.smoothing * smoothed + (1 - self.smoothing) * share
        return smoothed

    def victim(self, pinned: Collection[int]) -> int | None:
        ranked = sorted((self.mass(page), i, page) for i, page in enumerate(self.by_last_use) if page not in pinned)
        self.last_victim = ranked[0][2] if ranked else self.last_victim
        return ranked[0][2] if ranked else None

    def remove(self, page: int) -> None:
        self.by_last_use.remove(page)
        if page != self.last_victim:
            self.shares = {p: shares for p, shares in self.shares.items() if p != page and self.by_last_use}
        self.last_victim = None


def naive(name: str, **parameters):
    """The model of a policy."""
    models = {"clock": NaiveClock, "s3fifo": NaiveS3FIFO, "attention": NaiveAttention}
    return models[name](**parameters) if name in models else NaivePolicy(name, **parameters)


# Smoothing with halves and quarters of eighths is exact in floats, so model and policy agree on what is equal.
PARAMETERS = {
    "s3fifo": st.fixed_dictionaries({"small_fraction": st.sampled_from([0.1, 0.3, 0.6])}),
    "attention": st.fixed_dictionaries({"smoothing": st.sampled_from([0.0, 0.5, 0.75])}),
}
MANY_PAGES = st.integers(0, 11)
FEW = st.sets(MANY_PAGES, max_size=4)
PINNED = FEW | FEW.map(lambda unpinned: {*range(12)} - unpinned)  # nearly all pinned is where a policy may not return


class PolicyAgainstModel(RuleBasedStateMachine):
    """Pages come, are used, evicted and dropped, and policy and model name the same victim each time."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    @initialize(data=st.data())
    def make(self, data):
        parameters = data.draw(PARAMETERS.get(self.name, st.just({})))
        self.policy, self.model = POLICIES.create({"name": self.name, **parameters}), naive(self.name, **parameters)
        self.resident: set[int] = set()

    def both(self, verb: str, page: int) -> None:
        getattr(self.policy, verb)(page)
        getattr(self.model, verb)(page)

    @rule(pages=st.lists(MANY_PAGES, min_size=1, max_size=6))
    def use(self, pages):
        for page in pages:
            self.both("touch" if page in self.resident else "insert", page)
            self.resident.add(page)

    def victim(self, pinned: set[int]) -> int | None:
        """What both name; None if all are pinned."""
        expected = self.model.victim(pinned)
        if expected is None:
            assert self.resident <= pinned
            with pytest.raises(NothingToEvict, match="pinned"):
                self.policy.victim(pinned)
        else:
            assert self.policy.victim(pinned) == expected
            assert expected in self.resident - pinned
        return expected

    @rule(pinned=PINNED)
    def name_a_victim(self, pinned):
        self.victim(pinned)

    @rule(pinned=PINNED)
    def evict(self, pinned):
        page = self.victim(pinned)
        if page is not None:
            self.both("remove", page)
            self.resident.remove(page)

    @precondition(lambda self: self.resident)
    @rule(data=st.data())
    def drop(self, data):
        page = data.draw(st.sampled_from(sorted(self.resident)))
        self.both("remove", page)
        self.resident.remove(page)

    @rule()
    def drop_all(self):
        for page in sorted(self.resident):
            self.both("remove", page)
        self.resident.clear()

    @precondition(lambda self: getattr(self.policy, "needs_mass", False))
    @rule(eighths=st.dictionaries(MANY_PAGES, st.integers(0, 8)))
    def observe(self, eighths):
        masses = {page: count / 8 for page, count in eighths.items()}
        self.policy.observe(masses)
        self.model.observe(masses)

    def teardown(self):
        while getattr(self, "resident", None):
            self.evict(set())


def evict(policy, pinned: Collection[int] = ()) -> int:
    page = policy.victim(pinned)
    policy.remove(page)
    return page


def n_hits(policy, accesses: list[int], capacity: int) -> int:
    """Hits of a cache of `capacity` pages under `policy`."""
    resident: set[int] = set()
    hits = 0
    for page in accesses:
        if page in resident:
            hits += 1
            policy.touch(page)
        else:
            if len(resident) == capacity:
                resident.remove(evict(policy))
            resident.add(page)
            policy.insert(page)
        if getattr(policy, "needs_mass", False):
            policy.observe({page: 1.0})
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


@pytest.mark.parametrize("name", ALL_NAMES)
def test_the_victim_is_the_one_the_name_promises(name):
    run_state_machine_as_test(lambda: PolicyAgainstModel(name), settings=settings(stateful_step_count=40))


@pytest.mark.parametrize("name", ALL_NAMES)
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


@pytest.mark.parametrize("name", ALL_NAMES)
def test_naming_a_victim_removes_nothing(name):
    policy = POLICIES.create(name)
    for page in (3, 1, 2):
        policy.insert(page)
    assert policy.victim(()) == policy.victim(())


@pytest.mark.parametrize("name", ALL_NAMES)
def test_an_empty_policy_has_nothing_to_evict(name):
    with pytest.raises(NothingToEvict):
        POLICIES.create(name).victim(())


@pytest.mark.parametrize("name", ALL_NAMES)
def test_two_instances_share_nothing(name):
    one, other = POLICIES.create(name), POLICIES.create(name)
    one.insert(1)
    with pytest.raises(NothingToEvict):
        other.victim(())


@pytest.mark.parametrize("name", ALL_NAMES)
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


# --- LFU ----------------------------------------------------------------------------------------------------------


def test_lfu_forgets_how_often_a_page_was_used_when_it_leaves():
    policy = POLICIES.create("lfu")
    policy.insert(1)
    for _ in range(5):
        policy.touch(1)
    policy.remove(1)
    policy.insert(2)
    policy.touch(2)
    policy.insert(1)
    assert policy.victim(()) == 1


# --- CLOCK --------------------------------------------------------------------------------------------------------


def test_clock_gives_a_used_page_one_more_round_and_no_second():
    policy = POLICIES.create("clock")
    for page in (1, 2, 3):
        policy.insert(page)
    policy.touch(1)
    assert policy.victim(()) == 2
    policy.remove(2)
    policy.insert(4)
    assert [evict(policy), evict(policy), evict(policy)] == [3, 1, 4]


def test_clock_stops_when_all_pages_are_used_and_some_are_pinned():
    policy = POLICIES.create("clock")
    for page in (1, 2, 3):
        policy.insert(page)
        policy.touch(page)
    assert policy.victim({1}) == 2
    assert policy.victim({2, 3}) == 1, "the pinned page's bit was left, and is cleared on the way round to it"


def test_clock_with_every_page_pinned_leaves_the_hand_where_it_is():
    policy = POLICIES.create("clock")
    for page in (1, 2, 3):
        policy.insert(page)
    with pytest.raises(NothingToEvict):
        policy.victim({1, 2, 3})
    assert policy.victim(()) == 1


# --- S3-FIFO ------------------------------------------------------------------------------------------------------


def s3fifo_of(pages: Collection[int], used_twice: Collection[int] = (), **parameters):
    policy = POLICIES.create({"name": "s3fifo", **parameters})
    for page in pages:
        policy.insert(page)
    for page in used_twice:
        policy.touch(page)
        policy.touch(page)
    return policy


def test_s3fifo_keeps_what_is_used_while_a_scan_passes():
    policy = s3fifo_of(range(10), used_twice=range(9))
    assert evict(policy) == 9, "the only page not used since it came"
    for page in range(100, 200):
        policy.insert(page)
        assert evict(policy) == page


def test_s3fifo_lets_a_page_that_comes_back_soon_into_the_main_queue():
    policy = s3fifo_of(range(10))
    assert evict(policy) == 0
    policy.insert(0)
    policy.insert(20)
    assert [evict(policy) for _ in range(11)] == [*range(1, 10), 20, 0], "the small queue gives all it has first"


def test_s3fifo_has_no_ghost_of_a_page_that_was_dropped():
    policy = s3fifo_of(range(10))
    policy.remove(0)
    policy.insert(0)
    policy.insert(20)
    assert [evict(policy) for _ in range(11)] == [*range(1, 10), 0, 20], "0 came before 20, both to the small queue"


def test_s3fifo_has_no_ghosts_of_the_last_context():
    policy = s3fifo_of(range(10))
    assert evict(policy) == 0
    for page in range(1, 10):
        policy.remove(page)
    policy.insert(0)
    policy.insert(20)
    assert [evict(policy), evict(policy)] == [0, 20]


def test_s3fifo_moves_a_page_that_is_always_pinned_out_of_the_small_queue():
    policy = s3fifo_of(range(10), used_twice=[0])
    assert [evict(policy, {0}) for _ in range(9)] == list(range(1, 10))
    with pytest.raises(NothingToEvict):
        policy.victim({0})
    assert policy.victim(()) == 0


def test_s3fifo_takes_from_a_small_queue_below_its_share_only_when_the_main_queue_is_pinned():
    policy = s3fifo_of(range(6), used_twice=range(4), small_fraction=0.5)
    assert evict(policy) == 0, "0 to 3 moved, which left the small queue below its share of 3"
    policy.remove(4)  # 1, 2 and 3 in the main queue; 5 in the small one, whose share is 2
    assert policy.victim(()) == 1
    assert policy.victim({1, 2, 3}) == 5


def test_s3fifo_takes_the_only_unpinned_page_though_pinned_ones_have_just_moved_to_the_main_queue():
    assert s3fifo_of(range(4), used_twice=range(3), small_fraction=0.5).victim({0, 1, 2}) == 3


def test_s3fifo_counts_no_more_than_three_uses():
    policy = s3fifo_of([0, 1], used_twice=[0, 1])
    assert policy.victim(()) == 0, "both have moved, and their uses are forgotten"
    for page, uses in ((0, 10), (1, 3)):
        for _ in range(uses):
            policy.touch(page)
    assert policy.victim(()) == 0


@pytest.mark.parametrize("small_fraction", [0, 1, -0.5, 1.5, math.nan])
def test_s3fifo_refuses_a_small_queue_that_is_nothing_or_all(small_fraction):
    with pytest.raises(ValueError, match="small_fraction lies between 0 and 1"):
        POLICIES.create({"name": "s3fifo", "small_fraction": small_fraction})


# --- attention ----------------------------------------------------------------------------------------------------


def attention_of(pages: Collection[int], **parameters):
    policy = POLICIES.create({"name": "attention", **parameters})
    for page in pages:
        policy.insert(page)
    return policy


def test_the_page_with_the_least_attention_goes_first_however_lately_it_was_used():
    policy = attention_of([1, 2, 3])
    policy.observe({1: 0.5, 2: 0.2, 3: 0.3})
    policy.touch(2)
    assert [evict(policy) for _ in range(3)] == [2, 3, 1]


def test_a_page_of_which_nothing_is_known_outranks_all_others_until_a_step_has_ended():
    policy = attention_of([1, 2])
    policy.observe({1: 0.1, 2: 0.9})
    policy.insert(3)
    policy.insert(4)
    assert policy.victim(()) == 1
    assert policy.victim({1, 2}) == 3, "among those not known, the least recently used"
    policy.observe({1: 0.1, 2: 0.9})  # 3 and 4 were there and got nothing
    assert policy.victim(()) == 3


def test_attention_fades_by_the_smoothing_of_each_step():
    policy = attention_of([1, 2], smoothing=0.5)
    policy.observe({1: 0.8, 2: 0.2})
    policy.observe({2: 0.2})  # 1: 0.4, 2: 0.2
    assert policy.victim(()) == 2
    policy.observe({2: 0.2})  # 1: 0.2, 2: 0.2, and 1 was used longer ago
    assert policy.victim(()) == 1


def test_a_page_that_was_evicted_comes_back_with_the_attention_it_had():
    policy = attention_of([1, 2, 3], smoothing=0.5)
    policy.observe({1: 0.1, 2: 0.6, 3: 0.3})
    assert evict(policy) == 1
    policy.observe({2: 0.6, 3: 0.3})
    policy.insert(1)
    assert policy.victim(()) == 1


def test_a_page_that_was_evicted_within_the_step_it_was_attended_in_has_its_share_counted():
    policy = attention_of([1, 2], smoothing=0.5)
    policy.observe({1: 0.25, 2: 0.5})
    assert evict(policy) == 1
    policy.observe({1: 1.0, 2: 0.0})  # 1: 0.625, 2: 0.25
    policy.insert(1)
    assert policy.victim(()) == 2


def test_a_page_that_was_dropped_is_not_known_when_its_number_comes_again():
    policy = attention_of([1, 2])
    policy.observe({1: 0.1, 2: 0.9})
    policy.remove(1)
    policy.insert(1)
    assert policy.victim(()) == 2


def test_a_new_context_starts_without_the_attention_of_the_last_one():
    policy = attention_of([1, 2])
    policy.observe({1: 0.1, 2: 0.9})
    assert evict(policy) == 1
    policy.remove(2)
    policy.insert(2)
    policy.insert(1)
    assert policy.victim(()) == 2, "neither is known, and 2 came first"


@pytest.mark.parametrize("smoothing", [1, -0.1, 2, math.nan])
def test_smoothing_that_would_learn_nothing_is_refused(smoothing):
    with pytest.raises(ValueError, match="smoothing is at least 0 and less than 1"):
        POLICIES.create({"name": "attention", "smoothing": smoothing})


def test_only_the_policy_that_ranks_by_attention_asks_to_be_told_of_it():
    assert [name for name in POLICIES if getattr(POLICIES.load(name), "needs_mass", False)] == ["attention"]


@pytest.mark.parametrize("name", ["attention", "s3fifo"])
def test_what_was_cropped_away_is_forgotten_also_where_it_was_not_resident(name):
    """A page with the number of one that is gone is new."""
    cropped, fresh = (PageTable(3, 1, POLICIES.create(name)) for _ in range(2))
    for page in range(6):
        cropped.open(page, ())
        if name == "attention":
            cropped.policy.observe({page: 0.1 * page})
    cropped.truncate(0)
    for table in (cropped, fresh):
        for page in range(3):
            table.open(page, ())
        if name == "attention":
            table.policy.observe({1: 0.5})
    assert cropped.policy == fresh.policy


@pytest.mark.parametrize("name", ALL_NAMES)
@given(pages=st.lists(PAGES, min_size=1, unique=True), data=st.data())
def test_a_touch_that_says_so_changes_nothing_when_repeated(name, pages, data):
    asked = data.draw(st.lists(st.sampled_from(pages), unique=True))
    victims = []
    for times in (1, 3):
        policy = POLICIES.create(name)
        for page in pages:
            policy.insert(page)
        for page in asked * times:
            policy.touch(page)
        victims.append([evict(policy) for _ in pages])
    assert victims[0] == victims[1] or not getattr(policy.touch, "idempotent", False)


def test_a_policy_that_derives_from_another_and_touches_in_its_own_way_does_not_inherit_the_word():
    class Counting(LRU):
        def touch(self, page):
            super().touch(page)

    assert LRU().touch.idempotent and not getattr(Counting().touch, "idempotent", False)
