"""Each classic policy misses exactly as often as libCacheSim's, the simulator that cache papers are checked with.

libCacheSim (https://github.com/1a1a11a/libCacheSim) is its own implementation in C, so what agrees with it is what the
name means elsewhere. Every object has size 1, so its capacity in bytes is a number of pages.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from test_page_policies import n_hits

from registry import POLICIES

libcachesim = pytest.importorskip(
    "libcachesim",
    reason="libcachesim is not installed; its wheels are for Linux on x86-64 with glibc 2.34 or later",
)

N_PAGES = 200
CAPACITIES = (1, 2, 7, 20, 50, 100, 199)


def zipf(seed: int) -> list[int]:
    """A few pages often, most of them seldom."""
    return random.Random(seed).choices(range(N_PAGES), [1 / rank for rank in range(1, N_PAGES + 1)], k=5000)


def uniform(seed: int) -> list[int]:
    return random.Random(seed).choices(range(N_PAGES), k=5000)


def scans_among_zipf(seed: int) -> list[int]:
    """Hot pages, and now and then a run over pages in order that are not hot."""
    chance = random.Random(seed)
    accesses = []
    for hot in zipf(seed):
        accesses.append(hot)
        if chance.random() < 0.02:
            first = chance.randrange(N_PAGES)
            accesses += range(first, min(N_PAGES, first + 40))
    return accesses


STREAMS = {
    "zipf 1": zipf(1),
    "zipf 2": zipf(2),
    "uniform": uniform(3),
    "one scan": list(range(N_PAGES)),
    "loop": list(range(60)) * 20,
    "there and back": [*range(N_PAGES), *reversed(range(N_PAGES))] * 5,
    "scans among zipf": scans_among_zipf(4),
}


def clock(**settings: int):
    return libcachesim.Clock(**settings, init_freq=0, n_bit_counter=1)  # one reference bit, clear in a new page


THEIRS = {"lru": libcachesim.LRU, "fifo": libcachesim.FIFO, "lfu": libcachesim.LFU, "clock": clock}


def n_misses_of_libcachesim(make: Callable, accesses: list[int], capacity: int) -> int:
    cache = make(cache_size=capacity, hashpower=10)  # the default of 24 allocates a table of 128 MiB
    return sum(not cache.get(libcachesim.Request(obj_id=page, obj_size=1)) for page in accesses)


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("name", THEIRS)
def test_a_policy_misses_as_often_as_libcachesims(name, stream):
    accesses = STREAMS[stream]
    ours = {size: len(accesses) - n_hits(POLICIES.create(name), accesses, size) for size in CAPACITIES}
    assert ours == {size: n_misses_of_libcachesim(THEIRS[name], accesses, size) for size in CAPACITIES}


def test_the_streams_tell_the_policies_apart():
    for stream in ("zipf 1", "scans among zipf"):
        misses = {name: n_misses_of_libcachesim(make, STREAMS[stream], 20) for name, make in THEIRS.items()}
        assert len(set(misses.values())) == len(THEIRS), f"{stream}: {misses}"
