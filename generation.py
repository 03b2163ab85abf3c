"""The one measured generation loop that all modes share.

A run is the same in every mode: `measured_run` makes the prompt, warms up, seeds, generates with the mode's cache under
the meters, and compares the tokens with the baseline's. A mode brings only its cache, as a `MeasuredCache`. So whatever
differs between two results differs because of the cache.

Inference has two regimes. *Prefill* pushes the whole prompt through the model at once and is bound by arithmetic; its
time is the time to first token (TTFT). *Decode* makes one token a step, reads all weights and the KV cache for it,
and is bound by memory bandwidth; its time per token is TPOT. Paging is about decode.

What is inside a run's clock is `model.generate` and nothing else: the prompt is made, the cache allocated and the
memory of earlier runs given back before it starts.
"""

from __future__ import annotations

import datetime
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import Cache, DynamicCache, GenerationConfig, QuantizedCache, StaticCache

from device_meters import MemoryMeter, PowerMeter, TokenClock
from metrics import RunResult, Timing, token_agreement
from models import LoadedModel
from run_specs import RunSpec
from utils import environment, is_out_of_memory, set_seed
from workloads import TokenRows, prompt_tokens, token_sha256

KV_BYTES = (  # on the device; the part of it on top of the budget; that of resident pages; digests; memory; files
    *("device_kv_bytes", "staging_bytes", "resident_bytes", "digest_bytes"),
    *("host_kv_bytes", "disk_kv_bytes"),
)
WARMUP_TOKENS = 4  # enough to run prefill and decode once; more would only repeat decode


class MeasuredCache(Protocol):
    """A KV cache as the measured loop needs it."""

    def start(self, batch_size: int, prompt_tokens: int, new_tokens: int) -> Cache:
        """An empty cache for a prompt and its continuation, its memory allocated where that is fixed."""
        ...

    def attached(self, model: Any) -> AbstractContextManager:
        """The context in which `model` uses this cache."""
        ...

    def memory(self) -> dict[str, int | None]:
        """Those of `KV_BYTES` that this cache knows; the others are None in the result."""
        ...

    def figures(self, timing: Timing) -> dict[str, Any]:
        """Result blocks of this cache: `cache`, `prefetch`, `steps`; empty where it has none."""
        ...

    def hit_rate_so_far(self) -> float | None:
        """Of decode, for who looks on; None where there is nothing to hit."""
        ...


@dataclass(frozen=True)
class Generation:
    """What one measured generation gave: new tokens by sequence, and the meters' figures."""

    tokens: TokenRows
    timing: Timing
    memory: dict[str, Any]
    power: dict[str, Any]


class HFCache:
    """transformers' own caches.

    `dynamic` grows by concatenation, `static` is allocated once, `offloaded` keeps all layers but two in host memory
    and copies each of them in and out at every step, and `quantized` holds keys and values in fp8.

    Args:
        implementation: which of them.

    Raises:
        ValueError: the implementation needs what this machine does not have; the message says what.
    """

    def __init__(self, implementation: str, model: LoadedModel):
        self.implementation, self.model = implementation, model
        if implementation == "offloaded" and model.device.type != "cuda":
            raise ValueError("cache_implementation: offloaded copies between GPU and host, so it needs a CUDA device")

    def start(self, batch_size: int, prompt_tokens: int, new_tokens: int) -> Cache:
        config = self.model.model.config
        if self.implementation == "static":
            self.cache: Cache = StaticCache(config=config, max_cache_len=prompt_tokens + new_tokens)
        elif self.implementation == "quantized":
            self.cache = QuantizedCache(backend="fp8", config=config)
        else:
            self.cache = DynamicCache(config=config, offloading=self.implementation == "offloaded")
        return self.cache

    def attached(self, model: Any) -> AbstractContextManager:
        return nullcontext()

    def memory(self) -> dict[str, int | None]:
        sizes = {"cpu": 0, "device": 0}
        for tensor in _tensors_of(self.cache):
            sizes["cpu" if tensor.device.type == "cpu" else "device"] += tensor.nbytes
        if self.model.device.type == "cpu":  # the CPU is the device here; nothing is anywhere else
            return {"device_kv_bytes": sizes["cpu"], "host_kv_bytes": 0}
        return {"device_kv_bytes": sizes["device"], "host_kv_bytes": sizes["cpu"]}

    def figures(self, timing: Timing) -> dict[str, Any]:
        return {}

    def hit_rate_so_far(self) -> float | None:
        return None


