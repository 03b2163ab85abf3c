"""The quality of a run is measured with a cache like its own, beside the baseline on the same text and items."""

from __future__ import annotations

import json
import math
import weakref
from dataclasses import replace

import pytest
import torch

import quality
import workloads
from cache_settings import Paging
from experiments import MODE_CLASSES
from fidelity import ROUNDING_NATS, compare, rounding_explains
from generation import HFCache
from kv_paging import PagedKVCache
from launchers import LocalLauncher
from planning import plan
from predictive_prefetch import PrefetchingKVCache
from progress import Silent
from quality import EXACT_PAGES, HF_CACHE, make_cache, needs_quality, quality_figures
from reading import read_text
from registry import TASKS
from result_store import ResultStore
from run_specs import QualitySpec, expand
from sweep import Sweep
from workloads import prompt_tokens

PAGED = {"page_size": 16, "max_gpu_pages": 4, "staging_pages": 4, "link": "memory"}
WINDOW = {"selector": "window", "attention_fraction": 0.3}


def specs_of(mode, model_name, asked, context=90, **settings):
    fields = {"context_lengths": [context], "num_runs": 2, "max_new_tokens": 4, "quality": asked} | settings
    if mode != "baseline":
        fields = PAGED | fields
    return expand([MODE_CLASSES[mode](mode=mode, model_name=model_name, **fields)])


def spec_of(*arguments, **settings):
    return specs_of(*arguments, **settings)[0]


TINY = "random:configs/models/tiny-llama.json"


def test_only_the_first_repetition_of_a_run_that_asks_for_quality_has_it():
    first, second = specs_of("reactive", TINY, {"fidelity_tokens": 8})
    assert needs_quality(first) and not needs_quality(second)
    assert not needs_quality(spec_of("reactive", TINY, None))


@pytest.mark.parametrize(
    ("mode", "settings", "exact"),
    [
        ("baseline", {}, True),
        ("reactive", {}, True),
        ("predictive", {"predictor": "last_step"}, True),
        ("predictive", {"predictor": "oracle"} | WINDOW, False),
        ("reactive", WINDOW, False),
    ],
    ids=["baseline", "reactive", "predictive", "oracle under a selector", "window"],
)
def test_exact_runs_prove_their_zeros_and_approximate_ones_show_their_distance(tiny_llama, mode, settings, exact):
    figures = quality_figures(spec_of(mode, TINY, {"fidelity_tokens": 10}, **settings), tiny_llama)
    assert figures["tasks"] is None
    fidelity = figures["fidelity"]
    assert (fidelity["kl_max"] < 1e-6) is exact
    assert fidelity["n_tokens"] == 10
    assert fidelity["within_rounding"] is (True if exact else None)
    assert fidelity["reference"] == HF_CACHE and "error" not in figures
    if mode == "baseline":
        assert fidelity["attention_mass_recall"] is fidelity["page_recall"] is None
    else:
        assert (fidelity["attention_mass_recall"] == pytest.approx(1.0)) is exact
        assert (fidelity["page_recall"] == 1.0) is exact


def test_the_text_is_the_prompt_of_the_run_and_what_follows_it(tiny_llama):
    spec = spec_of("reactive", TINY, {"fidelity_tokens": 10}, **WINDOW)
    text = prompt_tokens(None, tiny_llama.shape.vocab_size, 100, 1, spec.seed)
    assert text[0][:90] == prompt_tokens(None, tiny_llama.shape.vocab_size, 90, 1, spec.seed)[0]
    baseline = read_text(tiny_llama, HFCache("dynamic", tiny_llama), text, 10, None)
    expected = compare(read_text(tiny_llama, make_cache(spec, tiny_llama), text, 10, None), baseline, text, 10)
    measured = quality_figures(spec, tiny_llama)["fidelity"]
    assert {key: measured[key] for key in expected} == pytest.approx(expected)


@pytest.mark.parametrize(
    ("mode", "settings", "kind"),
    [
        ("baseline", {"cache_implementation": "static"}, HFCache),
        ("reactive", {}, PagedKVCache),
        ("predictive", {}, PagedKVCache),
        ("predictive", {"on_miss": "skip"}, PrefetchingKVCache),
    ],
)
def test_the_cache_attends_to_what_the_runs_does_and_prefetch_counts_where_it_may_skip(
    tiny_llama, mode, settings, kind
):
    spec = spec_of(mode, TINY, {"fidelity_tokens": 4}, **settings)
    cache = make_cache(spec, tiny_llama)
    assert type(getattr(cache, "cache", cache)) is kind
    if mode != "baseline":
        assert cache.cache.paging == spec.paging


