"""A request for pages gives each of them once, with its own bytes, whatever was copied ahead, given up or evicted; over
a link that delivers when it is told to, so that every order of events can be had."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cache_settings import Paging
from links import MEMORY
from page_store import PageStore
from paged_sequence import PagedSequence
from recorder import Recorder

PAGE_SIZE = 2


class HeldCopy:
    """A copy that arrives when it is delivered, or waited for."""

    def __init__(self, transport, moves):
        self.transport, self.moves, self.arrived, self.error = transport, moves, False, None

    def done(self):
        return self.arrived

    def wait(self):
        if self.arrived:
            return 0.0
        while not self.arrived:
            self.transport.deliver_one()
        return 1.0

    def moments(self):
        return None


class HeldTransport:
    """First in, first out; pages are on the host at once, and on the device when the test says so."""

    link = MEMORY

    def __init__(self):
        self.under_way = []

    def copy(self, moves, to_device, after=()):
        ticket = HeldCopy(self, moves)
        self.under_way.append(ticket)
        if not to_device:
            ticket.wait()
        return ticket

    def deliver_one(self):
        ticket = self.under_way.pop(0)
        for destination, source in ticket.moves:
            destination.copy_(source)
        ticket.arrived = True

    def deliver(self):
        while self.under_way:
            self.deliver_one()

    def adopt(self, pool):
        pass


class Pages:
    """A `PagedSequence` whose keys are their positions' numbers, and what a step of it is.

    Args:
        n_pages: full ones, plus an open one with one position.
    """

    def __init__(self, n_pages: int = 8, **paging: Any):
        numbers = {"page_size": PAGE_SIZE, "max_gpu_pages": 4, "staging_pages": 2, "link": "memory"} | paging
        self.paging = Paging(**numbers)
        self.transport, self.recorder = HeldTransport(), Recorder()
        shape = (PAGE_SIZE, 2, 1, 1)
        self.store = PageStore(self.paging.slots, shape, torch.float32, torch.device("cpu"), self.transport)
        self.sequence = PagedSequence(0, self.paging, self.store, self.recorder, 0, None)
        self.recorder.begin_step("prefill")
        self.append(n_pages * PAGE_SIZE + 1)
        self.recorder.begin_step("decode")

    @property
    def table(self):
        return self.sequence.table

    def append(self, n_tokens: int) -> None:
        first = self.sequence.n_tokens
        numbers = torch.arange(first, first + n_tokens, dtype=torch.float32).view(1, -1, 1)
        self.sequence.append(numbers, -numbers)

    def waves(self, wanted, look_ahead=lambda given: None, may_skip=False):
        """Ask, and give each wave's pages, whose bytes are checked as they are attended."""
        wanted = sorted({*wanted, *self.sequence.pinned_pages()})
        for wave in self.sequence.resolve(wanted, self.sequence.pinned_pages(), look_ahead, may_skip):
            for page, slot in wave.items():
                n_filled = min(PAGE_SIZE, self.sequence.n_tokens - page * PAGE_SIZE)
                numbers = torch.arange(page * PAGE_SIZE, page * PAGE_SIZE + n_filled, dtype=torch.float32)
                assert torch.equal(self.store.pool[slot, :n_filled, 0, 0, 0], numbers), f"page {page}"
                assert torch.equal(self.store.pool[slot, :n_filled, 1, 0, 0], -numbers), f"page {page}"
            yield sorted(wave)

    def ask(self, *wanted, **how):
        """Ask for pages beside the pinned ones: all that were attended, in order of waves."""
        return [page for wave in self.waves(wanted, **how) for page in wave]

    def counts(self, *names):
        totals = [self.recorder.snapshot(phase) for phase in ("prefill", "decode")]
        found = [sum(phase[name] for phase in totals) for name in names]
        return found[0] if len(found) == 1 else tuple(found)

    def require_whole_books(self):
        table, sequence = self.table, self.sequence
        places = [*table.resident.values(), *table.staged.values(), *table.free_slots]
        assert sorted(places) == list(range(self.paging.slots))
        assert len(table.resident) <= self.paging.max_gpu_pages
        assert set(sequence.arriving) == set(table.staged)  # between two requests
        ahead = set(sequence.arriving) - sequence._demanded
        issued, on_time, late, wasted = self.counts(
            *(f"prefetch_{what}" for what in ("issued", "on_time", "late", "wasted"))
        )
        assert issued == on_time + late + wasted + len(ahead)


