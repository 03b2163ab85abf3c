"""How pages are read from the pool: each written position once, wherever pages lie, however they are put in parts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pool_reads
from paged_attention import attend_parts, merged_output, plain_attention_with_lse, side_by_side
from pool_reads import ReadPlans, n_equal_parts, plan_reads, stretch_lengths

K, D = 2, 8


@st.composite
def waves(draw):
    """(page size, number of slots, `{page: slot}`, open page, positions of it that are written)."""
    size = draw(st.integers(1, 4))
    n_slots = draw(st.integers(1, 12))
    n_pages = draw(st.integers(1, n_slots))
    slots = draw(st.permutations(range(n_slots)))[:n_pages]
    if draw(st.booleans()):
        slots = sorted(slots)
    pages = draw(st.permutations(range(n_pages)))
    open_page = draw(st.sampled_from([None, *range(n_pages), 99]))
    return size, n_slots, dict(zip(pages, slots, strict=True)), open_page, draw(st.integers(1, size))


def plan(wave, open_page, pool, per_part, most=10**6):
    return plan_reads(pool, sorted(wave.values()), wave.get(open_page), per_part * pool.shape[1], most)


@settings(max_examples=300)
@given(
    case=waves(),
    per_part=st.integers(1, 5),
    most=st.integers(1, 12),
    call_bytes=st.sampled_from([0, 200, 10**9]),
    like_cuda=st.booleans(),
)
def test_every_written_position_is_read_once_and_is_that_of_its_page(case, per_part, most, call_bytes, like_cuda):
    size, n_slots, wave, open_page, fill = case
    pool = torch.arange(n_slots * size * 2 * K * D, dtype=torch.float32).reshape(n_slots, size, 2, K, D)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pool_reads, "CALL_BYTES", {"cpu": call_bytes})
        if like_cuda:  # whose kernel takes no bias, and which is sent no index
            patched.setattr(pool_reads, "takes_bias", lambda device: False)
            patched.setattr(pool_reads, "places_in", lambda pool, slots: stretch_lengths(slots, len(pool)))
        made = plan(wave, open_page, pool, per_part, most)
    read, page_in = {}, {slot: page for page, slot in wave.items()}
    for stretch in made:
        for slots, keys, values, bias in stretch.parts(fill):
            assert bias is None or not like_cuda
            pages = [page_in[slot] for slot in slots]
            assert len(pages) <= most
            assert per_part > 1 or keys.shape[0] == len(pages)
            keys, values = keys.transpose(1, 2).flatten(0, 1), values.transpose(1, 2).flatten(0, 1)  # [positions, K, D]
            if bias is not None:
                assert set(bias.unique().tolist()) <= {0.0, float("-inf")}
                keys, values = keys[bias.flatten() == 0], values[bias.flatten() == 0]
            for page in pages:
                n = fill if page == open_page else size
                assert page not in read
                read[page] = keys[:n], values[:n]
                keys, values = keys[n:], values[n:]
            assert len(keys) == 0
    assert read.keys() == wave.keys()
    for page, slot in wave.items():
        n = fill if page == open_page else size
        assert torch.equal(read[page][0], pool[slot, :n, 0])
        assert torch.equal(read[page][1], pool[slot, :n, 1])


@settings(max_examples=100)
@given(case=waves(), per_part=st.integers(1, 5), seed=st.integers(0, 99))
def test_the_merged_parts_are_attention_over_all_of_it(case, per_part, seed):
    size, n_slots, wave, open_page, fill = case
    generator = torch.Generator().manual_seed(seed)
    pool = torch.randn(n_slots, size, 2, K, D, generator=generator)
    unread = set(range(n_slots)) - set(wave.values())
    pool[sorted(unread)] = float("nan")  # of other pages nothing may show
    query = torch.randn(1, K, 3, D, generator=generator)
    parts = [
        attend_parts(query, keys, values, scale=0.5, bias=bias)
        for stretch in plan(wave, open_page, pool, per_part)
        for _, keys, values, bias in stretch.parts(fill)
    ]
    together = torch.cat([pool[slot, : fill if page == open_page else size] for page, slot in wave.items()])
    keys, values = together.permute(1, 2, 0, 3).unsqueeze(1).unbind(0)
    expected, _ = plain_attention_with_lse(query, keys, values, 0.5, False, None)
    assert torch.allclose(merged_output(side_by_side(parts)), expected, atol=1e-5)


def test_pages_next_to_each_other_are_read_where_they_lie():
    pool = torch.zeros(8, 4, 2, K, D)
    (stretch,) = plan({3: 2, 4: 3, 5: 4}, 5, pool, 1)
    assert stretch.gathered is None and stretch.pool.data_ptr() == pool[2].data_ptr() and stretch.ends_open


def test_scattered_pages_are_gathered_and_the_open_one_comes_last():
    pool = torch.zeros(64, 4, 2, K, D)
    (stretch,) = plan({page: 2 * page for page in range(20)}, 7, pool, 1)
    assert stretch.gathered is not None and stretch.names[-1] == 14


def test_few_long_stretches_are_not_gathered():
    pool = torch.zeros(9, 256, 2, K, 64)
    stretches = plan({page: page + (page > 3) for page in range(8)}, None, pool, 1)
    assert [stretch.names for stretch in stretches] == [[0, 1, 2, 3], [5, 6, 7, 8]]
    assert all(stretch.gathered is None for stretch in stretches)


def test_what_is_gathered_at_a_time_is_bounded(monkeypatch):
    pool = torch.zeros(64, 4, 2, K, D)
    monkeypatch.setattr(pool_reads, "MOST_GATHERED_BYTES", 5 * pool[0].nbytes)
    stretches = plan({page: 2 * page for page in range(20)}, None, pool, 1)
    assert [len(stretch.names) for stretch in stretches] == [5, 5, 5, 5]


def test_on_a_cpu_the_open_page_does_not_end_a_stretch():
    pool = torch.zeros(8, 4, 2, K, D)
    (stretch,) = plan({0: 1, 1: 2, 2: 3, 3: 4}, 1, pool, 2)
    ((slots, keys, _, bias),) = stretch.parts(fill=3)
    assert stretch.gathered is None and slots == [1, 2, 3, 4] and keys.shape == (2, K, 8, D)
    assert (bias.flatten() != 0).nonzero().flatten().tolist() == [7]  # of page 1, in slot 2, its last position


def test_slots_are_planned_once_whichever_pages_lie_there_and_plans_are_not_kept_for_ever():
    plans = ReadPlans(torch.zeros(64, 4, 2, K, D))
    first = plans.plan([3, 1, 2], 3, 4, 10)
    assert plans.plan([2, 3, 1], 3, 4, 10) is first
    for other in ([1, 2, 3], 2, 4, 10), ([1, 2, 3], 3, 8, 10), ([1, 2, 3], 3, 4, 2), ([1, 2], 3, 4, 10):
        assert plans.plan(*other) is not first
    for slot in range(pool_reads.MOST_PLANS):
        plans.plan([slot], None, 4, 10)
    assert plans.plan([1, 2, 3], 3, 4, 10) is not first


@given(st.integers(1, 500), st.integers(1, 300), st.integers(1, 4000))
def test_parts_are_equal_and_none_is_shorter_than_a_page(n_pages, page_size, wanted):
    n = n_equal_parts(n_pages, page_size, wanted)
    length, rest = divmod(n_pages * page_size, n)
    assert rest == 0 and length >= page_size
    assert n == 1 or length > wanted // 2


def test_pages_of_a_power_of_two_are_cut_into_parts_of_at_most_twice_what_is_wanted():
    assert max(n * 32 / n_equal_parts(n, 32, 512) for n in range(1, 300)) <= 1024
