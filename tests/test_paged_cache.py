"""The paged cache against transformers' own: the same tokens, within the budget, whatever the model and the prompt."""

from __future__ import annotations

import contextlib
import gc
import weakref

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import ALL_SLIDING, CONFIGS, continue_prompt, make_model, make_prompt
from transformers import DynamicCache, FalconConfig
from transformers.models.falcon import FalconForCausalLM

import hf_attention
from cache_settings import Paging
from hf_attention import CannotPage
from kv_paging import PagedKVCache
from page_store import TransferFailed

SMALL = {"page_size": 16, "max_gpu_pages": 3, "staging_pages": 2, "link": "memory"}


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    return make_model(CONFIGS[request.param])


@pytest.fixture(scope="module")
def llama():
    return make_model(CONFIGS["llama_gqa"])


def paged_tokens(model, prompt, attach=True, **options):
    """Tokens with a paged cache, and the cache."""
    paging = {key: options.pop(key) for key in list(options) if key in Paging.__dataclass_fields__}
    cache = PagedKVCache(model.config, **SMALL | paging)
    with cache.attached(model) if attach else contextlib.nullcontext():
        return continue_prompt(model, prompt, past_key_values=cache, **options), cache


def test_random_models_do_not_repeat_one_token(llama):
    """Else equal tokens would prove nothing."""
    assert len(set(continue_prompt(llama, make_prompt(60))[0, 60:].tolist())) > 5


@pytest.mark.parametrize("attach", [True, False], ids=["attached", "not_attached"])
@pytest.mark.parametrize("chunk", [None, 24], ids=["whole_prompt", "chunked_prompt"])
@pytest.mark.parametrize("padding", [0, 23], ids=["no_padding", "left_padding"])
def test_tokens_are_those_of_transformers_own_cache(model, padding, chunk, attach):
    prompt = make_prompt(100, batch=2, padding=padding)
    tokens, _ = paged_tokens(model, prompt, attach, prefill_chunk_size=chunk)
    assert torch.equal(tokens, continue_prompt(model, prompt))


@pytest.mark.parametrize("policy", ["lru", "mru", "fifo"])
def test_under_exact_attention_any_policy_moves_just_what_does_not_fit(llama, policy):
    _, cache = paged_tokens(llama, make_prompt(100), policy=policy)
    decode = cache.recorder.snapshot("decode")
    assert decode["misses"] == decode["must_move"] > 0
    assert decode["late"] == 0


def test_hits_are_the_budget_over_the_pages(llama):
    """64 tokens are 4 pages of 16; the 12 decode steps make positions 65..76, all in page 5, with a budget of 3.

    So each layer in each step finds 3 pages and misses 2.
    """
    _, cache = paged_tokens(llama, make_prompt(64), new_tokens=13)
    decode = cache.recorder.snapshot("decode")
    assert (decode["steps"], decode["hits"], decode["misses"]) == (12, 12 * 2 * 3, 12 * 2 * 2)


def test_each_full_page_is_written_to_the_host_once(llama):
    """100 + 24 tokens, the last of them not fed back, are 7 full pages of 16, in 2 layers."""
    _, cache = paged_tokens(llama, make_prompt(100))
    written = sum(cache.recorder.snapshot(phase)["d2h_pages"] for phase in ("prefill", "decode"))
    assert written == 7 * 2


