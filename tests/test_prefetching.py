"""Prefetch moves bytes earlier and changes nothing else, whatever is predicted; and its figures add up."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cache
from typing import ClassVar

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from test_cache_failures import require_whole_books
from tiny_models import CONFIGS, GROUPED, Prompt, continue_prompt, make_model, make_prompt
from transformers import AutoConfig, DynamicCache

import hf_attention
from config_schema import PredictiveExperiment
from kv_paging import PagedKVCache
from models import load_model
from page_policies import LRU
from page_predictors import LastStep, LayerAhead, QuietPredictor
from page_table import PageTable
from paged_sequence import PagedSequence
from predictive_prefetch import PrefetchingKVCache, run
from registry import PREDICTORS, SELECTORS
from run_specs import expand

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


@dataclass(frozen=True)
class Always(QuietPredictor):
    """Predicts the same pages, each with its confidence, and gives them one by one."""

    guesses: tuple = ()

    def predict(self, layer, step):
        yield from self.guesses


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


# --- whatever the settings --------------------------------------------------------------------------------------------

WAYS = {
    "greedy": (make_prompt(50), {}),
    "padded_batch": (make_prompt(50, batch=2, padding=13), {}),
    "beams": (make_prompt(50), {"num_beams": 3}),
    "chunked_prompt": (make_prompt(50, batch=2), {"prefill_chunk_size": 17}),
    "drafted": (Prompt(make_prompt(13).ids.repeat(1, 4), torch.ones(1, 52)), {"prompt_lookup_num_tokens": 4}),
}
HOSTILE = {
    "name": "test_prefetching:Always",
    "guesses": [
        (5, float("inf")),
        (2, 0.3),
        (-1, 1.0),
        (2, 0.9),
        (10**9, 1.0),
        (True, -float("inf")),
        (4, float("nan")),
    ],
}
PAGINGS = st.fixed_dictionaries(
    {
        "page_size": st.just(8),
        "max_gpu_pages": st.integers(3, 4),
        "staging_pages": st.integers(2, 3),
        "access_order": st.sampled_from(["resident_first", "resident_first", "position"]),
        "link": st.just("memory"),
    }
)
SELECTIONS = st.just({}) | st.fixed_dictionaries(
    {
        "selector": st.sampled_from([name for name in SELECTORS if name != "all"]),
        "attention_pages": st.integers(3, 6),
        "granularity": st.sampled_from(["layer", "kv_head"]),
        "dense_layers": st.integers(0, 1),
    }
)
PREFETCHES = st.fixed_dictionaries(
    {
        "predictor": st.sampled_from([*PREDICTORS, HOSTILE, {"name": "test_prefetching:Backwards"}]),
        "prefetch_k": st.integers(1, 2),
        "lookahead": st.sampled_from([1, 1, 2, 3]),
        "prefetch_evicts": st.booleans(),
        "overfetch": st.sampled_from([None, 1, 2, float("inf")]),
        "min_confidence": st.sampled_from(["adaptive", 0, 0.5]),
    }
)
TRIED = ["llama_gqa", "gemma3_hybrid_sliding"]  # two paged layers, and one


@cache
def tried_model(name):
    return make_model(CONFIGS[name])


@cache
def reactive_run(name, way, paging):
    """Tokens without prefetch, and the recorded requests."""
    model, (prompt, how) = tried_model(name), WAYS[way]
    cache = PagedKVCache(model.config, **dict(paging), record_pages=True)
    with cache.attached(model):
        return continue_prompt(model, prompt, 14, past_key_values=cache, **how), cache.recorder.requests


@contextlib.contextmanager
def watched():
    """Against a naive record of pages, kept apart from the page table's: a page is there from the moment its copy is
    asked for, or the policy is told of it, until the policy is told that it is gone, or its copy is given up.

    Gives the copies of pages that were there already, all copies, and the most pages that were on the device.
    """
    there, copied_again, copied, most = defaultdict(set), [], [], {"resident": 0, "on_device": 0}
    with pytest.MonkeyPatch.context() as patch:

        def before(cls, verb, note):
            original = getattr(cls, verb)
            patch.setattr(cls, verb, lambda self, *given, **more: note(self, *given) or original(self, *given, **more))

        def note_fetch(sequence, name, pages, slots):
            pages_there = there[id(sequence.table.policy)]
            copied_again.extend((sequence.layer_idx, sequence.lane, page) for page in pages if page in pages_there)
            pages_there.update(pages)
            copied.extend(pages)

        def note_size(table, *given):
            most["resident"] = max(most["resident"], len(table.resident))
            most["on_device"] = max(most["on_device"], len(table.resident) + len(table.staged))

        before(PagedSequence, "fetch", note_fetch)
        before(LRU, "insert", lambda policy, page: there[id(policy)].add(page))
        before(LRU, "remove", lambda policy, page: there[id(policy)].discard(page))
        before(PageTable, "unstage", lambda table, page: there[id(table.policy)].discard(page))
        for verb in ("slot", "touch", "unstage"):
            before(PageTable, verb, note_size)
        yield copied_again, copied, most


@given(st.sampled_from(TRIED), st.sampled_from(list(WAYS)), PAGINGS, SELECTIONS, PREFETCHES)
@settings(max_examples=40, phases=[Phase.explicit, Phase.reuse, Phase.generate])  # to shrink takes minutes
def test_whatever_the_settings_tokens_are_those_without_prefetch_and_all_is_accounted_for(
    name, way, paging, selection, prefetch
):
    model, (prompt, how) = tried_model(name), WAYS[way]
    paging = {**paging, **selection}
    if prefetch["predictor"] == "cross_layer" and not selection:
        prefetch["predictor"] = "ranked"
    expected, requests = reactive_run(name, way, tuple(paging.items()))
    if prefetch["predictor"] == "oracle":
        prefetch["predictor"] = {"name": "oracle", "requests": requests}
    cache = PrefetchingKVCache(model.config, **paging, **prefetch)
    with watched() as (copied_again, copied, most), cache.attached(model):
        tokens = continue_prompt(model, prompt, 14, past_key_values=cache, **how)
    assert torch.equal(tokens, expected)
    require_whole_books(cache)
    assert most["resident"] <= paging["max_gpu_pages"]
    assert most["on_device"] <= paging["max_gpu_pages"] + paging["staging_pages"]
    if way != "beams":  # the record goes by the policy, which a row that is copied takes along
        assert not copied_again

    totals = [cache.recorder.snapshot(phase) for phase in ("prefill", "decode")]
    of = {name: sum(total[name] for total in totals) for name in totals[0]}
    staged = sum(len(sequence.table.staged) for layer in cache.paged_layers for sequence in layer.pages.sequences)
    used = of["prefetch_on_time"] + of["prefetch_late"]
    assert of["prefetch_issued"] == used + of["prefetch_wasted"] + staged
    assert of["h2d_pages"] == len(copied)
    if way != "drafted":  # a page that is open again after a crop is copied, and asked for by nobody
        assert of["h2d_pages"] == of["misses"] + of["prefetch_issued"]
    assert of["pollution"] <= of["misses"] and (prefetch["prefetch_evicts"] or of["pollution"] == 0)
    assert of["prefetch_issued"] <= prefetch["prefetch_k"] * of["steps"] * len(cache.paged_layers) * 3  # rows at most


@pytest.mark.parametrize(("name", "lookahead"), [("gemma3_hybrid_sliding", 1), ("llama_gqa", 2)])
def test_a_layer_that_copies_ahead_for_itself_keeps_the_pages_that_it_has_yet_to_attend(name, lookahead):
    """A page that is resident and not guessed may be evicted, but not the one that attention is about to read."""
    model, (prompt, _) = tried_model(name), WAYS["greedy"]
    paging = SMALL | {"page_size": 8, "selector": "window", "attention_pages": 3}
    predictor = {"name": "test_prefetching:Always", "guesses": [(page, 1.0) for page in (1, 2, 3)]}
    settings = {"predictor": predictor, "prefetch_evicts": True, "lookahead": lookahead, "min_confidence": 0}
    tokens, cache = prefetched_tokens(model, prompt, new_tokens=14, **paging, **settings)
    assert cache.recorder.snapshot("decode")["prefetch_issued"] > 0
    assert torch.equal(tokens, reactive_run(name, "greedy", tuple(paging.items()))[0])


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


MALFORMED = {
    "no_list": (None, "TypeError"),
    "no_pairs": ([3, 4], "TypeError"),
    "half_a_page": ([(1.5, 1.0)], "TypeError"),
    "a_name": ([("first", 1.0)], "TypeError"),
    "no_confidence": ([(1, None)], "TypeError"),
    "words": ([(1, "rather")], "ValueError"),
    "a_triple": ([(1, 1.0, 2)], "ValueError"),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_predictor_that_gives_no_guesses_ends_the_generation_with_its_name_and_the_cache_can_be_reset(
    llama, kind, monkeypatch
):
    guesses, error = MALFORMED[kind]
    prompt, cache = make_prompt(60), PrefetchingKVCache(llama.config, **SMALL, prefetch_k=2, predictor="layer_ahead")
    with monkeypatch.context() as patch:
        patch.setattr(LayerAhead, "predict", lambda self, layer, step: guesses)
        with pytest.raises(RuntimeError, match=f"predictor 'layer_ahead' failed: {error}"), cache.attached(llama):
            continue_prompt(llama, prompt, past_key_values=cache)
    cache.reset()
    with cache.attached(llama):
        tokens = continue_prompt(llama, prompt, past_key_values=cache)
    assert torch.equal(tokens, continue_prompt(llama, prompt))


def test_a_predictor_is_not_blamed_for_memory_that_ends_while_a_query_is_foreseen(llama, monkeypatch):
    def memory_ends(*given):
        raise MemoryError

    monkeypatch.setattr(hf_attention, "query_of", memory_ends)
    with pytest.raises(MemoryError):
        prefetched_tokens(llama, make_prompt(100), predictor="cross_layer", selector="quest", attention_pages=3)


# --- what is looked ahead for -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Diary(QuietPredictor):
    """Guesses nothing, and notes what it is asked and told."""

    noted: list = field(default_factory=list)
    uses_scores: ClassVar[bool] = True

    def want(self, layer, step, pages):
        self.noted.append(("want", layer, step))

    def hint(self, layer, step, shares, n):
        self.noted.append(("hint", layer, step))

    def predict(self, layer, step):
        self.noted.append(("predict", layer, step))
        return []


@pytest.mark.parametrize("lookahead", [1, 2, 3, 7])
def test_the_prediction_is_for_so_many_layers_ahead_and_hints_are_of_this_step(lookahead):
    """Layers in the order in which they ask, over all steps, are one line, on which a prediction is a fixed way ahead.
    A query of a later step cannot be foreseen, as its token is not known."""
    model, noted = make_model(AutoConfig.for_model("llama", **GROUPED | {"num_hidden_layers": 3})), []
    given = {"predictor": {"name": "test_prefetching:Diary", "noted": noted}, "lookahead": lookahead}
    prefetched_tokens(model, make_prompt(80), new_tokens=5, selector="quest", attention_pages=3, **given)
    expected = []
    for place in range(4 * 3):  # the first of 5 tokens is the prefill's
        (step, layer), (later_step, later_layer) = divmod(place, 3), divmod(place + lookahead, 3)
        hint = [("hint", later_layer, step)] if later_step == step else []
        expected += [("want", layer, step), *hint, ("predict", later_layer, later_step)]
    assert noted == expected


@pytest.mark.parametrize("lookahead", [1, 2, 3])
@pytest.mark.parametrize("name", ["llama_gqa", "gemma3_hybrid_sliding"])
def test_a_guess_is_judged_by_the_step_that_it_was_made_for(name, lookahead):
    """All that the oracle guesses comes true, however far ahead, and so says the calibration."""
    paging = SMALL | {"page_size": 4, "selector": "quest", "attention_pages": 4}
    expected, requests = reactive_run(name, "greedy", tuple(paging.items()))
    model, (prompt, _) = tried_model(name), WAYS["greedy"]
    given = {"predictor": {"name": "oracle", "requests": requests}, "lookahead": lookahead, "min_confidence": 0}
    tokens, cache = prefetched_tokens(model, prompt, new_tokens=14, **paging, **given)
    assert torch.equal(tokens, expected)
    (certain,) = cache.threshold.calibration.bins()
    assert certain["n"] > 0 and certain["used"] == 1.0


def test_a_run_with_the_oracle_records_itself_and_no_other_predictor_misses_less():
    """What is left of its misses is what `prefetch_k` is too small for, and all that it had copied is used. A page that
    is late on a machine under load is no miss."""
    loaded = load_model("random:configs/models/tiny-llama.json", device="cpu")
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.mul_(6.0 if parameter.ndim > 1 else 1.0)
    paging = {"page_size": 8, "max_gpu_pages": 4, "staging_pages": 2, "selector": "quest", "attention_pages": 5}
    common = {"mode": "predictive", "context_lengths": [100], "num_runs": 1, "max_new_tokens": 10, "warmup_runs": 0}
    common |= paging | {"device": "cpu", "link": "memory", "prefetch_k": 2, "min_confidence": 0, "batch_size": 2}
    results = {name: run(expand([PredictiveExperiment(**common, predictor=name)])[0], loaded) for name in PREDICTORS}
    rates = {name: result.cache["hit_rate"] + result.cache["late_rate"] for name, result in results.items()}
    assert rates["oracle"] == max(rates.values()) > rates["none"] + 0.05
    assert results["oracle"].prefetch["accuracy"] == 1.0
    assert results["oracle"].prefetch["unresolved"] == 0
    assert results["oracle"].spec["prefetch"]["predictor"] == "oracle"  # and no recording in it
    assert len({str(result.tokens["ids"]) for result in results.values()}) == 1


def test_of_a_page_that_is_guessed_twice_the_first_guess_counts(llama):
    """Judged are those that could be copied, of which there are two here."""
    guesses = [(3, 0.9), (2, 0.8), (3, 0.1)]
    given = {"predictor": {"name": "test_prefetching:Always", "guesses": guesses}, "min_confidence": 0.85}
    _, cache = prefetched_tokens(llama, make_prompt(100), prefetch_k=2, overfetch=None, **given)
    assert [each["low"] for each in cache.threshold.calibration.bins()] == [0.7, 0.9]
    copied = []
    cache = PrefetchingKVCache(llama.config, **SMALL, prefetch_k=1, overfetch=None, **given | {"min_confidence": 0})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PagedSequence, "prefetch", lambda sequence, pages, *given: copied.append(list(pages)))
        with cache.attached(llama):
            continue_prompt(llama, make_prompt(100), past_key_values=cache)
    assert copied and all(pages == [3] for pages in copied)  # and not 2, which is named before the last 3


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


@pytest.mark.parametrize("prefetch_k", [0, -1])
def test_a_cache_that_may_copy_nothing_ahead_is_refused(llama, prefetch_k):
    with pytest.raises(ValueError, match=f"prefetch_k must be at least 1, not {prefetch_k}"):
        PrefetchingKVCache(llama.config, **SMALL, prefetch_k=prefetch_k)


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
