"""Where the sealed pages of a layer lie off the device: host memory first, then a file on disk.

The unit is a *row*: room for one page `[P, 2, K, D]`, keys and values, named by a number. Rows are allocated in
segments, contiguous blocks, so that rows that are neighbours can travel as one copy. A row is taken with one reference,
and is free again when its last reference is released: a sealed page never changes, so sequences may share one.

Rows below `memory_rows` lie in memory, all others on disk, and no page moves between the two. Under exact attention
every page is wanted at every step, so memory serves as many of them as it holds, whichever they are: no replacement
between the two could do better, for the reason that the README gives under "The order of asking decides".

What lies on disk is read and written through the operating system's page cache. So what looks like disk may be
memory, as long as some is free, and always is where the folder is a tmpfs, as the temporary folder of some systems is.
A time measured against this tier says what the system made of it, not what the drive can do. And the file is pageable
memory to CUDA: a copy from it or to it holds up the thread that asks for it, where one with pinned memory does not.
"""

from __future__ import annotations

import bisect
import heapq
import logging
import math
import os
import shutil
import tempfile
from pathlib import Path

import torch

from page_layout import rows_of_pages
from utils import is_out_of_memory

HOST_ROWS_ADDED = 16  # rows allocated at a time where the context outgrows what was reserved
ZEROS_WRITTEN = 2**20  # bytes at a time, where that is how space on disk is reserved

log = logging.getLogger(__name__)


