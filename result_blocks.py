"""The blocks of a result file, key by key: what is there, when it may be null, and in which unit it is.

The one idea: these classes are the only description of a result. `result_schema.py` checks files with them and prints
them as a JSON Schema; what a key means is written once, beside its type.

A key that stands here must be there: missing is null, and a key that is gone or renamed is an error. A block may hold
keys that do not stand here, so that a figure can be added without breaking whoever reads the older ones. Numbers are
finite, as JSON has no others. What `quality` holds depends on what was asked for, so there only the word on exactness
is required. A change of meaning raises `metrics.SCHEMA_VERSION`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

# --- types of values ----------------------------------------------------------------------------------------------


def _in(unit: str) -> Any:
    """A figure that is not negative, in a unit; missing is a matter of the key."""
    return Annotated[float, Field(ge=0, description=unit)]


Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1, description="0 to 1")]
Ms = _in("milliseconds")
MiB = _in("MiB, 2^20 bytes")
Percent = _in("percent")
PerSecond = _in("tokens per second")
GbPerSecond = _in("10^9 bytes per second")
Bytes = Annotated[int, Field(ge=0, description="bytes")]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Choice = str | dict[str, Any]  # a registered name, "module:Class", or a mapping with `name` and parameters


def says(description: str) -> Any:
    return Field(description=description)


class Block(BaseModel):
    """A JSON object whose keys are all required, and which may hold others."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, protected_namespaces=())


# --- what was asked for -------------------------------------------------------------------------------------------


class Paging(Block):
    """How the cache is cut into pages and what happens to them."""

    page_size: Count = says("tokens a page")
    max_gpu_pages: Count = says("resident pages at most, per layer and sequence")
    staging_pages: Count = says("slots on top of them, for pages on their way")
    policy: Choice = says("which resident page makes room")
    selector: Choice = says("which pages a decode step attends to; `all` is exact")
    attention_pages: Count | None = says("pages a decode step attends to; null: not given as a count")
    attention_fraction: float | None = says(
        "the same as a share of the pages, above 0 to 1; null: not given as a share"
    )
    granularity: Literal["layer", "kv_head"] = says("whether all heads read the same pages")
    dense_layers: Count = says("first layers that read every page nevertheless")
    sink_pages: Count = says("first pages, always resident")
    recent_pages: Count = says("last pages, always resident")
    access_order: Literal["resident_first", "position"] = says("whether pages are asked for as a set or one by one")
    on_miss: Literal["wait", "skip"] = says("whether a step waits for a page that is not there or does without it")
    page_table: Literal["host", "device"] = says("who knows where pages are and makes room for them")
    host_pages: Count | None = says("pages kept in host memory; null: all")
    disk_dir: str | None = says("folder of later ones; null: the temporary folder, where host_pages is set")
    link: str | dict[str, Any] = says("the simulated bus on a CPU: a preset, or bandwidth_gb_s and latency_us")
    record_pages: bool = says("whether cache.requests is there")
    record_timeline: bool = says("whether cache.timeline is there")


class Prefetching(Block):
    """What is copied ahead of need."""

    predictor: Choice = says("which pages will be asked for next")
    prefetch_k: Count = says("pages copied ahead for one layer of one sequence at a time, at most")
    overfetch: float | None = says("how far down the ranking to look, as a multiple of the pages asked for; null: all")
    lookahead: Count = says("layers ahead")
    min_confidence: float | Literal["adaptive"] = says("least confidence, 0 to 1, that is worth a copy")
    prefetch_evicts: bool = says("whether a guessed page may take the slot of a resident one")


