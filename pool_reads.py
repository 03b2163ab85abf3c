"""How the pages of a wave are read from the pool: where they lie or gathered first, and in parts of what length.

A page is [P, 2, K, D], position by position, so pages in slots next to each other are one stretch of positions, and one
kernel call attends to all of it. A stretch is cut into *parts* of equal length, the batch of the call: each part has an
output and a log-sum-exp of its own, to be merged. Parts of one page tell what share of the attention each page got.
Where nobody asks, parts are longer, and end where they end: as short as keeps every thread busy, since merging costs as
well.

Pages that do not lie next to each other are gathered into a block, unless there are so few stretches that a call for
each is cheaper. The open page is attended to as far as it is written: where the kernel can leave the rest of it out, it
may lie anywhere in its stretch, and else it ends it.

Which page lies in which slot makes no difference to a plan. So slots that are read together again, as under exact
attention, are planned once, also where pages come and go between.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
import torch

from paged_attention import NEGATIVE_INFINITY, takes_bias

# What a further kernel call costs, as bytes that could be gathered meanwhile: 70 us at 15 GB/s on a CPU (measured in a
# model, where nothing is in the processor's caches), and 10 us at 2 TB/s on a GPU (an estimate).
CALL_BYTES = {"cpu": 2**20, "cuda": 2**24}
MOST_GATHERED_BYTES = 2**26  # at a time; it comes on top of the budget for the moment
MOST_PLANS = 32  # kept


KeysValues = tuple[torch.Tensor, torch.Tensor]  # each [parts, K, S, D]
Places = torch.Tensor | list[int]  # of pages in a pool: an index, or lengths as of `stretch_lengths`


@dataclass(frozen=True)
class Stretch:
    """Pages that are read together.

    Attributes:
        names: what the pages are called, in the order in which they lie: by their slots in a plan, else by page ids.
        pool: [n, P, 2, K, D], the pages in the pool; or the whole pool, to gather them from.
        gathered: where in the pool the pages to gather lie, for `gather`; None if they are read where they are.
        part_tokens: positions that a part should have.
        open_at: the place of the open page among them; None if it is not there.
    """

    names: Sequence[int]
    pool: torch.Tensor
    gathered: Places | None
    part_tokens: int
    open_at: int | None

    @property
    def ends_open(self) -> bool:
        """Whether the last page is the open one."""
        return self.open_at == len(self.names) - 1

    def parts(self, fill: int) -> Iterator[tuple[Sequence[int], torch.Tensor, torch.Tensor, torch.Tensor | None]]:
        """What to attend to, call by call: names of pages, keys and values [parts, K, S, D], and their bias, if any.

        Args:
            fill: positions of the open page that are written.
        """
        pool, size = self.pool, self.pool.shape[1]
        if not self.ends_open or self.gathered is not None:
            keys, values = self._in_place if self.gathered is None else self._cut(gather(pool, self.gathered))
            bias = None
            if self.open_at is not None:
                begin, end = self.open_at * size + fill, (self.open_at + 1) * size
                bias = _bias(keys.shape[0], keys.shape[2], begin, end, keys.dtype, keys.device)
            yield self.names, keys, values, bias
            return
        whole, (keys, values) = self.to_its_end
        n_whole = len(self.names) - keys.shape[2] // size
        if whole is not None:
            yield self.names[:n_whole], *whole, None
        written = keys.shape[2] - size + fill
        yield self.names[n_whole:], keys[:, :, :written], values[:, :, :written], None

    @cached_property
    def _in_place(self) -> KeysValues:
        return self._cut(self.pool)

    @cached_property
    def to_its_end(self) -> tuple[KeysValues | None, KeysValues]:
        """Of a stretch in place that ends with the open page: the parts before that page; and that page to its end. One
        longer part is not worth a call of its own: then None, and all positions."""
        before, page = self.pool[:-1], self.pool[-1:]
        n_parts = self._n_parts(*before.shape[:2])
        if n_parts == 0 or (n_parts == 1 and self.part_tokens > page.shape[1]):
            return None, _keys_values(self.pool.flatten(0, 1).unsqueeze(0))
        return self._cut(before), _keys_values(page)

    def _cut(self, block: torch.Tensor) -> KeysValues:
        return _keys_values(block.view(self._n_parts(*block.shape[:2]), -1, *block.shape[2:]))

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


def _keys_values(parts: torch.Tensor) -> KeysValues:
    """[parts, S, 2, K, D] -> keys and values, each [parts, K, S, D]."""
    return parts.permute(2, 0, 3, 1, 4).unbind(0)


class ReadPlans:
    """How the pages of a pool are read, with the plans that may be wanted again.

    Args:
        pool: [n_slots, P, 2, K, D].
        most_kept: plans; 0 where pages are selected, as hardly any are chosen together again.
    """

    def __init__(self, pool: torch.Tensor, most_kept: int = MOST_PLANS):
        self.pool, self._most_kept = pool, most_kept
        self._plans: dict[tuple[tuple[int, ...], int | None, int, int], list[Stretch]] = {}

    def plan(self, slots: Iterable[int], open_slot: int | None, part_tokens: int, most_pages: int) -> list[Stretch]:
        """Plan to read some slots.

        Args:
            slots: each once.
            open_slot: the slot of the page that is still filling, whether among them or not; None if there is none.
            part_tokens: positions that a part should have, at least P.
            most_pages: that may be read together, at least 1.
        """
        if self._most_kept == 0:
            return plan_reads(self.pool, sorted(slots), open_slot, part_tokens, most_pages)
        wanted = tuple(sorted(slots)), open_slot, part_tokens, most_pages
        plan = self._plans.get(wanted)
        if plan is None:
            if len(self._plans) == self._most_kept:
                self._plans.clear()
            plan = self._plans[wanted] = plan_reads(self.pool, *wanted)
        return plan


def plan_reads(
    pool: torch.Tensor, slots: Sequence[int], open_slot: int | None, part_tokens: int, most_pages: int
) -> list[Stretch]:
    """As `ReadPlans.plan`, anew; slots ascending."""
    n_gaps = len(slots) - 1 - len({slot + 1 for slot in slots}.intersection(slots))
    if n_gaps * CALL_BYTES.get(pool.device.type, 0) > len(slots) * pool[0].nbytes:
        return _gathered(slots, open_slot, pool, part_tokens, most_pages)
    runs = _runs(slots, None if takes_bias(pool.device) else open_slot, most_pages)
    return [Stretch(run, pool[run[0] : run[-1] + 1], None, part_tokens, _place(open_slot, run)) for run in runs]


def _gathered(slots, open_slot, pool, part_tokens, most_pages) -> list[Stretch]:
    """The open page comes last; by itself, where the kernel cannot leave out what is not written of it."""
    last = [open_slot] if open_slot in slots else []
    others = [slot for slot in slots if slot != open_slot]
    alone = [] if takes_bias(pool.device) else last
    at_once = max(1, min(most_pages, MOST_GATHERED_BYTES // pool[0].nbytes))
    gathered = others if alone else others + last
    stretches = []
    for start in range(0, len(gathered), at_once):
        some = gathered[start : start + at_once]
        stretches.append(Stretch(some, pool, places_in(pool, some), part_tokens, _place(open_slot, some)))
    stretches += [Stretch([slot], pool[slot : slot + 1], None, part_tokens, 0) for slot in alone]
    return stretches


def places_in(pool: torch.Tensor, slots: Sequence[int]) -> Places:
    """Where pages lie, as the pool's device is best told. A CPU copies fastest by an index. CUDA would have to be sent
    one, which may wait behind the pages that are on their way; lengths go along with the kernel that copies.

    Args:
        slots: each once; ascending on CUDA.
    """
    if pool.device.type != "cuda":
        return device_index(slots, pool.device)
    return stretch_lengths(slots, len(pool))


def stretch_lengths(slots: Sequence[int], n_slots: int) -> list[int]:
    """How long the stretches are in which ascending slots lie, out of `n_slots`: by turns of others and of these, the
    first and the last of others, if only of none."""
    lengths, end = [], 0
    for run in _runs(slots, None, n_slots):
        lengths += [run[0] - end, len(run)]
        end = run[-1] + 1
    return [*lengths, n_slots - end]


def gather(pool: torch.Tensor, places: Places) -> torch.Tensor:
    """The pages [n, P, 2, K, D] at these places of the pool, side by side."""
    if isinstance(places, torch.Tensor):
        return pool.index_select(0, places)
    rows = pool.flatten(1)  # of few dimensions, as only then one kernel copies many stretches
    return torch.cat(rows.split(places)[1::2]).view(-1, *pool.shape[1:])


def _place(open_slot: int | None, slots: list[int]) -> int | None:
    return slots.index(open_slot) if open_slot in slots else None


def _runs(slots: Sequence[int], ends_run: int | None, most_pages: int) -> list[list[int]]:
    """Slots by the stretches in which they lie; slot `ends_run` ends one."""
    runs: list[list[int]] = []
    for slot in slots:
        last = runs[-1] if runs else None
        if last and slot == last[-1] + 1 and last[-1] != ends_run and len(last) < most_pages:
            last.append(slot)
        else:
            runs.append([slot])
    return runs
