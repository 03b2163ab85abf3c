"""How page bytes move: a pool of device slots, and the copies between it and the host pages.

One `PageStore` serves one layer. Its pool is one tensor `[n_slots, P, 2, K, D]` (position by position, its key and its
value), allocated once, and pages next to each other are one stretch of positions, which one kernel call attends to; in
which order their bytes lie, page_layout.py says. Host pages have the same shape and lie in host_pages.py. The page
table says which slot; the store never decides anything, it only moves bytes.

Copies go through a `Transport`, one for each device, and are first in, first out. A copy that reads what an earlier one
wrote, or writes where an earlier one read, therefore needs no further ordering:

* `StreamTransport` (CUDA): copies on a stream of their own. The stream waits for the computation issued so far, as a
  slot may still be read or written by it; computation waits for the *event* of a copy, never for the device.
* `ThreadTransport` (CPU): a worker thread does real copies. A simulated link then holds back each copy's completion
  until a bus of that bandwidth would have delivered it; the two directions of the bus are independent.

Waiting for a copy is the stall that this project measures: `Ticket.wait` returns it, in milliseconds, or on CUDA as a
function that reads it from events after the run.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from host_pages import HostPages
from links import Link
from page_layout import pool_of_pages
from timeline import DeviceTime

SPIN_SECONDS = 2e-4  # time.sleep overshoots by about this much, so the end of a wait is spun
WORKER_LOOK_SECONDS = 1.0  # how often a wait looks whether the worker thread is still there

Moves = Sequence[tuple[torch.Tensor, torch.Tensor]]


class TransferFailed(RuntimeError):
    """A copy between host and device did not complete."""


class Ticket(Protocol):
    """One copy under way."""

    error: BaseException | None  # why it failed, once it is done

    def done(self) -> bool: ...

    def wait(self) -> float | Callable[[], float]:
        """Make computation wait for the copy; returns the stall in ms, or a function that gives it after the run."""
        ...

    def moments(self) -> tuple[Any, Any] | None:
        """When the link began on it and when it had delivered it, as in timeline.py; None before that."""
        ...


class Transport(Protocol):
    """Moves pages between host and device, in the order asked for."""

    link: Link

    def copy(self, moves: Moves, to_device: bool, after: Sequence[Ticket] = ()) -> Ticket:
        """Start copying source to destination for each `(destination, source)`; returns at once.

        Args:
            after: earlier copies that this one reads from; it fails if one of them has.
        """
        ...

    def busy_ms(self) -> float:
        """Time the link has spent moving pages to the device since `restart_clock`, copies in order, gaps left out. It
        waits for those under way."""
        ...

    def busy_ms_so_far(self) -> float:
        """The same, of the copies that are known to be done, or booked on a simulated link; it waits for nothing."""
        ...

    def restart_clock(self) -> None: ...

    def adopt(self, pool: torch.Tensor) -> None:
        """Take note of device memory that copies will use, so that it outlives those under way."""
        ...


def transport_for(device: torch.device, link: Link) -> Transport:
    """The transport for a device: its own stream on CUDA, a worker thread on a CPU."""
    return StreamTransport(device, link) if device.type == "cuda" else ThreadTransport(link)


@dataclass
class _ThreadTicket:
    finished: threading.Event
    worker: threading.Thread
    due: float = 0.0  # perf_counter time before which a simulated link has not delivered
    began_at: float | None = None
    error: BaseException | None = None

    def done(self) -> bool:
        return self.finished.is_set() and time.perf_counter() >= self.due

    def moments(self) -> tuple[float, float] | None:
        return None if self.began_at is None else (self.began_at, self.due)

    def wait(self) -> float:
        if self.done() and self.error is None:
            return 0.0
        start = time.perf_counter()
        _wait_for_worker(self.finished, self.worker)
        if self.error is not None:
            raise TransferFailed(f"copying a page failed: {self.error}") from self.error
        remaining = self.due - time.perf_counter()
        if remaining > SPIN_SECONDS:
            time.sleep(remaining - SPIN_SECONDS)
        while time.perf_counter() < self.due:
            pass
        return 1000.0 * (time.perf_counter() - start)


def _wait_for_worker(event: threading.Event, worker: threading.Thread) -> None:
    """Wait for an event that only the worker sets, which one that has ended never will. A fork has none, for example:
    threads stay behind in the parent process."""
    while worker.is_alive() and not event.wait(WORKER_LOOK_SECONDS):
        pass
    if not event.is_set():
        raise TransferFailed("the thread that copies pages has ended")


class ThreadTransport:
    """Copies on a worker thread, completed no sooner than the link would deliver them."""

    def __init__(self, link: Link):
        self.link = link
        self._orders: queue.SimpleQueue = queue.SimpleQueue()
        self._link_free_at = {True: 0.0, False: 0.0}  # by direction: to the device, to the host
        self._busy_seconds = 0.0
        # The thread must not keep the transport alive, or neither would ever end.
        served = self._orders, weakref.ref(self)
        self._worker = threading.Thread(target=_serve, args=served, name="page-transfers", daemon=True)
        self._worker.start()
        weakref.finalize(self, _stop, self._orders, self._worker)

    def copy(self, moves: Moves, to_device: bool, after: Sequence[Ticket] = ()) -> Ticket:
        ticket = _ThreadTicket(threading.Event(), self._worker)
        self._orders.put((ticket, moves, to_device, after, time.perf_counter()))
        return ticket

    def busy_ms(self) -> float:
        all_done = threading.Event()
        self._orders.put(all_done)  # the worker sets it after all that was asked of it before
        _wait_for_worker(all_done, self._worker)
        return self.busy_ms_so_far()

    def busy_ms_so_far(self) -> float:
        return 1000.0 * self._busy_seconds

    def restart_clock(self) -> None:
        self._busy_seconds = 0.0

    def adopt(self, pool: torch.Tensor) -> None:
        pass  # an order under way holds its tensors

    def _charge(self, ticket: _ThreadTicket, n_bytes: int, to_device: bool, asked_at: float) -> None:
        """Book the link for a copy that has just been done, and date its ticket."""
        start = max(asked_at, self._link_free_at[to_device])
        ticket.due = max(start + self.link.transfer_seconds(n_bytes), time.perf_counter())
        self._link_free_at[to_device], ticket.began_at = ticket.due, start
        if to_device:
            self._busy_seconds += ticket.due - start


def _stop(orders: queue.SimpleQueue, worker: threading.Thread) -> None:
    """End the worker when its transport goes, or the interpreter: a thread must not be inside torch as Python exits."""
    orders.put(None)
    if worker is not threading.current_thread():
        worker.join()


def _serve(orders: queue.SimpleQueue, transport_ref: weakref.ref) -> None:
    while (order := orders.get()) is not None:
        _carry_out(order, transport_ref)
        del order  # or its tensors would be held until the next one comes


def _carry_out(order: Any, transport_ref: weakref.ref) -> None:
    if isinstance(order, threading.Event):
        order.set()
        return
    ticket, moves, to_device, after, asked_at = order
    try:
        for earlier in after:
            if earlier.error is not None:
                raise earlier.error
        n_bytes = 0
        for destination, source in moves:
            _copy_bytes(destination, source)
            n_bytes += source.nbytes
        transport = transport_ref()
        if transport is not None:
            transport._charge(ticket, n_bytes, to_device, asked_at)
        del transport
    except BaseException as error:  # whatever it is, it belongs to the thread that waits for this page
        ticket.error = error
    ticket.finished.set()


def _copy_bytes(destination: torch.Tensor, source: torch.Tensor) -> None:
    """One memory copy, through numpy: it releases the GIL and, unlike torch, starts no thread pool of its own."""
    destination.view(torch.uint8).numpy()[...] = source.view(torch.uint8).numpy()


@dataclass
class _StreamTicket:
    start: torch.cuda.Event
    event: torch.cuda.Event
    device: torch.device
    error: None = None  # an error of CUDA ends everything after it

    def done(self) -> bool:
        return self.event.query()

    def moments(self) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        return self.start, self.event

    def wait(self) -> float | Callable[[], float]:
        if self.event.query():
            return 0.0
        stream = torch.cuda.current_stream(self.device)
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record(stream)
        stream.wait_event(self.event)
        after.record(stream)
        return DeviceTime([(before, after)])


class StreamTransport:
    """Copies on a CUDA stream of their own, ordered by events."""

    def __init__(self, device: torch.device, link: Link):
        self.link, self.device = link, device
        self._stream = torch.cuda.Stream(device)
        self._spans: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()  # copies not known to be done
        self._busy_ms = 0.0

    def copy(self, moves: Moves, to_device: bool, after: Sequence[Ticket] = ()) -> Ticket:
        # `after` needs no look: the stream keeps the order, and an error of CUDA ends everything after it.
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            start.record(self._stream)
            for destination, source in moves:
                destination.copy_(source, non_blocking=True)
            end.record(self._stream)
        if to_device:
            self._spans.append((start, end))
        return _StreamTicket(start, end, self.device)

    def busy_ms(self) -> float:
        self._stream.synchronize()
        return self.busy_ms_so_far()

    def busy_ms_so_far(self) -> float:
        while self._spans and self._spans[0][1].query():
            start, end = self._spans.popleft()
            self._busy_ms += start.elapsed_time(end)
        return self._busy_ms

    def restart_clock(self) -> None:
        self._spans.clear()
        self._busy_ms = 0.0

    def adopt(self, pool: torch.Tensor) -> None:
        # Else the allocator could give the memory of a dropped cache away while a last prefetch still writes to it.
        pool.record_stream(self._stream)


class PageStore:
    """The device slots of one layer, and the copies between them and its host pages.

    Args:
        n_slots: device slots.
        page_shape: (P, 2, K, D): positions of a page, keys and values, key/value heads, head size.
        dtype, device: of the pool.
        transport: what copies travel on; shared by the layers of a device.
        memory_rows, disk_dir: how many host pages lie in memory, and where the others do; see `HostPages`.
        by_head: how pages lie in memory; see page_layout.py.

    Attributes:
        pool: [n_slots, P, 2, K, D]; another tensor after `select_lanes` with another number of lanes.
        host: the host pages. Rows go back through `release`, which knows of the copies.
    """

    def __init__(
        self,
        n_slots: int,
        page_shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        transport: Transport,
        memory_rows: int | None = None,
        disk_dir: Path | str | None = None,
        by_head: bool = False,
    ):
        self._made_like = {"page_shape": page_shape, "by_head": by_head, "dtype": dtype, "device": device}
        # Zeros touch the memory now, outside of any clock. And never an inference tensor, which a caller outside
        # inference mode could not write to.
        with torch.inference_mode(False):
            self.pool = pool_of_pages(torch.zeros, n_slots, **self._made_like)
        transport.adopt(self.pool)
        self.transport = transport
        self.host = HostPages(page_shape, dtype, device.type == "cuda", memory_rows, disk_dir, by_head)
        self._to_host: dict[int, Ticket] = {}  # slot -> copy that still reads it
        self._to_device: dict[int, Ticket] = {}  # slot -> copy that still writes it
        self._sealing: dict[int, Ticket] = {}  # host row -> copy that writes it, until it is known to have arrived

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, keys and values."""
        return self.pool[0].nbytes

    def reserve_host(self, n_rows: int) -> None:
        """Allocate host pages for rows 0..n_rows-1 at once; raises as `HostPages.reserve` does."""
        self.host.reserve(n_rows)

    def seal(self, slot: int) -> int:
        """Start writing a full page to the host; returns the row taken for it, which is the caller's to release."""
        row = self.host.take()
        ticket = self.transport.copy([(self.host.page(row), self.pool[slot])], to_device=False)
        self._to_host[slot] = self._sealing[row] = ticket
        return row

    def seal_of(self, row: int) -> Ticket:
        """The copy that writes a row which was sealed just now."""
        return self._sealing[row]

    def await_seal(self, row: int) -> None:
        """Before computation reads a page on the host: wait until it is there."""
        if row in self._sealing:
            self._sealing[row].wait()

    def release(self, row: int) -> None:
        """Give a reference to a host row back, also while copies of it are under way: whoever takes the row next writes
        after them, as transports keep the order. That a page given up never arrived is no concern of the next one."""
        if self.host.release(row):
            self._sealing.pop(row, None)

    def fetch(self, pages: Sequence[tuple[int, int]]) -> Ticket:
        """Start copying `(slot, row)` pages to the device as one transfer, neighbours in one copy."""
        runs = self._runs(pages)
        moves = [(self.pool[slot : slot + length], self.host.stretch(row, length)) for slot, row, length in runs]
        sealing = {row: self._sealing[row] for _, row in pages if row in self._sealing}
        ticket = self.transport.copy(moves, to_device=True, after=list(sealing.values()))
        for row in [row for row, seal in sealing.items() if seal.done() and seal.error is None]:
            del self._sealing[row]  # a failed one stays: this copy may be given up, and the row be asked for again
        self._to_device.update((slot, ticket) for slot, _ in pages)
        return ticket

    def await_slot(self, slot: int) -> float | Callable[[], float]:
        """Before computation writes into a slot: wait until no copy reads or writes it any more. Returns the stall.

        A copy may still write into a free slot when the page it was made ahead for has been given up.
        """
        tickets = [copies.pop(slot) for copies in (self._to_host, self._to_device) if slot in copies]
        stalls = [ticket.wait() for ticket in tickets]
        on_device = [stall for stall in stalls if isinstance(stall, DeviceTime)]
        if on_device:
            return DeviceTime([pair for stall in on_device for pair in stall.pairs])
        return sum(stalls, 0.0)

    def drain(self) -> None:
        """Wait until every sealed page is on the host. Raises TransferFailed if one never arrived."""
        for ticket in self._sealing.values():
            ticket.wait()
        self._sealing.clear()

    def settle(self) -> None:
        """Wait until no copy is under way; that one failed no longer matters, as every page is about to be given up."""
        for copies in (self._to_host, self._to_device):
            for ticket in copies.values():
                with contextlib.suppress(TransferFailed):
                    ticket.wait()
            copies.clear()
        self._sealing.clear()

    def select_lanes(self, lanes: Sequence[int], slots_per_lane: int) -> None:
        """Reorder, repeat or drop whole sequences: lane `i` then holds what lane `lanes[i]` held, slot by slot.

        A lane is `slots_per_lane` consecutive slots. As many lanes as there were are changed in place, with a passing
        copy of those both read and written; for another number there is a new pool. Copies under way are waited for.

        Raises:
            TransferFailed: one of those copies failed; the pool is as it was.
            ValueError: the pool has no such lane, or is no whole number of lanes.
        """
        n_lanes, rest = divmod(len(self.pool), slots_per_lane)
        if rest or not lanes or not all(0 <= lane < n_lanes for lane in lanes):
            raise ValueError(f"{len(self.pool)} slots have no lanes {list(lanes)} of {slots_per_lane} slots")
        for copies in (self._to_host, self._to_device):
            for ticket in copies.values():
                ticket.wait()
            copies.clear()
        held = self.pool.view(n_lanes, slots_per_lane, *self.pool.shape[1:])
        with torch.inference_mode(False):  # as for the first pool
            if len(lanes) != n_lanes:
                self.pool = pool_of_pages(torch.empty, len(lanes) * slots_per_lane, **self._made_like)
                for lane, place in zip(lanes, self.pool.split(slots_per_lane), strict=True):
                    place.copy_(held[lane])
                self.transport.adopt(self.pool)
                return
            changed = [place for place, lane in enumerate(lanes) if place != lane]
            read_after_written = {lane: held[lane].clone() for lane in set(changed) & set(lanes)}
            for place in changed:
                held[place] = read_after_written.get(lanes[place], held[lanes[place]])

    def _runs(self, pages: Sequence[tuple[int, int]]) -> list[tuple[int, int, int]]:
        """`(slot, row, length)` of the stretches in which slot and row go up together, within a host segment."""
        runs: list[tuple[int, int, int]] = []
        for slot, row in sorted(pages):
            if runs:
                first_slot, first_row, length = runs[-1]
                if (slot, row) == (first_slot + length, first_row + length) and self.host.same_segment(row - 1, row):
                    runs[-1] = (first_slot, first_row, length + 1)
                    continue
            runs.append((slot, row, 1))
        return runs


def to_host_later(values: torch.Tensor) -> Callable[[], list[Any]]:
    """Start copying a small tensor to the host; the function returned waits for that copy alone, and gives a list."""
    if values.device.type != "cuda":
        return values.tolist
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(values.device))

    def read() -> list[Any]:
        copied.synchronize()
        return host.tolist()

    return read
