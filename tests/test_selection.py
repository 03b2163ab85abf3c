"""Selection in a paged cache: which pages a decode step attends to is the selector's choice and nothing else's."""

from __future__ import annotations

import pytest
import torch
from tiny_models import CONFIGS, Prompt, continue_prompt, make_model, make_prompt

from kv_paging import PagedKVCache
from page_selection import choose_pages
from predictive_prefetch import PrefetchingKVCache
from registry import SELECTORS

SMALL = {"page_size": 8, "max_gpu_pages": 4, "staging_pages": 3, "link": "memory"}
SELECTIVE = [name for name in SELECTORS if name != "all"]
QUEST = {"selector": "quest", "attention_pages": 5}


@pytest.fixture(scope="module")
def llama():
    return make_model(CONFIGS["llama_gqa"])


def tokens_with(model, prompt, kind=PagedKVCache, **paging):
    cache = kind(model.config, **SMALL | paging)
    with cache.attached(model):
        return continue_prompt(model, prompt, past_key_values=cache), cache


class Watching(PagedKVCache):
    """Notes what was asked for and what was attended to."""

    def look_ahead(self, layer, sequence, wanted):
        self.__dict__.setdefault("wanted", []).append((layer.layer_idx, sequence.lane, sorted(wanted)))

    def attended(self, layer, sequence, attention):
        self.__dict__.setdefault("read", []).append((layer.layer_idx, sequence.lane, sorted(attention.pages)))


@pytest.mark.parametrize("granularity", ["layer", "kv_head"])
@pytest.mark.parametrize("selector", SELECTIVE)
def test_a_selector_that_may_choose_every_page_is_exact(llama, selector, granularity):
    prompt = make_prompt(90)
    for enough in ({"attention_pages": 100}, {"attention_fraction": 1.0}):
        tokens, cache = tokens_with(llama, prompt, selector=selector, granularity=granularity, **enough)
        assert torch.equal(tokens, continue_prompt(llama, prompt))
    assert cache.recorder.snapshot("decode")["select_ms"] == 0


