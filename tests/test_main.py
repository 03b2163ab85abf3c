"""`python main.py`, flag by flag, end to end on tiny models with random weights."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

import command_line
import main
from experiments import load_experiments
from metrics import RunResult
from page_policies import LRU
from registry import MODES, POLICIES, PREDICTORS, SELECTORS
from result_schema import problems_of
from run_specs import expand

pytestmark = pytest.mark.usefixtures("logging_restored")

PROJECT = Path(main.__file__).parent
PATIENCE_S = 120
TINY = {
    "model_name": "random:configs/models/tiny-llama.json",
    "device": "cpu",
    "context_lengths": [48],
    "num_runs": 1,
    "max_new_tokens": 8,
    "warmup_runs": 0,
    "page_size": 16,
    "max_gpu_pages": 3,
    "staging_pages": 2,
    "prefetch_k": 2,
    "link": "memory",
}
THREE_MODES = [{"mode": "baseline"}, {"mode": "reactive"}, {"mode": "predictive"}]


@dataclass(frozen=True)
class Ran:
    """What a command left behind."""

    code: int
    out: str
    err: str
    folder: Path

    @property
    def results(self):
        names = (path for mode in MODES for path in sorted(self.folder.glob(f"{mode}_*.json")))
        return [json.loads(path.read_text()) for path in names]

    @property
    def summary(self):
        return json.loads((self.folder / "experiment_summary.json").read_text())

    def of(self, name):
        return [result for result in self.results if result["spec"]["name"] == name]


def write_config(folder, experiments=THREE_MODES, **defaults):
    path = folder / "experiments.yaml"
    path.write_text(yaml.safe_dump({"defaults": TINY | defaults, "experiments": experiments}))
    return path


def command(*arguments, folder):
    """`main.py` in this process, which saves importing torch each time."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main.main([str(argument) for argument in arguments])
    return Ran(code, out.getvalue(), err.getvalue(), folder)


