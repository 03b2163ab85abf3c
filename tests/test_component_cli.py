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
from run_specs import expand

pytestmark = pytest.mark.usefixtures("logging_restored")

PROJECT = Path(kv_paging.__file__).parent
CONFIGS = sorted((PROJECT / "configs").glob("*.json"))
COMPONENTS = {"baseline": inference_baseline, "reactive": kv_paging, "predictive": predictive_prefetch}
PAGED = ["reactive", "predictive"]
LLAMA = ["--model", "random:configs/models/tiny-llama.json", "--device", "cpu"]
GPT2 = ["--model", "random:configs/models/tiny-gpt2.json", "--device", "cpu"]
SMALL = [*LLAMA, "--context-length", "100", "--max-new-tokens", "6"]
BLOCKS = RunResult(spec={}, run_id="").to_dict().keys()


def component(mode, *arguments):
    return COMPONENTS[mode].main([str(argument) for argument in arguments])


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
        ("--seed", 9, "seed"),
        ("--dtype", "bfloat16", "dtype"),
        ("--max-new-tokens", 3, "max_new_tokens"),
        ("--context-length", 33, "context_length"),
    ],
)
def test_a_flag_overrides_its_key_of_the_config_and_nothing_else(flag, value, key, tmp_path, capsys):
    keys = {"context_lengths": [40], "max_new_tokens": 4, "page_size": 16, "max_gpu_pages": 4, "num_runs": 1}
    config, output = tmp_path / "config.json", tmp_path / "result.json"
    config.write_text(json.dumps(keys))
    specs = []
    for flags in ([], [flag, value]):
        assert component("predictive", *LLAMA, "--config", config, "--output", output, *flags) == 0
        specs.append(json.loads(output.read_text())["spec"])
    plain, overridden = (flat(spec) for spec in specs)
    changed = {name for name in plain if plain[name] != overridden[name]}
    assert changed == ({key, "requested_context_length"} if key == "context_length" else {key})
    assert overridden[key] == value


def flat(spec):
    """A spec with the keys of its blocks among its own."""
    return spec | spec["paging"] | spec["prefetch"] | {"paging": None, "prefetch": None}


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
        ("baseline", ["--config", "nothing.json"], "nothing.json"),
        ("baseline", ["--config", PROJECT / "configs" / "paged_kv_config.json"], "this file is for mode reactive"),
        ("reactive", ["--config", PROJECT / "experiment_config.yaml"], "this is a list of experiments, for main.py"),
    ],
)
def test_a_value_that_is_wrong_exits_2_with_one_clear_line(mode, flags, message, capsys):
    assert component(mode, *flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize("mode", COMPONENTS)
def test_a_model_that_cannot_be_had_exits_2_with_what_was_tried(mode, capsys):
    assert component(mode, "--model", "./no-such-folder") == 2
    assert "there is no such folder" in capsys.readouterr().err


@pytest.mark.parametrize("mode", COMPONENTS)
def test_an_output_that_cannot_be_written_is_refused_before_the_run(mode, tmp_path, capsys, monkeypatch):
    def load_nothing(*names, **how):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(component_cli, "load_model", load_nothing)
    (tmp_path / "file").write_text("")
    for output in (tmp_path, tmp_path / "file" / "result.json"):
        assert component(mode, *SMALL, "--output", output) == 2
        assert str(output) in capsys.readouterr().err


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
