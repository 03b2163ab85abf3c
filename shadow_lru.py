"""What a plain LRU of the same size would have hit: the yardstick for a policy's hits.

A hit rate says little by itself; it depends on the model, the budget and what is asked for. `ShadowLRU` gets the very
accesses that a layer's pages get and keeps only page ids, so that both hit rates come from one run and one stream.

It is told of every request of every layer and step: an access is a step of a loop on an ordered dict and calls no
function of ours. When it is told, see yardstick.py.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field


@dataclass
class ShadowLRU:
    """A least recently used cache of page ids, for one layer of one sequence.

    Where every page but the missing one is pinned, there is no room and the missing page is not kept.

    Args:
        capacity: most pages kept, at least 1.
    """

    capacity: int
    _order: OrderedDict[int, None] = field(default_factory=OrderedDict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.capacity < 1:
            raise ValueError(f"a cache needs room for 1 page at least, not {self.capacity}")

    def ask(self, pages: Sequence[int], pinned: Collection[int], resident_first: bool = True) -> set[int]:
        """Access all pages of one request.

        Args:
            pages: the pages asked for, each once, in the order in which they are taken.
            pinned: pages that are not evicted; a set, as each eviction looks into it.
            resident_first: take the pages that are kept already first, as `PagedSequence.resolve` does, the first of
                them last, and then the missing ones, which may evict those. Else take page by page, whether kept or
                missing.

        Returns:
            The pages that were hits.
        """
        order = self._order
        if resident_first:
            kept, renew = [page for page in pages if page in order], order.move_to_end
            for page in reversed(kept):
                renew(page)
            if len(kept) < len(pages):
                hits = set(kept)
                self._keep([page for page in pages if page not in hits], pinned)
            return set(kept)
        hits = set()
        for page in pages:
            if page in order:
                order.move_to_end(page)
                hits.add(page)
            else:
                self._keep((page,), pinned)
        return hits

    def insert(self, page: int, pinned: Collection[int]) -> None:
        """A page was opened by computation: it is kept as the most recent, and no access is counted."""
        if page in self._order:
            self._order.move_to_end(page)
        else:
            self._keep((page,), pinned)

    def truncate(self, n_pages: int) -> None:
        """The context was cropped: forget all pages but the first `n_pages`."""
        for page in [page for page in self._order if page >= n_pages]:
            del self._order[page]

    def copy(self) -> ShadowLRU:
        """A shadow in the same state that goes its own way from here."""
        twin = ShadowLRU(self.capacity)
        twin._order.update(self._order)
        return twin

    def _keep(self, missing: Sequence[int], pinned: Collection[int]) -> None:
        order = self._order
        room = self.capacity - len(order)
        for page in missing:
            if room:
                room -= 1
            else:
                for oldest in order:
                    if oldest not in pinned:
                        del order[oldest]
                        break
                else:
                    continue
            order[page] = None
