"""A sweep loses nothing: failures are rows, finished runs are on disk at once, and each model is loaded once."""

from __future__ import annotations

import gc
import json
import weakref
from types import SimpleNamespace

import pytest
import torch
from result_fixtures import whole_result

import jobs as jobs_module
import result_store
from config_schema import MODE_CLASSES
from launchers import LocalLauncher
from models import ModelUnavailable
from planning import PlannedRun
from result_schema import problems_of
from result_store import ResultStore
from run_specs import expand
from sweep import Sweep

TINY = "random:configs/models/tiny-llama.json"
NOT_COMPARED = {"matches_baseline": None, "first_divergent_token": None}
SHAPE = SimpleNamespace(max_positions=None, learned_positions=False)


class Model:
    """Stands for a loaded model; a weak reference tells whether it is still held."""

    shape = SHAPE


class Notes:
    """A watcher that writes down what it is told, and whether a finished run is on disk by then."""

    def __init__(self, folder):
        self.folder, self.told = folder, []

    def resumed(self, results, note):
        self.told.append(("resumed", len(results), note))

    def loading(self, model_name):
        self.told.append(("loading", model_name))

    def started(self, spec):
        self.told.append(("started", spec.label))

    def token(self, n_tokens, hit_rate):
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
    """`swept(planned, generate)`: a finished sweep whose runs are made by `generate(spec)`.

    `generate` returns tokens, or raises. Models are stand-ins; those that are called "gone" cannot be loaded. Further
    arguments are those of `Sweep.resume`, which is called only where there are any.
    """

    def sweep_of(runs, generate, **resume):
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

        def run(spec, model, *, on_token):
            ids = generate(spec)
            if on_token is not None:
                for n_tokens in range(1, len(ids[0]) + 1):
                    on_token(n_tokens, None)
            return whole_result(spec, ids, duration_seconds=100.0, environment={"cpu": "this one"})

        monkeypatch.setattr(jobs_module, "load_model", load)
        monkeypatch.setattr(jobs_module, "MODES", SimpleNamespace(load=lambda mode: run))
        sweep = Sweep(runs, ResultStore(tmp_path), LocalLauncher(), Notes(tmp_path))
        if resume:
            sweep.resume(**resume)
        sweep.run()
        return sweep, loaded

    return sweep_of


def tokens(spec):
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
    def generate(spec):
        if spec.mode == "reactive":
            raise error
        return tokens(spec)

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
    def generate(spec):
        if spec.mode == "reactive":
            raise KeyboardInterrupt
        return tokens(spec)

    sweep, _ = swept(planned(*THREE), generate)
    assert sweep.interrupted
    assert statuses(sweep) == {"baseline": "ok"}
    assert len(list(tmp_path.glob("*.json"))) == 1


def matches(sweep):
    """Of each run whether it gave the baseline's tokens, and where it began to differ."""
    return {
        (result.spec["name"], result.spec["context_length"]): (
            result.quality["matches_baseline"],
            result.quality["first_divergent_token"],
        )
        for result in sweep.results
        if result.ok
    }


def test_a_run_is_compared_with_the_dynamic_baseline_of_its_own_context(swept, tmp_path):
    def generate(spec):
        return [[spec.context_length, 0 if spec.cache_implementation == "quantized" else 1]]

    lengths = {"context_lengths": [48, 96]}
    quantized = ("baseline", lengths | {"name": "fp8", "cache_implementation": "quantized"})
    sweep, _ = swept(planned(quantized, ("reactive", lengths), ("baseline", lengths)), generate)
    expected = {
        ("baseline", 48): (None, None),
        ("baseline", 96): (None, None),
        ("fp8", 48): (False, 1),
        ("fp8", 96): (False, 1),
        ("reactive", 48): (True, None),
        ("reactive", 96): (True, None),
    }
    assert matches(sweep) == expected
    on_disk = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    assert {
        (block["spec"]["name"], block["spec"]["context_length"]): tuple(block["quality"][key] for key in NOT_COMPARED)
        for block in on_disk
    } == expected


