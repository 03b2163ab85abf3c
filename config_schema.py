"""What a config may say: the keys of each mode, with their meaning, defaults, limits and rules.

The one idea: these pydantic classes are the only description of a config. What a key means, its default and
its limits are written once, in its `Field`; the checks, the messages (`config_messages`) and the commented
default file (`default_config`) all come from there. To add a key, add a field.

A limit of one value stands in its type, and a rule between several values in `conflicts`. Both refuse in
words that `config_messages` can print: a type by a `ValueError` with the rest of a sentence that the key
begins ("must be ..."), a rule by a sentence of its own.

Policies, selectors and predictors are looked up in `registry` and their parameters checked against their
classes. The modules of the built-in ones need no torch, so neither does the reading of a config; a user's own
module is imported, whatever it needs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

import links
from cache_settings import ADAPTIVE, Paging, PrefetchSpec, paging_conflicts, prefetch_conflicts
from registry import POLICIES, PREDICTORS, SELECTORS, TASKS, Registry, UnknownName, nearest
from yaml_source import described

# --- types of values ----------------------------------------------------------------------------------------


def _printable(text: str) -> str:
    if not text.strip() or not text.isprintable():
        raise ValueError(f"must be printable text that is not blank, found {described(text)}")
    return text


def _known_device(text: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", text, re.ASCII):
        meant = nearest(text, ["auto", "cpu", "cuda"])
        raise ValueError(f"must be auto, cpu, cuda or cuda:N, found {described(text)}{meant}")
    return text


def _no_repeats(numbers: list[int]) -> list[int]:
    for number in numbers:
        if numbers.count(number) > 1:
            raise ValueError(f"must name each length once, found {number} twice")
    return numbers


def _none_as_null(word: str | None) -> str | None:
    return None if word == "none" else word


class LinkSpeed(BaseModel):
    """A link given by its figures instead of a preset's name."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    bandwidth_gb_s: float = Field(gt=0)
    latency_us: float = Field(0.0, ge=0)


def _known_link(value: Any) -> Any:
    if isinstance(value, dict):
        return LinkSpeed.model_validate(value).model_dump()
    if value not in links.NAMES:
        rule = f"must be {', '.join(links.NAMES)} or a mapping with bandwidth_gb_s and latency_us"
        raise ValueError(f"{rule}, found {described(value)}{nearest(value, links.NAMES)}")
    return value


def _known_confidence(value: Any) -> Any:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if value != ADAPTIVE and not (is_number and 0 <= value <= 1):
        raise ValueError(f"must be {ADAPTIVE} or a number from 0 to 1, found {described(value)}")
    return value