def fresh(**paging):
    """8 full pages and the open page 8; resident are 0 (pinned), 6, 7 and 8 (pinned): LRU goes by age."""
    pages = Pages(**paging)
    assert sorted(pages.table.resident) == [0, 6, 7, 8]
    return pages


# --- pages that were copied ahead -------------------------------------------------------------------------------------


def test_a_page_copied_ahead_and_not_asked_for_stays_and_is_a_hit_of_a_later_step():
    pages = fresh()
    pages.sequence.prefetch([3, 4], [3, 4])
    pages.transport.deliver()
    pages.ask(6)
    pages.ask(7)
    assert set(pages.table.staged) == {3, 4}
    before = pages.counts("hits", "misses", "h2d_pages")
    assert pages.ask(3) == [0, 3, 8]
    assert pages.counts("hits", "misses", "h2d_pages") == (before[0] + 3, before[1], before[2])
    assert pages.counts("prefetch_issued", "prefetch_on_time", "prefetch_wasted") == (2, 1, 0)
    assert set(pages.table.staged) == {4} and 3 in pages.table.resident
    pages.require_whole_books()


def test_misses_take_free_slots_then_evict_and_then_take_those_of_pages_copied_ahead_that_are_not_wanted():
    pages = fresh()
    pages.sequence.prefetch([1], [1])
    pages.transport.deliver()
    pages.ask(2)  # into the free slot; it becomes resident for 6, the least recently used
    assert (sorted(pages.table.resident), set(pages.table.staged)) == ([0, 2, 7, 8], {1})
    pages.ask(3, 4)  # one into the free slot, and the other into that of 7, which it is going to replace anyway
    assert pages.counts("prefetch_wasted") == 0 and set(pages.table.staged) == {1}
    wanted = sorted(set(pages.table.resident) - {0, 8})
    waves = list(pages.waves([*wanted, 5, 6]))  # nothing that is resident may go, and there is one free slot
    assert waves == [sorted({0, 8, *wanted}), [5, 6]]  # both at once: for 6 the page that is copied ahead gives way
    assert pages.counts("prefetch_wasted") == 1 and not pages.table.staged
    pages.require_whole_books()


def test_what_was_copied_ahead_and_is_wanted_now_is_not_given_up_for_a_miss():
    pages = fresh()
    pages.sequence.prefetch([1, 2], [1, 2])
    assert pages.ask(1, 2, 3, 4, 5, 6, 7) == [0, 6, 7, 8, 1, 2, 3, 4, 5]
    assert pages.counts("prefetch_issued", "prefetch_late", "prefetch_wasted") == (2, 2, 0)
    assert pages.counts("misses") == 3
    pages.require_whole_books()


def test_copies_ahead_take_the_slots_of_pages_that_are_no_longer_guessed_and_no_others():
    pages = fresh()
    pages.sequence.prefetch([1, 2], [1, 2])
    pages.sequence.prefetch([3, 4], [1, 2, 3, 4])  # nothing is free, and nothing may go
    assert set(pages.table.staged) == {1, 2}
    pages.sequence.prefetch([3, 4], [2, 3, 4])
    assert set(pages.table.staged) == {2, 3}  # 4 is guessed less than both
    assert pages.counts("prefetch_issued", "prefetch_wasted", "h2d_pages") == (3, 1, 3)
    assert pages.ask(2, 3) == [0, 8, 2, 3]  # with their own bytes, though the copy of 1 was under way to the slot of 3
    pages.require_whole_books()


def test_a_better_guess_takes_the_slot_of_a_worse_one_and_never_the_other_way_round():
    pages = fresh(staging_pages=3)
    pages.sequence.prefetch([3, 4, 5], [3, 4, 5])
    pages.sequence.prefetch([1], [3, 4, 5, 1])  # a worse one waits for nobody's slot
    assert set(pages.table.staged) == {3, 4, 5} and pages.counts("prefetch_wasted") == 0
    pages.sequence.prefetch([2, 1], [4, 2, 5, 1, 3])  # the worst is 3, for 2; then it is 5, which is better than 1
    assert set(pages.table.staged) == {2, 4, 5}
    pages.sequence.prefetch([1], [1, 4])  # of 2 and 5, which nobody guesses any more, 5 has been there longer
    assert set(pages.table.staged) == {1, 2, 4}
    pages.sequence.prefetch([3], [3], kept=[1, 2])
    assert set(pages.table.staged) == {1, 2, 3}  # 4 is none of those about to be attended
    pages.sequence.prefetch([4], [4], kept=[1, 2, 3])
    assert set(pages.table.staged) == {1, 2, 3}
    assert pages.counts("prefetch_issued", "prefetch_wasted", "h2d_pages") == (6, 3, 6)
    pages.require_whole_books()


