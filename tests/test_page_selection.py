"""Pages are chosen by shares of attention, exactly as many as were asked for, and digests stay where they were put."""

from __future__ import annotations

import contextlib
import itertools
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from page_selection import Choice, PageDigests, choose_pages
from registry import SELECTORS


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- choosing: the rule, read aloud ------------------------------------------------------------------------------


def shares_by_hand(scores: list[list[list[float]]], candidates: list[int]) -> list[list[dict[int, float]]]:
    """For each key/value head and each of its query heads, the softmax of the candidates' scores, page by page."""
    n_kv_heads, group = len(scores[0]), len(scores[0][0])
    shares = []
    for head in range(n_kv_heads):
        shares.append([])
        for g in range(group):
            column = {page: scores[page][head][g] for page in candidates}
            highest = max(column.values())
            if highest == -math.inf:
                shares[-1].append(dict.fromkeys(candidates, 0.0))
                continue
            powers = {page: math.exp(score - highest) for page, score in column.items()}
            total = sum(powers.values())
            shares[-1].append({page: power / total for page, power in powers.items()})
    return shares


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def assert_ranked(shares: list[float]) -> None:
    """Each share at least the next one, but for rounding."""
    for better, worse in itertools.pairwise(shares):
        assert better >= worse * (1 - 1e-4) - 1e-30


contexts = st.fixed_dictionaries(
    {
        "n_scored": st.integers(0, 9),
        "heads": st.sampled_from([(1, 1), (1, 3), (2, 1), (3, 2)]),
        "has_open_page": st.booleans(),
        "sharpness": st.sampled_from([0.1, 1.0, 10.0]),
        "n_ruled_out": st.integers(0, 12),
        "seed": st.integers(0, 2**16),
    }
)


@settings(max_examples=300)
@given(context=contexts, per_kv_head=st.booleans(), data=st.data())
def test_the_choice_is_the_one_that_the_rule_gives(context, per_kv_head, data):
    n, (n_kv_heads, group) = context["n_scored"], context["heads"]
    scores = context["sharpness"] * draw(n, n_kv_heads, group, seed=context["seed"])
    if n:
        flat = torch.randint(scores.numel(), (context["n_ruled_out"],), generator=torch.Generator().manual_seed(1))
        scores.view(-1)[flat] = -math.inf
    n_pages = n + context["has_open_page"]
    always = data.draw(st.sets(st.integers(0, n - 1)) if n else st.just(set())) | set(range(n, n_pages))
    n_attended = data.draw(st.integers(len(always), n_pages + 2))

    choice = choose_pages(scores, n_pages, always, n_attended, per_kv_head)

    candidates = [page for page in range(n) if page not in always]
    n_chosen = min(n_attended, n_pages) - len(always)
    first, rest = choice.pages[: len(always)], choice.pages[len(always) :]
    assert first == sorted(always)
    assert set(rest) <= set(candidates)
    assert len(set(choice.pages)) == len(choice.pages)
    if not n_chosen:
        assert rest == [] and choice.heads is None
        return

    shares = shares_by_hand(scores.tolist(), candidates)
    if not per_kv_head:
        assert choice.heads is None
        assert len(rest) == n_chosen
        of_all = {page: mean([mean([g[page] for g in head]) for head in shares]) for page in candidates}
        assert_ranked([of_all[page] for page in rest])
        assert_ranked([of_all[rest[-1]], max([of_all[page] for page in candidates if page not in rest], default=0.0)])
        return

    own = [{page: mean([g[page] for g in head]) for page in candidates} for head in shares]
    assert_ranked([max(head[page] for head in own) for page in rest])
    chosen_by = [set(rest)] * n_kv_heads
    if choice.heads is not None:
        assert choice.heads.shape == (n_pages, n_kv_heads) and choice.heads.dtype is torch.bool
        assert all(choice.heads[page].all() for page in always)
        chosen_by = [{page for page in candidates if choice.heads[page, head]} for head in range(n_kv_heads)]
        assert any(chosen != set(rest) for chosen in chosen_by)
    assert set().union(*chosen_by) == set(rest)
    for head, chosen in zip(own, chosen_by, strict=True):
        assert len(chosen) == n_chosen
        left = [head[page] for page in candidates if page not in chosen]
        assert_ranked([min(head[page] for page in chosen), max(left, default=0.0)])


