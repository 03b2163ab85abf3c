"""From experiments to single runs: `RunSpec`, the order of the runs, and the clamp to a model's positions.

The one idea: a run is described completely by one frozen value. Nothing that decides its outcome stands
elsewhere, so the hash of that value (`run_id`) names the run: the same spec gives the same id on any machine,
and a result found on disk can be matched with the run that would make it.

Runs are interleaved. Machines drift (heat, other load), and if all baseline runs came first the drift would
be taken for a difference between modes. So each repetition goes through every experiment before the next
repetition begins.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

GRANULARITIES = ("layer", "kv_head")
ACCESS_ORDERS = ("resident_first", "position")


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
        for name, known in (("granularity", GRANULARITIES), ("access_order", ACCESS_ORDERS)):
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
    def exact(self) -> bool:
        """Whether decode steps attend to every page."""
        return is_exact(self.selector)

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
    if paging.disk_dir is not None and paging.host_pages is None:
        yield (("disk_dir", "host_pages"), "'disk_dir' has no effect without host_pages, the pages to keep in memory")


@dataclass(frozen=True)
class PrefetchSpec:
    """What is predicted, and how many pages are copied ahead of need per layer and step."""

    predictor: str | dict[str, Any]
    prefetch_k: int


@dataclass(frozen=True)
class RunSpec:
    """One fully expanded run.

    `context_length` is the prompt's length in tokens; `requested_context_length` is what the config asked
    for, which is larger when the model has too few positions. `repetition` counts from 0.
    `cache_implementation` is None unless the mode is baseline; `paging` and `prefetch` are None where the
    mode has none.
    """

    mode: str
    name: str
    model_name: str
    context_length: int
    requested_context_length: int
    repetition: int
    seed: int
    max_new_tokens: int
    batch_size: int
    do_sample: bool
    temperature: float
    top_p: float
    top_k: int
    stop_at_eos: bool
    dtype: str
    device: str
    device_map: str | None
    quantization: str | None
    trust_remote_code: bool
    warmup_runs: int
    prefill_chunk_size: int | None
    cache_implementation: str | None = None
    paging: Paging | None = None
    prefetch: PrefetchSpec | None = None
    prompt_sha256: str | None = None

    def __hash__(self) -> int:
        """By `run_id`, because a mapping among the parameters has no hash of its own."""
        return hash(self.run_id)

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values for JSON; a fresh copy."""
        return dataclasses.asdict(self)

    @property
    def run_id(self) -> str:
        """12 hex digits of the SHA-256 of the spec's canonical JSON (keys sorted, no spaces)."""
        canonical = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:12]

    @property
    def label(self) -> str:
        """What tables and plots call the experiment."""
        return self.name

    @property
    def slug(self) -> str:
        """A file name without suffix: the mode first, then what it is, and unique by its last part."""
        words = [
            self.mode,
            *([self.name] if self.name != self.mode else []),
            self.model_name.rpartition("/")[2],
        ]
        plain = [re.sub(r"[^A-Za-z0-9.-]+", "-", word).strip("-.")[:40] for word in words]
        readable = "_".join(word for word in plain if word)
        return f"{readable}_ctx{self.context_length}_run{self.repetition}_{self.run_id}"

    @property
    def model_key(self) -> tuple:
        """The fields that decide how the model is loaded: runs that share them can share one loaded model."""
        return tuple(self.model_options.values())

    @property
    def model_options(self) -> dict[str, Any]:
        """The arguments of `models.load_model` for this run."""
        names = ("model_name", "dtype", "device", "device_map", "quantization", "trust_remote_code")
        return {name: getattr(self, name) for name in names}

    @property
    def reference_key(self) -> tuple:
        """The fields that decide the tokens: an exact run must match the baseline run that has the same key.

        Left out on purpose: mode, paging and prefetch (they must not matter), `repetition` (greedy
        repetitions are identical, and sampled ones differ in `seed`) and `prefill_chunk_size` (it changes the
        order of work, not its result). `cache_implementation` is left out too, for only a baseline has one:
        of the baselines that share a key, compare with the one that `is_reference`.
        """
        return (
            *self.model_key,
            self.context_length,
            self.batch_size,
            self.seed,
            self.max_new_tokens,
            self.do_sample,
            self.temperature,
            self.top_p,
            self.top_k,
            self.stop_at_eos,
            self.prompt_sha256,
        )

    @property
    def exact(self) -> bool:
        """Whether the run claims the tokens of plain generation: neither its cache nor its attention leaves anything
        out."""
        return self.cache_implementation != "quantized" and (self.paging is None or self.paging.exact)

    @property
    def is_reference(self) -> bool:
        """Whether runs with the same `reference_key` may be compared with this one: plain HF generation.

        A baseline with a quantized cache has the key of an exact one, but its tokens may differ. `offloaded`
        and `static` should give the same tokens; a comparison shows whether they do, so they are none either.
        """
        return self.mode == "baseline" and self.cache_implementation == "dynamic"