def test_an_exact_run_with_other_tokens_is_warned_of_and_an_approximation_is_not(swept, caplog):
    def generate(spec):
        return [[1, 2]] if spec.mode == "baseline" else [[1, 3]]

    approximate = ("reactive", {"name": "half", "selector": "quest", "attention_pages": 3, "quality": False})
    swept(planned(THREE[0], THREE[1], approximate), generate)
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    (warning,) = [record for record in warnings if "tokens differ" in record.message]
    assert warning.message.startswith("reactive_smollm2")


@pytest.mark.parametrize("other_cache", ["static", "quantized"])
def test_without_a_dynamic_baseline_that_succeeded_there_is_nothing_to_compare_with(swept, other_cache):
    def generate(spec):
        if spec.cache_implementation == "dynamic":
            raise MemoryError
        return tokens(spec)

    sweep, _ = swept(planned(*THREE, ("baseline", {"name": "other", "cache_implementation": other_cache})), generate)
    assert matches(sweep) == {(name, 48): (None, None) for name in ("other", "reactive", "predictive")}


def test_a_clamp_found_only_after_loading_is_made_and_recorded(swept, monkeypatch):
    monkeypatch.setattr(Model, "shape", SimpleNamespace(max_positions=40, learned_positions=True))
    sweep, _ = swept(planned(THREE[0]), tokens)
    spec = sweep.results[0].spec
    assert (spec["requested_context_length"], spec["context_length"]) == (48, 36)


# --- resuming -----------------------------------------------------------------------------------------------


class Made:
    """Makes runs with given tokens and writes down which."""

    def __init__(self, failing=()):
        self.names, self.failing = [], failing

    def __call__(self, spec):
        self.names.append(spec.name)
        if spec.name in self.failing:
            raise MemoryError("too much")
        return tokens(spec)


def test_a_resumed_sweep_makes_only_what_has_no_result_and_holds_all(swept, tmp_path):
    runs = planned(*THREE)
    swept(runs[:2], Made())
    made = Made()
    sweep, loaded = swept(runs, made, retry_failed=False)
    assert made.names == ["predictive"]
    assert statuses(sweep) == {"baseline": "ok", "reactive": "ok", "predictive": "ok"}
    assert sweep.results[2].quality["matches_baseline"] is True  # with the tokens of the baseline's file
    assert sweep.watcher.told[0] == ("resumed", 2, f"2 of 3 runs have a result in {tmp_path}")
    assert (sweep.n_reused, len(loaded)) == (2, 1)
    assert 200.0 <= sweep.seconds < 260.0  # two runs of 100 s were there, and this took no time


def test_where_nothing_is_left_no_model_is_loaded(swept):
    runs = planned(*THREE)
    swept(runs, Made())
    made = Made()
    _, loaded = swept(runs, made, retry_failed=False)
    assert (made.names, loaded) == ([], [])


def test_failures_stay_unless_they_are_to_be_retried(swept):
    runs = planned(*THREE)
    swept(runs, Made(failing=["reactive"]))
    made = Made()
    sweep, _ = swept(runs, made, retry_failed=False)
    assert made.names == []
    assert statuses(sweep)["reactive"] == "out_of_memory"
    assert "1 failed, and stay so, as only --retry-failed makes them again" in sweep.watcher.told[0][2]
    sweep, _ = swept(runs, made, retry_failed=True)
    assert made.names == ["reactive"]
    assert statuses(sweep)["reactive"] == "ok"
    assert "1 failed, and will be made again" in sweep.watcher.told[0][2]


def test_a_run_that_has_waited_for_its_baseline_is_compared_once_that_is_there(swept, tmp_path):
    runs = planned(*THREE)
    swept(runs, Made(failing=["baseline"]))
    sweep, _ = swept(runs, Made(), retry_failed=True)
    assert matches(sweep) == {
        ("baseline", 48): (None, None),
        ("reactive", 48): (True, None),
        ("predictive", 48): (True, None),
    }
    (path,) = tmp_path.glob("reactive_*.json")
    assert json.loads(path.read_text())["quality"]["matches_baseline"] is True


