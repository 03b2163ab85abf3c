"""Several caches on one model, nested or in several threads: each works as it does alone, and the last one restores.

Nothing here can hang: threads are daemons, joined with a deadline, and whatever waits for another thread gives up.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import continue_prompt, make_family, make_prompt
from transformers import DynamicCache, LogitsProcessor

import hf_attention
from hf_attention import CannotPage
from kv_paging import PagedKVCache
from predictive_prefetch import PrefetchingKVCache

DEADLINE_S = 60
NEW_TOKENS = 16
SMALL = {"page_size": 8, "max_gpu_pages": 3, "staging_pages": 2, "link": "memory"}


@pytest.fixture(scope="module", params=["llama_gqa", "gemma2_hybrid_softcap"])
def model(request):
    return make_family(request.param)


@pytest.fixture(scope="module")
def llama():
    return make_family("llama_gqa")


def together(*jobs: Callable[[], Any]) -> list[Any]:
    """Run each job in a thread of its own: what each returned, or raised."""
    outcomes: list[Any] = [TimeoutError("the thread did not finish")] * len(jobs)

    def keep_outcome(index: int, job: Callable[[], Any]) -> None:
        try:
            outcomes[index] = job()
        except BaseException as error:
            outcomes[index] = error

    threads = [threading.Thread(target=keep_outcome, args=item, daemon=True) for item in enumerate(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    return outcomes


def raise_any(outcomes: list[Any]) -> list[Any]:
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    return outcomes


class AtEachToken(LogitsProcessor):
    """Calls a function with the number of each new token, in the middle of `generate`."""

    def __init__(self, call: Callable[[int], Any]):
        self.call, self.tokens = call, 0

    def __call__(self, input_ids, scores):
        self.tokens += 1
        self.call(self.tokens)
        return scores


def await_the_other(barrier: threading.Barrier, token: int) -> None:
    barrier.wait()


def attached_tokens(model, cache, prompt, at_each_token=lambda token: None) -> torch.Tensor:
    with cache.attached(model):
        return continue_prompt(
            model, prompt, NEW_TOKENS, past_key_values=cache, logits_processor=[AtEachToken(at_each_token)]
        )


# --- generating at the same time ----------------------------------------------------------------------------------


def test_two_threads_give_what_each_gives_alone(model):
    """In lockstep: no thread makes its next token before the other has made its own, so neither ever runs alone."""
    before = model.config._attn_implementation
    prompts = [make_prompt(70), make_prompt(45, batch=2, padding=9, seed=1)]
    alone = [continue_prompt(model, prompt, NEW_TOKENS) for prompt in prompts]
    for policies in [("lru", "mru"), ("mru", "fifo"), ("fifo", "lru")]:
        lockstep = threading.Barrier(2, timeout=DEADLINE_S / 2)
        caches = [
            PagedKVCache(model.config, **SMALL, policy=policies[0]),
            PrefetchingKVCache(model.config, **SMALL, policy=policies[1], prefetch_k=2),
        ]
        wait = partial(await_the_other, lockstep)
        jobs = [partial(attached_tokens, model, *pair, wait) for pair in zip(caches, prompts, strict=True)]
        for tokens, expected in zip(raise_any(together(*jobs)), alone, strict=True):
            assert torch.equal(tokens, expected)
        counted = [cache.recorder.snapshot("decode") for cache in caches]
        assert all(one["steps"] == NEW_TOKENS - 1 and one["misses"] > 0 for one in counted)
        assert model.config._attn_implementation == before


def test_a_thread_that_fails_inside_leaves_the_other_right(llama):
    prompt, has_failed = make_prompt(70), threading.Event()
    under_way = threading.Event()

    def fail(token):
        if token == 4:
            assert under_way.wait(DEADLINE_S / 2)
            raise RuntimeError("on purpose")

    def failing():
        try:
            attached_tokens(llama, PagedKVCache(llama.config, **SMALL), make_prompt(50, seed=2), fail)
        finally:
            has_failed.set()

    def wait_for_the_failure(token):
        if token == 3:
            under_way.set()
            assert has_failed.wait(DEADLINE_S / 2)
            assert llama.config._attn_implementation == hf_attention.IMPLEMENTATION

    def working():
        return attached_tokens(llama, PagedKVCache(llama.config, **SMALL), prompt, wait_for_the_failure)

    before = llama.config._attn_implementation
    error, tokens = together(failing, working)
    assert isinstance(error, RuntimeError) and str(error) == "on purpose"
    assert torch.equal(tokens, continue_prompt(llama, prompt, NEW_TOKENS))
    assert llama.config._attn_implementation == before


def test_a_thread_without_a_paged_cache_is_told_while_another_is_attached(llama):
    """Its attention would be computed over its new positions only."""
    others = []

    def other(token):
        if token == 2:
            others.extend(together(lambda: continue_prompt(llama, make_prompt(20), past_key_values=own)))

    own = DynamicCache(config=llama.config)
    prompt = make_prompt(70)
    tokens = attached_tokens(llama, PagedKVCache(llama.config, **SMALL), prompt, other)
    assert isinstance(others[0], CannotPage)
    assert torch.equal(tokens, continue_prompt(llama, prompt, NEW_TOKENS))


@pytest.mark.parametrize("family", ["llama_gqa", "gpt_oss_hybrid_sinks"])
def test_figures_can_be_read_while_another_thread_generates(family):
    model = make_family(family)
    cache, prompt = PagedKVCache(model.config, **SMALL), make_prompt(70)
    finished, read_once = threading.Event(), threading.Event()
    seen: list[tuple[int, int, int]] = []

    def read():
        while not finished.wait(0.001):  # a reader that never paused would hold the interpreter's lock most of the time
            decode, memory = cache.recorder.snapshot("decode"), cache.memory()
            layers, steps = cache.recorder.layer_dicts(), cache.recorder.step_dicts()
            assert {layer["layer"] for layer in layers} <= {layer.layer_idx for layer in cache.paged_layers}
            seen.append((decode["steps"], sum(layer["accesses"] for layer in layers), memory["device_kv_bytes"]))
            assert len(steps) >= decode["steps"]
            read_once.set()

    def generate():
        try:
            return attached_tokens(model, cache, prompt, lambda token: read_once.clear() or read_once.wait(5))
        finally:
            finished.set()

    _, tokens = raise_any(together(read, generate))
    assert torch.equal(tokens, continue_prompt(model, prompt, NEW_TOKENS))
    assert len({steps for steps, _, _ in seen}) > 3, "it was not read while it generated"
    assert all(earlier[:2] <= later[:2] for earlier, later in itertools.pairwise(seen))


# --- attaching and detaching --------------------------------------------------------------------------------------


def is_attached(model) -> bool:
    return model.config._attn_implementation == hf_attention.IMPLEMENTATION


@pytest.mark.parametrize("leaving", list(itertools.permutations(range(3))), ids=str)
def test_the_last_to_leave_restores_in_whatever_order_they_leave(llama, leaving):
    before, prompt = llama.config._attn_implementation, make_prompt(40)
    caches = [PagedKVCache(llama.config, **SMALL) for _ in range(3)]
    inside = [ExitStack() for _ in caches]
    for cache, stack in zip(caches, inside, strict=True):
        stack.enter_context(cache.attached(llama))
    expected = None
    for index in leaving:
        assert is_attached(llama)
        tokens = continue_prompt(llama, prompt, 8, past_key_values=caches[index])
        assert expected is None or torch.equal(tokens, expected)
        expected = tokens
        inside[index].close()
    assert llama.config._attn_implementation == before != hf_attention.IMPLEMENTATION
    assert torch.equal(continue_prompt(llama, prompt, 8), expected)


@settings(max_examples=50)
@given(turns=st.lists(st.integers(0, 3), max_size=20))
def test_a_model_is_attached_exactly_while_some_cache_is(llama, turns):
    """Each turn enters, or leaves, one of four places; the set of those inside is the whole state."""
    before = llama.config._attn_implementation
    inside: dict[int, ExitStack] = {}
    for place in turns:
        if place in inside:
            inside.pop(place).close()
        else:
            inside[place] = ExitStack()
            inside[place].enter_context(hf_attention.attached(llama))
        assert is_attached(llama) == bool(inside)
    for stack in inside.values():
        stack.close()
    assert llama.config._attn_implementation == before


def test_nested_in_one_thread_each_cache_keeps_its_own_context(llama):
    outer, inner = PagedKVCache(llama.config, **SMALL), PagedKVCache(llama.config, **SMALL)
    prompts = make_prompt(60), make_prompt(50, seed=4)
    with outer.attached(llama):
        first = continue_prompt(llama, prompts[0], 8, past_key_values=outer)
        with pytest.raises(RuntimeError, match="on purpose"), inner.attached(llama):
            assert torch.equal(
                continue_prompt(llama, prompts[1], past_key_values=inner), continue_prompt_alone(llama, prompts[1])
            )
            raise RuntimeError("on purpose")
        more = torch.cat([first, prompts[1].ids], dim=1)
        options = {"attention_mask": torch.ones_like(more), "max_new_tokens": 8, "do_sample": False}
        answer = llama.generate(more, past_key_values=outer, **options)
    assert torch.equal(answer, llama.generate(more, **options))


def continue_prompt_alone(model, prompt) -> torch.Tensor:
    """The same model in its own attention: another one with the same weights, as this one is attached."""
    return continue_prompt(make_family("llama_gqa"), prompt)


def test_an_inner_part_of_a_model_shares_its_attachment(llama):
    before = llama.config._attn_implementation
    with hf_attention.attached(llama):
        with hf_attention.attached(llama.model):
            pass
        assert is_attached(llama)
    assert llama.config._attn_implementation == before


def test_threads_that_attach_and_detach_all_the_time_leave_the_model_as_it_was(llama):
    before = llama.config._attn_implementation
    start = threading.Barrier(4, timeout=DEADLINE_S / 2)

    def come_and_go():
        start.wait()
        for _ in range(100):
            with hf_attention.attached(llama):
                assert is_attached(llama)

    raise_any(together(*[come_and_go] * 4))
    assert llama.config._attn_implementation == before
