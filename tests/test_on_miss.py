"""`on_miss: skip`: a decode step attends to what it wants of the pages that are there, exactly to these, and waits for
none; the others come for a later step. Prefill and everything else stays exact."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
from test_cache_failures import require_whole_books
from test_selection import restricted_attention
from tiny_models import CONFIGS, Prompt, continue_prompt, make_model, make_prompt

from cache_settings import Paging
from config_schema import PredictiveExperiment, ReactiveExperiment
from kv_paging import PagedKVCache
from kv_paging import run as run_reactive
from metrics import prefetch_figures
from models import load_model
from page_predictors import Oracle
from page_store import PageStore
from paged_layer import PagedLayer
from paged_sequence import PagedSequence
from predictive_prefetch import PrefetchingKVCache
from predictive_prefetch import run as run_predictive
from run_specs import expand

SMALL = {"page_size": 8, "max_gpu_pages": 4, "staging_pages": 3}
SKIP = SMALL | {"on_miss": "skip"}
QUEST = {"selector": "quest", "attention_pages": 6}
PAGE_BYTES = 2 * 2 * 8 * 16 * 4  # K and V, heads, positions, channels, float32


def slow_link(milliseconds):
    return {"bandwidth_gb_s": PAGE_BYTES / milliseconds / 1e6, "latency_us": 0}


@pytest.fixture(scope="module")
def llama():
    return make_model(CONFIGS["llama_gqa"])


def make_cache(model, predictor=None, **paging):
    if predictor is None:
        return PagedKVCache(model.config, **paging)
    return PrefetchingKVCache(model.config, **paging, predictor=predictor, prefetch_k=2, min_confidence=0)


def tokens_with(model, prompt, new_tokens=16, how=None, **settings):
    cache = make_cache(model, **settings)
    with cache.attached(model):
        return continue_prompt(model, prompt, new_tokens, past_key_values=cache, **how or {}), cache


PREDICTORS = [None, "last_step", "ranked", "random"]
SELECTIONS = [{}, QUEST, QUEST | {"granularity": "kv_head"}]
by_predictor = pytest.mark.parametrize("predictor", PREDICTORS)
by_selection = pytest.mark.parametrize("selection", SELECTIONS, ids=["all", "quest", "quest_by_head"])


@by_predictor
@by_selection
def test_where_all_pages_fit_nothing_is_skipped_and_tokens_are_those_of_waiting(llama, predictor, selection):
    prompt, fits = make_prompt(70, batch=2, padding=9), {"max_gpu_pages": 12, "link": slow_link(1)}
    expected, _ = tokens_with(llama, prompt, **SMALL | fits | selection)
    tokens, cache = tokens_with(llama, prompt, **SKIP | fits | selection, predictor=predictor)
    assert torch.equal(tokens, expected)
    decode = cache.recorder.snapshot("decode")
    assert (decode["skipped"], decode["misses"], decode["late"]) == (0, 0, 0)


class Slowly:
    """Between two layers' attention, all copies arrive: a link that is fast for this computer."""

    def __init__(self, monkeypatch):
        original = PagedLayer.attend

        def attend(layer, *given):
            for transport in layer.cache._transports.values():
                transport.busy_ms()  # waits for those under way
            return original(layer, *given)

        monkeypatch.setattr(PagedLayer, "attend", attend)


class Foreknown(Oracle):
    """Knows a recording of the generation, as the oracle does, which is refused where steps may skip; but in a
    generation in which none does, the pages are those of the recording all the same."""

    needs_recording = False


def test_if_what_is_guessed_is_all_there_in_time_tokens_are_those_of_waiting(llama, monkeypatch):
    """All guesses are right, over a fast link and with slots for all of them: nothing is skipped but what the first
    decode step asks its first layer for, which nobody could foresee, and which fits here."""
    Slowly(monkeypatch)
    paging = SMALL | {"page_size": 8, "max_gpu_pages": 7, "staging_pages": 6, "link": "memory"} | QUEST
    prompt = make_prompt(50)  # 6 full pages and the open one; later ones push some out
    recording = PagedKVCache(llama.config, **paging, record_pages=True)
    with recording.attached(llama):
        expected = continue_prompt(llama, prompt, 30, past_key_values=recording)
    cache = PrefetchingKVCache(
        llama.config,
        **paging | {"on_miss": "skip"},
        predictor={"name": "test_on_miss:Foreknown", "requests": recording.recorder.requests},
        prefetch_k=6,
        min_confidence=0,
    )
    with cache.attached(llama):
        tokens = continue_prompt(llama, prompt, 30, past_key_values=cache)
    assert torch.equal(tokens, expected)
    decode = cache.recorder.snapshot("decode")
    assert decode["prefetch_on_time"] > 0 and decode["skipped"] == 0
    assert recording.recorder.snapshot("decode")["misses"] > 0


