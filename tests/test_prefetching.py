"""Prefetch moves bytes earlier and changes nothing else, whatever is predicted; and its figures add up."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import pytest
import torch
from tiny_models import CONFIGS, Prompt, continue_prompt, make_model, make_prompt
from transformers import DynamicCache

from page_policies import LRU
from page_predictors import LastStep, LayerAhead, QuietPredictor
from page_table import PageTable
from paged_sequence import PagedSequence
from predictive_prefetch import PrefetchingKVCache
from registry import PREDICTORS

SMALL = {"page_size": 16, "max_gpu_pages": 3, "staging_pages": 2, "link": "memory"}


@dataclass(frozen=True)
class Nonsense(QuietPredictor):
    """Predicts pages that do not exist, duplicates, and in the wrong order."""

    def predict(self, layer, step):
        return [(-3, 2.0), (10**6, 1.0), (1, 0.9), (1, 0.9), (2, -1.0), (10**6, 0.5), (3, float("nan"))]


@dataclass(frozen=True)
class Backwards(QuietPredictor):
    """Always predicts the oldest pages, of all layers alike."""

    def predict(self, layer, step):
        return [(page, 1.0) for page in range(50)]


# Those that need more than the attention of every page, a selector's scores or a recording, are tried apart.
NEEDS_MORE = ["cross_layer", "oracle"]
PREDICTOR_CHOICES = [
    *(name for name in PREDICTORS if name not in NEEDS_MORE),
    "test_prefetching:Nonsense",
    "test_prefetching:Backwards",
]


@pytest.fixture(scope="module", params=["llama_gqa", "gpt2_learned_positions", "gemma3_hybrid_sliding"])
def model(request):
    return make_model(CONFIGS[request.param])


@pytest.fixture(scope="module")
def llama():
    return make_model(CONFIGS["llama_gqa"])


def prefetched_tokens(model, prompt, **options):
    """Tokens with a prefetching cache, and the cache."""
    new_tokens = options.pop("new_tokens", 24)
    cache = PrefetchingKVCache(model.config, **{"prefetch_k": 2} | SMALL | options)
    with cache.attached(model):
        return continue_prompt(model, prompt, new_tokens, past_key_values=cache), cache


@pytest.mark.parametrize("predictor", PREDICTOR_CHOICES)
@pytest.mark.parametrize("padding", [0, 23], ids=["no_padding", "left_padding"])
def test_tokens_are_the_baselines_whatever_is_predicted(model, predictor, padding):
    prompt = make_prompt(100, batch=2, padding=padding)
    tokens, _ = prefetched_tokens(model, prompt, predictor=predictor)
    assert torch.equal(tokens, continue_prompt(model, prompt))


@pytest.mark.parametrize("predictor", PREDICTOR_CHOICES)
def test_every_access_and_every_prefetch_is_accounted_for(llama, predictor):
    _, cache = prefetched_tokens(llama, make_prompt(100), predictor=predictor)
    decode = cache.recorder.snapshot("decode")
    used = decode["prefetch_on_time"] + decode["prefetch_late"]
    still_staged = sum(len(sequence.table.staged) for layer in cache.paged_layers for sequence in layer.pages.sequences)
    assert decode["prefetch_issued"] == used + decode["prefetch_wasted"] + still_staged
    assert decode["h2d_pages"] == decode["misses"] + decode["prefetch_issued"]
    # What moves on demand or ahead, and was used, is just what did not fit.
    assert decode["misses"] + used == decode["must_move"]


def test_looking_a_layer_ahead_is_always_right_under_exact_attention(llama):
    _, cache = prefetched_tokens(llama, make_prompt(100), predictor="layer_ahead")
    decode = cache.recorder.snapshot("decode")
    assert decode["prefetch_wasted"] == 0
    assert decode["prefetch_issued"] > 0


def test_no_prediction_is_reactive_paging(llama):
    _, cache = prefetched_tokens(llama, make_prompt(100), predictor="none")
    decode = cache.recorder.snapshot("decode")
    assert decode["prefetch_issued"] == 0
    assert decode["misses"] == decode["must_move"]


@pytest.mark.parametrize("predictor", PREDICTOR_CHOICES)
def test_nothing_is_copied_that_is_on_the_device_or_on_its_way(llama, predictor, monkeypatch):
    """Against a naive record of pages, kept apart from the page table's: a page is there from the moment its copy is
    asked for, or the policy is told of it, until the policy is told that it is gone, or its copy is given up."""
    cache = PrefetchingKVCache(llama.config, **SMALL, prefetch_k=2, predictor=predictor)
    there, copied_again, n_copied = defaultdict(set), [], 0

    def before(cls, verb, note):
        original = getattr(cls, verb)
        monkeypatch.setattr(cls, verb, lambda self, *given: note(self, *given) or original(self, *given))

    def note_fetch(sequence, pages, slots):
        nonlocal n_copied
        pages_there = there[id(sequence.table.policy)]
        copied_again.extend((sequence.layer_idx, sequence.lane, page) for page in pages if page in pages_there)
        pages_there.update(pages)
        n_copied += len(pages)

    before(PagedSequence, "fetch", note_fetch)
    before(LRU, "insert", lambda policy, page: there[id(policy)].add(page))
    before(LRU, "remove", lambda policy, page: there[id(policy)].remove(page))
    before(PageTable, "unstage", lambda table, page: there[id(table.policy)].remove(page))
    with cache.attached(llama):
        continue_prompt(llama, make_prompt(100, batch=2), past_key_values=cache)
    assert n_copied == sum(cache.recorder.snapshot(phase)["h2d_pages"] for phase in ("prefill", "decode")) > 0
    assert not copied_again


@pytest.mark.parametrize("predictor", PREDICTOR_CHOICES)
def test_the_budget_is_never_exceeded(llama, predictor, most_pages):
    prefetched_tokens(llama, make_prompt(150), predictor=predictor)
    assert most_pages["resident"] == SMALL["max_gpu_pages"]
    assert most_pages["on_device"] <= SMALL["max_gpu_pages"] + SMALL["staging_pages"]


@pytest.mark.parametrize("predictor", ["layer_ahead", "last_step"])
def test_on_a_slow_link_pages_are_late_and_tokens_are_the_same(llama, predictor):
    """A page of 4 KiB takes 10 ms, far longer than a layer. Even if no copy overlapped another, the 5 decode steps of 2
    layers, in each of which at most 5 of 7 pages move (and 2 more may be prefetched in vain), would take 0.7 s."""
    prompt = make_prompt(100)
    link = {"bandwidth_gb_s": 4096e-9 / 0.010, "latency_us": 0}
    tokens, cache = prefetched_tokens(llama, prompt, predictor=predictor, link=link, new_tokens=6)
    decode = cache.recorder.snapshot("decode")
    assert decode["late"] == decode["prefetch_late"] > 0
    assert decode["stall_ms"] > 0
    assert torch.equal(tokens, continue_prompt(llama, prompt, new_tokens=6))


def sampled(model, cache):
    torch.manual_seed(7)
    options = {"do_sample": True, "temperature": 1.3, "top_k": 20}
    return continue_prompt(model, make_prompt(50), past_key_values=cache, **options)


def of_beams(model, cache):
    return continue_prompt(model, make_prompt(50), past_key_values=cache, num_beams=3)


def of_two_calls(model, cache):
    said = continue_prompt(model, make_prompt(40), past_key_values=cache)
    more = torch.cat([said, make_prompt(30, seed=1).ids], dim=1)
    return continue_prompt(model, Prompt(more, torch.ones_like(more)), past_key_values=cache)


@pytest.mark.parametrize("predictor", ["layer_ahead", "last_step"])
@pytest.mark.parametrize("tokens_of", [sampled, of_beams, of_two_calls])
def test_every_way_of_generating_gives_the_tokens_of_transformers_own_cache(llama, tokens_of, predictor):
    cache = PrefetchingKVCache(llama.config, **SMALL, prefetch_k=2, predictor=predictor)
    with cache.attached(llama):
        tokens = tokens_of(llama, cache)
    assert torch.equal(tokens, tokens_of(llama, DynamicCache(config=llama.config)))
    assert cache.recorder.snapshot("decode")["prefetch_issued"] > 0


@pytest.mark.parametrize("predictor", PREDICTOR_CHOICES)
def test_a_prompt_of_one_token_is_a_decode_step_before_the_next_layer_has_pages(llama, predictor):
    prompt = make_prompt(1)
    tokens, _ = prefetched_tokens(llama, prompt, predictor=predictor, new_tokens=60)
    assert torch.equal(tokens, continue_prompt(llama, prompt, 60))


def test_what_a_row_wants_now_goes_before_what_another_may_want_next(llama, monkeypatch):
    """Copies are first come, first served: in a layer, no page is copied ahead before the last row has asked."""
    order = []
    original = PagedSequence.prefetch, PagedSequence.resolve

    def prefetch(sequence, *given):
        order.append(("ahead", sequence.layer_idx, sequence.lane))
        return original[0](sequence, *given)

    def resolve(sequence, *given):
        order.append(("now", sequence.layer_idx, sequence.lane))
        return original[1](sequence, *given)

    monkeypatch.setattr(PagedSequence, "prefetch", prefetch)
    monkeypatch.setattr(PagedSequence, "resolve", resolve)
    prefetched_tokens(llama, make_prompt(100, batch=2), predictor="layer_ahead", new_tokens=4)
    ahead_of_the_second_layer = order.index(("ahead", 1, 0))
    assert order[ahead_of_the_second_layer - 2 : ahead_of_the_second_layer] == [("now", 0, 0), ("now", 0, 1)]
    assert order.count(("ahead", 1, 0)) == order.count(("ahead", 1, 1)) == 3


def test_pages_on_their_way_to_a_beam_that_is_dropped_are_wasted(llama):
    cache = PrefetchingKVCache(llama.config, **SMALL, prefetch_k=2, predictor="layer_ahead")
    with cache.attached(llama):
        continue_prompt(llama, make_prompt(120), past_key_values=cache, num_beams=4)
    decode = cache.recorder.snapshot("decode")
    used = decode["prefetch_on_time"] + decode["prefetch_late"]
    still_staged = sum(len(one.table.staged) for layer in cache.paged_layers for one in layer.pages.sequences)
    assert decode["prefetch_wasted"] > 0
    assert decode["prefetch_issued"] == used + decode["prefetch_wasted"] + still_staged


def test_a_predictor_that_raises_ends_the_generation_with_its_name(llama, monkeypatch):
    def broken(self, layer, step):
        raise ZeroDivisionError("no forecast today")

    monkeypatch.setattr(LayerAhead, "predict", broken)
    with pytest.raises(RuntimeError, match="predictor 'layer_ahead' failed: ZeroDivisionError: no forecast today"):
        prefetched_tokens(llama, make_prompt(100), predictor="layer_ahead")


def test_the_observed_shares_are_the_attention_that_transformers_computes(llama, monkeypatch):
    """Summed by page, eager attention weights of the last step are the mass that the predictor is told."""
    told = {}
    original = LastStep.observe

    def observe(self, layer, step, pages, mass):
        told[layer] = dict(zip(pages, mass(), strict=True))
        original(self, layer, step, pages, mass)

    monkeypatch.setattr(LastStep, "observe", observe)
    prompt = make_prompt(100)
    tokens, _ = prefetched_tokens(llama, prompt, predictor="last_step")
    llama.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            attentions = llama(tokens[:, :-1], output_attentions=True).attentions
    finally:
        llama.set_attn_implementation("sdpa")
    for layer, weights in enumerate(attentions):
        by_position = weights[0, :, -1].mean(0)  # [positions], averaged over heads
        expected = {page: float(part.sum()) for page, part in enumerate(by_position.split(SMALL["page_size"]))}
        assert told[layer] == pytest.approx(expected, abs=1e-5)


def test_the_last_step_is_ranked_by_share_of_attention():
    predictor = LastStep()
    predictor.observe(0, 0, [4, 7, 9], lambda: [0.2, 0.5, 0.3])
    assert [page for page, _ in predictor.predict(0, 1)] == [7, 9, 4]
    assert predictor.predict(1, 1) == []


def test_more_prefetches_than_staging_slots_are_refused(llama):
    with pytest.raises(ValueError, match="prefetch_k is 3, but staging_pages gives only 2 slots"):
        PrefetchingKVCache(llama.config, **SMALL, prefetch_k=3)


def test_a_reset_cache_predicts_from_nothing(llama):
    _, cache = prefetched_tokens(llama, make_prompt(100), predictor="last_step")
    cache.reset()
    prompt = make_prompt(80, seed=4)
    with cache.attached(llama):
        tokens = continue_prompt(llama, prompt, past_key_values=cache)
    assert torch.equal(tokens, continue_prompt(llama, prompt))


@pytest.mark.cuda
@pytest.mark.parametrize("predictor", PREDICTOR_CHOICES)
def test_on_cuda_tokens_are_those_without_prefetch(predictor):
    model = make_model(CONFIGS["llama_gqa"]).cuda()
    prompt = make_prompt(100)
    prompt = type(prompt)(prompt.ids.cuda(), prompt.mask.cuda())
    tokens, _ = prefetched_tokens(model, prompt, predictor=predictor, link="auto")
    assert torch.equal(tokens, continue_prompt(model, prompt))
