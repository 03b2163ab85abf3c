"""All launchers keep one contract, here with real runs of a tiny model: outcomes, failures, crashes, logs, quality."""

from __future__ import annotations

import importlib.util
import logging
import os
import time
import types
from dataclasses import replace

import pytest

from config_schema import MODE_CLASSES
from jobs import QualityMeasurement, TimedRun, Worker
from launchers import LocalLauncher, make_launcher
from planning import PlannedRun
from progress import Silent
from registry import LAUNCHERS
from result_schema import check
from result_store import ResultStore
from run_specs import expand
from sweep import Sweep

TINY = {
    "model_name": "random:configs/models/tiny-llama.json",
    "device": "cpu",
    "context_lengths": [96],
    "max_new_tokens": 4,
    "num_runs": 1,
    "warmup_runs": 0,
    "page_size": 16,
    "max_gpu_pages": 3,
    "staging_pages": 2,
    "link": "memory",
}


def specs_of(*entries, **defaults):
    """Specs of `(mode, keys)` in their order of running."""
    experiments = []
    for mode, keys in entries:
        cls = MODE_CLASSES[mode]
        shared = {key: value for key, value in (TINY | defaults | keys).items() if key in cls.model_fields}
        experiments.append(cls(mode=mode, **shared))
    return expand(experiments)


def policy(name, **parameters):
    own = f"hostile_parts:{name}"
    return ("reactive", {"name": name, "policy": {"name": own, **parameters} if parameters else own})


class Notes(Silent):
    """Counts what it is told."""

    def __init__(self):
        self.finished_runs, self.n_tokens = [], 0

    def token(self, n_tokens, hit_rate):
        self.n_tokens += 1

    def finished(self, result):
        self.finished_runs.append(result.spec["name"])


@pytest.fixture
def launcher_of():
    """Makes a launcher by name; that of Ray with a cluster of its own, on this machine, a worker for each core."""
    made = []

    def make(name):
        if name == "ray" and importlib.util.find_spec("ray") is None:
            pytest.skip("Ray is not installed: pip install -e '.[cluster]'")
        made.append(make_launcher(name, cpus=1 if name == "ray" else None))
        return made[-1]

    yield make
    for launcher in made:
        launcher.close()


# --- the contract -------------------------------------------------------------------------------------------


@pytest.fixture(params=list(LAUNCHERS))
def launcher(request, launcher_of):
    return launcher_of(request.param)


def test_a_launcher_gives_each_job_back_with_its_outcome_and_what_was_logged(launcher, caplog):
    baseline, raising = specs_of(("baseline", {"quality": {"fidelity_tokens": 4}}), policy("Raising"))
    jobs = [TimedRun(baseline), TimedRun(raising), QualityMeasurement(baseline)]
    watcher = Notes()
    with caplog.at_level(logging.INFO):
        outcomes = dict(launcher.perform(jobs, watcher))
    assert outcomes.keys() == set(jobs)

    run = outcomes[TimedRun(baseline)]
    assert (run.status, run.run_id, run.spec) == ("ok", baseline.run_id, baseline.to_dict())
    assert run.timing["n_tokens"] == 4 and len(run.tokens["ids"][0]) == 4
    assert run.quality == {"exact": True, "matches_baseline": None, "first_divergent_token": None}
    assert run.environment["argv"][0] == os.path.basename(os.sys.argv[0])
    assert watcher.n_tokens == (
        0 if launcher.__class__.__name__ == "RayLauncher" else 4
    )  # the other run raises before its first

    row = outcomes[TimedRun(raising)]
    assert (row.status, row.error, row.run_id) == ("error", "ZeroDivisionError: a bug", raising.run_id)
    assert row.timing is None and row.environment["python"]

    figures = outcomes[QualityMeasurement(baseline)]
    assert figures["fidelity"]["n_tokens"] == 4 and "error" not in figures

    told = {record.getMessage(): record for record in caplog.records}
    assert told["about to raise"].name == "hostile"
    failed = told[f"{raising.slug} failed"]
    assert "ZeroDivisionError: a bug" in logging.Formatter().format(failed) and failed.levelname == "ERROR"