class Slept:
    """Before the first decode step, all that prefill has sent to the host has arrived there: a link has two directions,
    and decoding would have to wait for a slot that is still read."""

    def __init__(self, monkeypatch, seconds):
        begin_step = PagedKVCache._begin_step

        def slept(cache, n_new):
            if n_new == 1 and cache.n_decode_steps == 0:
                time.sleep(seconds)
            begin_step(cache, n_new)

        monkeypatch.setattr(PagedKVCache, "_begin_step", slept)


@by_predictor
@by_selection
def test_over_a_slow_link_a_decode_step_waits_for_no_page(llama, predictor, selection, monkeypatch):
    """In a step of two layers some ten pages are missing, and each takes as long as a step."""
    Slept(monkeypatch, seconds=0.15)
    paging = SKIP | selection | {"link": slow_link(3)}
    _, cache = tokens_with(llama, make_prompt(100), 30, **paging, predictor=predictor)
    decode = cache.recorder.snapshot("decode")
    assert decode["stall_ms"] == 0
    assert decode["skipped"] == decode["late"] + decode["misses"] > 0
    assert decode["prefetch_late"] == 0  # what is skipped has not been waited for
    assert decode["h2d_pages"] <= decode["misses"] + decode["prefetch_issued"]  # as far as there were slots
    require_whole_books(cache)


@by_predictor
def test_a_copy_under_way_is_let_finish_so_that_pages_arrive_however_slow_the_link_is(llama, predictor, monkeypatch):
    """The link has as many copies before it as there are slots, at most. Were they given up for newer ones, it would
    never be done with those that nobody wants any more."""
    under_way, arrived = [], []
    fetch, give_up = PageStore.fetch, PagedSequence._give_up

    def noting_fetch(store, pages):
        ticket = fetch(store, pages)
        store.__dict__.setdefault("tickets", []).append((ticket, len(pages)))
        under_way.append(sum(n for one, n in store.tickets if not one.done()))
        return ticket

    def noting_give_up(sequence, page):
        arrived.append(sequence.arriving[page].done())
        give_up(sequence, page)

    monkeypatch.setattr(PageStore, "fetch", noting_fetch)
    monkeypatch.setattr(PagedSequence, "_give_up", noting_give_up)
    paging = SKIP | QUEST | {"link": slow_link(2)}
    _, cache = tokens_with(llama, make_prompt(100), 60, **paging, predictor=predictor)
    assert max(under_way) <= SKIP["staging_pages"]
    assert all(arrived) and arrived
    assert cache.recorder.snapshot("decode")["h2d_pages"] > 2 * SKIP["staging_pages"]


class Recount:
    """What each decode step's layer wanted, what was there of it as it asked, and what it attended to; all from the
    tables and the notes of attention, and nothing from the counts."""

    def __init__(self, monkeypatch):
        self.there, self.wanted, self.attended = {}, {}, {}
        resolve = PagedLayer._ask

        def noting(layer, sequence, query, rule):
            self._key = layer.layer_idx, sequence.lane, layer.cache.n_decode_steps
            if layer.cache.phase == "decode":
                table = sequence.table
                for transport in layer.cache._transports.values():
                    transport.busy_ms()  # so that what has arrived does not change in between
                arrived = {page for page in table.staged if sequence.arriving[page].done()}
                self.there[self._key] = set(table.resident) | arrived
            return resolve(layer, sequence, query, rule)

        monkeypatch.setattr(PagedLayer, "_ask", noting)
        always = property(lambda cache: True, lambda cache, value: None)
        for who in ("watches_attention", "looks_ahead"):
            monkeypatch.setattr(PagedKVCache, who, always, raising=False)
        for cls in (PagedKVCache, PrefetchingKVCache):
            monkeypatch.setattr(cls, "attended", self._noting_attended(cls.attended))
            monkeypatch.setattr(cls, "look_ahead", self._noting_wanted(cls.look_ahead))

    def _noting_attended(self, original):
        def attended(cache, layer, sequence, attention):
            self.attended[layer.layer_idx, sequence.lane, cache.n_decode_steps] = attention.pages
            original(cache, layer, sequence, attention)

        return attended

    def _noting_wanted(self, original):
        def look_ahead(cache, layer, sequence, wanted):
            if cache.phase == "decode":
                self.wanted[layer.layer_idx, sequence.lane, cache.n_decode_steps] = set(wanted)
            original(cache, layer, sequence, wanted)

        return look_ahead


