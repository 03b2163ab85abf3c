"""The exact default experiments on the real model: every mode gives the tokens of the baseline at every context."""

from __future__ import annotations

import dataclasses

import pytest

from experiments import load_experiments
from registry import MODES
from run_specs import expand
from utils import PROJECT_FOLDER

DEFAULT_RUNS = [
    dataclasses.replace(spec, max_new_tokens=12, warmup_runs=0)
    for spec in expand(load_experiments(PROJECT_FOLDER / "experiment_config.yaml"))
    if spec.repetition == 0 and spec.exact
]


@pytest.mark.parametrize("context", sorted({spec.context_length for spec in DEFAULT_RUNS}))
def test_every_mode_gives_the_baselines_tokens_on_real_text(smollm2, context):
    reference, *others = [spec for spec in DEFAULT_RUNS if spec.context_length == context]
    assert reference.is_reference and {spec.mode for spec in others} == {"reactive", "predictive"}
    tokens = MODES.load(reference.mode)(reference, smollm2).tokens["ids"]
    for spec in others:
        result = MODES.load(spec.mode)(spec, smollm2, reference=tokens)
        assert result.quality == {"exact": True, "matches_baseline": True, "first_divergent_token": None}
        assert result.tokens["ids"] == tokens


def test_the_default_budget_makes_pages_move_at_the_longer_contexts(smollm2):
    """1,000 and 2,000 tokens are 8 and 16 pages of 128 and a part; 6 of them may stay."""
    reactive = [spec for spec in DEFAULT_RUNS if spec.mode == "reactive"]
    missed = {
        spec.context_length: MODES.load("reactive")(dataclasses.replace(spec, max_new_tokens=3), smollm2).cache[
            "misses"
        ]
        for spec in reactive
    }
    layers, steps = 30, 2
    assert missed == {500: 0, 1000: layers * steps * (8 - 6), 2000: layers * steps * (16 - 6)}


def test_chunked_prefill_through_a_small_budget_gives_the_same_tokens(smollm2):
    reference, reactive, _ = [spec for spec in DEFAULT_RUNS if spec.context_length == 1000]
    tokens = MODES.load("baseline")(reference, smollm2).tokens["ids"]
    paging = dataclasses.replace(reactive.paging, max_gpu_pages=3, staging_pages=2)
    spec = dataclasses.replace(reactive, paging=paging, prefill_chunk_size=200)
    result = MODES.load("reactive")(spec, smollm2, reference=tokens)
    assert result.quality["matches_baseline"]
    assert result.cache["prefill"]["chunks"] == 5
    assert result.memory["device_kv_bytes"] == 30 * (3 + 2) * 2 * 3 * 128 * 64 * 4  # 1000 tokens would be 46 MB


def test_rows_of_different_lengths_give_what_each_gives_alone(smollm2):
    """Left padding is honoured by paged attention, on real text, in one batch."""
    import torch

    from kv_paging import PagedKVCache
    from workloads import encode_prompts

    texts = ["The key to a good cache is", "Pages of memory are moved between the device and the host because"]
    rows, mask = encode_prompts(smollm2.tokenizer, texts)
    model, options = smollm2.model, {"max_new_tokens": 20, "do_sample": False}
    cache = PagedKVCache(model.config, page_size=4, max_gpu_pages=3, staging_pages=2, link="memory")
    with cache.attached(model):
        together = model.generate(
            torch.tensor(rows), attention_mask=torch.tensor(mask), past_key_values=cache, **options
        )
    for row, text in enumerate(texts):
        alone = model.generate(**smollm2.tokenizer(text, return_tensors="pt"), **options)
        assert together[row, -20:].tolist() == alone[0, -20:].tolist()