class _Quality(BaseModel):
    """What is measured of a run beside its speed; the fields of `run_specs.QualitySpec`."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    fidelity_tokens: int = Field(64, ge=0, le=4096)
    tasks: list[str | dict[str, Any]] = Field(default_factory=list)
    samples: int = Field(8, ge=1, le=100_000)
    lengths: Annotated[list[Annotated[int, Field(ge=1)]], AfterValidator(_no_repeats)] | None = Field(
        None, min_length=1
    )

    @model_validator(mode="after")
    def _something_is_asked_for(self) -> _Quality:
        for task in self.tasks:
            for refused in TASKS.refused_parameters(task).values():
                raise refused
            TASKS.create(task)  # of tasks, that is cheap, and their values are judged before anything is run
        if not self.tasks and not self.fidelity_tokens:
            raise ValueError("must ask for something: fidelity_tokens above 0, or tasks")
        return self


def _known_quality(value: Any) -> Any:
    if value is None or value is False:
        return value
    if not isinstance(value, dict):
        rule = "must be a mapping with fidelity_tokens, tasks, samples or lengths, or false"
        raise ValueError(f"{rule}, found {described(value)}")
    return _Quality.model_validate(value).model_dump()


class _Part(BaseModel):
    """A policy, selector or predictor with parameters; which ones there are, its own class knows."""

    model_config = ConfigDict(extra="allow", strict=True)
    name: str


def _part_of(registry: Registry) -> Any:
    """The type of a key that names a part: `lru`, or `{name: lru, parameter: value}`.

    The part is found, imported if it is the user's own, and its parameters are compared with those that were
    given. It is not made: a value that only its class can judge is judged when a run begins.
    """

    def known_part(value: Any) -> Any:
        if not isinstance(value, str | dict):
            raise ValueError(f"must be a name or a mapping with 'name', found {described(value)}")
        name = value if isinstance(value, str) else _Part.model_validate(value).name
        try:
            refused = registry.refused_parameters(value)
        except UnknownName:
            raise
        except (Exception, SystemExit) as error:  # a user's module can fail in any way while it is imported
            raise UnknownName(
                f"{registry.kind} {name!r}: importing it failed ({type(error).__name__}: {error})"
            ) from error
        if refused:
            raise ValidationError.from_exception_data(
                registry.kind,
                [
                    InitErrorDetails(
                        type=PydanticCustomError("unknown_parameter", "{error}", {"error": error}),
                        loc=(parameter,),
                        input=value[parameter],
                    )
                    for parameter, error in refused.items()
                ],
            )
        return name if value == {"name": name} else value

    return Annotated[str | dict[str, Any], PlainValidator(known_part), registry]


Count = Annotated[int, Field(ge=1, le=1_000_000_000)]
CountOrZero = Annotated[int, Field(ge=0, le=1_000_000_000)]
Share = Annotated[float, Field(gt=0, le=1)]
Multiple = Annotated[float, Field(ge=1, le=1_000_000)]
Quality = Annotated[dict[str, Any] | bool | None, PlainValidator(_known_quality)]
Confidence = Annotated[float | str, PlainValidator(_known_confidence), (ADAPTIVE,)]
Lengths = Annotated[list[Count], Field(min_length=1, max_length=1000), AfterValidator(_no_repeats)]
Text = Annotated[str, AfterValidator(_printable)]
Device = Annotated[str, AfterValidator(_known_device)]
DeviceMap = Annotated[Literal["auto", "none"] | None, AfterValidator(_none_as_null)]
Quantization = Annotated[Literal["8bit", "4bit", "none"] | None, AfterValidator(_none_as_null)]
# The registry, or the tuple of names, rides along as metadata: the default file lists its names.
Link = Annotated[str | dict[str, float], PlainValidator(_known_link), links.NAMES]
Policy, Selector, Predictor = _part_of(POLICIES), _part_of(SELECTORS), _part_of(PREDICTORS)

# --- the keys of each mode ----------------------------------------------------------------------------------

Conflict = tuple[tuple[str, ...], str]


class Experiment(BaseModel):
    """One entry of the list: what all modes share."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())

    mode: Literal["baseline", "reactive", "predictive"] = Field(description="Way of holding the KV cache.")
    name: Text = Field(
        default_factory=lambda fields: fields["mode"],
        description="Label in tables and plots; the mode if left out.",
    )
    model_name: Text = Field("smollm2-135m", description="Alias, Hub id, folder, GGUF file or random:<config>.")
    context_lengths: Lengths = Field([500, 1000, 2000], description="Prompt lengths in tokens, one run each.")
    num_runs: int = Field(3, ge=1, le=1000, description="Measured repetitions per context length.")
    max_new_tokens: Count = Field(50, description="Tokens to generate per sequence.")
    batch_size: Count = Field(1, description="Sequences generated together.")
    do_sample: bool = Field(False, description="Draw tokens at random instead of taking the likeliest.")
    temperature: float = Field(1.0, gt=0, description="Divides the logits; only with do_sample.")
    top_p: float = Field(1.0, gt=0, le=1, description="Probability mass to draw from; only with do_sample.")
    top_k: CountOrZero = Field(50, description="Likeliest tokens to draw from, 0 for all; only with do_sample.")
    stop_at_eos: bool = Field(False, description="Stop at the end token; false makes runs equally long.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Number format of weights and cache."
    )
    device: Device = Field("auto", description="auto, cpu, cuda or cuda:N; auto takes a GPU if there is one.")
    device_map: DeviceMap = Field(None, description="auto spreads the weights over all devices.")
    quantization: Quantization = Field(None, description="Weights in 8 or 4 bits (bitsandbytes).")
    seed: int = Field(0, ge=0, le=2**32 - 1, description="Start of the random numbers; sampled runs add theirs.")
    warmup_runs: int = Field(1, ge=0, le=1000, description="Runs made and thrown away before measuring.")
    prefill_chunk_size: Count | None = Field(None, description="Prompt tokens per forward pass; null for all.")
    trust_remote_code: bool = Field(False, description="Let the model's repository run its own Python code.")
    quality: Quality = Field(
        None,
        description="What else to measure: {fidelity_tokens: 64, tasks: [passkey, needle], samples: 8, lengths: [500]};"
        " python workloads.py --list shows the tasks. null: of approximate runs fidelity over 32 tokens; false: nothing"
        " at all.",
    )

    def conflicts(self) -> Iterator[Conflict]:
        """Values that are right alone and wrong together: `(keys, text)`, the key to blame first."""
        for key in ("temperature", "top_p", "top_k"):
            if not self.do_sample and getattr(self, key) != type(self).model_fields[key].default:
                yield (
                    (key, "do_sample"),
                    f"{key!r} has no effect without sampling; add 'do_sample: true' or remove it",
                )

    @model_validator(mode="after")
    def _no_conflicts(self) -> Experiment:
        """Raise the conflicts as errors of their keys."""
        errors = [
            InitErrorDetails(
                type=PydanticCustomError("conflict", "{text}", {"text": text, "keys": keys}),
                loc=keys[:1],
                input=getattr(self, keys[0]),
            )
            for keys, text in self.conflicts()
        ]
        if errors:
            raise ValidationError.from_exception_data(type(self).__name__, errors)
        return self

    def cache_fields(self) -> dict[str, Any]:
        """The fields of `RunSpec` that only this mode fills."""
        return {}


