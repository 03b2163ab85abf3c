"""Tiny random models of many families, and what transformers' own cache makes of a prompt with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

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
    "tie_word_embeddings": False,  # tied, random weights repeat the token they were given
}
GPT2_LIKE = {
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": VOCABULARY,
    "n_positions": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
GROUPED = LLAMA_LIKE | {"num_key_value_heads": 2}
HYBRID = GROUPED | {"head_dim": 16, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {  # multi-head latent attention
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "head_dim": 8,
}
LINEAR_ATTENTION = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "shared_expert_intermediate_size": 32,
    "num_experts": 4,
    "head_dim": 16,
}
GEMMA3N = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 8,
    "activation_sparsity_pattern": [0.0] * 4,
}
MAMBA_LAYERS = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 16}

# Name -> model type, and what its config has in place of transformers' defaults. `hybrid` has layers with a sliding
# window, or chunks, beside those with full attention. Which can be paged is the table in test_model_families.py.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama_gqa": ("llama", GROUPED),
    "llama_mqa": ("llama", LLAMA_LIKE | {"num_key_value_heads": 1}),
    "mistral": ("mistral", GROUPED | {"sliding_window": None}),
    "mistral_all_sliding": ("mistral", GROUPED | {"sliding_window": 16}),
    "mixtral_experts": ("mixtral", GROUPED | {"num_local_experts": 4, "sliding_window": None}),
    "qwen2": ("qwen2", GROUPED),
    "qwen3": ("qwen3", GROUPED | {"head_dim": 16}),
    "qwen3_experts": ("qwen3_moe", GROUPED | EXPERTS | {"head_dim": 16, "num_experts": 4}),
    "gemma": ("gemma", GROUPED | {"head_dim": 16}),
    "gemma2_hybrid_softcap": ("gemma2", HYBRID | {"attn_logit_softcapping": 1.0, "query_pre_attn_scalar": 16}),
    "gemma3_hybrid": ("gemma3_text", HYBRID),
    "phi": ("phi", LLAMA_LIKE),
    "phi3": ("phi3", GROUPED | {"sliding_window": None}),
    "gpt2_learned_positions": ("gpt2", GPT2_LIKE),
    "gpt_bigcode_mqa": ("gpt_bigcode", GPT2_LIKE | {"multi_query": True}),
    "gpt_neox": ("gpt_neox", LLAMA_LIKE),
    "gpt_oss_hybrid_sinks": ("gpt_oss", HYBRID | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "granite_swa_hybrid_sinks": ("granite_swa", HYBRID),
    "opt": ("opt", LLAMA_LIKE | {"ffn_dim": 96, "word_embed_proj_dim": 64, "max_position_embeddings": 512}),
    "olmo2": ("olmo2", GROUPED),
    "olmo3_hybrid": ("olmo3", HYBRID),
    "cohere": ("cohere", GROUPED | {"logit_scale": 1.0}),
    "cohere2_hybrid": ("cohere2", HYBRID | {"logit_scale": 1.0}),
    "granite": ("granite", GROUPED),
    "starcoder2": ("starcoder2", GROUPED | {"sliding_window": None}),
    "smollm3_one_layer_without_rope": ("smollm3", GROUPED | {"no_rope_layers": [1, 0]}),
    "exaone4_hybrid": ("exaone4", HYBRID | {"sliding_window_pattern": None}),
    "llama4_hybrid_chunked": (
        "llama4_text",
        GROUPED
        | {
            "head_dim": 16,
            "attention_chunk_size": 16,
            "layer_types": ["chunked_attention", "full_attention"],
            "no_rope_layers": [1, 0],
            "num_local_experts": 2,
            "intermediate_size_mlp": 96,
        },
    ),
    "falcon_mqa": ("falcon", LLAMA_LIKE | {"multi_query": True}),
    "falcon_alibi": ("falcon", LLAMA_LIKE | {"multi_query": False, "alibi": True}),
    "bloom_alibi": ("bloom", LLAMA_LIKE),
    "mpt_alibi": ("mpt", LLAMA_LIKE | {"d_model": 64, "n_layers": 2, "n_heads": 4, "use_cache": True}),
    "stablelm": ("stablelm", GROUPED),
    "gptj": ("gptj", GPT2_LIKE | {"rotary_dim": 8}),
    "diffllama_two_attentions": ("diffllama", GROUPED),
    "doge_biased_mask": ("doge", GROUPED),
    "deepseek_v2_latent": ("deepseek_v2", LLAMA_LIKE | EXPERTS | LATENT),
    "deepseek_v3_latent": ("deepseek_v3", LLAMA_LIKE | EXPERTS | LATENT),
    "gemma3n_shared_keys": ("gemma3n_text", HYBRID | GEMMA3N),
    "qwen3_next_linear": ("qwen3_next", GROUPED | EXPERTS | LINEAR_ATTENTION),
    "jamba_state_space": ("jamba", GROUPED | {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2}),
    "falcon_h1_state_space": ("falcon_h1", GROUPED | MAMBA_LAYERS),
    "mamba": ("mamba", LLAMA_LIKE | {"state_size": 8}),
}
# Where the weights of seed 0 give fewer than four different tokens to some prompt, or two nearly equal logits.
SEEDS = {
    "llama_mqa": 2,
    "qwen3_experts": 8,
    "gemma2_hybrid_softcap": 4,
    "phi": 5,
    "phi3": 2,
    "gpt_neox": 4,
    "opt": 8,
    "starcoder2": 4,
    "exaone4_hybrid": 11,
    "falcon_mqa": 2,
    "mpt_alibi": 1,
}


def make_config(family: str) -> Any:
    """A new config of one of FAMILIES."""
    model_type, options = FAMILIES[family]
    return AutoConfig.for_model(model_type, **options)


CONFIGS: dict[str, Any] = {
    "llama_gqa": make_config("llama_gqa"),
    "llama_mqa": make_config("llama_mqa"),
    "gpt2_learned_positions": make_config("gpt2_learned_positions"),
    "gpt_bigcode_mqa": make_config("gpt_bigcode_mqa"),
    "gemma3_hybrid_sliding": AutoConfig.for_model(
        "gemma3_text",
        **LLAMA_LIKE | {"num_hidden_layers": 6},
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=16,
    ),
}
ALL_SLIDING = make_config("mistral_all_sliding")


def make_model(config: Any, seed: int = 0) -> Any:
    """A model with random weights, large enough that its greedy tokens are not all the same."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6.0)
    return model


def make_family(family: str) -> Any:
    """A model of one of FAMILIES whose greedy tokens vary, with attention sinks as large as its scores."""
    model = make_model(make_config(family), SEEDS.get(family, 0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".sinks"):
                parameter.copy_(torch.linspace(2.0, 20.0, parameter.numel()))
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


def logits_and_counts(model, cache, n_prompt=90, n_new=60, change=None, batch=1):
    """The logits of every step, and what was counted but for times; `change` is done to the cache midway."""
    ids, logits = make_prompt(n_prompt, batch).ids, []
    cache.prompt_tokens = n_prompt
    with cache.attached(model), torch.inference_mode():
        out = model(ids, past_key_values=cache).logits[:, -1:]
        for step in range(n_new):
            if change is not None and step == n_new // 2:
                change(cache)
            out = model(out.argmax(-1), past_key_values=cache).logits
            logits.append(out)
    counts = [
        {name: value for name, value in one.items() if not name.endswith("_ms")} for one in cache.recorder.step_dicts()
    ]
    return torch.cat(logits), counts, cache.recorder.request_dicts()
