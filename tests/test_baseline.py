"""The baseline is plain transformers, measured: the same tokens, sizes that a hand can check, times that add up."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache, QuantizedCache, StaticCache

import max_context
from config_schema import BaselineExperiment
from generation import HFCache, failed_run, generate
from inference_baseline import run
from max_context import RESOLUTION, find_max_context
from metrics import RunResult
from models import load_model
from run_specs import expand
from workloads import encode_prompts, prompt_tokens

KV_BYTES_PER_TOKEN = 2 * 3 * 2 * 16 * 4  # K and V, layers, KV heads, head_dim, float32: the tiny Llama


def spec_of(**keys):
    """The first run of a baseline experiment with few tokens."""
    experiment = {"context_lengths": [40], "num_runs": 1, "max_new_tokens": 12, "warmup_runs": 0, "device": "cpu"}
    return expand([BaselineExperiment(mode="baseline", **experiment | keys)])[0]


def plain_tokens(loaded, prompt, n_tokens, mask=None, **options):
    """New tokens as `model.generate` gives them without this project."""
    ids = torch.tensor(prompt)
    mask = torch.ones_like(ids) if mask is None else torch.tensor(mask)
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options}
    with torch.inference_mode():
        output = loaded.model.generate(ids, attention_mask=mask, max_new_tokens=n_tokens, **options)
    return output[:, ids.shape[1] :].tolist()


def measured_tokens(spec, loaded, prompt=None, **how):
    return run(spec, loaded, prompt=prompt, **how).tokens["ids"]


@pytest.fixture
def lively():
    """A tiny model whose tokens vary and whose generation config a test may change."""
    loaded = load_model("random:configs/models/tiny-llama.json", device="cpu")
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6.0)
    return loaded


# --- tokens -------------------------------------------------------------------------------------------------


def caches_of_transformers(config):
    """Each cache as transformers makes it, for a context of 40 and 12 new tokens."""
    return {
        "dynamic": DynamicCache(config=config),
        "static": StaticCache(config=config, max_cache_len=52),
        "quantized": QuantizedCache(backend="fp8", config=config),
    }


@pytest.mark.parametrize("implementation", ["dynamic", "static", "quantized"])
@pytest.mark.parametrize("name", ["lively", "smollm2"])
def test_tokens_are_those_of_plain_generation_with_the_same_cache(name, implementation, request):
    loaded = request.getfixturevalue(name)
    prompt = prompt_tokens(loaded.tokenizer, loaded.shape.vocab_size, 40, 1, seed=0)
    cache = caches_of_transformers(loaded.model.config)[implementation]
    expected = plain_tokens(loaded, prompt, 12, past_key_values=cache)
    assert len(set(expected[0])) > 5
    assert measured_tokens(spec_of(cache_implementation=implementation), loaded, prompt) == expected


def test_a_chunked_prefill_changes_no_token(lively):
    whole = measured_tokens(spec_of(), lively)
    assert measured_tokens(spec_of(prefill_chunk_size=7), lively) == whole


@pytest.mark.parametrize("implementation", ["dynamic", "static"])
def test_padded_rows_of_a_batch_give_the_tokens_they_give_alone(lively, implementation):
    spec = spec_of(batch_size=2, cache_implementation=implementation)
    long, short = prompt_tokens(None, 512, 40, 2, seed=0)
    short = short[:23]
    batch = [long, [0] * 17 + short]
    mask = [[1] * 40, [0] * 17 + [1] * 23]
    alone = [plain_tokens(lively, [row], 12)[0] for row in (long, short)]
    assert measured_tokens(spec, lively, batch, attention_mask=mask) == alone


def test_padded_english_prompts_give_the_tokens_they_give_alone(smollm2):
    texts = ["The capital of France is", "One, two, three, four, five, six, seven,"]
    rows, mask = encode_prompts(smollm2.tokenizer, texts)
    assert sum(map(sum, mask)) < len(rows) * len(rows[0])  # one of them is padded
    result = run(spec_of(max_new_tokens=5, batch_size=2), smollm2, prompt=rows, attention_mask=mask)
    alone = [plain_tokens(smollm2, [smollm2.tokenizer(text)["input_ids"]], 5)[0] for text in texts]
    assert result.tokens["ids"] == alone
    assert "Paris" in result.tokens["text"][0]
    assert "eight" in result.tokens["text"][1]


def test_without_stop_at_eos_a_run_makes_all_its_tokens(lively):
    tokens = measured_tokens(spec_of(), lively)
    lively.model.generation_config.eos_token_id = tokens[0][2]
    assert measured_tokens(spec_of(), lively) == tokens


@pytest.mark.parametrize("as_list", [False, True], ids=["one_end_token", "list_of_end_tokens"])
def test_with_stop_at_eos_a_run_ends_at_the_end_token(lively, as_list):
    tokens = measured_tokens(spec_of(), lively)[0]
    end = tokens.index(tokens[4])
    lively.model.generation_config.eos_token_id = [511, tokens[4]] if as_list else tokens[4]
    result = run(spec_of(stop_at_eos=True), lively)
    assert result.tokens["ids"] == [tokens[: end + 1]]
    assert result.timing["n_tokens"] == end + 1


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True, "temperature": 5.0, "top_k": 3, "min_p": 0.9},
        {"repetition_penalty": 9.0, "encoder_repetition_penalty": 3.0, "no_repeat_ngram_size": 1},
        {"suppress_tokens": list(range(400))},
        {"forced_eos_token_id": 7},
        {"num_beams": 3},
        {"max_length": 5, "max_new_tokens": 5, "min_new_tokens": 90},
        {"cache_implementation": "static"},  # refused by `generate` beside a cache that is given
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_the_models_own_generation_settings_change_no_token_and_are_kept(lively, settings):
    tokens = measured_tokens(spec_of(), lively)
    own = lively.model.generation_config
    for name, value in settings.items():
        setattr(own, name, value)
    assert measured_tokens(spec_of(), lively) == tokens
    assert lively.model.generation_config is own


def test_sampling_repeats_with_its_seed_and_differs_with_another(lively):
    prompt = prompt_tokens(None, 512, 40, 1, seed=0)
    tokens = {
        seed: measured_tokens(spec_of(do_sample=True, temperature=2.0, seed=seed), lively, prompt) for seed in (3, 4)
    }
    assert tokens[3] != tokens[4]
    assert measured_tokens(spec_of(do_sample=True, temperature=2.0, seed=3), lively, prompt) == tokens[3]


def test_sampling_from_the_likeliest_token_alone_is_greedy(lively):
    assert measured_tokens(spec_of(do_sample=True, top_k=1), lively) == measured_tokens(spec_of(), lively)


def test_a_run_is_compared_with_the_reference_it_is_given(tiny_llama):
    tokens = measured_tokens(spec_of(), tiny_llama)
    other = [[*tokens[0][:7], 0, *tokens[0][8:]]]
    assert run(spec_of(), tiny_llama, reference=tokens).quality == {
        "exact": True,
        "matches_baseline": True,
        "first_divergent_token": None,
    }
    assert run(spec_of(), tiny_llama, reference=other).quality == {
        "exact": True,
        "matches_baseline": False,
        "first_divergent_token": 7,
    }
    assert run(spec_of(), tiny_llama).quality["matches_baseline"] is None


# --- what is measured ---------------------------------------------------------------------------------------


def test_time_to_first_token_and_the_gaps_after_it_add_up_to_the_whole(tiny_llama):
    timing = run(spec_of(), tiny_llama).timing
    assert len(timing["itl_ms"]) == timing["n_tokens"] - 1 == 11
    assert all(gap > 0 for gap in timing["itl_ms"])
    assert timing["ttft_ms"] + sum(timing["itl_ms"]) == pytest.approx(timing["e2e_ms"])
    assert timing["prefill_ms"] + timing["decode_ms"] == pytest.approx(timing["e2e_ms"])
    assert timing["tpot_ms"] == pytest.approx((timing["e2e_ms"] - timing["ttft_ms"]) / 11)
    assert timing["clock"] == "perf_counter"


def test_one_token_has_no_time_per_output_token(tiny_llama):
    timing = run(spec_of(max_new_tokens=1), tiny_llama).timing
    assert timing["n_tokens"] == 1
    assert (timing["tpot_ms"], timing["decode_ms"], timing["itl_ms"]) == (None, None, [])


def test_batch_throughput_counts_the_tokens_of_all_rows(tiny_llama):
    timing = run(spec_of(batch_size=3), tiny_llama).timing
    assert timing["batch_tokens_per_second"] == pytest.approx(3 * 12 * 1000 / timing["e2e_ms"])


@pytest.mark.parametrize(
    ("implementation", "positions", "bytes_share"),
    [
        ("dynamic", 40 + 12 - 1, 1.0),  # the last token is never fed back
        ("static", 40 + 12, 1.0),  # allocated for all beforehand
        ("quantized", 40 + 12 - 1, 0.25),  # fp8 in place of float32
    ],
)
@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_bytes_of_the_cache_are_those_of_its_positions(
    tiny_llama, implementation, positions, bytes_share, batch_size
):
    memory = run(spec_of(cache_implementation=implementation, batch_size=batch_size), tiny_llama).memory
    assert memory["device_kv_bytes"] == batch_size * positions * KV_BYTES_PER_TOKEN * bytes_share
    assert memory["kv_bytes_total"] == batch_size * (40 + 12 - 1) * KV_BYTES_PER_TOKEN
    assert (memory["host_kv_bytes"], memory["staging_bytes"]) == (0, None)


def test_without_a_gpu_its_memory_and_power_are_null(tiny_llama):
    result = run(spec_of(), tiny_llama)
    assert [result.memory[key] for key in ("gpu_memory_mb", "gpu_peak_mb", "gpu_delta_mb")] == [None, None, None]
    assert set(result.power.values()) == {None}
    assert result.memory["rss_mb"] > 100


def test_only_the_first_repetition_warms_up_and_a_warm_up_is_not_reported(tiny_llama, monkeypatch):
    started, told = [], []
    start = HFCache.start
    monkeypatch.setattr(HFCache, "start", lambda *arguments: started.append(arguments) or start(*arguments))
    first = spec_of(warmup_runs=2)
    run(first, tiny_llama, on_token=lambda *so_far: told.append(so_far))
    assert len(started) == 3
    assert told == [(n_tokens, None) for n_tokens in range(1, 13)]  # nothing is paged, so nothing hits
    run(replace(first, repetition=1), tiny_llama)
    assert len(started) == 4


def test_a_result_says_what_ran_where(tiny_llama):
    result = run(spec_of(seed=5), tiny_llama)
    assert result.ok
    assert result.model["random_weights"] is True
    assert result.model["kv_bytes_per_token"] == KV_BYTES_PER_TOKEN
    assert result.model["weight_bytes"] >= 4 * result.model["n_parameters"]
    assert result.context["tokens"] == result.context["requested_tokens"] == 40
    assert result.context["prompt_sha256"] != run(spec_of(seed=6), tiny_llama).context["prompt_sha256"]
    assert result.tokens["text"] is None
    assert (result.cache, result.prefetch, result.steps) == (None, None, None)


# --- quantised weights, several devices ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_folder(tiny_llama, tmp_path_factory):
    """The tiny model as files: random weights as such can be neither quantised nor spread."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_llama.model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(("quantization", "bytes_per_weight"), [("8bit", 1), ("4bit", 0.5)])