def restricted_attention(query, keys, values, size, pages, heads):
    """Softmax over the positions of some pages, by its definition. query [H, D]; keys, values [K, S, D] -> [H, D]."""
    groups = query.shape[0] // keys.shape[0]
    rows = []
    for head, one in enumerate(query):
        kv_head = head // groups
        read = [page for page in pages if heads is None or heads[page, kv_head]]
        positions = [position for position in range(keys.shape[1]) if position // size in read]
        weights = (keys[kv_head, positions] @ one * one.shape[0] ** -0.5).softmax(0)
        rows.append(weights @ values[kv_head, positions])
    return torch.stack(rows)


@pytest.mark.parametrize("access_order", ["resident_first", "position"])
@pytest.mark.parametrize("granularity", ["layer", "kv_head"])
@pytest.mark.parametrize("selector", SELECTIVE)
def test_attention_is_that_over_the_chosen_pages(llama, selector, granularity, access_order):
    """70 positions are 8 full pages and an open one; 5 are attended to, the first and the open one among them."""
    paging = {"selector": selector, "attention_pages": 5, "granularity": granularity, "access_order": access_order}
    cache = PagedKVCache(llama.config, **SMALL | paging)
    layer, generator = cache.paged_layers[0], torch.Generator().manual_seed(1)
    keys, values = torch.randn(2, 1, 2, 70, 16, generator=generator)
    queries = torch.randn(3, 1, 4, 1, 16, generator=generator)
    cache.recorder.begin_step("prefill")
    layer.update(keys[:, :, :67], values[:, :, :67])
    cache.phase = "decode"
    cache.recorder.begin_step("decode")
    for step, query in enumerate(queries):
        end = 68 + step
        got = layer.attend(query, keys[:, :, end - 1 : end], values[:, :, end - 1 : end], None, 16**-0.5)
        part, chooser = SELECTORS.create(selector), query[0].reshape(2, 2, 16) * 16**-0.5
        full = keys[0, :, :64].unflatten(1, (8, 8)).transpose(0, 1)
        choice = choose_pages(part.score(chooser, part.digest(full)), 9, {0, 8}, 5, granularity == "kv_head")
        expected = restricted_attention(query[0, :, 0], keys[0, :, :end], values[0, :, :end], 8, *vars(choice).values())
        torch.testing.assert_close(got[0, :, 0], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("granularity", ["layer", "kv_head"])
@pytest.mark.parametrize("selector", SELECTIVE)
def test_where_pages_are_and_how_they_move_does_not_change_the_tokens(llama, selector, granularity):
    choice = {"selector": selector, "attention_pages": 5, "granularity": granularity, "sink_pages": 1}
    prompt = make_prompt(120, batch=2, padding=13)
    expected, _ = tokens_with(llama, prompt, max_gpu_pages=40, **choice)
    for paging in (
        {"policy": "mru"},
        {"max_gpu_pages": 3, "staging_pages": 1},
        {"access_order": "position"},
        {"host_pages": 3},
        {"kind": PrefetchingKVCache, "predictor": "last_step", "prefetch_k": 2},
    ):
        tokens, _ = tokens_with(llama, prompt, **choice | paging)
        assert torch.equal(tokens, expected), paging


def test_selection_leaves_something_out(llama):
    """Else the test above would prove nothing."""
    prompt = make_prompt(200)
    tokens, _ = tokens_with(llama, prompt, selector="window", attention_pages=2)
    assert not torch.equal(tokens, continue_prompt(llama, prompt))


@pytest.mark.parametrize("paging", [QUEST, QUEST | {"granularity": "kv_head"}, QUEST | {"access_order": "position"}])
def test_a_step_attends_to_all_the_pages_that_were_chosen_and_the_pinned_ones_are_among_them(llama, paging):
    _, cache = tokens_with(llama, make_prompt(100, batch=2), Watching, sink_pages=2, **paging)
    in_decode = cache.wanted[-len(cache.read) :]
    assert in_decode == cache.read and len(cache.read) == 23 * 2 * 2  # steps, layers, rows
    for step, (_, _, pages) in enumerate(cache.read):
        open_page = (100 + step // 4) // 8
        assert {0, 1, open_page} <= set(pages)
        assert len(pages) == 5 if "granularity" not in paging else 5 <= len(pages) <= 2 + 1 + 2 * 2


def test_dense_layers_attend_to_every_page_and_the_others_do_not(llama):
    _, cache = tokens_with(llama, make_prompt(100), **QUEST, dense_layers=1)
    accesses = [layer["accesses"] for layer in cache.recorder.layer_dicts()]
    pages_by_step = [-(-(100 + step) // 8) for step in range(1, 24)]
    assert accesses == [sum(pages_by_step), 23 * 5]
    assert [layer.pages.digests is None for layer in cache.paged_layers] == [True, False]


def test_a_fraction_is_of_the_pages_there_are_and_never_less_than_the_pinned_ones(llama):
    _, cache = tokens_with(llama, make_prompt(200), selector="quest", attention_fraction=0.25)
    pages_by_step = [-(-(200 + step) // 8) for step in range(1, 24)]
    accesses = [layer["accesses"] for layer in cache.recorder.layer_dicts()]
    assert accesses == [sum(-(-pages // 4) for pages in pages_by_step)] * 2
    assert cache.paging.n_attended(3) == 2 and cache.paging.n_attended(1) == 1


@pytest.mark.parametrize("paging", [{}, QUEST, QUEST | {"granularity": "kv_head"}, {"selector": "oracle", **QUEST}])
def test_rows_of_different_lengths_give_what_each_gives_alone(llama, paging):
    """Padding is not stored, so pages begin at the same tokens, and the selector has the same pages to choose from."""
    paging = {**paging, "selector": paging.get("selector", "all")}
    lengths = (120, 77, 64)
    rows = [make_prompt(length, seed=length) for length in lengths]
    ids, mask = torch.zeros(3, 120, dtype=torch.long), torch.zeros(3, 120, dtype=torch.long)
    for row, prompt in enumerate(rows):
        ids[row, 120 - lengths[row] :], mask[row, 120 - lengths[row] :] = prompt.ids[0], 1
    together, cache = tokens_with(llama, Prompt(ids, mask), **paging)
    for row, prompt in enumerate(rows):
        alone, single = tokens_with(llama, prompt, **paging)
        assert torch.equal(together[row, 120:], alone[0, lengths[row] :])
        sequence = single.paged_layers[0].pages.sequences[0]
        assert cache.paged_layers[0].pages.sequences[row].n_pages == sequence.n_pages


def test_digests_are_counted_and_are_no_part_of_the_pool(llama):
    _, exact = tokens_with(llama, make_prompt(100))
    _, quest = tokens_with(llama, make_prompt(100), **QUEST)
    _, window = tokens_with(llama, make_prompt(100), selector="window", attention_pages=5)
    assert exact.memory()["digest_bytes"] == window.memory()["digest_bytes"] == 0
    pages_of_a_layer = quest.paged_layers[0].pages.digests.capacity
    assert pages_of_a_layer >= 122 // 8
    assert quest.memory()["digest_bytes"] == 2 * pages_of_a_layer * 2 * 2 * 16 * 4  # layers, K, min and max, D, bytes
    assert exact.memory()["device_kv_bytes"] == quest.memory()["device_kv_bytes"]


def test_asked_for_in_position_order_lru_hits_what_is_pinned_and_as_a_set_what_the_budget_holds(llama):
    """15 pages, the last one open all the time; 4 of them fit: as a set 4 hits a step. In position order LRU has just
    lost every page but the two that are pinned."""
    prompt, figures = make_prompt(113), {}
    for order in ("resident_first", "position"):
        cache = PagedKVCache(llama.config, **SMALL, access_order=order)
        with cache.attached(llama):
            tokens = continue_prompt(llama, prompt, 7, past_key_values=cache)
        assert torch.equal(tokens, continue_prompt(llama, prompt, 7))
        figures[order] = cache.recorder.snapshot("decode")
    steps = 6 * 2
    assert [figures[order]["accesses"] for order in figures] == [15 * steps] * 2
    assert figures["resident_first"]["hits"] == 4 * steps
    assert figures["position"]["hits"] == 2 * steps
    assert figures["position"]["h2d_pages"] == figures["position"]["misses"] == 13 * steps


@pytest.mark.parametrize("access_order", ["resident_first", "position"])
@pytest.mark.parametrize("paging", [{}, QUEST, QUEST | {"dense_layers": 1}], ids=["all", "quest", "mixed"])
def test_the_shadow_of_a_cache_that_is_plain_lru_has_its_hits(llama, paging, access_order):
    _, cache = tokens_with(llama, make_prompt(150, batch=2, padding=21), access_order=access_order, **paging)
    decode = cache.recorder.snapshot("decode")
    assert decode["shadow_hits"] == decode["hits"] > 0


def test_the_shadow_of_another_policy_is_lru_all_the_same(llama):
    prompt = make_prompt(150)
    hits = {}
    for policy in ("lru", "mru"):
        _, cache = tokens_with(llama, prompt, policy=policy, access_order="position")
        decode = cache.recorder.snapshot("decode")
        hits[policy] = (decode["hits"], decode["shadow_hits"])
    assert hits["lru"][0] == hits["lru"][1] == hits["mru"][1] < hits["mru"][0]