def test_tasks_are_scored_beside_the_baseline_on_the_same_items(smollm2, monkeypatch):
    asked = {"fidelity_tokens": 0, "tasks": ["passkey"], "samples": 3, "lengths": [250]}
    made = []
    original = quality.items
    monkeypatch.setattr(quality, "items", lambda *given: made.append(original(*given)) or made[-1])
    baseline, exact, window = (
        quality_figures(spec_of(mode, "smollm2-135m", asked, **settings), smollm2)["tasks"][0]
        for mode, settings in (("baseline", {}), ("reactive", {}), ("reactive", WINDOW))
    )
    assert made[0] == made[1] == made[2] and len(made[0]) == 3
    assert baseline["mean"] == exact["mean"] == exact["baseline"]["mean"] == 1.0
    assert window["baseline"] == baseline["baseline"]
    assert window["mean"] < 1.0  # the key lies outside the window in some item
    assert window["discriminates"] is True
    assert [one["baseline_score"] for one in window["items"]] == [1.0] * 3
    assert window["mean"] == pytest.approx(sum(one["score"] for one in window["items"]) / 3)
    assert (window["task"], window["tokens"], window["n"]) == ("passkey", 250, 3)


def test_tasks_without_a_tokenizer_are_refused_in_words_and_fidelity_is_measured_all_the_same(tiny_llama):
    figures = quality_figures(spec_of("reactive", TINY, {"tasks": ["passkey"], "fidelity_tokens": 4}), tiny_llama)
    assert figures["error"].startswith("passkey at 90 tokens: ValueError: quality tasks need a tokenizer")
    assert figures["fidelity"]["n_tokens"] == 4 and figures["tasks"] is None


def test_a_run_that_fills_the_models_positions_is_judged_on_a_shorter_prompt(tiny_llama):
    limit = tiny_llama.shape.max_positions
    figures = quality_figures(spec_of("reactive", TINY, {"fidelity_tokens": 8}, context=limit - 4), tiny_llama)
    assert "error" not in figures
    assert figures["fidelity"]["prompt_tokens"] == limit - 8
    few = quality_figures(spec_of("reactive", TINY, {"fidelity_tokens": limit}, context=20), tiny_llama)
    assert "leave no room for a prompt; ask for fewer" in few["error"]


def test_a_task_of_a_run_that_fills_the_positions_is_asked_with_a_shorter_prompt(smollm2):
    asked = {"fidelity_tokens": 0, "tasks": ["passkey"], "samples": 1}
    short = replace(smollm2, shape=replace(smollm2.shape, max_positions=204))
    figures = quality_figures(spec_of("reactive", "smollm2-135m", asked, context=200, page_size=64), short)
    assert "error" not in figures and 150 < figures["tasks"][0]["tokens"] < 200
    given = quality_figures(spec_of("reactive", "smollm2-135m", asked | {"lengths": [200]}, page_size=64), short)
    assert "exceed the model's 204 positions" in given["error"]


def test_an_approximate_run_has_its_fidelity_measured_unless_it_is_turned_off():
    assert spec_of("reactive", TINY, None).quality is None
    assert spec_of("reactive", TINY, None, **WINDOW).quality == QualitySpec(32)
    assert spec_of("reactive", TINY, None, on_miss="skip").quality == QualitySpec(32)
    assert spec_of("baseline", TINY, None, cache_implementation="quantized").quality == QualitySpec(32)
    assert spec_of("reactive", TINY, False, **WINDOW).quality is None


@pytest.mark.parametrize("selector", [WINDOW, {"selector": "quest", "attention_fraction": 0.8}])
def test_a_run_that_claims_to_be_exact_and_leaves_pages_out_is_an_error(tiny_llama, monkeypatch, selector):
    monkeypatch.setattr(Paging, "exact", True)
    figures = quality_figures(spec_of("reactive", TINY, {"fidelity_tokens": 4}, **selector), tiny_llama)
    assert figures["fidelity"]["within_rounding"] is False
    assert figures["error"].startswith("not exact, though it should be: KL ")


def test_what_rounding_explains_depends_on_the_numbers_and_never_on_pages_left_out():
    figures = {"kl_mean": 2e-3, "attended_pages": 16.0, "pages": 16.0}
    assert [rounding_explains(figures, dtype, False) for dtype in ROUNDING_NATS] == [False, False, True]
    assert rounding_explains(figures, "float32", True)  # 8-bit weights: 7e-3 nats were measured of an exact run
    assert not rounding_explains(figures | {"attended_pages": 15.9}, "bfloat16", True)
    assert rounding_explains({"kl_mean": 0.0, "attended_pages": None, "pages": None}, "float32", False)


def test_a_long_text_that_begins_again_says_so(smollm2, monkeypatch):
    spec = spec_of("reactive", "smollm2-135m", {"fidelity_tokens": 2}, context=100, page_size=64)
    assert quality_figures(spec, smollm2)["fidelity"]["text_repeats"] is False
    n_prose = len(workloads.tokenised_prose(smollm2.tokenizer)[0])
    assert not workloads.text_repeats(smollm2.tokenizer, n_prose)
    assert workloads.text_repeats(smollm2.tokenizer, n_prose + 1)
    assert not workloads.text_repeats(None, 10**9)


def test_what_was_wanted_last_is_kept_longest(tiny_llama, monkeypatch):
    n_read, original = [], quality.read_text
    monkeypatch.setattr(quality, "read_text", lambda *given: n_read.append(given) or original(*given))
    monkeypatch.setattr(quality, "_known", weakref.WeakKeyDictionary())
    for pages in range(3, 11):  # one reading each beside that of the baseline and that of every page
        settings = {"selector": "window", "attention_pages": pages, "max_gpu_pages": 12, "context": 180}
        quality_figures(spec_of("reactive", TINY, {"fidelity_tokens": 2}, **settings), tiny_llama)
    assert len(n_read) == 2 + 8