def test_quantised_weights_run_on_a_cpu_in_fewer_bytes(tiny_folder, tiny_llama, quantization, bytes_per_weight):
    quantised = load_model(tiny_folder, device="cpu", quantization=quantization)
    result = run(spec_of(quantization=quantization), quantised)
    whole = run(spec_of(), tiny_llama).model
    linears = [module for module in tiny_llama.model.model.modules() if isinstance(module, torch.nn.Linear)]
    saved = sum(linear.weight.numel() for linear in linears) * (4 - bytes_per_weight)
    assert len(result.tokens["ids"][0]) == 12
    assert result.model["n_parameters"] == whole["n_parameters"]
    assert whole["weight_bytes"] - result.model["weight_bytes"] == pytest.approx(saved, rel=0.05)


def test_device_map_auto_runs_where_there_is_only_a_cpu(tiny_folder, tiny_llama):
    spread = load_model(tiny_folder, device="cpu", device_map="auto")
    assert measured_tokens(spec_of(device_map="auto"), spread) == measured_tokens(spec_of(), tiny_llama)


# --- what cannot run ----------------------------------------------------------------------------------------


def test_the_offloaded_cache_on_a_cpu_is_refused_with_the_reason(tiny_llama):
    spec = spec_of(cache_implementation="offloaded", device="auto")
    with pytest.raises(ValueError, match=r"offloaded .* needs a CUDA device"):
        run(spec, tiny_llama)