def test_the_device_pool_does_not_grow_with_the_context(llama):
    _, short = paged_tokens(llama, make_prompt(20))
    _, long = paged_tokens(llama, make_prompt(400), prefill_chunk_size=32)
    one_page = 2 * 2 * 16 * 16 * 4  # K and V, 2 heads, 16 positions, 16 channels, 4 bytes
    assert short.memory()["device_kv_bytes"] == long.memory()["device_kv_bytes"] == 2 * (3 + 2) * one_page
    assert long.memory()["host_kv_bytes"] >= 2 * (400 // 16) * one_page


def test_the_budget_holds_at_every_wave(llama, most_pages):
    paged_tokens(llama, make_prompt(200), prefill_chunk_size=40)
    assert most_pages["resident"] == 3
    assert 3 < most_pages["on_device"] <= 3 + 2


def test_sink_and_recent_pages_are_never_copied_in(llama, monkeypatch):
    fetched = []
    from paged_sequence import PagedSequence

    original = PagedSequence.fetch

    def noted(sequence, name, pages, slots, **counts):
        fetched.extend(pages)
        return original(sequence, name, pages, slots, **counts)

    monkeypatch.setattr(PagedSequence, "fetch", noted)
    paged_tokens(llama, make_prompt(64), new_tokens=13, sink_pages=1)
    assert {1, 2, 3} >= set(fetched) and fetched


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("append"), st.integers(1, 9)),
            st.tuples(st.just("crop"), st.integers(1, 9)),
            st.tuples(st.just("select"), st.permutations([0, 1])),
            st.tuples(st.just("reset"), st.just(0)),
        ),
        max_size=12,
    ),
    page_size=st.integers(1, 6),
)
def test_no_position_is_lost_or_duplicated_whatever_is_done(llama, steps, page_size):
    """The same operations on transformers' DynamicCache give the same keys and values, position by position."""
    config = llama.config
    paged = PagedKVCache(config, page_size=page_size, max_gpu_pages=3, staging_pages=1, link="memory")
    naive = DynamicCache(config=config)
    generator = torch.Generator().manual_seed(page_size)
    for verb, argument in [("append", 3), *steps]:
        if verb == "append":
            for layer in range(config.num_hidden_layers):
                keys, values = torch.randn(2, 2, 2, argument, 16, generator=generator)
                got = paged.update(keys, values, layer)
                expected = naive.update(keys, values, layer)
                assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
        elif verb == "crop":
            count = min(argument, naive.get_seq_length())
            paged.crop(-count)
            naive.crop(-count)
        elif verb == "select":
            paged.reorder_cache(torch.tensor(argument))
            naive.reorder_cache(torch.tensor(argument))
        else:
            paged.reset()
            naive.reset()
        assert paged.get_seq_length() == naive.get_seq_length()


def test_beam_search_gives_the_same_beams(llama):
    prompt = make_prompt(50)
    expected = continue_prompt(llama, prompt, num_beams=3)
    tokens, _ = paged_tokens(llama, prompt, num_beams=3)
    assert torch.equal(tokens, expected)


def test_sampling_with_one_seed_gives_the_same_tokens(llama):
    prompt, options = make_prompt(50), {"do_sample": True, "temperature": 1.3, "top_k": 20}
    torch.manual_seed(7)
    expected = continue_prompt(llama, prompt, **options)
    torch.manual_seed(7)
    tokens, _ = paged_tokens(llama, prompt, **options)
    assert torch.equal(tokens, expected)


def test_a_second_generate_call_continues_the_conversation(llama):
    first = make_prompt(40)
    cache, naive = PagedKVCache(llama.config, **SMALL), DynamicCache(config=llama.config)
    with cache.attached(llama):
        said = continue_prompt(llama, first, past_key_values=cache)
        more = torch.cat([said, make_prompt(30, seed=1).ids], dim=1)
        answer = llama.generate(
            more, attention_mask=torch.ones_like(more), past_key_values=cache, max_new_tokens=20, do_sample=False
        )
    continue_prompt(llama, first, past_key_values=naive)
    expected = llama.generate(
        more, attention_mask=torch.ones_like(more), past_key_values=naive, max_new_tokens=20, do_sample=False
    )
    assert torch.equal(answer, expected)


def test_a_reset_cache_serves_another_prompt(llama):
    _, cache = paged_tokens(llama, make_prompt(90))
    cache.reset()
    prompt = make_prompt(70, seed=3)
    with cache.attached(llama):
        tokens = continue_prompt(llama, prompt, past_key_values=cache)
    assert torch.equal(tokens, continue_prompt(llama, prompt))


def test_a_cache_filled_in_inference_mode_can_be_used_outside(llama):
    prompt = make_prompt(60)
    cache = PagedKVCache(llama.config, **SMALL)
    with torch.inference_mode(), cache.attached(llama):
        continue_prompt(llama, prompt, past_key_values=cache)
    cache.crop(-30)
    assert cache.get_seq_length() == 60 + 23 - 30


