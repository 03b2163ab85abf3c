"""A page table on the device chooses, finds and evicts as the host's does, and nothing is asked of the device."""

from __future__ import annotations

import ctypes
from collections import Counter, OrderedDict
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import CONFIGS, Prompt, continue_prompt, make_model, make_prompt
from torch.overrides import TorchFunctionMode

from device_page_table import DevicePageTable, gather_with_torch, look_up_with_torch
from kv_paging import PagedKVCache
from metrics import Timing
from predictive_prefetch import PrefetchingKVCache

PAGING = {"page_size": 8, "max_gpu_pages": 8, "staging_pages": 3, "link": "memory"}
QUEST = {"selector": "quest", "attention_pages": 5}


@pytest.fixture(scope="module")
def llama():
    return make_model(CONFIGS["llama_gqa"])


CUDA = pytest.param("cuda", marks=pytest.mark.cuda)
on_cuda = pytest.mark.parametrize("placed", [CUDA], indirect=True)


@pytest.fixture(params=["cpu", CUDA])
def placed(request, llama):
    """The model on each device; it goes back."""
    yield llama.to(request.param)
    llama.to("cpu")


def tokens_with(model, prompt, new_tokens=12, **paging):
    prompt = Prompt(prompt.ids.to(model.device), prompt.mask.to(model.device))
    cache = PagedKVCache(model.config, **PAGING | QUEST | paging)
    with cache.attached(model):
        tokens = continue_prompt(model, prompt, new_tokens, past_key_values=cache)
    return tokens, cache


# --- the definition -------------------------------------------------------------------------------------------------


class NaivePages:
    """An ordered dict of pages and slots, the least recently used first."""

    def __init__(self, n_slots):
        self.slots, self.free = OrderedDict(), list(range(n_slots))

    def ask(self, wanted):
        there = [page in self.slots for page in wanted]
        for page in reversed([page for page in wanted if page in self.slots]):
            self.slots.move_to_end(page)
        for page, was_there in zip(wanted, there, strict=True):
            if not was_there:
                slot = self.free.pop(0) if self.free else self.slots.popitem(last=False)[1]
                self.slots[page] = slot
        for page in reversed(wanted):
            self.slots.move_to_end(page)
        return [self.slots[page] for page in wanted], there


@settings(max_examples=100)
@given(st.integers(1, 6), st.data())
def test_looking_up_is_lru(n_slots, data):
    n_pages, naive, now = 10, NaivePages(n_slots), 1
    slot_of, page_in = torch.full((n_pages,), -1), torch.full((n_slots,), -1)
    used_at = torch.zeros(n_slots, dtype=torch.int64)
    for _ in range(data.draw(st.integers(1, 12))):
        wanted = data.draw(st.lists(st.integers(0, n_pages - 1), unique=True, min_size=1, max_size=n_slots))
        slots, was_there = look_up_with_torch(torch.tensor(wanted), slot_of, page_in, used_at, now)
        now += len(wanted)
        assert (slots.tolist(), [there == 1 for there in was_there.tolist()]) == naive.ask(wanted)
        assert {page: slot for page, slot in enumerate(slot_of.tolist()) if slot >= 0} == dict(naive.slots)
        assert all(page_in[slot] == page for page, slot in naive.slots.items())


def test_gathering_puts_pages_side_by_side_and_keeps_those_that_were_missing():
    hosts, pool = torch.randn(9, 4, 2, 1, 8), torch.zeros(6, 4, 2, 1, 8)
    pool[[1, 5]], places = torch.randn(2, 4, 2, 1, 8), torch.tensor([3, 1, 0])
    before = pool.clone()
    wanted, slots, was_there = [7, 2], torch.tensor([2, 1]), torch.tensor([0, 1], dtype=torch.int8)
    block = gather_with_torch(pool, places, slots, was_there, [hosts[page] for page in wanted], torch.tensor([5]))
    assert torch.equal(block, torch.stack([hosts[7], before[1], before[5]]))
    before[0] = hosts[7]
    assert torch.equal(pool, before)


# --- in a cache -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [30, 64, 97, 200])
@pytest.mark.parametrize("sinks_and_recent", [(1, 1), (0, 1), (2, 3)])
def test_tokens_are_those_of_the_hosts_table(placed, length, sinks_and_recent):
    sinks, recent = sinks_and_recent
    prompt = make_prompt(length)
    how = {"sink_pages": sinks, "recent_pages": recent, "attention_pages": 6}
    ours, cache = tokens_with(placed, prompt, 20, page_table="device", **how)
    theirs, other = tokens_with(placed, prompt, 20, **how)
    assert torch.equal(ours, theirs)
    decode, expected = (one.recorder.snapshot("decode") for one in (cache, other))
    for name in ("accesses", "shadow_hits", "shadow_slots_hits"):  # the same pages were asked for
        assert decode[name] == expected[name]
    assert decode["hits"] + decode["misses"] == decode["accesses"] and decode["h2d_pages"] == decode["misses"]


