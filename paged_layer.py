"""One layer's keys and values in pages: how they are written, and how attention reads them.

How a decode step of a layer goes:

    1. the new key and value are written into the *open* page (the last one, still filling);
       a page that has just filled is *sealed*: copied to the host once, after which evicting it costs nothing;
    2. the selector names the pages to attend to;
    3. `PagedSequence.resolve` starts copies for those that are not on the device, and gives the pages in waves;
    4. each wave is attended, and the parts are merged by log-sum-exp, which is exact (see paged_attention.py).

A prompt goes the same way in chunks: a chunk attends to all earlier pages in waves, to itself causally, and is then
written into pages. So prefill is exact as well, whatever the selector, and its pages may exceed the device.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from transformers.cache_utils import CacheLayerMixin

from hf_attention import CannotPage
from metrics import Recorder
from page_store import PageStore, Transport
from page_table import PageTable
from paged_attention import (
    Partial,
    attend_pages,
    attention_with_lse,
    group_heads,
    merge,
    page_mass,
    ungroup_heads,
)
from paged_sequence import PagedSequence, Resolution
from registry import POLICIES, SELECTORS
from run_specs import Paging

MAX_PARTIAL_ELEMENTS = 2**23  # of one kernel call's output during prefill: 32 MiB in float32


@dataclass(frozen=True)
class DecodeAttention:
    """What one layer's attention over the pages of one sequence gave in a decode step, beside its output.

    Attributes:
        parts: (pages, log-sum-exps [n, K, G]) of each part of the attention.
        total: log-sum-exp [1, K, G] of all of it.
    """

    parts: list[tuple[list[int], torch.Tensor]]
    total: torch.Tensor

    @property
    def pages(self) -> list[int]:
        """The pages attended to, in the order of `mass`."""
        return [page for pages, _ in self.parts for page in pages]

    def mass(self) -> torch.Tensor:
        """Each page's share of the attention, averaged over heads: float32 [pages], summing to 1."""
        return page_mass(torch.cat([lse for _, lse in self.parts]), self.total)


class ServesLayers(Protocol):
    """What a layer needs of the cache it belongs to."""

    recorder: Recorder
    phase: str
    torn: bool

    def transport(self, device: torch.device) -> Transport: ...

    def look_ahead(self, layer: PagedLayer, sequence: PagedSequence, wanted: Sequence[int]) -> None:
        """Every page that the layer asked for is there or on its way: the link has time to look ahead."""

    def attended(self, layer: PagedLayer, sequence: PagedSequence, attention: DecodeAttention) -> None:
        """The layer has attended to the sequence's pages in a decode step."""


