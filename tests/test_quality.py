"""The quality of a run is measured with a cache like its own, beside the baseline on the same text and items."""

from __future__ import annotations

import json

import pytest

import quality
from experiments import MODE_CLASSES
from fidelity import compare, read_text
from generation import HFCache
from kv_paging import PagedKVCache
from launchers import LocalLauncher
from planning import plan
from predictive_prefetch import PrefetchingKVCache
from progress import Silent
from quality import make_cache, needs_quality, quality_figures
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


def test_a_text_longer_than_the_models_positions_is_refused_before_it_is_read(tiny_llama, monkeypatch):
    limit = tiny_llama.shape.max_positions
    spec = spec_of("reactive", TINY, {"fidelity_tokens": 8}, context=limit - 7)
    monkeypatch.setattr(quality, "read_text", lambda *given: pytest.fail("it was read"))
    assert f"{limit + 1} positions, and the model has {limit}" in quality_figures(spec, tiny_llama)["error"]


def test_an_approximate_run_has_its_fidelity_measured_unless_it_is_turned_off():
    assert spec_of("reactive", TINY, None).quality is None
    assert spec_of("reactive", TINY, None, **WINDOW).quality == QualitySpec(32)
    assert spec_of("reactive", TINY, None, on_miss="skip").quality == QualitySpec(32)
    assert spec_of("baseline", TINY, None, cache_implementation="quantized").quality == QualitySpec(32)
    assert spec_of("reactive", TINY, False, **WINDOW).quality is None


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