class Spec(Block):
    """The run as it was asked for: everything that decides its outcome."""

    name: str = says("label of the strategy")
    model_name: str = says("alias, Hub id, folder, GGUF file or random:<config>")
    context_length: Count = says("tokens of prompt, after the clamp to the model's positions")
    requested_context_length: Count = says("tokens of prompt that the config asked for")
    repetition: Count = says("counts from 0")
    seed: Count = says("of random numbers")
    max_new_tokens: Count = says("tokens to generate per sequence")
    batch_size: Count = says("sequences generated together")
    do_sample: bool = says("whether tokens were drawn at random")
    temperature: float = says("divides the logits; only with do_sample")
    top_p: float = says("probability mass to draw from; only with do_sample")
    top_k: Count = says("likeliest tokens to draw from, 0 for all; only with do_sample")
    stop_at_eos: bool = says("whether generation stops at the end token")
    dtype: str = says("number format asked for")
    device: str = says("device asked for")
    device_map: str | None = says("`auto`: weights over all devices; null: one device")
    quantization: str | None = says("weights in `8bit` or `4bit`; null: as they are")
    trust_remote_code: bool = says("whether the model's repository may run its own code")
    warmup_runs: Count = says("runs made and thrown away before measuring")
    prefill_chunk_size: Count | None = says("prompt tokens per forward pass; null: all")
    prompt_sha256: Sha256 | None = says("of the token ids of a prompt of one's own; null: the made one")
    quality: dict[str, Any] | None = says("what was to be measured beside speed; null: nothing")


class BaselineSpec(Spec):
    mode: Literal["baseline"]
    cache_implementation: Literal["dynamic", "offloaded", "static", "quantized"] = says("transformers' cache")
    paging: None
    prefetch: None


class ReactiveSpec(Spec):
    mode: Literal["reactive"]
    cache_implementation: None
    paging: Paging
    prefetch: None


class PredictiveSpec(Spec):
    mode: Literal["predictive"]
    cache_implementation: None
    paging: Paging
    prefetch: Prefetching


# --- where it ran and what it was ---------------------------------------------------------------------------------


class Environment(Block):
    """The machine, the versions and the command. What could not be found out is null."""

    python: str
    system: str
    cpu: str | None
    cpu_count: Count | None = says("logical processors")
    git_commit: str | None = says("of this program; null: no git checkout")
    git_dirty: bool | None = says("whether tracked files differed from the commit")
    gpu_driver: str | None
    gpus: list[str] | None = says("names of the GPUs that torch sees; null: torch was not loaded")
    cuda: str | None = says("version that torch was built for")
    packages: dict[str, str | None] = says("package -> version")
    torch_threads: Count | None
    argv: list[str] = says("the command")


class Model(Block):
    """The model as it was loaded."""

    source: str = says("where the weights came from")
    random_weights: bool = says("true: figures of speed mean something, its answers do not")
    n_parameters: Count
    weight_bytes: Bytes
    dtype: str = says("number format used")
    device: str = says("device used")
    device_map: dict[str, str] | None = says("module -> device, where weights lie on several")
    attention: str = says("attention implementation of transformers")
    kv_bytes_per_token: Bytes = says("bytes of keys and values of one token, all paged layers")
    max_positions: Count | None = says("positions the model has; null: no limit known")


class Context(Block):
    """The prompt: what was asked for and what was used."""

    requested_tokens: Count
    tokens: Count = says("tokens of prompt used")
    clamped: bool = says("whether fewer were used than asked for")
    reason: str | None = says("why; null: not clamped")
    prompt_sha256: Sha256 = says("of the token ids")


# --- what was measured --------------------------------------------------------------------------------------------


class Timing(Block):
    """Times of the generation, all from one clock. Null where there are too few tokens for the figure."""

    n_tokens: Count = says("tokens generated per sequence")
    batch_size: Count = says("sequences generated together")
    ttft_ms: Ms | None = says("ms from start to first token: the prefill")
    e2e_ms: Ms | None = says("ms from start to last token")
    itl_ms: list[Ms] = says("ms between tokens, one for each after the first")
    clock: str = says("what measured the times")
    prefill_ms: Ms | None = says("ms, as ttft_ms")
    itl_p50_ms: Ms | None = says("ms, the median of itl_ms; null where there is none")
    itl_p90_ms: Ms | None = says("ms, the 90th percentile of itl_ms; null where there is none")
    itl_p99_ms: Ms | None = says("ms, the 99th percentile of itl_ms; null where there is none")
    decode_ms: Ms | None = says("ms, the sum of itl_ms")
    tpot_ms: Ms | None = says("ms per token after the first")
    tokens_per_second: PerSecond | None = says("tokens per second of one sequence, prefill included")
    decode_tokens_per_second: PerSecond | None = says("tokens per second of one sequence after the first token")
    batch_tokens_per_second: PerSecond | None = says("tokens per second of all sequences, prefill included")


