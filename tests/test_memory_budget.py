"""Exact beyond memory: a context many times larger than the budget runs through it, and what is allocated for keys and
values on the device stays the budget, the staging slots and a chunk, however long the context is.

The store's own accounting is checked at every step, and is not trusted: what torch really allocates is counted too.
"""

from __future__ import annotations

import contextlib
import gc
import os
import threading
import weakref

import pytest
import torch
from tiny_models import CONFIGS, Prompt, continue_prompt, make_model, make_prompt
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kv_paging import PagedKVCache
from predictive_prefetch import PrefetchingKVCache

PAGE, BUDGET, STAGING, CHUNK = 8, 3, 2, 24
SMALL = {"page_size": PAGE, "max_gpu_pages": BUDGET, "staging_pages": STAGING, "link": "memory"}
LAYERS, HEADS, HEAD_SIZE = 2, 2, 16
PAGE_BYTES = 2 * HEADS * PAGE * HEAD_SIZE * 4  # keys and values, in float32
LONG = 30 * BUDGET * PAGE + 5  # 30 times the budget, and an open page
KINDS = {
    "reactive": (PagedKVCache, {}),
    "position_order": (PagedKVCache, {"access_order": "position"}),
    "predictive": (PrefetchingKVCache, {"predictor": "layer_ahead", "prefetch_k": 2}),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def llama():
    return make_model(CONFIGS["llama_gqa"])


def make_cache(model, kind="reactive", **paging):
    cls, options = KINDS[kind]
    return cls(model.config, **SMALL | options | paging)


def generated(model, cache, prompt, new_tokens=4, **options):
    with cache.attached(model):
        return continue_prompt(
            model, prompt, new_tokens, past_key_values=cache, **{"prefill_chunk_size": CHUNK, **options}
        )


# --- the accounting ---------------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("rows", [1, 2])
def test_thirty_budgets_run_through_one_and_the_books_say_so_at_every_step(llama, kind, rows, monkeypatch):
    prompt = make_prompt(LONG, batch=rows, padding=7)
    cache = make_cache(llama, kind)
    steps = []
    begin = cache._begin_step

    def look_and_begin(n_new):
        memory = cache.memory()
        if steps:
            assert memory["device_kv_bytes"] == (BUDGET + STAGING) * PAGE_BYTES * LAYERS * rows
            assert memory["staging_bytes"] == STAGING * PAGE_BYTES * LAYERS * rows
            assert memory["resident_bytes"] <= BUDGET * PAGE_BYTES * LAYERS * rows
            assert [len(layer.pages.store.pool) for layer in cache.paged_layers] == [(BUDGET + STAGING) * rows] * LAYERS
        steps.append(n_new)
        begin(n_new)

    monkeypatch.setattr(cache, "_begin_step", look_and_begin)
    assert torch.equal(generated(llama, cache, prompt), continue_prompt(llama, prompt, 4))
    assert len(steps) == -(-LONG // CHUNK) + 3
    assert cache.paged_layers[0].pages.n_pages > 30 * BUDGET


@pytest.mark.parametrize("beams", [1, 3])
def test_host_bytes_are_the_sealed_pages_once_also_where_beams_share_them(llama, beams):
    """Rows are allocated 16 at a time. Three beams read the prompt as three rows, whose pages are shared once a beam
    has ended and another taken its place: then at most two pages of each beam are its own."""
    cache = make_cache(llama)
    generated(llama, cache, make_prompt(LONG), num_beams=beams)
    n_sealed = (LONG + 3) // PAGE
    for layer in cache.paged_layers:
        host = layer.pages.store.host
        assert n_sealed <= host.n_taken <= n_sealed + (beams - 1) * 2
        assert host.nbytes == host.n_rows * PAGE_BYTES <= (n_sealed * beams + 15) * PAGE_BYTES
    assert cache.memory()["host_kv_bytes"] == sum(layer.pages.store.host.nbytes for layer in cache.paged_layers)


def test_what_was_reserved_is_what_is_used(llama):
    cache = make_cache(llama)
    cache.allocate(llama, 1, HEADS, HEAD_SIZE, LONG + 4)
    reserved = cache.memory()
    generated(llama, cache, make_prompt(LONG))
    assert reserved["host_kv_bytes"] == (LONG + 4) // PAGE * PAGE_BYTES * LAYERS
    assert cache.memory() == reserved | {"resident_bytes": BUDGET * PAGE_BYTES * LAYERS}


@pytest.mark.parametrize("rows", [1, 2])
def test_pages_in_memory_are_as_many_as_was_said_and_the_rest_lies_on_disk(llama, rows):
    prompt = make_prompt(LONG, batch=rows)
    cache = make_cache(llama, host_pages=10)
    cache.allocate(llama, rows, HEADS, HEAD_SIZE, LONG + 4)
    assert torch.equal(generated(llama, cache, prompt), continue_prompt(llama, prompt, 4))
    memory = cache.memory()
    assert memory["host_kv_bytes"] == 10 * PAGE_BYTES * LAYERS * rows
    assert memory["disk_kv_bytes"] == ((LONG + 4) // PAGE - 10) * PAGE_BYTES * LAYERS * rows


# --- what is really allocated -----------------------------------------------------------------------------------------


class Allocations(TorchDispatchMode):
    """Follows the floating-point tensors that torch makes inside: the most bytes alive at a time, and the largest one.

    A tensor that shares its memory with others counts once. Token ids and masks are integers and grow with the context;
    they are no keys and values. Files that are mapped are the host's, and not counted.
    """

    def __init__(self):
        super().__init__()
        self.alive: dict[int, tuple[int, int]] = {}  # address -> how many tensors use it, bytes
        self.bytes = self.peak = self.largest = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        known = {tensor.untyped_storage().data_ptr() for tensor in tensors_of((arguments, options))}
        made = function(*arguments, **(options or {}))
        if function is not torch.ops.aten.from_file.default:
            for tensor in tensors_of(made):
                self._note(tensor, known)
        return made

    def _note(self, tensor, known):
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if address not in self.alive and (address in known or not size):
            return  # a view of what was there before
        users, _ = self.alive.get(address, (0, 0))
        if not users:
            self.bytes += size
            self.peak, self.largest = max(self.peak, self.bytes), max(self.largest, size)
        self.alive[address] = users + 1, size
        weakref.finalize(tensor, self._gone, address)

    def _gone(self, address):
        users, size = self.alive.pop(address)
        if users > 1:
            self.alive[address] = users - 1, size
        else:
            self.bytes -= size


def tensors_of(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


def allocations_of(model, cache, length, new_tokens=4):
    """Of a generation whose host pages are mapped files, so that what is counted is the device's."""
    gc.collect()
    with Allocations() as counted:
        generated(model, cache, make_prompt(length), new_tokens)
    return counted


def test_the_count_sees_a_context_that_is_kept_whole(llama):
    """Not attached, all keys and values are put together; else a small figure below would prove nothing."""
    whole = 2 * HEADS * LONG * HEAD_SIZE * 4
    with Allocations() as counted:
        continue_prompt(llama, make_prompt(LONG), 2, past_key_values=make_cache(llama, host_pages=0))
    assert counted.largest >= whole and counted.peak >= 2 * whole


@every_kind
def test_nothing_that_grows_with_the_context_is_allocated_on_the_device(llama, kind):
    """Prefill but for one output of a chunk: how many of them there are at a time depends on how a wave's pages lie.
    A decode step keeps one output and its log-sum-exp for each page, until it merges them, and merging takes them three
    times."""
    lengths = [(LONG - 5) // n for n in (3, 2, 1)]  # whole chunks
    *shorter, prefill = [allocations_of(llama, make_cache(llama, kind, host_pages=0), length, 1) for length in lengths]
    output_of_a_chunk = 4 * CHUNK * HEAD_SIZE * 4  # query heads, positions, channels, bytes
    assert prefill.peak <= max(one.peak for one in shorter) + output_of_a_chunk
    assert {prefill.largest} == {one.largest for one in shorter}
    whole_of_a_layer = 2 * HEADS * LONG * HEAD_SIZE * 4
    assert prefill.largest < whole_of_a_layer / 4
    decode = allocations_of(llama, make_cache(llama, kind, host_pages=0), lengths[-1], 3)
    parts_of_a_page = 4 * (HEAD_SIZE + 1) * 4  # query heads, channels and one number more, bytes
    assert decode.peak <= prefill.peak + 3 * parts_of_a_page * (lengths[-1] // PAGE + 1)


def test_what_is_allocated_beside_the_pool_is_a_chunks_worth(llama):
    """A chunk's forward pass without a cache is what the model itself takes. Beside it there are the parts of attention
    to the pages of a wave, in float32: for each page an output as large as the chunk's queries, and those it is merged
    from and into."""
    prompt = make_prompt(CHUNK)
    with Allocations() as model_alone, torch.no_grad():
        llama(prompt.ids, use_cache=False)
    pool = (BUDGET + STAGING) * PAGE_BYTES * LAYERS
    chunk_queries = CHUNK * 4 * HEAD_SIZE * 4
    counted = allocations_of(llama, make_cache(llama, host_pages=0), LONG)
    assert pool < counted.peak < pool + model_alone.peak + 4 * (BUDGET + STAGING) * chunk_queries


# --- over and over ----------------------------------------------------------------------------------------------------


def rss_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="this system has no /proc")
@pytest.mark.parametrize("kind", ["reactive", "predictive"])
def test_fifty_runs_leave_no_memory_no_thread_no_descriptor_and_no_file(llama, kind, tmp_path):
    """A run holds 2 MiB of host pages, so that runs that were kept would show: fifty of them would be 100 MiB."""

    def run(fails):
        cache = make_cache(llama, kind, host_pages=4, disk_dir=str(tmp_path))
        cache.allocate(llama, 1, HEADS, HEAD_SIZE, 2048 * PAGE // 4)
        for layer in cache.paged_layers:
            for segment in layer.pages.store.host._segments:
                segment.zero_()  # touched, as memory that is only asked for takes none
        assert cache.memory()["host_kv_bytes"] + cache.memory()["disk_kv_bytes"] == 512 * PAGE_BYTES * LAYERS
        with contextlib.suppress(ZeroDivisionError):
            generated(llama, cache, make_prompt(60), stopping_criteria=[stop_with_an_error] if fails else None)

    def stop_with_an_error(ids, scores, **options):
        raise ZeroDivisionError

    def held():
        return threading.active_count(), len(os.listdir("/proc/self/fd")), os.listdir(tmp_path)

    for number in range(5):  # what is loaded and kept once
        run(number % 2)
    before, memory_before = held(), rss_bytes()
    for number in range(50):
        run(number % 2)
    assert held() == before and before[2] == []
    assert rss_bytes() - memory_before < 20 * 2**20  # ten runs of fifty


# --- CUDA -------------------------------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize("paging", [{}, {"selector": "quest", "attention_pages": 8}], ids=["exact", "quest"])
def test_on_cuda_the_allocators_peak_is_the_budget_and_a_chunk_however_long_the_context(paging):
    """Slack: 1 MiB for ids, masks, positions and the allocator's rounding; they grow by bytes for each position."""
    model = make_model(CONFIGS["llama_gqa"]).cuda()
    slack = 2**20
    size, budget, staging, chunk = 64, 8, 4, 256
    page_bytes = 2 * HEADS * size * HEAD_SIZE * 4
    peaks = {}

    def peak_above_weights(work):
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def chunk_alone():
        with torch.no_grad():
            model(make_prompt(chunk).ids.cuda(), use_cache=False)

    chunk_alone()  # the libraries' own workspaces are taken once
    one_chunk = peak_above_weights(chunk_alone)
    for length in (40 * budget * size, 80 * budget * size):
        prompt = make_prompt(length)
        prompt = Prompt(prompt.ids.cuda(), prompt.mask.cuda())
        digest_bytes = 0

        def run(prompt=prompt, length=length):
            nonlocal digest_bytes
            cache = PagedKVCache(
                model.config, page_size=size, max_gpu_pages=budget, staging_pages=staging, link="auto", **paging
            )
            cache.allocate(model, 1, HEADS, HEAD_SIZE, length + 8)
            generated(model, cache, prompt, 8, prefill_chunk_size=chunk)
            digest_bytes = cache.memory()["digest_bytes"]

        peaks[length] = peak_above_weights(run) - digest_bytes
    pool = (budget + staging) * page_bytes * LAYERS
    # Parts of attention to a wave: an output as large as the chunk's queries for each page, and what they merge into.
    parts = 4 * (budget + staging) * chunk * 4 * HEAD_SIZE * 4
    short, long = peaks.values()
    assert short <= pool + one_chunk + parts + slack
    assert long - short <= slack
