"""In which order the bytes of pages lie in memory. Whoever reads or writes pages sees [n, P, 2, K, D] in each case.

By position, a page is one block, position after position with its key and value of all heads: one copy across a bus,
and one row to gather. By head, the positions of a head lie side by side, those of pages next to each other as well, as
in a cache of transformers: a CPU's attention reads them as fast as its memory gives them, and by position at little
more than half of that on machines that do not foresee its strides.

So pages lie by head where a CPU reads them in place, and by position where they cross a bus or are gathered.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PageShape = tuple[int, int, int, int]  # P positions, keys and values, K key/value heads, D head size


def pool_of_pages(
    make: Callable[..., torch.Tensor], n: int, page_shape: PageShape, by_head: bool, **how: Any
) -> torch.Tensor:
    """Device pages [n, P, 2, K, D], made by `make`, such as `torch.zeros`, with `how`; by head across pages."""
    if not by_head:
        return make((n, *page_shape), **how)
    size, two, n_kv_heads, head_dim = page_shape
    return make((two, n_kv_heads, n, size, head_dim), **how).permute(2, 3, 0, 1, 4)


def rows_of_pages(
    make: Callable[..., torch.Tensor], n: int, page_shape: PageShape, by_head: bool, **how: Any
) -> torch.Tensor:
    """Host pages [n, P, 2, K, D], each a block of its own; by head within the page."""
    if not by_head:
        return make((n, *page_shape), **how)
    size, two, n_kv_heads, head_dim = page_shape
    return make((n, two, n_kv_heads, size, head_dim), **how).permute(0, 3, 1, 2, 4)