@pytest.mark.cuda
def test_the_offloaded_cache_on_cuda_gives_the_tokens_of_the_dynamic_one():
    loaded = load_model("random:configs/models/tiny-llama.json", device="cuda")
    spec = spec_of(device="cuda", context_lengths=[300])
    dynamic = run(spec, loaded)
    offloaded = run(replace(spec, cache_implementation="offloaded"), loaded)
    assert offloaded.tokens["ids"] == dynamic.tokens["ids"]
    assert offloaded.memory["host_kv_bytes"] > 0
    assert offloaded.memory["device_kv_bytes"] < dynamic.memory["device_kv_bytes"]
    assert dynamic.timing["clock"] == "cuda_events"
    assert dynamic.memory["gpu_peak_mb"] >= dynamic.memory["gpu_memory_mb"] > 0


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), "out_of_memory", "OutOfMemoryError: CUDA out of memory"),
        (MemoryError(), "out_of_memory", "MemoryError"),
        (ValueError("too long"), "error", "ValueError: too long"),
    ],
)
def test_a_run_that_raised_is_a_row_with_status_and_reason(error, status, text):
    result = failed_run(spec_of(), error)
    assert (result.status, result.error, result.ok) == (status, text, False)
    assert result.to_dict().keys() == RunResult(spec={}, run_id="").to_dict().keys()
    assert (result.timing, result.memory, result.tokens) == (None, None, None)


