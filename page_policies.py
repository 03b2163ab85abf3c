"""Replacement policies: which resident page makes room for another.

A policy knows page ids and nothing else: no tensors, no slots, no clock. It is a small table of verbs (after
libCacheSim's eviction interface), and the page table calls them:

    insert(page)            the page became resident
    touch(page)             the page, already resident, was asked for
    victim(pinned) -> page  the page to evict next, never one of `pinned`; nothing is removed yet
    remove(page)            the page is no longer resident

One instance serves one layer of one sequence.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Protocol


class NothingToEvict(RuntimeError):
    """Every resident page is pinned."""


class ReplacementPolicy(Protocol):
    """The verbs of a policy; see the module's docstring."""

    def insert(self, page: int) -> None: ...
    def touch(self, page: int) -> None: ...
    def victim(self, pinned: Collection[int]) -> int: ...
    def remove(self, page: int) -> None: ...


def _first_unpinned(pages: Iterable[int], pinned: Collection[int]) -> int:
    for page in pages:
        if page not in pinned:
            return page
    raise NothingToEvict("every resident page is pinned")


@dataclass(frozen=True)
class LRU:
    """Least recently used: evict the page that was asked for longest ago."""

    _order: OrderedDict[int, None] = field(default_factory=OrderedDict, init=False, repr=False)

    def insert(self, page: int) -> None:
        self._order[page] = None

    def touch(self, page: int) -> None:
        self._order.move_to_end(page)

    def victim(self, pinned: Collection[int]) -> int:
        return _first_unpinned(self._order, pinned)

    def remove(self, page: int) -> None:
        del self._order[page]


@dataclass(frozen=True)
class MRU(LRU):
    """Most recently used: evict the page asked for last; best for a cyclic scan longer than the cache."""

    def victim(self, pinned: Collection[int]) -> int:
        return _first_unpinned(reversed(self._order), pinned)


@dataclass(frozen=True)
class FIFO(LRU):
    """First in, first out: evict the page that became resident longest ago, however often it is asked for."""

    def touch(self, page: int) -> None:
        pass
