"""The description of a result accepts every result that the program makes, and refuses what is not one."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import jsonschema
import pytest
from conftest import TINY_LLAMA
from test_launchers import policy, specs_of

import result_blocks
import result_schema
from cache_settings import Paging, PrefetchSpec
from experiments import load_experiments
from generation import failed_run
from jobs import TimedRun
from metrics import RunResult, Timing
from process_launcher import ProcessLauncher
from progress import Silent
from recorder import StepRecord
from registry import MODES
from result_schema import problems_of
from run_specs import RunSpec, expand

SAMPLE = Path(__file__).parent.parent / "logs" / "sample"
FILES = sorted(path for mode in MODES for path in SAMPLE.glob(f"{mode}_*.json"))

TINY = f"""
defaults:
  model_name: {TINY_LLAMA}
  device: cpu
  context_lengths: [48]
  num_runs: 1
  max_new_tokens: 6
  warmup_runs: 0
  page_size: 16
  max_gpu_pages: 3
  staging_pages: 2
  link: memory
experiments:
  - mode: baseline
  - mode: reactive
    record_pages: true
    record_timeline: true
  - mode: predictive
    prefetch_k: 2
    selector: quest
    attention_pages: 2
    quality: false
"""


@pytest.fixture(scope="module")
def specs(tmp_path_factory):
    path = tmp_path_factory.mktemp("schema") / "tiny.yaml"
    path.write_text(TINY)
    return {spec.mode: spec for spec in expand(load_experiments(path))}


@pytest.fixture(scope="module")
def results(specs, tiny_llama):
    """A finished run of each mode, and one that failed, as they stand in files."""
    made = {mode: MODES.load(mode)(spec, tiny_llama) for mode, spec in specs.items()}
    made["failed"] = failed_run(specs["reactive"], MemoryError("no room for 3 pages"))
    return {kind: json.loads(json.dumps(result.to_dict(), allow_nan=False)) for kind, result in made.items()}


def keys_of(block, path=""):
    """The dotted path of every key of a result; of a list, those of its first element."""
    inner = block.items() if isinstance(block, dict) else [("0", block[0])] if isinstance(block, list) and block else []
    for key, value in inner:
        here = f"{path}.{key}" if path else key
        if isinstance(block, dict):
            yield here
        yield from keys_of(value, here)


def parent_of(block, path):
    *parents, last = path.split(".")
    for key in parents:
        block = block[int(key)] if isinstance(block, list) else block[key]
    return block, last


# --- what is a result -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem[-12:])
def test_each_result_of_the_sample_is_one(path):
    assert problems_of(json.loads(path.read_text())) == []


@pytest.mark.parametrize("kind", ["baseline", "reactive", "predictive", "failed"])
def test_what_a_run_leaves_behind_is_a_result(results, kind):
    assert problems_of(results[kind]) == []


def test_the_json_schema_says_the_same_as_the_check(results):
    schema = result_schema.json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    for result in results.values():
        assert validator.is_valid(result)
        for key in result:
            assert not validator.is_valid({k: v for k, v in result.items() if k != key}), key
    assert not validator.is_valid(results["reactive"] | {"cache": None})
    assert validator.is_valid(json.loads(FILES[0].read_text()))


# --- what is not ----------------------------------------------------------------------------------------------------

OPTIONAL = ("spec.quality.", "quality.fidelity", "quality.tasks", "cache.requests", "cache.timeline")
FREE = ("environment.packages.", "spec.paging.link.", "model.device_map.", "spec.paging.policy.")


@pytest.mark.parametrize("kind", ["baseline", "reactive", "predictive", "failed"])
def test_a_missing_key_is_found_and_named_wherever_it_is(results, kind):
    paths = [path for path in keys_of(results[kind]) if not path.startswith((*OPTIONAL, *FREE))]
    assert len(paths) > 50
    for path in paths:
        broken = copy.deepcopy(results[kind])
        block, key = parent_of(broken, path)
        del block[key]
        found = "\n".join(problems_of(broken))
        assert found and (path in found or path in ("status", "spec", "spec.mode")), path  # those say which kind it is


@pytest.mark.parametrize("kind", ["baseline", "reactive", "predictive"])
def test_a_number_that_is_none_is_found_and_named_wherever_it_is(results, kind):
    for path in keys_of(results[kind]):
        block, key = parent_of(copy.deepcopy(results[kind]), path)
        if isinstance(block[key], float):
            broken = copy.deepcopy(results[kind])
            block, key = parent_of(broken, path)
            block[key] = float("nan")
            assert any(line.startswith(f"{path}: nan is no number") for line in problems_of(broken)), path


def test_nan_is_found_under_a_key_that_nobody_described(results):
    result = results["baseline"]
    broken = result | {"quality": result["quality"] | {"new": [{"deep": float("inf")}]}}
    assert problems_of(broken) == ["quality.new.0.deep: inf is no number of JSON"]


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("cache.hit_rate", 1.5, "less than or equal to 1"),
        ("cache.hit_rate", "0.5", "valid number"),
        ("cache.hits", -1, "greater than or equal to 0"),
        ("cache.hits", True, "valid integer"),
        ("timing.ttft_ms", -1.0, "greater than or equal to 0"),
        ("cache.link.kind", "imagined", "'simulated'"),
        ("tokens.sha256", "abc", "pattern"),
        ("cache", None, "valid dictionary"),
        ("schema_version", 2, "Input should be 1"),
        ("steps.0.phase", "warm-up", "'prefill'"),
        ("spec.paging.page_size", None, "valid integer"),
    ],
)
def test_a_value_that_cannot_be_is_refused(results, path, value, said):
    broken = copy.deepcopy(results["predictive"])
    block, key = parent_of(broken, path)
    block[int(key) if isinstance(block, list) else key] = value
    assert any(line.startswith(f"{path}") and said in line for line in problems_of(broken)), problems_of(broken)


def test_the_row_of_a_run_whose_process_was_killed_is_a_result():
    (spec,) = specs_of(policy("Killed"))
    ((_, row),) = ProcessLauncher().perform([TimedRun(spec)], Silent())
    assert row.status == "crashed"
    assert problems_of(json.loads(json.dumps(row.to_dict()))) == []


def test_a_failed_run_has_a_reason_and_a_finished_one_has_none(results):
    assert any("error" in line for line in problems_of(results["failed"] | {"error": None}))
    assert any("error" in line for line in problems_of(results["baseline"] | {"error": "but it finished"}))


def test_a_block_may_hold_more_and_the_top_level_may_not(results):
    result = results["reactive"]
    assert problems_of(result | {"cache": result["cache"] | {"new_figure": 1.0}}) == []
    assert any("new_block" in line for line in problems_of(result | {"new_block": {}}))


@pytest.mark.parametrize("thing", [[], {}, None, 3, {"status": "ok"}, {"status": "ok", "spec": {"mode": "other"}}])
def test_what_is_no_result_at_all_is_refused_with_words(thing):
    assert problems_of(thing)


# --- the description follows the program ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("described", "made"),
    [
        (result_blocks.Paging, Paging),
        (result_blocks.Prefetching, PrefetchSpec),
        (result_blocks.Step, StepRecord),
        (result_blocks.BaselineSpec, RunSpec),
        (result_blocks.PredictiveSpec, RunSpec),
    ],
)
def test_every_field_that_is_written_is_described(described, made):
    assert set(described.model_fields) == {field.name for field in dataclasses.fields(made)}


def test_every_block_of_a_result_is_described():
    written = {field.name for field in dataclasses.fields(RunResult)} | {"schema_version"}
    for kind in (result_schema.BaselineResult, result_schema.PredictiveResult, result_schema.FailedResult):
        assert set(kind.model_fields) == written
    timing = Timing.from_token_times([10.0, 20.0], batch_size=1, clock="test").to_dict()
    assert set(result_blocks.Timing.model_fields) == set(timing)


def test_all_that_a_run_measures_is_described(results):
    blocks = {"cache": result_blocks.Cache, "prefetch": result_blocks.Prefetch, "memory": result_blocks.Memory}
    blocks |= {"environment": result_blocks.Environment, "model": result_blocks.Model, "power": result_blocks.Power}
    blocks |= {"context": result_blocks.Context, "tokens": result_blocks.Tokens}
    for name, block in blocks.items():
        assert set(results["predictive"][name]) == set(block.model_fields), name


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command_prints_the_schema(capsys):
    assert result_schema.main([]) == 0
    assert json.loads(capsys.readouterr().out) == result_schema.json_schema()


def test_the_command_names_the_file_and_the_place(tmp_path, capsys, results):
    (tmp_path / "baseline_good.json").write_text(json.dumps(results["baseline"]))
    assert result_schema.main(["--check", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "no problems\n"
    (tmp_path / "reactive_bad.json").write_text(json.dumps(results["reactive"] | {"cache": None}))
    (tmp_path / "reactive_torn.json").write_text('{"schema_version": 1')
    assert result_schema.main(["--check", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert f"{tmp_path / 'reactive_bad.json'}: cache: " in out
    assert f"{tmp_path / 'reactive_torn.json'}: " in out
    assert "baseline_good" not in out
    (tmp_path / "empty").mkdir()
    assert result_schema.main(["--check", str(tmp_path / "empty"), str(tmp_path / "none.json")]) == 1
    assert "holds no result files" in capsys.readouterr().out
