"""Tiny random models of several attention layouts, and what transformers' own cache makes of a prompt with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTBigCodeConfig,
    LlamaConfig,
    MistralConfig,
)

VOCABULARY = 200
LLAMA_LIKE = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": VOCABULARY,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
GPT2_LIKE = {
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": VOCABULARY,
    "n_positions": 512,
    "bos_token_id": None,
    "eos_token_id": None,
}
CONFIGS: dict[str, Any] = {
    "llama_gqa": LlamaConfig(**LLAMA_LIKE, num_key_value_heads=2),
    "llama_mqa": LlamaConfig(**LLAMA_LIKE, num_key_value_heads=1),
    "gpt2_learned_positions": GPT2Config(**GPT2_LIKE),
    "gpt_bigcode_mqa": GPTBigCodeConfig(**GPT2_LIKE, multi_query=True),
    "gemma3_hybrid_sliding": Gemma3TextConfig(
        **LLAMA_LIKE | {"num_hidden_layers": 6}, num_key_value_heads=2, head_dim=16, sliding_window=16
    ),
}
SOFTCAPPED = Gemma2Config(**LLAMA_LIKE, num_key_value_heads=2, head_dim=16, sliding_window=16)
ALL_SLIDING = MistralConfig(**LLAMA_LIKE, num_key_value_heads=2, sliding_window=16)


def make_model(config: Any, seed: int = 0) -> Any:
    """A model with random weights, large enough that its greedy tokens are not all the same."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6.0)
    return model


@dataclass(frozen=True)
class Prompt:
    """Token ids [B, T] and mask."""

    ids: torch.Tensor
    mask: torch.Tensor


def make_prompt(length: int, batch: int = 1, padding: int = 0, seed: int = 0) -> Prompt:
    """Random ids; the first row starts with `padding` masked positions."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCABULARY, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return Prompt(ids, mask)


def continue_prompt(model: Any, prompt: Prompt, new_tokens: int = 24, **options: Any) -> torch.Tensor:
    """Greedy tokens [B, T + new_tokens], with transformers' own cache unless `past_key_values` is given."""
    return model.generate(
        prompt.ids,
        attention_mask=prompt.mask,
        max_new_tokens=new_tokens,
        **{"do_sample": False, "pad_token_id": 0, **options},
    )
