"""Page bytes arrive where they were sent, whole and in order, and no sooner than the link allows."""

from __future__ import annotations

import gc
import re
import threading
import time
import weakref
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import page_store
from host_pages import HOST_ROWS_ADDED
from links import BUS, MEMORY, Link
from page_store import PageStore, StreamTransport, ThreadTransport, TransferFailed, to_host_later

CPU = torch.device("cpu")
PAGE_SHAPE = (4, 2, 2, 8)  # P, keys and values, K, D
PAGE_BYTES = 2 * 2 * 4 * 8 * 4  # keys and values in float32
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHARED = ThreadTransport(MEMORY)


def make_store(n_slots=4, transport=SHARED, dtype=torch.float32, n_rows=0, **tiers) -> PageStore:
    """A store whose first `n_rows` host rows are taken."""
    return take_rows(PageStore(n_slots, PAGE_SHAPE, dtype, CPU, transport, **tiers), n_rows)


def take_rows(store: PageStore, n_rows: int) -> PageStore:
    for row in range(n_rows):
        assert store.host.take() == row
    return store


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


@pytest.mark.parametrize("memory_rows", [None, 5], ids=["memory", "disk"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_page_comes_back_bit_for_bit(dtype, memory_rows, tmp_path):
    store = make_store(dtype=dtype, n_rows=5, memory_rows=memory_rows, disk_dir=tmp_path)
    page = torch.randn(PAGE_SHAPE).to(dtype)
    page[0, 0, 0, :3] = torch.tensor([float("nan"), float("inf"), -0.0])
    store.pool[1] = page
    assert store.seal(1) == 5
    store.fetch([(3, 5)]).wait()
    assert same_bits(store.pool[3], page)
    assert same_bits(store.host.page(5), page)


def test_a_page_is_keys_and_values_of_all_its_positions_and_heads():
    assert make_store().page_bytes == PAGE_BYTES
    assert make_store(dtype=torch.bfloat16).page_bytes == PAGE_BYTES // 2


def test_a_new_pool_is_zero_because_unused_slots_are_attended_with_weight_zero():
    assert not make_store().pool.any()


def test_reserved_host_memory_is_what_was_asked_for_and_is_not_reserved_twice():
    store = make_store()
    assert store.host.nbytes == 0
    for n_rows in (10, 10, 4):
        store.reserve_host(n_rows)
        assert store.host.nbytes == 10 * PAGE_BYTES
    take_rows(store, 10)
    assert store.host.nbytes == 10 * PAGE_BYTES
    store.seal(0)
    assert store.host.nbytes == (10 + HOST_ROWS_ADDED) * PAGE_BYTES


@given(n_rows=st.integers(1, 70), reserved=st.integers(0, 20))
def test_host_rows_keep_their_bytes_as_host_memory_grows(n_rows, reserved):
    store = make_store()
    store.reserve_host(reserved)
    for row in range(n_rows):
        assert store.host.take() == row
        store.host.page(row).fill_(row)
    for row in range(n_rows):
        assert (store.host.page(row) == row).all()


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


@settings(max_examples=200)
@given(case=host_segments_and_transfers(), by_head=st.booleans())
def test_pages_copied_in_stretches_are_the_pages_copied_one_by_one(case, by_head):
    ends, pages = case
    stores = [make_store(n_slots=12, by_head=by_head), make_store(n_slots=12)]
    for store in stores:
        for end in ends:
            store.reserve_host(end)
        take_rows(store, ends[-1])
        for row in range(ends[-1]):
            store.host.page(row).fill_(row + 1)
    at_once, one_by_one = stores
    at_once.fetch(pages).wait()
    for page in pages:
        one_by_one.fetch([page]).wait()
    assert torch.equal(at_once.pool, one_by_one.pool)
    filled = dict(pages)
    for slot in range(12):
        assert (at_once.pool[slot] == (filled[slot] + 1 if slot in filled else 0)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_pages_that_lie_by_head_hold_what_they_would_by_position(dtype, tmp_path):
    stores = [make_store(12, dtype=dtype, by_head=by_head, memory_rows=2, disk_dir=tmp_path) for by_head in (0, 1)]
    written = torch.randn(12, *PAGE_SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype)
    for store in stores:
        store.pool.copy_(written)
        rows = [store.seal(slot) for slot in range(6)]  # two in memory, the others on disk
        store.drain()
        assert all(same_bits(store.host.page(row), written[slot]) for slot, row in enumerate(rows))
        store.fetch([(11 - place, row) for place, row in enumerate(rows)]).wait()
        assert same_bits(store.pool[6:], written[:6].flip(0))
        store.select_lanes([1, 0], 6)
        store.select_lanes([0, 1, 0], 6)  # in a new pool
        assert same_bits(store.pool, torch.cat([written[:6].flip(0), written[:6], written[:6].flip(0)]))
    by_position, by_head = (store.pool for store in stores)
    assert by_position.is_contiguous()
    assert by_head.permute(2, 3, 0, 1, 4).is_contiguous()  # [2, K, n, P, D]: a head's positions side by side
    assert by_head[3:7].flatten(0, 1).data_ptr() == by_head[3].data_ptr()  # a stretch is read in place


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
    take_rows(store, 8)
    store.fetch(pages)
    assert len(store.transport.moves) == n_copies
    assert sum(source.shape[0] for _, source in store.transport.moves) == len(pages)


def test_memory_made_in_inference_mode_can_be_written_outside_of_it():
    with torch.inference_mode():
        store = make_store(n_rows=2)
    store.pool[0].fill_(1.0)
    store.host.page(1).fill_(2.0)  # an inference tensor would raise
    assert (store.pool[0].sum(), store.host.page(1).sum()) == (PAGE_BYTES // 4, PAGE_BYTES // 2)


# --- order ----------------------------------------------------------------------------------------------------


def test_a_page_fetched_right_after_it_was_sealed_has_the_sealed_bytes(lazy_copies):
    store = make_store()
    store.pool[0] = 7.0
    store.fetch([(1, store.seal(0))]).wait()
    assert (store.pool[1] == 7.0).all()


def test_a_slot_refilled_right_after_sealing_does_not_change_what_was_sealed(lazy_copies):
    store = make_store(n_rows=1)
    store.host.page(0).fill_(9.0)
    store.pool[0] = 7.0
    sealed = store.seal(0)
    store.fetch([(0, 0)]).wait()
    store.drain()
    assert (store.host.page(sealed) == 7.0).all()
    assert (store.pool[0] == 9.0).all()


def test_computation_that_awaits_its_slot_does_not_change_what_was_sealed(lazy_copies):
    store = make_store()
    store.pool[0] = 7.0
    row = store.seal(0)
    store.await_slot(0)
    store.pool[0] = 8.0
    store.drain()
    assert (store.host.page(row) == 7.0).all()


def test_computation_that_awaits_its_slot_is_not_overwritten_by_a_copy_given_up(lazy_copies):
    store = make_store(n_rows=1)
    store.host.page(0).fill_(7.0)
    ticket = store.fetch([(0, 0)])
    store.await_slot(0)
    store.pool[0] = 8.0
    ticket.wait()
    assert (store.pool[0] == 8.0).all()


def test_a_slot_that_no_copy_uses_is_not_waited_for():
    store = make_store()
    assert store.await_slot(2) == 0.0
    store.seal(2)
    store.await_slot(2)
    assert store.await_slot(2) == 0.0  # it was waited for already


def test_a_drained_store_has_every_sealed_page_on_the_host(lazy_copies):
    store = make_store()
    rows = []
    for slot in range(4):
        store.pool[slot] = slot + 1.0
        rows.append(store.seal(slot))
    store.drain()
    for slot, row in enumerate(rows):
        assert (store.host.page(row) == slot + 1.0).all()


def test_a_settled_store_has_no_copy_under_way_and_forgets_the_failed_ones(lazy_copies):
    store = make_store(transport=ThreadTransport(MEMORY), n_rows=1)
    store.host.page(0).fill_(3.0)
    store.pool[0] = 7.0
    sealed = store.seal(0)
    store.fetch([(1, 0)])
    store._to_device[2] = store.transport.copy([(torch.zeros(3), torch.zeros(4))], to_device=True)
    store.settle()
    assert (store.host.page(sealed) == 7.0).all()
    assert (store.pool[1] == 3.0).all()
    assert store.await_slot(2) == 0.0


# --- lanes ------------------------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(n_lanes=st.integers(1, 5), slots_per_lane=st.integers(1, 3), data=st.data(), inference_mode=st.booleans())
def test_selected_lanes_are_those_that_indexing_gives(n_lanes, slots_per_lane, data, inference_mode):
    """Permutations, duplicates, fewer and more lanes among them."""
    lane = st.integers(0, n_lanes - 1)
    same_number = st.lists(lane, min_size=n_lanes, max_size=n_lanes)
    lanes = data.draw(st.permutations(range(n_lanes)) | same_number | st.lists(lane, min_size=1, max_size=7))
    store = make_store(n_slots=n_lanes * slots_per_lane)
    store.pool.copy_(torch.randn(store.pool.shape))
    by_lane = store.pool.clone().reshape(n_lanes, slots_per_lane, *store.pool.shape[1:])
    pool = store.pool
    with torch.inference_mode(inference_mode):
        store.select_lanes(lanes, slots_per_lane)
    assert torch.equal(store.pool, by_lane[torch.tensor(lanes)].flatten(0, 1))
    assert (store.pool is pool) == (len(lanes) == n_lanes)
    store.pool[0] = 1.0  # an inference tensor would raise


def test_a_new_pool_is_made_known_to_the_transport_and_the_old_one_is_let_go():
    adopted = []
    transport = CountingTransport()
    transport.adopt = lambda pool: adopted.append(weakref.ref(pool))
    store = make_store(transport=transport)
    store.select_lanes([1, 0], slots_per_lane=2)
    assert len(adopted) == 1
    store.select_lanes([1, 0, 1], slots_per_lane=2)
    old, new = adopted
    assert new() is store.pool
    assert old() is None


def test_lanes_are_selected_after_the_copies_under_way(lazy_copies):
    store = make_store(n_rows=1)
    store.host.page(0).fill_(3.0)
    store.pool[0] = 7.0
    sealed = store.seal(0)
    store.fetch([(3, 0)])
    store.select_lanes([3, 2, 1, 0], slots_per_lane=1)
    assert (store.pool[0] == 3.0).all()
    assert (store.pool[3] == 7.0).all()
    assert (store.host.page(sealed) == 7.0).all()
    assert [store.await_slot(slot) for slot in range(4)] == [0.0] * 4


@pytest.mark.parametrize("direction", ["_to_host", "_to_device"])
def test_lanes_are_not_selected_after_a_copy_that_failed(direction):
    store = make_store()
    store.pool[1] = 7.0
    getattr(store, direction)[0] = SHARED.copy([(torch.zeros(3), torch.zeros(4))], to_device=direction == "_to_device")
    for _ in range(2):
        with pytest.raises(TransferFailed):
            store.select_lanes([1, 0], slots_per_lane=2)
    assert (store.pool[1] == 7.0).all()


@pytest.mark.parametrize(("lanes", "slots_per_lane"), [([0, 2], 2), ([-1, 0], 2), ([], 2), ([0], 3)])
def test_lanes_that_are_not_there_are_refused(lanes, slots_per_lane):
    with pytest.raises(ValueError, match=rf"4 slots have no lanes {re.escape(str(lanes))} of {slots_per_lane} slots"):
        make_store(n_slots=4).select_lanes(lanes, slots_per_lane)


# --- the simulated link -----------------------------------------------------------------------------------------


def seconds_until_done(ticket, start: float) -> float:
    while not ticket.done():
        time.sleep(0.001)
    return time.perf_counter() - start


def test_a_copy_takes_latency_and_bytes_over_bandwidth_at_least():
    store = make_store(transport=ThreadTransport(slow_link(seconds_per_page=0.02, latency_seconds=0.03)), n_rows=4)
    start = time.perf_counter()
    ticket = store.fetch([(0, 0), (1, 1)])
    assert seconds_until_done(ticket, start) >= 0.03 + 2 * 0.02
    assert ticket.wait() == 0.0  # nothing is left to wait for


def test_waiting_ends_when_the_link_has_delivered():
    store = make_store(transport=ThreadTransport(slow_link(seconds_per_page=0.15)), n_rows=1)
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
    store = make_store(transport=ThreadTransport(slow_link(seconds_per_page=0.15)), n_rows=1)
    ticket = store.fetch([(0, 0)])
    sleep(0.03)
    assert ticket.wait() == pytest.approx(120, abs=0.1)


def test_waiting_does_not_end_early_where_sleeping_does(monkeypatch):
    monkeypatch.setattr(page_store.time, "sleep", lambda seconds: None)
    store = make_store(transport=ThreadTransport(slow_link(seconds_per_page=0.05)), n_rows=1)
    start = time.perf_counter()
    store.fetch([(0, 0)]).wait()
    assert time.perf_counter() - start >= 0.05


def test_two_copies_share_the_link_one_after_the_other():
    store = make_store(transport=ThreadTransport(slow_link(seconds_per_page=0.02, latency_seconds=0.01)), n_rows=2)
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
    row = store.seal(0)
    store.drain()
    assert transport.busy_ms() == 0.0
    moving_ms = 0.0
    for _ in range(2):
        start = time.perf_counter()
        store.fetch([(1, row)]).wait()
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
    store.seal(0)
    with pytest.raises(TransferFailed, match="no more memory"):
        store.await_slot(0)


def failed_seal(store: PageStore, monkeypatch) -> int:
    """The row of a page whose way to the host has failed."""
    with monkeypatch.context() as broken:
        broken.setattr(page_store, "_copy_bytes", lambda destination, source: 1 / 0)
        row = store.seal(0)
        store._to_host[0].finished.wait()
    return row


def test_a_page_whose_way_to_the_host_failed_is_never_fetched(monkeypatch):
    """Its host row holds something else, and reading it would give wrong tokens without a word."""
    store = make_store()
    row = failed_seal(store, monkeypatch)
    for slot in (1, 2):  # the first copy may have been made ahead, and given up
        ticket = store.fetch([(slot, row)])
        with pytest.raises(TransferFailed, match="division by zero"):
            ticket.wait()


def test_a_page_whose_way_to_the_host_failed_is_never_read_there(monkeypatch):
    store = make_store()
    failed_seal(store, monkeypatch)
    for _ in range(2):
        with pytest.raises(TransferFailed, match="division by zero"):
            store.drain()


def test_a_page_that_failed_stays_failed_for_those_who_share_it(monkeypatch):
    store = make_store()
    row = failed_seal(store, monkeypatch)
    store.host.share(row)
    store.release(row)
    with pytest.raises(TransferFailed, match="division by zero"):
        store.fetch([(1, row)]).wait()


@pytest.mark.parametrize("sealed_again", [True, False])
def test_a_page_that_failed_is_no_concern_of_the_next_one_in_its_row(sealed_again, monkeypatch):
    store = make_store()
    row = failed_seal(store, monkeypatch)
    store.release(row)
    store.pool[1] = 7.0
    if sealed_again:
        assert store.seal(1) == row
    else:
        assert store.host.take() == row
        store.host.page(row).fill_(7.0)
    store.fetch([(2, row)]).wait()
    store.drain()
    assert (store.pool[2] == 7.0).all()


def test_a_row_taken_again_while_its_last_page_is_copied_serves_both(lazy_copies):
    store = make_store()
    store.pool[0], store.pool[1] = 7.0, 8.0
    row = store.seal(0)
    old = store.fetch([(2, row)])
    store.release(row)
    assert store.seal(1) == row
    store.fetch([(3, row)]).wait()
    old.wait()
    assert (store.pool[2] == 7.0).all()
    assert (store.pool[3] == 8.0).all()


def test_a_wait_ends_with_an_error_when_the_thread_that_copies_has_ended(monkeypatch):
    monkeypatch.setattr(page_store, "WORKER_LOOK_SECONDS", 0.01)
    transport = ThreadTransport(MEMORY)
    arrived = torch.zeros(3)
    before = transport.copy([(arrived, torch.ones(3))], to_device=True)
    transport._orders.put(None)
    after = transport.copy([(torch.zeros(3), torch.ones(3))], to_device=True)
    for waiting in (after.wait, transport.busy_ms, after.wait):
        with pytest.raises(TransferFailed, match="the thread that copies pages has ended"):
            waiting()
    assert not after.done()
    before.wait()
    assert arrived.tolist() == [1.0, 1.0, 1.0]


def test_a_worker_that_ends_while_it_is_waited_for_is_noticed(monkeypatch):
    """However it came to end: here it never says that the copy is done."""
    monkeypatch.setattr(page_store, "WORKER_LOOK_SECONDS", 0.01)
    told_to_end = threading.Event()
    monkeypatch.setattr(page_store, "_serve", lambda orders, transport: told_to_end.wait())
    transport = ThreadTransport(MEMORY)
    ticket = transport.copy([(torch.zeros(3), torch.ones(3))], to_device=True)
    threading.Timer(0.05, told_to_end.set).start()
    with pytest.raises(TransferFailed, match="has ended"):
        ticket.wait()


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


def cuda_store(n_slots: int, page_shape: tuple[int, int, int], dtype=torch.float16, **tiers) -> PageStore:
    device = torch.device("cuda", torch.cuda.current_device())
    return PageStore(n_slots, page_shape, dtype, device, StreamTransport(device, BUS), **tiers)


@pytest.mark.cuda
@pytest.mark.parametrize("memory_rows", [None, 0], ids=["memory", "disk"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_cuda_a_page_comes_back_bit_for_bit(dtype, memory_rows, tmp_path):
    store = cuda_store(4, PAGE_SHAPE, dtype, memory_rows=memory_rows, disk_dir=tmp_path)
    page = torch.randn(PAGE_SHAPE).to(dtype)
    store.pool[1] = page.cuda()
    store.fetch([(3, store.seal(1))]).wait()
    assert same_bits(store.pool[3].cpu(), page)


@pytest.mark.cuda
def test_on_cuda_host_pages_are_pinned():
    store = cuda_store(2, PAGE_SHAPE)
    store.reserve_host(3)
    take_rows(store, 4)
    assert store.host.page(2).is_pinned()
    assert store.host.page(3).is_pinned()  # allocated when taken
    assert store.host.is_pinned


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
        row = store.seal(0)  # must not read before the fill
        ticket = store.fetch([(1, row)])
        stall = ticket.wait()
        total = store.pool[1].sum(dtype=torch.float64)  # must not read before the copy
        store.await_slot(0)
        store.pool[0].zero_()  # must not write before the seal has read
        store.release(row)  # and is taken again by the next turn
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