def _tensors_of(cache: Cache) -> list[torch.Tensor]:
    """The tensors that hold keys and values, quantised ones included, each storage once."""
    found: dict[int, torch.Tensor] = {}
    for layer in cache.layers:
        for value in vars(layer).values():
            for tensor in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(tensor, torch.Tensor) and tensor.ndim >= 3:
                    found[tensor.untyped_storage().data_ptr()] = tensor
    return list(found.values())


def made_prompt(spec: RunSpec, model: LoadedModel, n_tokens: int | None = None) -> TokenRows:
    """The prompt that a run makes for itself, or of another length the one that begins or goes on like it."""
    length = spec.context_length if n_tokens is None else n_tokens
    return prompt_tokens(model.tokenizer, model.shape.vocab_size, length, spec.batch_size, spec.seed)


def measured_run(
    spec: RunSpec,
    model: LoadedModel,
    make_cache: Callable[[RunSpec, LoadedModel], MeasuredCache],
    *,
    reference: TokenRows | None = None,
    prompt: TokenRows | None = None,
    attention_mask: TokenRows | None = None,
    on_token: Callable[[int, float | None], None] | None = None,
) -> RunResult:
    """Generate once with a mode's cache, under the meters.

    Args:
        spec: the run.
        model: loaded for `spec.model_key`.
        make_cache: makes the mode's cache for a run, new and empty.
        reference: the baseline's tokens for the same prompt and settings, to compare with.
        prompt: token rows to use instead of the made one.
        attention_mask: for that prompt, 0 where it is padded on the left.
        on_token: called after each new token with their number and the hit rate so far.

    Raises:
        Whatever generation raises; `failed_run` makes a result of it.
    """
    started_at, started = _now(), time.perf_counter()
    prompt = prompt or made_prompt(spec, model)
    if spec.repetition == 0:
        for _ in range(spec.warmup_runs):
            warmup_tokens = min(WARMUP_TOKENS, spec.max_new_tokens)
            generate(spec, model, make_cache(spec, model), prompt, warmup_tokens, attention_mask=attention_mask)
    cache = make_cache(spec, model)
    look_on = None if on_token is None else lambda n_tokens: on_token(n_tokens, cache.hit_rate_so_far())
    generation = generate(
        spec, model, cache, prompt, spec.max_new_tokens, attention_mask=attention_mask, on_token=look_on
    )
    return RunResult(
        spec=spec.to_dict(),
        run_id=spec.run_id,
        started_at=started_at,
        duration_seconds=time.perf_counter() - started,
        environment=environment(),
        model=model_block(model),
        context=context_block(spec, prompt),
        timing=generation.timing.to_dict(),
        memory={**generation.memory, **_kv_memory(cache, model, len(prompt[0]), generation)},
        power=generation.power,
        quality={"exact": spec.exact, **token_agreement(generation.tokens, reference)},
        tokens=tokens_block(model, generation.tokens),
        **cache.figures(generation.timing),
    )


def generate(
    spec: RunSpec,
    model: LoadedModel,
    cache: MeasuredCache,
    prompt: TokenRows,
    new_tokens: int,
    *,
    attention_mask: TokenRows | None = None,
    on_token: Callable[[int], None] | None = None,
) -> Generation:
    """The measured loop: HF `generate` with this cache, each token timed.

    Args:
        prompt: token ids [batch, positions], rows of one length.
        attention_mask: 0 where a row is padded; None where none is.
    """
    device = model.model.get_input_embeddings().weight.device
    input_ids = torch.tensor(prompt, device=device)
    mask = torch.ones_like(input_ids) if attention_mask is None else torch.tensor(attention_mask, device=device)
    clock = TokenClock(model.device, on_token)
    devices = sorted({parameter.device for parameter in model.model.parameters()}, key=str)
    memory, power = MemoryMeter(devices), PowerMeter(devices)
    settings = _sampling(spec, model)
    set_seed(spec.seed)
    gc.collect()  # so that nothing of an earlier run is measured, or freed during this one
    memory.start()
    past_key_values = cache.start(len(prompt), input_ids.shape[1], new_tokens)
    with _own_settings_aside(model.model), cache.attached(model.model), torch.inference_mode(), power:
        clock.start()
        output = model.model.generate(
            input_ids,
            attention_mask=mask,
            past_key_values=past_key_values,
            stopping_criteria=[clock],
            max_new_tokens=new_tokens,
            prefill_chunk_size=spec.prefill_chunk_size,
            use_cache=True,  # some models' configs say no, and would then not read the cache they are given
            disable_compile=True,  # transformers would compile for a static cache alone, and within the run
            **settings,
        )
        times = clock.token_times_ms()
    return Generation(
        tokens=output[:, input_ids.shape[1] :].tolist(),
        timing=Timing.from_token_times(times, len(prompt), clock.name),
        memory=memory.figures(),
        power=power.figures(),
    )


