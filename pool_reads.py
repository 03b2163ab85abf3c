"""How the pages of a wave are read from the pool: where they lie or gathered first, and in parts of what length.

A page is [P, 2, K, D], position by position, so pages that lie next to each other are one stretch of positions, and one
kernel call attends to all of it. A stretch is cut into *parts* of equal length, the batch of the call: each part has an
output and a log-sum-exp of its own, to be merged. Parts of one page tell what share of the attention each page got.
Where nobody asks, parts are longer, and end where they end: as short as keeps every thread busy, since merging costs as
well.

Pages that do not lie next to each other are gathered into a block, unless there are so few stretches that a call for
each is cheaper. The open page is attended to as far as it is written: where the kernel can leave the rest of it out, it
may lie anywhere in its stretch, and else it ends it.

A wave that comes again, as in exact attention where all pages fit, is planned once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from paged_attention import NEGATIVE_INFINITY, takes_bias

# What a further kernel call costs, as bytes that could be gathered meanwhile: 70 us at 15 GB/s on a CPU (measured in a
# model, where nothing is in the processor's caches), and 10 us at 2 TB/s on a GPU (an estimate).
CALL_BYTES = {"cpu": 2**20, "cuda": 2**24}
MOST_GATHERED_BYTES = 2**26  # at a time; it comes on top of the budget for the moment


@dataclass(frozen=True)
class Stretch:
    """Pages that are read together.

    Attributes:
        pages: page ids in the order in which they lie; of pages that only the device knows, numbers from 0 on.
        pool: [n, P, 2, K, D], the pages in the pool; or the whole pool, to gather them from.
        gathered: places in the pool of the pages to gather; None if they are read where they lie.
        part_tokens: positions that a part should have.
        open_at: the place of the open page among `pages`; None if it is not there.
    """

    pages: Sequence[int]
    pool: torch.Tensor
    gathered: torch.Tensor | None
    part_tokens: int
    open_at: int | None

    @property
    def ends_open(self) -> bool:
        """Whether the last page is the open one."""
        return self.open_at == len(self.pages) - 1

    def parts(self, fill: int) -> Iterator[tuple[Sequence[int], torch.Tensor, torch.Tensor, torch.Tensor | None]]:
        """What to attend to, call by call: pages, keys and values [parts, K, S, D], and their bias, if any.

        Args:
            fill: positions of the open page that are written.
        """
        block = self.pool if self.gathered is None else self.pool.index_select(0, self.gathered)
        can_mask = takes_bias(block.device)
        if self.open_at is None or (can_mask and not (self.ends_open and self.gathered is None)):
            parts, bias = self._cut(block), None
            if self.open_at is not None:
                begin, end = (self.open_at * block.shape[1] + places for places in (fill, block.shape[1]))
                bias = _bias(*parts.shape[:2], begin, end, block.dtype, block.device)
            yield self.pages, *keys_values(parts), bias
            return
        whole, rest = self.whole_and_rest(block)
        n_whole = len(self.pages) - rest.shape[1] // block.shape[1]
        if whole is not None:
            yield self.pages[:n_whole], *keys_values(whole), None
        yield self.pages[n_whole:], *keys_values(rest[:, : rest.shape[1] - block.shape[1] + fill]), None

    def whole_and_rest(self, block: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """The parts before the open page, which is the last, [parts, S, 2, K, D], and that page, [1, P, 2, K, D]. One
        longer part is not worth a call of its own: then None, and all positions, [1, S, 2, K, D]."""
        before, page = block[:-1], block[-1:]
        n_parts = self._n_parts(len(before), block.shape[1])
        if n_parts == 0 or (n_parts == 1 and self.part_tokens > block.shape[1]):
            return None, block.flatten(0, 1).unsqueeze(0)
        return self._cut(before), page

    def _cut(self, block: torch.Tensor) -> torch.Tensor:
        """[n, P, 2, K, D] -> [parts, S, 2, K, D]"""
        return block.view(self._n_parts(*block.shape[:2]), -1, *block.shape[2:])

    def _n_parts(self, n_pages: int, size: int) -> int:
        return n_equal_parts(n_pages, size, self.part_tokens) if n_pages else 0


class PageReading(NamedTuple):
    """A request for the pages of one sequence: the waves they come in, by page and slot or ready to be read, and which
    key/value heads attend to which pages (bool [pages, K]; None where all heads attend to all of them)."""

    waves: Iterable[dict[int, int] | list[Stretch]]
    heads: torch.Tensor | None = None


@lru_cache(maxsize=1024)
def n_equal_parts(n_pages: int, page_size: int, part_tokens: int) -> int:
    """The most equal parts that pages can be cut into, with no part shorter than wanted (the last of them excepted) or
    than a page: such a part would be nothing but what is not written of the open page."""
    n_tokens = n_pages * page_size
    most = min(n_pages, -(-n_tokens // part_tokens))
    return next(n for n in range(most, 0, -1) if n_tokens % n == 0)


@lru_cache(maxsize=32)
def _bias(
    n_parts: int, length: int, begin: int, end: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor | None:
    """[n_parts, 1, 1, length] that leaves out positions `begin` to `end`; the layers of a step need the same."""
    if begin == end:
        return None
    with torch.inference_mode(False):  # it may be read outside of it later
        bias = torch.zeros(n_parts * length, dtype=dtype, device=device)
        bias[begin:end] = NEGATIVE_INFINITY
        return bias.view(n_parts, 1, 1, length)


def device_index(places: Sequence[int], device: torch.device) -> torch.Tensor:
    """Places as an index on the device. From pinned memory, as a pageable copy would make the host wait."""
    if device.type != "cuda":
        return torch.from_numpy(np.array(places, dtype=np.int64)).to(device)
    return torch.tensor(places, dtype=torch.int64, pin_memory=True).to(device, non_blocking=True)


def keys_values(parts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[parts, S, 2, K, D] -> keys and values, each [parts, K, S, D]."""
    return parts.permute(2, 0, 3, 1, 4).unbind(0)


