"""Small things every module needs: files that are whole or absent, seeds, and a record of the machine.

A result file is written to a temporary name beside its target and renamed into place, so a reader sees the old file or
the new one and never half of one, also after a kill. JSON is strict: NaN and infinity are refused, because other
readers refuse them.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import platform
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TextIO

PROJECT_FOLDER = Path(__file__).resolve().parent
REPORTED_PACKAGES = ("torch", "transformers", "accelerate", "bitsandbytes", "safetensors", "numpy", "pydantic")


@contextmanager
def whole_file(path: Path, errors: str = "strict") -> Iterator[TextIO]:
    """A file to write piece by piece, which is at `path` once it is whole, and never seen half written. Parent folders
    are made.

    Args:
        errors: what becomes of what UTF-8 cannot hold, as for `open`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", errors=errors, newline="\n") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def atomic_write_text(path: Path, text: str) -> None:
    """Write `text` to `path` so that the file is never seen half written. Parent folders are made."""
    with whole_file(path) as file:
        file.write(text)


def write_json(path: Path, value: Any) -> None:
    """Write strict, indented JSON atomically. Raises ValueError on NaN or infinity."""
    atomic_write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def set_seed(seed: int) -> None:
    """Seed Python and torch (all devices), so that sampling repeats."""
    import torch

    random.seed(seed)
    torch.manual_seed(seed)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU, or on a CPU, where torch raises a plain RuntimeError."""
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.cuda.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def environment() -> dict[str, Any]:
    """The machine, the versions and the command behind a result. What cannot be found out is None."""
    return {
        **_machine(),
        "gpus": _gpus(),
        "cuda": _cuda_version(),
        "packages": {name: _version(name) for name in REPORTED_PACKAGES},
        "torch_threads": _torch_threads(),
        "argv": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


@cache
def _machine() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": _git_dirty(),
        "gpu_driver": _gpu_driver(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or None
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or None


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(PROJECT_FOLDER), *arguments], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _git_dirty() -> bool | None:
    """Whether tracked files differ from the commit: then the commit alone does not reproduce the result."""
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return None if changes is None else bool(changes)


def _torch_threads() -> int | None:
    torch = sys.modules.get("torch")
    return torch.get_num_threads() if torch else None


def _gpus() -> list[str] | None:
    torch = sys.modules.get("torch")
    if torch is None:
        return None
    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def _cuda_version() -> str | None:
    torch = sys.modules.get("torch")
    return torch.version.cuda if torch else None


def _gpu_driver() -> str | None:
    """The NVIDIA driver's version through NVML, or None where there is no such driver."""
    try:
        import pynvml

        pynvml.nvmlInit()
        try:
            return str(pynvml.nvmlSystemGetDriverVersion())
        finally:
            pynvml.nvmlShutdown()
    except Exception as error:  # NVML raises its own error classes, and the import fails in more than one way
        logging.getLogger(__name__).debug("no NVML: %s", error)
        return None
