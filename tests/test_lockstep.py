"""Layers in lockstep do just what each of them would have done by itself: the same copies, counts and tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from tiny_models import CONFIGS, logits_and_counts, make_model

import lockstep
from kv_paging import PagedKVCache
from lockstep import Lockstep, RepeatedRequest
from page_policies import LRU, AttentionMass
from predictive_prefetch import PrefetchingKVCache

TIGHT = {"page_size": 8, "max_gpu_pages": 5, "staging_pages": 2, "link": "memory", "record_pages": True}
N_NEW, N_LAYERS = 60, 2


@pytest.fixture(scope="module")
def llama():
    return make_model(CONFIGS["llama_gqa"])


class Counted(RepeatedRequest):
    times = 0

    def __init__(self, *args):
        Counted.times += 1
        super().__init__(*args)


@pytest.fixture
def repeats(monkeypatch):
    """Tells how many requests were made as another layer had made them."""
    Counted.times = 0
    monkeypatch.setattr(lockstep, "RepeatedRequest", Counted)
    return lambda: Counted.times


def alone(monkeypatch):
    monkeypatch.setattr(Lockstep, "ask", lambda *args: None)


def require_the_same(together, by_itself):
    torch.testing.assert_close(together[0], by_itself[0])  # waves that arrive together are merged together
    assert together[1] == by_itself[1]
    assert together[2] == by_itself[2]  # each request with what was resident then


@pytest.mark.parametrize("page_size", [2, 8, 32])
@pytest.mark.parametrize("staging_pages", [1, 3, 30])
@pytest.mark.parametrize("policy", ["lru", "mru", "fifo", "lfu", "clock", "s3fifo"])
def test_a_layer_counts_asks_and_answers_as_if_it_had_decided_by_itself(
    llama, monkeypatch, repeats, policy, staging_pages, page_size
):
    settings = TIGHT | {"policy": policy, "staging_pages": staging_pages, "page_size": page_size, "max_gpu_pages": 3}
    together = logits_and_counts(llama, PagedKVCache(llama.config, **settings))
    assert repeats() > 0.9 * N_NEW * (N_LAYERS - 1) - 30 * (page_size == 32)  # three pages fit all at first
    alone(monkeypatch)
    n_before = repeats()
    require_the_same(together, logits_and_counts(llama, PagedKVCache(llama.config, **settings)))
    assert repeats() == n_before


def test_layers_hold_one_page_table_after_a_step(llama):
    cache = PagedKVCache(llama.config, **TIGHT)
    logits_and_counts(llama, cache)
    tables = [layer.pages.sequences[0].table for layer in cache.paged_layers]
    assert len(tables) == N_LAYERS
    assert all(table is tables[0] for table in tables)


def crop(cache):
    cache.crop(-3)


def crop_pages(cache):
    cache.crop(-20)


def repeat_rows(cache):
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([1, 2]))


def swap_rows(cache):
    cache.reorder_cache(torch.tensor([1, 0]))


def evict_in_the_second_layer(cache):
    sequence = cache.paged_layers[1].pages.sequences[0]
    cache.paged_layers[1].pages.store.drain()
    table = sequence.own_table()
    table.evict({page for page in table.resident if page != max(table.resident.keys() - sequence.pinned_pages())})


@pytest.mark.parametrize("change", [None, crop, crop_pages, repeat_rows, swap_rows, evict_in_the_second_layer])
def test_a_layer_goes_its_own_way_where_its_pages_are_others(llama, monkeypatch, repeats, change):
    together = logits_and_counts(llama, PagedKVCache(llama.config, **TIGHT), change=change, batch=2)
    assert repeats() >= N_NEW  # of two rows
    alone(monkeypatch)
    require_the_same(together, logits_and_counts(llama, PagedKVCache(llama.config, **TIGHT), change=change, batch=2))


def crop_into_the_budget(cache):
    cache.crop(38 - cache.get_seq_length())  # five pages of 8, in which no page has to move for a while


@pytest.mark.parametrize("policy", ["lru", "mru", "fifo", "lfu", "clock", "s3fifo"])
def test_a_layer_goes_its_own_way_from_a_table_that_all_hold_while_nothing_moves(llama, monkeypatch, repeats, policy):
    settings, how = TIGHT | {"policy": policy}, {"change": crop_into_the_budget, "n_prompt": 20, "n_new": 160}
    together = logits_and_counts(llama, PagedKVCache(llama.config, **settings), **how)
    assert repeats() > 0
    alone(monkeypatch)
    require_the_same(together, logits_and_counts(llama, PagedKVCache(llama.config, **settings), **how))


def test_no_table_is_changed_that_another_layer_holds(llama):
    cache = PagedKVCache(llama.config, **TIGHT)
    logits_and_counts(llama, cache)
    first, second = (layer.pages.sequences[0] for layer in cache.paged_layers)
    held = dict(second.table.resident)
    first.truncate(9)
    assert second.table.resident == held
    first.clear()
    assert second.table.resident == held
    assert not first.table.resident


def test_pages_copied_ahead_leave_the_table_that_all_hold(llama):
    cache = PagedKVCache(llama.config, **TIGHT)
    logits_and_counts(llama, cache)
    first, second = (layer.pages.sequences[0] for layer in cache.paged_layers)
    (page, *_) = sorted(set(range(first.n_sealed)) - first.table.resident.keys())
    first.prefetch([page], [page])
    assert page in first.table.staged and page not in second.table.staged


@dataclass(frozen=True)
class Derived(LRU):
    """A policy that says nothing of being comparable itself."""


@dataclass
class HeedsMass(AttentionMass):
    """One that says so, and goes by attention, which differs from layer to layer."""

    comparable: ClassVar[bool] = True


class Unequal(LRU):
    """One that says so, of which no two are equal."""

    comparable: ClassVar[bool] = True
    __eq__ = object.__eq__
    __hash__ = object.__hash__


@pytest.mark.parametrize(
    "settings",
    [
        {"policy": "test_lockstep:Derived"},
        {"policy": "test_lockstep:Unequal"},
        {"policy": "test_lockstep:HeedsMass"},
        {"policy": "attention"},
        {"access_order": "position"},
        {"on_miss": "skip", "selector": "quest", "attention_pages": 4},
        {"selector": "quest", "attention_pages": 4},
    ],
    ids=str,
)
def test_nothing_is_shared_where_layers_may_decide_differently(llama, repeats, settings):
    logits_and_counts(llama, PagedKVCache(llama.config, **TIGHT | settings))
    assert repeats() == 0


def test_nothing_is_shared_where_copies_are_made_ahead(llama, repeats):
    settings = TIGHT | {"predictor": "layer_ahead", "prefetch_k": 2}
    logits_and_counts(llama, PrefetchingKVCache(llama.config, **settings))
    assert repeats() == 0
