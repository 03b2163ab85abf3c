"""The list that is written back from results makes the very runs again, and the tables of settings say what differs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from result_fixtures import make_result, make_sweep

from experiments import load_experiments
from result_frame import load_results
from run_settings import experiment_list, settings_table, shared_settings
from run_specs import clamp, expand

PROJECT = Path(__file__).parent.parent
VARIED = """
defaults: {model_name: "random:configs/models/tiny-llama.json", context_lengths: [64, 32], num_runs: 2, seed: 5}
experiments:
  - mode: baseline
  - mode: baseline
    name: 'sampled: "yes", #1 & more'
    do_sample: true
    temperature: 0.5
    seed: 11
  - mode: reactive
    policy: {name: s3fifo, small_fraction: 0.2}
    host_pages: 4
    quality: {fidelity_tokens: 0, tasks: [{name: passkey}], samples: 2, lengths: [100]}
  - mode: predictive
    name: null-like
    selector: quest
    attention_fraction: 0.25
    overfetch: null
    min_confidence: 0.3
    link: {bandwidth_gb_s: 1.5, latency_us: 0.0}
    num_runs: 3
  - mode: predictive
    name: unmeasured
    selector: quest
    attention_pages: 4
    quality: false
"""


def results_of(specs):
    return [{"spec": spec.to_dict(), "run_id": spec.run_id, "status": "ok"} for spec in specs]


def made_again(results, folder):
    path = folder / "again.yaml"
    path.write_text(experiment_list(results), encoding="utf-8")
    return expand(load_experiments(path))


def ids(specs):
    return {spec.run_id for spec in specs}


def a_list(text, folder):
    path = folder / "first.yaml"
    path.write_text(text, encoding="utf-8")
    return expand(load_experiments(path))


# --- the list again -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [PROJECT / "experiment_config.yaml", *sorted((PROJECT / "configs").glob("*.yaml"))],
    ids=lambda path: path.stem,
)
def test_a_list_of_this_project_comes_back_as_the_same_runs(path, tmp_path):
    specs = expand(load_experiments(path))
    assert ids(made_again(results_of(specs), tmp_path)) == ids(specs)


def test_any_setting_comes_back(tmp_path):
    specs = a_list(VARIED, tmp_path)
    again = made_again(results_of(specs), tmp_path)
    assert len(again) == len(specs) == 22
    assert ids(again) == ids(specs)


def test_the_sample_comes_back_by_its_run_ids(tmp_path):
    results, problems = load_results(PROJECT / "logs" / "sample")
    assert not problems
    assert ids(made_again(results, tmp_path)) == {result["run_id"] for result in results}


def test_a_clamped_run_is_asked_for_as_it_was(tmp_path):
    specs = a_list(VARIED, tmp_path)
    clamped = [clamp(spec, max_positions=100) for spec in specs]
    assert any(spec.context_length < spec.requested_context_length for spec in clamped)
    assert ids(made_again(results_of(clamped), tmp_path)) == ids(specs)


def test_a_seed_of_the_command_line_is_in_the_list(tmp_path):
    path = tmp_path / "first.yaml"
    path.write_text(VARIED)
    specs = expand(load_experiments(path), seed=99)
    assert ids(made_again(results_of(specs), tmp_path)) == ids(specs)


def test_the_list_of_an_interrupted_sweep_has_all_that_it_made(tmp_path):
    specs = a_list(VARIED, tmp_path)
    assert ids(made_again(results_of(specs[:7]), tmp_path)) >= ids(specs[:7])


def test_two_experiments_of_one_name_get_names_of_their_own():
    one, other = make_result("reactive", repetition=0), make_result("reactive", repetition=1)
    other["spec"]["paging"] = {**other["spec"]["paging"], "max_gpu_pages": 9}
    entries = yaml.safe_load(experiment_list([one, other]))["experiments"]
    assert [entry["name"] for entry in entries] == ["reactive (max_gpu_pages=4)", "reactive (max_gpu_pages=9)"]


@pytest.mark.parametrize("again", [99, 6])  # of the sampled experiment, seeds 6 + repetition overlap those of 5
def test_a_folder_of_two_seeds_gives_a_list_that_loads_with_a_name_for_each(tmp_path, again):
    path = tmp_path / "first.yaml"
    path.write_text(VARIED)
    experiments = load_experiments(path)
    specs = [spec for seed in (5, again) for spec in expand(experiments, seed=seed)]
    made = made_again(results_of(specs), tmp_path)
    names = {spec.name for spec in made}
    assert {"baseline seed=5", f"baseline seed={again}", f"unmeasured seed={again}"} <= names
    assert len(names) == 10

    def but_for_the_name(specs):
        return {replace(spec, name=spec.name.rpartition(" seed=")[0] or spec.name).run_id for spec in specs}

    assert but_for_the_name(made) == ids(specs)


def test_a_seed_is_in_no_name_that_only_one_experiment_has():
    results = [make_result(seed=1), make_result("reactive", seed=1), make_result("reactive", seed=2)]
    entries = yaml.safe_load(experiment_list(results))["experiments"]
    assert [entry.get("name") for entry in entries] == [None, "reactive seed=1", "reactive seed=2"]


# --- what differs and what does not ---------------------------------------------------------------------------------


def test_a_setting_stands_in_the_table_or_beside_it_and_never_in_both():
    results = make_sweep(contexts=(500,), repetitions=1)
    results[1]["spec"]["paging"]["max_gpu_pages"] = 9
    table, shared = settings_table(results), shared_settings(results)
    assert table.headings == ("strategy", "mode", "max_gpu_pages")
    assert table.rows == [
        ("baseline", "baseline", "—"),
        ("reactive", "reactive", "9"),
        ("predictive", "predictive", "4"),
    ]
    assert shared["all strategies"]["max_new_tokens"] == "11"
    assert shared["modes reactive and predictive"]["page_size"] == "128"
    assert shared["mode predictive"]["predictor"] == "layer_ahead"
    assert not any("max_gpu_pages" in settings for settings in shared.values())


def test_values_are_shown_as_a_config_takes_them():
    result = make_result("reactive", prefill_chunk_size=None, stop_at_eos=True)
    result["spec"]["paging"] |= {"policy": {"name": "s3fifo", "small_fraction": 0.2}, "link": "memory"}
    shown = shared_settings([result])["all strategies"]
    assert shown["policy"] == "{name: s3fifo, small_fraction: 0.2}"
    assert (shown["prefill_chunk_size"], shown["stop_at_eos"], shown["do_sample"]) == ("none", "yes", "no")


def test_there_may_be_no_results():
    assert settings_table([]).rows == []
    assert shared_settings([]) == {}
