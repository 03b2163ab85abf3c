"""The paged cache wherever transformers' own cache goes: every way to generate, and every verb of a cache."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from accelerate import dispatch_model
from tiny_models import CONFIGS, Prompt, continue_prompt, make_model, make_prompt
from transformers import DynamicCache

from hf_attention import CannotPage
from kv_paging import PagedKVCache
from predictive_prefetch import PrefetchingKVCache

SMALL = {"page_size": 8, "max_gpu_pages": 4, "staging_pages": 3, "link": "memory"}
MODELS = ["llama_gqa", "gemma3_hybrid_sliding"]
KINDS = {
    "reactive": (PagedKVCache, {}),
    "on_disk": (PagedKVCache, {"host_pages": 2}),
    "one_by_one": (PagedKVCache, {"access_order": "position"}),
    "predictive": (PrefetchingKVCache, {"predictor": "last_step", "prefetch_k": 2}),
}
attached_or_not = pytest.mark.parametrize("attach", [True, False], ids=["attached", "not_attached"])


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return make_model(CONFIGS[request.param])


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return KINDS[request.param]


def make_cache(model, kind, **paging):
    cls, options = kind
    return cls(model.config, **SMALL | options | paging)


def using(cache, model, attach):
    return cache.attached(model) if attach else contextlib.nullcontext()


def generated(model, prompt, kind, attach, **options):
    cache = make_cache(model, kind)
    with using(cache, model, attach):
        return continue_prompt(model, prompt, past_key_values=cache, **options)


GENERATION = {
    "beams": {"num_beams": 3},
    "several_beams_returned": {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
    "sampled": {"do_sample": True, "top_k": 20},
    "sampled_beams": {"do_sample": True, "num_beams": 3},
    "several_samples": {"do_sample": True, "num_return_sequences": 3},
    "chunked_prompt": {"prefill_chunk_size": 17},
    "repetition_penalty": {"repetition_penalty": 1.3},
}


@attached_or_not
@pytest.mark.parametrize("how", GENERATION)
def test_every_way_to_generate_gives_the_same_tokens(model, kind, how, attach):
    prompt = make_prompt(60, batch=2, padding=11)
    results = []
    for run in (
        lambda: continue_prompt(
            model, prompt, 14, past_key_values=DynamicCache(config=model.config), **GENERATION[how]
        ),
        lambda: generated(model, prompt, kind, attach, new_tokens=14, **GENERATION[how]),
    ):
        torch.manual_seed(5)
        results.append(run())
    assert torch.equal(*results)


@attached_or_not
def test_an_assistants_draft_is_checked_and_cropped(kind, attach):
    """Prompt lookup proposes tokens that occurred before, and crops the cache by those that were wrong."""
    model = make_model(CONFIGS["llama_gqa"])
    ids = torch.randint(5, 200, (1, 20), generator=torch.Generator().manual_seed(2)).repeat(1, 4)
    prompt = Prompt(ids, torch.ones_like(ids))
    cropped = []
    cache = make_cache(model, kind)
    original = cache.crop
    cache.crop = lambda count: cropped.append(count) or original(count)
    with using(cache, model, attach):
        tokens = continue_prompt(model, prompt, 40, past_key_values=cache, prompt_lookup_num_tokens=4)
    assert torch.equal(tokens, continue_prompt(model, prompt, 40))
    assert any(count < 0 for count in cropped)


@attached_or_not
def test_a_conversation_goes_on_in_a_batch_of_rows_of_different_lengths(model, kind, attach):
    """The second turn is padded within the context, where the first rows' answers are followed by a longer question."""
    first, second = make_prompt(50, batch=2, padding=9), make_prompt(30, batch=2, padding=6, seed=1)
    answers = []
    for cache in (DynamicCache(config=model.config), make_cache(model, kind)):
        context = using(cache, model, attach) if isinstance(cache, PagedKVCache) else contextlib.nullcontext()
        with context:
            said = continue_prompt(model, first, 12, past_key_values=cache)
            new = said.shape[1] - first.ids.shape[1]
            ids = torch.cat([said, second.ids], dim=1)
            mask = torch.cat([first.mask, torch.ones(2, new, dtype=torch.long), second.mask], dim=1)
            answers.append(continue_prompt(model, Prompt(ids, mask), 12, past_key_values=cache))
    assert torch.equal(*answers)