def test_where_steps_may_skip_a_better_guess_takes_the_slot_of_a_page_that_has_arrived_only():
    pages = fresh(on_miss="skip")
    pages.sequence.prefetch([1], [1])
    pages.transport.deliver()
    pages.sequence.prefetch([2], [2])
    pages.sequence.prefetch([3, 4], [3, 4])  # 1 has arrived; 2, guessed as little, is under way
    assert set(pages.table.staged) == {2, 3}
    pages.transport.deliver()
    pages.sequence.prefetch([4], [4])
    assert set(pages.table.staged) == {3, 4}
    pages.require_whole_books()


def test_a_new_page_may_take_the_slot_of_a_page_copied_ahead_whose_copy_is_under_way():
    pages = fresh()
    pages.sequence.prefetch([1, 2], [1, 2])
    pages.sequence.prefetch([3, 4], [1, 2, 3, 4], may_evict=True)  # 6 and 7 go; staged are now four pages
    assert (sorted(pages.table.resident), set(pages.table.staged)) == ([0, 8], {1, 2, 3, 4})
    pages.append(2)  # page 8 fills, and 9 needs a slot, where the copy of 1 would write
    assert set(pages.table.staged) == {2, 3, 4} and pages.counts("prefetch_wasted") == 1
    pages.transport.deliver()
    assert pages.ask(2, 3, 4) == [0, 2, 3, 4, 9]
    pages.require_whole_books()


def test_asked_for_one_by_one_every_page_comes_also_where_pages_copied_ahead_hold_all_slots_but_those_of_pinned_ones():
    """1 can only come where a page that is wanted after it was, which is then copied again."""
    pages = fresh(access_order="position")
    pages.sequence.prefetch([4, 5], [4, 5, 2, 3])
    pages.sequence.prefetch([2, 3], [4, 5, 2, 3], may_evict=True)
    assert (sorted(pages.table.resident), sorted(pages.table.staged)) == ([0, 8], [2, 3, 4, 5])
    assert pages.ask(*range(8)) == list(range(9))
    assert pages.counts("prefetch_issued", "prefetch_late", "prefetch_on_time", "prefetch_wasted") == (4, 0, 3, 1)
    pages.require_whole_books()


def test_a_request_that_ends_without_a_slot_for_a_page_says_so():
    """No slot is free, and every page that is there is held for good by whoever asks."""
    pages = fresh()
    pages.sequence.prefetch([1, 2], [1, 2])
    waves = pages.sequence.resolve([6, 3, 4], {0, 1, 2, 6, 7, 8}, lambda given: None)
    with pytest.raises(RuntimeError, match=r"layer 0: no slot was to be had for pages \[3, 4\]"):
        list(waves)
    assert pages.counts("h2d_pages", "prefetch_wasted") == (2, 0)


# --- what LRU goes by -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("wanted", "order"), [([8, 0, 6, 7], [7, 6]), ([7, 0, 8, 6], [6, 7])])
def test_the_most_wanted_of_the_pages_that_are_there_is_evicted_last(wanted, order):
    pages = fresh()
    list(pages.sequence.resolve(wanted, {0, 8}, lambda given: None))
    evicted = []
    for page in (1, 2):
        before = set(pages.table.resident)
        pages.ask(page)
        evicted += before - set(pages.table.resident)
    assert evicted == order


def test_where_pages_are_asked_for_one_by_one_the_first_is_evicted_first():
    pages = fresh(access_order="position")
    pages.ask(6, 7)
    pages.ask(1)
    assert sorted(pages.table.resident) == [0, 1, 7, 8]


