"""A step that repeats the one before it does just what asking anew would have done: same bits, same counts."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from tiny_models import CONFIGS, continue_prompt, logits_and_counts, make_model, make_prompt

import paged_layer
import pool_reads
from kv_paging import PagedKVCache
from page_policies import LFU
from predictive_prefetch import PrefetchingKVCache
from standing_step import StandingStep

ROOMY = {"page_size": 16, "max_gpu_pages": 20, "staging_pages": 2, "link": "memory"}
N_PROMPT, N_NEW, N_LAYERS = 90, 60, 2  # as `logits_and_counts` has them


@pytest.fixture(scope="module")
def llama():
    return make_model(CONFIGS["llama_gqa"])


class Counted(StandingStep):
    """A standing step that counts how often it stood in for a request."""

    times = 0

    def attend(self, query, key, value):
        Counted.times += 1
        return super().attend(query, key, value)


@pytest.fixture
def repeats(monkeypatch):
    """Tells how many steps of layers were repeats."""
    Counted.times = 0
    monkeypatch.setattr(paged_layer, "StandingStep", Counted)
    return lambda: Counted.times


def asking_anew(monkeypatch):
    monkeypatch.setattr(paged_layer.StandingStep, "after", classmethod(lambda cls, *args: None))


@pytest.mark.parametrize("page_size", [1, 2, 16, 64, 256])
@pytest.mark.parametrize("policy", ["lru", "mru", "fifo", "lfu", "clock", "s3fifo"])
def test_a_repeated_step_gives_the_same_bits_and_counts_as_one_that_asks(
    llama, monkeypatch, repeats, policy, page_size
):
    settings = ROOMY | {"page_size": page_size, "policy": policy, "max_gpu_pages": 160, "record_pages": True}
    fast = logits_and_counts(llama, PagedKVCache(llama.config, **settings))
    boundaries = len([n for n in range(N_PROMPT, N_PROMPT + N_NEW) if n % page_size in (0, page_size - 1)])
    assert repeats() >= N_LAYERS * (N_NEW - 2 * boundaries - 2) if page_size > 2 else repeats() == 0
    asking_anew(monkeypatch)
    before = repeats()
    slow = logits_and_counts(llama, PagedKVCache(llama.config, **settings))
    assert repeats() == before
    assert torch.equal(fast[0], slow[0])
    assert fast[1:] == slow[1:]


def crop(cache):
    cache.crop(-3)


def crop_to_a_whole_page(cache):
    cache.crop(-(cache.get_seq_length() % 16))


def reorder(cache):
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([1]))


def evict(cache):
    """A page goes by a way that attention has no part in, and must be fetched again."""
    for layer in cache.paged_layers:
        layer.pages.store.drain()
        table = layer.pages.sequences[0].table
        table.evict({page for page in table.resident if page != 2})


@pytest.mark.parametrize("change", [crop, crop_to_a_whole_page, reorder, evict])
def test_what_changes_the_pages_ends_the_repeats_and_changes_no_answer(llama, monkeypatch, repeats, change):
    fast = logits_and_counts(llama, PagedKVCache(llama.config, **ROOMY), change=change)
    assert repeats() > N_LAYERS * N_NEW // 3
    asking_anew(monkeypatch)
    slow = logits_and_counts(llama, PagedKVCache(llama.config, **ROOMY), change=change)
    assert torch.equal(fast[0], slow[0])
    assert fast[1] == slow[1]


def test_cropping_nothing_ends_no_repeats(llama, repeats):
    logits_and_counts(llama, PagedKVCache(llama.config, **ROOMY))
    undisturbed = repeats()
    logits_and_counts(llama, PagedKVCache(llama.config, **ROOMY), change=lambda cache: cache.crop(0))
    assert repeats() == 2 * undisturbed > 0


@pytest.mark.parametrize(
    "settings",
    [
        {"max_gpu_pages": 4},  # pages are fetched in every step
        {"selector": "quest", "attention_fraction": 0.5},
        {"policy": "attention"},  # has to be told what each page's share was
        {"access_order": "position"},
    ],
    ids=str,
)
def test_no_step_is_repeated_where_something_has_to_be_asked_or_told(llama, repeats, settings):
    logits_and_counts(llama, PagedKVCache(llama.config, **ROOMY | settings))
    assert repeats() == 0


def test_a_predictor_that_learns_from_shares_is_told_of_every_step(llama, repeats):
    logits_and_counts(llama, PrefetchingKVCache(llama.config, **ROOMY, predictor="ema", prefetch_k=1))
    assert repeats() == 0


def test_a_predictor_that_does_not_hears_of_every_request(llama, repeats):
    heard = []

    class Hearing(PrefetchingKVCache):
        def look_ahead(self, layer, sequence, wanted):
            heard.append((self.phase, layer.layer_idx, list(wanted)))
            super().look_ahead(layer, sequence, wanted)

    logits_and_counts(llama, Hearing(llama.config, **ROOMY, predictor="frequency", prefetch_k=1))
    assert repeats() > N_LAYERS * N_NEW // 2
    decode = [wanted for phase, layer, wanted in heard if phase == "decode" and layer == 0]
    assert decode == [list(range(-(-n // 16))) for n in range(N_PROMPT + 1, N_PROMPT + N_NEW + 1)]


def test_two_rows_and_padding_ask_for_their_pages(llama, repeats):
    for prompt in (make_prompt(40, batch=2), make_prompt(40, padding=7)):
        cache = PagedKVCache(llama.config, **ROOMY)
        with cache.attached(llama):
            ours = continue_prompt(llama, prompt, past_key_values=cache)
        assert torch.equal(ours, continue_prompt(llama, prompt))
    assert repeats() == 0


def test_a_policy_that_touches_in_its_own_way_is_told_of_every_step(llama, repeats, monkeypatch):
    touched, original = [], LFU.touch

    def touch(self, page):
        touched.append(page)
        original(self, page)

    monkeypatch.setattr(LFU, "touch", touch)
    logits_and_counts(llama, PagedKVCache(llama.config, **ROOMY, policy="lfu"))
    assert repeats() > N_LAYERS * N_NEW // 2
    per_step = [-(-n // 16) for n in range(N_PROMPT + 1, N_PROMPT + N_NEW + 1)]
    assert len(touched) == N_LAYERS * sum(per_step)


def pools_of(cache):
    """The pools of all layers, to see whether they are still there; the thread that copies has let go of them."""
    for transport in cache._transports.values():
        transport.busy_ms()
    return [weakref.ref(layer.pages.store.pool) for layer in cache.paged_layers]


def test_no_old_pool_is_held_once_rows_are_dropped_or_memory_is_taken_anew(llama):
    cache = PagedKVCache(llama.config, **ROOMY)
    with cache.attached(llama), torch.inference_mode():
        out = llama(make_prompt(40, batch=4).ids, past_key_values=cache).logits[:, -1:]
        for _ in range(4):
            out = llama(out.argmax(-1), past_key_values=cache).logits
        four = pools_of(cache)
        cache.batch_select_indices(torch.tensor([0]))
        assert [pool() for pool in four] == [None] * N_LAYERS
        out = out[:1]
        for _ in range(4):
            out = llama(out.argmax(-1), past_key_values=cache).logits
        one = pools_of(cache)
        cache.torn = True
        cache.reset()
        assert [pool() for pool in one] == [None] * N_LAYERS


def test_a_value_alone_may_need_a_gradient(llama):
    """As with adapters on the value projection of the first layer."""
    model = copy.deepcopy(llama).requires_grad_(False)
    model.model.layers[0].self_attn.v_proj.weight.requires_grad_(True)
    prompt, cache = make_prompt(40), PagedKVCache(model.config, **ROOMY)
    whole = model(torch.cat([prompt.ids, prompt.ids[:, :6]], dim=1)).logits[:, -6:]
    with cache.attached(model):
        model(prompt.ids, past_key_values=cache)
        ours = [model(prompt.ids[:, step : step + 1], past_key_values=cache).logits for step in range(6)]
    assert torch.allclose(torch.cat(ours, dim=1), whole, atol=1e-4)


def test_a_step_may_repeat_one_made_in_inference_mode_outside_of_it(llama, repeats):
    prompt, cache = make_prompt(40), PagedKVCache(llama.config, **ROOMY)
    with cache.attached(llama):
        with torch.inference_mode():
            llama(prompt.ids, past_key_values=cache)
            for step in range(3):
                llama(prompt.ids[:, step : step + 1], past_key_values=cache)
        before = repeats()
        with torch.no_grad():
            ours = llama(prompt.ids[:, 3:4], past_key_values=cache).logits
    assert repeats() == before + N_LAYERS
    whole = llama(torch.cat([prompt.ids, prompt.ids[:, :4]], dim=1)).logits[:, -1:]
    assert torch.allclose(ours, whole, atol=1e-4)


def test_who_overrides_attended_is_told_of_every_step(llama, repeats):
    told = []

    class Told(PagedKVCache):
        def attended(self, layer, sequence, attention):
            told.append(len(attention.mass()))

    logits_and_counts(llama, Told(llama.config, **ROOMY))
    assert repeats() == 0
    assert told == [-(-n // 16) for n in range(N_PROMPT + 1, N_PROMPT + N_NEW + 1) for _ in range(N_LAYERS)]


def test_positions_that_were_cropped_leave_no_trace_where_pages_are_gathered(llama, monkeypatch):
    """What is not written of the open page is multiplied by 0 there, which NaN would outlive."""
    settings = ROOMY | {"page_size": 4, "max_gpu_pages": 40, "policy": "attention"}
    prompt, cache = make_prompt(70), PagedKVCache(llama.config, **settings)
    monkeypatch.setattr(pool_reads, "CALL_BYTES", {"cpu": 0})
    with cache.attached(llama), torch.inference_mode():
        llama(prompt.ids, past_key_values=cache)
        llama(prompt.ids[:, :1], past_key_values=cache)
        for layer in cache.paged_layers:
            sequence = layer.pages.sequences[0]
            sequence.store.pool[sequence.table.resident[17], 2:] = float("nan")
        cache.crop(-1)
        for layer in cache.paged_layers:  # so that pages no longer lie in one stretch
            layer.pages.store.drain()
            table = layer.pages.sequences[0].table
            for page in (3, 8):
                table.evict({one for one in table.resident if one != page})
        monkeypatch.setattr(pool_reads, "CALL_BYTES", {"cpu": 10**12})
        ours = llama(prompt.ids[:, :1], past_key_values=cache).logits
    whole = llama(torch.cat([prompt.ids, prompt.ids[:, :1]], dim=1)).logits[:, -1:]
    assert torch.allclose(ours, whole, atol=1e-4)
