"""One layer of a paged cache, as transformers sees it, and how its attention reads pages.

How a decode step of a layer goes:

    1. the new key and value are written into the *open* page (the last one, still filling);
       a page that has just filled is *sealed*: copied to the host once, after which evicting it costs nothing;
    2. the selector names the pages to attend to;
    3. `PagedSequence.resolve` starts copies for those that are not on the device, and gives the pages in waves;
    4. each wave is attended in parts, merged by log-sum-exp, which is exact (see pool_reads.py, paged_attention.py).

A step that finds all where the step before left it does 1 and 4 alone (standing_step.py). A prompt goes the same way in
chunks: each attends to all earlier pages in waves, to itself causally, and is then written into pages. So prefill is
exact as well, whatever the selector, and its pages may exceed the device; like any forward pass of several tokens.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from transformers.cache_utils import CacheLayerMixin

from cache_settings import Paging
from decode_attention import DecodeAttention
from hf_attention import CannotPage
from layer_pages import LayerPages
from lockstep import Lockstep
from padding import Padding, kept_of
from page_selection import choose_on_device, choose_pages
from page_store import Transport
from paged_attention import (
    Partial,
    attend_parts,
    attention_with_lse,
    group_heads,
    merge,
    merged_output,
    side_by_side,
    sink_part,
    ungroup_heads,
)
from paged_sequence import PagedSequence
from pool_reads import MOST_PLANS, PageReading, ReadPlans, Stretch, device_index
from recorder import Recorder
from registry import SELECTORS
from stage_clock import StageClock, clock_for
from standing_step import StandingStep

PART_TOKENS = 512  # of a part that one new token attends to: enough parts for many threads, few enough to merge
CHUNK_PART_TOKENS = 2**13  # of a part that a chunk attends to, whose queries are enough for all threads
MAX_PARTIAL_ELEMENTS = 2**23  # of one kernel call's output during prefill: 32 MiB in float32


class ScoreRule(NamedTuple):
    """How scores are made of queries and keys: `scale`, and `softcap` where a model bounds them. `sinks` [H] are
    logits without a value that join the softmax's denominator."""

    scale: float
    softcap: float | None = None
    sinks: torch.Tensor | None = None


class ServesLayers(Protocol):
    """What a layer needs of the cache it belongs to."""

    recorder: Recorder
    lockstep: Lockstep | None
    phase: str
    torn: bool
    watches_attention: bool  # whether `attended` is to be called
    looks_ahead: bool  # whether `look_ahead` is to be called

    def transport(self, device: torch.device) -> Transport: ...

    def padding(self, allowed: torch.Tensor | None) -> Padding | None:
        """What the mask of this forward pass leaves out; None if nothing."""

    def look_ahead(self, layer: PagedLayer, sequence: PagedSequence, wanted: Sequence[int]) -> None:
        """Every page that the layer asked for is there or on its way: the link has time to look ahead."""

    def attended(self, layer: PagedLayer, sequence: PagedSequence, attention: DecodeAttention) -> None:
        """The layer has attended to the sequence's pages in a decode step."""