@settings(max_examples=200)
@given(
    scores=st.lists(st.sampled_from([-math.inf, -300.0, -1.0, 0.0, 1.0, 300.0]), min_size=1, max_size=9),
    per_kv_head=st.booleans(),
    data=st.data(),
)
def test_one_head_takes_the_highest_scores_and_of_equal_ones_the_earlier_page(scores, per_kv_head, data):
    always = data.draw(st.sets(st.integers(0, len(scores) - 1)))
    n_attended = data.draw(st.integers(len(always), len(scores)))
    column = torch.tensor(scores).reshape(-1, 1, 1)
    choice = choose_pages(column, len(scores), always, n_attended, per_kv_head)
    candidates = [page for page in range(len(scores)) if page not in always]
    ranked = sorted(candidates, key=lambda page: (-scores[page], page))
    assert choice == Choice(sorted(always) + ranked[: n_attended - len(always)], None)


def test_two_heads_choose_each_by_rank_and_page_in_every_small_case():
    """Every way to give three pages nothing, little or much in two heads, equal shares among them."""
    for values in itertools.product([-math.inf, 0.0, 1.0], repeat=6):
        scores = torch.tensor(values).reshape(3, 2, 1)
        shares = scores[:, :, 0].softmax(0).nan_to_num(0.0)
        for n_attended in (1, 2, 3):
            choice = choose_pages(scores, 3, set(), n_attended, per_kv_head=True)
            own = [
                sorted(range(3), key=lambda page: (-shares[page, head].item(), page))[:n_attended] for head in (0, 1)
            ]
            assert choice.pages == sorted({*own[0], *own[1]}, key=lambda page: (-shares[page].max().item(), page))
            if choice.heads is None:
                assert set(own[0]) == set(own[1])
            else:
                assert [choice.heads[:, head].nonzero().flatten().tolist() for head in (0, 1)] == [*map(sorted, own)]


def test_an_example_by_hand():
    """Five full pages and an open one; page 0 is a sink. Softmax of ln-numbers is their ratio, so with two heads:

    page        1    2    3    4
    head 0    0.5  0.3  0.1  0.1
    head 1    0.1  0.2  0.1  0.6
    mean      0.3 0.25  0.1 0.35
    """
    shares = torch.tensor([[0.9, 0.9], [0.5, 0.1], [0.3, 0.2], [0.1, 0.1], [0.1, 0.6]])
    scores = (shares.log() + torch.tensor([100.0, -7.0])).unsqueeze(-1)  # what heads have in common does not matter
    together = choose_pages(scores, 6, {5, 0}, 4, per_kv_head=False)
    assert together == Choice([0, 5, 4, 1], None)
    each = choose_pages(scores, 6, {5, 0}, 4, per_kv_head=True)
    assert each.pages == [0, 5, 4, 1, 2]  # head 0 takes 1 and 2, head 1 takes 4 and 2
    assert each.heads.int().tolist() == [[1, 1], [1, 0], [1, 1], [0, 0], [0, 1], [1, 1]]
    alone = choose_pages(scores, 6, {5, 0}, 3, per_kv_head=True)
    assert alone.pages == [0, 5, 4, 1]
    assert alone.heads.int().tolist() == [[1, 1], [1, 0], [0, 0], [0, 0], [0, 1], [1, 1]]


def test_pages_equal_in_every_head_go_in_order():
    for per_kv_head in (False, True):
        assert choose_pages(torch.zeros(8, 2, 3), 8, {0, 7}, 5, per_kv_head) == Choice([0, 7, 1, 2, 3], None)


def test_the_order_holds_far_below_what_a_share_can_be_in_float32():
    """Of 400 pages the window's scores are their numbers: exp(-300) is 0 in float32, and still more than exp(-301)."""
    scores = torch.arange(400.0)[:, None, None].expand(-1, 3, 2)
    choice = choose_pages(scores, 401, {0, 399, 400}, 390, per_kv_head=False)
    assert choice.pages == [0, 399, 400, *range(398, 11, -1)]


