"""GGUF files converted to safetensors, once.

Dequantising a GGUF file takes ten times longer than loading the safetensors it becomes, so it happens once,
into `$KV_PREFETCH_CACHE/models`, else `$XDG_CACHE_HOME/kv-prefetch/models`, else `~/.cache/kv-prefetch/models`.

A converted model is a plain Hugging Face folder with an `origin.json` beside the weights that says which file it was
made from and how large its own files are. One that is incomplete, or was made from something else, does
not count and is made anew. It appears by one rename, so no reader ever sees half of it; of two processes that
want it at once, one converts while the other waits.

This module imports torch only while it converts.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model_shapes import GGUF_COMPUTE_DTYPE

log = logging.getLogger(__name__)

ORIGIN_FILE = "origin.json"
ORIGIN_FORMAT = 1
"""Raised when the conversion itself changes, so that older ones are made anew."""

EXACT_UP_TO_PARAMETERS = 2**28
"""A model this small is stored in float32, as dequantised; a larger one in float16, in half the space."""


def models_folder() -> Path:
    """The folder of converted models."""
    if chosen := os.environ.get("KV_PREFETCH_CACHE"):
        return Path(chosen).expanduser() / "models"
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "kv-prefetch" / "models"


def short_hash(text: object) -> str:
    return hashlib.sha256(str(text).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class ConvertedModel:
    """One converted model: `folder` holds it, `gguf` is what it is made from (None: no longer here)."""

    folder: Path
    gguf: Path | None

    def problem(self) -> str | None:
        """Why it cannot be used, or None when it can. Reads sizes, not weights."""
        if not self.folder.is_dir():
            return "nothing was converted yet"
        try:
            origin = json.loads((self.folder / ORIGIN_FILE).read_text(encoding="utf-8"))
            for name, size_bytes in origin["files"].items():
                if (self.folder / name).stat().st_size != size_bytes:
                    return f"it is broken ({name} has another size than was written)"
            return self.gguf and self.difference(origin)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return "it is incomplete"

    def difference(self, origin: Mapping[str, Any]) -> str | None:
        """How `origin` differs from what `gguf` would give today, or None."""
        if origin["format"] != ORIGIN_FORMAT or origin["transformers"] != transformers_version():
            return f"it was made by transformers {origin['transformers']}, in format {origin['format']}"
        return None if is_same_file(self.gguf, origin["gguf"]) else "it was made from another GGUF file"

    def seal(self, folder: Path) -> None:
        """Write the origin into `folder`, a finished conversion, so that it counts."""
        files = {path.name: path.stat().st_size for path in folder.iterdir()}
        origin = {
            "format": ORIGIN_FORMAT,
            "gguf": describe_file(self.gguf),
            "transformers": transformers_version(),
            "files": files,
        }
        (folder / ORIGIN_FILE).write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")

    def origin_text(self) -> str:
        """Name and hash of the GGUF file this was made from."""
        gguf = json.loads((self.folder / ORIGIN_FILE).read_text(encoding="utf-8"))["gguf"]
        return f"{gguf['name']} (sha256 {gguf['sha256']})"

    def spoil(self) -> None:
        """Make it count as incomplete: its files have the right sizes, yet could not be loaded."""
        (self.folder / ORIGIN_FILE).unlink(missing_ok=True)


def transformers_version() -> str:
    """The installed version, read without importing the package."""
    return importlib.metadata.version("transformers")


def describe_file(path: Path) -> dict[str, Any]:
    """Name, size, time and content of a file."""
    status = path.stat()
    return {
        "name": path.name,
        "size_bytes": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "sha256": file_sha256(path),
    }


def is_same_file(path: Path, described: Mapping[str, Any]) -> bool:
    """Whether `path` has the described content. The same size and time stand for the same content."""
    status = path.stat()
    if (path.name, status.st_size) != (described["name"], described["size_bytes"]):
        return False
    return status.st_mtime_ns == described["mtime_ns"] or file_sha256(path) == described["sha256"]


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# --- converting ---------------------------------------------------------------------------------------------


def convert(converted: ConvertedModel) -> None:
    """Make `converted` from its GGUF file, unless another process has made it meanwhile.

    Raises:
        OSError: the folder of converted models cannot be written, or the file cannot be read.
    """
    from filelock import FileLock

    converted.folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{converted.folder}.lock"):
        if converted.problem() is None:
            return
        log.info("converting %s once, into %s", converted.gguf, converted.folder)
        sweep_leftovers(converted.folder)
        fresh = Path(tempfile.mkdtemp(prefix=f"{converted.folder.name}.tmp-", dir=converted.folder.parent))
        try:
            dequantise(converted.gguf, fresh)
            converted.seal(fresh)
            publish(fresh, converted.folder)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)


def sweep_leftovers(folder: Path) -> None:
    """Remove what killed conversions into `folder` left behind. Call it under the folder's lock."""
    for leftover in folder.parent.iterdir():
        if leftover.name.startswith(f"{folder.name}.tmp-"):
            shutil.rmtree(leftover, ignore_errors=True)


def publish(fresh: Path, folder: Path) -> None:
    """Put `fresh` in the place of `folder`. A process that has the old files open keeps them."""
    aside = Path(tempfile.mkdtemp(prefix=f"{folder.name}.tmp-", dir=folder.parent))
    with contextlib.suppress(FileNotFoundError):
        folder.rename(aside / "old")
    fresh.rename(folder)
    sweep_leftovers(folder)


def dequantise(gguf: Path, folder: Path) -> None:
    """Write the model and tokenizer of a GGUF file into `folder` as safetensors.

    transformers marks a model it read from GGUF as quantised and refuses to save it, so the weights move into
    an unmarked model of the same config. It is built on the meta device, where tensors take no memory:
    `assign` then puts the real ones in their places, and tying shares the embedding with the head again.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _silence_progress()
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    marked = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    dtype = torch.float32 if marked.num_parameters() <= EXACT_UP_TO_PARAMETERS else torch.float16
    config = copy.deepcopy(marked.config)
    del config.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    weights = {name: weight.to(dtype) for name, weight in marked.state_dict().items()}
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    set_compute_dtype(folder / "config.json", GGUF_COMPUTE_DTYPE)


def _silence_progress() -> None:
    """Silence the one progress bar of transformers that heeds no switch, unless debug logging is on. Here, as importing
    its module takes a quarter of a second, which nobody has to wait for who reads no GGUF file."""
    from transformers import modeling_gguf_pytorch_utils

    if not logging.getLogger().isEnabledFor(logging.DEBUG) and hasattr(modeling_gguf_pytorch_utils, "tqdm"):
        modeling_gguf_pytorch_utils.tqdm = lambda items, **_: items


def set_compute_dtype(config_file: Path, dtype_name: str) -> None:
    """Name the dtype to compute in, which need not be the one the weights are stored in."""
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config_file.write_text(json.dumps({**config, "dtype": dtype_name}, indent=2) + "\n", encoding="utf-8")
