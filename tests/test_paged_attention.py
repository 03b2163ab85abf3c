"""Attention over pages, in any order and at different times, is attention."""

from __future__ import annotations

import math
import random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import paged_attention
from paged_attention import (
    Partial,
    attend_parts,
    attention_with_lse,
    attention_with_sinks,
    group_heads,
    merge,
    page_mass,
    plain_attention_with_lse,
    sink_part,
    ungroup_heads,
)

HEADS = [(4, 4), (4, 2), (6, 1)]  # query heads, key/value heads: one each, grouped, all sharing one
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}  # 8, 11 and 24 bits of mantissa


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def states(n: int, heads: tuple[int, int], n_queries: int, n_keys: int, head_dim: int, seed: int = 0):
    """Random (query, key, value)."""
    n_heads, n_kv_heads = heads
    query = draw(n, n_heads, n_queries, head_dim, seed=seed)
    return query, *(draw(n, n_kv_heads, n_keys, head_dim, seed=seed + more) for more in (1, 2))


def softmax_by_hand(query, key, value, scale, allowed=None, softcap=None, sinks=None):
    """Attention, head by head and row by row, in float64: (out, weights)."""
    n, n_heads, n_queries, head_dim = query.shape
    group = n_heads // key.shape[1]
    out = torch.zeros(n, n_heads, n_queries, head_dim, dtype=torch.float64)
    weights = torch.zeros(n, n_heads, n_queries, key.shape[2], dtype=torch.float64)
    for one in range(n):
        for head in range(n_heads):
            for row in range(n_queries):
                scores = [scale * float(query[one, head, row].double() @ k.double()) for k in key[one, head // group]]
                if softcap is not None:
                    scores = [softcap * math.tanh(score / softcap) for score in scores]
                seen = [s for s in range(len(scores)) if allowed is None or bool(allowed[one, 0, row, s])]
                total = sum(math.exp(scores[s]) for s in seen)
                total += 0.0 if sinks is None else math.exp(sinks[head])
                for s in seen:
                    weights[one, head, row, s] = math.exp(scores[s]) / total
                    out[one, head, row] += weights[one, head, row, s] * value[one, head // group, s].double()
    return out, weights


def agree(part: Partial, out: torch.Tensor, lse: torch.Tensor | None = None, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(part.out.cpu(), out.float().cpu(), atol=tolerance, rtol=tolerance)
    if lse is not None:
        torch.testing.assert_close(part.lse.cpu(), lse.float().cpu(), atol=tolerance, rtol=tolerance)


# --- one call -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_the_plain_fallback_is_attention_by_its_definition(heads):
    query, key, value = states(2, heads, n_queries=3, n_keys=5, head_dim=4)
    allowed = draw(2, 1, 3, 5, seed=9) > -0.5
    out, lse = plain_attention_with_lse(query, key, value, 0.3, False, allowed)
    expected, _ = softmax_by_hand(query, key, value, 0.3, allowed)
    agree(Partial(out, lse), expected)
    scores = 0.3 * query @ key.repeat_interleave(heads[0] // heads[1], 1).transpose(-1, -2)
    by_hand = torch.where(allowed, scores.exp(), 0.0).sum(-1).log()
    torch.testing.assert_close(lse, by_hand, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("head_dim", [16, 64, 80])
@pytest.mark.parametrize("n_keys", [1, 7, 130])
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_the_fused_kernel_agrees_with_the_definition(head_dim, n_keys, heads, dtype):
    query, key, value = (x.to(dtype) for x in states(3, heads, 1, n_keys, head_dim))
    out, lse = plain_attention_with_lse(query, key, value, head_dim**-0.5, False, None)
    part = attention_with_lse(query, key, value, scale=head_dim**-0.5)
    assert part.out.dtype == part.lse.dtype == torch.float32
    agree(part, out, lse, TOLERANCE[dtype])


@pytest.mark.parametrize("head_dim", [16, 64, 80])
@pytest.mark.parametrize("length", [1, 2, 33, 100])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_causal_rows_see_themselves_and_what_is_before_them(head_dim, length, heads):
    query, key, value = states(2, heads, length, length, head_dim)
    part = attention_with_lse(query, key, value, scale=head_dim**-0.5, causal=True)
    out, lse = plain_attention_with_lse(query, key, value, head_dim**-0.5, True, None)
    agree(part, out, lse)
    agree(part, F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True))


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("rows", [1, 6])
def test_a_row_that_may_see_nothing_is_zero_with_a_log_sum_exp_of_minus_infinity(dtype, rows):
    query, key, value = (x.to(dtype) for x in states(2, (4, 2), rows, 9, 16))
    allowed = draw(2, 1, rows, 9, seed=5) > 0
    allowed[0, 0, 0] = False
    allowed[1] = True
    part = attention_with_lse(query, key, value, scale=0.25, allowed=allowed)
    out, lse = plain_attention_with_lse(query, key, value, 0.25, False, allowed)
    agree(part, out, lse, TOLERANCE[dtype])
    assert (part.lse[0, :, 0] == -math.inf).all()
    assert (part.out[0, :, 0] == 0).all()
    assert part.lse[1].isfinite().all()


def test_a_mask_of_one_row_serves_every_query_row():
    query, key, value = states(3, (4, 2), 5, 8, 16)
    allowed = draw(3, 1, 1, 8, seed=4) > 0
    narrow = attention_with_lse(query, key, value, scale=0.25, allowed=allowed)
    wide = attention_with_lse(query, key, value, scale=0.25, allowed=allowed.expand(3, 1, 5, 8))
    agree(narrow, wide.out, wide.lse, tolerance=0.0)


def test_keys_and_values_of_different_head_sizes_still_give_attention():
    query, key, _ = states(2, (4, 2), 3, 6, 16)
    value = draw(2, 2, 6, 24, seed=7)
    part = attention_with_lse(query, key, value, scale=0.25)
    agree(part, F.scaled_dot_product_attention(query, key, value, enable_gqa=True, scale=0.25))


@pytest.mark.parametrize("softcap", [0.3, 2.0, 50.0])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_a_soft_cap_bends_the_scaled_scores_before_the_mask(heads, softcap):
    query, key, value = states(2, heads, n_queries=3, n_keys=5, head_dim=4)
    allowed = draw(2, 1, 3, 5, seed=9) > -0.5
    part = attention_with_lse(query, key, value, scale=1.5, allowed=allowed, softcap=softcap)
    expected, _ = softmax_by_hand(query, key, value, 1.5, allowed, softcap)
    agree(part, expected)
    assert (part.lse <= softcap + math.log(5)).all()  # no score exceeds the cap


def test_a_soft_cap_far_above_the_scores_changes_nothing():
    query, key, value = states(2, (4, 2), 3, 9, 16)
    plain = attention_with_lse(query, key, value, scale=0.25, causal=False)
    agree(attention_with_lse(query, key, value, scale=0.25, softcap=1e4), plain.out, plain.lse)


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_sinks_take_their_share_of_the_softmax_and_give_nothing_for_it(heads):
    query, key, value = states(2, heads, n_queries=3, n_keys=5, head_dim=4)
    allowed = draw(2, 1, 3, 5, seed=9) > -0.5
    allowed[0, 0, 1] = False
    sinks = draw(heads[0], seed=11)
    out = attention_with_sinks(query, key, value, sinks, scale=0.8, allowed=allowed)
    expected, _ = softmax_by_hand(query, key, value, 0.8, allowed, sinks=sinks)
    torch.testing.assert_close(out, expected.float(), atol=2e-6, rtol=1e-5)
    without = attention_with_sinks(query, key, value, None, scale=0.8, allowed=allowed)
    assert torch.equal(without, attention_with_lse(query, key, value, scale=0.8, allowed=allowed).out)


# --- heads ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_queries_taken_some_at_a_time_attend_as_all_at_once(monkeypatch, causal, softcap):
    query, key, value = states(2, (4, 2), 13, 13, 8)
    for allowed in [None] if causal else [None, draw(2, 1, 13, 13) > 0, draw(2, 1, 1, 13) > 0]:
        whole = paged_attention.plain_attention_with_lse(query, key, value, 0.3, causal, allowed, softcap)
        with monkeypatch.context() as small:
            small.setattr(paged_attention, "MAX_SCORES", 2 * 4 * 13 * 5)  # five queries, so three blocks
            parts = paged_attention.plain_attention_with_lse(query, key, value, 0.3, causal, allowed, softcap)
        for one, other in zip(whole, parts, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_grouping_heads_gives_each_key_head_the_rows_of_its_query_heads(heads):
    n_heads, n_kv_heads = heads
    query = draw(2, n_heads, 3, 5)
    grouped = group_heads(query, n_kv_heads)
    group = n_heads // n_kv_heads
    for head in range(n_heads):
        rows = slice(head % group * 3, (head % group + 1) * 3)
        assert torch.equal(grouped[:, head // group, rows], query[:, head])
    assert torch.equal(ungroup_heads(grouped, n_heads), query)


# --- pages ------------------------------------------------------------------------------------------------------


def pages_of(states_of_context: torch.Tensor, page_size: int) -> list[torch.Tensor]:
    """[1, K, S, D] -> pages [1, K, P, D]; the last may be shorter, like the open page."""
    return list(states_of_context.split(page_size, dim=2))


@settings(max_examples=60)
@given(
    heads=st.sampled_from(HEADS),
    n_queries=st.integers(1, 3),
    n_keys=st.integers(1, 70),
    page_size=st.integers(1, 20),
    order_seed=st.integers(0, 2**32 - 1),
    sharpness=st.sampled_from([0.1, 1.0, 8.0]),
)
def test_pages_in_any_order_and_any_waves_merge_to_attention_over_the_whole_context(
    heads, n_queries, n_keys, page_size, order_seed, sharpness
):
    query, key, value = states(1, heads, n_queries, n_keys, 16, seed=order_seed % 1000)
    query = sharpness * query
    grouped = group_heads(query, heads[1])
    pages = list(zip(pages_of(key, page_size), pages_of(value, page_size), strict=True))
    order = random.Random(order_seed)
    order.shuffle(pages)

    parts: list[Partial] = []
    while pages:  # waves of random size; pages of one size go into one call
        wave, pages = pages[: (n := order.randint(1, len(pages)))], pages[n:]
        for size in {page.shape[2] for page, _ in wave}:
            keys = torch.cat([k for k, _ in wave if k.shape[2] == size])
            values = torch.cat([v for _, v in wave if v.shape[2] == size])
            parts.append(attend_parts(grouped, keys, values, scale=0.25))
    expected = F.scaled_dot_product_attention(query, key, value, enable_gqa=True, scale=0.25)

    at_once = merge(parts)
    agree(Partial(ungroup_heads(at_once.out, heads[0]), at_once.lse), expected)
    running = merge(parts[:1])
    for part in parts[1:]:
        running = merge([running, part])
    agree(running, at_once.out, at_once.lse)


def test_masked_pages_merge_to_masked_attention_and_wholly_masked_ones_count_nothing():
    query, key, value = states(1, (4, 2), 3, 24, 16)
    allowed = draw(1, 1, 3, 24, seed=3) > 0
    allowed[..., 8:16] = False  # a page of padding
    allowed[:, :, 1] = False  # a row that sees no page at all
    masks = allowed[0, 0].repeat(2, 1)  # the two query heads of each key head
    pages = [(key[:, :, s : s + 8], value[:, :, s : s + 8], masks[None, None, :, s : s + 8]) for s in (16, 8, 0)]
    keys, values, masks = (torch.cat(column) for column in zip(*pages, strict=True))
    total = merge([attend_parts(group_heads(query, 2), keys, values, scale=0.25, allowed=masks)])
    out = ungroup_heads(total.out, 4)
    expected, _ = softmax_by_hand(query, key, value, 0.25, allowed)
    agree(Partial(out, total.lse), expected)
    assert (out[:, :, 1] == 0).all()
    assert (ungroup_heads(total.lse.unsqueeze(-1), 4)[:, :, 1] == -math.inf).all()


def test_merging_one_part_is_that_part():
    part = attend_parts(*states(1, (2, 2), 2, 5, 16), scale=0.25)
    agree(merge([part]), part.out, part.lse, tolerance=0.0)


@settings(max_examples=30)
@given(heads=st.sampled_from(HEADS), n_pages=st.integers(1, 9), seed=st.integers(0, 1000))
def test_the_mass_of_a_page_is_its_share_of_the_softmax(heads, n_pages, seed):
    query, key, value = states(1, heads, 1, 4 * n_pages, 8, seed)
    _, weights = softmax_by_hand(query, key, value, 0.5)
    keys, values = (torch.cat(pages_of(x, 4)) for x in (key, value))
    part = attend_parts(group_heads(query, heads[1]), keys, values, scale=0.5)
    mass = page_mass(part.lse, merge([part]).lse)
    by_hand = weights[0, :, 0].reshape(heads[0], n_pages, 4).sum(-1).mean(0)
    torch.testing.assert_close(mass.double(), by_hand, atol=1e-5, rtol=1e-5)
    assert mass.sum().item() == pytest.approx(1.0, abs=1e-5)


@settings(max_examples=30)
@given(
    heads=st.sampled_from(HEADS),
    n_queries=st.integers(1, 3),
    n_pages=st.integers(1, 5),
    softcap=st.sampled_from([None, 0.5, 5.0]),
    seed=st.integers(0, 1000),
)
def test_a_sink_is_one_more_part_of_the_merge(heads, n_queries, n_pages, softcap, seed):
    """Out and mass are those of the softmax with the sink in its denominator; the mass left over is the sink's."""
    query, key, value = states(1, heads, n_queries, 4 * n_pages, 8, seed)
    sinks = 2 * draw(heads[0], seed=seed + 3)
    expected, weights = softmax_by_hand(query, key, value, 0.5, None, softcap, sinks)
    keys, values = (torch.cat(pages_of(x, 4)) for x in (key, value))
    part = attend_parts(group_heads(query, heads[1]), keys, values, scale=0.5, softcap=softcap)
    sink = sink_part(sinks, part)
    total = merge([part, sink])
    agree(Partial(ungroup_heads(total.out, heads[0]), total.lse), expected)
    mass = page_mass(part.lse, total.lse)
    by_hand = weights[0].reshape(heads[0], n_queries, n_pages, 4).sum(-1).mean((0, 1))
    torch.testing.assert_close(mass.double(), by_hand, atol=1e-5, rtol=1e-5)
    left_over = page_mass(sink.lse, total.lse).item()
    assert mass.sum().item() + left_over == pytest.approx(1.0, abs=1e-5)
    assert left_over > 0


def test_a_page_that_nobody_may_see_has_no_mass():
    query, key, value = states(1, (2, 2), 1, 8, 16)
    keys, values = (torch.cat(pages_of(x, 4)) for x in (key, value))
    allowed = torch.tensor([True, False]).reshape(2, 1, 1, 1).expand(2, 1, 1, 4)
    part = attend_parts(query, keys, values, scale=0.25, allowed=allowed)
    mass = page_mass(part.lse, merge([part]).lse)
    torch.testing.assert_close(mass, torch.tensor([1.0, 0.0]))


# --- CUDA -------------------------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize("head_dim", [16, 64, 80])
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("n_queries", "causal"), [(1, False), (33, False), (33, True)])
def test_on_cuda_the_fused_kernels_agree_with_the_definition(head_dim, heads, dtype, n_queries, causal):
    n_keys = n_queries if causal else 130
    query, key, value = (x.to(dtype).cuda() for x in states(3, heads, n_queries, n_keys, head_dim))
    scale = head_dim**-0.5
    out, lse = plain_attention_with_lse(query.double(), key.double(), value.double(), scale, causal, None)
    agree(attention_with_lse(query, key, value, scale=scale, causal=causal), out, lse, max(TOLERANCE[dtype], 1e-3))


@pytest.mark.cuda
def test_on_cuda_masked_rows_are_zero_too():
    query, key, value = (x.cuda() for x in states(2, (4, 2), 3, 9, 16))
    allowed = (draw(2, 1, 3, 9, seed=5) > 0).cuda()
    allowed[0, 0, 0] = False
    part = attention_with_lse(query, key, value, scale=0.25, allowed=allowed)
    assert (part.lse[0, :, 0] == -math.inf).all()
    assert (part.out[0, :, 0] == 0).all()
