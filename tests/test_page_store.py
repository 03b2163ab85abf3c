"""Page bytes arrive where they were sent, whole and in order, and no sooner than the link allows."""

from __future__ import annotations

import gc
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import page_store
from links import BUS, MEMORY, Link
from page_store import HOST_ROWS_ADDED, PageStore, StreamTransport, ThreadTransport, TransferFailed, to_host_later

CPU = torch.device("cpu")
PAGE_SHAPE = (2, 4, 8)  # K, P, D
PAGE_BYTES = 2 * 2 * 4 * 8 * 4  # keys and values in float32
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHARED = ThreadTransport(MEMORY)


def make_store(n_slots=4, transport=SHARED, dtype=torch.float32) -> PageStore:
    return PageStore(n_slots, PAGE_SHAPE, dtype, CPU, transport)


def slow_link(seconds_per_page: float, latency_seconds: float = 0.0) -> Link:
    return Link("simulated", "slow", PAGE_BYTES / seconds_per_page / 1e9, latency_seconds * 1e6)


@pytest.fixture
def lazy_copies(monkeypatch):
    """Every copy begins 30 ms after the worker gets to it: whoever does not wait for it is too early."""
    copy = page_store._copy_bytes

    def copy_late(destination, source):
        time.sleep(0.03)
        copy(destination, source)

    monkeypatch.setattr(page_store, "_copy_bytes", copy_late)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


# --- bytes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_page_comes_back_bit_for_bit(dtype):
    store = make_store(dtype=dtype)
    page = torch.randn(2, *PAGE_SHAPE).to(dtype)
    page[0, 0, 0, :3] = torch.tensor([float("nan"), float("inf"), -0.0])
    store.pool[1] = page
    store.seal(1, row=5)
    store.fetch([(3, 5)]).wait()
    assert same_bits(store.pool[3], page)
    assert same_bits(store.host_page(5), page)


def test_a_page_is_keys_and_values_of_all_its_positions_and_heads():
    assert make_store().page_bytes == PAGE_BYTES
    assert make_store(dtype=torch.bfloat16).page_bytes == PAGE_BYTES // 2


def test_a_new_pool_is_zero_because_unused_slots_are_attended_with_weight_zero():
    assert not make_store().pool.any()


def test_reserved_host_memory_is_what_was_asked_for_and_is_not_reserved_twice():
    store = make_store()
    assert store.host_bytes == 0
    for n_rows in (10, 10, 4):
        store.reserve_host(n_rows)
        assert store.host_bytes == 10 * PAGE_BYTES
    store.host_page(9)
    assert store.host_bytes == 10 * PAGE_BYTES
    store.host_page(10)
    assert store.host_bytes == (10 + HOST_ROWS_ADDED) * PAGE_BYTES


@given(rows=st.lists(st.integers(0, 70), min_size=1, max_size=12, unique=True), reserved=st.integers(0, 20))
def test_host_rows_keep_their_bytes_as_host_memory_grows(rows, reserved):
    store = make_store()
    store.reserve_host(reserved)
    for row in rows:
        store.host_page(row).fill_(row)
    for row in rows:
        assert (store.host_page(row) == row).all()


@st.composite
def host_segments_and_transfers(draw):
    """The ends of host segments, and pages to copy: each slot and each row once, neighbours among them."""
    ends = sorted(draw(st.sets(st.integers(1, 24), min_size=1, max_size=4)))
    first_slots = draw(st.permutations(range(12)))
    rows = draw(st.permutations(range(ends[-1])))
    scattered = list(zip(first_slots, rows, strict=False))
    shift = draw(st.integers(0, max(0, ends[-1] - 1)))
    in_step = [(slot, slot + shift) for slot in range(12) if slot + shift < ends[-1]]
    pages = draw(st.sampled_from([scattered, in_step]))
    return ends, draw(st.permutations(pages))[: draw(st.integers(0, 12))]


@settings(max_examples=200, deadline=None)
@given(case=host_segments_and_transfers())
def test_pages_copied_in_stretches_are_the_pages_copied_one_by_one(case):
    ends, pages = case
    stores = [make_store(n_slots=12), make_store(n_slots=12)]
    for store in stores:
        for end in ends:
            store.reserve_host(end)
        for row in range(ends[-1]):
            store.host_page(row).fill_(row + 1)
    at_once, one_by_one = stores
    at_once.fetch(pages).wait()
    for page in pages:
        one_by_one.fetch([page]).wait()
    assert torch.equal(at_once.pool, one_by_one.pool)
    filled = dict(pages)
    for slot in range(12):
        assert (at_once.pool[slot] == (filled[slot] + 1 if slot in filled else 0)).all()


