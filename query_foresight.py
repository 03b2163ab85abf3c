"""What a later layer would ask for: its query, estimated from the input of the layer that attends now.

A transformer layer adds to the residual stream, and mostly adds little, so the input of one layer's attention is near
to that of the next. Given the input of this layer, the next layer's own attention module therefore computes a query
near to the one that it is going to ask with (InfiniGen, Lee et al., OSDI 2024, https://arxiv.org/abs/2406.19707).

How a module makes a query differs from model to model: separate or fused projections, norms on heads, rotary positions.
So nothing of it is rebuilt here. The later module itself is called with the arguments that this layer's module was
called with, and the call ends where it would attend (`hf_attention.query_of`); its keys and values are not kept.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

import hf_attention


class QueryForesight:
    """The queries that layers would ask with, for the decode steps of one cache.

    Args:
        cache: whose forward passes are watched; several caches may run on one model.
    """

    def __init__(self, cache: Any):
        self._cache = weakref.ref(cache)
        self._calls: dict[torch.nn.Module, tuple[tuple, dict[str, Any]]] = {}
        self._queries: dict[torch.nn.Module, tuple[torch.nn.Module, tuple[torch.Tensor, float]]] = {}

    @contextmanager
    def watching(self, model: torch.nn.Module) -> Iterator[None]:
        """Note what the model's attention modules are called with, inside the block."""
        # Those of a decoder layer that also knows its index are noted with them, and never looked up.
        hooks = [
            module.register_forward_pre_hook(self._note, with_kwargs=True)
            for module in model.modules()
            if isinstance(getattr(module, "layer_idx", None), int)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._calls.clear()
            self._queries.clear()

    def _note(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any] | None = None) -> None:
        if kwargs is None:  # of another thread, as a hook is there for a moment before it is one that gets them
            return
        given = (*args, *kwargs.values())
        if not any(value is self._cache() for value in given):
            return
        self._queries.pop(module, None)
        states = [value for value in given if isinstance(value, torch.Tensor) and value.dim() == 3]
        if states and states[0].shape[1] == 1:
            self._calls[module] = args, kwargs
        else:  # a whole prompt's states are not worth their memory, and the call before it is past
            self._calls.pop(module, None)

    def query(self, of: torch.nn.Module | None, given_to: torch.nn.Module | None) -> tuple[torch.Tensor, float] | None:
        """The query [B, H, 1, D] of an attention module, and the factor on its scores, if its input were that of
        another; None where one of them has not been seen at work."""
        if of is None or given_to not in self._calls:
            return None
        asked, found = self._queries.get(given_to, (None, None))
        if asked is not of:  # once for all rows of a batch
            args, kwargs = self._calls[given_to]
            found = hf_attention.query_of(of, args, kwargs)
            self._queries[given_to] = of, found
        return found
