"""Trackers are told every result, cannot end a sweep, and hold what the result files say.

What TensorBoard and MLflow have written is read back with the libraries themselves; where they are not installed
(`pip install -e ".[tensorboard,mlflow]"`), those tests are skipped.
"""

from __future__ import annotations

import json
import logging
import socket
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from result_fixtures import make_failure, make_result, make_task, with_fidelity, with_tasks

import main
from metrics import RunResult
from quality_frame import FIDELITY
from registry import UnknownName
from reporting import AVERAGES
from trackers import TRACKERS, Trackers, TrackerUnavailable, figures_of, quality_of, settings_of, steps_of
from utils import PROJECT_FOLDER

TINY = {
    "model_name": "random:configs/models/tiny-llama.json",
    "device": "cpu",
    "context_lengths": [48],
    "num_runs": 1,
    "max_new_tokens": 8,
    "page_size": 16,
    "max_gpu_pages": 3,
    "quality": {"fidelity_tokens": 4},
}
OWN = """
class Own:
    def __init__(self, folder):
        self.folder = folder

    def run(self, result):
        with (self.folder / "own.txt").open("a") as file:
            print("run", result.spec["mode"], "kl" in str(result.quality), file=file)
        if result.spec["mode"] == "baseline":
            raise RuntimeError("no room for a baseline")

    def finish(self, results, folder):
        with (self.folder / "own.txt").open("a") as file:
            print("finish", [result.quality["fidelity"]["n_tokens"] for result in results], file=file)
        raise OSError("the line is dead")
"""


def as_result(block):
    """A block of `result_fixtures` as the run left it."""
    return RunResult(**{key: value for key, value in block.items() if key != "schema_version"})


