"""The query that is foreseen is the one a layer asks with, where its input is right; and foreseeing leaves no trace."""

from __future__ import annotations

import threading
from collections import defaultdict

import pytest
import torch
from test_model_families import PAGED, families, model_of
from tiny_models import CONFIGS, GROUPED, continue_prompt, make_model, make_prompt
from transformers import AutoConfig, DynamicCache

import hf_attention
from hf_attention import CannotPage
from kv_paging import PagedKVCache
from page_predictors import CrossLayer
from paged_layer import PagedLayer
from predictive_prefetch import PrefetchingKVCache
from query_foresight import QueryForesight

PAGING = {"page_size": 8, "max_gpu_pages": 4, "staging_pages": 2, "link": "memory"}
QUEST = {"selector": "quest", "attention_pages": 4}
FORESEES = PAGING | QUEST | {"predictor": "cross_layer", "prefetch_k": 2}


@pytest.fixture(scope="module")
def llama():
    return make_model(CONFIGS["llama_gqa"])


def state_of(cache):
    """All that a call in vain could have changed."""
    layers = [
        (layer.n_tokens, [(one.n_tokens, dict(one.table.resident)) for one in layer.pages.sequences])
        if isinstance(layer, PagedLayer)
        else (layer.get_seq_length(), layer.keys.clone().tolist())
        for layer in cache.layers
        if layer.get_seq_length()
    ]
    return (
        layers,
        cache.phase,
        cache.n_decode_steps,
        cache.torn,
        cache.recorder.step_dicts(),
        hf_attention._pending.note,
    )


@pytest.fixture
def asked_again(monkeypatch):
    """In each decode step, before a layer attends: the query foreseen for itself, and the one that it attends with."""
    pairs, original = [], PagedLayer.attend

    def attend(layer, query, key, value, allowed, scale, *rule):
        cache = layer.cache
        if query.shape[2] == 1 and hasattr(cache, "_foresight"):
            before = state_of(cache)
            foreseen = cache._foresight.query(of=layer.attention, given_to=layer.attention)
            assert state_of(cache) == before
            pairs.append((layer.layer_idx, foreseen, (query, scale)))
        return original(layer, query, key, value, allowed, scale, *rule)

    monkeypatch.setattr(PagedLayer, "attend", attend)
    return pairs


@pytest.mark.parametrize("family", families(PAGED))
def test_given_its_own_input_a_layer_foresees_the_very_query_that_it_attends_with(family, asked_again):
    model, prompt = model_of(family), make_prompt(60, batch=2, padding=21)
    cache = PrefetchingKVCache(model.config, **FORESEES)
    with cache.attached(model):
        tokens = continue_prompt(model, prompt, 6, past_key_values=cache)
    assert len(asked_again) == 5 * len(cache.paged_layers)
    for _, (query, scale), (true_query, true_scale) in asked_again:
        assert torch.equal(query, true_query) and scale == true_scale
    reactive = PagedKVCache(model.config, **PAGING, **QUEST)
    with reactive.attached(model):
        assert torch.equal(tokens, continue_prompt(model, prompt, 6, past_key_values=reactive))


def n_hooks(model):
    return sum(len(module._forward_pre_hooks) for module in model.modules())


def test_hooks_are_gone_after_the_block_and_after_an_error_in_it(llama):
    cache = PrefetchingKVCache(llama.config, **FORESEES)
    with cache.attached(llama):
        assert n_hooks(llama) >= 2
        with cache.attached(llama):
            continue_prompt(llama, make_prompt(60), 4, past_key_values=cache)
        continue_prompt(llama, make_prompt(70), 4, past_key_values=cache)
    assert n_hooks(llama) == 0 and not cache._foresight._calls
    with pytest.raises(ZeroDivisionError), cache.attached(llama):
        continue_prompt(llama, make_prompt(80), 4, past_key_values=cache)
        raise ZeroDivisionError
    assert n_hooks(llama) == 0 and not cache._foresight._calls