def pinned_lengths(n_rows: int, page_bytes: int) -> list[int]:
    """How many rows each allocation of pinned memory gets. PyTorch rounds each up to a power of two of bytes, which can
    be twice what was asked for: so there are several, and an eighth of each at most is lost, or a page."""
    lengths = []
    while n_rows:
        n_bytes = n_rows * page_bytes
        below = 1 << (n_bytes.bit_length() - 1)
        nearly_full = n_bytes in (below, page_bytes) or 2 * below - n_bytes <= n_bytes // 8
        lengths.append(n_rows if nearly_full else max(1, below // page_bytes))
        n_rows -= lengths[-1]
    return lengths


class DiskTierFailed(OSError):
    """The file for pages on disk could not be made: no space, no such folder, no permission."""


class HostPages:
    """The rows of one layer.

    Args:
        page_shape: (P, 2, K, D): positions of a page, keys and values, key/value heads, head size.
        dtype: of keys and values.
        pinned: whether to ask for pinned memory, which CUDA can copy from while the host goes on.
        memory_rows: rows that lie in memory, the first ones; None for all.
        disk_dir: folder for the others; None for the system's temporary folder. Nothing is ever left in it.
        by_head: how a page lies in memory; see page_layout.py.
    """

    def __init__(
        self,
        page_shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        pinned: bool,
        memory_rows: int | None = None,
        disk_dir: Path | str | None = None,
        by_head: bool = False,
    ):
        self.page_shape, self.dtype, self.is_pinned, self.by_head = page_shape, dtype, pinned, by_head
        self.memory_rows, self.disk_dir = memory_rows, disk_dir
        self._segments: list[torch.Tensor] = []  # [rows, P, 2, K, D] each
        self._segment_ends: list[int] = []  # row after the last of each segment
        self._references: dict[int, int] = {}  # of each row that is taken
        self._free: list[int] = []  # a heap

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, keys and values."""
        return math.prod(self.page_shape) * self.dtype.itemsize

    @property
    def n_rows(self) -> int:
        """Rows allocated so far, taken or free."""
        return self._segment_ends[-1] if self._segment_ends else 0

    @property
    def n_taken(self) -> int:
        return len(self._references)

    @property
    def nbytes(self) -> int:
        """Bytes of host memory allocated."""
        return self._in_memory(self.n_rows) * self.page_bytes

    @property
    def disk_bytes(self) -> int:
        """Bytes of disk space reserved."""
        return self.n_rows * self.page_bytes - self.nbytes

    def reserve(self, n_rows: int) -> None:
        """Allocate rows 0..n_rows-1, as far as they are not; pinning memory is slow, and does not belong into a run.

        Raises:
            MemoryError: there is not that much host memory.
            DiskTierFailed: there is not that much disk space, or the folder cannot be written to.
        """
        for end, allocate in ((self._in_memory(n_rows), self._memory_segment), (n_rows, self._disk_segment)):
            first = self.n_rows
            n_new = max(0, end - first)
            pins = self.is_pinned and allocate == self._memory_segment
            for length in pinned_lengths(n_new, self.page_bytes) if pins else [n_new] * (n_new > 0):
                with torch.inference_mode(False):  # else who is not in inference mode could not write to it
                    self._segments.append(allocate(length))
                self._free.extend(range(self.n_rows, self.n_rows + length))  # larger than all before: a heap still
                self._segment_ends.append(self.n_rows + length)

    def take(self) -> int:
        """A free row, with one reference: the lowest, so that pages sealed one after the other lie side by side, and
        memory is used before disk. Allocates more when none is free; raises as `reserve` does."""
        if not self._free:
            self.reserve(self.n_rows + HOST_ROWS_ADDED)
        row = heapq.heappop(self._free)
        self._references[row] = 1
        return row

    def share(self, row: int) -> None:
        """Add a reference to a row that is taken."""
        self._require_taken(row)
        self._references[row] += 1

    def release(self, row: int) -> bool:
        """Give one reference back; returns whether it was the last, so that the row is free now."""
        self._require_taken(row)
        self._references[row] -= 1
        if self._references[row]:
            return False
        del self._references[row]
        heapq.heappush(self._free, row)
        return True

    def clear(self) -> None:
        """Make every row free, whatever references there are, and keep the memory."""
        self._references.clear()
        self._free = list(range(self.n_rows))

    def page(self, row: int) -> torch.Tensor:
        """The page [P, 2, K, D] of a row that is taken, in place."""
        return self.stretch(row, 1)[0]

    def stretch(self, row: int, length: int) -> torch.Tensor:
        """The pages [length, P, 2, K, D] of neighbours within a segment, in place; all of them must be taken."""
        for one in range(row, row + length):
            self._require_taken(one)
        segment = self._segment(row)
        if row + length > self._segment_ends[segment]:
            raise ValueError(f"host rows {row} to {row + length - 1} do not lie in one segment")
        place = row - (self._segment_ends[segment - 1] if segment else 0)
        return self._segments[segment][place : place + length]

    def same_segment(self, row: int, next_row: int) -> bool:
        """Whether two rows lie in one contiguous block."""
        return self._segment(row) == self._segment(next_row)

    def _segment(self, row: int) -> int:
        return bisect.bisect_right(self._segment_ends, row)

    def _require_taken(self, row: int) -> None:
        if row not in self._references:
            raise RuntimeError(f"host row {row} is not taken")

    def _in_memory(self, n_rows: int) -> int:
        """How many of the first `n_rows` lie in memory."""
        return n_rows if self.memory_rows is None else min(n_rows, self.memory_rows)

    def _memory_segment(self, n_rows: int) -> torch.Tensor:
        n_bytes, like = n_rows * self.page_bytes, (torch.empty, n_rows, self.page_shape, self.by_head)
        if self.is_pinned:
            try:
                return rows_of_pages(*like, dtype=self.dtype, pin_memory=True)
            except RuntimeError as error:  # systems limit pinned memory; results report is_pinned
                self.is_pinned = False
                log.warning(
                    "pinning %s bytes of host memory was refused (%s); pages go to pageable memory instead, and copies"
                    " of them hold up computing",
                    f"{n_bytes:,}",
                    str(error).partition("\n")[0],
                )
        try:
            return rows_of_pages(*like, dtype=self.dtype)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise MemoryError(
                f"there are no {n_bytes:,} bytes of host memory for {n_rows} pages of a layer; set host_pages to keep"
                " fewer in memory and the rest on disk"
            ) from error

    def _disk_segment(self, n_rows: int) -> torch.Tensor:
        """Rows in a file of their own.

        The file has a name for no longer than mapping it takes, and takes no space until it has none: so nothing is
        left behind, not even by a process that is killed. The mapping keeps the file, and no descriptor stays open.
        """
        n_bytes, folder = n_rows * self.page_bytes, self.disk_dir or tempfile.gettempdir()
        try:
            descriptor, name = tempfile.mkstemp(prefix="kv-pages-", dir=folder)
            with open(descriptor, "wb", buffering=0) as file:
                try:
                    file.truncate(n_bytes)
                    numbers = torch.from_file(name, shared=True, size=n_bytes // self.dtype.itemsize, dtype=self.dtype)
                finally:
                    os.unlink(name)
                _reserve_space(file.fileno(), n_bytes)
        except (OSError, RuntimeError) as error:  # torch raises the latter where the system refuses to map
            raise DiskTierFailed(
                f"no file of {n_bytes:,} bytes for {n_rows} pages of a layer could be made in {folder}, where"
                f" {_free_space(folder)} are free ({error}); choose another folder with disk_dir, or keep more pages in"
                " memory with host_pages"
            ) from error
        return rows_of_pages(numbers.view, n_rows, self.page_shape, self.by_head)


def _reserve_space(descriptor: int, n_bytes: int) -> None:
    """Have the space of a file set aside now. Space is otherwise found when a page of the mapping is first written to,
    and a disk that is full by then ends the process with SIGBUS, which nothing can catch."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, n_bytes)
        return
    zeros = bytes(ZEROS_WRITTEN)
    while n_bytes > 0:
        n_bytes -= os.write(descriptor, zeros[:n_bytes])


def _free_space(folder: Path | str) -> str:
    try:
        return f"{shutil.disk_usage(folder).free:,}"
    except OSError:
        return "an unknown number"
