"""The pages of one layer: those of all sequences of a batch, with the memory they lie in.

The sequences share a device pool, of which each has a *lane* of as many slots as its budget and staging allow, and the
host pages. Each fills its own pages, without the padding that made the batch's rows equally long, so rows may differ in
length. Whatever changes the rows of a batch (beam search, repeating or dropping rows) copies lanes within the device
and shares sealed pages on the host, where they never change.

A selector chooses pages by *digests*, small summaries of a page's keys that stay on the device. They are made here, as
a page fills.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cache_settings import Paging
from device_page_table import require_device_table
from lockstep import Lockstep
from padding import kept_of
from page_selection import PageDigests
from page_selectors import Selector
from page_store import PageStore, Transport
from paged_sequence import PagedSequence
from recorder import Recorder


class LayerPages:
    """The keys and values of one layer in pages, for every sequence of a batch.

    Args:
        layer_idx: for the record.
        paging: page size, budget and policies.
        recorder: counts for the whole cache.
        transport: what copies travel on.
        batch_size: sequences.
        head_shape: (n_kv_heads, head_dim).
        dtype, device: of keys and values.
        selector: makes the digests; None where every page is read.
        max_tokens: positions of each sequence that memory is reserved for; more may follow.
        lockstep: of the layers that ask alike where every page is read; None where nothing is shared.
    """

    def __init__(
        self,
        layer_idx: int,
        paging: Paging,
        recorder: Recorder,
        transport: Transport,
        batch_size: int,
        head_shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
        selector: Selector | None = None,
        max_tokens: int = 0,
        lockstep: Lockstep | None = None,
    ):
        n_kv_heads, head_dim = head_shape
        self.layer_idx, self.paging, self.selector = layer_idx, paging, selector
        self.kind = (batch_size, n_kv_heads, head_dim, dtype, device)
        n_sealed = max_tokens // paging.page_size
        self.store = PageStore(
            batch_size * paging.slots,
            (paging.page_size, 2, n_kv_heads, head_dim),
            dtype,
            device,
            transport,
            memory_rows=None if paging.host_pages is None else batch_size * paging.host_pages,
            disk_dir=paging.disk_dir,
            by_head=device.type == "cpu" and selector is None,  # selected pages are gathered
        )
        self.store.reserve_host(batch_size * n_sealed)
        if selector is not None and paging.page_table == "device":
            require_device_table(self.store)
        self.digests = None
        if selector is not None:
            a_page = torch.zeros((1, n_kv_heads, paging.page_size, head_dim), dtype=dtype, device=device)
            self.digests = PageDigests(batch_size, like=selector.digest(a_page))
            self.digests.reserve(n_sealed)
        lockstep = lockstep if selector is None else None
        self.sequences = [
            PagedSequence(lane, paging, self.store, recorder, layer_idx, lockstep) for lane in range(batch_size)
        ]
        self.n_tokens = 0

    @property
    def batch_size(self) -> int:
        return len(self.sequences)

    @property
    def n_pages(self) -> int:
        """Pages of the longest sequence, the open one included."""
        return max(sequence.n_pages for sequence in self.sequences)

    # --- writing ----------------------------------------------------------------------------------------------------

    def append(self, keys: torch.Tensor, values: torch.Tensor, masked: Sequence[Sequence[int]] | None = None) -> None:
        """Append `[B, K, T, D]`.

        Args:
            masked: which of these positions are padding, in each row; they are not stored.
        """
        past, length = self.n_tokens, keys.shape[2]
        for row, sequence in enumerate(self.sequences):
            row_keys, row_values = keys[row], values[row]
            if masked is not None:
                kept = kept_of(masked[row], past, length)
                row_keys, row_values = row_keys[:, kept], row_values[:, kept]
                sequence.holes += masked[row]
            if self.digests is not None:
                self._digest(row, row_keys)
            sequence.append(row_keys, row_values)
        self.n_tokens += length

    def _digest(self, row: int, keys: torch.Tensor) -> None:
        """Digest the pages that fill as `[K, T, D]` is appended, before they are sealed and may be evicted."""
        sequence, size = self.sequences[row], self.paging.page_size
        first, offset = divmod(sequence.n_tokens, size)
        n_filled = (offset + keys.shape[1]) // size
        if n_filled == 0:
            return
        if offset:
            written = self.store.pool[sequence.table.resident[first], :offset, 0]  # [offset, K, D]
            keys = torch.cat([written.transpose(0, 1), keys], dim=1)
        pages = keys[:, : n_filled * size].unflatten(1, (n_filled, size)).transpose(0, 1)  # [n, K, P, D]
        digests = self.selector.digest(pages)
        if digests.shape[:2] != pages.shape[:2]:
            raise ValueError(
                f"{type(self.selector).__name__} made digests {tuple(digests.shape)} of keys {tuple(pages.shape)}; the"
                " first two sizes, pages and key/value heads, must be the same"
            )
        self.digests.put(row, first, digests)

    def scores(self, row: int, query: torch.Tensor) -> torch.Tensor:
        """How much a row's query `[K, G, D]` wants each of its full pages, `[n, K, G]`.

        Raises:
            ValueError: the selector gave scores of another shape.
        """
        n_sealed = self.sequences[row].n_sealed
        scores = self.selector.score(query, self.digests.of(row, n_sealed))
        if scores.shape != (n_sealed, *query.shape[:2]):
            raise ValueError(
                f"{type(self.selector).__name__} gave scores {tuple(scores.shape)} for {n_sealed} pages and a query"
                f" {tuple(query.shape)}; they must be {(n_sealed, *query.shape[:2])}"
            )
        return scores

    def agree_with(self, masked: Sequence[list[int]] | None) -> None:
        """Make sure that of the context just those positions are stored that are not masked now.

        Positions that were stored and have become masked, as when a padded context was written without a mask, are
        taken out, at the cost of one pass over the context.

        Raises:
            ValueError: a position that was padding when it was written is to be seen now.
        """
        if masked is None and not any(sequence.holes for sequence in self.sequences):
            return
        holes = [sequence.holes for sequence in self.sequences]
        past = [[] for _ in self.sequences] if masked is None else list(masked)
        if past == holes:
            return
        for row, sequence in enumerate(self.sequences):
            lost = sorted(set(sequence.holes) - set(past[row]))
            if lost:
                raise ValueError(
                    f"row {row}: positions {lost[0]}..{lost[-1]} were padding when they were written, so they are not"
                    " stored; pass the same attention_mask for them, or start with an empty cache"
                )
        keys, values = self.materialise()
        self.clear()
        self.append(keys, values, past)

    # --- changing ---------------------------------------------------------------------------------------------------

    def truncate(self, n_tokens: int) -> None:
        """Forget all but the first `n_tokens` positions."""
        for sequence in self.sequences:
            sequence.holes = [position for position in sequence.holes if position < n_tokens]
            sequence.truncate(n_tokens - len(sequence.holes))
        self.n_tokens = n_tokens

    def select_rows(self, rows: Sequence[int]) -> None:
        """Make row i what row `rows[i]` was; there may be more or fewer rows than before."""
        if list(rows) == list(range(self.batch_size)):
            return
        self.store.select_lanes(list(rows), self.paging.slots)
        if self.digests is not None:
            self.digests.select_rows(list(rows))
        old, self.sequences = self.sequences, []
        for lane, row in enumerate(rows):
            self.sequences.append(old[row] if lane == row else old[row].fork(lane))
        for lane, sequence in enumerate(old):
            if lane >= len(rows) or rows[lane] != lane:
                sequence.drop()
        self.kind = (len(rows), *self.kind[1:])

    def clear(self) -> None:
        """Forget the context, and keep the memory."""
        self.store.settle()
        for sequence in self.sequences:
            sequence.clear()
        self.n_tokens = 0

    # --- reading it all ---------------------------------------------------------------------------------------------

    def materialise(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and all values, each `[B, K, positions, D]`, put together on the device; padding is 0."""
        self.store.drain()
        batch_size, n_kv_heads, head_dim, dtype, device = self.kind
        full = torch.zeros((2, batch_size, n_kv_heads, self.n_tokens, head_dim), dtype=dtype, device=device)
        for row, sequence in enumerate(self.sequences):
            if sequence.n_tokens == 0:
                continue
            pages = [self._page(sequence, page) for page in range(sequence.n_pages)]
            stored = torch.cat(pages)[: sequence.n_tokens]  # [positions, 2, K, D]
            full[:, row, :, kept_of(sequence.holes, 0, self.n_tokens)] = stored.permute(1, 2, 0, 3)
        return full[0], full[1]

    def _page(self, sequence: PagedSequence, page: int) -> torch.Tensor:
        slot = sequence.table.resident.get(page)
        if slot is not None:
            return self.store.pool[slot]
        return self.store.host.page(sequence.host_rows[page]).to(self.kind[-1])
