"""Attention over pages, exactly: part by part, then merged by log-sum-exp.

Keys carry their position (RoPE or learned) before they are cached, so attention does not care in which order keys come.
A query's attention over a set of keys can therefore be computed part by part, in any order and at different times, and
put together afterwards. With o_p the output of part p and l_p the log of the sum of its exponentiated scores,

    o = sum_p w_p o_p,    w_p = exp(l_p) / sum_q exp(l_q),

which is softmax over the pages' log-sum-exps (Milakov and Gimelshein 2018, https://arxiv.org/abs/1805.02867; used per
block by FlashAttention, Dao et al. 2022, https://arxiv.org/abs/2205.14135). The weight w_p *is* part p's share of the
attention: where parts are pages, what a predictor needs comes free.

The parts, a page or several pages each, are the batch dimension of one fused kernel call. The log-sum-exp comes from
PyTorch's fused kernels, whose operators are private, so they are called in one place, `attention_with_lse`, with a
plain fallback beside it.

Two variations of attention fit in without approximation. A soft cap bends each score by itself, so it is applied inside
each part. An attention sink, a learned logit in the softmax's denominator that has no value, is one more part to merge:
its log-sum-exp is the logit and its output is 0 (`sink_part`).

Shapes: B sequences, H query heads, K key/value heads, G = H / K, T query positions, P positions of a page, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

NEGATIVE_INFINITY = float("-inf")
MOST_ROWS_APART = 16  # query rows of a key/value head that may be taken one by one
MAX_SCORES = 2**24  # that plain attention holds at a time: 64 MiB in float32, a few times over


@dataclass
class Partial:
    """Attention over some of the keys.

    Attributes:
        out: [..., T, D], normalised over the keys seen so far, float32.
        lse: [..., T], log-sum-exp of the scaled scores of those keys, float32; -inf where no key was allowed.
    """

    out: torch.Tensor
    lse: torch.Tensor


def attention_with_lse(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    causal: bool = False,
    allowed: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
) -> Partial:
    """Fused scaled dot-product attention that also returns the log-sum-exp.

    Args:
        query: [N, H, T, D].
        key, value: [N, K, S, D], K dividing H.
        scale: factor on the scores.
        causal: query i sees keys 0..i (T == S).
        allowed: bool, broadcastable to [N, 1, T, S]; True where a key may be seen. Not together with `causal`.
        bias: the same as numbers in the query's dtype, 0 where a key may be seen and else -inf, of one shape with the
            scores, for who can say that every query sees a key: that costs nothing, and `allowed` has to be read.
        softcap: bounds the scaled scores s smoothly, softcap * tanh(s / softcap), as in Gemma 2
            (https://arxiv.org/abs/2408.00118); no fused kernel does that, so it takes the plain path.
    """
    masked = allowed is not None or bias is not None
    fused = None if softcap is not None else _fused_kernel(query, value, masked)
    if fused is None:
        seen = allowed if bias is None else bias == 0
        out, lse = plain_attention_with_lse(query, key, value, scale, causal, seen, softcap)
    else:
        out, lse = fused(query, key, value, scale, causal, bias if allowed is None else _bias_of(allowed, query, key))
    if allowed is not None:
        # The kernels give rows without any allowed key an arbitrary finite log-sum-exp.
        lse = lse.masked_fill(~allowed.any(-1).expand_as(lse), NEGATIVE_INFINITY)
    return Partial(out.float(), lse.float())


def takes_bias(device: torch.device) -> bool:
    """Whether the fused kernel of a device can leave keys out."""
    return device.type == "cpu"


def _bias_of(allowed: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    bias = torch.zeros(allowed.shape, dtype=query.dtype, device=query.device)
    bias = bias.masked_fill(~allowed, NEGATIVE_INFINITY)
    return bias.expand(query.shape[0], 1, query.shape[2], key.shape[2])


def _fused_kernel(query: torch.Tensor, value: torch.Tensor, masked: bool):
    """The fused kernel that serves these inputs, or None."""
    if query.shape[-1] != value.shape[-1]:
        return None
    if query.device.type == "cpu":
        return _cpu_flash
    if query.device.type != "cuda" or masked or query.shape[-1] % 8 or query.shape[-1] > 256:
        return None
    if query.dtype is torch.float32:
        return _cuda_efficient
    if torch.cuda.get_device_capability(query.device) >= (8, 0):
        return _cuda_flash
    return _cuda_efficient if query.dtype is torch.float16 else None  # before Ampere: no flash kernel, no bfloat16


def _cpu_flash(query, key, value, scale, causal, bias):
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, causal, attn_mask=bias, scale=scale
    )


def _cuda_flash(query, key, value, scale, causal, bias):
    key, value = _repeat_heads(query, key, value)
    result = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, False, scale=scale)
    return result[0], result[1]


def _cuda_efficient(query, key, value, scale, causal, bias):
    key, value = _repeat_heads(query, key, value)
    out, lse, _, _ = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, None, True, 0.0, causal, scale=scale
    )
    return out, lse[..., : query.shape[2]]  # the kernel pads T to a multiple of 32


def plain_attention_with_lse(query, key, value, scale, causal, allowed, softcap=None):
    """The definition of attention, in float32; the reference for the fused kernels and the fallback where none fits.

    The scores of all queries at once would take far more memory than keys and values do, so a long prompt's queries
    are taken some at a time.
    """
    key, value = (states.float() for states in _repeat_heads(query, key, value))
    length = query.shape[2]
    per_block = max(1, MAX_SCORES // (query.shape[0] * query.shape[1] * key.shape[2]))
    blocks = []
    for start in range(0, length, per_block):
        rows = slice(start, min(start + per_block, length))
        seen = allowed
        if causal:
            seen = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()[rows]
        elif allowed is not None and allowed.shape[2] > 1:
            seen = allowed[:, :, rows]
        blocks.append(_plain_block(query[:, :, rows], key, value, scale, seen, softcap))
    if len(blocks) == 1:
        return blocks[0]
    outs, lses = zip(*blocks, strict=True)
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)


def _plain_block(query, key, value, scale, allowed, softcap):
    scores = (query.float() @ key.transpose(-1, -2)) * scale  # [N, H, T, S]
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, NEGATIVE_INFINITY)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse.unsqueeze(-1)).nan_to_num(0.0)  # -inf - -inf: no key was allowed
    return weights @ value, lse


def _repeat_heads(query, key, value):
    groups = query.shape[1] // key.shape[1]
    if groups == 1:
        return key, value
    return key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)


def attention_with_sinks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None,
    *,
    scale: float,
    allowed: torch.Tensor | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Attention over keys that are all in one place: [N, H, T, D], float32.

    Args:
        sinks: [H], see `sink_part`; None for none.
        query, key, value, scale, allowed, softcap: as in `attention_with_lse`.
    """
    part = attention_with_lse(query, key, value, scale=scale, allowed=allowed, softcap=softcap)
    if sinks is None:
        return part.out
    # The merge of two parts, of which the sink's output is 0: exp(lse) / (exp(lse) + exp(sink)) of the other is left.
    return part.out * torch.sigmoid(part.lse - sinks.float()[:, None]).unsqueeze(-1)


def group_heads(query: torch.Tensor, n_kv_heads: int) -> torch.Tensor:
    """[B, H, T, D] -> [B, K, G*T, D]: the query heads that share a key/value head become rows of one attention."""
    batch, heads, length, head_dim = query.shape
    return query.reshape(batch, n_kv_heads, heads // n_kv_heads * length, head_dim)


def ungroup_heads(out: torch.Tensor, n_heads: int) -> torch.Tensor:
    """[B, K, G*T, D] -> [B, H, T, D], the inverse of `group_heads`."""
    batch, n_kv_heads, rows, head_dim = out.shape
    return out.reshape(batch, n_heads, rows * n_kv_heads // n_heads, head_dim)


def attend_parts(
    grouped_query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    scale: float,
    allowed: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
) -> Partial:
    """Attention of one sequence's query over each of n parts of the context separately, such as pages.

    Args:
        grouped_query: [1, K, R, D], R = G*T rows.
        keys, values: [n, K, S, D].
        allowed: bool [n, 1, R or 1, S], or None.
        bias: [n, 1, 1, S], or None; this and `softcap` as in `attention_with_lse`.

    Returns:
        A Partial with out [n, K, R, D] and lse [n, K, R].
    """
    n_parts, (n_kv_heads, n_rows, head_dim) = keys.shape[0], grouped_query.shape[1:]
    if allowed is None and rows_apart(n_parts, n_kv_heads, n_rows, keys.device):
        query = grouped_query.reshape(1, n_kv_heads * n_rows, 1, head_dim).expand(n_parts, -1, -1, -1)
        part = attention_with_lse(query, keys, values, scale=scale, bias=bias, softcap=softcap)
        shape = n_parts, n_kv_heads, n_rows
        return Partial(part.out.reshape(*shape, head_dim), part.lse.reshape(shape))
    query = grouped_query.expand(n_parts, -1, -1, -1)
    if bias is not None:
        bias = bias.expand(-1, -1, n_rows, -1)
    return attention_with_lse(query, keys, values, scale=scale, allowed=allowed, bias=bias, softcap=softcap)


def rows_apart(n_parts: int, n_kv_heads: int, n_rows: int, device: torch.device) -> bool:
    """Whether the rows of a key/value head are better taken one by one: a CPU's kernel shares out parts and heads among
    the threads, and few of them leave threads idle."""
    few = n_parts * n_kv_heads < 2 * torch.get_num_threads()
    return few and n_rows <= MOST_ROWS_APART and device.type == "cpu"


def sink_part(sinks: torch.Tensor, like: Partial) -> Partial:
    """What attention sinks add to a merge: a key that every row sees with the score `sinks[head]`, and no value.

    Merged once, beside the pages, it takes its share of the softmax and gives nothing for it, as in gpt-oss
    (https://arxiv.org/abs/2508.10925); with logits of 0 it is the zero sink of Xiao et al. 2023
    (https://arxiv.org/abs/2309.17453).

    Args:
        sinks: [H], one logit per query head.
        like: a part that it will be merged with: out [n, K, R, D], rows as `group_heads` makes them.

    Returns:
        A Partial with out [1, K, R, D] and lse [1, K, R].
    """
    n_kv_heads, n_rows, _ = like.out.shape[1:]
    group = sinks.numel() // n_kv_heads
    lse = sinks.to(like.lse).reshape(1, n_kv_heads, group, 1).expand(-1, -1, -1, n_rows // group)
    return Partial(torch.zeros_like(like.out[:1]), lse.reshape(1, n_kv_heads, n_rows))


def merge(parts: Sequence[Partial]) -> Partial:
    """Put together attention over disjoint sets of keys, so that more can be merged with it.

    Args:
        parts: each with out [n_i, K, R, D] and lse [n_i, K, R].

    Returns:
        A Partial with out [1, K, R, D] and lse [1, K, R]; rows that saw no key at all are 0, their lse -inf.
    """
    together = side_by_side(parts)
    if together.lse.shape[0] == 1:
        return together
    return Partial(merged_output(together), torch.logsumexp(together.lse, dim=0, keepdim=True))


def side_by_side(parts: Sequence[Partial]) -> Partial:
    """Parts as one, not merged: out [n, K, R, D] and lse [n, K, R], n the sum of theirs."""
    if len(parts) == 1:
        return parts[0]
    return Partial(torch.cat([part.out for part in parts]), torch.cat([part.lse for part in parts]))


def merged_output(together: Partial, all_see: bool = False) -> torch.Tensor:
    """The output of n parts merged, [1, K, R, D], for when nothing is left to be merged with it; `all_see` says that
    every row saw a key."""
    if together.lse.shape[0] == 1:
        return together.out
    weights = together.lse.softmax(0)
    if not all_see:
        weights = weights.nan_to_num(0.0)  # of a row that saw no key it is NaN
    return (weights.unsqueeze(-1) * together.out).sum(0, keepdim=True)


def page_mass(lse: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """Share of the attention that each page received, averaged over heads and query rows.

    Args:
        lse: [n, K, R] of the pages.
        total: [1, K, R] of the whole context.

    Returns:
        [n] float32; over all pages of the context it sums to 1, or to what an attention sink in the total left over.
    """
    return torch.exp(lse - total).nan_to_num(0.0).mean(dim=(1, 2))