def test_of_the_pages_that_plain_lru_would_have_those_count_that_were_there_or_came_without_waiting():
    """LRU, told of the same requests, has 0, 6, 7 and 8. Here 6 and 7 went for copies ahead, and come back likewise:
    7 has arrived as it is asked for, 6 as it would be waited for."""
    pages = fresh()
    pages.sequence.prefetch([1, 2, 3, 4], [1, 2, 3, 4], may_evict=True)
    assert sorted(pages.table.resident) == [0, 8]
    pages.sequence.prefetch([7], [7])
    pages.transport.deliver()
    pages.sequence.prefetch([6], [6, 7])
    waves = pages.sequence.resolve([0, 6, 7, 8], {0, 8}, lambda given: None)
    assert pages.counts("hits", "lru_hits", "shadow_hits") == (3, 3, 4)
    pages.transport.deliver()
    assert [sorted(wave) for wave in waves] == [[0, 7, 8], [6]]
    assert pages.counts("hits", "late", "lru_hits", "shadow_hits") == (4, 0, 4, 4)
    pages.require_whole_books()


def test_a_page_that_plain_lru_would_have_and_that_is_waited_for_is_no_hit_of_both():
    pages = fresh()
    pages.sequence.prefetch([1, 2, 3, 4], [1, 2, 3, 4], may_evict=True)
    pages.sequence.prefetch([6, 7], [6, 7])
    assert pages.ask(6, 7) == [0, 8, 6, 7]
    assert pages.counts("hits", "late", "lru_hits", "shadow_hits") == (2, 2, 2, 4)


@pytest.mark.parametrize(
    ("on_miss", "may_skip", "must_move"), [("wait", True, 1), ("skip", False, 1), ("skip", True, 0)]
)
def test_nothing_must_move_for_a_request_that_may_skip(on_miss, may_skip, must_move):
    """5 pages are asked for, of which 4 can be resident."""
    pages = fresh(on_miss=on_miss)
    pages.ask(5, 6, 7, may_skip=may_skip)
    assert pages.counts("must_move") == must_move


# --- evicting for what is guessed -------------------------------------------------------------------------------------


def test_only_what_is_neither_pinned_nor_guessed_is_evicted_for_a_copy_ahead():
    pages = fresh()
    pages.sequence.prefetch([1, 2, 3, 4], [1, 2, 3, 4, 6], may_evict=True)
    assert (sorted(pages.table.resident), sorted(pages.table.staged)) == ([0, 6, 8], [1, 2, 3])
    pages.sequence.prefetch([4], [1, 2, 3, 4, 6], may_evict=True)
    assert (sorted(pages.table.resident), sorted(pages.table.staged)) == ([0, 6, 8], [1, 2, 3])
    pages.require_whole_books()


def test_without_leave_nothing_is_evicted_for_a_copy_ahead():
    pages = fresh()
    evictions = pages.counts("evictions")
    pages.sequence.prefetch([1, 2, 3, 4], [1, 2, 3, 4])
    assert (sorted(pages.table.resident), sorted(pages.table.staged)) == ([0, 6, 7, 8], [1, 2])
    assert pages.counts("evictions") == evictions


def evicted_6_for_3():
    pages = fresh()
    pages.sequence.prefetch([1, 2, 3], [1, 2, 3, 7], may_evict=True)
    assert 6 not in pages.table.resident
    return pages


def test_a_miss_on_a_page_evicted_for_a_copy_ahead_is_pollution_once():
    pages = evicted_6_for_3()
    pages.ask(5)  # a miss, of a page that was not evicted for any copy ahead
    assert pages.counts("pollution") == 0
    pages.ask(6)
    assert (pages.counts("pollution"), pages.counts("misses")) == (1, 2)
    for page in (5, 4, 3, 2, 1, 7, 6):  # it is evicted again, for misses, and missed again
        pages.ask(page)
    assert pages.counts("pollution") == 1


def test_a_page_evicted_for_a_copy_ahead_that_is_back_when_asked_for_is_none():
    """It was brought back ahead of need, and is then evicted for misses like any other."""
    pages = evicted_6_for_3()
    pages.sequence.prefetch([6], [6])
    assert pages.ask(6) == [0, 8, 6]
    for page in (1, 2, 3, 4, 5, 7):
        pages.ask(page)
    misses = pages.counts("misses")
    pages.ask(6)
    assert pages.counts("misses") == misses + 1
    assert pages.counts("pollution") == 0


