"""Files are whole or absent, JSON is strict, seeds repeat, and the machine's record never fails a run."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import types

import pytest
import torch

import utils

FIELDS = {
    "python",
    "system",
    "cpu",
    "cpu_count",
    "git_commit",
    "git_dirty",
    "gpus",
    "gpu_driver",
    "cuda",
    "packages",
    "torch_threads",
    "argv",
}


@pytest.fixture
def fresh_machine():
    """`environment` looks at the machine once; here it looks again, and again for whoever comes after."""
    utils._machine.cache_clear()
    yield
    utils._machine.cache_clear()


# --- files ------------------------------------------------------------------------------------------------------


def test_a_file_and_its_parent_folders_are_written(tmp_path):
    path = tmp_path / "a" / "b" / "result.txt"
    utils.atomic_write_text(path, "naïve\n")
    assert path.read_bytes() == "naïve\n".encode()
    assert os.listdir(path.parent) == ["result.txt"]


def disk_full(*arguments):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("call", ["fsync", "chmod", "replace"])
def test_a_write_that_fails_midway_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, call):
    path = tmp_path / "result.txt"
    path.write_text("old")
    monkeypatch.setattr(os, call, disk_full)
    with pytest.raises(OSError, match="No space left"):
        utils.atomic_write_text(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["result.txt"]


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    path = tmp_path / "result.txt"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        utils.atomic_write_text(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["result.txt"]


def test_text_that_cannot_be_encoded_leaves_no_file(tmp_path):
    with pytest.raises(UnicodeEncodeError):
        utils.atomic_write_text(tmp_path / "result.txt", "half a pair: \ud800")
    assert os.listdir(tmp_path) == []


def test_a_reader_never_sees_half_a_file(tmp_path):
    path = tmp_path / "result.txt"
    texts = {"a" * 200_000, "b" * 100_000}
    utils.atomic_write_text(path, "a" * 200_000)
    done, strange = threading.Event(), []

    def read():
        while not done.is_set():
            if (text := path.read_text()) not in texts:
                strange.append(len(text))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for _ in range(30):
            for text in texts:
                utils.atomic_write_text(path, text)
    finally:
        done.set()
        reader.join()
    assert not strange


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_json_that_other_readers_refuse_is_not_written(tmp_path, number):
    path = tmp_path / "result.json"
    utils.write_json(path, {"hit_rate": 0.5})
    with pytest.raises(ValueError, match="JSON"):
        utils.write_json(path, {"hit_rate": [number]})
    assert json.loads(path.read_text()) == {"hit_rate": 0.5}
    assert os.listdir(tmp_path) == ["result.json"]


def test_json_comes_back_as_it_was(tmp_path):
    value = {"name": "é", "nothing": None, "numbers": [1, 2.5, -0.0], "nested": {"yes": True}}
    utils.write_json(tmp_path / "result.json", value)
    text = (tmp_path / "result.json").read_text()
    assert json.loads(text) == value
    assert text.endswith("}\n")


# --- seeds ------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_random_numbers_and_another_gives_others():
    def numbers(seed):
        utils.set_seed(seed)
        return random.random(), *torch.rand(4).tolist()

    assert numbers(3) == numbers(3)
    assert all(one != other for one, other in zip(numbers(3), numbers(4), strict=True))


# --- the machine ------------------------------------------------------------------------------------------------


def test_the_environment_has_its_fields_and_is_strict_json(fresh_machine):
    found = utils.environment()
    assert set(found) == FIELDS
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["python"] == sys.version.split()[0]
    assert found["packages"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert found["torch_threads"] == torch.get_num_threads()
    assert found["cuda"] == torch.version.cuda
    assert len(found["gpus"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)


def test_a_package_that_is_not_installed_is_null(monkeypatch):
    monkeypatch.setattr(utils, "REPORTED_PACKAGES", ("torch", "not-a-package-at-all"))
    assert utils.environment()["packages"]["not-a-package-at-all"] is None


def test_the_commit_is_that_of_the_project_and_dirty_tells_whether_it_is_enough(tmp_path, monkeypatch, fresh_machine):
    def git(*arguments):
        name = ["-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
        done = subprocess.run(["git", "-C", tmp_path, *name, *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    git("init", "--quiet")
    (tmp_path / "tracked").write_text("1")
    git("add", "tracked")
    git("commit", "--quiet", "--no-verify", "--message", "one")
    (tmp_path / "untracked").write_text("results do not change what ran")
    monkeypatch.setattr(utils, "PROJECT_FOLDER", tmp_path)
    found = utils.environment()
    assert (found["git_commit"], found["git_dirty"]) == (git("rev-parse", "HEAD"), False)
    (tmp_path / "tracked").write_text("2")
    utils._machine.cache_clear()
    assert utils.environment()["git_dirty"] is True


def test_outside_a_git_checkout_the_commit_is_null(tmp_path, monkeypatch, fresh_machine):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setattr(utils, "PROJECT_FOLDER", tmp_path)
    found = utils.environment()
    assert (found["git_commit"], found["git_dirty"]) == (None, None)


def test_without_git_or_a_readable_cpu_name_the_environment_is_still_had(monkeypatch, fresh_machine):
    def unreadable(self, *arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(utils.Path, "read_text", unreadable)
    found = utils.environment()
    assert (found["git_commit"], found["git_dirty"]) == (None, None)
    assert set(found) == FIELDS


def nvml(broken: str) -> types.ModuleType:
    """A stand-in for pynvml on a machine with a driver; the function named `broken` raises, as NVML does."""
    module = types.ModuleType("pynvml")
    for name in ("nvmlInit", "nvmlSystemGetDriverVersion", "nvmlShutdown"):
        setattr(module, name, lambda: "555.42")

    def raise_nvml_error():
        raise RuntimeError("NVML: Unknown Error")

    setattr(module, broken, raise_nvml_error)
    return module


@pytest.mark.parametrize("broken", ["nvmlInit", "nvmlSystemGetDriverVersion", "nvmlShutdown"])
def test_a_broken_gpu_driver_is_null_and_no_failure(monkeypatch, fresh_machine, broken):
    monkeypatch.setitem(sys.modules, "pynvml", nvml(broken))
    assert utils.environment()["gpu_driver"] is None


def test_a_working_gpu_driver_is_named(monkeypatch, fresh_machine):
    monkeypatch.setitem(sys.modules, "pynvml", nvml("nothing"))
    assert utils.environment()["gpu_driver"] == "555.42"


def test_where_torch_was_not_imported_it_is_not_imported_for_the_record():
    program = "import sys, utils; found = utils.environment(); print('torch' in sys.modules, found['torch_threads'])"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=utils.PROJECT_FOLDER, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "None"]