@attached_or_not
def test_rows_can_be_repeated_and_dropped_between_two_calls(model, kind, attach):
    prompt = make_prompt(45, batch=2, padding=5)
    outputs = []
    for cache in (DynamicCache(config=model.config), make_cache(model, kind)):
        context = using(cache, model, attach) if isinstance(cache, PagedKVCache) else contextlib.nullcontext()
        with context, torch.no_grad():
            model(prompt.ids, attention_mask=prompt.mask, past_key_values=cache)
            cache.batch_repeat_interleave(3)
            mask = prompt.mask.repeat_interleave(3, dim=0)
            rows = torch.tensor([5, 0, 2, 3])
            cache.batch_select_indices(rows)
            mask = mask[rows]
            for step in range(9):
                ids = (torch.arange(4)[:, None] * 7 + step + 5) % 200
                mask = torch.cat([mask, torch.ones(4, 1, dtype=torch.long)], dim=1)
                logits = model(ids, attention_mask=mask, past_key_values=cache).logits
            if not any(cache.is_sliding):  # a full sliding window cannot be cropped, by transformers' rule
                cache.crop(-6)
                logits = model(ids, attention_mask=mask[:, :-5], past_key_values=cache).logits
            outputs.append(logits)
    torch.testing.assert_close(*outputs, atol=2e-4, rtol=1e-4)


def test_a_context_written_unattached_with_padding_goes_on_attached(model, kind):
    """Not attached the cache sees no mask and stores the padding; attached it finds out and takes it away."""
    prompt = make_prompt(50, batch=2, padding=13)
    cache, naive = make_cache(model, kind), DynamicCache(config=model.config)
    for one in (cache, naive):
        said = continue_prompt(model, prompt, 10, past_key_values=one)
    mask = torch.cat([prompt.mask, torch.ones(2, 10, dtype=torch.long)], dim=1)
    expected = continue_prompt(model, Prompt(said, mask), 10, past_key_values=naive)
    with cache.attached(model):
        assert torch.equal(continue_prompt(model, Prompt(said, mask), 10, past_key_values=cache), expected)
    assert [len(sequence.holes) for sequence in cache.paged_layers[0].pages.sequences] == [13, 0]


def test_a_context_written_attached_with_padding_goes_on_unattached(model, kind):
    prompt = make_prompt(50, batch=2, padding=13)
    cache, naive = make_cache(model, kind), DynamicCache(config=model.config)
    with cache.attached(model):
        said = continue_prompt(model, prompt, 10, past_key_values=cache)
    continue_prompt(model, prompt, 10, past_key_values=naive)
    mask = torch.cat([prompt.mask, torch.ones(2, 10, dtype=torch.long)], dim=1)
    again = [continue_prompt(model, Prompt(said, mask), 10, past_key_values=one) for one in (naive, cache)]
    assert torch.equal(*again)


@attached_or_not
def test_one_prompt_is_continued_several_times_from_copies(model, kind, attach):
    """As transformers' guide to reusing a prompt's cache does it."""
    prompt, mine, naive = (
        make_prompt(60, batch=2, padding=7),
        make_cache(model, kind),
        DynamicCache(config=model.config),
    )
    with torch.no_grad():
        model(prompt.ids, attention_mask=prompt.mask, past_key_values=naive)
        with using(mine, model, attach):
            model(prompt.ids, attention_mask=prompt.mask, past_key_values=mine)
    for seed in (1, 2):
        more = make_prompt(11, batch=2, seed=seed)
        whole = Prompt(torch.cat([prompt.ids, more.ids], dim=1), torch.cat([prompt.mask, more.mask], dim=1))
        other = copy.deepcopy(mine)
        with using(other, model, attach):
            tokens = continue_prompt(model, whole, 12, past_key_values=other)
        assert torch.equal(tokens, continue_prompt(model, whole, 12, past_key_values=copy.deepcopy(naive)))
    assert mine.get_seq_length() == 60


def test_a_cache_attached_twice_is_attached_until_the_last_exit(model, kind):
    prompt, cache = make_prompt(40), make_cache(model, kind)
    with cache.attached(model):
        with cache.attached(model):
            pass
        assert torch.equal(continue_prompt(model, prompt, past_key_values=cache), continue_prompt_alone(model, prompt))


def continue_prompt_alone(model, prompt):
    return continue_prompt(make_model(type(model.config).from_dict(model.config.to_dict())), prompt)


def test_what_is_refused_changes_nothing(model, kind):
    cache, prompt = make_cache(model, kind), make_prompt(60)
    with cache.attached(model):
        said = continue_prompt(model, prompt, 5, past_key_values=cache)
        with pytest.raises(ValueError, match="negative count"):
            cache.crop(3)
        if any(cache.is_sliding):
            with pytest.raises(RuntimeError, match="sliding window size was already reached"):
                cache.crop(-3)
        assert {layer.get_seq_length() for layer in cache.layers} == {64}
        tokens = continue_prompt(model, Prompt(said, torch.ones_like(said)), 5, past_key_values=cache)
    assert torch.equal(tokens, continue_prompt(model, prompt, 10))