class Memory(Block):
    """Memory of the device, the process and the cache. GPU figures are null without a CUDA device."""

    gpu_memory_mb: MiB | None = says("MiB (2^20 bytes) allocated at the end")
    gpu_peak_mb: MiB | None = says("MiB at the peak")
    gpu_delta_mb: float | None = says("MiB of the peak above the start")
    rss_mb: MiB = says("MiB of the process")
    rss_delta_mb: float = says("MiB above the start, or below it")
    device_kv_bytes: Bytes | None = says("bytes of KV cache on the device, staging slots included")
    staging_bytes: Bytes | None = says("bytes of staging slots among them; null: no pages")
    resident_bytes: Bytes | None = says("bytes of resident pages among them; null: no pages")
    digest_bytes: Bytes | None = says("bytes of page summaries on the device, beside them; null: no pages")
    host_kv_bytes: Bytes | None = says("bytes of KV cache in host memory")
    disk_kv_bytes: Bytes | None = says("bytes of KV cache in files; null: no pages")
    kv_bytes_total: Bytes = says("bytes that the whole context would take")


class Power(Block):
    """Of the GPUs, through NVML; null where it does not answer."""

    mean_power_w: float | None = says("watts")
    energy_j: float | None = says("joules")
    mean_utilization_percent: Percent | None = says("percent")
    source: str | None = says("what the energy was read from")


class Traffic(Block):
    """Page traffic, counted in pages over layers and sequences; the stages of paging in milliseconds."""

    hits: Count = says("accesses that found their page in time")
    late: Count = says("accesses whose page was on its way and waited for")
    misses: Count = says("accesses whose copy was asked for only then")
    evictions: Count
    prefetch_issued: Count = says("copies asked for ahead of need")
    prefetch_on_time: Count = says("of those, used without waiting")
    prefetch_late: Count = says("of those, used after waiting")
    prefetch_wasted: Count = says("of those, dropped without having been used")
    prefetch_declined: Count = says("guesses not worth a copy")
    pollution: Count = says("misses on pages that were evicted for a prefetch")
    skipped: Count = says("accesses that a step did without")
    h2d_pages: Count = says("pages copied to the device")
    d2h_pages: Count = says("pages copied to the host")
    must_move: Count = says("least pages that any policy has to fetch, given the budget")
    shadow_hits: Count = says("hits that plain LRU of the same size would have had")
    shadow_slots_hits: Count = says("hits of an LRU that held pages in the staging slots too")
    lru_hits: Count = says("hits that were among shadow_hits")
    select_ms: Ms = says("ms choosing the pages to attend to")
    predict_ms: Ms = says("ms guessing those of the next")
    stall_ms: Ms = says("ms waiting for pages")
    copy_ms: Ms = says("ms asking for copies")
    attend_ms: Ms = says("ms of attention over pages and its merging")


class Step(Traffic):
    """One forward pass: a prefill chunk or a decode step."""

    step: Count = says("counts from 0, prefill included")
    phase: Literal["prefill", "decode"]


class Layer(Traffic):
    """One layer, all decode steps together."""

    layer: Count
    accesses: Count = says("hits + late + misses")


class Stages(Block):
    """Where decode time goes, in milliseconds."""

    select_ms: Ms
    predict_ms: Ms
    wait_ms: Ms
    copy_ms: Ms
    attend_ms: Ms
    other_ms: float | None = says("ms of all the rest; null on a real bus, whose host works beside the device")


class Link(Block):
    """What the pages travelled over."""

    kind: Literal["bus", "simulated", "memory"] = says("simulated: a real copy, delayed as a bus would; a model of it")
    name: str
    bandwidth_gb_s: GbPerSecond | None = says("10^9 bytes per second; null: not known beforehand")
    latency_us: float = says("microseconds from a request to its first byte")


class Floor(Block):
    """Roofline of a decode step: max(compute, bytes that must move / bandwidth)."""

    must_move_bytes_per_step: float | None = says("bytes")
    bandwidth_gb_s: GbPerSecond | None = says("10^9 bytes per second")
    bandwidth_from: Literal["link", "measured"] | None
    transfer_ms_per_step: Ms | None = says("ms")
    compute_ms_per_step: float | None = says("ms")
    floor_ms_per_step: Ms | None = says("ms")
    tpot_over_floor: float | None = says("times the floor")


