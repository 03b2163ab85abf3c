"""The yardstick of a layer of a sequence: what plain LRU would have hit, found out when somebody wants to know.

Two plain LRUs see every request that the layer's pages see, one as large as the budget, one with the staging slots on
top. Asking them takes as long as the rest of a request, and is no part of paging; so in a measured step a request is
only noted, and what the LRUs make of it is counted as the counts are read (`Recorder.count_later`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from copy import copy
from functools import partial

from recorder import Recorder
from shadow_lru import ShadowLRU

REQUEST_BYTES, PAGE_BYTES = 400, 36  # that a noted request takes, and each page number in it


class Asked:
    """A request, as plain LRU is going to be asked it.

    Args:
        request: pages, pinned and resident_first, as for `ShadowLRU.ask`; not to be changed any more.
        shadows: of the budget, and of all slots.
        hits: pages of the request that are hits, as far as it is known already.
    """

    def __init__(
        self,
        request: tuple[Sequence[int], Collection[int], bool],
        shadows: tuple[ShadowLRU, ShadowLRU],
        hits: Collection[int] = (),
    ):
        self._request, self._shadows, self._hits = request, shadows, hits
        self._held: set[int] | None = None  # by plain LRU, once it has been asked

    def hit(self, pages: Sequence[int]) -> int:
        """These pages of the request turned out to be hits. How many of them plain LRU held, if it has been asked; else
        it is counted then."""
        if self._held is None:
            self._hits = [*self._hits, *pages]
            return 0
        return len(self._held.intersection(pages))

    def answer(self) -> dict[str, int]:
        """Ask; the counts of it."""
        plain, of_all_slots = (shadow.ask(*self._request) for shadow in self._shadows)
        self._held = plain
        return {
            "shadow_hits": len(plain),
            "shadow_slots_hits": len(of_all_slots),
            "lru_hits": len(plain.intersection(self._hits)),
        }


class Yardstick:
    """Plain LRUs that are told of a layer's requests for one sequence's pages.

    Args:
        recorder: counts what they would have hit, and says when they are asked.
        layer_idx: for the record.
        budget, slots: pages that they hold.
    """

    def __init__(self, recorder: Recorder, layer_idx: int, budget: int, slots: int):
        self._recorder, self._layer_idx = recorder, layer_idx
        self._shadows = ShadowLRU(budget), ShadowLRU(slots)
        self._most_pages = 0

    @property
    def holds_all(self) -> bool:
        """Whether plain LRU is sure to hold every page: it has never had more than it has room for."""
        return self._most_pages <= self._shadows[0].capacity

    def opened(self, page: int, pinned: Collection[int]) -> None:
        """Computation has begun to write a page."""
        self._most_pages = max(self._most_pages, page + 1)
        self._recorder.count_later(self._layer_idx, partial(self._insert, page, pinned), REQUEST_BYTES)

    def asked(
        self, pages: Sequence[int], pinned: Collection[int], resident_first: bool, hits: Collection[int] = ()
    ) -> Asked:
        """A request; see `Asked`. Where its hits are known, a range of pages takes no memory until it is counted."""
        n_bytes = REQUEST_BYTES + (0 if hits and isinstance(pages, range) else PAGE_BYTES * len(pages))
        asked = Asked((pages, pinned, resident_first), self._shadows, hits)
        self._recorder.count_later(self._layer_idx, asked.answer, n_bytes)
        return asked

    def answer(self, pages: Sequence[int], pinned: Collection[int], hits: Sequence[int]) -> dict[str, int]:
        """Ask now; the counts of it. For who counts later himself, see `Recorder.count_later`."""
        return Asked((pages, pinned, True), self._shadows, hits).answer()

    def truncate(self, n_pages: int) -> None:
        """The context was cropped: forget all pages but the first `n_pages`."""
        self._recorder.catch_up()
        for shadow in self._shadows:
            shadow.truncate(n_pages)

    def clear(self) -> None:
        """Forget every page."""
        self.truncate(0)
        self._most_pages = 0

    def copy(self) -> Yardstick:
        """One in the same state that goes its own way from here."""
        self._recorder.catch_up()
        twin = copy(self)
        twin._shadows = tuple(shadow.copy() for shadow in self._shadows)
        return twin

    def _insert(self, page: int, pinned: Collection[int]) -> dict[str, int]:
        for shadow in self._shadows:
            shadow.insert(page, pinned)
        return {}
