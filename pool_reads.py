"""How the pages of a wave are read from the pool: where they lie or gathered first, and how many to a part.

A page is [P, 2, K, D], position by position, so pages that lie next to each other are one stretch of positions, and one
kernel call attends to all of it. A stretch is cut into *parts* of equal length, the batch of the call: each part has an
output and a log-sum-exp of its own, to be merged. Parts of one page tell what share of the attention each page got.
Where nobody asks, parts are longer: as short as keeps every thread busy, since merging costs as well.

Pages that do not lie next to each other are gathered into a block, unless there are so few stretches that a call for
each is cheaper. The open page ends its stretch, which is attended to as far as it is written.

A wave that comes again, as in exact attention where all pages fit, is planned once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

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
        pages: page ids in the order in which they lie; the open page last, if it is among them.
        pool: [n, P, 2, K, D], the pages in the pool; or the whole pool, to gather them from.
        gathered: places in the pool of the pages to gather; None if they are read where they lie. With further ones
            behind that fill up the last part, where the kernel can leave them out again.
        per_part: pages of a part.
        ends_open: whether the last page is the open one.
    """

    pages: list[int]
    pool: torch.Tensor
    gathered: torch.Tensor | None
    per_part: int
    ends_open: bool

    def parts(self, fill: int) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor, torch.Tensor | None]]:
        """What to attend to, call by call: pages, keys and values [parts, K, S, D], and their bias, if any.

        Args:
            fill: positions of the open page that are written.
        """
        block = self.pool if self.gathered is None else self.pool.index_select(0, self.gathered)
        size = block.shape[1]
        end = (len(self.pages) - 1) * size + fill if self.ends_open else len(self.pages) * size
        n_parts = block.shape[0] // self.per_part
        if self.gathered is not None and n_parts > 1 and takes_bias(block.device):
            length = self.per_part * size
            bias = None if end == n_parts * length else _bias(n_parts, length, end, block.dtype, block.device)
            yield self.pages, *keys_values(block.flatten(0, 1).unflatten(0, (n_parts, length))), bias
            return
        whole, rest = self.whole_and_rest(block)
        n_whole = 0 if whole is None else whole.shape[0] * self.per_part
        if whole is not None:
            yield self.pages[:n_whole], *keys_values(whole), None
        if rest is not None:
            yield self.pages[n_whole:], *keys_values(rest[:, : end - n_whole * size]), None

    def whole_and_rest(self, block: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The parts of `per_part` pages, [parts, S, 2, K, D], and what is left over, [1, S, 2, K, D], with all of the
        open page; None where there are none. Less than two parts are not worth a call of their own."""
        n_full, size = len(self.pages) - self.ends_open, block.shape[1]
        n_parts = n_full // self.per_part
        if self.per_part > 1 and n_parts == 1:
            n_parts = 0
        positions, n_whole = block.flatten(0, 1), n_parts * self.per_part * size  # [n * P, 2, K, D]
        whole = positions[:n_whole].unflatten(0, (n_parts, self.per_part * size)) if n_parts else None
        return whole, positions[n_whole:].unsqueeze(0) if n_whole < positions.shape[0] else None


@lru_cache(maxsize=32)
def _bias(n_parts: int, length: int, end: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[n_parts, 1, 1, length] that leaves out what lies from position `end` on; the layers of a step need the same."""
    with torch.inference_mode(False):  # it may be read outside of it later
        bias = torch.zeros(n_parts * length, dtype=dtype, device=device)
        bias[end:] = NEGATIVE_INFINITY
        return bias.view(n_parts, 1, 1, length)


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
        self, wave: dict[int, int], open_page: int | None, pool: torch.Tensor, per_part: int, most_pages: int
    ) -> bool:
        """Whether this is the plan for a wave; the very same one, as that costs nothing to compare."""
        return (
            self.wave is wave
            and self.pool is pool
            and self.open_page == open_page
            and self.sizes == (per_part, most_pages)
        )


def plan_reads(
    wave: dict[int, int],
    open_page: int | None,
    pool: torch.Tensor,
    per_part: int,
    most_pages: int,
    index_of: Callable[[Sequence[int]], torch.Tensor],
) -> ReadPlan:
    """Plan a wave.

    Args:
        wave: `{page: slot}`.
        open_page: the page that is still filling, whether in the wave or not; None if there is none.
        pool: [n_slots, P, 2, K, D].
        per_part: pages of a part, at least 1.
        most_pages: that may be read together, at least 1.
        index_of: makes an index on the pool's device.
    """
    slots = set(wave.values())
    n_runs = len(slots.difference([slot - 1 for slot in slots]))
    if (n_runs - 1) * CALL_BYTES.get(pool.device.type, 0) > len(slots) * pool[0].nbytes:
        stretches = _gathered(wave, open_page, pool, per_part, most_pages, index_of)
    else:
        stretches = []
        for run in _runs(sorted((slot, page) for page, slot in wave.items()), open_page, most_pages):
            first, pages = run[0][0], [page for _, page in run]
            stretch = pool[first : first + len(run)]
            stretches.append(Stretch(pages, stretch, None, per_part, pages[-1] == open_page))
    return ReadPlan(wave, open_page, pool, (per_part, most_pages), stretches)


def _gathered(wave, open_page, pool, per_part, most_pages, index_of) -> list[Stretch]:
    """The pages in whatever order, the open one last."""
    pages = [page for page in wave if page != open_page]
    if open_page in wave:
        pages.append(open_page)
    at_once = max(1, min(most_pages, MOST_GATHERED_BYTES // pool[0].nbytes))
    stretches = []
    for start in range(0, len(pages), at_once):
        some = pages[start : start + at_once]
        n_parts = -(-len(some) // per_part)
        per = -(-len(some) // n_parts)  # as equal as can be, to fill up as little as can be
        slots = [wave[page] for page in some]
        if n_parts > 1 and takes_bias(pool.device):
            slots += slots[:1] * (n_parts * per - len(some))
        stretches.append(Stretch(some, pool, index_of(slots), per, some[-1] == open_page))
    return stretches


def _runs(placed: Sequence[tuple[int, int]], open_page: int | None, most_pages: int) -> list[list[tuple[int, int]]]:
    """`(slot, page)` by the stretches in which they lie; the open page ends one."""
    runs: list[list[tuple[int, int]]] = []
    for slot, page in placed:
        last = runs[-1] if runs else None
        if last and slot == last[-1][0] + 1 and last[-1][1] != open_page and len(last) < most_pages:
            last.append((slot, page))
        else:
            runs.append([(slot, page)])
    return runs