@contextmanager
def _own_settings_aside(model: Any) -> Iterator[None]:
    """Put the model's own generation config aside: what it suppresses, forces or caches is not part of a run.

    `generate` takes from it whatever is not given, and refuses a cache beside one that it names.
    """
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _sampling(spec: RunSpec, model: LoadedModel) -> dict[str, Any]:
    """Generation parameters of a run; of the model's own only the end and padding tokens."""
    config = model.model.generation_config
    options: dict[str, Any] = {"do_sample": spec.do_sample}
    if spec.do_sample:
        options |= {"temperature": spec.temperature, "top_p": spec.top_p, "top_k": spec.top_k}
    eos = config.eos_token_id
    options["eos_token_id"] = eos if spec.stop_at_eos else None
    first_eos = eos[0] if isinstance(eos, list) else eos
    pads = (config.pad_token_id, first_eos, 0)
    options["pad_token_id"] = next(token for token in pads if token is not None)
    return options


def model_block(model: LoadedModel) -> dict[str, Any]:
    """The `model` block of a result."""
    return {
        "source": model.source,
        "random_weights": model.random_weights,
        "n_parameters": model.model.num_parameters(),  # 4-bit weights are packed in twos; this counts them all
        "weight_bytes": model.model.get_memory_footprint(),
        "dtype": model.dtype_name,
        "device": str(model.device),
        "device_map": {name: str(place) for name, place in getattr(model.model, "hf_device_map", {}).items()} or None,
        "attention": model.model.config._attn_implementation,
        "kv_bytes_per_token": model.shape.kv_bytes_per_token(model.dtype_name),
        "max_positions": model.shape.max_positions,
    }


def context_block(spec: RunSpec, prompt: TokenRows) -> dict[str, Any]:
    """The `context` block: what was asked for, what was used, and why they differ if they do."""
    clamped = spec.context_length != spec.requested_context_length
    reason = (
        f"{spec.requested_context_length} + {spec.max_new_tokens} new tokens exceed the model's positions"
        if clamped
        else None
    )
    return {
        "requested_tokens": spec.requested_context_length,
        "tokens": len(prompt[0]),
        "clamped": clamped,
        "reason": reason,
        "prompt_sha256": token_sha256(prompt),
    }


def tokens_block(model: LoadedModel, tokens: TokenRows) -> dict[str, Any]:
    """The `tokens` block: hash, ids, and the text where there is a tokenizer."""
    text = None if model.tokenizer is None else model.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return {"sha256": token_sha256(tokens), "ids": tokens, "text": text}


def _kv_memory(cache: MeasuredCache, model: LoadedModel, n_prompt: int, generation: Generation) -> dict[str, Any]:
    """Bytes of keys and values by place, and what the whole context would take on the device."""
    positions = n_prompt + generation.timing.n_tokens - 1  # the last token is never fed back
    whole = positions * len(generation.tokens) * model.shape.kv_bytes_per_token(model.dtype_name)
    return {**dict.fromkeys(KV_BYTES), **cache.memory(), "kv_bytes_total": whole}


def failed_run(spec: RunSpec, error: BaseException) -> RunResult:
    """The result of a run that raised: a row with a status and a reason."""
    status = "out_of_memory" if is_out_of_memory(error) else "error"
    message = f"{type(error).__name__}: {error}".strip().rstrip(":")
    return RunResult(
        spec=spec.to_dict(),
        run_id=spec.run_id,
        status=status,
        error=message,
        started_at=_now(),
        environment=environment(),
    )


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