class PrefillTraffic(Block):
    chunks: Count = says("forward passes of the prompt")
    evictions: Count
    h2d_bytes: Bytes
    d2h_bytes: Bytes
    stall_ms: Ms = says("ms waiting for pages")


class Cache(Block):
    """Paging in decode, counted in pages over layers and sequences. Rates are null where nothing was accessed."""

    accesses: Count = says("pages wanted: hits + late + misses")
    hits: Count
    late: Count
    misses: Count
    hit_rate: Share | None = says("hits / accesses, 0 to 1")
    late_rate: Share | None = says("late / accesses, 0 to 1")
    miss_rate: Share | None = says("misses / accesses, 0 to 1")
    lru_hits: Count
    hits_beyond_lru: int | None
    shadow_lru_hit_rate: Share | None = says("of plain LRU with the same budget on the same requests, 0 to 1")
    gain_over_lru: float | None = says("hit_rate less that, -1 to 1")
    shadow_lru_all_slots_hit_rate: Share | None = says("of an LRU that held pages in the staging slots too, 0 to 1")
    gain_over_lru_all_slots: float | None = says("hit_rate less that, -1 to 1")
    skipped: Count = says("accesses that a step did without")
    skipped_rate: Share | None = says("skipped / accesses, 0 to 1")
    evictions: Count
    h2d_bytes: Bytes = says("bytes copied to the device")
    d2h_bytes: Bytes = says("bytes copied to the host")
    stall_ms: Ms = says("ms that computing waited for pages")
    stall_percent: Percent | None = says("percent of decode time")
    stages: Stages
    transfer_ms: Ms | None = says("ms that the link was busy")
    hidden_transfer_share: Share | None = says("of the link's busy time, the share not waited for, 0 to 1")
    effective_bandwidth_gb_s: GbPerSecond | None = says("10^9 bytes per second, measured")
    link: Link
    floor: Floor
    by_layer: list[Layer]
    prefill: PrefillTraffic
    exact: bool = says("whether every page is attended to")
    n_pages: Count = says("pages of the context, per layer and sequence")
    attended_pages: Count = says("pages that a decode step attends to")
    page_bytes: Bytes = says("bytes of a page of one layer and sequence, keys and values")
    n_paged_layers: Count
    host_is_pinned: bool = says("whether host memory is page-locked")


class Bin(Block):
    """Guesses of one band of confidence, from `low` to `high`."""

    low: Share
    high: Share
    n: Count = says("guesses")
    confidence: Share = says("their mean, 0 to 1")
    used: Share = says("the share that came true, 0 to 1")


class Threshold(Block):
    step: Count = says("decode step, counts from 0")
    threshold: Share = says("least probability that was worth a copy, 0 to 1")
    link_load: Share | None = says("share of time that the link was busy, 0 to 1; null: not known")


class Prefetch(Block):
    """Copies ahead of need in decode, counted in pages."""

    issued: Count
    useful: Count = says("on_time + late")
    on_time: Count
    late: Count
    wasted: Count = says("dropped without having been used")
    declined: Count = says("guesses not worth a copy")
    pollution: Count = says("misses on pages that were evicted for a prefetch")
    unresolved: Count = says("neither used nor dropped by the end")
    accuracy: Share | None = says("useful / issued, 0 to 1; null: nothing issued")
    coverage: Share | None = says("useful / (useful + misses), 0 to 1; null: nothing had to move")
    timeliness: Share | None = says("on_time / useful, 0 to 1; null: nothing useful")
    wasted_bytes: Bytes = says("bytes copied ahead and not used by the end")
    misprediction_cost_percent: Percent | None = says("percent of all bytes copied to the device")
    calibration: list[Bin]
    thresholds: list[Threshold] = says("by decode step")


class Quality(Block):
    """What the cache costs in answers; beyond these keys, what was asked for: `fidelity`, `tasks`, `error`."""

    exact: bool = says("whether the run claims the tokens of plain generation")
    matches_baseline: bool | None = says("whether it gave the baseline's tokens; null: none to compare with")
    first_divergent_token: Count | None = says("counts from 0; null: none")


class Tokens(Block):
    sha256: Sha256 = says("of the token ids")
    ids: list[list[Count]] = says("[batch, tokens]")
    text: list[str] | None = says("[batch]; null: no tokenizer")