def test_a_changed_list_reuses_nothing_and_says_how_much_it_leaves_aside(swept, caplog):
    swept(planned(*THREE), Made())
    made = Made()
    longer = [(mode, {"max_new_tokens": 5}) for mode, _ in THREE]
    sweep, _ = swept(planned(*longer), made, retry_failed=False)
    assert made.names == ["baseline", "reactive", "predictive"]
    assert len(sweep.results) == 3
    assert "holds 3 results of other runs, or of other settings" in caplog.text


def test_a_broken_file_is_named_and_its_run_is_made_again(swept, tmp_path, caplog):
    runs = planned(*THREE)
    swept(runs, Made())
    (path,) = tmp_path.glob("reactive_*.json")
    path.write_text(path.read_text()[:300])
    made = Made()
    swept(runs, made, retry_failed=False)
    assert made.names == ["reactive"]
    (warning,) = [record for record in caplog.records if "this run is made again" in record.message]
    assert warning.levelname == "WARNING" and warning.message.startswith(f"{path}: ")
    assert json.loads(path.read_text())["status"] == "ok"


def test_quality_that_was_cut_short_is_made_up_without_the_timed_run(swept, monkeypatch, tmp_path):
    runs = planned(("baseline", {"quality": {"fidelity_tokens": 4}, "num_runs": 2}), ("reactive", {}))

    def interrupted(spec, model):
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs_module, "quality_figures", interrupted)
    cut, _ = swept(runs, Made())
    assert cut.interrupted and len(cut.results) == 3
    measured = []
    figures = {"fidelity": {"kl_mean": 0.0}, "tasks": None}
    monkeypatch.setattr(jobs_module, "quality_figures", lambda spec, model: measured.append(spec) or figures)
    made = Made()
    swept(runs, made, retry_failed=False)
    assert made.names == []
    assert measured == [runs[0].spec]  # once for all repetitions, and not where nobody asks for it
    (path,) = tmp_path.glob("baseline_*run0*.json")
    assert json.loads(path.read_text())["quality"]["fidelity"] == {"kl_mean": 0.0}
    swept(runs, made, retry_failed=False)
    assert len(measured) == 1


def test_quality_that_failed_is_measured_again_only_where_failures_are(swept, monkeypatch):
    runs = planned(("baseline", {"quality": {"fidelity_tokens": 4}}))
    bad = {"fidelity": None, "tasks": None, "error": "no tokenizer"}
    monkeypatch.setattr(jobs_module, "quality_figures", lambda spec, model: dict(bad))
    swept(runs, Made())
    good = {"fidelity": {"kl_mean": 0.0}, "tasks": None}
    monkeypatch.setattr(jobs_module, "quality_figures", lambda spec, model: dict(good))
    sweep, _ = swept(runs, Made(), retry_failed=False)
    assert sweep.results[0].quality["error"] == "no tokenizer"
    sweep, _ = swept(runs, Made(), retry_failed=True)
    assert "error" not in sweep.results[0].quality
    assert sweep.results[0].quality["fidelity"] == {"kl_mean": 0.0}


def test_old_and_new_results_of_different_machines_are_warned_of(swept, tmp_path, caplog):
    runs = planned(*THREE)
    swept(runs[:1], Made())
    (path,) = tmp_path.glob("baseline_*.json")
    block = json.loads(path.read_text())
    path.write_text(json.dumps(block | {"environment": {**block["environment"], "cpu": "another one"}}))
    swept(runs, Made(), retry_failed=False)
    (warning,) = [record.getMessage() for record in caplog.records if "another machine" in record.getMessage()]
    assert warning.startswith("1 of the results found are of another machine or version")
    assert warning.endswith("cpu: another one -> this one")


class Backwards(LocalLauncher):
    """Gives the outcomes in the reverse order, as a cluster may."""

    by_model = False

    def perform(self, jobs, watcher):
        yield from super().perform(list(reversed(jobs)), watcher)