class Expandable(Protocol):
    """What `expand` needs of an experiment, besides the fields that have the same name in `RunSpec`."""

    mode: str
    context_lengths: list[int]
    num_runs: int
    seed: int
    do_sample: bool

    def cache_fields(self) -> dict[str, Any]:
        """The fields of `RunSpec` that belong to the mode: `cache_implementation`, `paging`, `prefetch`."""


_SHARED_FIELDS = (
    "mode",
    "name",
    "model_name",
    "max_new_tokens",
    "batch_size",
    "do_sample",
    "temperature",
    "top_p",
    "top_k",
    "stop_at_eos",
    "dtype",
    "device",
    "device_map",
    "quantization",
    "trust_remote_code",
    "warmup_runs",
    "prefill_chunk_size",
)


def expand(experiments: Iterable[Expandable], seed: int | None = None) -> list[RunSpec]:
    """Every run of a list of experiments, in the order in which they are to be made.

    Experiments that load the same model the same way form a group, in order of appearance. Within a group:
    for each context length, for each repetition, for each experiment: references first, so that the others
    find what to compare with, then the other baselines.

    Args:
        experiments: validated experiments.
        seed: replaces the seed of every experiment.
    """
    groups: dict[tuple, list[list[RunSpec]]] = {}
    for experiment in experiments:
        runs = list(_runs_of(experiment, experiment.seed if seed is None else seed))
        groups.setdefault(runs[0].model_key, []).append(runs)
    return [run for group in groups.values() for run in _interleaved(group)]


def _runs_of(experiment: Expandable, seed: int) -> Iterator[RunSpec]:
    shared = {key: getattr(experiment, key) for key in _SHARED_FIELDS} | experiment.cache_fields()
    for context_length in experiment.context_lengths:
        for repetition in range(experiment.num_runs):
            yield RunSpec(
                **shared,
                context_length=context_length,
                requested_context_length=context_length,
                repetition=repetition,
                seed=seed + repetition if experiment.do_sample else seed,
            )


def _interleaved(group: list[list[RunSpec]]) -> list[RunSpec]:
    """The runs of one group, by context length (in order of appearance), repetition, and experiment."""
    runs = [run for experiment_runs in group for run in experiment_runs]
    rank = {length: rank for rank, length in enumerate(dict.fromkeys(run.context_length for run in runs))}

    def turn(run: RunSpec) -> tuple:
        return rank[run.context_length], run.repetition, not run.is_reference, run.mode != "baseline"

    return sorted(runs, key=turn)


def clamp(spec: RunSpec, max_positions: int | None) -> RunSpec:
    """The same run with its context cut to what fits a model of `max_positions` positions (None: no limit).

    `requested_context_length` stays, so a result shows that it was clamped.

    Raises:
        ValueError: not even a prompt of one token leaves room for the new tokens.
    """
    if max_positions is None or spec.context_length + spec.max_new_tokens <= max_positions:
        return spec
    context_length = max_positions - spec.max_new_tokens
    if context_length < 1:
        raise ValueError(
            f"{spec.model_name} has {max_positions} positions, which leaves no room for a prompt before"
            f" {spec.max_new_tokens} new tokens; lower max_new_tokens to at most {max_positions - 1}"
        )
    return dataclasses.replace(spec, context_length=context_length)
