"""Each selector scores what its docstring says, checked page by page, head by head and channel by channel."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from page_selectors import Selector
from registry import SELECTORS

NAMES = [name for name in SELECTORS if name != "all"]
HEADS = [(1, 1), (2, 3), (3, 1)]  # key/value heads, query heads of each
P, D = 5, 6


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pages_and_query(n: int, heads: tuple[int, int], page_size: int = P, seed: int = 0):
    """Random (keys [n, K, P, D], query [K, G, D])."""
    n_kv_heads, group = heads
    return draw(n, n_kv_heads, page_size, D, seed=seed), 2 * draw(n_kv_heads, group, D, seed=seed + 1)


def score(name: str, query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    selector = SELECTORS.create(name)
    return selector.score(query, selector.digest(keys))


def dot(one: list[float], other: list[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))


def by_hand(name: str, page: int, query: list[float], keys: list[list[float]]) -> float:
    """The score of one page for one query head, from the keys of its key/value head; in plain Python."""
    channels = [[key[d] for key in keys] for d in range(len(query))]
    logits = [dot(query, key) for key in keys]
    if name == "quest":
        return sum(max(q * min(values), q * max(values)) for q, values in zip(query, channels, strict=True))
    if name == "cuboid":
        total = 0.0
        for q, values in zip(query, channels, strict=True):
            middle = (min(values) + max(values)) / 2
            radius = sum(abs(value - middle) for value in values) / len(values)
            total += max(q * (middle - radius), q * (middle + radius))
        return total
    if name == "mean_key":
        return sum(logits) / len(logits)
    if name == "window":
        return float(page)
    assert name == "oracle"
    return math.log(sum(math.exp(logit) for logit in logits))


def all_by_hand(name: str, query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    n, n_kv_heads, _, _ = keys.shape
    return torch.tensor(
        [
            [
                [by_hand(name, page, head_query, keys[page, head].tolist()) for head_query in query[head].tolist()]
                for head in range(n_kv_heads)
            ]
            for page in range(n)
        ]
    )


@pytest.mark.parametrize("page_size", [1, 2, P])
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_scores_are_what_the_definition_gives(name, heads, page_size):
    keys, query = pages_and_query(7, heads, page_size)
    scores = score(name, query, keys)
    assert scores.dtype is torch.float32
    assert scores.shape == (7, *heads)
    torch.testing.assert_close(scores, all_by_hand(name, query, keys), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_digests_keep_the_keys_dtype_and_their_scores_are_as_good_as_it_allows(name, dtype):
    keys, query = pages_and_query(7, (2, 3))
    keys, query = keys.to(dtype), query.to(dtype)
    digests = SELECTORS.create(name).digest(keys)
    assert digests.dtype is dtype
    scores = score(name, query, keys)
    assert scores.dtype is torch.float32
    expected = all_by_hand(name, query.float(), keys.float())
    # Only corners and means are rounded, each by half a unit in the last place; a logit adds up D of them.
    rounding = torch.finfo(dtype).eps * keys.float().abs().max() * query.float().abs().sum(-1).max()
    assert (scores - expected).abs().max() <= (rounding if name in ("cuboid", "mean_key") else 1e-4)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("quest", (2, D)), ("cuboid", (2, D)), ("mean_key", (D,)), ("window", (0,)), ("oracle", (P, D))],
)
def test_a_digest_is_as_large_as_its_selector_says(name, shape):
    keys, _ = pages_and_query(7, (2, 3))
    assert SELECTORS.create(name).digest(keys).shape == (7, 2, *shape)


@pytest.mark.parametrize("name", NAMES)
def test_no_pages_have_no_scores(name):
    keys, query = pages_and_query(3, (2, 3))
    assert score(name, query, keys[:0]).shape == (0, 2, 3)


@pytest.mark.parametrize("name", ["quest", "cuboid", "mean_key", "oracle"])
def test_a_page_of_one_key_scores_its_logit(name):
    keys, query = pages_and_query(4, (2, 3), page_size=1)
    logits = torch.einsum("kgd,nkd->nkg", query, keys[:, :, 0])
    torch.testing.assert_close(score(name, query, keys), logits)


integers = st.integers(-8, 8)  # whole numbers, so that float32 adds them up exactly


@settings(max_examples=100)
@given(
    query=st.lists(integers, min_size=3, max_size=3),
    keys=st.lists(st.lists(integers, min_size=3, max_size=3), min_size=1, max_size=6),
)
def test_quest_never_thinks_less_of_a_page_than_its_best_key_deserves_and_cuboid_never_more_than_quest(query, keys):
    query_of_head, page = torch.tensor([[query]]).float(), torch.tensor([[keys]]).float()
    bound = score("quest", query_of_head, page).item()
    assert bound >= max(dot(query, key) for key in keys)
    assert score("cuboid", query_of_head, page).item() <= bound + 1e-3  # its mean distance is rounded


def test_cuboid_draws_the_box_in_to_the_mean_distance_from_its_middle():
    """Of 0, 4, 6, 10 the middle is 5, and the distances from it 5, 1, 1, 5 have the mean 3."""
    keys = torch.tensor([0.0, 4.0, 6.0, 10.0]).reshape(1, 1, 4, 1)
    assert SELECTORS.create("cuboid").digest(keys).flatten().tolist() == [2.0, 8.0]
    assert SELECTORS.create("quest").digest(keys).flatten().tolist() == [0.0, 10.0]


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_the_oracles_shares_are_the_true_attention_mass(heads):
    keys, query = pages_and_query(6, heads)
    every_key = keys.transpose(0, 1).reshape(heads[0], -1, D)
    weights = (query @ every_key.transpose(1, 2)).softmax(-1)  # [K, G, positions]
    mass = weights.reshape(*heads, 6, P).sum(-1).permute(2, 0, 1)
    torch.testing.assert_close(score("oracle", query, keys).softmax(0), mass)


def test_window_prefers_later_pages_whatever_the_query_and_the_keys_are():
    keys, query = pages_and_query(300, (2, 3))
    for scale in (1.0, -1.0):
        scores = score("window", scale * query, keys)
        assert scores.argsort(0, descending=True)[:, 1, 2].tolist() == list(reversed(range(300)))


OWN_SELECTOR = """
from dataclasses import dataclass

from page_selectors import Selector

@dataclass(frozen=True)
class LastKey(Selector):
    weight: float = 1.0

    def digest(self, keys):
        return keys[:, :, -1]

    def score(self, query, digests):
        return self.weight * (digests[:, :, None] * query).sum(-1)
"""


def test_a_selector_of_the_users_own_is_found_by_its_import_path(tmp_path, monkeypatch):
    (tmp_path / "own_selector.py").write_text(OWN_SELECTOR)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    try:
        selector = SELECTORS.create({"name": "own_selector:LastKey", "weight": 0.5})
    finally:
        sys.modules.pop("own_selector", None)
    keys, query = pages_and_query(4, (2, 3))
    scores = selector.score(query, selector.digest(keys))
    torch.testing.assert_close(scores, 0.5 * torch.einsum("kgd,nkd->nkg", query, keys[:, :, -1]))


def test_a_selector_that_lacks_a_verb_says_so_when_it_is_asked():
    class Unfinished(Selector):
        pass

    keys, query = pages_and_query(4, (2, 3))
    with pytest.raises(NotImplementedError):
        Unfinished().digest(keys)
    with pytest.raises(NotImplementedError):
        Unfinished().score(query, keys)
