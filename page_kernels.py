"""Triton kernels by which a CUDA device finds pages and brings them in without its host.

`look_up` does what a page table and plain LRU do, for one request: where each wanted page lies, which pages are
missing, and which of the others give up their slots for these. `gather` then puts the wanted pages side by side for
attention to read. What is missing it reads from pinned host memory, which a CUDA device can address, and leaves in its
slot as well. Both are launched on the stream that computes; the host waits for neither.

What they do is defined by `device_page_table.look_up_with_torch` and `gather_with_torch`, which need no Triton. With
the environment variable TRITON_INTERPRET=1, set before this module is imported, the kernels run on a CPU, step by step.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl

WORDS_AT_ONCE = 2048  # that one program copies
WIDEST_LOAD = 16  # bytes that a thread can read at once
AT_ONCE = 64  # most slots that are compared with all others at a time
MOST_PAIRS = 2**14  # compared at a time, all in the registers of one program


@triton.jit(do_not_specialize=["now", "n_wanted", "n_slots"])  # else it is compiled anew as pages become more
def _look_up(
    wanted_ptr,
    slot_of_ptr,
    page_in_ptr,
    used_at_ptr,
    order_ptr,
    slots_ptr,
    was_there_ptr,
    now,
    n_wanted,
    n_slots,
    WANTED: tl.constexpr,
    SLOTS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program; its parts pass what they find through memory."""
    place = tl.arange(0, WANTED)
    is_wanted = place < n_wanted
    wanted = tl.load(wanted_ptr + place, mask=is_wanted, other=0)
    slot = tl.load(slot_of_ptr + wanted, mask=is_wanted, other=0)
    missing = is_wanted & (slot < 0)
    there = is_wanted & (slot >= 0)
    used = now + n_wanted - 1 - place  # the most wanted last
    tl.store(used_at_ptr + slot, used, mask=there)
    tl.debug_barrier()
    # Slots by when they were used last. Those of wanted pages were used now, so they come last and are not given up.
    if tl.sum(missing.to(tl.int32), axis=0) > 0:
        other = tl.arange(0, SLOTS)
        is_slot = other < n_slots
        other_used = tl.load(used_at_ptr + other, mask=is_slot, other=0)
        for start in range(0, n_slots, CHUNK):
            mine = start + tl.arange(0, CHUNK)
            is_mine = mine < n_slots
            my_used = tl.load(used_at_ptr + mine, mask=is_mine, other=0)
            later = my_used[:, None] > other_used[None, :]
            tied = (my_used[:, None] == other_used[None, :]) & (mine[:, None] > other[None, :])
            rank = tl.sum(((later | tied) & is_slot[None, :]).to(tl.int32), axis=1)
            tl.store(order_ptr + rank, mine.to(tl.int64), mask=is_mine)
    tl.debug_barrier()
    nth = tl.cumsum(missing.to(tl.int32), axis=0) - 1
    given = tl.load(order_ptr + nth, mask=missing, other=0)
    evicted = tl.load(page_in_ptr + given, mask=missing, other=-1)
    tl.store(slot_of_ptr + evicted, evicted * 0 - 1, mask=missing & (evicted >= 0))
    tl.debug_barrier()
    tl.store(slot_of_ptr + wanted, given, mask=missing)
    tl.store(page_in_ptr + given, wanted, mask=missing)
    tl.store(used_at_ptr + given, used, mask=missing)
    tl.store(slots_ptr + place, tl.where(missing, given, slot), mask=is_wanted)
    tl.store(was_there_ptr + place, there.to(tl.int8), mask=is_wanted)


@triton.jit(do_not_specialize=["n_wanted"])
def _gather(
    block_ptr,
    pool_ptr,
    places_ptr,
    slots_ptr,
    was_there_ptr,
    wanted_ptr,
    address_of_ptr,
    known_ptr,
    n_wanted,
    n_words,
    WORDS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Program (i, j) copies the j-th words of the i-th page, whose address is a multiple of ALIGNED bytes."""
    i = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    inside = word < n_words
    target = block_ptr + i * n_words + word
    if i >= n_wanted:
        known = tl.load(known_ptr + i - n_wanted)
        tl.store(target, tl.load(pool_ptr + known * n_words + word, mask=inside), mask=inside)
    else:
        in_pool = pool_ptr + tl.load(places_ptr + tl.load(slots_ptr + i)) * n_words + word
        if tl.load(was_there_ptr + i) != 0:
            tl.store(target, tl.load(in_pool, mask=inside), mask=inside)
        else:
            address = tl.load(address_of_ptr + tl.load(wanted_ptr + i))
            on_host = tl.multiple_of(address.to(tl.pointer_type(tl.int32)), ALIGNED) + word
            words = tl.load(on_host, mask=inside)
            tl.store(in_pool, words, mask=inside)
            tl.store(target, words, mask=inside)


def look_up(
    wanted: torch.Tensor, slot_of: torch.Tensor, page_in: torch.Tensor, used_at: torch.Tensor, now: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `device_page_table.look_up_with_torch`."""
    n_wanted, n_slots = wanted.numel(), page_in.numel()
    padded_slots = triton.next_power_of_2(n_slots)
    order, slots = torch.empty_like(page_in), torch.empty_like(wanted)
    was_there = torch.empty(n_wanted, dtype=torch.int8, device=wanted.device)
    with _on_device_of(page_in):
        _look_up[(1,)](
            wanted,
            slot_of,
            page_in,
            used_at,
            order,
            slots,
            was_there,
            now,
            n_wanted,
            n_slots,
            WANTED=padded_slots,  # no fewer than are wanted, and the same in every step
            SLOTS=padded_slots,
            CHUNK=chunk_of(padded_slots),
        )
    return slots, was_there


def _on_device_of(tensor: torch.Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def chunk_of(n_slots: int) -> int:
    """How many slots are compared with all `n_slots` at a time; of a power of two, a power of two."""
    return max(1, min(AT_ONCE, MOST_PAIRS // n_slots))


def gather(
    pool: torch.Tensor,
    places: torch.Tensor,
    slots: torch.Tensor,
    was_there: torch.Tensor,
    wanted: torch.Tensor,
    address_of: torch.Tensor,
    known: torch.Tensor,
) -> torch.Tensor:
    """As `device_page_table.gather_with_torch`, with the addresses of the pages in host memory."""
    n_wanted, words = wanted.numel(), pool.view(torch.int32)
    n_words = words[0].numel()
    block = torch.empty((n_wanted + known.numel(), *pool.shape[1:]), dtype=pool.dtype, device=pool.device)
    with _on_device_of(pool):
        _gather[(block.shape[0], triton.cdiv(n_words, WORDS_AT_ONCE))](
            block.view(torch.int32),
            words,
            places,
            slots,
            was_there,
            wanted,
            address_of,
            known,
            n_wanted,
            n_words,
            WORDS=WORDS_AT_ONCE,
            ALIGNED=math.gcd(WIDEST_LOAD, pool[0].nbytes),  # host pages lie one after the other
        )
    return block