@pytest.fixture
def no_network(monkeypatch):
    """Whoever opens a connection fails."""

    def refuse(self, address):
        raise AssertionError(f"connects to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


# --- the seam ---------------------------------------------------------------------------------------------------------


class Fake:
    """A tracker that keeps what it is told, or refuses it."""

    def __init__(self, error=None):
        self.told, self.error = [], error

    def run(self, result):
        self.told.append(result.run_id)
        if self.error:
            raise self.error

    def finish(self, results, folder):
        self.told.append([result.run_id for result in results])
        if self.error:
            raise self.error


def test_an_error_in_one_tracker_is_logged_and_reaches_nobody(caplog):
    broken, sound = Fake(ValueError("full")), Fake()
    shown = []
    trackers = Trackers({"broken": broken, "sound": sound})
    watcher = trackers.beside(SimpleNamespace(finished=shown.append, started=lambda spec: shown.append("started")))
    one = as_result(make_result())
    watcher.started(None)
    watcher.finished(one)
    trackers.finish([one], None)
    assert broken.told == sound.told == [one.run_id, [one.run_id]]
    assert shown == ["started", one]
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warned == [
        f"tracker broken: {one.run_id} is not recorded: ValueError: full",
        "tracker broken: the end of the sweep is not recorded: ValueError: full",
    ]


def test_without_trackers_the_watcher_is_left_alone(tmp_path):
    watcher = object()
    assert Trackers.named([], tmp_path).beside(watcher) is watcher


def test_an_unknown_tracker_is_named_with_those_there_are(tmp_path):
    with pytest.raises(UnknownName, match=r"unknown tracker 'tensorbord'; did you mean 'tensorboard'"):
        Trackers.named(["tensorbord"], tmp_path)


@pytest.mark.parametrize(
    ("name", "module"), [("tensorboard", "tensorboard"), ("mlflow", "mlflow"), ("mlflow", "sqlalchemy")]
)
def test_a_missing_library_is_found_out_at_once_and_names_the_extra(tmp_path, monkeypatch, name, module):
    for loaded in [key for key in sys.modules if key.split(".")[0] in (module, "mlflow")]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, module, None)  # importing it now is an ImportError
    with pytest.raises(TrackerUnavailable, match=rf'pip install -e "\.\[{name}\]"'):
        Trackers.named([name], tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def command(tmp_path, logging_restored):
    """`command(*flags)`: main.py on two tiny runs; returns the exit code."""
    config = tmp_path / "list.yaml"
    config.write_text(yaml.safe_dump({"defaults": TINY, "experiments": [{"mode": "baseline"}, {"mode": "reactive"}]}))

    def run(*flags):
        return main.main(["--config", str(config), "--output", str(tmp_path / "out"), "--no-plots", *flags])

    return run


def test_a_tracker_of_ones_own_sees_the_sweep_and_cannot_end_it(tmp_path, monkeypatch, command, capsys):
    (tmp_path / "own_tracker.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    config = yaml.safe_load((tmp_path / "list.yaml").read_text())
    config["defaults"]["model_name"] = f"random:{PROJECT_FOLDER / 'configs/models/tiny-llama.json'}"
    (tmp_path / "list.yaml").write_text(yaml.safe_dump(config))
    assert command("--tracker", "own_tracker:Own") == main.OK
    lines = (tmp_path / "out" / "own.txt").read_text().splitlines()
    assert lines == ["run baseline False", "run reactive False", "finish [4, 4]"]  # quality comes after the runs
    assert "no room for a baseline" in capsys.readouterr().err
    assert len(list((tmp_path / "out").glob("*_ctx48_*.json"))) == 2


def test_a_tracker_that_cannot_be_used_stops_the_command_before_any_run(tmp_path, monkeypatch, command, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert command("--tracker", "tensorboard") == main.WRONG_CONFIG
    assert '".[tensorboard]"' in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_every_tracker_has_the_verbs():
    for name in TRACKERS:
        tracker = TRACKERS.load(name)
        assert all(callable(getattr(tracker, verb)) for verb in TRACKERS.verbs)


# --- a result, flat ---------------------------------------------------------------------------------------------------


def test_settings_are_flat_and_leave_out_what_is_not_set():
    settings = settings_of(as_result(make_result("reactive", quality={"tasks": ["passkey"]})))
    assert settings["paging.page_size"] == 128
    assert settings["mode"] == "reactive"
    assert settings["do_sample"] is False
    assert settings["quality.tasks"] == "['passkey']"
    assert "prefetch" not in settings
    assert "quantization" not in settings


def test_figures_are_those_that_were_measured_and_no_others():
    paged, plain = figures_of(as_result(make_result("reactive", tpot_ms=80.0))), figures_of(as_result(make_result()))
    assert (paged["tpot_ms"], paged["hit_rate"], paged["device_kv_mb"]) == (80.0, 0.75, 40.0)
    assert "hit_rate" not in plain
    assert not {"kl_mean", "page_size", "repetition", "seed", "run_id", "exact"} & paged.keys()


def test_quality_has_fidelity_and_a_score_for_each_task():
    result = with_tasks(with_fidelity(make_result("reactive"), kl_mean=0.25), make_task([1, 0], [1, 1], tokens=500))
    quality = quality_of(as_result(result))
    assert (quality["kl_mean"], quality["task/passkey/500"]) == (0.25, 0.5)
    assert quality.keys() == {*FIDELITY, "task/passkey/500"}  # every fidelity that the summary averages
    assert set(FIDELITY) <= set(AVERAGES.values())
    assert quality_of(as_result(make_result())) == {}


def test_steps_join_the_time_of_a_token_and_the_pages_of_its_step():
    block = make_result("reactive", n_tokens=3, tpot_ms=80.0)
    block["steps"] = [
        {"phase": "prefill", "hits": 99, "late": 0, "misses": 0},
        {"phase": "decode", "hits": 6, "late": 0, "misses": 2, "evictions": 1, "prefetch_issued": 0, "stall_ms": 0.5},
        {"phase": "decode", "hits": 0, "late": 0, "misses": 0, "evictions": 0, "prefetch_issued": 0, "stall_ms": 0.0},
    ]
    first, second = steps_of(as_result(block))
    assert first == {
        **{"itl_ms": 80.0, "hits": 6.0, "late": 0.0, "misses": 2.0, "evictions": 1.0, "prefetch_issued": 0.0},
        **{"stall_ms": 0.5, "hit_rate": 0.75},
    }
    assert "hit_rate" not in second
    assert steps_of(as_result(make_result(n_tokens=2, tpot_ms=7.0))) == [{"itl_ms": 7.0}]


# --- the libraries ----------------------------------------------------------------------------------------------------


def three_runs():
    """Made-up runs, whose steps have all that real ones have; and what happens to the second one's quality later."""
    blocks = [make_result(), make_result("reactive", tpot_ms=80.0), make_failure(make_result("predictive"))]
    for step in blocks[1]["steps"]:
        step |= {"evictions": 1, "stall_ms": 0.5 * step["step"]}
    return [as_result(block) for block in blocks]


def told(tracker, results, folder):
    """The tracker after a sweep whose second run had its quality measured at the end."""
    for result in results:
        tracker.run(result)
    results[1].quality = with_fidelity(make_result("reactive"), kl_mean=0.25)["quality"]
    (folder / "experiment_summary.json").write_text('{"total_experiments": 3}')
    tracker.finish(results, folder)


@pytest.fixture
def tensorboard_of(no_network):
    """`tensorboard_of(folder)`: the tracker, and a reader of what a run's folder holds."""
    pytest.importorskip("tensorboard", reason='needs tensorboard: pip install -e ".[tensorboard]"')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def read(folder):
        held = EventAccumulator(str(folder))
        held.Reload()
        return held

    return lambda folder: (TRACKERS.load("tensorboard")(folder), read)


def test_tensorboard_holds_figures_by_run_and_by_step(tmp_path, tensorboard_of):
    tracker, read = tensorboard_of(tmp_path)
    told(tracker, three_runs(), tmp_path)
    folders = sorted(path.name for path in (tmp_path / "tensorboard").iterdir())
    assert folders == ["baseline_ctx500_run0_base-baseline-500-0", "reactive_ctx500_run0_reac-reactive-500-0"]
    held = read(tmp_path / "tensorboard" / folders[1])

    def scalars(name):
        return [(event.step, event.value) for event in held.Scalars(name)]

    assert scalars("run/tpot_ms") == [(0, 80.0)]
    assert scalars("run/hit_rate") == [(0, 0.75)]
    assert scalars("step/stall_ms") == [(step, 0.5 * step) for step in range(1, 11)]  # ten steps, eleven tokens
    assert scalars("step/hit_rate") == [(step, 0.75) for step in range(1, 11)]  # 9 hits, 1 late, 2 misses
    assert scalars("quality/kl_mean") == [(0, 0.25)]
    plain = read(tmp_path / "tensorboard" / folders[0])
    assert "run/hit_rate" not in plain.Tags()["scalars"]
    assert plain.Scalars("step/itl_ms")[-1].value == 100.0


def test_tensorboard_holds_the_spec_as_hparams(tmp_path, tensorboard_of):
    tracker, read = tensorboard_of(tmp_path)
    tracker.run(three_runs()[1])
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    (folder,) = (tmp_path / "tensorboard").iterdir()
    contents = read(folder).SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    hparams = HParamsPluginData.FromString(contents).session_start_info.hparams
    assert hparams["paging.page_size"].number_value == 128
    assert hparams["mode"].string_value == "reactive"


def test_a_run_made_again_replaces_its_scalars(tmp_path, tensorboard_of):
    tracker, read = tensorboard_of(tmp_path)
    tracker.run(as_result(make_result(tpot_ms=100.0)))
    tracker.run(as_result(make_result(tpot_ms=50.0)))
    (folder,) = (tmp_path / "tensorboard").iterdir()
    assert [event.value for event in read(folder).Scalars("run/tpot_ms")] == [50.0]


@pytest.fixture
def mlflow_client(tmp_path, monkeypatch, no_network):
    """A reader of the store in `tmp_path`, and MLflow imported with its own warnings put up with."""
    for name in ("mlflow", "sqlalchemy", "alembic"):
        pytest.importorskip(name, reason='needs MLflow: pip install -e ".[mlflow]"')
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mlflow.tracking import MlflowClient

        yield lambda: MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlruns' / 'mlflow.db'}", registry_uri="file:x")


def test_mlflow_holds_params_metrics_tags_and_the_result(tmp_path, mlflow_client):
    results = three_runs()
    told(TRACKERS.load("mlflow")(tmp_path), results, tmp_path)
    client = mlflow_client()
    experiment = client.get_experiment_by_name("kv-prefetch")
    by_mode = {run.data.tags["mode"]: run for run in client.search_runs([experiment.experiment_id])}
    assert by_mode.keys() == {"sweep", "baseline", "reactive", "predictive"}
    reactive = by_mode["reactive"]
    assert reactive.data.params["paging.page_size"] == "128"
    assert reactive.data.metrics["tpot_ms"] == 80.0
    assert reactive.data.metrics["quality/kl_mean"] == 0.25
    assert (reactive.data.tags["run_id"], reactive.data.tags["model"]) == (results[1].run_id, "tiny")
    assert reactive.data.tags["mlflow.parentRunId"] == by_mode["sweep"].info.run_id
    by_step = client.get_metric_history(reactive.info.run_id, "step/stall_ms")
    assert sorted((metric.step, metric.value) for metric in by_step) == [(step, 0.5 * step) for step in range(1, 11)]
    path = client.download_artifacts(reactive.info.run_id, "result.json", str(tmp_path))
    assert json.loads(Path(path).read_text()) == results[1].to_dict()  # with its quality
    assert by_mode["predictive"].info.status == "FAILED"
    assert by_mode["predictive"].data.tags["error"] == "CUDA out of memory"
    assert [file.path for file in client.list_artifacts(by_mode["sweep"].info.run_id)] == ["experiment_summary.json"]
    assert by_mode["sweep"].info.status == reactive.info.status == "FINISHED"


def test_mlflow_goes_where_the_variable_says(tmp_path, monkeypatch, mlflow_client):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # where MLflow puts artifacts unless told otherwise
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'elsewhere' / 'own.db'}")
    TRACKERS.load("mlflow")(tmp_path).run(three_runs()[0])
    assert (tmp_path / "elsewhere" / "own.db").exists()
    assert not (tmp_path / "mlruns").exists()