@by_predictor
@by_selection
def test_what_is_attended_to_is_what_was_wanted_and_there_and_the_rest_is_counted(
    llama, predictor, selection, monkeypatch
):
    seen = Recount(monkeypatch)
    paging = SKIP | selection | {"link": "memory"}
    _, cache = tokens_with(llama, make_prompt(80, batch=2, padding=9), **paging, predictor=predictor)
    assert len(seen.attended) == 15 * 2 * 2 and seen.attended.keys() == seen.wanted.keys() == seen.there.keys()
    for key, pages in seen.attended.items():
        assert len(pages) == len(set(pages))
        assert set(pages) == seen.wanted[key] & seen.there[key]
    decode = cache.recorder.snapshot("decode")
    assert decode["hits"] == sum(map(len, seen.attended.values()))
    assert decode["accesses"] == sum(map(len, seen.wanted.values()))
    assert decode["skipped"] == decode["accesses"] - decode["hits"] == decode["late"] + decode["misses"] > 0
    require_whole_books(cache)


@by_selection
def test_the_attention_is_softmax_over_just_the_pages_that_were_there(llama, selection, monkeypatch):
    """By its definition, from all keys and values, which are put together from the host."""
    seen, compared = Recount(monkeypatch), 0
    attend_row = PagedLayer._attend_row

    def checked(layer, row, query, reading, rule, key=None, value=None):
        nonlocal compared
        out = attend_row(layer, row, query, reading, rule, key, value)
        if layer.cache.phase == "decode":
            keys, values = layer.pages.materialise()
            pages = seen.attended[layer.layer_idx, row, layer.cache.n_decode_steps]
            if len(pages) < len(seen.wanted[layer.layer_idx, row, layer.cache.n_decode_steps]):
                compared += 1
            expected = restricted_attention(query[0, :, 0], keys[row], values[row], 8, pages, reading.heads)
            torch.testing.assert_close(out[0, :, 0], expected, atol=2e-4, rtol=2e-4)
        return out

    monkeypatch.setattr(PagedLayer, "_attend_row", checked)
    tokens_with(llama, make_prompt(80, batch=2), **SKIP | selection | {"link": "memory"})
    assert compared > 20


def test_a_page_that_was_skipped_is_a_hit_of_a_later_step_that_asks_for_it(llama, monkeypatch):
    """As soon as it has arrived, and without being copied again: under `all`, every layer asks for every page. With 4
    resident pages and 3 slots beside, each step's misses take the free ones."""
    seen = Recount(monkeypatch)
    _, cache = tokens_with(llama, make_prompt(62), 3, **SKIP, link="memory")  # 7 full pages and an open one
    first, second = ({key[0]: set(pages) for key, pages in seen.attended.items() if key[2] == step} for step in (1, 2))
    for layer in (0, 1):
        skipped = seen.wanted[layer, 0, 1] - first[layer]
        assert len(first[layer]) == 4 and len(skipped) == 4
        assert len(skipped & second[layer]) == 3  # those that there were slots for
    decode = cache.recorder.snapshot("decode")
    assert decode["misses"] == sum(len(seen.wanted[key] - seen.there[key]) for key in seen.wanted)


def test_prefill_waits_and_is_exact(llama):
    """Its pages exceed the device, and it comes in chunks; so the first token is the baseline's."""
    prompt = make_prompt(100, batch=2, padding=13)
    for how in ({}, {"prefill_chunk_size": 17}):
        paging = SKIP | QUEST | {"link": slow_link(0.2)}
        tokens, cache = tokens_with(llama, prompt, 1, how, **paging)
        assert torch.equal(tokens, continue_prompt(llama, prompt, 1, **how))
        prefill = cache.recorder.snapshot("prefill")
        assert prefill["skipped"] == 0
        assert (prefill["stall_ms"] > 0 and prefill["misses"] > 0) == bool(how)


def test_a_chunk_of_several_tokens_waits_also_after_decode_steps(llama):
    """An assistant's draft is checked exactly: nothing of a forward pass of several tokens is skipped."""
    prompt = Prompt(make_prompt(13).ids.repeat(1, 4), torch.ones(1, 52, dtype=torch.long))
    _, cache = tokens_with(llama, prompt, 24, {"prompt_lookup_num_tokens": 4}, **SKIP, link="memory")
    assert cache.recorder.snapshot("prefill")["skipped"] == 0
    assert cache.recorder.snapshot("prefill")["misses"] > 0
    require_whole_books(cache)


