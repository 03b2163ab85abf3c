"""Which model families can be paged: each gives the tokens that it gives with transformers' own cache, or one clear
error that says what cannot be paged and why."""

from __future__ import annotations

import contextlib
from functools import cache

import pytest
import torch
from tiny_models import FAMILIES, Prompt, continue_prompt, make_family, make_prompt
from transformers import DynamicCache

from hf_attention import CannotPage
from kv_paging import PagedKVCache

LENGTH, NEW_TOKENS = 70, 12  # 11 pages of 8, with room for 3
SMALL = {"page_size": 8, "max_gpu_pages": 3, "staging_pages": 2, "link": "memory"}

PAGED = "paged"
ONLY_UNATTACHED = "only unattached: "
REFUSED = "refused: "
NOT_BY_NAME = ONLY_UNATTACHED + "does not route attention through transformers' AttentionInterface"
LATENT = REFUSED + r"layer 0: keys .* and values .* differ in shape"

# What is expected of each family; after the colon, a pattern of the error.
EXPECTED = {
    "llama_gqa": PAGED,
    "llama_mqa": PAGED,
    "mistral": PAGED,
    "mistral_all_sliding": REFUSED + "no layer of this model has full attention, so there is nothing to page",
    "mixtral_experts": PAGED,
    "qwen2": PAGED,
    "qwen3": PAGED,
    "qwen3_experts": PAGED,
    "gemma": PAGED,
    "gemma2_hybrid_softcap": PAGED,
    "gemma3_hybrid": PAGED,
    "phi": PAGED,
    "phi3": PAGED,
    "gpt2_learned_positions": PAGED,
    "gpt_bigcode_mqa": PAGED,
    "gpt_neox": PAGED,
    "gpt_oss_hybrid_sinks": PAGED,
    "granite_swa_hybrid_sinks": PAGED,
    "opt": PAGED,
    "olmo2": PAGED,
    "olmo3_hybrid": PAGED,
    "cohere": PAGED,
    "cohere2_hybrid": PAGED,
    "granite": PAGED,
    "starcoder2": PAGED,
    "smollm3_one_layer_without_rope": PAGED,
    "exaone4_hybrid": PAGED,
    "llama4_hybrid_chunked": PAGED,
    "falcon_mqa": NOT_BY_NAME,
    "falcon_alibi": NOT_BY_NAME,
    "bloom_alibi": NOT_BY_NAME,
    "mpt_alibi": NOT_BY_NAME,
    "stablelm": NOT_BY_NAME,
    "gptj": NOT_BY_NAME,
    "diffllama_two_attentions": ONLY_UNATTACHED + r"layer 0 \(DiffLlama.*\) .* attends twice to what it caches once",
    "doge_biased_mask": ONLY_UNATTACHED + r"layer 0 \(DogeAttention\) got an additive mask",
    "deepseek_v2_latent": LATENT,
    "deepseek_v3_latent": LATENT,
    "gemma3n_shared_keys": REFUSED + "layer 2 needs a DummyLayer, .* has no keys and values of its own",
    "qwen3_next_linear": REFUSED + "layer 0 needs a LinearAttentionLayer, .* holds more than keys and values",
    "jamba_state_space": REFUSED + "layer 0 needs a LinearAttentionLayer, .* holds more than keys and values",
    "falcon_h1_state_space": REFUSED + "layer 0 needs a LinearAttentionAndFullAttentionLayer, .* holds more than keys",
    "mamba": REFUSED + "layer 0 needs a LinearAttentionLayer, .* holds more than keys and values",
}
ONE, TWO = make_prompt(LENGTH), make_prompt(LENGTH, batch=2, padding=21)
PROMPTS = {"whole": (ONE, None), "chunked": (ONE, 24), "padded": (TWO, None)}  # and the size of the chunks
model_of = cache(make_family)  # each is less than a megabyte


@cache
def own_tokens(family: str, batch_size: int) -> torch.Tensor:
    """Tokens with transformers' own cache, the prompt in one piece."""
    model = model_of(family)
    return continue_prompt(
        model, ONE if batch_size == 1 else TWO, NEW_TOKENS, past_key_values=DynamicCache(config=model.config)
    )


def paged_tokens(family: str, prompt: Prompt, chunk: int | None, attach: bool) -> tuple[torch.Tensor, PagedKVCache]:
    model = model_of(family)
    paged = PagedKVCache(model.config, **SMALL)
    with paged.attached(model) if attach else contextlib.nullcontext():
        tokens = continue_prompt(model, prompt, NEW_TOKENS, past_key_values=paged, prefill_chunk_size=chunk)
    return tokens, paged


def families(*outcomes: str) -> list[str]:
    return [family for family, outcome in EXPECTED.items() if outcome.startswith(outcomes)]


def test_every_family_has_an_expected_outcome():
    assert set(EXPECTED) == set(FAMILIES)
    assert sorted(families(PAGED, ONLY_UNATTACHED, REFUSED)) == sorted(EXPECTED)


@pytest.mark.parametrize("how", PROMPTS)
@pytest.mark.parametrize("family", families(PAGED))
def test_attached_a_paged_family_gives_the_tokens_of_transformers_own_cache(family, how):
    prompt, chunk = PROMPTS[how]
    expected = own_tokens(family, len(prompt.ids))
    assert all(len(set(row[LENGTH:].tolist())) >= 4 for row in expected), "equal tokens would prove little"
    tokens, paged = paged_tokens(family, prompt, chunk, attach=True)
    assert torch.equal(tokens, expected)
    assert paged.recorder.snapshot("decode")["misses"] > 0


@pytest.mark.parametrize("layer", [0, 1], ids=["sliding_layer", "paged_layer"])
@pytest.mark.parametrize("family", ["gemma2_hybrid_softcap", "gpt_oss_hybrid_sinks", "granite_swa_hybrid_sinks"])
def test_soft_cap_and_sinks_matter_to_these_tokens_in_both_kinds_of_layer(family, layer):
    """Else equal tokens would not show that they are computed."""
    model = make_family(family)
    attention = model.model.layers[layer].self_attn
    if family.endswith("softcap"):
        attention.attn_logit_softcapping = None
    else:
        torch.nn.init.constant_(attention.sinks, -1e9)
    assert not torch.equal(continue_prompt(model, ONE, NEW_TOKENS), own_tokens(family, 1))


@pytest.mark.parametrize("how", PROMPTS)
@pytest.mark.parametrize("family", families(PAGED, ONLY_UNATTACHED))
def test_not_attached_it_gives_them_too(family, how):
    prompt, chunk = PROMPTS[how]
    tokens, _ = paged_tokens(family, prompt, chunk, attach=False)
    assert torch.equal(tokens, own_tokens(family, len(prompt.ids)))


@pytest.mark.parametrize("family", families(ONLY_UNATTACHED))
def test_a_family_that_cannot_be_attached_says_why(family):
    with pytest.raises(CannotPage, match=EXPECTED[family].removeprefix(ONLY_UNATTACHED)):
        paged_tokens(family, *PROMPTS["whole"], attach=True)


@pytest.mark.parametrize("attach", [True, False], ids=["attached", "not_attached"])
@pytest.mark.parametrize("family", families(REFUSED))
def test_a_family_that_cannot_be_paged_says_why(family, attach):
    with pytest.raises(CannotPage, match=EXPECTED[family].removeprefix(REFUSED)):
        paged_tokens(family, *PROMPTS["whole"], attach)