def test_a_page_missed_costs_another_its_slot_once_none_is_free(llama):
    def decode(n_pages):
        how = {"page_table": "device", "max_gpu_pages": n_pages, "attention_pages": 6}
        return tokens_with(llama, make_prompt(200), 40, **how)[1].recorder.snapshot("decode")

    opened = 2 * 5  # in each layer, and a page leaves the host's table for each
    full, roomy = decode(8), decode(60)
    assert full["misses"] > 100 and full["evictions"] == full["misses"] + opened
    assert roomy["misses"] > 0 and roomy["evictions"] <= opened


def test_rows_of_a_batch_have_tables_of_their_own(placed):
    prompt = make_prompt(120, batch=3)
    assert torch.equal(tokens_with(placed, prompt, page_table="device")[0], tokens_with(placed, prompt)[0])


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}])
def test_rows_may_be_copied_and_dropped(llama, options):
    def generated(**paging):
        torch.manual_seed(0)
        cache = PagedKVCache(llama.config, **PAGING | QUEST | paging)
        with cache.attached(llama):
            return continue_prompt(llama, make_prompt(90), 12, past_key_values=cache, **options)

    assert torch.equal(generated(page_table="device"), generated())


def test_a_context_is_continued_cropped_and_used_again(llama):
    def run(page_table):
        cache, seen = PagedKVCache(llama.config, **PAGING | QUEST, page_table=page_table), []
        prompt = make_prompt(100).ids
        with cache.attached(llama), torch.inference_mode():
            for _ in range(2):
                llama(prompt, past_key_values=cache)
                for step in range(30):
                    token = torch.tensor([[5 + step]])
                    seen.append(llama(token, past_key_values=cache).logits[0, -1].argmax().item())
                    if step == 9:
                        cache.crop(-21)
                    if step == 19:
                        llama(prompt[:, :40], past_key_values=cache)
                cache.reset()
        return seen

    assert run("device") == run("host")


@pytest.mark.parametrize("page_table, is_known", [("host", True), ("device", False)])
def test_how_long_pages_travel_is_not_known_where_they_are_read_in_passing(llama, page_table, is_known):
    _, cache = tokens_with(llama, make_prompt(90), page_table=page_table)
    figures = cache.figures(Timing.from_token_times([], batch_size=1, clock="none"))["cache"]
    assert figures["h2d_bytes"] > 0
    for name in ("transfer_ms", "hidden_transfer_share", "effective_bandwidth_gb_s"):
        assert (figures[name] is not None) == is_known, name


def test_slots_that_were_lent_come_back(llama):
    cache = PagedKVCache(llama.config, **PAGING | QUEST, page_table="device")
    with cache.attached(llama), torch.inference_mode():
        llama(make_prompt(150).ids, past_key_values=cache)
        for _ in range(20):
            llama(torch.tensor([[7]]), past_key_values=cache)
        assert cache.memory()["resident_bytes"] <= 8 * cache.page_bytes * len(cache.paged_layers)
        cache.crop(-1)
    for layer in cache.paged_layers:
        table = layer.pages.sequences[0].table
        assert sorted([*table.free_slots, *table.resident.values()]) == list(range(11))


@on_cuda
def test_the_host_waits_for_nothing_in_a_decode_step(placed):
    cache = PagedKVCache(placed.config, **PAGING | QUEST, page_table="device")
    token = torch.tensor([[7]], device="cuda")
    with cache.attached(placed), torch.inference_mode():
        placed(make_prompt(100).ids.to("cuda"), past_key_values=cache)
        for _ in range(9):
            placed(token, past_key_values=cache)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(20):  # pages open and fill meanwhile
                placed(token, past_key_values=cache)
        finally:
            torch.cuda.set_sync_debug_mode("default")


class ReadsByTheHost(TorchFunctionMode):
    """Counts where the host reads a value of a tensor, or needs one to go on, by what is called for it."""

    COPIES = frozenset(("tolist", "item", "numpy", "cpu", "nonzero", "masked_select", "equal", "unique"))
    CONVERSIONS = frozenset(("__bool__", "__int__", "__float__", "__index__", "__contains__"))

    def __init__(self):
        super().__init__()
        self.seen, self.looks_away = Counter(), False

    def __torch_function__(self, function, types, arguments=(), options=None):
        name = getattr(function, "__name__", "")
        by_mask = name == "__getitem__" and any(
            isinstance(one, torch.Tensor) and one.dtype == torch.bool for one in flat(arguments[1])
        )
        if (name in self.COPIES | self.CONVERSIONS or by_mask) and not self.looks_away:
            self.seen[name] += 1
        return function(*arguments, **(options or {}))


def flat(index):
    return index if isinstance(index, tuple) else (index,)


class DefinedKernels:
    """Stands in for page_kernels.py, by the definitions: what the device would do, so nobody looks."""

    def __init__(self, reads):
        self.reads = reads

    @contextmanager
    def on_the_device(self):
        self.reads.looks_away = True
        yield
        self.reads.looks_away = False

    def look_up(self, *request):
        with self.on_the_device():
            return look_up_with_torch(*request)

    def gather(self, pool, places, slots, was_there, wanted, address_of, known):
        with self.on_the_device():
            hosts = [page_at(address, like=pool[0]) for address in address_of[wanted].tolist()]
            return gather_with_torch(pool, places, slots, was_there, hosts, known)


