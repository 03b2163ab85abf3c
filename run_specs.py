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
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from cache_settings import Paging, PrefetchSpec

LEAST_FIDELITY_TOKENS = 32  # of an approximate run, where nobody says otherwise


@dataclass(frozen=True)
class QualitySpec:
    """What is measured of a run beside its speed; see quality.py.

    Attributes:
        fidelity_tokens: tokens of text read after the prompt, to compare what the model says with the baseline; 0 for
            none.
        tasks: registered names, `"module:Class"`, or mappings with `name` and parameters.
        samples: items of each task at each length.
        lengths: of the tasks' prompts in tokens; None for the run's context length.
    """

    fidelity_tokens: int = 64
    tasks: Sequence[str | Mapping[str, Any]] = ()
    samples: int = 8
    lengths: Sequence[int] | None = None


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
    quality: QualitySpec | None = None

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
    quality: dict[str, Any] | bool | None

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
    shared["quality"] = QualitySpec(**experiment.quality) if experiment.quality else None
    for context_length in experiment.context_lengths:
        for repetition in range(experiment.num_runs):
            run = RunSpec(
                **shared,
                context_length=context_length,
                requested_context_length=context_length,
                repetition=repetition,
                seed=seed + repetition if experiment.do_sample else seed,
            )
            if experiment.quality is None and not run.exact:  # no approximation without a word on its quality
                run = dataclasses.replace(run, quality=QualitySpec(LEAST_FIDELITY_TOKENS))
            yield run


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