class CountingTransport:
    """Keeps what it is asked to copy, and copies nothing."""

    link = MEMORY

    def __init__(self):
        self.moves = []

    def adopt(self, pool):
        pass

    def copy(self, moves, to_device, after=()):
        self.moves = list(moves)


@pytest.mark.parametrize(
    ("pages", "n_copies"),
    [
        ([(0, 0), (1, 1), (2, 2)], 1),
        ([(2, 2), (0, 0), (1, 1)], 1),  # in any order
        ([(0, 2), (1, 3), (2, 4), (3, 5)], 2),  # rows 3 and 4 lie in different segments
        ([(0, 0), (2, 1)], 2),  # a gap between the slots
        ([(0, 1), (1, 0)], 2),  # slots go up, rows go down
    ],
)
def test_neighbours_within_a_host_segment_are_one_copy(pages, n_copies):
    store = make_store(transport=CountingTransport())
    store.reserve_host(4)
    store.reserve_host(8)
    store.fetch(pages)
    assert len(store.transport.moves) == n_copies
    assert sum(source.shape[0] for _, source in store.transport.moves) == len(pages)


def test_memory_made_in_inference_mode_can_be_written_outside_of_it():
    with torch.inference_mode():
        store = make_store()
        store.reserve_host(2)
    store.pool[0].fill_(1.0)
    store.host_page(1).fill_(2.0)  # an inference tensor would raise
    assert (store.pool[0].sum(), store.host_page(1).sum()) == (PAGE_BYTES // 4, PAGE_BYTES // 2)


# --- order ----------------------------------------------------------------------------------------------------


def test_a_page_fetched_right_after_it_was_sealed_has_the_sealed_bytes(lazy_copies):
    store = make_store()
    store.pool[0] = 7.0
    store.seal(0, row=0)
    store.fetch([(1, 0)]).wait()
    assert (store.pool[1] == 7.0).all()


def test_a_slot_refilled_right_after_sealing_does_not_change_what_was_sealed(lazy_copies):
    store = make_store()
    store.reserve_host(2)
    store.host_page(1).fill_(9.0)
    store.pool[0] = 7.0
    store.seal(0, row=0)
    store.fetch([(0, 1)]).wait()
    store.drain()
    assert (store.host_page(0) == 7.0).all()
    assert (store.pool[0] == 9.0).all()


def test_computation_that_awaits_its_slot_does_not_change_what_was_sealed(lazy_copies):
    store = make_store()
    store.pool[0] = 7.0
    store.seal(0, row=0)
    store.await_slot(0)
    store.pool[0] = 8.0
    store.drain()
    assert (store.host_page(0) == 7.0).all()


def test_computation_that_awaits_its_slot_is_not_overwritten_by_a_copy_given_up(lazy_copies):
    store = make_store()
    store.reserve_host(1)
    store.host_page(0).fill_(7.0)
    ticket = store.fetch([(0, 0)])
    store.await_slot(0)
    store.pool[0] = 8.0
    ticket.wait()
    assert (store.pool[0] == 8.0).all()


def test_a_slot_that_no_copy_uses_is_not_waited_for():
    store = make_store()
    assert store.await_slot(2) == 0.0
    store.seal(2, row=0)
    store.await_slot(2)
    assert store.await_slot(2) == 0.0  # it was waited for already


def test_a_drained_store_has_every_sealed_page_on_the_host(lazy_copies):
    store = make_store()
    for slot in range(4):
        store.pool[slot] = slot + 1.0
        store.seal(slot, row=slot)
    store.drain()
    for row in range(4):
        assert (store.host_page(row) == row + 1.0).all()


def test_a_settled_store_has_no_copy_under_way_and_forgets_the_failed_ones(lazy_copies):
    store = make_store(transport=ThreadTransport(MEMORY))
    store.reserve_host(2)
    store.host_page(1).fill_(3.0)
    store.pool[0] = 7.0
    store.seal(0, row=0)
    store.fetch([(1, 1)])
    store._to_device[2] = store.transport.copy([(torch.zeros(3), torch.zeros(4))], to_device=True)
    store.settle()
    assert (store.host_page(0) == 7.0).all()
    assert (store.pool[1] == 3.0).all()
    assert store.await_slot(2) == 0.0


# --- the simulated link -----------------------------------------------------------------------------------------


def seconds_until_done(ticket, start: float) -> float:
    while not ticket.done():
        time.sleep(0.001)
    return time.perf_counter() - start


def test_a_copy_takes_latency_and_bytes_over_bandwidth_at_least():
    store = make_store(transport=ThreadTransport(slow_link(seconds_per_page=0.02, latency_seconds=0.03)))
    store.reserve_host(4)
    start = time.perf_counter()
    ticket = store.fetch([(0, 0), (1, 1)])
    assert seconds_until_done(ticket, start) >= 0.03 + 2 * 0.02
    assert ticket.wait() == 0.0  # nothing is left to wait for


def test_waiting_ends_when_the_link_has_delivered():
    store = make_store(transport=ThreadTransport(slow_link(seconds_per_page=0.15)))
    store.reserve_host(1)
    start = time.perf_counter()
    ticket = store.fetch([(0, 0)])
    stall_ms = ticket.wait()
    elapsed_ms = 1000 * (time.perf_counter() - start)
    assert ticket.done()
    assert elapsed_ms >= 150
    assert 0 <= stall_ms <= elapsed_ms


def test_the_stall_is_the_time_that_waiting_took_in_ms(monkeypatch):
    """On a clock that only sleeping moves, by 1 ns for each look besides, so that a spinning wait ends: the page takes
    150 ms, of which 30 ms are over when it is waited for."""
    now = [1000.0]

    def look() -> float:
        now[0] += 1e-9
        return now[0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(page_store, "SPIN_SECONDS", 1e-6)
    monkeypatch.setattr(page_store, "time", SimpleNamespace(perf_counter=look, sleep=sleep))
    store = make_store(transport=ThreadTransport(slow_link(seconds_per_page=0.15)))
    store.reserve_host(1)
    ticket = store.fetch([(0, 0)])
    sleep(0.03)
    assert ticket.wait() == pytest.approx(120, abs=0.1)


def test_waiting_does_not_end_early_where_sleeping_does(monkeypatch):
    monkeypatch.setattr(page_store.time, "sleep", lambda seconds: None)
    store = make_store(transport=ThreadTransport(slow_link(seconds_per_page=0.05)))
    store.reserve_host(1)
    start = time.perf_counter()
    store.fetch([(0, 0)]).wait()
    assert time.perf_counter() - start >= 0.05


def test_two_copies_share_the_link_one_after_the_other():
    store = make_store(transport=ThreadTransport(slow_link(seconds_per_page=0.02, latency_seconds=0.01)))
    store.reserve_host(2)
    start = time.perf_counter()
    first, second = store.fetch([(0, 0)]), store.fetch([(1, 1)])
    assert seconds_until_done(second, start) >= 2 * (0.01 + 0.02)
    assert first.done()


def test_the_two_directions_of_the_link_do_not_wait_for_each_other():
    transport = ThreadTransport(Link("simulated", "slow", bandwidth_gb_s=1e-6))  # 1000 bytes a second
    hour, moment = torch.ones(3_600_000, dtype=torch.uint8), torch.ones(10, dtype=torch.uint8)
    outward = transport.copy([(torch.empty_like(hour), hour)], to_device=False)
    inward = transport.copy([(torch.empty_like(moment), moment)], to_device=True)
    inward.wait()  # an hour, if it had to queue
    assert not outward.done()


def test_the_link_is_busy_for_the_copies_to_the_device_without_the_gaps_between_them():
    transport = ThreadTransport(slow_link(seconds_per_page=0.02))
    store = make_store(transport=transport)
    store.seal(0, row=0)
    store.drain()
    assert transport.busy_ms() == 0.0
    moving_ms = 0.0
    for _ in range(2):
        start = time.perf_counter()
        store.fetch([(1, 0)]).wait()
        moving_ms += 1000 * (time.perf_counter() - start)
        time.sleep(0.05)
    assert 39.9 <= transport.busy_ms() <= moving_ms + 0.1  # two pages of 20 ms; rounding aside
    transport.restart_clock()
    assert transport.busy_ms() == 0.0


# --- failures and ends --------------------------------------------------------------------------------------------


def test_a_failing_copy_is_raised_where_it_is_waited_for_and_later_copies_still_work():
    transport = ThreadTransport(MEMORY)
    failing = transport.copy([(torch.zeros(3), torch.zeros(4))], to_device=True)
    later = torch.zeros(3)
    transport.copy([(later, torch.ones(3))], to_device=True).wait()
    assert later.tolist() == [1.0, 1.0, 1.0]
    assert failing.done()
    for _ in range(2):
        with pytest.raises(TransferFailed, match="copying a page failed") as caught:
            failing.wait()
        assert isinstance(caught.value.__cause__, ValueError)


def test_a_page_that_could_not_be_sealed_is_raised_before_its_slot_is_used_again(monkeypatch):
    def refuse(destination, source):
        raise OSError("no more memory")

    store = make_store(transport=ThreadTransport(MEMORY))
    monkeypatch.setattr(page_store, "_copy_bytes", refuse)
    store.seal(0, row=0)
    with pytest.raises(TransferFailed, match="no more memory"):
        store.await_slot(0)


def transfer_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "page-transfers"}


def test_the_worker_thread_ends_with_its_transport():
    before = transfer_threads()
    transport = ThreadTransport(MEMORY)
    (worker,) = transfer_threads() - before
    del transport
    gc.collect()
    worker.join(timeout=60)
    assert not worker.is_alive()


def test_a_copy_asked_for_is_made_also_when_its_transport_goes_first(lazy_copies):
    arrived = torch.zeros(3)
    ticket = ThreadTransport(MEMORY).copy([(arrived, torch.ones(3))], to_device=True)
    gc.collect()
    ticket.wait()
    assert arrived.tolist() == [1.0, 1.0, 1.0]


def test_a_small_tensor_on_the_cpu_is_read_as_it_is():
    assert to_host_later(torch.tensor([0.25, 0.75]))() == [0.25, 0.75]


# --- CUDA -----------------------------------------------------------------------------------------------------------


def cuda_store(n_slots: int, page_shape: tuple[int, int, int], dtype=torch.float16) -> PageStore:
    device = torch.device("cuda", torch.cuda.current_device())
    return PageStore(n_slots, page_shape, dtype, device, StreamTransport(device, BUS))


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_cuda_a_page_comes_back_bit_for_bit(dtype):
    store = cuda_store(4, PAGE_SHAPE, dtype)
    page = torch.randn(2, *PAGE_SHAPE).to(dtype)
    store.pool[1] = page.cuda()
    store.seal(1, row=5)
    store.fetch([(3, 5)]).wait()
    assert same_bits(store.pool[3].cpu(), page)


@pytest.mark.cuda
def test_on_cuda_host_pages_are_pinned():
    store = cuda_store(2, PAGE_SHAPE)
    store.reserve_host(3)
    assert store.host_page(2).is_pinned()
    assert store.host_page(20).is_pinned()
    assert store.host_is_pinned


@pytest.mark.cuda
def test_on_cuda_computation_waits_for_the_copies_it_needs_and_copies_for_computation():
    store = cuda_store(2, (8, 4096, 128), torch.float32)  # 32 MiB a page: copies take milliseconds
    store.reserve_host(2)
    weights = torch.randn(4096, 4096, device="cuda")
    for turn in range(1, 6):
        for _ in range(10):
            weights = torch.tanh(weights @ weights)  # keeps the compute stream busy, so that a copy could run ahead
        store.await_slot(0)
        store.pool[0].fill_(turn)
        store.seal(0, row=0)  # must not read before the fill
        ticket = store.fetch([(1, 0)])
        stall = ticket.wait()
        total = store.pool[1].sum(dtype=torch.float64)  # must not read before the copy
        store.await_slot(0)
        store.pool[0].zero_()  # must not write before the seal has read
        assert total.item() == turn * store.pool[1].numel()
        assert (stall() if callable(stall) else stall) >= 0.0
    assert store.transport.busy_ms() > 0.0
    store.transport.restart_clock()
    assert store.transport.busy_ms() == 0.0


@pytest.mark.cuda
def test_on_cuda_a_small_tensor_is_read_after_its_own_copy():
    values = torch.arange(8, device="cuda", dtype=torch.float32)
    read = to_host_later(values / 2)
    assert read() == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5]


def test_a_page_whose_way_to_the_host_failed_is_never_fetched(monkeypatch):
    """Its host row holds something else, and reading it would give wrong tokens without a word."""
    store = PageStore(2, (1, 2, 4), torch.float32, torch.device("cpu"), ThreadTransport(MEMORY))
    with monkeypatch.context() as broken:
        broken.setattr(page_store, "_copy_bytes", lambda destination, source: 1 / 0)
        store.seal(0, row=0)
        store._to_host[0].finished.wait()
    ticket = store.fetch([(1, 0)])
    with pytest.raises(TransferFailed, match="division by zero"):
        ticket.wait()
