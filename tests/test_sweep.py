"""A sweep loses nothing: failures are rows, finished runs are on disk at once, and each model is loaded once."""

from __future__ import annotations

import gc
import json
import weakref
from types import SimpleNamespace

import pytest
import torch

import sweep as sweep_module
from config_schema import MODE_CLASSES
from metrics import RunResult, token_agreement
from models import ModelUnavailable
from planning import PlannedRun
from run_specs import expand
from sweep import Sweep

TINY = "random:configs/models/tiny-llama.json"
SHAPE = SimpleNamespace(max_positions=None, learned_positions=False)


class Model:
    """Stands for a loaded model; a weak reference tells whether it is still held."""

    shape = SHAPE


class Notes:
    """A watcher that writes down what it is told, and whether a finished run is on disk by then."""

    def __init__(self, folder):
        self.folder, self.told = folder, []

    def loading(self, model_name):
        self.told.append(("loading", model_name))

    def started(self, spec):
        self.told.append(("started", spec.label))

    def token(self, n_tokens):
        self.told.append(("token", n_tokens))

    def finished(self, result):
        on_disk = [json.loads(path.read_text())["run_id"] for path in self.folder.glob("*.json")]
        self.told.append(("finished", result.spec["name"], result.run_id in on_disk))


def planned(*entries):
    """Planned runs of `(mode, keys)`."""
    shared = {"context_lengths": [48], "num_runs": 1, "max_new_tokens": 4, "device": "cpu"}
    experiments = [MODE_CLASSES[mode](mode=mode, **shared | keys) for mode, keys in entries]
    return [PlannedRun(spec) for spec in expand(experiments)]


@pytest.fixture
def swept(monkeypatch, tmp_path):
    """`swept(planned, generate)`: a finished sweep whose runs are made by `generate(spec, reference)`.

    `generate` returns tokens, or raises. Models are stand-ins; those that are called "gone" cannot be loaded.
    """

    def sweep_of(runs, generate):
        loaded = []

        def load(model_name, **how):
            gc.collect()
            still_held = [model for model in loaded if model() is not None]
            assert not still_held, "two models in memory at once"
            if model_name == "gone":
                raise ModelUnavailable(model_name, [])
            model = Model()
            loaded.append(weakref.ref(model))
            return model

        def run(spec, model, *, reference, on_token):
            ids = generate(spec, reference)
            for n_tokens in range(1, len(ids[0]) + 1):
                on_token(n_tokens)
            quality = token_agreement(ids, reference)
            return RunResult(spec=spec.to_dict(), run_id=spec.run_id, tokens={"ids": ids}, quality=quality)

        monkeypatch.setattr(sweep_module, "load_model", load)
        monkeypatch.setattr(sweep_module, "MODES", SimpleNamespace(load=lambda mode: run))
        sweep = Sweep(runs, tmp_path, Notes(tmp_path))
        sweep.run()
        return sweep, loaded

    return sweep_of


def tokens(spec, reference):
    return [[1, 2]]


def statuses(sweep):
    return {result.spec["name"]: result.status for result in sweep.results}


THREE = [("baseline", {}), ("reactive", {}), ("predictive", {})]


def test_each_run_is_on_disk_when_it_counts_as_finished(swept):
    sweep, _ = swept(planned(*THREE), tokens)
    finished = [note[1:] for note in sweep.watcher.told if note[0] == "finished"]
    assert finished == [("baseline", True), ("reactive", True), ("predictive", True)]


def test_the_watcher_follows_each_run_from_its_start_over_its_tokens_to_its_end(swept):
    sweep, _ = swept(planned(THREE[0]), tokens)
    assert sweep.watcher.told == [
        ("loading", "smollm2-135m"),
        ("started", "baseline"),
        ("token", 1),
        ("token", 2),
        ("finished", "baseline", True),
    ]


def test_results_of_other_runs_in_the_folder_are_said_and_own_ones_are_not(swept, tmp_path, caplog):
    runs = planned(*THREE)
    before, _ = swept(runs, tokens)
    swept(runs, tokens)  # each finds its own results of before, which it replaces
    assert "results of other runs" not in caplog.text
    (tmp_path / "experiment_summary.json").write_text('{"run_id": "of no run"}')
    swept(planned(("baseline", {"name": "new"})), tokens)
    (warning,) = [record for record in caplog.records if "results of other runs" in record.message]
    assert warning.levelname == "WARNING"
    assert f"{tmp_path} holds {len(before.results)} results of other runs" in warning.message