class NoRoom:
    def __init__(self, implementation, model):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_where_the_whole_cache_does_not_fit_exact_paging_is_the_reference(tiny_llama, monkeypatch):
    asked, far = {"fidelity_tokens": 7}, {"context": 75}
    expected = quality_figures(spec_of("reactive", TINY, asked, **WINDOW, **far), tiny_llama)["fidelity"]
    monkeypatch.setattr(quality, "_known", weakref.WeakKeyDictionary())
    monkeypatch.setattr(quality, "HFCache", NoRoom)
    figures = quality_figures(spec_of("reactive", TINY, asked, **WINDOW, **far), tiny_llama)["fidelity"]
    assert (expected.pop("reference"), figures.pop("reference")) == (HF_CACHE, EXACT_PAGES)
    assert expected.pop("within_rounding") is figures.pop("within_rounding") is None
    assert figures == pytest.approx(expected, rel=1e-3)
    whole = quality_figures(spec_of("baseline", TINY, asked, **far), tiny_llama)
    assert whole["fidelity"] is None and "out of memory" in whole["error"]


def test_more_than_can_be_kept_is_refused_with_what_can(tiny_llama, monkeypatch):
    n_pages, heads = -(-98 // 16), tiny_llama.model.config.num_attention_heads
    per_step = tiny_llama.shape.vocab_size + tiny_llama.shape.n_paged_layers * heads * n_pages
    monkeypatch.setattr(quality, "MOST_READING_BYTES", 4 * per_step * 5)
    assert (
        "ask for at most 5" in quality_figures(spec_of("reactive", TINY, {"fidelity_tokens": 8}), tiny_llama)["error"]
    )
    assert "error" not in quality_figures(spec_of("reactive", TINY, {"fidelity_tokens": 5}), tiny_llama)


def test_prose_is_scored_by_perplexity_beside_the_baselines(smollm2):
    asked = {"fidelity_tokens": 0, "tasks": [{"name": "prose_perplexity", "n_scored": 12}], "samples": 2}
    paged = {"context": 200, "page_size": 16}
    exact, window = (
        quality_figures(spec_of("reactive", "smollm2-135m", asked, **paged, **settings), smollm2)["tasks"][0]
        for settings in ({}, WINDOW)
    )
    assert (exact["task"], exact["unit"]) == ("prose_perplexity (n_scored=12)", "perplexity")
    assert exact["discriminates"] is None
    assert exact["mean"] == pytest.approx(exact["baseline"]["mean"], rel=1e-4)
    assert window["mean"] != pytest.approx(window["baseline"]["mean"], rel=1e-3)
    assert window["attended_pages"] < window["pages"] == exact["pages"] == exact["attended_pages"]
    losses = []
    for index in range(2):
        prompt = TASKS.create("prose_perplexity").item(smollm2.tokenizer, 200, 0, index).prompt
        with torch.no_grad():
            log_probs = smollm2.model(torch.tensor([prompt])).logits[0].double().log_softmax(-1)
        losses += [-log_probs[place - 1, prompt[place]].item() for place in range(200 - 12, 200)]
    assert exact["mean"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
    assert exact["baseline"]["low"] < exact["baseline"]["mean"] < exact["baseline"]["high"]


def test_predictors_over_the_same_pages_share_a_reading_and_runs_that_skip_do_not(tiny_llama, monkeypatch):
    n_read = []
    original = quality.read_text
    monkeypatch.setattr(quality, "read_text", lambda *given: n_read.append(given) or original(*given))
    asked, other = {"fidelity_tokens": 5}, {"context": 70}
    one = quality_figures(spec_of("predictive", TINY, asked, predictor="ema", **WINDOW, **other), tiny_llama)
    assert len(n_read) == 3  # the baseline, the run, and one in which every page is read
    assert quality_figures(spec_of("reactive", TINY, asked, **WINDOW, **other), tiny_llama) == one
    assert len(n_read) == 3
    quality_figures(spec_of("reactive", TINY, asked, on_miss="skip", **other), tiny_llama)
    quality_figures(spec_of("reactive", TINY, asked, on_miss="skip", **other), tiny_llama)
    assert len(n_read) == 5


def test_what_was_measured_stays_where_quality_fails(tmp_path):
    spec = spec_of("reactive", TINY, {"tasks": ["passkey"], "fidelity_tokens": 0})
    sweep = Sweep(plan([spec]), ResultStore(tmp_path), LocalLauncher(), Silent())
    sweep.run()
    (result,) = sweep.results
    assert result.ok and result.timing["tpot_ms"] > 0
    assert "quality tasks need a tokenizer" in result.quality["error"]
    assert result.quality["tasks"] is None
    written = json.loads(next(tmp_path.glob("reactive_*.json")).read_text())
    assert written["quality"] == result.quality
