"""A decode step like the one before it: every page is where it was, and one more position of the open page is written.

Where all pages fit on the device, this is every decode step but the few in which a page fills or opens. Such a step
needs no request, no plan and no table, only to write its key and value, to attend, and to be counted. What stays the
same is kept from the step before, as views of the pool, and a step costs about what a preallocated cache does.

It is no other way to attend: the views are those that the plan of the step before gave, and the kernel calls, the
counts and the answer are the same, bit for bit.
"""

from __future__ import annotations

import torch

from layer_pages import LayerPages
from paged_attention import (
    Partial,
    attend_parts,
    attention_with_lse,
    group_heads,
    merged_output,
    rows_apart,
    side_by_side,
    ungroup_heads,
)
from pool_reads import Stretch


class StandingStep:
    """What the next decode step of a layer may repeat.

    Args:
        pages: of the layer; with one sequence, whose last request has an answer that stands.
        stretch: all its pages, in place, the open one last.
        scale: factor on the scores.
    """

    def __init__(self, pages: LayerPages, stretch: Stretch, scale: float):
        self._pages, self._sequence, self._scale = pages, pages.sequences[0], scale
        self._answer = self._sequence.standing_answer()
        self._pool = pages.store.pool
        self._n_tokens = self._sequence.n_tokens
        self._whole, self._rest = stretch.to_its_end
        size = pages.paging.page_size
        self._n_before = self._rest[0].shape[2] - size  # positions of the rest before the open page
        self._first = self._n_tokens - self._n_tokens % size  # of the open page
        self._last = self._first + size - 1  # which fills it
        self._open_page = stretch.pool[-1]  # [P, 2, K, D]
        _, n_kv_heads, head_dim, _, _ = pages.kind
        self._key_shape = 1, n_kv_heads, 1, head_dim

    @classmethod
    def after(cls, pages: LayerPages, plan: list[Stretch], scale: float) -> StandingStep | None:
        """What the step after the one that read by `plan` may repeat; None if it has to be asked for anew."""
        one_stretch = len(plan) == 1 and plan[0].gathered is None and plan[0].ends_open
        if not one_stretch or pages.batch_size > 1 or pages.sequences[0].standing_answer() is None:
            return None
        return cls(pages, plan[0], scale)

    def serves(
        self, pages: LayerPages | None, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> bool:
        """Whether the step now is that one."""
        return (
            pages is self._pages
            and self._sequence.n_tokens == self._n_tokens < self._last
            and self._sequence.standing_answer() is self._answer
            and pages.sequences[0] is self._sequence
            and pages.store.pool is self._pool
            and query.shape[2] == 1
            and not (key.requires_grad or value.requires_grad)
            and key.shape == value.shape == self._key_shape
            and key.dtype is value.dtype is self._pool.dtype
            and key.device == self._pool.device
            and scale == self._scale
        )

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Write `[1, K, 1, D]` and attend from `[1, H, 1, D]` to all there is; the same shape, float32."""
        n_kv_heads, head_dim = key.shape[1], key.shape[3]
        written = self._open_page.select(0, self._n_tokens - self._first)  # [2, K, D]
        torch.cat((key.view(1, n_kv_heads, head_dim), value.view(1, n_kv_heads, head_dim)), out=written)
        self._n_tokens += 1
        self._sequence.n_tokens = self._pages.n_tokens = self._n_tokens
        end = self._n_before + self._n_tokens - self._first
        keys, values = (states.narrow(2, 0, end) for states in self._rest)
        if self._whole is None and rows_apart(1, n_kv_heads, query.shape[1] // n_kv_heads, query.device):
            return attention_with_lse(query, keys, values, scale=self._scale).out
        grouped = group_heads(query, n_kv_heads)
        rest = attend_parts(grouped, keys, values, scale=self._scale)
        parts: list[Partial] = [rest]
        if self._whole is not None:
            parts.insert(0, attend_parts(grouped, *self._whole, scale=self._scale))
        return ungroup_heads(merged_output(side_by_side(parts), all_see=True), query.shape[1])