@pytest.mark.parametrize(
    ("predictor", "selection"),
    [
        ("cross_layer", QUEST),
        ("ranked", QUEST),
        ({"name": "ranked", "foresight": False}, QUEST),
        ("ranked", {}),
        ("ema", QUEST),
    ],
)
def test_only_a_predictor_that_goes_by_scores_watches_the_model(llama, predictor, selection):
    cache = PrefetchingKVCache(llama.config, **PAGING, **selection, predictor=predictor, prefetch_k=2)
    with cache.attached(llama):
        assert bool(n_hooks(llama)) == (selection == QUEST and predictor in ("cross_layer", "ranked"))


def test_two_caches_on_one_model_do_not_see_each_others_calls(llama):
    prompts = {"first": make_prompt(60), "second": make_prompt(70, batch=2, seed=3)}
    caches = {name: PrefetchingKVCache(llama.config, **FORESEES) for name in prompts}
    with caches["first"].attached(llama), caches["second"].attached(llama), torch.no_grad():
        for name, prompt in prompts.items():
            llama(prompt.ids, past_key_values=caches[name])
        llama(torch.tensor([[7]]), past_key_values=caches["first"])
        assert len(caches["first"]._foresight._calls) and not caches["second"]._foresight._calls
        llama(torch.tensor([[8], [9]]), past_key_values=caches["second"])
        for name, batch_size in (("first", 1), ("second", 2)):
            module = caches[name].paged_layers[0].attention
            query, _ = caches[name]._foresight.query(of=module, given_to=module)
            assert query.shape[0] == batch_size


def test_what_was_not_seen_at_work_is_not_foreseen(llama):
    cache = PrefetchingKVCache(llama.config, **FORESEES)
    first, second = (block.self_attn for block in llama.model.layers)
    with cache.attached(llama), torch.no_grad():
        assert cache._foresight.query(of=first, given_to=second) is None
        llama(make_prompt(60).ids, past_key_values=cache)
        assert cache._foresight.query(of=first, given_to=second) is None  # a prompt's states are not kept
        llama(torch.tensor([[7]]), past_key_values=cache)
        assert cache._foresight.query(of=first, given_to=second) is not None
        assert cache._foresight.query(of=None, given_to=second) is None
        llama(torch.tensor([[7, 8]]), past_key_values=cache)
        assert cache._foresight.query(of=first, given_to=second) is None  # what it was called with before is past