def test_the_order_in_which_runs_come_back_does_not_matter(swept, tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.LocalLauncher", Backwards)
    sweep, _ = swept(planned(*THREE), Made())
    assert [note[1] for note in sweep.watcher.told if note[0] == "finished"] == ["predictive", "reactive", "baseline"]
    assert list(statuses(sweep)) == ["baseline", "reactive", "predictive"]
    assert [result.quality["matches_baseline"] for result in sweep.results] == [None, True, True]
    for path in tmp_path.glob("[rp]*.json"):
        assert json.loads(path.read_text())["quality"]["matches_baseline"] is True


def test_a_result_that_cannot_be_written_is_a_row_and_the_others_go_on(swept, monkeypatch):
    written = []

    def full_disk(path, value):
        if path.name.startswith("reactive"):
            raise OSError("no space left on device")
        written.append(path.name.partition("_")[0])

    monkeypatch.setattr(result_store, "write_json", full_disk)
    sweep, _ = swept(planned(*THREE), tokens)
    assert statuses(sweep) == {"baseline": "ok", "reactive": "error", "predictive": "ok"}
    assert sweep.results[1].error == "measured, but not written: no space left on device"
    assert written == ["baseline", "predictive"]


def test_a_figure_that_is_no_number_leaves_a_row_on_disk_in_place_of_a_former_result(swept, monkeypatch, tmp_path):
    monkeypatch.setattr(f"{__name__}.LocalLauncher", Backwards)  # so that it waits for the baseline to be compared
    runs = planned(*THREE[:2])
    swept(runs, tokens)
    original = whole_result

    def spoilt(spec, *given, **blocks):
        result = original(spec, *given, **blocks)
        if spec.mode == "reactive":
            result.timing["tpot_ms"] = float("nan")
        return result

    monkeypatch.setattr(f"{__name__}.whole_result", spoilt)
    sweep, _ = swept(runs, tokens)
    assert statuses(sweep) == {"reactive": "error", "baseline": "ok"}
    (path,) = tmp_path.glob("reactive_*.json")
    row = json.loads(path.read_text())
    assert row["status"] == "error" and row["error"].startswith("measured, but not written: Out of range float")
    assert problems_of(row) == []
    assert sweep.results[1].to_dict() == row


def test_quality_that_is_no_number_is_a_failed_measurement_and_its_run_stays(swept, monkeypatch, tmp_path):
    monkeypatch.setattr(jobs_module, "quality_figures", lambda spec, model: {"fidelity": {"kl_mean": float("nan")}})
    swept(planned(("baseline", {"quality": {"fidelity_tokens": 4}})), tokens)
    (path,) = tmp_path.glob("*.json")
    written = json.loads(path.read_text())
    assert (written["status"], written["timing"]["tpot_ms"], written["quality"]["fidelity"]) == ("ok", 1.0, None)
    assert written["quality"]["error"].startswith("error: measured, but not written: Out of range float")


def test_on_a_full_disk_the_file_of_a_former_run_does_not_pass_for_the_new_one(swept, monkeypatch, tmp_path):
    runs = planned(*THREE)
    swept(runs, tokens)

    def full_disk(path, value):
        raise OSError("no space left on device")

    monkeypatch.setattr(result_store, "write_json", full_disk)
    swept(runs, tokens)
    assert list(tmp_path.glob("*.json")) == []


def test_results_of_a_model_whose_path_holds_another_by_now_are_warned_of(swept, tmp_path, caplog):
    two = {"num_runs": 2}
    runs = planned(("baseline", two), ("baseline", two | {"name": "other", "model_name": "other"}))
    swept(runs, tokens)
    for path in tmp_path.glob("*_run1_*.json"):
        path.unlink()
    for path in tmp_path.glob("*_run0_*.json"):
        block = json.loads(path.read_text())
        if block["spec"]["model_name"] == "other":
            path.write_text(json.dumps(block | {"model": {**block["model"], "n_parameters": 5}}))
    swept(runs, tokens, retry_failed=False)
    (warning,) = [record.getMessage() for record in caplog.records if "another model" in record.getMessage()]
    assert warning.startswith("1 of the results found are of another model that was called other, so nothing compares")
    assert warning.endswith("n_parameters: 5 -> 134515008")