def test_rows_of_a_cache_that_was_never_filled_cannot_be_selected_and_that_is_no_error(model, kind):
    cache = make_cache(model, kind)
    cache.batch_select_indices(torch.tensor([0]))
    cache.batch_repeat_interleave(2)
    assert cache.get_seq_length() == 0


def test_a_mask_of_another_length_than_the_context_is_refused():
    cache = PagedKVCache(make_model(CONFIGS["llama_gqa"]).config, **SMALL)
    layer, states = cache.paged_layers[0], torch.randn(3, 1, 2, 20, 16)
    cache.recorder.begin_step("prefill")
    layer.update(states[1], states[2])
    allowed = torch.ones(1, 1, 1, 5, dtype=torch.bool)
    with pytest.raises(CannotPage, match="the mask is for 5 positions, but there are 25"):
        layer.attend(torch.randn(1, 4, 5, 16), states[1, :, :, :5], states[2, :, :, :5], allowed, 0.25)


def test_padding_that_is_unmasked_later_is_refused_by_its_positions():
    model = make_model(CONFIGS["llama_gqa"])
    prompt = make_prompt(40, batch=2, padding=7)
    cache = PagedKVCache(model.config, **SMALL)
    with cache.attached(model):
        said = continue_prompt(model, prompt, 5, past_key_values=cache)
        with pytest.raises(ValueError, match=r"row 0: positions 0\.\.6 were padding when they were written"):
            continue_prompt(model, Prompt(said, torch.ones_like(said)), 5, past_key_values=cache)


def test_beams_that_come_from_one_share_its_full_pages_on_the_host():
    """Three beams read a prompt of 20 pages each; in the end all of them descend from one."""
    model = make_model(CONFIGS["llama_gqa"])
    cache = PagedKVCache(model.config, **SMALL)
    with cache.attached(model):
        continue_prompt(model, make_prompt(160), 20, past_key_values=cache, num_beams=3)
    pages = cache.paged_layers[0].pages
    assert len({tuple(sequence.host_rows[:20]) for sequence in pages.sequences}) == 1
    assert 22 <= pages.store.host.n_taken <= 20 + 3 * 2
    cache.reset()
    assert pages.store.host.n_taken == 0


def test_each_layers_pool_is_on_its_layers_device():
    """`meta` stands for a second device: memory there has a place and no content."""
    model = make_model(CONFIGS["llama_gqa"])
    model.model.layers[1].to("meta")
    cache = PagedKVCache(model.config, **SMALL)
    cache.allocate(model, batch_size=1, n_kv_heads=2, head_dim=16, max_tokens=50)
    assert [layer.pages.store.pool.device.type for layer in cache.paged_layers] == ["cpu", "meta"]


def test_layers_whose_weights_are_offloaded_are_paged_where_they_are_computed(tmp_path):
    prompt, options = make_prompt(60), {"page_size": 8, "max_gpu_pages": 4, "staging_pages": 3, "link": "memory"}
    expected = continue_prompt(make_model(CONFIGS["llama_gqa"]), prompt)
    model = make_model(CONFIGS["llama_gqa"])
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    model = dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path)
    cache = PagedKVCache(model.config, **options)
    cache.allocate(model, batch_size=1, n_kv_heads=2, head_dim=16, max_tokens=90)
    with cache.attached(model):
        assert torch.equal(continue_prompt(model, prompt, past_key_values=cache), expected)
    assert {layer.pages.store.pool.device.type for layer in cache.paged_layers} == {"cpu"}


@pytest.mark.cuda
def test_on_two_gpus_each_layer_is_paged_on_its_own():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    prompt = make_prompt(90)
    model = make_model(CONFIGS["llama_gqa"])
    expected = continue_prompt(model, prompt)
    places = {"model.embed_tokens": 0, "model.norm": 1, "model.rotary_emb": 0, "lm_head": 1}
    model = dispatch_model(model, places | {"model.layers.0": 0, "model.layers.1": 1})
    cache = PagedKVCache(model.config, **SMALL)
    with cache.attached(model):
        tokens = continue_prompt(model, Prompt(prompt.ids.to(0), prompt.mask.to(0)), past_key_values=cache)
    assert [layer.pages.store.pool.device.index for layer in cache.paged_layers] == [0, 1]
    assert torch.equal(tokens.cpu(), expected)
