"""Which positions of a batch are padding, so that they need never be stored.

The rows of a batch differ in length, so the shorter ones are padded, on the left, with positions that attention must
not see. Keys carry their position before they are cached, so leaving those out changes nothing for the others: a row's
pages then hold just what they would hold if the row were alone. No attention over pages needs a mask, and pages begin
at the same tokens, so that a selector chooses the same ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Padding:
    """The positions of each row that may not be seen, ascending.

    Attributes:
        past: those of the context so far.
        new: those among the positions that are being added.
    """

    past: list[list[int]]
    new: list[list[int]]


def read_padding(allowed: torch.Tensor, past: int) -> Padding | None:
    """The padding that a mask tells of; None if there is none.

    Args:
        allowed: bool [B, 1, 1, positions]. Read once for all layers of a forward pass, as on CUDA it is waited for.
        past: how many of the positions are in the context already.
    """
    masked = (~allowed[:, 0, 0]).nonzero().tolist()
    if not masked:
        return None
    padding = Padding(*([[] for _ in range(allowed.shape[0])] for _ in ("past", "new")))
    for row, position in masked:
        (padding.past if position < past else padding.new)[row].append(position)
    return padding


def kept_of(masked: Sequence[int], past: int, length: int) -> slice | list[int]:
    """The new positions `past .. past + length - 1` that are not masked, as an index into them.

    Returns:
        A slice where they are a stretch, as with padding on one side; it may be empty.
    """
    gone = {position - past for position in masked if position >= past}
    kept = [place for place in range(length) if place not in gone] if gone else range(length)
    if not kept:
        return slice(0, 0)
    stretch = slice(kept[0], kept[-1] + 1)
    return stretch if stretch.stop - stretch.start == len(kept) else list(kept)
