"""The settings of a paged cache, and of copying ahead: what they mean, and which contradict each other.

The same frozen values serve a run of an experiment list and a cache made by hand, and both are judged by the same
rules: a value that is wrong by itself is refused as it is made, and settings that are right alone and wrong together
are found by `paging_conflicts` and `prefetch_conflicts`, which name the key to blame.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

GRANULARITIES = ("layer", "kv_head")
ACCESS_ORDERS = ("resident_first", "position")
ON_MISS = ("wait", "skip")
PAGE_TABLES = ("host", "device")
ADAPTIVE = "adaptive"


@dataclass(frozen=True)
class Paging:
    """How a KV cache is paged. Page counts are per layer and per sequence.

    Attributes:
        page_size: positions in a page.
        max_gpu_pages: most pages that are resident on the device.
        staging_pages: slots on top of that, for pages on their way.
        policy: a registered name, `"module:Class"`, or a mapping with `name` and parameters; `selector` likewise.
        selector: which pages a decode step attends to; `all` is exact, any other needs one of the next two.
        attention_pages, attention_fraction: how many pages that is, or which share of the context's pages (rounded
            up); the pages that are always resident are among them.
        granularity: `"layer"`, all heads attend to the same pages, or `"kv_head"`, each key/value head chooses its own.
        dense_layers: first layers of the model that attend to every page nevertheless.
        sink_pages, recent_pages: first and last pages that are always resident; the open page is the most recent.
        access_order: `"resident_first"`, all wanted pages are asked for as a set; or `"position"`, one by one.
        on_miss: `"wait"` for a page that is not on the device; or `"skip"` it in this step and have it copied for a
            later one, as far as slots are free; an approximation in which a decode step waits for no page.
        page_table: `"host"`, which asks the device in every layer what was chosen; or `"device"`, where the host waits
            for nothing (see device_page_table.py).
        host_pages: pages kept in host memory, times the rows of the first batch; later ones go to a file on disk.
            None for all in memory.
        disk_dir: folder of that file; None for the system's temporary folder.
        link: a name, or a mapping with `bandwidth_gb_s` and `latency_us`; see links.py.
        record_pages: keep which pages each layer asked for at each step, beside the counts.
        record_timeline: keep when attention, waits and copies of decode steps happened; see timeline.py.

    Mappings stay plain dicts, fit for `Registry.create` and JSON; nobody changes one.

    Raises:
        ValueError: a count is out of range, or two settings contradict each other; see `paging_conflicts`.
    """

    page_size: int = 256
    max_gpu_pages: int = 8
    staging_pages: int = 6
    policy: str | Mapping[str, Any] = "lru"
    selector: str | Mapping[str, Any] = "all"
    attention_pages: int | None = None
    attention_fraction: float | None = None
    granularity: str = "layer"
    dense_layers: int = 0
    sink_pages: int = 1
    recent_pages: int = 1
    access_order: str = "resident_first"
    on_miss: str = "wait"
    page_table: str = "host"
    host_pages: int | None = None
    disk_dir: str | None = None
    link: str | Mapping[str, Any] = "auto"
    record_pages: bool = False
    record_timeline: bool = False

    def __post_init__(self):
        for name in ("page_size", "max_gpu_pages", "staging_pages", "recent_pages"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("sink_pages", "dense_layers", "host_pages"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} must be at least 0, not {getattr(self, name)}")
        for name in ("policy", "selector"):
            if not isinstance(getattr(self, name), str | Mapping):
                raise ValueError(f"{name} must be a name or a mapping with 'name', not {getattr(self, name)!r}")
        choices = {
            "granularity": GRANULARITIES,
            "access_order": ACCESS_ORDERS,
            "on_miss": ON_MISS,
            "page_table": PAGE_TABLES,
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be {' or '.join(known)}, not {getattr(self, name)!r}")
        if self.attention_fraction is not None and not 0 < self.attention_fraction <= 1:
            raise ValueError(f"attention_fraction must be above 0 and at most 1, not {self.attention_fraction}")
        _, conflict = next(paging_conflicts(self), (None, None))
        if conflict is not None:
            raise ValueError(conflict)

    @property
    def slots(self) -> int:
        """Device slots of one layer of one sequence."""
        return self.max_gpu_pages + self.staging_pages

    @property
    def selects(self) -> bool:
        """Whether a selector leaves pages out."""
        return not is_exact(self.selector)

    @property
    def exact(self) -> bool:
        """Whether decode steps attend to every page."""
        return not self.selects and self.on_miss == "wait"

    def n_attended(self, n_pages: int) -> int:
        """How many pages a decode step attends to, of a context of `n_pages`."""
        if self.attention_pages is not None:
            return min(self.attention_pages, n_pages)
        if self.attention_fraction is None:
            return n_pages
        return min(
            n_pages, max(math.ceil(round(self.attention_fraction * n_pages, 9)), self.sink_pages + self.recent_pages)
        )


def is_exact(selector: str | Mapping[str, Any]) -> bool:
    """Whether a choice of selector is `all`."""
    return selector == "all" or selector == {"name": "all"}


def paging_conflicts(paging: Any) -> Iterator[tuple[tuple[str, ...], str]]:
    """Settings that are right alone and wrong together: `(keys, text)`, the key to blame first.

    Args:
        paging: anything with the attributes of `Paging`.
    """
    pinned = paging.sink_pages + paging.recent_pages
    if paging.max_gpu_pages < pinned + 1:
        yield (
            ("max_gpu_pages", "sink_pages", "recent_pages"),
            f"max_gpu_pages is {paging.max_gpu_pages}, but sink_pages {paging.sink_pages} + recent_pages"
            f" {paging.recent_pages} + 1 to work with need at least {pinned + 1}",
        )
    if is_exact(paging.selector):
        for key, unset in (
            ("attention_pages", None),
            ("attention_fraction", None),
            ("granularity", "layer"),
            ("dense_layers", 0),
        ):
            if getattr(paging, key) != unset:
                yield (
                    (key, "selector"),
                    f"{key!r} has no effect with 'selector: all', which attends to every page; choose a selector such"
                    " as quest, or remove it",
                )
    elif paging.attention_pages is None and paging.attention_fraction is None:
        yield (
            ("selector", "attention_pages", "attention_fraction"),
            "this selector needs to know how many pages to attend to; add attention_pages (a count) or"
            " attention_fraction (a share, such as 0.25)",
        )
    elif paging.attention_pages is not None and paging.attention_fraction is not None:
        yield (
            ("attention_pages", "attention_fraction"),
            "attention_pages and attention_fraction both say how many pages to attend to; keep one",
        )
    elif paging.attention_pages is not None and paging.attention_pages < pinned:
        yield (
            ("attention_pages", "sink_pages", "recent_pages"),
            f"attention_pages is {paging.attention_pages}, but sink_pages {paging.sink_pages} + recent_pages"
            f" {paging.recent_pages} are always attended to; it must be at least {pinned}",
        )
    if paging.on_miss == "skip" and paging.access_order == "position":
        yield (
            ("on_miss", "access_order"),
            "'on_miss: skip' leaves out what is not there as a step asks for its pages as a set; with 'access_order:"
            " position' it asks one by one, so remove one of the two",
        )
    if paging.page_table == "device":
        yield from _device_table_conflicts(paging)
    if paging.disk_dir is not None and paging.host_pages is None:
        yield (("disk_dir", "host_pages"), "'disk_dir' has no effect without host_pages, the pages to keep in memory")


def _device_table_conflicts(paging: Any) -> Iterator[tuple[tuple[str, ...], str]]:
    if is_exact(paging.selector):
        yield (
            ("page_table", "selector"),
            "'page_table: device' spares the host from waiting for what a selector chose, and 'selector: all' chooses"
            " nothing; choose a selector such as quest, or set 'page_table: host'",
        )
    policy = paging.policy if isinstance(paging.policy, str) else paging.policy.get("name")
    if policy != "lru":
        yield (
            ("page_table", "policy"),
            f"'page_table: device' evicts by LRU, on the device; set 'policy: lru', or 'page_table: host' for {policy}",
        )
    for key, needed, why in (
        ("granularity", "layer", "all heads attend to the same pages"),
        ("access_order", "resident_first", "pages are asked for as a set"),
        ("on_miss", "wait", "no page that is missing is left out"),
        ("host_pages", None, "kernels read pages from host memory, and not from disk"),
        ("record_pages", False, "the host does not know in a step which pages are asked for"),
    ):
        if getattr(paging, key) != needed:
            yield (
                ("page_table", key),
                f"with 'page_table: device' {why}; remove {key!r}, or set 'page_table: host'",
            )
    if paging.attention_pages is not None and paging.attention_pages > paging.max_gpu_pages:
        yield (
            ("page_table", "attention_pages", "max_gpu_pages"),
            f"with 'page_table: device' all pages that a step attends to are on the device at once; attention_pages is"
            f" {paging.attention_pages}, so max_gpu_pages has to be as many at least, not {paging.max_gpu_pages}",
        )


@dataclass(frozen=True)
class PrefetchSpec:
    """What is copied ahead of need.

    Attributes:
        predictor: a registered name, `"module:Class"`, or a mapping with `name` and parameters.
        prefetch_k: most pages to start copying ahead for one layer of one sequence at a time.
        overfetch: how far down the ranking to look for them, as a multiple of the pages that the layer asked for last;
            None for all of it. Its first pages are on the device already, as a rule.
        lookahead: how many layers ahead. Further ahead there is more time to copy, and less is known.
        min_confidence: the least confidence of a guess that is worth a copy; `"adaptive"` follows how often guesses of
            that confidence have come true and how busy the link is (see prefetch_threshold.py).
        prefetch_evicts: whether a page that is resident and not guessed may be evicted for one that is, where no slot
            is free.

    Raises:
        ValueError: a number is out of range.
    """

    predictor: str | Mapping[str, Any] = "ranked"
    prefetch_k: int = 4
    overfetch: float | None = 2.0
    lookahead: int = 1
    min_confidence: float | str = ADAPTIVE
    prefetch_evicts: bool = False

    def __post_init__(self):
        for name in ("prefetch_k", "lookahead"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.overfetch is not None and not self.overfetch >= 1:
            raise ValueError(f"overfetch must be at least 1, not {self.overfetch}")
        given = self.min_confidence
        if given != ADAPTIVE and not (isinstance(given, int | float) and 0 <= given <= 1):
            raise ValueError(f"min_confidence must be a number from 0 to 1 or {ADAPTIVE!r}, not {given!r}")


def prefetch_conflicts(prefetch: Any, paging: Any, needs: Collection[str]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Settings that are right alone and wrong together, as `paging_conflicts` gives them.

    Args:
        prefetch: anything with the attributes of `PrefetchSpec`.
        paging: anything with the attributes of `Paging`.
        needs: what the predictor cannot do without, of `"needs_scores"` and `"needs_recording"`.
    """
    if prefetch.prefetch_k > paging.staging_pages:
        yield (
            ("prefetch_k", "staging_pages"),
            f"prefetch_k is {prefetch.prefetch_k}, but staging_pages gives only {paging.staging_pages} slots"
            f" for pages on their way; set staging_pages to at least {prefetch.prefetch_k}, or prefetch_k"
            f" to at most {paging.staging_pages}",
        )
    if paging.page_table == "device":
        yield (
            ("page_table", "predictor"),
            "with 'page_table: device' the host does not know which pages are there, so it cannot copy others ahead;"
            " set 'page_table: host', or 'mode: reactive'",
        )
    if "needs_recording" in needs and paging.on_miss == "skip":
        yield (
            ("predictor", "on_miss"),
            "this predictor knows a recording of the same generation, and with 'on_miss: skip' no generation is the"
            " same as another: what is skipped depends on when pages arrive; remove one of the two",
        )
    if "needs_scores" in needs and is_exact(paging.selector):
        yield (
            ("predictor", "selector"),
            "this predictor judges pages by the selector's digests of them, and 'selector: all' makes none; choose a"
            " selector such as quest, or a predictor such as layer_ahead",
        )