def ran(tmp_path, *flags, experiments=THREE_MODES, plots=False, **defaults):
    """Run a list into `tmp_path / "results"`."""
    config, folder = write_config(tmp_path, experiments, **defaults), tmp_path / "results"
    return command("--config", config, "--output", folder, *([] if plots else ["--no-plots"]), *flags, folder=folder)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Five strategies, two contexts, two repetitions."""
    experiments = [
        *THREE_MODES,
        {"mode": "baseline", "name": "static", "cache_implementation": "static"},
        {"mode": "baseline", "name": "fp8", "cache_implementation": "quantized"},
    ]
    folder = tmp_path_factory.mktemp("sweep")
    return ran(folder, experiments=experiments, plots=True, context_lengths=[48, 96], num_runs=2)


# --- results ------------------------------------------------------------------------------------------------


def test_a_run_of_all_modes_exits_0_and_leaves_one_file_for_each_run(sweep):
    assert sweep.code == 0
    assert {mode: len(list(sweep.folder.glob(f"{mode}_*.json"))) for mode in MODES} == {
        "baseline": 12,
        "reactive": 4,
        "predictive": 4,
    }


def test_the_results_folder_holds_nothing_but_results_summary_log_plots_exports_and_report(sweep):
    others = {path.name for path in sweep.folder.iterdir() if not path.name.startswith(tuple(MODES))}
    exports = {"results.csv", "tables.md", "tables.tex", "steps.jsonl"}
    assert others == {"experiment_summary.json", "run.log", "plots", "report.html", *exports}


def test_what_a_sweep_leaves_behind_is_as_the_schema_says(sweep):
    assert [problem for result in sweep.results for problem in problems_of(result)] == []


@pytest.mark.parametrize("mode", list(MODES))
def test_every_result_has_the_blocks_of_its_mode_and_null_for_the_others(sweep, mode):
    blocks = RunResult(spec={}, run_id="").to_dict().keys()
    missing = {
        "baseline": {"error", "cache", "prefetch", "steps"},
        "reactive": {"error", "prefetch"},
        "predictive": {"error"},
    }
    for result in (result for result in sweep.results if result["spec"]["mode"] == mode):
        assert result.keys() == blocks
        assert {name for name, block in result.items() if block is None} == missing[mode]
        assert (result["status"], result["schema_version"]) == ("ok", 1)


def test_exact_modes_give_the_tokens_of_the_baseline(sweep):
    for name in ("reactive", "predictive", "static"):
        assert [result["quality"]["matches_baseline"] for result in sweep.of(name)] == [True] * 4
    hashes = {result["context"]["tokens"]: result["tokens"]["sha256"] for result in sweep.of("baseline")}
    for result in (*sweep.of("reactive"), *sweep.of("predictive")):
        assert result["tokens"]["sha256"] == hashes[result["context"]["tokens"]]


def test_where_the_context_exceeds_the_budget_paging_really_happens(sweep):
    for result in (*sweep.of("reactive"), *sweep.of("predictive")):
        if result["context"]["tokens"] == 96:
            assert result["cache"]["misses"] > 0
            assert result["cache"]["h2d_bytes"] > 0
    assert all(result["prefetch"]["issued"] > 0 for result in sweep.of("predictive"))


def test_a_result_records_the_machine_and_the_command(sweep):
    for result in sweep.results:
        environment = result["environment"]
        assert environment["packages"]["torch"]
        assert environment["torch_threads"] >= 1
        assert environment["argv"]


# --- summary, plots, console --------------------------------------------------------------------------------


def test_the_summary_counts_the_runs(sweep):
    counts = sweep.summary["experiment_summary"]
    assert counts.keys() >= {"total_experiments", "successful_experiments", "total_duration_seconds"}
    assert (counts["total_experiments"], counts["successful_experiments"]) == (20, 20)
    assert (counts["planned_experiments"], counts["interrupted"]) == (20, False)
    assert counts["total_duration_seconds"] >= sum(result["duration_seconds"] for result in sweep.results)


def test_the_summary_has_the_promised_figures_of_each_mode(sweep):
    promised = {
        "baseline": {"average_latency_ms", "average_tokens_per_second"},
        "reactive": {"average_latency_ms", "average_tokens_per_second", "average_cache_hit_rate"},
        "predictive": {
            "average_latency_ms",
            "average_tokens_per_second",
            "average_cache_hit_rate",
            "average_prediction_accuracy",
        },
    }
    summaries = sweep.summary["mode_summaries"]
    assert summaries.keys() == promised.keys()
    for mode, keys in promised.items():
        assert all(summaries[mode][key] > 0 for key in keys), mode
    compared = sweep.summary["comparative_analysis"]
    for mode in ("reactive", "predictive"):
        assert isinstance(compared[mode]["latency_speedup_percent"], float)
        assert isinstance(compared[mode]["throughput_speedup_percent"], float)


def test_the_averages_of_the_summary_are_those_of_the_result_files(sweep):
    figures = sweep.summary["mode_summaries"]["predictive"]
    runs = sweep.of("predictive")
    assert figures["average_latency_ms"] == pytest.approx(statistics.fmean(r["timing"]["tpot_ms"] for r in runs))
    assert figures["average_cache_hit_rate"] == pytest.approx(statistics.fmean(r["cache"]["hit_rate"] for r in runs))
    accuracy = statistics.fmean(run["prefetch"]["accuracy"] for run in runs)
    assert figures["average_prediction_accuracy"] == pytest.approx(accuracy)


def test_the_plot_is_a_png(sweep):
    assert (sweep.folder / "plots" / "kv_cache_comparison.png").read_bytes().startswith(b"\x89PNG")


def test_tables_go_to_stdout_and_progress_to_stderr(sweep):
    for word in ("latency", "speed-up", "stall", "hit", "mispred", "By context length", "Memory"):
        assert word in sweep.out
    for name in ("baseline", "reactive", "predictive", "static", "fp8"):
        assert name in sweep.out
    assert "[20/20]" in sweep.err
    assert "[20/20]" not in sweep.out
    assert "By context length" not in sweep.err


def test_the_log_names_every_run(sweep):
    log = (sweep.folder / "run.log").read_text()
    for path in sweep.folder.glob("*_ctx*.json"):
        assert f"{path.stem}: ok" in log


def test_quiet_prints_the_tables_and_nothing_else(tmp_path):
    quiet = ran(tmp_path, "-q", experiments=[{"mode": "baseline"}])
    assert (quiet.code, quiet.err) == (0, "")
    assert "By context length" in quiet.out


def test_verbose_says_more_on_stderr(tmp_path):
    verbose = ran(tmp_path, "-v", experiments=[{"mode": "baseline"}])
    assert f"INFO: {next(verbose.folder.glob('baseline_*')).stem}: ok" in verbose.err
    assert "INFO" not in verbose.out


def test_plots_are_written_in_every_format_that_is_asked_for(tmp_path):
    formats = ["--plot-format", "svg", "--plot-format", "pdf,svg"]
    experiments = [{"mode": "baseline"}]
    drawn = ran(tmp_path, *formats, experiments=experiments, plots=True, context_lengths=[48], num_runs=1)
    names = {path.name for path in (drawn.folder / "plots").iterdir()}
    assert names == {
        f"{name}.{suffix}"
        for name in ("kv_cache_comparison", "latency_by_context", "token_times")
        for suffix in ("svg", "pdf")
    }


def test_an_unknown_plot_format_is_refused_before_anything_runs(tmp_path, capsys):
    with pytest.raises(SystemExit) as refused:
        main.main(["--plot-format", "jpg", "--output", str(tmp_path / "results")])
    assert refused.value.code == 2
    assert "--plot-format: unknown plot format 'jpg'; write png, pdf, svg" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_no_plots_writes_no_plots(tmp_path):
    plain = ran(tmp_path, experiments=[{"mode": "baseline"}])
    assert plain.code == 0
    assert not (plain.folder / "plots").exists()


def test_seed_replaces_the_seed_of_every_experiment(tmp_path):
    experiments = [{"mode": "baseline", "seed": 1}, {"mode": "reactive", "seed": 2}]
    results = ran(tmp_path, "--seed", "7", experiments=experiments).results
    assert [result["spec"]["seed"] for result in results] == [7, 7]
    assert results[1]["quality"]["matches_baseline"] is True


@pytest.mark.parametrize("seed", ["-1", "4294967296", "1.5", "x"])
def test_a_seed_that_a_config_would_refuse_is_refused(seed, capsys):
    with pytest.raises(SystemExit) as stopped:
        main.main(["--seed", seed])
    assert stopped.value.code == 2
    assert "argument --seed" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["two words", "[red]", "a[/b]", "ünïcode", "-dash", "dots..json"])
def test_any_name_of_the_output_folder_and_of_an_experiment_will_do(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    config = write_config(tmp_path, [{"mode": "baseline", "name": name}])
    done = command("--config", config, f"--output={name}", "--no-plots", folder=tmp_path / name)
    assert done.code == 0
    assert [result["spec"]["name"] for result in done.results] == [name]
    assert f"results: {name}," in done.out
    assert name.split()[0] in command("--config", config, "--plan", folder=tmp_path).out


def test_what_else_lies_in_the_results_folder_is_not_counted(tmp_path):
    first = ran(tmp_path, experiments=[{"mode": "baseline"}])
    (first.folder / "baseline_broken.json").write_text("{")
    (first.folder / "notes.txt").write_text("mine")
    second = ran(tmp_path, experiments=[{"mode": "reactive"}])
    assert second.summary["experiment_summary"]["total_experiments"] == 1
    assert second.summary["mode_summaries"]["baseline"]["runs"] == 0
    assert (second.folder / "notes.txt").read_text() == "mine"


# --- models with few positions ------------------------------------------------------------------------------


def test_a_context_beyond_learned_positions_is_clamped_said_and_recorded(tmp_path):
    gpt2 = {"model_name": "random:configs/models/tiny-gpt2.json", "context_lengths": [1000], "max_new_tokens": 50}
    clamped = ran(tmp_path, page_size=128, max_gpu_pages=4, **gpt2)
    assert clamped.code == 0
    assert "context clamped from 1000 to 974" in clamped.err
    for result in clamped.results:
        assert result["context"]["requested_tokens"] == 1000
        assert result["context"]["tokens"] == 974
        assert result["context"]["clamped"] is True
        assert "1000 + 50 new tokens exceed" in result["context"]["reason"]
        assert result["timing"]["n_tokens"] == 50
    assert [result["quality"]["matches_baseline"] for result in clamped.results[1:]] == [True, True]


# --- --plan, --list, --create-config ------------------------------------------------------------------------


def test_plan_prints_each_run_with_its_sizes_and_writes_nothing(tmp_path):
    planned = ran(tmp_path, "--plan", context_lengths=[48, 96], link={"bandwidth_gb_s": 0.001})
    assert planned.code == 0
    assert not planned.folder.exists()
    assert "768 KV bytes per token" in planned.out  # 2 x 3 layers x 2 heads x 16 x 4 bytes
    lines = [line.split() for line in planned.out.splitlines()]
    rows = {(line[1], line[2]): line[4:] for line in lines if len(line) == 8 and "+8" in line[2]}
    assert len(rows) == 6
    # 103 positions are 7 pages of which 3 fit: 4 x 16 x 768 bytes must cross 10^6 bytes/s in every step
    assert rows["reactive", "96+8"] == rows["predictive", "96+8"] == ["0.1", "0.1", "43", "49.15"]
    assert rows["baseline", "96+8"] == ["0.1", "0.1", "100", "0.00"]


def test_plan_shows_every_column_whole_on_80_columns(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    planned = command("--config", command_line.DEFAULT_CONFIG, "--plan", folder=tmp_path)
    run_ids = [run.run_id for run in expand(load_experiments(command_line.DEFAULT_CONFIG))]
    assert [line.split()[0] for line in planned.out.splitlines() if "+50" in line] == run_ids
    for word in ("strategy", "context", "resident", "transfer floor", "predictive", "2000+50"):
        assert word in planned.out


def test_plan_says_what_it_cannot_know(tmp_path):
    planned = ran(tmp_path, "--plan", experiments=[{"mode": "baseline", "model_name": "./no-such-folder"}])
    assert planned.code == 0
    assert "sizes unknown" in planned.out


def test_list_names_every_part_that_a_config_can_name(tmp_path):
    listed = command("--list", folder=tmp_path)
    assert listed.code == 0
    for registry in (MODES, POLICIES, SELECTORS, PREDICTORS):
        for name in registry.table:
            assert name in listed.out
        assert registry.kind in listed.out


def test_create_config_writes_a_list_that_can_be_loaded(tmp_path):
    path = tmp_path / "new folder" / "mine.yaml"
    created = command("--create-config", path, folder=tmp_path)
    assert created.code == 0
    assert str(path) in created.out
    assert [experiment.mode for experiment in load_experiments(path)] == [*MODES, "predictive"]


def test_create_config_without_a_name_writes_to_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command("--create-config", folder=tmp_path).code == 0
    assert (tmp_path / "experiment_config.yaml").read_text() == command_line.DEFAULT_CONFIG.read_text()


def test_create_config_overwrites_only_when_forced(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("precious")
    refused = command("--create-config", path, folder=tmp_path)
    assert refused.code == 2
    assert "--force" in refused.err
    assert path.read_text() == "precious"
    assert command("--create-config", path, "--force", folder=tmp_path).code == 0
    assert load_experiments(path)


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_create_config_does_not_take_a_folder_or_a_place_that_cannot_be(tmp_path, force):
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "mine.yaml"):
        refused = command("--create-config", path, *force, folder=tmp_path)
        assert refused.code == 2
        assert str(path) in refused.err


# --- what is wrong with a list ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "experiments.yaml:1:1"),
        ("experiments:\n  - mode: baseline\n    page_sise: 16\n", "experiments.yaml:3:5: unknown key 'page_sise'"),
        ("experiments:\n  - mode: reactive\n    max_gpu_pages: 2\n", "experiments.yaml:3:20: max_gpu_pages is 2"),
        ("experiments: [\n", "experiments.yaml:2:1"),
    ],
    ids=["empty", "typo", "conflict", "broken"],
)
@pytest.mark.parametrize("flags", [[], ["--plan"]], ids=["run", "plan"])
def test_a_wrong_list_exits_2_with_the_place_and_writes_nothing(tmp_path, text, message, flags):
    path = tmp_path / "experiments.yaml"
    path.write_text(text)
    refused = command("--config", path, "--output", tmp_path / "results", *flags, folder=tmp_path)
    assert refused.code == 2
    assert message in refused.err
    assert refused.out == ""
    assert not (tmp_path / "results").exists()


def test_a_list_that_is_not_there_or_is_a_folder_exits_2(tmp_path):
    for path in (tmp_path / "nothing.yaml", tmp_path):
        refused = command("--config", path, folder=tmp_path)
        assert refused.code == 2
        assert str(path) in refused.err


def test_an_output_folder_that_is_a_file_exits_2_before_anything_runs(tmp_path):
    (tmp_path / "results").write_text("precious")
    refused = ran(tmp_path)
    assert refused.code == 2
    assert f"--output {tmp_path / 'results'}: is a file, or lies in one; name a folder" in refused.err
    assert (tmp_path / "results").read_text() == "precious"


def test_a_plan_imports_no_torch_although_it_resolves_the_parts_of_the_config(tmp_path):
    parts = {"policy": {"name": "mru"}, "selector": "all", "predictor": "last_step"}
    write_config(tmp_path, [{"mode": "baseline"}, {"mode": "predictive", **parts}])
    program = (
        "import sys, main\n"
        "code = main.main(['--plan', '--config', 'experiments.yaml'])\n"
        "print('page_policies' in sys.modules, {'torch', 'transformers'} & set(sys.modules))\n"
        "sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment_with_project(), capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "True set()"


def environment_with_project():
    return os.environ | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}


# --- failures and interruptions -----------------------------------------------------------------------------


def test_a_failed_run_is_a_row_and_the_others_still_run(tmp_path):
    experiments = [
        {"mode": "baseline", "name": "gone", "model_name": "./no-such-folder"},
        {"mode": "baseline", "name": "offloaded", "cache_implementation": "offloaded", "device": "auto"},
        {"mode": "baseline", "name": "good"},
        {"mode": "reactive"},
    ]
    import torch

    if torch.cuda.is_available():
        experiments.pop(1)
    mixed = ran(tmp_path, experiments=experiments)
    assert mixed.code == 1
    rows = {result["spec"]["name"]: (result["status"], result["error"]) for result in mixed.results}
    assert rows.keys() == {experiment.get("name", "reactive") for experiment in experiments}
    assert rows["good"] == rows["reactive"] == ("ok", None)
    assert rows["gone"][0] == "error"
    assert "there is no such folder" in rows["gone"][1]
    if "offloaded" in rows:
        assert "needs a CUDA device" in rows["offloaded"][1]
    assert mixed.summary["experiment_summary"]["successful_experiments"] == 2
    assert mixed.summary["experiment_summary"]["total_experiments"] == len(experiments)
    assert "Runs that did not finish" in mixed.out
    assert "Traceback" not in mixed.err + mixed.out
    assert "Traceback" in (mixed.folder / "run.log").read_text()


def test_where_every_run_fails_there_is_still_a_summary_and_a_plot_of_nothing_does_no_harm(tmp_path):
    failed = ran(tmp_path, experiments=[{"mode": "baseline", "model_name": "./no-such-folder"}], plots=True)
    assert failed.code == 1
    assert failed.summary["experiment_summary"]["successful_experiments"] == 0
    assert failed.summary["mode_summaries"]["baseline"]["average_latency_ms"] is None


def test_ctrl_c_keeps_what_is_finished_writes_the_summary_and_exits_130(tmp_path):
    folder = tmp_path / "results"
    config = write_config(tmp_path, [{"mode": "baseline"}], num_runs=1000, max_new_tokens=64)
    # A shell that runs tests in the background makes its children ignore SIGINT; here it must be heard.
    program = (
        "import runpy, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "sys.argv[0] = 'main.py'\n"
        f"runpy.run_path({str(PROJECT / 'main.py')!r}, run_name='__main__')"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, "--config", str(config), "--output", str(folder), "--no-plots"],
        env=environment_with_project(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + PATIENCE_S
    while not any(folder.glob("baseline_*.json")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "interrupted after" in err
    kept = [json.loads(path.read_text()) for path in folder.glob("baseline_*.json")]
    assert 1 <= len(kept) < 1000
    assert {result["status"] for result in kept} == {"ok"}
    summary = json.loads((folder / "experiment_summary.json").read_text())
    assert summary["experiment_summary"]["successful_experiments"] == len(kept)
    assert "By context length" in out
    assert not list(folder.glob(".*.tmp"))


@pytest.mark.parametrize("flags", [[], ["--plan"]], ids=["run", "plan"])
def test_ctrl_c_before_the_first_run_exits_130_without_a_traceback(tmp_path, monkeypatch, flags):
    def interrupted(specs):
        raise KeyboardInterrupt

    monkeypatch.setattr("planning.plan", interrupted)
    stopped = ran(tmp_path, *flags)
    assert (stopped.code, stopped.err) == (130, "interrupted\n")


# --- the user's own parts -----------------------------------------------------------------------------------

OWN_PARTS = '''
from dataclasses import dataclass

from page_policies import FIFO
from page_predictors import NoPrediction

EVICTED, PREDICTED = [], []


@dataclass(frozen=True)
class Mine(FIFO):
    """My policy."""

    loudness: int = 0

    def victim(self, pinned):
        EVICTED.append(self.loudness)
        return super().victim(pinned)


@dataclass(frozen=True)
class Guess(NoPrediction):
    """My predictor."""

    def predict(self, layer, step):
        PREDICTED.append(layer)
        return [(page, 1.0) for page in range(1, 4)]
'''


def test_a_policy_and_a_predictor_of_the_users_own_work_by_import_path(tmp_path, monkeypatch):
    (tmp_path / "my_own_parts.py").write_text(OWN_PARTS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    experiments = [
        {"mode": "baseline"},
        {"mode": "reactive", "policy": {"name": "my_own_parts:Mine", "loudness": 11}},
        {"mode": "predictive", "predictor": "my_own_parts:Guess"},
    ]
    own = ran(tmp_path, experiments=experiments, context_lengths=[96])
    module = sys.modules.pop("my_own_parts")
    assert own.code == 0
    assert set(module.EVICTED) == {11}
    assert set(module.PREDICTED) == {0, 1, 2}
    assert own.of("predictive")[0]["prefetch"]["issued"] > 0
    assert [result["quality"]["matches_baseline"] for result in own.results[1:]] == [True, True]


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("no_such_module:Mine", "there is no module 'no_such_module' to import"),
        ("page_policies:NoSuch", "module 'page_policies' has no 'NoSuch'"),
        ({"name": "lru", "siez": 3}, "policy 'lru' has no parameter 'siez'"),
    ],
)
def test_a_part_that_is_not_there_is_found_before_anything_runs(tmp_path, policy, message):
    refused = ran(tmp_path, experiments=[{"mode": "baseline"}, {"mode": "reactive", "policy": policy}])
    assert refused.code == 2
    assert message in refused.err
    assert "Traceback" not in refused.err
    assert not refused.folder.exists()


@dataclass(frozen=True)
class NeverPleased(LRU):
    """A policy that refuses a parameter's value when it is made, so only at run time."""

    ways: int = 4

    def __post_init__(self):
        raise ValueError(f"ways={self.ways} is no power of three")


def test_a_part_that_cannot_be_made_fails_its_run_with_the_reason(tmp_path):
    policy = {"name": "test_main:NeverPleased", "ways": 8}
    failed = ran(tmp_path, experiments=[{"mode": "baseline"}, {"mode": "reactive", "policy": policy}])
    assert failed.code == 1
    assert "ways=8 is no power of three" in failed.of("reactive")[0]["error"]
    assert failed.of("baseline")[0]["status"] == "ok"


def test_quality_that_could_not_be_measured_is_said_with_its_reason(tmp_path):
    experiments = [{"mode": "baseline", "quality": {"tasks": ["passkey"], "fidelity_tokens": 0}}]
    ended = ran(tmp_path, experiments=experiments)
    assert ended.code == 1
    assert "quality of 1 run, which counts as a failure: passkey at" in ended.err