def test_an_error_in_a_call_for_a_query_leaves_the_cache_as_it_was(llama, monkeypatch):
    cache = PrefetchingKVCache(llama.config, **FORESEES)
    module = llama.model.layers[0].self_attn
    with cache.attached(llama), torch.no_grad():
        llama(make_prompt(60).ids, past_key_values=cache)
        llama(torch.tensor([[7]]), past_key_values=cache)
        with monkeypatch.context() as patch:
            patch.setattr(module.q_proj, "forward", lambda states: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                cache._foresight.query(of=module, given_to=module)
        assert not hf_attention.only_asking()
        n_tokens = cache.get_seq_length()
        llama(torch.tensor([[8]]), past_key_values=cache)
        assert cache.get_seq_length() == n_tokens + 1
    with pytest.raises(CannotPage, match="did not attend"):
        hf_attention.query_of(torch.nn.Linear(2, 2), (torch.zeros(1, 2),), {})
    assert not hf_attention.only_asking()


def test_asking_in_one_thread_is_asking_in_no_other(llama):
    found = []

    class Slow(torch.nn.Module):
        def forward(self):
            other = threading.Thread(target=lambda: found.append(hf_attention.only_asking()))
            other.start()
            other.join()
            found.append(hf_attention.only_asking())

    with pytest.raises(CannotPage):
        hf_attention.query_of(Slow(), (), {})
    assert found == [False, True]


# --- with layers that change nothing ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def still():
    """A model of four layers that add nothing to the residual stream, so that each has the same input."""
    model = make_model(AutoConfig.for_model("llama", **GROUPED | {"num_hidden_layers": 4}))
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
            assert torch.equal(block.input_layernorm.weight, torch.ones(64))
            block.self_attn.q_proj.weight.mul_(0.2)  # so that no head looks at one page alone
    return model


@pytest.mark.parametrize("lookahead", [1, 2, 3])
def test_with_the_input_of_later_layers_the_foreseen_query_is_theirs(still, lookahead, monkeypatch):
    foreseen, true, original = {}, {}, PagedLayer.attend

    def attend(layer, query, key, value, allowed, scale, *rule):
        if query.shape[2] == 1:
            step = layer.cache.n_decode_steps - 1
            true[layer.layer_idx, step] = query
            place = layer.layer_idx + lookahead
            if place < 4:
                later = layer.cache.paged_layers[place]
                foreseen[place, step] = layer.cache._foresight.query(later.attention, given_to=layer.attention)[0]
        return original(layer, query, key, value, allowed, scale, *rule)

    monkeypatch.setattr(PagedLayer, "attend", attend)
    cache = PrefetchingKVCache(still.config, **FORESEES, lookahead=lookahead)
    with cache.attached(still):
        continue_prompt(still, make_prompt(70, batch=2, padding=9), 6, past_key_values=cache)
    assert len(foreseen) == (4 - lookahead) * 5
    for place, query in foreseen.items():
        assert torch.equal(query, true[place])


@pytest.mark.parametrize("predictor", ["cross_layer", "ranked"])
@pytest.mark.parametrize("selector", ["quest", "cuboid", "mean_key", "oracle"])
def test_with_the_input_of_the_next_layer_cross_layer_names_what_the_selector_chooses(
    still, selector, predictor, monkeypatch
):
    """As it weighs nothing but the foreseen shares, and so does `ranked` with the other exponents 0."""
    guessed, wanted = {}, defaultdict(dict)
    plan, look_ahead = PrefetchingKVCache._plan_copies, PrefetchingKVCache.look_ahead

    def noting_plan(cache, later, lane, step, guesses):
        guessed[later.layer_idx, lane, step] = list(guesses)
        return plan(cache, later, lane, step, guesses)

    def noting_look_ahead(cache, layer, sequence, pages):
        if cache.phase == "decode":
            place = layer.layer_idx, sequence.lane, cache._step
            wanted[place] = set(pages) - sequence.pinned_pages(), sequence.n_tokens
        look_ahead(cache, layer, sequence, pages)

    monkeypatch.setattr(PrefetchingKVCache, "_plan_copies", noting_plan)
    monkeypatch.setattr(PrefetchingKVCache, "look_ahead", noting_look_ahead)
    if predictor == "ranked":
        predictor = {"name": "ranked", "confidence_weight": 0, "frequency_weight": 0}
    options = PAGING | {"page_size": 4, "selector": selector, "attention_pages": 6, "predictor": predictor}
    cache = PrefetchingKVCache(still.config, **options, prefetch_k=2, overfetch=None)
    with cache.attached(still):
        continue_prompt(still, make_prompt(70, batch=2, padding=9), 12, past_key_values=cache)
    n_compared = 0
    for place, guesses in guessed.items():
        layer, _, step = place
        if layer == 0:
            assert predictor != "cross_layer" or guesses == []  # of the next step nothing is foreseen
            continue
        chosen, n_tokens = wanted[place]
        if n_tokens % 4 == 1:  # a page has opened since, and another one is the last
            continue
        if step == 0 and predictor != "cross_layer":  # ranked says nothing of a layer that it has never seen
            continue
        assert {page for page, _ in guesses[: len(chosen)]} == chosen
        n_compared += 1
    assert n_compared > 30


def test_the_foreseen_shares_are_of_the_pages_that_there_are_to_choose_from(still, monkeypatch):
    hints = []
    monkeypatch.setattr(CrossLayer, "hint", lambda self, layer, step, shares, n: hints.append((shares, n)))
    cache = PrefetchingKVCache(still.config, **FORESEES)
    with cache.attached(still):
        continue_prompt(still, make_prompt(66), 4, past_key_values=cache)
    for shares, n in hints:
        assert list(shares) == list(range(1, 8))  # page 0 is pinned, and page 8 is open
        assert sum(shares.values()) == pytest.approx(1.0, abs=1e-5)
        assert n == QUEST["attention_pages"] - 2
    assert len(hints) == 3 * 3


def test_a_cache_that_is_gone_is_not_held_by_what_watched_for_it(llama):
    foresight = QueryForesight(cache := DynamicCache(config=llama.config))
    del cache
    with foresight.watching(llama), torch.no_grad():
        llama(torch.tensor([[7]]))
    assert foresight._cache() is None and not foresight._calls