def page_at(address, like):
    memory = (ctypes.c_char * like.nbytes).from_address(address)
    return torch.frombuffer(memory, dtype=like.dtype).view(like.shape)


EXACT = {"selector": "all", "attention_pages": None}
AHEAD = {"predictor": "layer_ahead", "prefetch_k": 3}


@pytest.mark.parametrize(
    ("settings", "reads_of_a_layer"),
    [(EXACT, {}), (EXACT | AHEAD, {}), ({}, {"tolist": 1}), ({"page_table": "device"}, {})],
    ids=["exact", "exact, predictive", "selection", "selection, device table"],
)
def test_in_a_decode_step_the_host_reads_only_what_a_selector_chose_for_its_own_table(
    llama, monkeypatch, settings, reads_of_a_layer
):
    reads, prepare = ReadsByTheHost(), DevicePageTable.__init__

    def with_kernels(self, *arguments):
        prepare(self, *arguments)
        self.kernels = DefinedKernels(reads)

    monkeypatch.setattr(DevicePageTable, "__init__", with_kernels)
    cache_type = PrefetchingKVCache if "predictor" in settings else PagedKVCache
    cache = cache_type(llama.config, **PAGING | QUEST | settings)
    with cache.attached(llama), torch.inference_mode():
        llama(make_prompt(100).ids, past_key_values=cache)
        with reads:
            for _ in range(20):  # pages open and fill meanwhile
                llama(torch.tensor([[7]]), past_key_values=cache)
    n_asked = 20 * len(cache.paged_layers)
    assert reads.seen == {name: n_asked * count for name, count in reads_of_a_layer.items()}
    assert cache.recorder.snapshot("decode")["h2d_pages"] > 0


def test_who_watches_attention_sees_the_same_pages_and_shares(placed):
    class Watching(PagedKVCache):
        def attended(self, layer, sequence, attention):
            seen.append((layer.layer_idx, dict(zip(attention.pages, attention.mass(), strict=True))))

    def run(page_table):
        cache = Watching(placed.config, **PAGING | QUEST, page_table=page_table)
        prompt = make_prompt(150)
        with cache.attached(placed):
            continue_prompt(placed, Prompt(prompt.ids.to(placed.device), None), 12, past_key_values=cache)
        return cache

    seen: list = []
    run("device")
    ours, seen = seen, []
    run("host")
    assert len(ours) == len(seen) > 0
    for (layer, shares), (other_layer, expected) in zip(ours, seen, strict=True):
        assert layer == other_layer and shares == pytest.approx(expected, abs=1e-5)


@on_cuda
def test_memory_that_is_not_pinned_is_refused_as_soon_as_pages_lie_there(placed):
    cache = PagedKVCache(placed.config, **PAGING | QUEST, page_table="device")
    with cache.attached(placed), torch.inference_mode():
        placed(make_prompt(100).ids.to("cuda"), past_key_values=cache)
        for layer in cache.paged_layers:
            layer.pages.store.host.is_pinned = False  # as if pinning what was added last had been refused
        with pytest.raises(RuntimeError, match="pinning was refused"):
            placed(torch.tensor([[7]], device="cuda"), past_key_values=cache)


def test_scores_that_cannot_be_ranked_are_an_error_when_the_counts_are_read(llama, monkeypatch):
    from page_selectors import Quest

    monkeypatch.setattr(
        Quest, "score", lambda self, query, digests: torch.full((len(digests), *query.shape[:2]), torch.nan)
    )
    with pytest.raises(ValueError, match="NaN"):
        tokens_with(llama, make_prompt(100), page_table="device")


# --- what it refuses ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"selector": "all", "attention_pages": None}, "choose a selector"),
        ({"policy": "fifo"}, "policy: lru"),
        ({"granularity": "kv_head"}, "granularity"),
        ({"access_order": "position"}, "access_order"),
        ({"on_miss": "skip"}, "on_miss"),
        ({"host_pages": 4}, "host_pages"),
        ({"record_pages": True}, "record_pages"),
        ({"attention_pages": 9}, "max_gpu_pages has to be"),
    ],
)
def test_what_does_not_go_with_it_is_refused(llama, settings, message):
    with pytest.raises(ValueError, match=message):
        PagedKVCache(llama.config, **PAGING | QUEST | settings, page_table="device")


def test_copying_ahead_is_refused(llama):
    with pytest.raises(ValueError, match="cannot copy others ahead"):
        PrefetchingKVCache(llama.config, **PAGING | QUEST, page_table="device", prefetch_k=2)


def test_a_simulated_link_is_refused(llama):
    with pytest.raises(ValueError, match="link: memory"):
        tokens_with(llama, make_prompt(40), page_table="device", link="pcie4-x16")


def test_a_share_that_outgrows_the_budget_is_an_error(llama):
    with pytest.raises(ValueError, match="raise max_gpu_pages"):
        tokens_with(llama, make_prompt(200), page_table="device", attention_pages=None, attention_fraction=0.5)