@pytest.mark.parametrize("seed", range(5))
def test_by_the_oracle_no_other_pages_hold_more_attention(seed):
    keys, query = draw(7, 2, 4, 8, seed=seed), draw(2, 3, 8, seed=seed + 100)
    oracle = SELECTORS.create("oracle")
    choice = choose_pages(oracle.score(query, oracle.digest(keys)), 7, set(), 3, per_kv_head=False)
    weights = (query @ keys.transpose(0, 1).reshape(2, 28, 8).transpose(1, 2)).softmax(-1)
    mass = weights.reshape(6, 7, 4).sum(-1).mean(0)
    best = max(itertools.combinations(range(7), 3), key=lambda pages: mass[list(pages)].sum().item())
    assert set(choice.pages) == set(best)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
@pytest.mark.parametrize("per_kv_head", [False, True])
def test_a_score_that_ranks_nowhere_is_refused(wrong, per_kv_head):
    scores = draw(6, 2, 3)
    scores[3, 1, 2] = wrong
    with pytest.raises(ValueError, match="NaN or \\+inf"):
        choose_pages(scores, 6, {0}, 3, per_kv_head)
    assert 3 in choose_pages(scores, 6, {0, 3}, 3, per_kv_head).pages  # always attended to, whatever its score


@pytest.mark.parametrize("per_kv_head", [False, True])
def test_a_head_that_wants_nothing_has_no_say(per_kv_head):
    scores = torch.tensor([1.0, 3.0, 2.0, 0.0]).reshape(4, 1, 1).repeat(1, 1, 2)
    scores[:, 0, 1] = -math.inf
    assert choose_pages(scores, 4, set(), 2, per_kv_head).pages == [1, 2]


def test_contradictions_are_refused():
    scores = draw(4, 1, 1)
    with pytest.raises(ValueError, match="only 4 of 5 pages have scores"):
        choose_pages(scores, 5, {0}, 3, False)
    with pytest.raises(ValueError, match="2 pages are always attended to, which is more than 1"):
        choose_pages(scores, 4, {0, 3}, 1, False)


def test_scores_in_half_precision_choose_as_well():
    scores = torch.tensor([0.0, 30.0, 10.0, 20.0]).reshape(4, 1, 1).to(torch.bfloat16)
    assert choose_pages(scores, 4, set(), 2, False).pages == [1, 3]


# --- digests -----------------------------------------------------------------------------------------------------


class DigestsAgainstModel(RuleBasedStateMachine):
    """The model: for each sequence, a dict of page to the digest put there last."""

    @initialize(n_rows=st.integers(1, 3), inference=st.booleans())
    def make(self, n_rows, inference):
        with torch.inference_mode() if inference else contextlib.nullcontext():
            self.digests = PageDigests(n_rows, like=torch.zeros(1, 2, 3, dtype=torch.bfloat16))
        self.rows: list[dict[int, torch.Tensor]] = [{} for _ in range(n_rows)]
        self.n_put = 0

    @rule(data=st.data(), m=st.integers(0, 5), inference=st.booleans())
    def put(self, data, m, inference):
        row = data.draw(st.integers(0, len(self.rows) - 1))
        first = data.draw(st.integers(0, len(self.rows[row])))
        with torch.inference_mode() if inference else contextlib.nullcontext():
            new = draw(m, 2, 3, seed=self.n_put).to(torch.bfloat16)
            self.digests.put(row, first, new)
        self.n_put += 1
        self.rows[row].update({first + i: new[i].tolist() for i in range(m)})

    @rule(n=st.integers(0, 20), inference=st.booleans())
    def reserve(self, n, inference):
        before = self.digests.capacity
        with torch.inference_mode() if inference else contextlib.nullcontext():
            self.digests.reserve(n)
        assert self.digests.capacity == max(before, n)

    @rule(data=st.data(), inference=st.booleans())
    def select_rows(self, data, inference):
        rows = data.draw(st.lists(st.integers(0, len(self.rows) - 1), min_size=1, max_size=4))
        with torch.inference_mode() if inference else contextlib.nullcontext():
            self.digests.select_rows(rows)
        self.rows = [dict(self.rows[row]) for row in rows]

    @invariant()
    def every_page_has_the_digest_put_there_last(self):
        for row, pages in enumerate(self.rows):
            kept = self.digests.of(row, len(pages))
            assert kept.shape == (len(pages), 2, 3) and kept.dtype is torch.bfloat16
            assert not kept.is_inference()
            assert kept.tolist() == [pages[page] for page in range(len(pages))]
        assert self.digests.nbytes == len(self.rows) * self.digests.capacity * 2 * 3 * 2


