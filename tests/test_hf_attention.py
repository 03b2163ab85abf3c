"""What a model asks of attention is honoured or refused by name, never dropped; and attaching leaves no trace."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from test_paged_attention import softmax_by_hand, states
from tiny_models import GROUPED, make_family, make_model, make_prompt
from transformers import LlamaConfig
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask
from transformers.masking_utils import sliding_window_causal_mask_function as sliding_mask_function

from hf_attention import CannotPage, hand_over, paged_attention_forward, paged_mask
from kv_paging import PagedKVCache

SMALL = {"page_size": 8, "max_gpu_pages": 3, "staging_pages": 2, "link": "memory"}
MODULE = SimpleNamespace(layer_idx=3, num_key_value_groups=2)


class RecordsWhatItIsAsked:
    """A paged layer that attends to nothing."""

    def attend(self, query, key, value, allowed, scale, softcap=None, sinks=None):
        self.asked = {"allowed": allowed, "scale": scale, "softcap": softcap, "sinks": sinks}
        return query


def ask(layer, query_length=4, mask=None, **kwargs):
    """Call the attention function for layer 3 as a model does, after its `update`."""
    query, key, value = states(1, (4, 2), query_length, query_length, 8)
    hand_over(3, layer)
    return paged_attention_forward(MODULE, query, key, value, mask, **kwargs)


# --- keyword arguments --------------------------------------------------------------------------------------------


def test_soft_cap_and_sinks_reach_the_layer():
    layer, sinks = RecordsWhatItIsAsked(), torch.zeros(4)
    ask(layer, scaling=0.5, softcap=30.0, s_aux=sinks)
    assert layer.asked == {"allowed": None, "scale": 0.5, "softcap": 30.0, "sinks": sinks}


def test_without_a_scale_it_is_that_of_the_head_size():
    layer = RecordsWhatItIsAsked()
    ask(layer)
    assert layer.asked["scale"] == pytest.approx(8**-0.5)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("position_bias", torch.zeros(1)),
        ("head_mask", torch.ones(4)),
        ("attn_bias", torch.zeros(1)),
        ("indices", torch.zeros(1)),
        ("cu_seq_lens_q", torch.zeros(1)),
        ("output_attentions", True),
        ("what_comes_next", 1),
    ],
)
@pytest.mark.parametrize("paged", [True, False], ids=["paged_layer", "sliding_layer"])
def test_what_is_not_known_to_be_harmless_is_refused_by_name(name, given, paged):
    with pytest.raises(CannotPage, match=rf"layer 3 \(SimpleNamespace\) uses {name}"):
        ask(RecordsWhatItIsAsked() if paged else None, **{name: given})


def test_what_says_nothing_about_the_scores_is_passed_over():
    ask(
        RecordsWhatItIsAsked(),
        position_ids=torch.arange(4)[None],
        cache_position=torch.arange(4),
        use_cache=True,
        output_router_logits=True,
        output_attentions=False,
        position_bias=None,
        is_causal=True,
        dropout=0.0,
    )


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"is_causal": False}, "is not causal"),
        ({"dropout": 0.1}, r"call model.eval\(\) first"),
        ({"sliding_window": 16}, "sliding window of 16, but its cache layer holds every position"),
    ],
)
def test_attention_of_another_kind_is_refused(kwargs, message):
    with pytest.raises(CannotPage, match=message):
        ask(RecordsWhatItIsAsked(), **kwargs)


def test_a_model_in_training_is_refused():
    model = make_model(LlamaConfig(**GROUPED, attention_dropout=0.5)).train()
    cache = PagedKVCache(model.config, **SMALL)
    with cache.attached(model), pytest.raises(CannotPage, match=r"call model.eval\(\)"):
        model(make_prompt(10).ids, past_key_values=cache)


# --- masks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_past", [0, 5])
def test_the_mask_of_plain_causal_attention_is_padding_alone(n_past):
    padding = torch.ones(2, n_past + 3, dtype=torch.bool)
    sizes = {"batch_size": 2, "q_length": 3, "kv_length": n_past + 3, "q_offset": n_past}
    assert paged_mask(**sizes, attention_mask=padding) is None
    assert paged_mask(**sizes, attention_mask=None) is None
    padding[0, :2] = False
    mask = paged_mask(**sizes, attention_mask=padding)
    assert mask.dtype == torch.bool and mask.shape == (2, 1, 1, n_past + 3)
    own = sdpa_mask(**sizes, attention_mask=padding, mask_function=causal_mask_function)
    causal = torch.ones(3, n_past + 3, dtype=torch.bool).tril(n_past)
    assert torch.equal(mask & causal, own)


@pytest.mark.parametrize("mask_function", [sliding_mask_function(2), bidirectional_mask_function])
def test_another_pattern_gets_the_whole_mask(mask_function):
    sizes = {"batch_size": 1, "q_length": 4, "kv_length": 4, "q_offset": 0}
    options = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": True}
    mask = paged_mask(**sizes, mask_function=mask_function, **options)
    seen = [[bool(mask_function(0, 0, torch.tensor(q), torch.tensor(k))) for k in range(4)] for q in range(4)]
    assert mask.tolist() == [[seen]]


def test_a_mask_that_is_shorter_than_the_context_is_refused():
    with pytest.raises(CannotPage, match="covers 3 positions, but the context has 8"):
        paged_mask(1, 3, 8, attention_mask=torch.ones(1, 3, dtype=torch.bool))


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(1, 1, 4, 4, dtype=torch.bool),
        torch.ones(1, 1, 4, 4, dtype=torch.bool).tril(),
        torch.ones(1, 4, 1, 4, dtype=torch.bool),
    ],
    ids=["bidirectional", "custom", "by_head"],
)
def test_a_pattern_of_its_own_is_refused_in_a_paged_layer(mask):
    with pytest.raises(CannotPage, match=r"layer 3 .* got a mask .* that differs between queries or heads"):
        ask(RecordsWhatItIsAsked(), mask=mask)


def test_an_additive_mask_is_refused():
    with pytest.raises(CannotPage, match=r"additive mask \(torch.float32\)"):
        ask(RecordsWhatItIsAsked(), mask=torch.zeros(1, 1, 4, 4))


def test_two_sequences_packed_in_one_row_are_refused():
    """A block-diagonal 4D mask, as made for packed sequences; computed causally, the second would see the first."""
    model = make_family("llama_gqa")
    blocks = torch.block_diag(torch.ones(5, 5), torch.ones(7, 7)).bool().tril()[None, None]
    cache = PagedKVCache(model.config, **SMALL)
    with cache.attached(model), pytest.raises(CannotPage, match="packed sequences"):
        model(make_prompt(12).ids, attention_mask=blocks, past_key_values=cache)


# --- layers that are not paged ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["window", "padding", "none"])
@pytest.mark.parametrize("n_queries", [1, 4])
@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("with_sinks", [False, True], ids=["no_sinks", "sinks"])
def test_a_sliding_layer_has_all_that_it_asks_for(kind, n_queries, softcap, with_sinks):
    """Against attention row by row, where the cap bends the scores and the sink is a key without a value."""
    n_keys = 6
    query, key, value = states(2, (4, 2), n_queries, n_keys, 8, seed=5)
    seen = torch.ones(n_queries, n_keys, dtype=torch.bool).tril(n_keys - n_queries).expand(2, 1, -1, -1)
    mask = None
    if kind == "window":
        mask = seen = seen & ~torch.ones(n_queries, n_keys, dtype=torch.bool).tril(n_keys - n_queries - 3)
    elif kind == "padding":
        mask = torch.ones(2, 1, 1, n_keys, dtype=torch.bool)
        mask[0, ..., :2] = False
        seen = seen & mask
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0]) if with_sinks else None
    hand_over(3, None)
    out, _ = paged_attention_forward(
        MODULE, query, key, value, mask, scaling=0.9, sliding_window=3, softcap=softcap, s_aux=sinks
    )
    expected, _ = softmax_by_hand(query, key, value, 0.9, seen, softcap, sinks)
    torch.testing.assert_close(out.transpose(1, 2), expected.float(), atol=2e-6, rtol=1e-5)