@dataclass(frozen=True)
class ReadPlan:
    """How one wave is read, and what that depends on."""

    wave: dict[int, int]
    open_page: int | None
    pool: torch.Tensor
    sizes: tuple[int, int]
    stretches: list[Stretch]

    def serves(
        self, wave: dict[int, int], open_page: int | None, pool: torch.Tensor, part_tokens: int, most_pages: int
    ) -> bool:
        """Whether this is the plan for a wave; the very same one, as that costs nothing to compare."""
        return (
            self.wave is wave
            and self.pool is pool
            and self.open_page == open_page
            and self.sizes == (part_tokens, most_pages)
        )


def plan_reads(
    wave: dict[int, int],
    open_page: int | None,
    pool: torch.Tensor,
    part_tokens: int,
    most_pages: int,
) -> ReadPlan:
    """Plan a wave.

    Args:
        wave: `{page: slot}`.
        open_page: the page that is still filling, whether in the wave or not; None if there is none.
        pool: [n_slots, P, 2, K, D].
        part_tokens: positions that a part should have, at least P.
        most_pages: that may be read together, at least 1.
    """
    slots = set(wave.values())
    n_runs = len(slots.difference([slot - 1 for slot in slots]))
    if (n_runs - 1) * CALL_BYTES.get(pool.device.type, 0) > len(slots) * pool[0].nbytes:
        stretches = _gathered(wave, open_page, pool, part_tokens, most_pages)
    else:
        ends_run = None if takes_bias(pool.device) else open_page
        stretches = []
        for run in _runs(sorted((slot, page) for page, slot in wave.items()), ends_run, most_pages):
            first, pages = run[0][0], [page for _, page in run]
            stretch = pool[first : first + len(run)]
            stretches.append(Stretch(pages, stretch, None, part_tokens, _place(open_page, pages)))
    return ReadPlan(wave, open_page, pool, (part_tokens, most_pages), stretches)


def _gathered(wave, open_page, pool, part_tokens, most_pages) -> list[Stretch]:
    """The pages in whatever order, the open one last."""
    pages = [page for page in wave if page != open_page]
    if open_page in wave:
        pages.append(open_page)
    at_once = max(1, min(most_pages, MOST_GATHERED_BYTES // pool[0].nbytes))
    stretches = []
    for start in range(0, len(pages), at_once):
        some = pages[start : start + at_once]
        index = device_index([wave[page] for page in some], pool.device)
        stretches.append(Stretch(some, pool, index, part_tokens, _place(open_page, some)))
    return stretches


def _place(open_page: int | None, pages: list[int]) -> int | None:
    return pages.index(open_page) if open_page in pages else None


def _runs(placed: Sequence[tuple[int, int]], ends_run: int | None, most_pages: int) -> list[list[tuple[int, int]]]:
    """`(slot, page)` by the stretches in which they lie; page `ends_run` ends one."""
    runs: list[list[tuple[int, int]]] = []
    for slot, page in placed:
        last = runs[-1] if runs else None
        if last and slot == last[-1][0] + 1 and last[-1][1] != ends_run and len(last) < most_pages:
            last.append((slot, page))
        else:
            runs.append([(slot, page)])
    return runs
