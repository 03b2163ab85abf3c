"""Replacement policies: which resident page makes room for another.

A policy knows page ids and nothing else: no tensors, no slots, no clock. It is a small table of verbs (after
libCacheSim's eviction interface), and the page table calls them:

    insert(page)            the page became resident
    touch(page)             the page, already resident, was asked for
    victim(pinned) -> page  the page to evict next, never one of `pinned`; nothing is removed yet
    remove(page)            the page is no longer resident: evicted, if `victim` has just named it; else dropped,
                            because the context was cropped or cleared

A policy does not know how many pages fit. It need not: it is asked for a victim when there is no room, so what is
resident then is what fits.

Pinning only forbids to name a page. A pinned page keeps its place and its marks, and is judged by them once unpinned.

One instance serves one layer of one sequence.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from fading import require_smoothing


class NothingToEvict(RuntimeError):
    """Every resident page is pinned."""


class ReplacementPolicy(Protocol):
    """The verbs of a policy; see the module's docstring.

    Some names are optional. A policy that ranks pages by the attention they get declares the class attribute
    `needs_mass = True`, and only then is its fifth verb called, at the end of each step:

        observe(masses)         page -> share of the step's attention, of the pages that were attended to

    And a policy that remembers pages which are not resident may have

        truncate(n_pages)       the context was cropped: forget the pages from number `n_pages` on; those among them
                                that were resident have been removed

    A policy that is equal (`==`) to another just when both know the same declares `comparable = True` in its own class;
    then layers that ask alike decide once (lockstep.py), unless it `needs_mass`.

    The same pages touched in the same order again and again are what exact attention asks for in every step; see
    `idempotent`.
    """

    def insert(self, page: int) -> None: ...
    def touch(self, page: int) -> None: ...
    def victim(self, pinned: Collection[int]) -> int: ...
    def remove(self, page: int) -> None: ...


def idempotent(touch: Callable[[Any, int], None]) -> Callable[[Any, int], None]:
    """Marks a `touch` by which the same pages, touched again in the same order with nothing in between, change nothing.

    Such a policy need not be told that a step asked for just what the step before it did. The mark is on the method, so
    a policy that derives from one of these and touches in its own way is told.
    """
    touch.idempotent = True
    return touch


def _first_unpinned(pages: Iterable[int], pinned: Collection[int]) -> int:
    for page in pages:
        if page not in pinned:
            return page
    raise NothingToEvict("every resident page is pinned")


def _least_unpinned(pages: Iterable[int], pinned: Collection[int], value: Callable[[int], float]) -> int:
    """The page of least value, the first of them if there are several."""
    candidates = [page for page in pages if page not in pinned]
    if not candidates:
        raise NothingToEvict("every resident page is pinned")
    return min(candidates, key=value)


@dataclass(frozen=True)
class LRU:
    """Least recently used: evict the page that was asked for longest ago."""

    comparable: ClassVar[bool] = True

    _order: OrderedDict[int, None] = field(default_factory=OrderedDict, init=False, repr=False)

    def insert(self, page: int) -> None:
        self._order[page] = None

    @idempotent
    def touch(self, page: int) -> None:
        self._order.move_to_end(page)

    def victim(self, pinned: Collection[int]) -> int:
        return _first_unpinned(self._order, pinned)

    def remove(self, page: int) -> None:
        del self._order[page]


@dataclass(frozen=True)
class MRU(LRU):
    """Most recently used: evict the page asked for last; best for a cyclic scan longer than the cache."""

    comparable: ClassVar[bool] = True

    def victim(self, pinned: Collection[int]) -> int:
        return _first_unpinned(reversed(self._order), pinned)


@dataclass(frozen=True)
class FIFO(LRU):
    """First in, first out: evict the page that became resident longest ago, however often it is asked for."""

    comparable: ClassVar[bool] = True

    @idempotent
    def touch(self, page: int) -> None:
        pass


@dataclass(frozen=True)
class LFU:
    """Least frequently used: evict the page asked for least often since it became resident.

    Among equals the least recently used goes first, and a page that comes back starts again from one, both as in
    libCacheSim. Keeping pages in one list per count would find the victim without a search (Mitra et al. 2010,
    https://arxiv.org/abs/2110.11602); one pass over what is resident is shorter, and small beside the copy it precedes.
    """

    comparable: ClassVar[bool] = True

    _uses: OrderedDict[int, int] = field(default_factory=OrderedDict, init=False, repr=False)

    def insert(self, page: int) -> None:
        self._uses[page] = 1

    def touch(self, page: int) -> None:
        self._uses[page] += 1
        self._uses.move_to_end(page)

    def victim(self, pinned: Collection[int]) -> int:
        return _least_unpinned(self._uses, pinned, self._uses.__getitem__)

    def remove(self, page: int) -> None:
        del self._uses[page]


@dataclass(frozen=True)
class Clock:
    """CLOCK, or second chance: evict the first page round the clock that was not asked for since the hand last passed.

    The pages stand in a circle, each with a reference bit that `touch` sets. The hand goes round, clears the bits that
    are set and stops at the first that is not. It passes a pinned page and leaves its bit. A new page is put just
    behind the hand, with its bit clear. So LRU is approximated by one bit per page.

    Corbato 1968, A Paging Experiment with the Multics System, https://apps.dtic.mil/sti/citations/AD0687552
    """

    comparable: ClassVar[bool] = True

    # The first entry is the page under the hand, the last one that just behind it: moving an entry from the front to
    # the end is moving the hand by one.
    _referenced: OrderedDict[int, bool] = field(default_factory=OrderedDict, init=False, repr=False)

    def insert(self, page: int) -> None:
        self._referenced[page] = False

    @idempotent
    def touch(self, page: int) -> None:
        self._referenced[page] = True

    def victim(self, pinned: Collection[int]) -> int:
        _first_unpinned(self._referenced, pinned)  # with nothing to stop at, the hand would go round for ever
        while True:
            page = next(iter(self._referenced))
            if page not in pinned:
                if not self._referenced[page]:
                    return page
                self._referenced[page] = False
            self._referenced.move_to_end(page)

    def remove(self, page: int) -> None:
        del self._referenced[page]


@dataclass
class S3FIFO:
    """S3-FIFO: a small queue lets most pages go early, and the main queue keeps those asked for again.

    A new page enters the small queue. At its end, a page asked for twice or more moves to the main queue; any other is
    evicted, and its id kept for a while in the ghost queue, which holds ids only. A page that comes back while its id
    is there enters the main queue at once. The main queue is a CLOCK whose bits count to three.

    Yang et al., FIFO Queues are All You Need for Cache Eviction, SOSP 2023,
    https://dl.acm.org/doi/10.1145/3600006.3613147

    The paper's queues are shares of the cache's capacity. Here they are shares of the pages resident when a victim is
    asked for, rounded: the small queue's, at least one page, is the length from which it has to give; the main queue's
    bounds the ghosts. And here one call evicts one page, where the paper's evicts from both queues if a page that moves
    finds the main queue full; here the main queue then gives it, and the small one nothing.

    A pinned page stays at its queue's end and the next one is looked at, but it does move to the main queue when it has
    earned that; else the pages that are always pinned would fill the small queue. A dropped page leaves no ghost, and
    with the last page of a context that is dropped all ghosts go.

    Args:
        small_fraction: the small queue's share of the resident pages, between 0 and 1.
    """

    comparable: ClassVar[bool] = True
    MOST_USES: ClassVar[int] = 3
    USES_TO_MOVE: ClassVar[int] = 2

    small_fraction: float = 0.1
    _uses: dict[int, int] = field(default_factory=dict, init=False, repr=False)
    _small: OrderedDict[int, None] = field(default_factory=OrderedDict, init=False, repr=False)
    _main: OrderedDict[int, None] = field(default_factory=OrderedDict, init=False, repr=False)
    _ghosts: OrderedDict[int, None] = field(default_factory=OrderedDict, init=False, repr=False)
    _named: int | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 < self.small_fraction < 1:
            raise ValueError(f"small_fraction lies between 0 and 1, both excluded; it is {self.small_fraction}")

    def insert(self, page: int) -> None:
        self._uses[page] = 0
        if page in self._ghosts:
            del self._ghosts[page]
            self._main[page] = None
        else:
            self._small[page] = None

    def touch(self, page: int) -> None:
        self._uses[page] = min(self._uses[page] + 1, self.MOST_USES)

    def victim(self, pinned: Collection[int]) -> int:
        _first_unpinned(self._uses, pinned)  # before anything moves
        victim = self._leave_small(pinned)
        self._named = self._leave_main(pinned) if victim is None else victim
        return self._named

    def truncate(self, n_pages: int) -> None:
        for page in [page for page in self._ghosts if page >= n_pages]:
            del self._ghosts[page]

    def remove(self, page: int) -> None:
        was_named, self._named = page == self._named, None
        main_share = len(self._uses) - self._small_share()
        del self._uses[page]
        if page in self._main:
            del self._main[page]
        else:
            del self._small[page]
            if was_named:
                self._ghosts[page] = None
                while len(self._ghosts) > main_share:
                    self._ghosts.popitem(last=False)
        if not self._uses and not was_named:
            self._ghosts.clear()

    def _small_share(self) -> int:
        return max(1, round(self.small_fraction * len(self._uses)))

    def _leave_small(self, pinned: Collection[int]) -> int | None:
        """The page the small queue gives, or None if the main queue has to; moves the pages that have earned it."""
        share = self._small_share()
        main_can_give = any(page not in pinned for page in self._main)
        for page in list(self._small):
            if len(self._small) < share and main_can_give:
                return None
            if self._uses[page] >= self.USES_TO_MOVE:
                del self._small[page]
                self._main[page] = None
                self._uses[page] = 0
                main_can_give = main_can_give or page not in pinned
            elif page not in pinned:
                return page
        return None

    def _leave_main(self, pinned: Collection[int]) -> int:
        """The first page of the main queue with no uses left; each one passed goes to the back with one use less."""
        while True:
            for page in list(self._main):
                if page in pinned:
                    continue
                if self._uses[page] == 0:
                    return page
                self._uses[page] -= 1
                self._main.move_to_end(page)


@dataclass
class AttentionMass:
    """Least attention: evict the page with the lowest share of attention, smoothed over the steps.

    The weights that attention gives say which pages matter, and a few matter at every step: the heavy hitters of H2O
    (Zhang et al., NeurIPS 2023, https://arxiv.org/abs/2306.14048). There the shares are summed and what is evicted is
    lost; here they fade, and what is evicted can come back. After each step a page's mass becomes

        smoothing * mass + (1 - smoothing) * share of this step's attention

    where a resident page that was not attended to had a share of 0. The mass of an absent page stays as it was, unless
    the page was attended to in that step, so that a page that comes back is not taken for new. The first share that is
    seen of a page is its mass. Until then nothing speaks against it, and it outranks all that have one. Equals go by
    LRU. One float is kept per page of the context; a dropped page's is forgotten, and with the last page of a context
    that is dropped all are.

    Args:
        smoothing: how much of the past is kept at each step, 0 <= smoothing < 1; at 0 only the last step counts.
    """

    needs_mass: ClassVar[bool] = True

    smoothing: float = 0.9
    _order: OrderedDict[int, None] = field(default_factory=OrderedDict, init=False, repr=False)
    _mass: dict[int, float] = field(default_factory=dict, init=False, repr=False)
    _named: int | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        require_smoothing(self.smoothing)

    def insert(self, page: int) -> None:
        self._order[page] = None

    @idempotent
    def touch(self, page: int) -> None:
        self._order.move_to_end(page)

    def observe(self, masses: Mapping[int, float]) -> None:
        """Take in the step that just ended: page -> its share of the attention, of the pages attended to."""
        kept, learnt = self.smoothing, 1 - self.smoothing
        for page in self._order.keys() | masses.keys():
            share = masses.get(page, 0.0)
            self._mass[page] = kept * self._mass.get(page, share) + learnt * share

    def victim(self, pinned: Collection[int]) -> int:
        self._named = _least_unpinned(self._order, pinned, lambda page: self._mass.get(page, math.inf))
        return self._named

    def truncate(self, n_pages: int) -> None:
        for page in [page for page in self._mass if page >= n_pages]:
            del self._mass[page]

    def remove(self, page: int) -> None:
        was_named, self._named = page == self._named, None
        del self._order[page]
        if not was_named:
            self._mass.pop(page, None)
            if not self._order:
                self._mass.clear()
