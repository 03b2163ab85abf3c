"""What one decode step's attention of a layer tells beside its output: which share of it each page received.

Pages attended to as parts of their own have a log-sum-exp each; a page's share is what its own is of the total one.
Policies and predictors learn from these shares, and so does the judge of a selection. Nobody else needs them, and then
parts are longer than pages (see pool_reads.py) and this is not made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property

import torch

from page_store import to_host_later
from paged_attention import page_mass


@dataclass(frozen=True)
class DecodeAttention:
    """What one layer's attention over the pages of one sequence gave in a decode step, beside its output.

    Attributes:
        parts: (pages, log-sum-exps [n, K, G]) of each part of the attention.
        lse: [m, K, G] of all there was to attend to: those pages, and attention sinks.
    """

    parts: list[tuple[list[int], torch.Tensor]]
    lse: torch.Tensor

    @cached_property
    def total(self) -> torch.Tensor:
        """Log-sum-exp [1, K, G] of all of it."""
        return torch.logsumexp(self.lse, dim=0, keepdim=True)

    @property
    def pages(self) -> list[int]:
        """The pages attended to, in the order of `mass`."""
        return [page for pages, _ in self.parts for page in pages]

    @cached_property
    def mass(self) -> Callable[[], list[float]]:
        """Gives each page's share of the attention, averaged over heads; together they are 1 at most. A function, as on
        CUDA the shares are on their way to the host, and on a CPU they need not be computed if nobody reads them."""
        parts, total = [lse for _, lse in self.parts], self.total  # not self, or it would hold itself

        def shares() -> torch.Tensor:
            return page_mass(torch.cat(parts), total)

        return to_host_later(shares()) if self.lse.device.type == "cuda" else cache(lambda: shares().tolist())