class PagedLayer(CacheLayerMixin):
    """One layer's keys and values in pages."""

    is_sliding = False
    is_croppable = True

    def __init__(self, layer_idx: int, paging: Paging, cache: ServesLayers):
        super().__init__()
        self.layer_idx, self.paging = layer_idx, paging
        # A cache owns its layers. Were it owned by them too, a dropped cache would hold its pools until the next
        # garbage collection, and the next run would be measured with them.
        self.cache = weakref.proxy(cache)
        self.selector = SELECTORS.create(paging.selector)
        self.n_tokens = self.max_tokens = 0
        self.sequences: list[PagedSequence] = []

    @property
    def n_pages(self) -> int:
        """Pages of each sequence, the open one included."""
        return -(-self.n_tokens // self.paging.page_size)

    # --- what transformers asks of a cache layer -------------------------------------------------------------------

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        batch, n_kv_heads, _, head_dim = key_states.shape
        self.allocate(batch, n_kv_heads, head_dim, key_states.dtype, key_states.device, self.max_tokens)

    def allocate(
        self,
        batch_size: int,
        n_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        max_tokens: int = 0,
    ) -> None:
        """Allocate the device pool, and host pages for `max_tokens` positions of each sequence."""
        paging = self.paging
        self.batch_size, self.dtype, self.device, self.max_tokens = batch_size, dtype, device, max_tokens
        self.store = PageStore(
            batch_size * paging.slots,
            (n_kv_heads, paging.page_size, head_dim),
            dtype,
            device,
            self.cache.transport(device),
        )
        self.store.reserve_host(batch_size * -(-max_tokens // paging.page_size))
        self.sequences = [self._empty_sequence(row) for row in range(batch_size)]
        self.is_initialized = True

    def _empty_sequence(self, row: int) -> PagedSequence:
        paging = self.paging
        policy = POLICIES.create(paging.policy)
        table = PageTable(paging.max_gpu_pages, paging.staging_pages, policy, first_slot=row * paging.slots)
        return PagedSequence(table, self.store, self.cache.recorder, self.layer_idx, row, self.batch_size)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append `[B, K, T, D]` and return all keys and values, `[B, K, positions, D]`; for attention without pages."""
        self._require_initialized(key_states, value_states)
        past = self.n_tokens
        self.write(key_states, value_states)
        return (key_states, value_states) if past == 0 else self.materialise()

    def get_seq_length(self) -> int:
        return self.n_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.n_tokens + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        """Forget the context and keep the memory."""
        if self.is_initialized:
            self.store.settle()
        for sequence in self.sequences:
            sequence.clear()
        self.n_tokens = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` positions; the count is negative, as in transformers."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative count of positions to remove, not {tokens_to_remove}")
        if tokens_to_remove < 0:
            self._rewrite(lambda states: states[:, :, :tokens_to_remove])

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._rewrite(lambda states: states.index_select(0, beam_idx.to(states.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._rewrite(lambda states: states.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._rewrite(lambda states: states[indices, ...])

    def _rewrite(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace the context by a changed copy of it. Simple and exact; costs one pass over the whole context."""
        if self.n_tokens == 0:
            return
        keys, values = (change(states) for states in self.materialise())
        self.reset()
        if keys.shape[0] != self.batch_size:
            self.lazy_initialization(keys, values)
        self.write(keys, values)

    def _require_initialized(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate for what is about to be written, unless memory of just that kind is there."""
        if key_states.shape != value_states.shape:
            raise CannotPage(
                f"layer {self.layer_idx}: keys {tuple(key_states.shape)} and values {tuple(value_states.shape)} differ"
                " in shape (multi-head latent attention?); such a layout cannot be paged"
            )
        batch, n_kv_heads, _, head_dim = key_states.shape
        if self.is_initialized:
            _, _, pool_heads, _, pool_dim = self.store.pool.shape
            kind = (self.batch_size, pool_heads, pool_dim, self.dtype, self.device)
            if kind == (batch, n_kv_heads, head_dim, key_states.dtype, key_states.device):
                return
            if self.n_tokens:
                raise ValueError(
                    f"layer {self.layer_idx} holds {self.batch_size} sequences of {pool_heads} heads in {self.dtype}"
                    f" on {self.device}; keys {tuple(key_states.shape)} in {key_states.dtype} on {key_states.device}"
                    " do not continue them"
                )
        self.lazy_initialization(key_states, value_states)

    # --- pages ------------------------------------------------------------------------------------------------------

    def pinned_pages(self, n_pages: int) -> set[int]:
        """Pages that stay resident: the first `sink_pages`, and the last `recent_pages` of a context of `n_pages`."""
        recent = range(max(0, n_pages - self.paging.recent_pages), n_pages)
        return {*range(min(self.paging.sink_pages, n_pages)), *recent}

    def write(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Append `[B, K, T, D]` to the pages, sealing each page that fills."""
        size, length = self.paging.page_size, keys.shape[2]
        written = 0
        while written < length:
            page, offset = divmod(self.n_tokens, size)
            count = min(size - offset, length - written)
            pinned = self.pinned_pages(page + 1) if offset == 0 else set()
            for row, sequence in enumerate(self.sequences):
                target = self.store.pool[sequence.writable_slot(page, pinned)]
                target[0, :, offset : offset + count] = keys[row, :, written : written + count].detach()
                target[1, :, offset : offset + count] = values[row, :, written : written + count].detach()
                if offset + count == size:
                    sequence.seal(page)
            written += count
            self.n_tokens += count

    def materialise(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and all values, each `[B, K, positions, D]`, put together on the device."""
        self.store.drain()
        size, (_, _, heads, _, head_dim) = self.paging.page_size, self.store.pool.shape
        full = torch.empty(
            (2, self.batch_size, heads, self.n_pages * size, head_dim), dtype=self.dtype, device=self.device
        )
        for row, sequence in enumerate(self.sequences):
            for page in range(self.n_pages):
                slot = sequence.table.resident.get(page)
                source = self.store.host_page(sequence.host_row(page)) if slot is None else self.store.pool[slot]
                full[:, row, :, page * size : (page + 1) * size] = source.to(self.device)
        return full[0, :, :, : self.n_tokens], full[1, :, :, : self.n_tokens]

    # --- attention --------------------------------------------------------------------------------------------------

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        allowed: torch.Tensor | None,
        scale: float,
    ) -> torch.Tensor:
        """Append the new keys and values, and attend from the new positions to the context.

        Args:
            query: [B, H, T, D].
            key, value: [B, K, T, D].
            allowed: bool [B, 1, 1 or T, past + T]; None where there is no padding.

        Returns:
            [B, H, T, D] in the query's dtype.
        """
        self._require_initialized(key, value)
        try:
            return self._attend(query, key, value, allowed, scale)
        except BaseException:
            self.cache.torn = True  # some pages may be staged and not attended, some positions written and others not
            raise

    def _attend(self, query, key, value, allowed, scale) -> torch.Tensor:
        rows = range(self.batch_size)
        if query.shape[2] == 1:
            self.write(key, value)
            requests = self._request_pages(query if self.cache.phase == "decode" else None)
            parts = [self._attend_pages(row, requests[row], query, allowed, scale) for row in rows]
        else:
            requests = self._request_pages(None)
            parts = [self._attend_chunk(row, requests[row], query, key, value, allowed, scale) for row in rows]
            self.write(key, value)
        return torch.cat([ungroup_heads(part.out, query.shape[1]) for part in parts]).to(query.dtype)

    def _request_pages(self, query: torch.Tensor | None) -> list[Resolution]:
        """Ask for the pages of every sequence before any is attended, so that all their copies are under way.

        Args:
            query: [B, H, 1, D] of a decode step, for the selector to choose by; None in prefill, which reads all pages.
        """
        everything, pinned = list(range(self.n_pages)), self.pinned_pages(self.n_pages)
        return [
            sequence.resolve(
                everything if query is None else self.selector.select(query[sequence.row], self.n_pages),
                pinned,
                partial(self.cache.look_ahead, self, sequence),
            )
            for sequence in self.sequences
        ]

    def _attend_chunk(self, index, request, query, key, value, allowed, scale) -> Partial:
        """A prompt chunk of one sequence: all earlier pages, then itself, causally."""
        past, length = self.n_tokens, query.shape[2]
        own_allowed = None
        if allowed is not None:
            own_allowed = allowed[index : index + 1, :, :, past:]
            if allowed.shape[2] == 1:  # padding alone
                own_allowed = own_allowed & torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
        one = slice(index, index + 1)
        own = attention_with_lse(
            query[one], key[one], value[one], scale=scale, causal=own_allowed is None, allowed=own_allowed
        )
        n_kv_heads = key.shape[1]
        own = Partial(group_heads(own.out, n_kv_heads), own.lse.reshape(1, n_kv_heads, -1))
        if past == 0:
            return own
        return merge([self._attend_pages(index, request, query, allowed, scale), own])

    def _attend_pages(self, index, request, query, allowed, scale) -> Partial:
        """Attend from one sequence's query to the pages it asked for, wave by wave."""
        one_token = query.shape[2] == 1  # then the parts are small enough to be merged all at once
        grouped = group_heads(query[index : index + 1], self.store.pool.shape[2])
        row_allowed = None if allowed is None else allowed[index, 0]
        merged: list[Partial] = []
        seen: list[tuple[list[int], torch.Tensor]] = []
        for wave in request:
            for part_pages, part in self._attend_wave(wave, grouped, row_allowed, scale):
                seen.append((part_pages, part.lse))
                merged = [*merged, part] if one_token else [merge([*merged, part])]
        total = merge(merged)
        if self.cache.phase == "decode" and one_token:
            self.cache.attended(self, self.sequences[index], DecodeAttention(seen, total.lse))
        return total

    def _attend_wave(self, wave, grouped, row_allowed, scale) -> Iterator[tuple[list[int], Partial]]:
        """Attend to pages that are on the device: the full ones together, the open one by itself."""
        size, fill = self.paging.page_size, self.n_tokens % self.paging.page_size
        open_page = self.n_pages - 1 if fill else None
        full = sorted((slot, page) for page, slot in wave.items() if page != open_page)
        per_call = max(1, MAX_PARTIAL_ELEMENTS // grouped[0].numel())
        for start in range(0, len(full), per_call):
            slots, pages = zip(*full[start : start + per_call], strict=True)
            allowed = None if row_allowed is None else self._page_mask(row_allowed, pages, grouped.shape[2])
            yield list(pages), self._attend_slots(slots, grouped, allowed, scale)
        if open_page in wave:
            block = self.store.pool[wave[open_page] : wave[open_page] + 1, :, :, :fill]
            allowed = None
            if row_allowed is not None:
                tail = row_allowed[:, open_page * size : open_page * size + fill]
                allowed = _repeat_rows(tail, grouped.shape[2])[None, None]
            yield [open_page], attend_pages(grouped, block[:, 0], block[:, 1], scale=scale, allowed=allowed)

    def _attend_slots(self, slots, grouped, allowed, scale) -> Partial:
        """Attend to full pages. A stretch of the pool with few other pages in it is read in place rather than gathered:
        work on the pages between is thrown away, which costs less than copying those that are wanted."""
        first, n_spanned = slots[0], slots[-1] - slots[0] + 1
        if allowed is not None or n_spanned > 2 * len(slots):
            block = self.store.pool[self._index(slots)]
            return attend_pages(grouped, block[:, 0], block[:, 1], scale=scale, allowed=allowed)
        block = self.store.pool[first : first + n_spanned]
        part = attend_pages(grouped, block[:, 0], block[:, 1], scale=scale)
        if n_spanned == len(slots):
            return part
        wanted = self._index([slot - first for slot in slots])
        return Partial(part.out[wanted], part.lse[wanted])

    def _index(self, places: Sequence[int]) -> torch.Tensor:
        """Places as an index on the device. From pinned memory, as a pageable copy would make the host wait."""
        if self.device.type != "cuda":
            return torch.tensor(places, device=self.device)
        return torch.tensor(places, pin_memory=True).to(self.device, non_blocking=True)

    def _page_mask(self, row_allowed: torch.Tensor, pages: Sequence[int], n_rows: int) -> torch.Tensor:
        """The mask of full pages: [1 or T, positions] -> [n, 1, 1 or G*T, P]."""
        size = self.paging.page_size
        masks = [_repeat_rows(row_allowed[:, page * size : (page + 1) * size], n_rows) for page in pages]
        return torch.stack(masks).unsqueeze(1)


def _repeat_rows(mask: torch.Tensor, n_rows: int) -> torch.Tensor:
    """[T, P] -> [G*T, P], one copy for each query head of a group; [1, P] serves all rows as it is."""
    return mask if mask.shape[0] == 1 else mask.repeat(n_rows // mask.shape[0], 1)