def test_a_page_evicted_for_a_copy_ahead_and_brought_back_in_vain_is_none_either():
    """That copy undid the eviction; that it was given up is counted as its waste."""
    pages = evicted_6_for_3()
    pages.sequence.prefetch([6], [6])
    wasted = pages.counts("prefetch_wasted")
    pages.sequence.prefetch([1], [1, 2, 3])
    assert sorted(pages.table.staged) == [1, 2, 3]
    assert pages.counts("prefetch_wasted") == wasted + 1
    pages.ask(6)
    assert pages.counts("misses", "pollution") == (1, 0)


def test_a_fork_misses_what_was_evicted_for_a_copy_ahead_too():
    pages = evicted_6_for_3()
    pages.store.select_lanes([0, 0], pages.paging.slots)
    pages.sequence = pages.sequence.fork(1)
    pages.ask(6)
    assert pages.counts("pollution") == 1


def test_a_page_that_a_cropped_context_no_longer_has_is_no_pollution():
    pages = evicted_6_for_3()
    pages.sequence.truncate(6 * PAGE_SIZE)
    pages.append(2 * PAGE_SIZE + 1)
    for page in (1, 2, 3, 4, 5):
        pages.ask(page)
    pages.ask(6)
    assert pages.counts("pollution") == 0


# --- doing without ----------------------------------------------------------------------------------------------------


def test_a_request_that_may_skip_gives_what_is_there_and_has_the_rest_copied():
    pages = fresh(on_miss="skip")
    pages.sequence.prefetch([1], [1])
    assert pages.ask(1, 2, 6, may_skip=True) == [0, 6, 8]
    assert pages.counts("hits", "late", "misses", "skipped", "stall_ms") == (3, 1, 1, 2, 0.0)
    pages.transport.deliver()
    assert pages.ask(1, 2, 6, may_skip=True) == [0, 1, 2, 6, 8]
    assert pages.counts("hits", "late", "misses", "skipped", "stall_ms") == (8, 1, 1, 2, 0.0)
    assert pages.counts("h2d_pages", "prefetch_issued", "prefetch_on_time", "prefetch_late") == (2, 1, 1, 0)
    pages.require_whole_books()


def test_a_page_that_was_skipped_and_is_never_asked_for_again_is_no_waste_of_a_prediction():
    pages = fresh(on_miss="skip")
    pages.ask(1, may_skip=True)
    pages.transport.deliver()
    pages.sequence.prefetch([2, 3], [2, 3])
    assert set(pages.table.staged) == {2, 3}
    assert pages.counts("prefetch_issued", "prefetch_wasted", "h2d_pages") == (2, 0, 3)
    pages.require_whole_books()


def test_a_page_copied_ahead_and_guessed_still_does_not_go_for_one_that_is_guessed_less():
    pages = Pages(0, max_gpu_pages=3, staging_pages=1, recent_pages=1)
    pages.append(16)
    last = pages.sequence.n_pages - 1
    assert set(pages.table.resident) == {0, last - 1, last}
    pages.sequence.prefetch([5], [5])
    pages.sequence.prefetch([1, 6], [1, 5, 6], may_evict=True)  # 1 takes the slot of a page not guessed, and 6 none
    assert set(pages.table.staged) == {5, 1}
    assert set(pages.table.resident) == {0, last}


# --- anything, in any order -------------------------------------------------------------------------------------------


