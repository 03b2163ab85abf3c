"""Where page bytes live and how they move: a pool of device slots, host pages, and the copies between them.

One `PageStore` serves one layer. Its pool is one tensor `[n_slots, 2, K, P, D]` (keys, then values), allocated once, so
that a page is one contiguous block and one copy. Host pages have the same shape and, on CUDA, pinned memory. The page
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

import bisect
import contextlib
import queue
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from links import Link

HOST_ROWS_ADDED = 16  # host pages allocated at a time where the context outgrows what was reserved
SPIN_SECONDS = 2e-4  # time.sleep overshoots by about this much, so the end of a wait is spun


Moves = Sequence[tuple[torch.Tensor, torch.Tensor]]


class TransferFailed(RuntimeError):
    """A copy between host and device did not complete."""


class Ticket(Protocol):
    """One copy under way."""

    def done(self) -> bool: ...

    def wait(self) -> float | Callable[[], float]:
        """Make computation wait for the copy; returns the stall in ms, or a function that gives it after the run."""
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
        """Time the link has spent moving pages to the device since `restart_clock`, copies in order, gaps left out."""
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
    due: float = 0.0  # perf_counter time before which a simulated link has not delivered
    error: BaseException | None = None

    def done(self) -> bool:
        return self.finished.is_set() and time.perf_counter() >= self.due

    def wait(self) -> float:
        if self.done() and self.error is None:
            return 0.0
        start = time.perf_counter()
        self.finished.wait()
        if self.error is not None:
            raise TransferFailed(f"copying a page failed: {self.error}") from self.error
        remaining = self.due - time.perf_counter()
        if remaining > SPIN_SECONDS:
            time.sleep(remaining - SPIN_SECONDS)
        while time.perf_counter() < self.due:
            pass
        return 1000.0 * (time.perf_counter() - start)


class ThreadTransport:
    """Copies on a worker thread, completed no sooner than the link would deliver them."""

    def __init__(self, link: Link):
        self.link = link
        self._orders: queue.SimpleQueue = queue.SimpleQueue()
        self._link_free_at = {True: 0.0, False: 0.0}  # by direction: to the device, to the host
        self._busy_seconds = 0.0
        # The thread must not keep the transport alive, or neither would ever end.
        worker = threading.Thread(
            target=_serve, args=(self._orders, weakref.ref(self)), name="page-transfers", daemon=True
        )
        worker.start()
        weakref.finalize(self, _stop, self._orders, worker)

    def copy(self, moves: Moves, to_device: bool, after: Sequence[Ticket] = ()) -> Ticket:
        ticket = _ThreadTicket(threading.Event())
        self._orders.put((ticket, moves, to_device, after, time.perf_counter()))
        return ticket

    def busy_ms(self) -> float:
        self._finish_orders()
        return 1000.0 * self._busy_seconds

    def restart_clock(self) -> None:
        self._busy_seconds = 0.0

    def _finish_orders(self) -> None:
        """Wait until the worker has done all that was asked of it so far."""
        done = threading.Event()
        self._orders.put(done)
        done.wait()

    def adopt(self, pool: torch.Tensor) -> None:
        pass  # an order under way holds its tensors

    def _charge(self, ticket: _ThreadTicket, n_bytes: int, to_device: bool, asked_at: float) -> None:
        """Book the link for a copy that has just been done, and date its ticket."""
        start = max(asked_at, self._link_free_at[to_device])
        ticket.due = max(start + self.link.transfer_seconds(n_bytes), time.perf_counter())
        self._link_free_at[to_device] = ticket.due
        if to_device:
            self._busy_seconds += ticket.due - start


def _stop(orders: queue.SimpleQueue, worker: threading.Thread) -> None:
    """End the worker when its transport goes, or the interpreter: a thread must not be inside torch as Python exits."""
    orders.put(None)
    if worker is not threading.current_thread():
        worker.join()


def _serve(orders: queue.SimpleQueue, transport_ref: weakref.ref) -> None:
    while (order := orders.get()) is not None:
        if isinstance(order, threading.Event):
            order.set()
            continue
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
    event: torch.cuda.Event
    device: torch.device

    def done(self) -> bool:
        return self.event.query()

    def wait(self) -> float | Callable[[], float]:
        if self.event.query():
            return 0.0
        stream = torch.cuda.current_stream(self.device)
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record(stream)
        stream.wait_event(self.event)
        after.record(stream)
        return lambda: before.elapsed_time(after)


class StreamTransport:
    """Copies on a CUDA stream of their own, ordered by events."""

    def __init__(self, device: torch.device, link: Link):
        self.link, self.device = link, device
        self._stream = torch.cuda.Stream(device)
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

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
        return _StreamTicket(end, self.device)

    def busy_ms(self) -> float:
        self._stream.synchronize()
        return sum(start.elapsed_time(end) for start, end in self._spans)

    def restart_clock(self) -> None:
        self._spans = []

    def adopt(self, pool: torch.Tensor) -> None:
        # Else the allocator could give the memory of a dropped cache away while a last prefetch still writes to it.
        pool.record_stream(self._stream)


class PageStore:
    """The device slots and host pages of one layer.

    Args:
        n_slots: device slots.
        page_shape: (K, P, D): key/value heads, positions of a page, head size.
        dtype, device: of the pool.
        transport: what copies travel on; shared by the layers of a device.
    """

    def __init__(
        self,
        n_slots: int,
        page_shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        transport: Transport,
    ):
        # Zeros touch the memory now, outside of any clock. And never an inference tensor, which a caller outside
        # inference mode could not write to.
        with torch.inference_mode(False):
            self.pool = torch.zeros((n_slots, 2, *page_shape), dtype=dtype, device=device)
        transport.adopt(self.pool)
        self.transport = transport
        self.host_is_pinned = device.type == "cuda"
        self._segments: list[torch.Tensor] = []
        self._segment_ends: list[int] = []  # row after the last of each segment
        self._to_host: dict[int, Ticket] = {}  # slot -> copy that still reads it
        self._to_device: dict[int, Ticket] = {}  # slot -> copy that still writes it
        self._sealing: dict[int, Ticket] = {}  # host row -> copy that writes it, until the row is read

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, keys and values."""
        return self.pool[0].nbytes

    @property
    def host_bytes(self) -> int:
        return sum(segment.nbytes for segment in self._segments)

    def reserve_host(self, n_rows: int) -> None:
        """Allocate host pages for rows 0..n_rows-1 at once; pinning them is slow, and does not belong into a run."""
        reserved = self._segment_ends[-1] if self._segment_ends else 0
        if n_rows > reserved:
            self._segments.append(self._new_segment(n_rows - reserved))
            self._segment_ends.append(n_rows)

    def host_page(self, row: int) -> torch.Tensor:
        """The host page `[2, K, P, D]` of a row; allocated when first used."""
        if not self._segment_ends or row >= self._segment_ends[-1]:
            self.reserve_host(row + HOST_ROWS_ADDED)
        segment, place = self._place(row)
        return self._segments[segment][place]

    def seal(self, slot: int, row: int) -> None:
        """Start writing a full page to its host row."""
        ticket = self.transport.copy([(self.host_page(row), self.pool[slot])], to_device=False)
        self._to_host[slot] = self._sealing[row] = ticket

    def fetch(self, pages: Sequence[tuple[int, int]]) -> Ticket:
        """Start copying `(slot, row)` pages to the device as one transfer, neighbours in one copy."""
        moves = []
        for slot, row, length in self._runs(pages):
            segment, place = self._place(row)
            moves.append((self.pool[slot : slot + length], self._segments[segment][place : place + length]))
        sealing = [self._sealing.pop(row) for _, row in pages if row in self._sealing]
        ticket = self.transport.copy(moves, to_device=True, after=sealing)
        self._to_device.update((slot, ticket) for slot, _ in pages)
        return ticket

    def await_slot(self, slot: int) -> float | Callable[[], float]:
        """Before computation writes into a slot: wait until no copy reads or writes it any more. Returns the stall.

        A copy may still write into a free slot when the page it was made ahead for has been given up.
        """
        tickets = [copies.pop(slot) for copies in (self._to_host, self._to_device) if slot in copies]
        stalls = [ticket.wait() for ticket in tickets]
        if any(callable(stall) for stall in stalls):
            return lambda: sum(stall() if callable(stall) else stall for stall in stalls)
        return sum(stalls, 0.0)

    def drain(self) -> None:
        """Wait until every page on its way to the host is there."""
        for slot in list(self._to_host):
            self._to_host.pop(slot).wait()

    def settle(self) -> None:
        """Wait until no copy is under way, in either direction; that one failed no longer matters."""
        for copies in (self._to_host, self._to_device):
            for ticket in copies.values():
                with contextlib.suppress(TransferFailed):
                    ticket.wait()
            copies.clear()
        self._sealing.clear()

    def _new_segment(self, n_rows: int) -> torch.Tensor:
        shape = (n_rows, *self.pool.shape[1:])
        with torch.inference_mode(False):  # as for the pool
            if self.host_is_pinned:
                try:
                    return torch.empty(shape, dtype=self.pool.dtype, pin_memory=True)
                except RuntimeError:  # the system refuses more pinned memory; results report host_is_pinned
                    self.host_is_pinned = False
            return torch.empty(shape, dtype=self.pool.dtype)

    def _place(self, row: int) -> tuple[int, int]:
        """The segment that holds a row, and the row's place in it."""
        segment = bisect.bisect_right(self._segment_ends, row)
        return segment, row - (self._segment_ends[segment - 1] if segment else 0)

    def _runs(self, pages: Sequence[tuple[int, int]]) -> list[tuple[int, int, int]]:
        """`(slot, row, length)` of the stretches in which slot and row go up together, within a host segment."""
        runs: list[tuple[int, int, int]] = []
        for slot, row in sorted(pages):
            if runs:
                first_slot, first_row, length = runs[-1]
                if (slot, row) == (first_slot + length, first_row + length) and row not in self._segment_ends:
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