class BaselineExperiment(Experiment):
    """Plain generation with one of HF's own caches."""

    mode: Literal["baseline"]
    cache_implementation: Literal["dynamic", "offloaded", "static", "quantized"] = Field(
        "dynamic", description="HF's own cache; offloaded needs CUDA."
    )

    def conflicts(self) -> Iterator[Conflict]:
        yield from super().conflicts()
        if self.cache_implementation == "offloaded" and self.device == "cpu":
            yield (
                ("cache_implementation", "device"),
                "'cache_implementation: offloaded' needs CUDA, but device is cpu; choose dynamic or a GPU",
            )

    def cache_fields(self) -> dict[str, Any]:
        return {"cache_implementation": self.cache_implementation}


class ReactiveExperiment(Experiment):
    """The KV cache in pages, fetched when attention asks for them."""

    mode: Literal["reactive"]
    page_size: Count = Field(256, description="Tokens per page.")
    max_gpu_pages: Count = Field(8, description="Resident pages at most, per layer and sequence.")
    staging_pages: Count = Field(6, description="Slots on top of max_gpu_pages, for pages on their way.")
    policy: Policy = Field("lru", description="Which page to evict.")
    selector: Selector = Field("all", description="Which pages attention reads; all is exact.")
    attention_pages: Count | None = Field(
        None, description="Pages a decode step attends to; for any selector but all, this or attention_fraction."
    )
    attention_fraction: Share | None = Field(
        None, description="The same as a share of the context's pages, rounded up."
    )
    granularity: Literal["layer", "kv_head"] = Field(
        "layer", description="Whether all heads attend to the same pages, or each key/value head chooses its own."
    )
    dense_layers: CountOrZero = Field(0, description="First layers that attend to every page nevertheless.")
    sink_pages: CountOrZero = Field(1, description="First pages, always resident.")
    recent_pages: Count = Field(1, description="Last pages, always resident; the open page counts.")
    access_order: Literal["resident_first", "position"] = Field(
        "resident_first", description="Ask for all wanted pages as a set, or one by one as naive paging does."
    )
    on_miss: Literal["wait", "skip"] = Field(
        "wait", description="Wait for a page that is not there, or leave it out of this step: an approximation."
    )
    page_table: Literal["host", "device"] = Field(
        "host",
        description="Who knows where pages are: the host, which waits in every layer for what a selector chose; or the"
        " device, for which the host waits nowhere (LRU; on CUDA it needs Triton, on a CPU link: memory).",
    )
    host_pages: CountOrZero | None = Field(
        None, description="Pages kept in host memory, per layer and sequence; later ones go to disk. null: all of them."
    )
    disk_dir: Text | None = Field(None, description="Folder for those on disk; null: the temporary folder.")
    link: Link = Field(
        "auto",
        description="What pages travel over when running on a CPU: auto (= pcie3-x16), memory (plain copies),"
        " a preset, or {bandwidth_gb_s, latency_us}; simulated and said so in the results. On CUDA the real"
        " bus is used, whatever is set here.",
    )

    record_pages: bool = Field(
        False, description="Keep in the result which pages each layer asked for at each step, as heat maps need."
    )
    record_timeline: bool = Field(
        False, description="Keep in the result when attention, waits and copies of each decode step happened."
    )

    def conflicts(self) -> Iterator[Conflict]:
        yield from super().conflicts()
        yield from paging_conflicts(self)

    def cache_fields(self) -> dict[str, Any]:
        return {"paging": Paging(**{key: getattr(self, key) for key in Paging.__dataclass_fields__})}