DigestsAgainstModel.TestCase.settings = settings(max_examples=60, stateful_step_count=15)
TestDigests = DigestsAgainstModel.TestCase


def test_memory_grows_by_doubling_so_that_few_puts_copy_what_is_there():
    digests, capacities = PageDigests(1, like=torch.zeros(1, 2)), []
    for page in range(9):
        digests.put(0, page, torch.full((1, 2), float(page)))
        capacities.append(digests.capacity)
    assert capacities == [1, 2, 4, 4, 8, 8, 8, 8, 16]


def test_reserved_memory_does_not_move():
    digests = PageDigests(2, like=torch.zeros(1, 2, 3))
    digests.reserve(10)
    view = digests.of(1, 10)
    digests.put(1, 0, draw(10, 2, 3))
    assert torch.equal(view, draw(10, 2, 3))


def test_more_pages_than_there_are_is_an_error_and_not_fewer_pages():
    digests = PageDigests(1, like=torch.zeros(1, 2))
    digests.put(0, 0, torch.zeros(3, 2))
    with pytest.raises(RuntimeError):
        digests.of(0, 4)


def test_digests_hold_no_graph_of_what_computed_them():
    digests = PageDigests(1, like=torch.zeros(1, 2))
    digests.put(0, 0, 2 * torch.ones(3, 2, requires_grad=True))
    assert not digests.of(0, 3).requires_grad


def test_an_empty_digest_takes_no_memory():
    keys = draw(5, 2, 4, 8)
    digests = PageDigests(3, like=SELECTORS.create("window").digest(keys))
    digests.put(2, 0, SELECTORS.create("window").digest(keys))
    assert digests.nbytes == 0
    assert digests.of(2, 5).shape == (5, 2, 0)


def test_digests_share_no_memory_with_the_pages_they_were_made_of():
    keys = draw(5, 2, 4, 8)
    oracle = SELECTORS.create("oracle")
    digests = PageDigests(1, like=oracle.digest(keys))
    digests.put(0, 0, oracle.digest(keys))
    expected = keys.clone()
    keys.zero_()  # the slot is used for another page
    assert torch.equal(digests.of(0, 5), expected)
    assert digests.nbytes == expected.nbytes


# --- CUDA --------------------------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize("per_kv_head", [False, True])
@pytest.mark.parametrize("name", [name for name in SELECTORS if name != "all"])
def test_on_cuda_the_host_waits_once_and_the_choice_is_the_same(name, per_kv_head):
    keys, query = draw(40, 2, 16, 8), draw(2, 3, 8, seed=1)
    selector = SELECTORS.create(name)
    always = {0, 20, 39, 40}
    expected = choose_pages(selector.score(query, selector.digest(keys)), 41, always, 12, per_kv_head)
    digests = PageDigests(1, like=selector.digest(keys.cuda()))
    digests.put(0, 0, selector.digest(keys.cuda()))
    scores = selector.score(query.cuda(), digests.of(0, 40))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")  # also warns of an unpinned copy to the device
        try:
            choice = choose_pages(scores, 41, always, 12, per_kv_head)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len([one for one in caught if "called a synchronizing" in str(one.message)]) == 1
    assert choice.pages == expected.pages
    assert (choice.heads is None) == (expected.heads is None)
    if choice.heads is not None:
        assert torch.equal(choice.heads.cpu(), expected.heads)