class AnyOrderOfEvents(RuleBasedStateMachine):
    """A sequence over a link that delivers at any time. The model: every page has its own bytes, and is attended once
    in a request that waits; in one that skips, those that were there when it was made."""

    @initialize(
        order=st.sampled_from(["resident_first", "position"]),
        policy=st.sampled_from(["lru", "mru", "s3fifo"]),
        budget=st.integers(3, 5),
        staging=st.integers(1, 3),
        recent=st.integers(1, 2),
        data=st.data(),
    )
    def make(self, order, policy, budget, staging, recent, data):
        skips = order == "resident_first" and data.draw(st.booleans())
        self.pages = Pages(
            data.draw(st.integers(0, 7)),
            access_order=order,
            policy=policy,
            max_gpu_pages=max(budget, recent + 2),
            staging_pages=staging,
            recent_pages=recent,
            on_miss="skip" if skips else "wait",
        )
        self.skips = skips
        self.evicted_ahead, self.n_pollution = set(), 0

    def some_pages(self, data):
        return data.draw(st.sets(st.integers(0, self.pages.sequence.n_pages - 1)))

    def copy_ahead(self, data, kept=()):
        """What a scheduler does: ask for copies of absent pages, some of those guessed, best first."""
        sequence, table = self.pages.sequence, self.pages.table
        ranking, may_evict = data.draw(st.permutations(sorted(self.some_pages(data)))), data.draw(st.booleans())
        absent = [page for page in ranking if page in sequence.absent(ranking)][: data.draw(st.integers(0, 4))]
        resident, staged = set(table.resident), dict(sequence.arriving)
        not_to_go = set(kept) | sequence.pinned_pages()
        spare = {
            page
            for page, ticket in staged.items()
            if page not in not_to_go and (ticket.done() or sequence.paging.on_miss == "wait")
        }
        sequence.prefetch(absent, ranking, kept, may_evict)
        evicted, given_up = resident - set(table.resident), set(staged) - set(sequence.arriving)
        copied = [page for page in absent if page in sequence.arriving]

        def rank(page):
            return ranking.index(page) if page in ranking else len(ranking)

        assert set(sequence.arriving) == set(staged) - given_up | set(copied)
        assert copied == absent[: len(copied)]
        assert not evicted & not_to_go.union(ranking) and (may_evict or not evicted)
        # Only pages that nothing speaks for are given up, the worst of them, and only for better ones.
        assert given_up <= spare
        assert all(rank(worse) > rank(better) for worse in given_up for better in copied)
        assert all(rank(one) >= rank(other) for one in given_up for other in spare - given_up)
        if len(copied) < len(absent):  # for want of any slot that might have been had
            refused = absent[len(copied)]
            assert not table.free_slots and all(rank(page) <= rank(refused) for page in spare - given_up)
            assert not may_evict or set(table.resident) <= not_to_go.union(ranking)
        self.evicted_ahead = (self.evicted_ahead | evicted).difference(copied)

    @rule(data=st.data())
    def prefetch(self, data):
        self.copy_ahead(data)

    @rule(n=st.integers(1, 5))
    def append(self, n):
        self.pages.append(n)

    @rule(n=st.integers(1, 3))
    def deliver(self, n):
        for _ in range(min(n, len(self.pages.transport.under_way))):
            self.pages.transport.deliver_one()

    @rule(data=st.data(), looks=st.booleans(), decodes=st.booleans())
    def ask(self, data, looks, decodes):
        pages, sequence = self.pages, self.pages.sequence
        wanted = self.some_pages(data) | sequence.pinned_pages()
        may_skip = self.skips and decodes
        there = {
            page
            for page in wanted
            if page in pages.table.resident or (page in pages.table.staged and sequence.arriving[page].done())
        }
        absent = {page for page in wanted if pages.table.slot(page) is None}
        hits, misses, stall = pages.counts("hits", "misses", "stall_ms")
        looked = []
        evicted_ahead, self.evicted_ahead = self.evicted_ahead, self.evicted_ahead - wanted

        def look_ahead(given):
            looked.append(sorted(given))
            if looks:
                self.copy_ahead(data, kept=given)

        attended = pages.ask(*wanted, look_ahead=look_ahead, may_skip=may_skip)
        assert sorted(attended) == sorted(there if may_skip else wanted)
        assert looked == [sorted(wanted)]
        if pages.paging.access_order == "resident_first":
            assert pages.counts("misses") - misses == len(absent)
            self.n_pollution += len(evicted_ahead & absent)
            assert pages.counts("pollution") == self.n_pollution
        if may_skip:
            assert pages.counts("hits") - hits == len(there)
            assert pages.counts("stall_ms") == stall

    @precondition(lambda self: self.pages.sequence.n_tokens > 1)
    @rule(data=st.data())
    def truncate(self, data):
        self.pages.sequence.truncate(data.draw(st.integers(1, self.pages.sequence.n_tokens - 1)))
        self.evicted_ahead = {page for page in self.evicted_ahead if page < self.pages.sequence.n_pages}

    @invariant()
    def books_add_up(self):
        if hasattr(self, "pages"):
            self.pages.require_whole_books()


TestAnyOrderOfEvents = AnyOrderOfEvents.TestCase
TestAnyOrderOfEvents.settings = settings(max_examples=60, stateful_step_count=25)