class PredictiveExperiment(ReactiveExperiment):
    """The paged cache, with the next pages predicted and copied ahead of need."""

    mode: Literal["predictive"]
    predictor: Predictor = Field("ranked", description="What guesses the next pages.")
    prefetch_k: Count = Field(
        4,
        description="Pages copied ahead at most, per layer, sequence and step; fewer than staging_pages leaves"
        " slots for fetches.",
    )

    overfetch: Multiple | None = Field(
        2.0, description="How far down the ranking, in multiples of the pages asked for last; null for all of it."
    )
    lookahead: Count = Field(1, description="How many layers ahead to copy.")
    min_confidence: Confidence = Field(
        ADAPTIVE,
        description="Least confidence worth a copy, 0 to 1; adaptive follows how often guesses come true and how busy"
        " the link is.",
    )
    prefetch_evicts: bool = Field(
        False, description="Let a guessed page take the slot of a resident one that is not guessed, if none is free."
    )

    def conflicts(self) -> Iterator[Conflict]:
        yield from super().conflicts()
        needs = {name for name in ("needs_scores", "needs_recording") if PREDICTORS.asks_for(self.predictor, name)}
        yield from prefetch_conflicts(self, self, needs)

    def cache_fields(self) -> dict[str, Any]:
        prefetch = PrefetchSpec(**{key: getattr(self, key) for key in PrefetchSpec.__dataclass_fields__})
        return super().cache_fields() | {"prefetch": prefetch}


MODE_CLASSES: dict[str, type[Experiment]] = {
    "baseline": BaselineExperiment,
    "reactive": ReactiveExperiment,
    "predictive": PredictiveExperiment,
}


def _names_a_part(cls: type[Experiment], key: str) -> bool:
    return any(isinstance(extra, Registry) for extra in cls.model_fields[key].metadata)


ALL_KEYS = list(dict.fromkeys(key for cls in MODE_CLASSES.values() for key in cls.model_fields))
PART_KEYS = [
    key for key in ALL_KEYS if any(key in c.model_fields and _names_a_part(c, key) for c in MODE_CLASSES.values())
]
"""Keys that name a policy, selector or predictor, alone or in a mapping with its parameters."""
QUALITY_KEYS = list(_Quality.model_fields)
MAPPING_KEYS = ["link", "quality"]
"""Other keys whose value may be a mapping."""