@pytest.mark.parametrize("name", ["process", "ray"])
def test_a_crash_ends_its_own_run_only(launcher_of, name, tmp_path):
    planned = [PlannedRun(spec) for spec in specs_of(policy("Killed"), ("reactive", {}))]
    watcher = Notes()
    sweep = Sweep(planned, ResultStore(tmp_path), launcher_of(name), watcher)
    sweep.run()
    rows = {result.spec["name"]: result for result in sweep.results}
    assert {name: row.status for name, row in rows.items()} == {"Killed": "crashed", "reactive": "ok"}
    if name == "process":
        assert "killed by signal 9 (SIGKILL), as the out-of-memory killer does" in rows["Killed"].error
    else:
        assert "3 workers died of it: WorkerCrashedError" in rows["Killed"].error
        assert len(rows["Killed"].environment["retries"]) == 3
    assert sorted(watcher.finished_runs) == sorted(rows)
    assert list(check(tmp_path)) == []
    again = Sweep(planned, ResultStore(tmp_path), LocalLauncher(), Notes())
    again.resume()
    assert {result.spec["name"]: result.status for result in again.results} == {
        name: row.status for name, row in rows.items()
    }


# --- what is particular to each -----------------------------------------------------------------------------


def test_a_lost_worker_is_replaced_and_the_result_says_so(launcher_of, tmp_path, caplog):
    (spec,) = specs_of(policy("KilledOnce", marker=str(tmp_path / "killed")))
    launcher = launcher_of("ray")
    ((_, result),) = launcher.perform([TimedRun(spec)], Silent())
    assert result.ok
    (reason,) = result.environment["retries"]
    assert reason.startswith("WorkerCrashedError")
    assert f"{spec.slug}: {reason}; done again" in caplog.text


def test_ray_gives_a_run_the_cores_of_the_smallest_machine_unless_asked(launcher_of, monkeypatch):
    launcher = launcher_of("ray")
    (spec,) = specs_of(("baseline", {}))
    assert launcher._share(spec) == {"num_gpus": 0, "num_cpus": 1}
    launcher.cpus = None
    assert launcher._share(spec)["num_cpus"] == launcher.ray.cluster_resources()["CPU"]
    assert {node["NodeManagerAddress"] for node in launcher.ray.nodes()} == {"127.0.0.1"}
    machines = [{"CPU": 8.0}, {"CPU": 16.0}, {}]  # the last one has a head and no place for tasks

    monkeypatch.setattr(launcher.ray, "nodes", lambda: [{"Alive": True, "Resources": it} for it in machines])
    assert launcher._share(spec) == {"num_gpus": 0, "num_cpus": 8}
    launcher.cpus = 2
    assert launcher._share(spec) == {"num_gpus": 0, "num_cpus": 2}
    launcher.cpus = None
    machines.append({"CPU": 32.0, "GPU": 4.0})
    assert launcher._share(spec) == {"num_gpus": 0, "num_cpus": 8}  # the spec says device: cpu
    assert launcher._share(replace(spec, device="auto")) == {"num_gpus": 1, "num_cpus": 8}
    assert launcher._share(replace(spec, device="auto", device_map="auto")) == {"num_gpus": 4, "num_cpus": 32}


class FakeRay(types.SimpleNamespace):
    """Stands for the library: a cluster of two machines, whose tasks all end in an error of the given message."""

    def __init__(self, message=""):
        super().__init__(closed=0, exceptions=types.SimpleNamespace(), message=message)
        for name in ("OutOfMemoryError", "WorkerCrashedError", "NodeDiedError", "ObjectLostError"):
            setattr(self.exceptions, name, type(name, (Exception,), {}))

    def init(self, **options):
        pass

    def nodes(self):
        return [
            {"Alive": alive, "Resources": {"CPU": cores}} for alive, cores in ((True, 2.0), (True, 8.0), (False, 64))
        ]

    def remote(self, **options):
        submit = types.SimpleNamespace(remote=lambda *given: "a task")
        return lambda function: types.SimpleNamespace(options=lambda **share: submit)

    def wait(self, tasks, num_returns):
        return tasks[:1], tasks[1:]

    def get(self, task):
        raise RuntimeError(self.message)

    def shutdown(self):
        self.closed += 1