def test_attention_is_restored_also_after_an_error(llama):
    before = llama.config._attn_implementation
    cache = PagedKVCache(llama.config, **SMALL)
    with pytest.raises(RuntimeError, match="on purpose"), cache.attached(llama):
        assert llama.config._attn_implementation == hf_attention.IMPLEMENTATION
        raise RuntimeError("on purpose")
    assert llama.config._attn_implementation == before
    prompt = make_prompt(30)
    assert torch.equal(continue_prompt(llama, prompt), continue_prompt(llama, prompt, use_cache=False))


@pytest.mark.parametrize("fails", [False, True])
def test_a_detached_cache_lets_go_of_the_models_modules(fails):
    """A cache that is kept for its figures keeps no model alive."""
    model = make_model(CONFIGS["llama_gqa"])
    cache = PagedKVCache(model.config, **SMALL)
    with contextlib.suppress(ZeroDivisionError), cache.attached(model):
        continue_prompt(model, make_prompt(60), 3, past_key_values=cache)
        modules = [layer.self_attn for layer in model.model.layers]
        assert all(layer.attention is module for layer, module in zip(cache.paged_layers, modules, strict=True))
        if fails:
            raise ZeroDivisionError
    assert [layer.attention for layer in cache.paged_layers] == [None] * len(modules)
    gone = weakref.ref(modules[0])
    del model, modules
    gc.collect()
    assert gone() is None


def test_an_attached_model_called_without_its_cache_says_so(llama):
    cache = PagedKVCache(llama.config, **SMALL)
    with cache.attached(llama), pytest.raises(CannotPage, match="pass the attached cache"):
        llama(make_prompt(10).ids, past_key_values=DynamicCache(config=llama.config))


def test_a_model_that_does_not_choose_attention_by_name_is_refused_attached_and_works_not_attached():
    config = FalconConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=200, bos_token_id=None, eos_token_id=None
    )
    torch.manual_seed(0)
    falcon = FalconForCausalLM(config).eval()
    prompt = make_prompt(50)
    cache = PagedKVCache(config, **SMALL)
    with pytest.raises(CannotPage, match="AttentionInterface"), cache.attached(falcon):
        pass
    assert torch.equal(continue_prompt(falcon, prompt, past_key_values=cache), continue_prompt(falcon, prompt))


def test_a_model_without_full_attention_is_refused():
    with pytest.raises(CannotPage, match="nothing to page"):
        PagedKVCache(ALL_SLIDING)