def test_a_model_is_loaded_once_for_all_its_runs_and_freed_before_the_next(swept):
    runs = planned(*THREE, ("baseline", {"name": "other", "model_name": "other"}))
    _, loaded = swept(runs, tokens)  # the stand-in loader fails if the first model is still held
    assert len(loaded) == 2


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), "out_of_memory"),
        (MemoryError("too much"), "out_of_memory"),
        (ZeroDivisionError("a bug"), "error"),
    ],
)
def test_a_run_that_raises_is_a_row_and_the_others_go_on(swept, tmp_path, error, status):
    def generate(spec, reference):
        if spec.mode == "reactive":
            raise error
        return tokens(spec, reference)

    sweep, _ = swept(planned(*THREE), generate)
    assert statuses(sweep) == {"baseline": "ok", "reactive": status, "predictive": "ok"}
    (path,) = tmp_path.glob("reactive_*.json")
    row = json.loads(path.read_text())
    assert (row["status"], row["timing"]) == (status, None)
    assert row["error"] == f"{type(error).__name__}: {error}"
    assert row["environment"]["python"]


def test_a_model_that_cannot_be_loaded_fails_its_own_runs_only(swept):
    gone = {"model_name": "gone", "num_runs": 2}
    sweep, _ = swept(planned(("baseline", gone | {"name": "gone"}), ("baseline", {"name": "good"})), tokens)
    assert [result.status for result in sweep.results] == ["error", "error", "ok"]
    assert not sweep.interrupted


def test_ctrl_c_ends_the_sweep_and_keeps_what_is_finished(swept, tmp_path):
    def generate(spec, reference):
        if spec.mode == "reactive":
            raise KeyboardInterrupt
        return tokens(spec, reference)

    sweep, _ = swept(planned(*THREE), generate)
    assert sweep.interrupted
    assert statuses(sweep) == {"baseline": "ok"}
    assert len(list(tmp_path.glob("*.json"))) == 1


def test_a_run_is_compared_with_the_dynamic_baseline_of_its_own_context(swept):
    compared = {}

    def generate(spec, reference):
        compared[spec.label, spec.context_length] = reference
        return [[spec.context_length, 0 if spec.cache_implementation == "quantized" else 1]]

    lengths = {"context_lengths": [48, 96]}
    quantized = ("baseline", lengths | {"name": "fp8", "cache_implementation": "quantized"})
    swept(planned(quantized, ("reactive", lengths), ("baseline", lengths)), generate)
    assert compared == {
        ("baseline", 48): None,
        ("baseline", 96): None,
        ("fp8", 48): [[48, 1]],
        ("fp8", 96): [[96, 1]],
        ("reactive", 48): [[48, 1]],
        ("reactive", 96): [[96, 1]],
    }


@pytest.mark.parametrize("other_cache", ["static", "quantized"])
def test_without_a_dynamic_baseline_that_succeeded_there_is_nothing_to_compare_with(swept, other_cache):
    compared = {}

    def generate(spec, reference):
        if spec.cache_implementation == "dynamic":
            raise MemoryError
        compared[spec.label] = reference
        return tokens(spec, reference)

    swept(planned(*THREE, ("baseline", {"name": "other", "cache_implementation": other_cache})), generate)
    assert compared == {"other": None, "reactive": None, "predictive": None}


def test_a_clamp_found_only_after_loading_is_made_and_recorded(swept, monkeypatch):
    monkeypatch.setattr(Model, "shape", SimpleNamespace(max_positions=40, learned_positions=True))
    sweep, _ = swept(planned(THREE[0]), tokens)
    spec = sweep.results[0].spec
    assert (spec["requested_context_length"], spec["context_length"]) == (48, 36)


def test_a_result_that_cannot_be_written_is_a_row_and_the_others_go_on(swept, monkeypatch):
    written = []

    def full_disk(path, value):
        if path.name.startswith("reactive"):
            raise OSError("no space left on device")
        written.append(path.name.partition("_")[0])

    monkeypatch.setattr(sweep_module, "write_json", full_disk)
    sweep, _ = swept(planned(*THREE), tokens)
    assert statuses(sweep) == {"baseline": "ok", "reactive": "error", "predictive": "ok"}
    assert sweep.results[1].error == "measured, but not written: no space left on device"
    assert written == ["baseline", "predictive"]