@pytest.mark.parametrize(
    ("cpus", "message"),
    [
        (0, "--ray-cpus 0: a run takes at least 1 core"),
        (-3, "--ray-cpus -3: a run takes at least 1 core"),
        (9, "--ray-cpus 9: the largest machine of the cluster has 8 cores; ask for no more"),
    ],
)
def test_more_cores_than_any_machine_has_are_refused_instead_of_waited_for(monkeypatch, cpus, message):
    ray = FakeRay()
    monkeypatch.setitem(os.sys.modules, "ray", ray)
    with pytest.raises(ValueError, match=message):
        make_launcher("ray", cpus=cpus)
    assert ray.closed == (cpus > 0)  # a cluster that was started is ended
    assert make_launcher("ray", cpus=8).cpus == 8


@pytest.mark.parametrize(("message", "said"), [("", "RuntimeError"), ("Traceback\n  the last line\n", "the last line")])
def test_an_error_of_ray_without_a_message_is_a_row_that_names_its_kind(monkeypatch, message, said):
    monkeypatch.setitem(os.sys.modules, "ray", FakeRay(message))
    (spec,) = specs_of(("baseline", {}))
    ((_, row),) = make_launcher("ray").perform([TimedRun(spec)], Silent())
    assert (row.status, row.error.strip()) == ("error", said)


def test_ray_that_is_not_installed_is_said_with_the_remedy(monkeypatch):
    monkeypatch.setitem(os.sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[cluster\]'"):
        make_launcher("ray")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("slurm", {}, r"unknown launcher 'slurm' \(known: local, process, ray"),
        ("local", {"cpus": 2}, "--ray-cpus are for --launcher ray, and the launcher is 'local'"),
        ("process", {"address": "somewhere"}, "are for --launcher ray"),
    ],
)
def test_a_wrong_launcher_or_option_is_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_launcher(name, **options)


def test_a_process_that_begins_in_the_midst_of_the_repetitions_warms_up_and_one_that_did_does_not(monkeypatch):
    generated = []
    monkeypatch.setattr("generation.generate", recording_generate(generated))
    first, second, third = specs_of(("reactive", {}), num_runs=3, warmup_runs=2, max_new_tokens=6)
    worker = Worker()
    assert worker.do(TimedRun(second), Silent()).ok
    assert generated == [4, 4, 6]
    assert worker.do(TimedRun(third), Silent()).ok
    assert generated == [4, 4, 6, 6]
    worker.close()
    assert worker.do(TimedRun(first), Silent()).ok
    assert generated == [4, 4, 6, 6, 4, 4, 6]


def test_a_warm_up_counts_in_the_duration_of_whichever_repetition_makes_it(monkeypatch):
    import generation

    original = generation.generate

    def slow(spec, *given, **how):
        time.sleep(0.25)
        return original(spec, *given, **how)

    monkeypatch.setattr("generation.generate", slow)
    first, second, third = specs_of(("baseline", {}), num_runs=3, warmup_runs=2)
    worker = Worker()
    cold_second, warm_third = (worker.do(TimedRun(spec), Silent()) for spec in (second, third))
    worker.close()
    cold_first = worker.do(TimedRun(first), Silent())
    for cold in (cold_first, cold_second):
        assert cold.duration_seconds > 0.75  # two warm-ups and the run
    assert 0.25 < warm_third.duration_seconds < 0.75


def recording_generate(generated):
    import generation

    original = generation.generate

    def generate(spec, model, cache, prompt, new_tokens, **how):
        generated.append(new_tokens)
        return original(spec, model, cache, prompt, new_tokens, **how)

    return generate


def test_the_memory_of_one_model_is_free_before_the_next_is_loaded(monkeypatch):
    import gc
    import weakref

    import jobs

    held, original = [], jobs.load_model

    def load_model(**options):
        assert [model() for model in held] == [None] * len(held)
        loaded = original(**options)
        held.append(weakref.ref(loaded.model))
        return loaded

    monkeypatch.setattr(jobs, "load_model", load_model)
    logging.disable()  # or the test's own log would hold tracebacks, and they their tensors
    gc.disable()  # so that only what the launcher frees is free
    try:
        other = {"model_name": "random:configs/models/tiny-gpt2.json", "name": "other"}
        specs = specs_of(("reactive", {}), policy("Raising"), ("baseline", other))
        launcher = LocalLauncher()
        outcomes = [result.status for _, result in launcher.perform([TimedRun(spec) for spec in specs], Silent())]
        assert outcomes == ["ok", "error", "ok"]
        assert len(held) == 2
        launcher.close()
        assert held[1]() is None
    finally:
        gc.enable()
        logging.disable(logging.NOTSET)
