"""The longest context that fits: found by trying, doubling first and then bisecting.

Each attempt is a real generation of a few tokens. It does not fit when the device runs out of memory, or when a memory
budget is given and the attempt's measured use exceeds it: on CUDA the allocator's peak, on a CPU the bytes of weights
and of the KV cache (a process's resident set keeps what earlier attempts freed, so it cannot be used).
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from generation import WARMUP_TOKENS, HFCache, generate, made_prompt
from models import LoadedModel
from run_specs import RunSpec
from utils import is_out_of_memory

FIRST_ATTEMPT = 128
LONGEST_ATTEMPT = 2**20
RESOLUTION = 32  # tokens between the longest that fits and the shortest that does not


@dataclass(frozen=True)
class Attempt:
    """One context tried; `used_mb` is None where it ended in out-of-memory."""

    context_tokens: int
    fits: bool
    used_mb: float | None


@dataclass(frozen=True)
class MaxContext:
    """The answer. `limited_by` is `"memory"`, `"positions"` if memory held out to the model's last position, or
    `"search"` if it held out as far as the search goes for a model without a last one."""

    context_tokens: int
    limited_by: str
    budget_mb: float | None
    attempts: list[Attempt]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def find_max_context(
    spec: RunSpec, model: LoadedModel, budget_mb: float | None, on_attempt: Callable[[Attempt], None]
) -> MaxContext:
    """Search the longest context that fits.

    Args:
        spec: model, cache implementation and batch size; its context length is not used.
        budget_mb: MiB for weights and KV cache; needed on a CPU, where nothing else stops the search in time.
        on_attempt: told of each attempt.

    Raises:
        ValueError: no budget on a CPU, or not even the shortest context fits.
    """
    if budget_mb is None and model.device.type != "cuda":
        raise ValueError(
            "--find-max-context on a CPU needs --memory-budget-mb: the machine would swap before it says no"
        )
    attempts: list[Attempt] = []

    def fits(length: int) -> bool:
        attempt = _attempt(spec, model, length, budget_mb)
        attempts.append(attempt)
        on_attempt(attempt)
        return attempt.fits

    limit = (model.shape.max_positions or LONGEST_ATTEMPT) - WARMUP_TOKENS
    longest, shortest_too_long = 0, limit + 1
    length = min(FIRST_ATTEMPT, limit)
    while longest < length:
        if not fits(length):
            shortest_too_long = length
            break
        longest, length = length, min(2 * length, limit)
    while shortest_too_long - longest > RESOLUTION and longest < limit:
        middle = (longest + shortest_too_long) // 2
        if fits(middle):
            longest = middle
        else:
            shortest_too_long = middle
    if longest == 0:
        raise ValueError(f"not even {RESOLUTION} tokens of context fit into the memory there is")
    reason = "memory" if longest < limit else "positions" if model.shape.max_positions else "search"
    return MaxContext(longest, reason, budget_mb, attempts)


def _attempt(spec: RunSpec, model: LoadedModel, length: int, budget_mb: float | None) -> Attempt:
    prompt = made_prompt(spec, model, length)
    cache = HFCache(spec.cache_implementation or "dynamic", model)
    generation = None
    try:
        generation = generate(replace(spec, context_length=length), model, cache, prompt, WARMUP_TOKENS)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    if generation is None:  # only here has the error let go of the tensors that did not fit
        _free()
        return Attempt(length, False, None)
    used_mb = generation.memory["gpu_peak_mb"]
    if used_mb is None:
        used_mb = (model.model.get_memory_footprint() + cache.memory()["device_kv_bytes"]) / 2**20
    return Attempt(length, budget_mb is None or used_mb <= budget_mb, used_mb)


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
