"""Meeting transformers: how attention of a Hugging Face model comes to run over pages.

In transformers an attention layer first calls `cache.update(keys, values, layer)` and then an attention function chosen
by name from a registry. The cache never sees the query, and the attention function never sees the cache. Three small
pieces bridge that, without touching the model's code:

* `update` of an attached cache leaves a note of which layer is next (`hand_over`), for the thread it runs in;
* an attention function, registered as `paged_kv`, takes the note and lets that layer attend to its pages;
* a mask function is registered under the same name, as transformers builds no mask, not even for padding, for a name
  that has none. Causality needs no mask here: earlier pages are seen whole, and a chunk sees itself causally.

`attached(model)` switches a model to that attention function and back. A model that does not route its attention
through the registry is refused.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

IMPLEMENTATION = "paged_kv"
REFUSED_FEATURES = ("softcap", "s_aux", "sinks", "position_bias", "head_mask")


class CannotPage(ValueError):
    """This model, or this layer of it, cannot run with a paged cache; the message says why."""


class AttendsToPages(Protocol):
    """A cache layer that computes its own attention."""

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        allowed: torch.Tensor | None,
        scale: float,
    ) -> torch.Tensor: ...


class _Pending(threading.local):
    """The layer whose attention has to come next in this thread: its index, and None for a layer that is not paged."""

    note: tuple[int, AttendsToPages | None] | None = None


_pending = _Pending()


def hand_over(layer_idx: int, layer: AttendsToPages | None) -> None:
    """Announce that layer `layer_idx` was updated and its attention comes next."""
    if _pending.note is not None:
        missed = _pending.note[0]
        _pending.note = None
        raise CannotPage(
            f"attention of layer {missed} did not go through transformers' AttentionInterface,"
            " so its pages were never read; use the cache without attaching it"
        )
    _pending.note = (layer_idx, layer)


def paged_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function of an attached model.

    Args:
        query: [B, H, T, D].
        key, value: [B, K, T, D], the new positions only; earlier ones are in pages.
        attention_mask: bool [B, 1, 1 or T, all positions so far], or None.

    Returns:
        [B, T, H, D], and None in place of attention weights.
    """
    note, _pending.note = _pending.note, None
    layer_idx = getattr(module, "layer_idx", None)
    if note is None or note[0] != layer_idx:
        raise CannotPage(
            f"layer {layer_idx} attends without its paged cache: pass the attached cache as past_key_values, or detach"
        )
    for feature in REFUSED_FEATURES:
        if kwargs.get(feature) is not None:
            raise CannotPage(f"{type(module).__name__} uses {feature}, which paged attention does not compute")
    layer = note[1]
    if layer is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if dropout:
        raise CannotPage("paged attention is for inference; call model.eval() first")
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        raise CannotPage("paged attention takes boolean masks only, not an additive 4D mask")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    out = layer.attend(query, key, value, attention_mask, scale)
    return out.transpose(1, 2).contiguous(), None


def paged_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """The mask of an attached model: None, or padding alone as bool [B, 1, 1, kv_length], for plain causal attention.

    Any other pattern (a sliding window, packed sequences) gets the full mask that scaled dot-product attention gets.
    """
    if mask_function is not causal_mask_function:
        return sdpa_mask(
            batch_size,
            q_length,
            kv_length,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            **kwargs,
        )
    if attention_mask is None:
        return None
    padding = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
    return None if padding.all() else padding[:, None, None, :]


AttentionInterface.register(IMPLEMENTATION, paged_attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, paged_mask)


@contextmanager
def attached(model: PreTrainedModel) -> Iterator[None]:
    """Run the model's attention through `paged_attention_forward` inside the block; restored on any exit.

    Raises:
        CannotPage: the model does not choose its attention function by name.
    """
    if not getattr(model, "_supports_attention_backend", False):
        raise CannotPage(
            f"{type(model).__name__} does not route attention through transformers' AttentionInterface, so attention"
            " cannot run over pages; the cache still works without attaching it"
        )
    before = model.config._attn_implementation
    model.set_attn_implementation(IMPLEMENTATION)
    try:
        yield
    finally:
        _pending.note = None
        model.set_attn_implementation(before)