@pytest.mark.parametrize("predictor", PREDICTORS[1:])
@pytest.mark.parametrize("milliseconds", [0.05, 4])
def test_prefetch_figures_stay_consistent(llama, predictor, milliseconds):
    link = slow_link(milliseconds)
    _, cache = tokens_with(llama, make_prompt(100), 25, **SKIP | QUEST, link=link, predictor=predictor)
    figures = prefetch_figures(cache.recorder, cache.page_bytes)
    ahead = [set(one.arriving) - one._demanded for layer in cache.paged_layers for one in layer.pages.sequences]
    assert 0 <= figures["useful"] == figures["on_time"] <= figures["issued"] and figures["late"] == 0
    assert figures["unresolved"] == sum(map(len, ahead))
    assert figures["pollution"] == 0


@pytest.mark.parametrize("how", [{"num_beams": 3}, {"prefill_chunk_size": 17}], ids=["beams", "chunks"])
@by_predictor
def test_beams_and_chunks_run_and_the_books_add_up(llama, how, predictor):
    _, cache = tokens_with(llama, make_prompt(60), 16, how, **SKIP | QUEST, link=slow_link(1), predictor=predictor)
    decode = cache.recorder.snapshot("decode")
    assert decode["skipped"] == decode["late"] + decode["misses"]
    require_whole_books(cache)


def test_a_new_page_waits_for_no_copy_of_another(llama, monkeypatch):
    """As decoding opens a page every fourth step over a link that is never done with what was asked of it."""
    Slept(monkeypatch, seconds=0.1)
    paging = SKIP | {"page_size": 4, "link": slow_link(3)}
    _, cache = tokens_with(llama, make_prompt(40), 60, **paging, predictor="random")
    assert cache.recorder.snapshot("decode")["stall_ms"] == 0


# --- as a setting ---------------------------------------------------------------------------------------------------


def test_it_contradicts_asking_one_by_one():
    with pytest.raises(ValueError, match="'on_miss: skip' leaves out what is not there"):
        Paging(on_miss="skip", access_order="position")
    with pytest.raises(ValueError, match="on_miss must be wait or skip, not 'drop'"):
        Paging(on_miss="drop")


def test_it_contradicts_a_predictor_that_knows_a_recording(llama):
    """Which pages are skipped depends on when copies arrive, and what is asked for later on that."""
    recording = PagedKVCache(llama.config, **SMALL, record_pages=True, link="memory")
    with recording.attached(llama):
        continue_prompt(llama, make_prompt(50), 3, past_key_values=recording)
    oracle = {"predictor": {"name": "oracle", "requests": recording.recorder.requests}, "prefetch_k": 2}
    assert PrefetchingKVCache(llama.config, **SMALL, **oracle).paging.on_miss == "wait"
    with pytest.raises(ValueError, match="knows a recording of the same generation, and with 'on_miss: skip'"):
        PrefetchingKVCache(llama.config, **SKIP, **oracle)


@pytest.mark.parametrize(
    ("kind", "run"),
    [(ReactiveExperiment, run_reactive), (PredictiveExperiment, run_predictive)],
    ids=["reactive", "predictive"],
)
def test_a_run_that_skips_says_that_it_is_not_exact(kind, run):
    mode = "reactive" if run is run_reactive else "predictive"
    common = {
        "mode": mode,
        "context_lengths": [60],
        "num_runs": 1,
        "max_new_tokens": 6,
        "warmup_runs": 0,
        "device": "cpu",
    }
    paging = {"page_size": 8, "max_gpu_pages": 4, "staging_pages": 4, "link": "memory"}
    spec = expand([kind(**common, **paging, on_miss="skip")])[0]
    assert not spec.exact and not spec.paging.exact and spec.paging.on_miss == "skip"
    assert replace(spec, paging=replace(spec.paging, on_miss="wait")).exact
    loaded = load_model("random:configs/models/tiny-llama.json", device="cpu")
    result = run(spec, loaded)
    assert result.quality["exact"] is False and result.cache["exact"] is False
    assert result.cache["skipped"] == result.cache["late"] + result.cache["misses"] > 0
    assert result.cache["stall_ms"] == 0
    waiting = run(replace(spec, paging=replace(spec.paging, on_miss="wait")), loaded)
    assert waiting.quality["exact"] is True and waiting.cache["skipped"] == 0