# --- the longest context that fits --------------------------------------------------------------------------


def search(loaded, budget_mb, **keys):
    return find_max_context(spec_of(**keys), loaded, budget_mb, lambda attempt: None)


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("exact", [33, 127, 128, 500, 1000])
def test_the_longest_context_is_found_within_the_resolution(tiny_llama, exact, batch_size):
    """The budget holds weights and `exact` positions; the search generates 4 tokens, of which 3 are fed back."""
    budget_bytes = tiny_llama.model.get_memory_footprint() + batch_size * (exact + 3) * KV_BYTES_PER_TOKEN
    found = search(tiny_llama, budget_bytes / 2**20, batch_size=batch_size)
    assert exact - RESOLUTION < found.context_tokens <= exact
    assert found.limited_by == "memory"
    assert all(attempt.fits == (attempt.context_tokens <= exact) for attempt in found.attempts)
    assert max(attempt.context_tokens for attempt in found.attempts if attempt.fits) == found.context_tokens


def test_a_cache_of_a_quarter_of_the_bytes_holds_four_times_the_context(tiny_llama):
    budget_mb = (tiny_llama.model.get_memory_footprint() + 200 * KV_BYTES_PER_TOKEN) / 2**20
    found = search(tiny_llama, budget_mb, cache_implementation="quantized")
    assert 800 - 3 - RESOLUTION < found.context_tokens <= 800 - 3


def test_where_memory_holds_out_the_models_positions_are_the_limit():
    gpt2 = load_model("random:configs/models/tiny-gpt2.json", device="cpu")
    found = search(gpt2, 1000.0, model_name="random:configs/models/tiny-gpt2.json")
    assert (found.context_tokens, found.limited_by) == (1024 - 4, "positions")


def test_out_of_memory_ends_an_attempt_and_not_the_search(tiny_llama, monkeypatch):
    def generate_up_to_300(spec, model, cache, prompt, *more):
        if len(prompt[0]) > 300:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return generate(spec, model, cache, prompt, *more)

    monkeypatch.setattr(max_context, "generate", generate_up_to_300)
    found = search(tiny_llama, 1000.0)
    assert 300 - RESOLUTION < found.context_tokens <= 300
    assert {attempt.used_mb for attempt in found.attempts if attempt.context_tokens > 300} == {None}


def test_a_budget_below_the_weights_is_refused(tiny_llama):
    with pytest.raises(ValueError, match="not even 32 tokens of context fit"):
        search(tiny_llama, 0.1)


def test_on_a_cpu_the_search_needs_a_budget(tiny_llama):
    with pytest.raises(ValueError, match="needs --memory-budget-mb"):
        search(tiny_llama, None)
