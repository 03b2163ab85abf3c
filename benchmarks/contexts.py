"""One context in many caches: a prompt is read once, and its keys and values are poured into every contestant.

So contestants hold the same context, bit for bit, and a benchmark of decoding spends no hours on prefill. A cache takes
them through `update`, as a model gives them; from then on it works as after a prefill of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import Cache, DynamicCache, StaticCache

from contest import milliseconds
from kv_paging import PagedKVCache
from metrics import Timing
from models import LoadedModel
from predictive_prefetch import PrefetchingKVCache
from workloads import prompt_tokens

PREFILL_CHUNK = 2048  # bounds the memory of a long prompt's activations


@dataclass(frozen=True)
class Context:
    """A prompt that has been read, and how it goes on.

    Attributes:
        n_tokens: positions.
        keys_values: for each layer keys and values, each [1, K, n_tokens, D].
        continuation: [n] the tokens that transformers' own cache goes on with, greedily.
    """

    n_tokens: int
    keys_values: list[tuple[torch.Tensor, torch.Tensor]]
    continuation: torch.Tensor

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values of all layers."""
        return sum(keys.nbytes + values.nbytes for keys, values in self.keys_values)

    def poured_into(self, cache: Any) -> Any:
        """The cache, holding this context."""
        for layer, (keys, values) in enumerate(self.keys_values):
            cache.update(keys.clone(), values.clone(), layer)
        if isinstance(cache, PagedKVCache):
            cache.prompt_tokens = self.n_tokens
        return cache


def read_context(model: LoadedModel, n_tokens: int, n_new: int, seed: int = 0) -> Context:
    """Read a prompt of prose (or of random ids, where there is no tokenizer) with transformers' own cache."""
    prompt = prompt_tokens(model.tokenizer, model.shape.vocab_size, n_tokens, 1, seed)
    ids = torch.tensor(prompt, device=model.device)
    cache = DynamicCache(config=model.model.config)
    with torch.inference_mode():
        for chunk in ids.split(PREFILL_CHUNK, dim=1):
            logits = model.model(chunk, past_key_values=cache, logits_to_keep=1).logits
        keys_values = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
        tokens = [logits[0, -1].argmax()]
        for _ in range(n_new):
            logits = model.model(tokens[-1].reshape(1, 1), past_key_values=cache, logits_to_keep=1).logits
            tokens.append(logits[0, -1].argmax())
    return Context(n_tokens, keys_values, torch.stack(tokens))


@dataclass
class Decoder:
    """A contestant in decoding: a cache with the context, which is fed the context's continuation.

    Every contestant gets the same tokens, whatever it would have chosen itself; what it would have chosen is kept, to
    be compared.

    Attributes:
        position: tokens of the continuation that it has been fed.
        chosen: the token that it found likeliest, after each of them.
    """

    model: LoadedModel
    context: Context
    cache: Cache
    position: int = 0
    chosen: list[torch.Tensor] = field(default_factory=list)

    def attached(self) -> AbstractContextManager:
        """The context manager in which the model uses this cache."""
        return self.cache.attached(self.model.model) if isinstance(self.cache, PagedKVCache) else nullcontext()

    def decode(self, n_tokens: int) -> float:
        """Feed one token, and then `n_tokens` under the clock; returns the milliseconds for each of these.

        The first is not measured, as the contestant before it has filled the processor's caches with its own, and a
        predictor sees the model's modules at work for the first time since it was attached.
        """
        end = self.position + 1 + n_tokens
        if end > len(self.context.continuation) - 1:
            raise ValueError(f"the continuation has only {len(self.context.continuation) - 1} tokens")
        ids = self.context.continuation[self.position : end].reshape(-1, 1, 1)
        with self.attached(), torch.inference_mode():
            self._feed(ids[:1])
            taken = milliseconds(lambda: self._feed(ids[1:]), self.model.device)
        self.position = end
        return taken / n_tokens

    def _feed(self, ids: torch.Tensor) -> None:
        for token in ids:
            logits = self.model.model(token, past_key_values=self.cache, logits_to_keep=1).logits
            self.chosen.append(logits[0, -1].argmax())

    def paging(self) -> dict[str, Any]:
        """What its paged cache did in all decode steps, once the device is done with them: `Recorder.snapshot`, with
        `transfer_ms`, the time its link was busy, and `hidden_transfer_share`, the share of that not waited for."""
        untimed = Timing.from_token_times([], batch_size=1, clock="none")
        figures = self.cache.figures(untimed)["cache"]
        link = {name: figures[name] for name in ("transfer_ms", "hidden_transfer_share")}
        return self.cache.recorder.snapshot("decode") | link

    def agreement(self) -> tuple[int, int]:
        """How many of its choices are those of transformers' own cache, and of how many."""
        theirs = self.context.continuation[1 : len(self.chosen) + 1]
        return int((torch.stack(self.chosen) == theirs).sum()), len(self.chosen)


def hf_caches(model: LoadedModel, n_positions: int) -> dict[str, Callable[[], Cache]]:
    """transformers' own caches that work on this device, by name."""
    config = model.model.config
    caches: dict[str, Callable[[], Cache]] = {
        "HF dynamic": lambda: DynamicCache(config=config),
        "HF static": lambda: StaticCache(config=config, max_cache_len=n_positions),
    }
    if model.device.type == "cuda":
        caches["HF offloaded"] = lambda: DynamicCache(config=config, offloading=True)
    return caches


def paged(model: LoadedModel, n_positions: int, predictor: str | None = None, **settings: Any) -> PagedKVCache:
    """A paged cache whose memory is allocated for `n_positions`; with a predictor it copies ahead."""
    config, shape = model.model.config, model.shape
    if predictor is None:
        cache = PagedKVCache(config, **settings)
    else:
        cache = PrefetchingKVCache(config, predictor=predictor, **settings)
    cache.allocate(model.model, 1, shape.n_kv_heads, shape.head_dim, n_positions)
    return cache


def pages_of(n_positions: int, page_size: int) -> int:
    """Pages that so many positions take."""
    return -(-n_positions // page_size)