class PagedLayer(CacheLayerMixin):
    """One layer's keys and values in pages.

    Attributes:
        pages: the pages, allocated as the first keys come in, or by `allocate`.
        attention: the model's module that attends with this layer, once it has.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, layer_idx: int, paging: Paging, cache: ServesLayers):
        super().__init__()
        self.layer_idx, self.paging = layer_idx, paging
        # Were the cache owned by its layers too, its pools would outlive it until the next garbage collection.
        self.cache = weakref.proxy(cache)
        selects = paging.selects and layer_idx >= paging.dense_layers
        self.selector = SELECTORS.create(paging.selector) if selects else None
        self.pages: LayerPages | None = None
        self.attention: torch.nn.Module | None = None
        self.clock: StageClock
        self._looking: list[tuple[PagedSequence, Sequence[int]]] = []  # rows that have asked for all they want
        self._n_asking = 0
        self._repeat: StandingStep | None = None
        self._plans: ReadPlans | None = None
        self._last_plan: list[Stretch] = []

    @property
    def n_tokens(self) -> int:
        """Positions of the context, padding included."""
        return 0 if self.pages is None else self.pages.n_tokens

    # --- what transformers asks of a cache layer -------------------------------------------------------------------

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        batch, n_kv_heads, _, head_dim = key_states.shape
        self.allocate(batch, n_kv_heads, head_dim, key_states.dtype, key_states.device)

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
        self.pages = None  # let go of the old memory before new memory is taken
        self._forget_reads()
        self.clock = clock_for(device)  # before the pages, whose being there says that all is allocated
        self.pages = LayerPages(
            self.layer_idx,
            self.paging,
            self.cache.recorder,
            self.cache.transport(device),
            batch_size,
            (n_kv_heads, head_dim),
            dtype,
            device,
            selector=self.selector,
            max_tokens=max_tokens,
            lockstep=self.cache.lockstep,
        )
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append `[B, K, T, D]` and return all keys and values, `[B, K, positions, D]`; for attention without pages."""
        self._require_initialized(key_states, value_states)
        past = self.n_tokens
        self.pages.append(key_states, value_states)
        return (key_states, value_states) if past == 0 else self.pages.materialise()

    def _forget_reads(self) -> None:
        """Let go of how pages were read last: that holds the pool."""
        self._repeat, self._plans, self._last_plan = None, None, []

    def get_seq_length(self) -> int:
        return self.n_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.n_tokens + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        """Forget the context and keep the memory; but not that of a torn cache, whose bookkeeping may not add up."""
        self._forget_reads()
        if self.cache.torn:
            self.pages, self.is_initialized = None, False
        elif self.pages is not None:
            self.pages.clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` positions; the count is negative, as in transformers."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative count of positions to remove, not {tokens_to_remove}")
        if tokens_to_remove < 0 and self.n_tokens:
            self._forget_reads()
            self.pages.truncate(max(0, self.n_tokens + tokens_to_remove))

    @property
    def n_rows(self) -> int:
        """Sequences in the batch; 0 before there are any."""
        return 0 if self.pages is None else self.pages.batch_size

    def select_rows(self, rows: list[int]) -> None:
        """Make row i what row `rows[i]` was."""
        self._forget_reads()
        if self.n_tokens:
            self.pages.select_rows(rows)

    def continue_from(self, other: PagedLayer) -> None:
        """Take over the context of another layer, by writing it again."""
        if other.n_tokens:
            keys, values = other.pages.materialise()
            self._require_initialized(keys, values)
            self.pages.append(keys, values, [sequence.holes for sequence in other.pages.sequences])

    def _require_initialized(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate for what is about to be written, unless memory of just that kind is there."""
        if key_states.shape != value_states.shape:
            raise CannotPage(
                f"layer {self.layer_idx}: keys {tuple(key_states.shape)} and values {tuple(value_states.shape)} differ"
                " in shape; such a layout cannot be paged"
            )
        batch, n_kv_heads, _, head_dim = key_states.shape
        kind = (batch, n_kv_heads, head_dim, key_states.dtype, key_states.device)
        if self.pages is not None and self.pages.kind == kind:
            return
        if self.n_tokens:
            rows, heads, _, dtype, device = self.pages.kind
            raise ValueError(
                f"layer {self.layer_idx} holds {rows} sequences of {heads} heads in {dtype} on {device};"
                f" keys {tuple(key_states.shape)} in {key_states.dtype} on {key_states.device} do not continue them"
            )
        self.lazy_initialization(key_states, value_states)

    # --- attention --------------------------------------------------------------------------------------------------

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        allowed: torch.Tensor | None,
        scale: float,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Append the new keys and values, and attend from the new positions to the context.

        Args:
            query: [B, H, T, D].
            key, value: [B, K, T, D].
            allowed: bool [B, 1, 1, past + T], False where a position is padding; None where none is.
            scale: factor on the scores.
            softcap: bound of the scores, cap * tanh(score / cap).
            sinks: [H], a logit for each head that takes a share of the attention and gives no value.

        Returns:
            [B, H, T, D] in the query's dtype; 0 for positions that are padding.
        """
        plain = allowed is None and softcap is None and sinks is None and self.cache.phase == "decode"
        if self._repeat is not None:
            if plain and not self.cache.watches_attention and self._repeat.serves(self.pages, query, key, value, scale):
                return self._attend_again(query, key, value)
            self._repeat = None
        self._require_initialized(key, value)
        n_positions = self.n_tokens + query.shape[2]
        if allowed is not None and allowed.shape[-1] != n_positions:
            raise CannotPage(f"the mask is for {allowed.shape[-1]} positions, but there are {n_positions}")
        try:
            padding = None if allowed is None else self.cache.padding(allowed)
            self.pages.agree_with(None if padding is None else padding.past)
            masked = None if padding is None else padding.new
            rule = ScoreRule(scale, softcap, sinks)
            attend = self._attend_token if query.shape[2] == 1 else self._attend_chunk
            rows = attend(query, key, value, masked, rule)
        except BaseException:
            self.cache.torn = True  # some pages may be staged and not attended, some positions written and others not
            raise
        may_repeat = plain and query.shape[2] == 1 and self.selector is None
        if may_repeat and not self._shares_asked_for(self.pages.sequences[0]):
            self._repeat = StandingStep.after(self.pages, self._last_plan, scale)
        return (rows[0] if len(rows) == 1 else torch.cat(rows)).to(query.dtype)

    def _attend_again(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """A decode step that repeats the one before it; see standing_step.py."""
        sequence = self.pages.sequences[0]
        try:
            sequence.ask_again(partial(self.cache.look_ahead, self, sequence) if self.cache.looks_ahead else None)
            started = self.clock.now()
            out = self._repeat.attend(query, key, value)
            self._spent_attending(started)
        except BaseException:
            self.cache.torn = True
            raise
        return out.to(query.dtype)

    def _attend_token(self, query, key, value, masked, rule) -> list[torch.Tensor]:
        """One new token of each row: written first, and then attended to like the others."""
        self.pages.append(key, value, masked)
        readings = self._ask_all(query, rule, [bool(padded) for padded in masked or ()])
        return [self._attend_row(row, query[row : row + 1], reading, rule) for row, reading in enumerate(readings)]

    def _attend_chunk(self, query, key, value, masked, rule) -> list[torch.Tensor]:
        """Several new tokens of each row: attended to causally among themselves, and written afterwards."""
        past, length = self.n_tokens, query.shape[2]
        readings = self._ask_all()
        rows = []
        for row, reading in enumerate(readings):
            one = slice(row, row + 1)
            if masked is None:
                rows.append(self._attend_row(row, query[one], reading, rule, key[one], value[one]))
                continue
            kept = kept_of(masked[row], past, length)
            own = (states[one, :, kept] for states in (key, value))
            out = torch.zeros_like(query[one])
            out[:, :, kept] = self._attend_row(row, query[one, :, kept], reading, rule, *own).to(out.dtype)
            rows.append(out)
        self.pages.append(key, value, masked)
        return rows

    def _ask_all(
        self, query: torch.Tensor | None = None, rule: ScoreRule | None = None, padded: Sequence[bool] = ()
    ) -> list[PageReading]:
        """Ask for the pages of every row before any is attended, so that all their copies are under way.

        Args:
            query: [B, H, 1, D] of a decode step, for the selector to choose by; None for a chunk, which reads all.
            padded: rows whose new token is padding, which read nothing; like those that have no pages yet.
        """
        asking = [
            bool(sequence.n_pages) and not (padded and padded[row]) for row, sequence in enumerate(self.pages.sequences)
        ]
        self._looking.clear()
        self._n_asking = sum(asking)
        return [
            self._ask(sequence, None if query is None else query[row], rule) if asking[row] else PageReading(())
            for row, sequence in enumerate(self.pages.sequences)
        ]

    def _ask(self, sequence: PagedSequence, query: torch.Tensor | None, rule: ScoreRule | None) -> PageReading:
        """Ask for the pages of one row; its query is [H, 1, D]."""
        pages, heads = range(sequence.n_pages), None
        pinned = sequence.pinned_pages()
        n_attended = self.paging.n_attended(len(pages))
        decodes = query is not None and self.cache.phase == "decode"
        if self.selector and decodes and n_attended < len(pages):
            started = self.clock.now()
            grouped = query.reshape(self.pages.kind[1], -1, query.shape[-1]) * rule.scale  # [K, G, D]
            if self.paging.page_table == "device":
                return self._ask_device(sequence, self.pages.scores(sequence.lane, grouped), n_attended, started)
            per_head = self.paging.granularity == "kv_head"
            choice = choose_pages(self.pages.scores(sequence.lane, grouped), len(pages), pinned, n_attended, per_head)
            pages, heads = choice.pages, choice.heads
            self.cache.recorder.spent(self.layer_idx, "select", self.clock.since(started))
        look_ahead = partial(self._look_ahead, sequence) if self.cache.looks_ahead else None
        return PageReading(sequence.resolve(pages, pinned, look_ahead, decodes), heads)

    def _ask_device(self, sequence: PagedSequence, scores: torch.Tensor, n_attended: int, started: Any) -> PageReading:
        """Choose pages and have them come without the host's knowing which; see device_page_table.py."""
        first, end = self.paging.sink_pages, sequence.n_pages - self.paging.recent_pages
        chosen = choose_on_device(scores, first, end, n_attended - len(sequence.pinned_pages()))
        self.cache.recorder.spent(self.layer_idx, "select", self.clock.since(started))
        started = self.clock.now()
        is_told, size = self._shares_asked_for(sequence), self.paging.page_size
        stretches = sequence.bring_in(*chosen, size if is_told else max(size, PART_TOKENS), names_pages=is_told)
        self.cache.recorder.waited(self.layer_idx, self.clock.since(started))
        return PageReading((stretches,))

    def _look_ahead(self, sequence: PagedSequence, wanted: Sequence[int]) -> None:
        """Look ahead once nothing is left to ask for in any row: copies are first come, first served, and what a row
        wants now goes before what another may want next."""
        self._looking.append((sequence, wanted))
        if len(self._looking) == self._n_asking:
            for one, pages in self._looking:
                self.cache.look_ahead(self, one, pages)
            self._looking.clear()

    def _attend_row(self, row, query, reading, rule, key=None, value=None) -> torch.Tensor:
        """Attend from one row's new tokens to the pages it asked for, wave by wave, and to `key` and `value` of the
        same tokens, causally. [1, H, T, D] -> [1, H, T, D], float32."""
        n_heads, length = query.shape[1:3]
        sequence, n_kv_heads = self.pages.sequences[row], self.pages.kind[1]
        if length == 0:
            for _ in reading.waves:  # asked for, so they have to be taken
                pass
            return query.float()
        merged: list[Partial] = []
        seen: list[tuple[list[int], torch.Tensor]] = []
        grouped = group_heads(query, n_kv_heads)
        # A chunk's shares are not kept: they take memory.
        is_told = self.cache.phase == "decode" and key is None and self._shares_asked_for(sequence)
        part_tokens = self.paging.page_size  # a part for each page
        if not is_told and reading.heads is None:
            part_tokens = max(part_tokens, PART_TOKENS if length == 1 else CHUNK_PART_TOKENS)
        if key is not None:
            started = self.clock.now()
            own = attention_with_lse(query, key, value, scale=rule.scale, causal=True, softcap=rule.softcap)
            merged.append(Partial(group_heads(own.out, n_kv_heads), own.lse.reshape(1, n_kv_heads, -1)))
            self._spent_attending(started)
        # A span each, for between waves there is waiting; where all pages are there, reading and merging are one.
        all_there = key is None and isinstance(reading.waves, tuple)
        names_pages = is_told or reading.heads is not None
        for wave in reading.waves:
            started = self.clock.now()
            page_in = {slot: page for page, slot in wave.items()} if names_pages and isinstance(wave, dict) else None
            for names, part in self._attend_wave(sequence, wave, grouped, rule, part_tokens):
                pages = names if page_in is None else [page_in[slot] for slot in names]
                if reading.heads is not None:
                    unseen = ~reading.heads[device_index(pages, grouped.device)].unsqueeze(-1)
                    part = Partial(part.out, part.lse.masked_fill(unseen, float("-inf")))
                if is_told:
                    seen.append((pages, part.lse))
                # The parts of one token are small enough to be merged all at once.
                merged = [*merged, part] if length == 1 else [merge([*merged, part])]
            if not all_there:
                self._spent_attending(started)
        if not merged:  # nothing but padding so far
            return torch.zeros_like(query, dtype=torch.float32)
        started = started if all_there else self.clock.now()
        if rule.sinks is not None:
            merged.append(sink_part(rule.sinks, like=merged[0]))
        together = side_by_side(merged)
        out = ungroup_heads(merged_output(together, all_see=length == 1 and reading.heads is None), n_heads)
        self._spent_attending(started)
        if is_told:
            attention = DecodeAttention(seen, together.lse)
            if getattr(sequence.table.policy, "needs_mass", False):
                sequence.attended(attention.pages, attention.mass)
            if self.cache.watches_attention:
                self.cache.attended(self, sequence, attention)
        return out

    def _shares_asked_for(self, sequence: PagedSequence) -> bool:
        """Whether anybody wants to know which share of the attention each page got."""
        return self.cache.watches_attention or getattr(sequence.table.policy, "needs_mass", False)

    def _spent_attending(self, started: Any) -> None:
        self.cache.recorder.spent(self.layer_idx, "attend", self.clock.since(started))

    def _attend_wave(self, sequence, wave, grouped, rule, part_tokens) -> Iterator[tuple[Sequence[int], Partial]]:
        """Attend to pages that are on the device, in parts of about so many positions; with the names that their
        stretches give them. A block that was gathered goes before the next one is."""
        fill = sequence.n_tokens % self.paging.page_size
        stretches = wave if isinstance(wave, list) else self._planned(sequence, wave, grouped, part_tokens)
        for stretch in stretches:
            for names, keys, values, bias in stretch.parts(fill):
                yield names, attend_parts(grouped, keys, values, scale=rule.scale, bias=bias, softcap=rule.softcap)

    def _planned(self, sequence, wave, grouped, part_tokens) -> list[Stretch]:
        pool, size = self.pages.store.pool, self.paging.page_size
        open_slot = wave.get(sequence.n_pages - 1) if sequence.n_tokens % size else None
        most = part_tokens // size * max(1, MAX_PARTIAL_ELEMENTS // grouped[0].numel())
        if self._plans is None or self._plans.pool is not pool:
            self._plans = ReadPlans(pool, most_kept=MOST_PLANS if self.selector is None else 0)
        self._last_plan = self._plans.plan(wave.values(), open_slot, part_tokens, most)
        return self._last_plan