@pytest.mark.parametrize(
    ("paging", "message"),
    [
        ({"max_gpu_pages": 2}, "max_gpu_pages is 2, but sink_pages 1"),
        ({"page_size": 0}, "page_size must be at least 1"),
        ({"recent_pages": 0}, "recent_pages must be at least 1"),
        ({"policy": "lur"}, "did you mean 'lru'"),
        ({"selector": "some", "attention_pages": 4}, "unknown selector"),
        ({"link": "pcie9-x16"}, "did you mean 'pcie"),
        ({"selectr": "quest"}, "unknown setting 'selectr'; did you mean 'selector'?"),
        ({"selector": object()}, "selector must be a name or a mapping with 'name', not <object"),
        ({"attention_pages": 4}, "'attention_pages' has no effect with 'selector: all'"),
        ({"selector": "quest"}, "this selector needs to know how many pages to attend to"),
        ({"selector": "quest", "attention_pages": 1}, "attention_pages is 1, but sink_pages 1"),
        ({"granularity": "head"}, "granularity must be layer or kv_head, not 'head'"),
        ({"access_order": "any"}, "access_order must be resident_first or position, not 'any'"),
        ({"selector": "quest", "attention_fraction": 1.5}, "attention_fraction must be above 0 and at most 1"),
        ({"host_pages": -1}, "host_pages must be at least 0"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_as_the_cache_is_made(llama, paging, message):
    with pytest.raises(ValueError, match=message):
        PagedKVCache(llama.config, **paging)


def test_a_failing_copy_ends_the_generation_with_its_cause(llama, monkeypatch):
    import page_store

    def fail(destination, source):
        raise OSError("the bus is on fire")

    monkeypatch.setattr(page_store, "_copy_bytes", fail)
    with pytest.raises(TransferFailed, match="the bus is on fire"):
        paged_tokens(llama, make_prompt(100))


def test_a_failed_generation_is_refused_until_reset_and_works_after(llama, monkeypatch):
    import paged_layer

    prompt, cache = make_prompt(100), PagedKVCache(llama.config, **SMALL)
    original, calls = paged_layer.attend_parts, []

    def fail_late(*arguments, **options):
        calls.append(1)
        if len(calls) == 40:
            raise MemoryError("on purpose")
        return original(*arguments, **options)

    monkeypatch.setattr(paged_layer, "attend_parts", fail_late)
    with cache.attached(llama):
        with pytest.raises(MemoryError, match="on purpose"):
            continue_prompt(llama, prompt, past_key_values=cache)
        for use in (
            lambda: cache.crop(-1),
            lambda: cache.reorder_cache(torch.tensor([0])),
            lambda: cache.batch_repeat_interleave(2),
            lambda: cache.batch_select_indices(torch.tensor([0])),
            lambda: continue_prompt(llama, make_prompt(200), past_key_values=cache),
        ):
            with pytest.raises(RuntimeError, match=r"call reset\(\) first"):
                use()
        cache.reset()
        tokens = continue_prompt(llama, prompt, past_key_values=cache)
    assert torch.equal(tokens, continue_prompt(llama, prompt))


def test_a_cache_can_be_reset_after_a_failed_copy(llama, monkeypatch):
    import page_store

    prompt, cache = make_prompt(100), PagedKVCache(llama.config, **SMALL)
    with cache.attached(llama):
        with monkeypatch.context() as broken:
            broken.setattr(page_store, "_copy_bytes", lambda destination, source: 1 / 0)
            with pytest.raises(TransferFailed):
                continue_prompt(llama, prompt, past_key_values=cache)
        cache.reset()
        tokens = continue_prompt(llama, prompt, past_key_values=cache)
    assert torch.equal(tokens, continue_prompt(llama, prompt))


def test_a_dropped_cache_is_gone_at_once(llama):
    """Without waiting for the garbage collector: else the next run would be measured with its memory."""
    _, cache = paged_tokens(llama, make_prompt(60))
    gone = weakref.ref(cache), weakref.ref(cache.paged_layers[0].pages.store)
    gc.disable()
    try:
        del cache
        assert [reference() for reference in gone] == [None, None]
    finally:
        gc.enable()


def test_a_prompt_chunk_of_one_token_is_prefill_where_the_prompt_is_known(llama):
    """65 tokens in chunks of 32 are three prefill steps; 8 new tokens are seven decode steps."""
    cache = PagedKVCache(llama.config, **SMALL)
    cache.prompt_tokens = 65
    with cache.attached(llama):
        continue_prompt(llama, make_prompt(65), 8, past_key_values=cache, prefill_chunk_size=32)
    assert [cache.recorder.snapshot(phase)["steps"] for phase in ("prefill", "decode")] == [3, 7]


def test_half_precision_agrees_with_transformers_within_its_rounding(llama):
    """In bfloat16 logits of another summation order differ in the last bits, so logits are compared, not tokens."""
    model = make_model(CONFIGS["llama_gqa"]).bfloat16()
    prompt = make_prompt(100)
    cache = PagedKVCache(model.config, **SMALL)
    with torch.no_grad():
        expected = model(prompt.ids).logits.float()
        with cache.attached(model):
            chunks = [model(chunk, past_key_values=cache).logits for chunk in prompt.ids.split(30, dim=1)]
    got = torch.cat(chunks, dim=1).float()
    assert (got - expected).abs().max() <= 0.05 * expected.abs().max()


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_cuda_the_tokens_are_those_of_the_cache_without_paging(dtype):
    model = make_model(CONFIGS["llama_gqa"]).to("cuda", dtype)
    prompt = make_prompt(100)
    prompt = type(prompt)(prompt.ids.cuda(), prompt.mask.cuda())
    tokens, cache = paged_tokens(model, prompt, link="auto")
    roomy, _ = paged_tokens(model, prompt, link="auto", max_gpu_pages=16)
    assert torch.equal(tokens, roomy)
    assert cache.recorder.snapshot("decode")["misses"] > 0
    if dtype is torch.float32:
        assert torch.equal(tokens, continue_prompt(model, prompt))
