"""Meeting transformers: how attention of a Hugging Face model comes to run over pages.

In transformers an attention layer first calls `cache.update(keys, values, layer)` and then an attention function chosen
by name from a registry. The cache never sees the query, and the attention function never sees the cache. Three small
pieces bridge that, without touching the model's code:

* `update` of an attached cache leaves a note of which layer is next (`hand_over`), for the thread it runs in;
* an attention function, registered as `paged_kv`, takes the note and lets that layer attend to its pages;
* a mask function is registered under the same name, as transformers builds no mask, not even for padding, for a name
  that has none. Causality needs no mask here: earlier pages are seen whole, and a chunk sees itself causally.

What a model asks of attention is honoured or refused by name, never dropped: a soft cap and attention sinks are
computed; a mask that is more than causality and padding, or a keyword argument that nobody here knows, is refused.

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

from paged_attention import attention_with_sinks

IMPLEMENTATION = "paged_kv"

# Keyword arguments of a model's forward pass that models hand on to the attention function, and that say nothing about
# the scores: positions are in the keys already, and the others choose what the model returns. All others (such as
# `position_bias`, `head_mask`, the sparse `indices` of DeepSeek-V3.2, the `cu_seq_lens_q` of packed sequences, and what
# later models bring) change the result, or may.
HARMLESS = frozenset(
    {
        "position_ids",
        "cache_position",
        "position_embeddings",
        "use_cache",
        "return_dict",
        "logits_to_keep",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
    }
)


class CannotPage(ValueError):
    """This model, or this layer of it, cannot run with a paged cache; the message says why."""


class AttendsToPages(Protocol):
    """A cache layer that computes its own attention.

    Attributes:
        attention: the model's module that attends with it, once it has.
    """

    attention: torch.nn.Module | None

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        allowed: torch.Tensor | None,
        scale: float,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor: ...


class _Pending(threading.local):
    """What this thread is about to do.

    Attributes:
        note: the layer whose attention has to come next: its index, and None for a layer that is not paged.
        only_asking: whether a module is called for its query alone (`query_of`).
    """

    note: tuple[int, AttendsToPages | None] | None = None
    only_asking: bool = False


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


def take_back() -> None:
    """Forget a note that an interrupted forward pass of this thread has left."""
    _pending.note = None


class _Query(Exception):
    """Ends the call of an attention module where it would attend."""

    def __init__(self, query: torch.Tensor, scale: float):
        self.query, self.scale = query, scale


def only_asking() -> bool:
    """Whether this thread is inside `query_of`, where caches keep nothing."""
    return _pending.only_asking


def query_of(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[torch.Tensor, float]:
    """The query [B, H, T, D] that an attention module would attend with, if called so, and the factor on its scores.

    It is `forward` that is called, so no hooks of torch run (accelerate's, which bring offloaded weights, do); an
    attached cache among the arguments keeps nothing.

    Raises:
        CannotPage: the module did not come to attend through transformers' AttentionInterface.
    """
    _pending.only_asking = True
    try:
        module.forward(*args, **kwargs)
    except _Query as asked:
        return asked.query, asked.scale
    finally:
        _pending.only_asking = False
    raise CannotPage(f"{type(module).__name__} did not attend through transformers' AttentionInterface")


def paged_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function of an attached model.

    Args:
        query: [B, H, T, D].
        key, value: [B, K, T, D], the new positions only; earlier ones are in pages. All positions of its window for a
            layer with a sliding window, which is not paged.
        attention_mask: what `paged_mask` makes, or None.
        scaling: factor on the scores; 1 / sqrt(D) if None.
        sliding_window: of a layer that is not paged; its mask already says so.
        softcap: bound on the scores (Gemma 2).
        s_aux: attention sinks [H] (gpt-oss).
        kwargs: what else the model passes.

    Returns:
        [B, T, H, D], and None in place of attention weights.

    Raises:
        CannotPage: the note of this layer is missing, or the model asks for what is not computed here.
    """
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if _pending.only_asking:
        raise _Query(query, scale)
    note, _pending.note = _pending.note, None
    layer_idx = getattr(module, "layer_idx", None)
    where = f"layer {layer_idx} ({type(module).__name__})"
    if note is None:
        raise CannotPage(
            f"{where} attends without its paged cache: pass the attached cache as past_key_values, or detach;"
            " a model that attends twice to what it caches once cannot be attached"
        )
    if note[0] != layer_idx:
        raise CannotPage(f"{where} attends to what it cached as layer {note[0]}; such a model cannot be attached")
    for name, value_given in kwargs.items():
        if name not in HARMLESS and value_given is not None and value_given is not False:
            raise CannotPage(f"{where} uses {name}, which paged attention does not compute")
    if dropout:
        raise CannotPage(f"{where} drops out attention, and paged attention is for inference; call model.eval() first")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise CannotPage(f"{where} is not causal, and paged attention is")
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        raise CannotPage(f"{where} got an additive mask ({attention_mask.dtype}); paged attention takes boolean masks")
    layer = note[1]
    if layer is None:
        return _attend_window(module, query, key, value, attention_mask, scale, softcap, s_aux), None
    if sliding_window is not None:
        raise CannotPage(f"{where} has a sliding window of {sliding_window}, but its cache layer holds every position")
    if attention_mask is not None and (attention_mask.shape[1] != 1 or attention_mask.shape[2] != 1):
        raise CannotPage(
            f"{where} got a mask {tuple(attention_mask.shape)} that differs between queries or heads (packed sequences,"
            " a bidirectional prefix, a custom 4D mask); over pages attention is causal, with padding at most"
        )
    layer.attention = module
    out = layer.attend(query, key, value, attention_mask, scale, softcap, s_aux)
    return out.transpose(1, 2).contiguous(), None


def _attend_window(module, query, key, value, allowed, scale, softcap, sinks) -> torch.Tensor:
    """Attention of a layer that is not paged, over all the keys it keeps; [B, T, H, D].

    By transformers' own function, unless it would refuse the soft cap, or drop the sinks.
    """
    length, n_keys = query.shape[2], key.shape[2]
    if length > 1 and (allowed is None or allowed.shape[2] == 1):  # plain causal attention, and padding at most
        causal = torch.ones(length, n_keys, dtype=torch.bool, device=query.device).tril(n_keys - length)
        allowed = causal[None, None] if allowed is None else causal & allowed
    if softcap is None and sinks is None:
        return sdpa_attention_forward(module, query, key, value, allowed, scaling=scale)[0]
    out = attention_with_sinks(query, key, value, sinks, scale=scale, allowed=allowed, softcap=softcap)
    return out.to(query.dtype).transpose(1, 2).contiguous()


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

    Any other pattern (a sliding window, a bidirectional prefix) gets the full mask that scaled dot-product attention
    gets, [B, 1, q_length, kv_length]; only a layer that is not paged can use it.

    Raises:
        CannotPage: `attention_mask` [B, positions] is shorter than the context.
    """
    if mask_function is not causal_mask_function:
        # Left out, a mask means causal attention, so none may be left out because everything is to be seen.
        kwargs["allow_is_bidirectional_skip"] = False
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
    if attention_mask.shape[-1] < kv_offset + kv_length:
        raise CannotPage(
            f"the attention mask covers {attention_mask.shape[-1]} positions, but the context has"
            f" {kv_offset + kv_length}; pass one for past and new tokens together"
        )
    padding = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
    return None if padding.all() else padding[:, None, None, :]


AttentionInterface.register(IMPLEMENTATION, paged_attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, paged_mask)


# How often a model is attached now, and the attention it had before; by the identity of its config, which all parts of
# a model share. Guarded by the lock, as several caches may use one model in several threads.
_attachments: dict[int, tuple[int, str]] = {}
_attaching = threading.Lock()


@contextmanager
def attached(model: PreTrainedModel) -> Iterator[None]:
    """Run the model's attention through `paged_attention_forward` inside the block; restored on any exit.

    A model may be attached several times at once, nested or from several threads: the first switches its attention, and
    the last to leave restores it, in whatever order they leave.

    Raises:
        CannotPage: the model does not choose its attention function by name.
    """
    if not getattr(model, "_supports_attention_backend", False):
        raise CannotPage(
            f"{type(model).__name__} does not route attention through transformers' AttentionInterface, so attention"
            " cannot run over pages; the cache still works without attaching it"
        )
    config = model.config  # held on to, so that its identity stays its own
    with _attaching:
        count, before = _attachments.get(id(config), (0, config._attn_implementation))
        if count == 0:
            model.set_attn_implementation(IMPLEMENTATION)
        _attachments[id(config)] = count + 1, before
    try:
        yield
    finally:
        take_back()
        with _attaching:
            count, before = _attachments.pop(id(config))
            if count > 1:
                _attachments[id(config)] = count - 1, before
            else:
                model.set_attn_implementation(before)
