"""The three components from the command line: what they print, what they write, what they refuse."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import component_cli
import inference_baseline
import kv_paging
import predictive_prefetch
from experiments import load_experiment
from metrics import RunResult
from planning import plan
from registry import POLICIES, PREDICTORS
from run_specs import expand

pytestmark = pytest.mark.usefixtures("logging_restored")

PROJECT = Path(kv_paging.__file__).parent
CONFIGS = sorted((PROJECT / "configs").glob("*.json"))
COMPONENTS = {"baseline": inference_baseline, "reactive": kv_paging, "predictive": predictive_prefetch}
PAGED = ["reactive", "predictive"]
JUDGED = ["--model", "random:configs/models/tiny-llama.json", "--device", "cpu"]
LLAMA = [*JUDGED, "--no-quality"]
GPT2 = ["--model", "random:configs/models/tiny-gpt2.json", "--device", "cpu"]
SMALL = [*LLAMA, "--context-length", "100", "--max-new-tokens", "6"]
BLOCKS = RunResult(spec={}, run_id="").to_dict().keys()


def component(mode, *arguments):
    return COMPONENTS[mode].main([str(argument) for argument in arguments])


def load_nothing(*names, **how):
    raise AssertionError("the model was loaded")


def shown(text):
    """The `name: value` rows of a printed table."""
    cells = [[cell.strip() for cell in line.split("│")] for line in text.splitlines() if line.count("│") == 3]
    return {name: value for _, name, value, _ in cells}


# --- the demonstrations of paging ---------------------------------------------------------------------------


@pytest.mark.parametrize("mode", PAGED)
def test_a_demonstration_prints_figures_and_that_its_tokens_are_hfs(mode, capsys, tmp_path):
    output = tmp_path / "new" / "result.json"
    code = component(mode, *SMALL, "--page-size", 16, "--max-gpu-pages", 3, "--output", output)
    figures = shown(capsys.readouterr().out)
    assert code == 0
    assert figures["tokens equal to HF's"] == "yes"
    assert figures["pages"] == "7"  # 105 positions in pages of 16
    written = json.loads(output.read_text())
    assert written.keys() == BLOCKS
    assert (written["spec"]["mode"], written["status"]) == (mode, "ok")
    cache = written["cache"]
    assert figures["hits / late / misses"] == f"{cache['hits']:,} / {cache['late']:,} / {cache['misses']:,}"
    assert figures["hit rate, %"] == f"{100 * cache['hit_rate']:.2f}"
    assert ("prefetches issued" in figures) == (mode == "predictive")


@pytest.mark.parametrize("mode", PAGED)
def test_a_demonstration_on_the_real_model_prints_its_text(mode, capsys, smollm2, monkeypatch, tmp_path):
    monkeypatch.setattr(component_cli, "load_model", lambda *names, **how: smollm2)
    output = tmp_path / "result.json"
    flags = ["--device", "cpu", "--context-length", 150, "--max-new-tokens", 6, "--output", output]
    code = component(mode, *flags, "--page-size", 32, "--max-gpu-pages", 3)
    printed = capsys.readouterr().out
    assert code == 0
    assert shown(printed)["tokens equal to HF's"] == "yes"
    heading, _, rest = printed.partition("\n")
    assert "generated text, sequence 0" in heading
    assert written_text(output).strip() in rest
    assert any(character.isalpha() for character in written_text(output))


def written_text(path):
    return json.loads(path.read_text())["tokens"]["text"][0]


@pytest.mark.parametrize("mode", PAGED)
def test_other_tokens_than_hfs_are_shown(mode, capsys, monkeypatch):
    monkeypatch.setattr(component_cli, "_reference_tokens", lambda *arguments: [[0] * 6])
    assert component(mode, *SMALL) == 0
    assert shown(capsys.readouterr().out)["tokens equal to HF's"] == "NO"


def test_all_contexts_and_repetitions_of_a_config_are_run_and_those_of_one_context_shown_together(tmp_path, capsys):
    config = tmp_path / "two.json"
    config.write_text(json.dumps({"context_lengths": [40, 60], "num_runs": 2, "max_new_tokens": 4}))
    output = tmp_path / "result.json"
    assert component("reactive", *LLAMA, "--config", config, "--output", output) == 0
    written = json.loads(output.read_text())
    assert [result["context"]["tokens"] for result in written] == [40, 40, 60, 60]
    out = capsys.readouterr().out
    assert out.count("tokens equal to HF's") == out.count("mean ± std of 2 runs") == 2


@pytest.mark.parametrize(
    ("flag", "value", "key"),
    [
        ("--policy", "fifo", "policy"),
        ("--page-size", 8, "page_size"),
        ("--max-gpu-pages", 5, "max_gpu_pages"),
        ("--predictor", "last_step", "predictor"),
        ("--prefetch-k", 1, "prefetch_k"),
        ("--overfetch", 3.5, "overfetch"),
        ("--lookahead", 2, "lookahead"),
        ("--min-confidence", 0.25, "min_confidence"),
        ("--prefetch-evicts", True, "prefetch_evicts"),
        ("--seed", 9, "seed"),
        ("--dtype", "bfloat16", "dtype"),
        ("--max-new-tokens", 3, "max_new_tokens"),
        ("--context-length", 33, "context_length"),
        ("--staging-pages", 7, "staging_pages"),
        ("--access-order", "position", "access_order"),
        ("--on-miss", "skip", "on_miss"),
        ("--host-pages", 1, "host_pages"),
        ("--link", "memory", "link"),
        ("--selector", "window", "selector"),
        ("--attention-fraction", 0.75, "attention_fraction"),
        ("--granularity", "kv_head", "granularity"),
        ("--dense-layers", 1, "dense_layers"),
    ],
)
def test_a_flag_overrides_its_key_of_the_config_and_nothing_else(flag, value, key, tmp_path, capsys):
    keys = {"context_lengths": [40], "max_new_tokens": 4, "page_size": 16, "max_gpu_pages": 4, "num_runs": 1}
    keys |= {"selector": "quest", "attention_fraction": 0.5}
    config, output = tmp_path / "config.json", tmp_path / "result.json"
    config.write_text(json.dumps(keys))
    specs = []
    for flags in ([], [flag] if value is True else [flag, value]):
        assert component("predictive", *LLAMA, "--config", config, "--output", output, *flags) == 0
        assert capsys.readouterr().err == ""
        specs.append(json.loads(output.read_text())["spec"])
    plain, overridden = (flat(spec) for spec in specs)
    changed = {name for name in plain if plain[name] != overridden[name]}
    assert changed == ({key, "requested_context_length"} if key == "context_length" else {key})
    assert overridden[key] == value


def test_the_word_for_a_threshold_that_adapts_overrides_a_number_of_the_config(tmp_path, capsys):
    config, output = tmp_path / "config.json", tmp_path / "result.json"
    config.write_text(json.dumps({"context_lengths": [40], "max_new_tokens": 4, "num_runs": 1, "min_confidence": 0.5}))
    flags = ["--config", config, "--min-confidence", "adaptive", "--output", output]
    assert component("predictive", *LLAMA, *flags) == 0
    assert json.loads(output.read_text())["spec"]["prefetch"]["min_confidence"] == "adaptive"


def flat(spec):
    """A spec with the keys of its blocks among its own."""
    return spec | spec["paging"] | spec["prefetch"] | {"paging": None, "prefetch": None}


# --- what a decode step attends to --------------------------------------------------------------------------


def test_a_selector_without_a_number_of_pages_reads_a_quarter_and_says_so(tmp_path, capsys):
    output = tmp_path / "result.json"
    assert component("reactive", *SMALL, "--page-size", 8, "--selector", "quest", "--output", output) == 0
    printed = capsys.readouterr()
    (hint,) = printed.err.splitlines()
    assert "25%" in hint
    assert "--attention-fraction" in hint
    paging = json.loads(output.read_text())["spec"]["paging"]
    assert (paging["selector"], paging["attention_fraction"], paging["attention_pages"]) == ("quest", 0.25, None)
    figures = shown(printed.out)
    assert figures["selector"] == "quest"
    assert figures["pages attended to per step"] == "4 of 14"  # a quarter of the pages of 105 positions, rounded up


@pytest.mark.parametrize("flags", [["--attention-pages", 5], ["--attention-fraction", 0.5]])
def test_a_number_of_pages_that_is_given_is_taken_without_a_word(flags, tmp_path, capsys):
    output = tmp_path / "result.json"
    flags = [*flags, "--page-size", 8, "--granularity", "kv_head", "--dense-layers", 1]
    assert component("reactive", *SMALL, "--selector", "quest", *flags, "--output", output) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    paging = json.loads(output.read_text())["spec"]["paging"]
    key = flags[0].removeprefix("--").replace("-", "_")
    assert paging[key] == flags[1]
    assert shown(printed.out)["selector"] == "quest, kv_head, dense_layers=1"


def test_a_selector_over_a_file_that_has_none_gets_the_quarter_too(tmp_path, capsys):
    config, output = tmp_path / "config.json", tmp_path / "result.json"
    config.write_text(json.dumps({"context_lengths": [40], "max_new_tokens": 4, "num_runs": 1, "page_size": 8}))
    flags = ["--config", config, "--selector", "window", "--output", output]
    assert component("reactive", *LLAMA, *flags) == 0
    assert "--selector window" in capsys.readouterr().err
    assert json.loads(output.read_text())["spec"]["paging"]["attention_fraction"] == 0.25


def test_a_number_given_as_the_link_is_its_bandwidth(tmp_path, capsys):
    output = tmp_path / "result.json"
    assert component("reactive", *SMALL, "--link", "1.5", "--output", output) == 0
    link = json.loads(output.read_text())["spec"]["paging"]["link"]
    assert link == {"bandwidth_gb_s": 1.5, "latency_us": 10.0}
    assert shown(capsys.readouterr().out)["link"] == "simulated custom, 1.5 GB/s"


def test_rows_of_what_a_run_does_not_have_are_left_out(tmp_path, capsys):
    assert component("reactive", *SMALL, "--page-size", 8) == 0
    exact = shown(capsys.readouterr().out)
    assert exact.keys().isdisjoint({"selector", "digests of pages, MiB", "KV cache on disk, MiB"})
    assert exact["pages attended to per step"] == "14 of 14"
    flags = ["--selector", "quest", "--attention-pages", 4, "--host-pages", 3, "--disk-dir", tmp_path]
    assert component("reactive", *SMALL, "--page-size", 8, *flags) == 0
    sparse = shown(capsys.readouterr().out)
    assert float(sparse["digests of pages, MiB"]) > 0
    assert float(sparse["KV cache on disk, MiB"]) > 0
    assert sparse["pages attended to per step"] == "4 of 14"


def test_stages_of_a_step_are_shown_per_token(tmp_path, capsys):
    output = tmp_path / "result.json"
    assert component("reactive", *SMALL, "--page-size", 8, "--output", output) == 0
    figures, written = shown(capsys.readouterr().out), json.loads(output.read_text())
    n_steps = 5  # of 6 new tokens, the prompt gives the first
    for name, stage in (
        ("- selecting pages, ms per token", "select_ms"),
        ("- waiting for pages, ms per token", "wait_ms"),
        ("- asking for copies, ms per token", "copy_ms"),
        ("- attention over pages, ms per token", "attend_ms"),
    ):
        assert figures[name] == f"{written['cache']['stages'][stage] / n_steps:,.2f}"
    assert figures["hit rate of plain LRU, %"] == f"{100 * written['cache']['shadow_lru_hit_rate']:.2f}"
    assert figures["time per output token, of its floor"] == f"{written['cache']['floor']['tpot_over_floor']:,.2f}"


def test_other_tokens_from_an_approximation_are_said_to_be_that(capsys, monkeypatch):
    monkeypatch.setattr(component_cli, "_reference_tokens", lambda *arguments: [[-1] * 6])
    assert component("reactive", *SMALL, "--selector", "quest", "--attention-pages", 2) == 0
    assert "no: first differs at token 0" in shown(capsys.readouterr().out)["tokens equal to HF's"]


# --- what an approximation costs in answers -----------------------------------------------------------------

APPROXIMATE = ["--context-length", 100, "--max-new-tokens", 3, "--page-size", 8, "--selector", "quest"]


@pytest.mark.parametrize("mode", PAGED)
def test_no_approximation_is_shown_without_what_it_costs(mode, tmp_path, capsys):
    output = tmp_path / "result.json"
    assert component(mode, *JUDGED, *APPROXIMATE, "--output", output) == 0
    figures, fidelity = shown(capsys.readouterr().out), json.loads(output.read_text())["quality"]["fidelity"]
    assert figures["KL divergence from HF's cache, nats"].startswith(f"{fidelity['kl_mean']:.2g} [")
    assert figures["KL divergence from HF's cache, nats"].endswith("n = 32")
    assert figures["attention mass recall, %"] == f"{100 * fidelity['attention_mass_recall']:.1f}"
    assert component(mode, *JUDGED, *APPROXIMATE, "--no-quality", "--output", output) == 0
    assert "fidelity" not in json.loads(output.read_text())["quality"]
    assert not any("KL" in name for name in shown(capsys.readouterr().out))


def test_a_quality_block_of_a_config_is_measured_and_its_tasks_shown(tmp_path, capsys, smollm2, monkeypatch):
    monkeypatch.setattr(component_cli, "load_model", lambda **options: smollm2)
    config = tmp_path / "config.json"
    asked = {"fidelity_tokens": 4, "tasks": ["passkey"], "samples": 2, "lengths": [150]}
    keys = {"context_lengths": [60], "max_new_tokens": 3, "num_runs": 1, "page_size": 16, "quality": asked}
    config.write_text(json.dumps({"model_name": "smollm2-135m", **keys}))
    assert component("reactive", "--config", config) == 0
    printed = capsys.readouterr().out
    assert shown(printed)["KL divergence from HF's cache, nats"].endswith("n = 4")  # exact, and asked for
    assert "100 [34-100]" in printed  # Wilson's of 2 in 2


def test_in_a_comparison_the_part_that_was_chosen_is_judged_for_all(capsys):
    flags = ["--context-length", 100, "--max-new-tokens", 3, "--page-size", 8, "--compare-policies"]
    assert component("reactive", *JUDGED, *flags) == 0
    assert "All of them: KL divergence from HF's cache" in capsys.readouterr().out


def test_where_late_pages_are_skipped_each_variant_is_judged(tmp_path, capsys):
    output = tmp_path / "result.json"
    flags = ["--context-length", 100, "--max-new-tokens", 3, "--page-size", 8, "--compare-policies"]
    assert component("reactive", *JUDGED, *flags, "--on-miss", "skip", "--output", output) == 0
    printed = capsys.readouterr().out
    assert all(f"{policy}: KL divergence" in printed for policy in POLICIES)
    assert all(result["quality"]["fidelity"]["kl_mean"] > 0 for result in json.loads(output.read_text()))


def test_texts_of_ones_own_say_that_their_quality_is_not_measured(tmp_path, capsys, smollm2, monkeypatch):
    monkeypatch.setattr(component_cli, "load_model", lambda **options: smollm2)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_name": "smollm2-135m", "cache_implementation": "quantized", "num_runs": 1}))
    assert component("baseline", "--config", config, "--prompts", "One, two,", "--max-new-tokens", 3) == 0
    assert "on made prompts" in capsys.readouterr().err


# --- policies side by side ----------------------------------------------------------------------------------

COMPARED = [*SMALL, "--page-size", 8, "--max-gpu-pages", 4, "--compare-policies"]


def policy_rows(text):
    """The rows of the printed table, by policy; its cells hold no spaces but that of `token 3`."""
    rows = [line.replace("token ", "token-").split() for line in text.splitlines()]
    return {row[0]: row[1:] for row in rows if len(row) == 9 and row[0] in POLICIES}


def test_every_policy_is_run_on_the_same_prompt_and_shown_in_one_table(tmp_path, capsys):
    output = tmp_path / "results.json"
    assert component("reactive", *COMPARED, "--output", output) == 0
    printed = capsys.readouterr().out
    written = {result["spec"]["paging"]["policy"]: result for result in json.loads(output.read_text())}
    assert set(written) == set(POLICIES)
    assert len({result["context"]["prompt_sha256"] for result in written.values()}) == 1
    assert len({result["tokens"]["sha256"] for result in written.values()}) == 1
    assert "All policies gave the same tokens" in printed
    rows = policy_rows(printed)
    assert set(rows) == set(POLICIES)
    for policy, row in rows.items():
        cache, quality = written[policy]["cache"], written[policy]["quality"]
        assert row[0] == f"{100 * cache['hit_rate']:.2f}"
        assert row[1] == rows["lru"][0]  # the same requests, so plain LRU hits what the policy lru did
        assert row[2:4] == [f"{cache['misses']}", f"{cache['evictions']}"]
        differs = "never" if quality["matches_baseline"] else f"token-{quality['first_divergent_token']}"
        assert row[-1] == differs
    rates = [float(row[0]) for row in rows.values()]
    assert rates == sorted(rates, reverse=True)


def test_policies_are_compared_under_quest_where_nobody_chose_a_selector(tmp_path, capsys):
    output = tmp_path / "results.json"
    assert component("reactive", *COMPARED, "--output", output) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "Exact attention wants every page" in " ".join(printed.out.split())
    paging = json.loads(output.read_text())[0]["spec"]["paging"]
    assert (paging["selector"], paging["attention_fraction"]) == ("quest", 0.25)


@pytest.mark.parametrize("in_file", [True, False])
def test_policies_are_compared_under_the_selector_that_was_chosen(in_file, tmp_path, capsys):
    config, output = tmp_path / "config.json", tmp_path / "results.json"
    config.write_text(json.dumps({"selector": "all"} if in_file else {}))
    flags = ["--config", config, *([] if in_file else ["--selector", "all"])]
    assert component("reactive", *COMPARED, *flags, "--output", output) == 0
    printed = capsys.readouterr().out
    assert "selector all" in printed
    assert "quest was taken" not in " ".join(printed.split())
    assert {row[-1] for row in policy_rows(printed).values()} == {"never"}
    assert {result["spec"]["paging"]["selector"] for result in json.loads(output.read_text())} == {"all"}


def test_a_policy_with_parameters_is_compared_beside_the_registered_ones(tmp_path, capsys):
    config, output = tmp_path / "config.json", tmp_path / "results.json"
    config.write_text(json.dumps({"policy": {"name": "s3fifo", "small_fraction": 0.5}, "num_runs": 2}))
    assert component("reactive", *COMPARED, "--config", config, "--output", output) == 0
    printed = capsys.readouterr().out
    assert "(small" in printed
    assert "means of 2 runs" in " ".join(printed.split())
    assert len(json.loads(output.read_text())) == 2 * (len(list(POLICIES)) + 1)


def test_policies_that_do_not_agree_on_the_tokens_are_named_loudly(capsys, monkeypatch):
    def meddling(spec, model, **how):
        result = real_run(spec, model, **how)
        if spec.paging.policy == "fifo":
            result.tokens["ids"][0][0] ^= 1
        return result

    real_run = kv_paging.run
    monkeypatch.setattr(kv_paging, "run", meddling)
    assert component("reactive", *COMPARED) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "NOT THE SAME TOKENS FROM fifo AS FROM lru" in printed
    assert "All policies gave the same tokens" not in printed


# --- predictors side by side --------------------------------------------------------------------------------

PREDICTED = [*SMALL, "--page-size", 8, "--max-gpu-pages", 4, "--compare-predictors"]


def predictor_rows(text):
    """The rows of the printed table, by predictor, in its order."""
    rows = [line.split() for line in text.splitlines()]
    return {row[0]: row[1:] for row in rows if len(row) == 13 and row[0] in PREDICTORS}


def predictor_of(result):
    return result["spec"]["prefetch"]["predictor"]


def test_every_predictor_is_run_on_the_same_prompt_and_shown_in_one_table(tmp_path, capsys):
    output = tmp_path / "results.json"
    assert component("predictive", *PREDICTED, "--output", output) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert max(map(len, printed.out.splitlines())) <= 80
    written = {predictor_of(result): result for result in json.loads(output.read_text())}
    assert set(written) == set(PREDICTORS)
    assert len({result["context"]["prompt_sha256"] for result in written.values()}) == 1
    assert len({result["tokens"]["sha256"] for result in written.values()}) == 1
    assert "All predictors gave the same tokens" in " ".join(printed.out.split())
    rows = predictor_rows(printed.out)
    assert set(rows) == set(PREDICTORS)
    assert next(iter(rows)) == "none"
    for predictor, row in rows.items():
        cache, prefetch = written[predictor]["cache"], written[predictor]["prefetch"]
        assert float(row[0]) == pytest.approx(100 * cache["hit_rate"], abs=0.051)
        assert float(row[2]) == pytest.approx(100 * cache["gain_over_lru"], abs=0.051)
        assert row[7] == str(prefetch["issued"])
    assert rows["none"][7] == "0"
    others = [float(row[0]) for predictor, row in rows.items() if predictor not in ("none", "oracle")]
    assert others == sorted(others, reverse=True)


def test_predictors_are_compared_under_quest_where_nobody_chose_a_selector(tmp_path, capsys):
    output = tmp_path / "results.json"
    assert component("predictive", *PREDICTED, "--output", output) == 0
    assert "layer_ahead is always right; so quest was taken" in " ".join(capsys.readouterr().out.split())
    pagings = [result["spec"]["paging"] for result in json.loads(output.read_text())]
    assert {(paging["selector"], paging["attention_fraction"]) for paging in pagings} == {("quest", 0.25)}


def test_predictors_that_go_by_digests_are_left_out_where_attention_reads_every_page(tmp_path, capsys):
    output = tmp_path / "results.json"
    assert component("predictive", *PREDICTED, "--selector", "all", "--output", output) == 0
    printed = " ".join(capsys.readouterr().out.split())
    written = {predictor_of(result) for result in json.loads(output.read_text())}
    assert written == {name for name in PREDICTORS if not PREDICTORS.asks_for(name, "needs_scores")}
    assert "cross_layer" not in written
    assert "Left out: cross_layer (" in printed
    assert "quest was taken" not in printed


def test_a_predictor_that_its_cache_refuses_is_left_out_with_the_reason(capsys, monkeypatch):
    refuse_prediction_by("ema", monkeypatch)
    assert component("predictive", *PREDICTED) == 0
    printed = capsys.readouterr().out
    assert predictor_rows(printed).keys() == set(PREDICTORS) - {"ema"}
    assert "Left out: ema (no digests here)." in printed


def test_a_predictor_that_was_asked_for_and_is_refused_ends_the_comparison(capsys, monkeypatch):
    refuse_prediction_by("ema", monkeypatch)
    assert component("predictive", *PREDICTED, "--predictor", "ema") == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "no digests here\n")


def refuse_prediction_by(predictor, monkeypatch):
    def refusing(spec, model, **how):
        if spec.prefetch.predictor == predictor:
            raise ValueError("no digests here")
        return real_run(spec, model, **how)

    real_run = predictive_prefetch.run
    monkeypatch.setattr(predictive_prefetch, "run", refusing)


def test_a_predictor_with_parameters_is_compared_beside_the_registered_ones(tmp_path, capsys):
    config, output = tmp_path / "config.json", tmp_path / "results.json"
    keys = {"context_lengths": [40, 60], "num_runs": 2, "predictor": {"name": "ema", "smoothing": 0.5}}
    config.write_text(json.dumps(keys))
    flags = ["--page-size", 8, "--max-gpu-pages", 4, "--max-new-tokens", 4, "--compare-predictors"]
    assert component("predictive", *LLAMA, "--config", config, *flags, "--output", output) == 0
    printed = capsys.readouterr().out
    assert printed.count("(smooth") == printed.count("Predictors: ") == 2  # a table for each context length
    assert " ".join(printed.split()).count("means of 2 runs") == 2
    assert len(json.loads(output.read_text())) == 2 * 2 * (len(list(PREDICTORS)) + 1)


# --- pictures of a run --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", PAGED)
def test_a_heat_map_is_drawn_from_the_requests_of_the_run(mode, tmp_path, capsys):
    path, output = tmp_path / "new" / "pages.png", tmp_path / "result.json"
    flags = ["--page-size", 8, "--max-gpu-pages", 4, "--heat-map", path, "--output", output]
    assert component(mode, *SMALL, *flags) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.endswith(f"wrote {path}\n")
    written = json.loads(output.read_text())
    assert written["spec"]["paging"]["record_pages"]
    assert len(written["cache"]["requests"]) == 3 * 5  # layers, decode steps


def test_of_several_runs_the_first_is_drawn_and_that_is_said(tmp_path, capsys):
    config, path = tmp_path / "config.json", tmp_path / "pages.png"
    config.write_text(json.dumps({"context_lengths": [40, 60], "num_runs": 1, "max_new_tokens": 4}))
    assert component("reactive", *LLAMA, "--config", config, "--heat-map", path) == 0
    assert capsys.readouterr().err == "--heat-map draws the first of 2 runs\n"
    assert path.exists()


@pytest.mark.parametrize("mode", PAGED)
def test_a_trace_is_written_from_the_timeline_of_the_run(mode, tmp_path, capsys):
    path, output = tmp_path / "new" / "trace.json", tmp_path / "result.json"
    flags = ["--page-size", 8, "--max-gpu-pages", 4, "--trace", path, "--output", output]
    assert component(mode, *SMALL, *flags) == 0
    assert capsys.readouterr().out.endswith(f"wrote {path}\n")
    written = json.loads(output.read_text())
    assert written["spec"]["paging"]["record_timeline"]
    spans = [event for event in json.loads(path.read_text())["traceEvents"] if event["ph"] == "X"]
    assert len(spans) == len(written["cache"]["timeline"]) > 0


def test_plots_of_prefetch_are_drawn_into_a_folder_that_need_not_be_there(tmp_path, capsys):
    folder, output = tmp_path / "new" / "plots", tmp_path / "result.json"
    flags = ["--page-size", 8, "--max-gpu-pages", 4, "--plots", folder, "--output", output]
    assert component("predictive", *SMALL, *flags) == 0
    pictures = sorted(folder.iterdir())
    assert len(pictures) == 4
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)
    named = [line.removeprefix("wrote ") for line in capsys.readouterr().out.splitlines() if line.startswith("wrote ")]
    assert sorted(named) == [str(picture) for picture in pictures]
    assert json.loads(output.read_text())["spec"]["paging"]["record_timeline"]


# --- the baseline -------------------------------------------------------------------------------------------


def test_a_baseline_run_prints_and_writes_what_it_measured(tmp_path, capsys):
    output = tmp_path / "result.json"
    assert component("baseline", *SMALL, "--output", output) == 0
    written = json.loads(output.read_text())
    figures = shown(capsys.readouterr().out)
    assert written.keys() == BLOCKS
    assert written["context"]["tokens"] == 100
    assert figures["time per output token, ms"] == f"{written['timing']['tpot_ms']:,.2f}"
    assert "tokens equal to HF's" not in figures


def test_prompts_are_continued_as_one_batch(tmp_path, capsys, smollm2, monkeypatch):
    monkeypatch.setattr(component_cli, "load_model", lambda *names, **how: smollm2)
    output = tmp_path / "result.json"
    texts = ["The capital of France is", "One, two, three, four, five, six, seven,"]
    code = component("baseline", "--prompts", *texts, "--max-new-tokens", 5, "--device", "cpu", "--output", output)
    printed = capsys.readouterr().out
    written = json.loads(output.read_text())
    assert code == 0
    assert "Paris" in printed.split("sequence 1")[0]
    assert "eight" in printed.split("sequence 1")[1]
    assert (written["spec"]["batch_size"], written["spec"]["stop_at_eos"]) == (2, True)
    assert written["context"]["tokens"] == max(len(smollm2.tokenizer(text)["input_ids"]) for text in texts)
    assert len(written["tokens"]["text"]) == 2


def test_prompts_need_a_tokenizer(capsys):
    assert component("baseline", *LLAMA, "--prompts", "hello") == 2
    assert capsys.readouterr().err == ("--prompts needs a tokenizer, and this model has none; use --context-length\n")


def test_a_prompt_too_long_for_the_models_positions_is_refused_with_the_numbers(capsys, monkeypatch):
    monkeypatch.setattr(inference_baseline, "padded_prompts", lambda model, prompts: ([[5] * 1000], [[1] * 1000]))
    assert component("baseline", *GPT2, "--prompts", "long", "--max-new-tokens", 50) == 2
    assert "1000 tokens" in (message := capsys.readouterr().err)
    assert "1024 positions" in message
    assert "974" in message


@pytest.mark.parametrize("mode", COMPONENTS)
def test_a_clamped_context_is_said_and_recorded(mode, tmp_path, capsys):
    output = tmp_path / "result.json"
    code = component(mode, *GPT2, "--context-length", 1000, "--max-new-tokens", 50, "--output", output)
    assert code == 0
    assert "context clamped from 1000 to 974" in capsys.readouterr().err
    context = json.loads(output.read_text())["context"]
    assert (context["requested_tokens"], context["tokens"], context["clamped"]) == (1000, 974, True)


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_the_baseline_runs_with_quantised_weights(quantization, tiny_llama, tmp_path, capsys):
    tiny_llama.model.save_pretrained(tmp_path / "tiny")
    output = tmp_path / "result.json"
    flags = ["--device", "cpu", "--context-length", 20, "--max-new-tokens", 3, "--output", output]
    assert component("baseline", "--model", tmp_path / "tiny", "--quantization", quantization, *flags) == 0
    written = json.loads(output.read_text())
    assert written["spec"]["quantization"] == quantization
    assert written["model"]["weight_bytes"] < tiny_llama.model.get_memory_footprint()


def test_the_longest_context_is_printed_and_written_with_its_attempts(tmp_path, capsys):
    output = tmp_path / "found.json"
    flags = ["--find-max-context", "--memory-budget-mb", 1, "--output", output]
    assert component("baseline", *LLAMA, *flags) == 0
    printed = capsys.readouterr()
    found = json.loads(output.read_text())["max_context"]
    assert printed.out == f"longest context that fits: {found['context_tokens']:,} tokens (limited by memory)\n"
    assert printed.err.count("fit") == len(found["attempts"]) > 2
    assert found["budget_mb"] == 1.0


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU its memory is the budget")
def test_on_a_cpu_the_search_for_the_longest_context_asks_for_a_budget(capsys):
    assert component("baseline", *LLAMA, "--find-max-context") == 2
    assert "--memory-budget-mb" in capsys.readouterr().err


def test_a_length_for_prompts_that_are_given_is_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        component("baseline", *LLAMA, "--prompts", "hi", "--context-length", 50)
    assert ended.value.code == 2
    assert "--context-length is for prompts that are made" in capsys.readouterr().err


# --- the configs that come with the project -----------------------------------------------------------------


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_of_the_project_loads_and_plans_for_its_component(path):
    mode = json.loads(path.read_text())["mode"]
    runs = plan(expand([load_experiment(path, mode)]), allow_network=False)
    assert {run.spec.mode for run in runs} == {mode}
    assert len(runs) >= 3


@pytest.mark.parametrize("path", [path for path in CONFIGS if "large" not in path.stem], ids=lambda path: path.stem)
def test_every_small_config_runs_in_its_component(path, tmp_path, capsys):
    keys = json.loads(path.read_text())
    output = tmp_path / "result.json"
    assert component(keys["mode"], "--config", path, *SMALL, "--output", output) == 0
    written = json.loads(output.read_text())
    assert len(written) == keys["num_runs"]
    spec = written[0]["spec"]
    assert (spec["context_length"], spec["max_new_tokens"]) == (100, 6)
    assert spec["do_sample"] == keys.get("do_sample", False)
    assert spec["temperature"] == keys.get("temperature", 1.0)


def test_there_are_the_five_configs_that_are_promised():
    promised = {"baseline", "small_model", "large_model", "paged_kv", "predictive_prefetch"}
    assert {path.stem.removesuffix("_config") for path in CONFIGS} == promised


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "flags", "message"),
    [
        ("baseline", ["--context-length", "x"], "argument --context-length: invalid int value: 'x'"),
        ("baseline", ["--quantization", "2bit"], "argument --quantization: invalid choice: '2bit'"),
        ("baseline", ["--memory-budget-mb", "5"], "--memory-budget-mb is for --find-max-context"),
        ("baseline", ["--page-size", "16"], "unrecognized arguments: --page-size 16"),
        ("reactive", ["--predictor", "none"], "unrecognized arguments: --predictor none"),
        ("predictive", ["--prompts", "hello"], "unrecognized arguments: --prompts hello"),
        ("predictive", ["--compare-policies"], "unrecognized arguments: --compare-policies"),
        ("baseline", ["--selector", "quest"], "unrecognized arguments: --selector quest"),
        ("reactive", ["--attention-fraction", "half"], "argument --attention-fraction: invalid float value: 'half'"),
        ("reactive", ["--compare-predictors"], "unrecognized arguments: --compare-predictors"),
        ("reactive", ["--overfetch", "2"], "unrecognized arguments: --overfetch 2"),
        ("reactive", ["--plots", "plots"], "unrecognized arguments: --plots plots"),
        ("predictive", ["--overfetch", "twice"], "argument --overfetch: invalid float value: 'twice'"),
        ("predictive", ["--lookahead", "1.5"], "argument --lookahead: invalid int value: '1.5'"),
        (
            "reactive",
            ["--compare-policies", "--heat-map", "pages.png"],
            "--heat-map draws one run; leave out --compare-policies, and choose one with --policy",
        ),
        (
            "predictive",
            ["--compare-predictors", "--plots", "plots"],
            "--plots draws one run; leave out --compare-predictors, and choose one with --predictor",
        ),
        ("predictive", ["--compare-predictors", "--trace", "trace.json"], "--trace draws one run"),
        ("predictive", ["--compare-predictors", "--heat-map", "pages.png"], "--heat-map draws one run"),
        ("reactive", ["--compare-policies", "--trace", "trace.json"], "--trace draws one run"),
    ],
)
def test_a_flag_that_cannot_be_read_exits_2_and_is_named(mode, flags, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        component(mode, *flags)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("mode", "flags", "message"),
    [
        ("baseline", ["--context-length", 0], "context_lengths"),
        ("baseline", ["--seed", -1], "seed"),
        ("baseline", ["--device", "gpu"], "device"),
        ("reactive", ["--policy", "lur"], "did you mean 'lru'?"),
        ("reactive", ["--max-gpu-pages", 2], "max_gpu_pages is 2"),
        ("predictive", ["--predictor", "layer_ahaed"], "did you mean 'layer_ahead'?"),
        ("predictive", ["--prefetch-k", 99], "prefetch_k is 99"),
        ("predictive", ["--overfetch", 0.5], "overfetch' must be at least 1"),
        ("predictive", ["--lookahead", 0], "lookahead' must be at least 1"),
        ("predictive", ["--min-confidence", "adaptve"], "must be adaptive or a number from 0 to 1"),
        ("predictive", ["--min-confidence", 2], "must be adaptive or a number from 0 to 1"),
        ("predictive", ["--predictor", "layer_ahaed", "--compare-predictors"], "did you mean 'layer_ahead'?"),
        ("reactive", ["--on-miss", "skp"], "did you mean 'skip'?"),
        ("predictive", ["--policy", "lur", "--selector", "quest"], "did you mean 'lru'?"),
        ("reactive", ["--policy", "lur", "--compare-policies"], "did you mean 'lru'?"),
        ("reactive", ["--selector", "qest"], "did you mean 'quest'?"),
        ("reactive", ["--attention-pages", 4], "'attention_pages' has no effect with 'selector: all'"),
        ("reactive", ["--selector", "quest", "--attention-fraction", 2], "attention_fraction"),
        ("reactive", ["--selector", "quest", "--granularity", "head"], "granularity"),
        ("reactive", ["--dense-layers", -1], "dense_layers"),
        ("reactive", ["--staging-pages", 0], "staging_pages"),
        ("reactive", ["--access-order", "first"], "access_order"),
        ("reactive", ["--disk-dir", "."], "'disk_dir' has no effect without host_pages"),
        ("reactive", ["--link", "pcie3"], "did you mean 'pcie3-x16'?"),
        ("reactive", ["--link", "-1"], "bandwidth_gb_s"),
        ("reactive", ["--link", "nan"], "bandwidth_gb_s"),
        ("reactive", ["--heat-map", "pages.pdf"], "name a file that ends in .png"),
        ("baseline", ["--config", "nothing.json"], "nothing.json"),
        ("baseline", ["--config", PROJECT / "configs" / "paged_kv_config.json"], "this file is for mode reactive"),
        ("reactive", ["--config", PROJECT / "experiment_config.yaml"], "this is a list of experiments, for main.py"),
    ],
)
def test_a_value_that_is_wrong_exits_2_with_one_clear_line_before_the_model_is_loaded(
    mode, flags, message, capsys, monkeypatch
):
    monkeypatch.setattr(component_cli, "load_model", load_nothing)
    assert component(mode, *flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_folder_for_pages_on_disk_that_is_not_there_exits_2_and_is_named(tmp_path, capsys):
    gone = tmp_path / "gone"
    assert component("reactive", *SMALL, "--page-size", 8, "--host-pages", 0, "--disk-dir", gone) == 2
    assert str(gone) in capsys.readouterr().err


@pytest.mark.parametrize("mode", COMPONENTS)
def test_a_model_that_cannot_be_had_exits_2_with_what_was_tried(mode, capsys):
    assert component(mode, "--model", "./no-such-folder") == 2
    assert "there is no such folder" in capsys.readouterr().err


@pytest.mark.parametrize("mode", COMPONENTS)
def test_an_output_that_cannot_be_written_is_refused_before_the_run(mode, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(component_cli, "load_model", load_nothing)
    (tmp_path / "file").write_text("")
    for output in (tmp_path, tmp_path / "file" / "result.json"):
        assert component(mode, *SMALL, "--output", output) == 2
        assert str(output) in capsys.readouterr().err


@pytest.mark.parametrize("mode", PAGED)
def test_a_heat_map_that_cannot_be_written_is_refused_before_the_run(mode, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(component_cli, "load_model", load_nothing)
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    for path in (tmp_path / "folder.png", tmp_path / "file" / "pages.png"):
        assert component(mode, *SMALL, "--heat-map", path) == 2
        assert f"--heat-map {path}" in capsys.readouterr().err


@pytest.mark.parametrize("mode", PAGED)
def test_a_trace_that_cannot_be_written_is_refused_before_the_run(mode, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(component_cli, "load_model", load_nothing)
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "trace.json"):
        assert component(mode, *SMALL, "--trace", path) == 2
        assert f"--trace {path}" in capsys.readouterr().err


def test_a_folder_for_plots_that_cannot_be_one_is_refused_before_the_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(component_cli, "load_model", load_nothing)
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "plots"):
        assert component("predictive", *SMALL, "--plots", folder) == 2
        assert f"--plots {folder}" in capsys.readouterr().err
    monkeypatch.setattr(os, "access", lambda place, how: place != tmp_path)  # for root may write anywhere
    for folder in (tmp_path, tmp_path / "new" / "plots"):
        assert component("predictive", *SMALL, "--plots", folder) == 2
        assert f"--plots {folder}: cannot write to {tmp_path}" in capsys.readouterr().err


def test_a_file_that_must_not_be_replaced_is_refused_before_the_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(component_cli, "load_model", load_nothing)
    path = tmp_path / "pages.png"
    path.write_text("")
    monkeypatch.setattr(os, "access", lambda file, how: file != path)  # for root may write to any file
    assert component("reactive", *SMALL, "--heat-map", path) == 2
    assert "cannot be written to" in capsys.readouterr().err


@pytest.mark.parametrize("mode", COMPONENTS)
def test_ctrl_c_exits_130(mode, capsys, monkeypatch):
    def interrupted(*names, **how):
        raise KeyboardInterrupt

    monkeypatch.setattr(component_cli, "load_model", interrupted)
    assert component(mode, *SMALL) == 130
    assert capsys.readouterr().err == "interrupted\n"


# --- as a user starts them ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "start",
    [["inference_baseline.py", "--verbose"], ["-m", "predictive_prefetch", "--page-size", "16"]],
    ids=["script", "module"],
)
def test_a_component_starts_as_the_readme_says(start):
    done = subprocess.run(
        [sys.executable, *start, *SMALL],
        cwd=PROJECT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "time per output token, ms" in done.stdout
    said = "INFO: random:configs/models/tiny-llama.json: random weights, seed 0"
    assert (said in done.stderr) == ("--verbose" in start)
