"""What lies in a results folder counts only if it is the whole result of the very run that it is named after."""

from __future__ import annotations

import dataclasses
import json

import pytest
from result_fixtures import whole_result

from config_schema import MODE_CLASSES
from jobs import Failure, TimedRun
from result_store import ResultStore, other_machine, other_model, whole
from run_specs import expand


def spec_of(mode="baseline", **keys):
    (spec,) = expand(
        [MODE_CLASSES[mode](mode=mode, **{"context_lengths": [48], "num_runs": 1, "device": "cpu"} | keys)]
    )
    return spec


SPEC = spec_of()


def good(spec=SPEC, **blocks):
    result = whole_result(spec, environment={"cpu": "a"})
    return dataclasses.replace(result, **blocks)


def failed(spec, status):
    return TimedRun(spec).failed(Failure(status, "killed"))


@pytest.mark.parametrize(
    "result",
    [
        good(),
        failed(SPEC, "crashed"),
    ],
    ids=["good", "failed"],
)
def test_a_result_is_read_as_it_was_written(tmp_path, result):
    store = ResultStore(tmp_path)
    store.write(SPEC, result)
    assert store.read(SPEC) == result
    assert store.find([SPEC]).results == [(SPEC, result)]


def test_settings_that_travel_through_json_as_other_types_are_still_the_same_run(tmp_path):
    spec = spec_of("reactive", quality={"tasks": ["passkey"], "lengths": [100]}, policy={"name": "lru"})
    store = ResultStore(tmp_path)
    spec = dataclasses.replace(spec, quality=dataclasses.replace(spec.quality, tasks=("passkey",), lengths=(100,)))
    store.write(spec, good(spec))
    assert store.read(spec).ok


def changed(**keys):
    return json.dumps(good().to_dict() | keys)


BROKEN = {
    "empty": ("", "Expecting value"),
    "truncated": (changed()[:200], "Unterminated string|Expecting"),
    "not a result": ("[1, 2]", "holds no JSON object"),
    "binary": ("\x00\x01", "Expecting value"),
    "not strict": ('{"spec": NaN}', "holds NaN"),
    "another schema": (changed(schema_version=99), "schema_version is 99"),
    "another run's": (json.dumps(good(spec_of(seed=7)).to_dict()), "not the result of the run"),
    "edited": (changed(spec={**SPEC.to_dict(), "seed": 7}), "not the result of the run"),
    "another id": (changed(run_id="0" * 12), "not the result of the run"),
    "another program's": (changed(colour="red"), "colour: Extra inputs"),
    "no status": (changed(status=None), "not a whole result: status: "),
    "failed without a reason": (changed(status="error"), "not a whole result: error: "),
    "no timing": (changed(timing=None), "not a whole result: timing: "),
    "half a timing": (changed(timing={"n_tokens": 2}), "timing.batch_size: Field required .and "),
    "a number as text": (changed(timing={**good().timing, "ttft_ms": "12"}), "timing.ttft_ms: Input should be a valid"),
    "no quality": (changed(quality="good"), "not a whole result: quality: "),
    "no tokens": (changed(tokens={**good().tokens, "ids": None}), "tokens.ids: "),
    "tokens of a larger batch": (
        changed(tokens={**good().tokens, "ids": [[1], [2]]}),
        "its tokens are 2 rows of ids, not 1",
    ),
    "tokens that are none": (changed(tokens={**good().tokens, "ids": [[1, True]]}), "tokens.ids.0.1: "),
}


@pytest.mark.parametrize("name", list(BROKEN))
def test_what_is_no_result_of_the_run_is_named_with_what_is_wrong(tmp_path, name):
    text, message = BROKEN[name]
    store = ResultStore(tmp_path)
    store.path(SPEC).write_text(text)
    found = store.find([SPEC])
    assert found.results == []
    (problem,) = found.problems
    assert problem.startswith(f"{store.path(SPEC)}: ")
    with pytest.raises(ValueError, match=message):
        store.read(SPEC)


def test_bytes_that_are_no_text_and_a_folder_in_its_place_are_problems_too(tmp_path):
    store, other = ResultStore(tmp_path), spec_of(name="other")
    store.path(SPEC).write_bytes(b"\xff\xfe\x00")
    store.path(other).mkdir()
    assert len(store.find([SPEC, other]).problems) == 2


def test_results_of_other_runs_are_counted_and_other_files_are_not(tmp_path):
    store, changed_setting = ResultStore(tmp_path), spec_of(max_new_tokens=9)
    for spec in (SPEC, changed_setting):
        store.write(spec, good(spec))
    (tmp_path / "experiment_summary.json").write_text("{}")
    found = store.find([SPEC])
    assert ([spec for spec, _ in found.results], found.n_others) == ([SPEC], 1)


def test_in_a_folder_that_is_not_there_nothing_is_found(tmp_path):
    found = ResultStore(tmp_path / "nowhere").find([SPEC])
    assert (found.results, found.problems, found.n_others) == ([], [], 0)


def test_only_torn_files_of_the_runs_are_removed(tmp_path):
    store = ResultStore(tmp_path)
    torn, other = tmp_path / f".{SPEC.slug}.json.abc.tmp", tmp_path / ".mine.json.abc.tmp"
    torn.touch()
    other.touch()
    store.remove_torn([SPEC])
    assert [path.name for path in tmp_path.iterdir()] == [other.name]


def test_whole_is_what_has_no_failed_run_and_no_failed_measurement():
    assert whole([good().to_dict()])
    assert not whole([good().to_dict(), good(status="error").to_dict()])
    assert not whole([good(quality={"error": "no tokenizer"}).to_dict()])


def test_other_machines_are_told_by_what_is_known_of_both():
    assert other_machine(good(), good()) == []
    assert other_machine(good(), good(environment={"cpu": "b"})) == ["cpu: a -> b"]
    assert other_machine(good(), good(environment={"cpu": None, "gpus": []})) == []
    assert other_machine(good(environment=None), good()) == []


def test_a_commit_with_changes_is_another_program_than_the_commit():
    clean, dirty = ({"git_commit": "abc", "git_dirty": is_dirty} for is_dirty in (False, True))
    assert other_machine(good(environment=clean), good(environment=dirty)) == ["git_dirty: False -> True"]


def test_other_models_are_told_by_what_was_loaded():
    model = good().model
    assert other_model(good(), good()) == []
    assert other_model(good(), good(model={**model, "weight_bytes": 7})) == [
        f"weight_bytes: {model['weight_bytes']} -> 7"
    ]


def test_torn_files_of_a_long_list_are_looked_for_once(tmp_path, monkeypatch):
    specs = [spec_of(seed=seed) for seed in range(20)]
    (tmp_path / f".{specs[7].slug}.json.abc.tmp").touch()
    globs, original = [], type(tmp_path).glob
    monkeypatch.setattr(type(tmp_path), "glob", lambda self, pattern: globs.append(pattern) or original(self, pattern))
    ResultStore(tmp_path).remove_torn(specs)
    assert (len(globs), list(tmp_path.iterdir())) == (1, [])
