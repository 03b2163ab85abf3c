"""`python main.py` killed with SIGKILL and resumed, in isolated runs and in shards, end to end with a tiny model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from test_main import PATIENCE_S, PROJECT, command, environment_with_project, ran, write_config

from reporting import write_summary

pytestmark = pytest.mark.usefixtures("logging_restored")

LIST = [
    {"mode": "baseline"},
    {"mode": "reactive"},
    {"mode": "reactive", "name": "half", "selector": "quest", "attention_pages": 3},
]


def files_of(folder):
    return {path: path.read_text() for path in folder.glob("*_ctx*.json")}


def killed_after(n_results, config, folder, *flags):
    """Start a sweep, and kill it outright once it has some results; what they are by then, and its processes."""
    process = subprocess.Popen(
        [sys.executable, str(PROJECT / "main.py"), "--config", str(config), "--output", str(folder), *flags],
        env=environment_with_project(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + PATIENCE_S
    while len(list(folder.glob("*_ctx*.json"))) < n_results:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return files_of(folder), children


def test_a_sweep_that_was_killed_outright_goes_on_where_it_was(tmp_path):
    config, folder = write_config(tmp_path, LIST, num_runs=8, context_lengths=[96]), tmp_path / "results"
    there, _ = killed_after(4, config, folder, "--no-plots")
    assert 4 <= len(there) < 24
    assert {json.loads(text)["status"] for text in there.values()} == {"ok"}
    assert not (folder / "experiment_summary.json").exists()
    (folder / f".{next(iter(there)).name}.torn.tmp").write_text('{"half')

    resumed = command("--config", config, "--output", folder, "--no-plots", "--resume", folder=folder)
    assert resumed.code == 0, resumed.err
    assert f"{len(there)} of 24 runs have a result in {folder}" in resumed.err
    assert f"[{len(there) + 1}/24]" in resumed.err and "[24/24]" in resumed.err
    after = files_of(folder)
    assert len(after) == 24
    changed = [path for path, text in there.items() if after[path] != text]
    assert all("_half_" in path.name and "_run0_" in path.name for path in changed)  # their quality was made up
    assert [result["quality"]["matches_baseline"] for result in resumed.of("reactive")] == [True] * 8
    (measured,) = [result for result in resumed.of("half") if result["spec"]["repetition"] == 0]
    assert measured["quality"]["fidelity"]["n_tokens"] == 32
    counts = resumed.summary["experiment_summary"]
    assert (counts["total_experiments"], counts["reused_experiments"]) == (24, len(there))
    assert counts["total_duration_seconds"] > sum(json.loads(text)["duration_seconds"] for text in there.values())
    assert not list(folder.glob(".*.tmp"))


def test_an_isolated_sweep_that_was_killed_leaves_no_process_behind(tmp_path):
    config = write_config(tmp_path, LIST[:1], num_runs=50, max_new_tokens=64)
    _, children = killed_after(1, config, tmp_path / "results", "--isolate", "--no-plots")
    assert children  # a run of its own, or the next one about to begin
    _, alive = psutil.wait_procs(children, timeout=PATIENCE_S / 4)
    assert not alive


def test_shards_put_together_are_summarised_like_one_sweep(tmp_path):
    lengths = [32, 48, 64, 80]
    flags = {"experiments": LIST[:2], "context_lengths": lengths}
    for number in (1, 2):
        folder = tmp_path / f"part{number}"
        folder.mkdir()
        assert ran(folder, "--shard", f"{number}/2", **flags).code == 0
    together = tmp_path / "together"
    together.mkdir()
    for number in (1, 2):
        for path in (tmp_path / f"part{number}" / "results").glob("*_ctx*.json"):
            os.rename(path, together / path.name)
    report = command("--summarise", together, folder=together)
    assert report.code == 0, report.err
    counts = report.summary["experiment_summary"]
    assert (counts["total_experiments"], counts["reused_experiments"]) == (8, 8)
    assert report.summary["comparative_analysis"]["reactive"]["cells"] == 4
    assert [result["quality"]["matches_baseline"] for result in report.of("reactive")] == [True] * 4
    assert "By context length" in report.out
    assert (together / "plots" / "kv_cache_comparison.png").exists()
    whole = ran(tmp_path, "--resume", **flags)
    assert {path.name for path in files_of(whole.folder)} == {path.name for path in files_of(together)}


def test_a_shard_without_runs_does_nothing_and_says_so(tmp_path):
    empty = ran(tmp_path, "--shard", "2/2", experiments=LIST[:2])
    assert (empty.code, empty.out) == (0, "--shard 2/2: this part of the list has no runs\n")
    assert not empty.folder.exists()


def test_a_folder_is_summarised_without_what_cannot_be_read(tmp_path):
    one = ran(tmp_path, experiments=LIST[:1])
    counts = one.summary["experiment_summary"]
    (one.folder / "reactive_broken.json").write_text("{")
    report = command("--summarise", one.folder, "--no-plots", folder=one.folder)
    assert report.code == 1
    assert f"left out: {one.folder / 'reactive_broken.json'}: " in report.err
    assert len(report.summary["unreadable_files"]) == 1
    assert counts["total_experiments"] == counts["planned_experiments"] == 1
    assert report.summary["experiment_summary"] == counts  # how it came about is still known


def no_summary(folder):
    (folder / "experiment_summary.json").unlink()


def summary_of_others(folder):
    (folder / "experiment_summary.json").write_text('{"experiment_summary": {"total_experiments": 2}}')


def summary_without_times(folder):
    write_summary(folder)  # as a library, not as a sweep


@pytest.mark.parametrize("leave", [no_summary, summary_of_others, summary_without_times])
def test_where_no_summary_says_how_results_came_about_their_own_times_are_added_up(tmp_path, leave):
    one = ran(tmp_path, experiments=LIST[:1])
    (result,) = one.results
    leave(one.folder)
    counts = command("--summarise", one.folder, "--no-plots", folder=one.folder).summary["experiment_summary"]
    assert counts["total_duration_seconds"] == result["duration_seconds"]
    assert (counts["planned_experiments"], counts["reused_experiments"]) == (None, 1)


def test_a_folder_without_results_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        refused = command("--summarise", folder, folder=folder)
        assert refused.code == 2
        assert f"--summarise {folder}: there are no results" in refused.err
        assert not (folder / "experiment_summary.json").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--launcher", "slurm"], "unknown launcher 'slurm'"),
        (["--ray-cpus", "2"], "--ray-address and --ray-cpus are for --launcher ray"),
        (["--shard", "3/2"], "--shard 3/2: write i/n"),
    ],
)
def test_a_wrong_flag_exits_2_with_one_line(tmp_path, flags, message):
    refused = ran(tmp_path, *flags, experiments=LIST[:1])
    assert refused.code == 2
    assert message in refused.err
    assert "Traceback" not in refused.err
