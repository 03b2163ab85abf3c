"""Results on disk: one file for each run, found again by the run that would make it.

A file is named after its run and ends in the run's id, a hash of all that decides its outcome. So a list whose settings
have changed finds no file of its runs, and never takes an old result for a new one. A file that is there is looked at
before it counts: it has to hold the very spec it is named after, and be a whole result (`result_schema`). One that is
not, because a disk was full, an editor was at it, or another program wrote it, is named as a problem.

Files are written atomically (`utils.write_json`), so a sweep can be killed at any moment: a result is there or not.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metrics import RunResult
from result_frame import Result, read_result
from result_schema import problems_of
from run_specs import RunSpec
from utils import write_json

ANY_RESULT = "*_ctx*_run*_*.json"  # as `RunSpec.slug` names them
# What must be the same for two results to be of one machine and program; keys of `environment`.
SAME_MACHINE = ("cpu", "gpus", "git_commit", "git_dirty", "torch_threads", "packages")
# What must be the same for two results to be of one model, if the same was asked for; keys of `model`. What a folder
# or a file of weights holds is no part of a spec, and so of no run's id.
SAME_MODEL = ("source", "n_parameters", "weight_bytes", "kv_bytes_per_token")
ASKED_FOR = ("model_name", "dtype", "device", "device_map", "quantization")  # of a model; keys of `spec`


@dataclass(frozen=True)
class Found:
    """What a folder holds for a list of runs.

    Attributes:
        results: of those runs that have one, in their order; good ones and failures.
        problems: a line for each file that is named after one of the runs and is no result of it.
        n_others: how many files there are of other runs.
    """

    results: list[tuple[RunSpec, RunResult]]
    problems: list[str]
    n_others: int


class ResultStore:
    """The results folder of a sweep.

    Args:
        folder: made when the first result is written.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, spec: RunSpec) -> Path:
        return self.folder / f"{spec.slug}.json"

    def write(self, spec: RunSpec, result: RunResult) -> None:
        """Write, or replace, the result of a run. Raises OSError, or ValueError where a figure is no number."""
        write_json(self.path(spec), result.to_dict())

    def remove(self, spec: RunSpec) -> None:
        """Remove the result of a run, if there is one. Raises OSError."""
        self.path(spec).unlink(missing_ok=True)

    def find(self, specs: Iterable[RunSpec]) -> Found:
        """Read what is there for these runs."""
        specs, results, problems = list(specs), [], []
        for spec in specs:
            try:
                results.append((spec, self.read(spec)))
            except FileNotFoundError:
                continue
            except (OSError, ValueError, RecursionError) as error:
                problems.append(f"{self.path(spec)}: {error}")
        return Found(results, problems, self.count_others(specs))

    def read(self, spec: RunSpec) -> RunResult:
        """The result of a run, whether good or a failure.

        Raises:
            FileNotFoundError: there is none.
            OSError, ValueError: there is a file, and it is not that; the message says why.
        """
        block = read_result(self.path(spec))
        if block["spec"] != _as_json(spec.to_dict()) or block.get("run_id") != spec.run_id:
            raise ValueError("not the result of the run that the file is named after")
        problems = problems_of(block)
        if problems:
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise ValueError(f"not a whole result: {problems[0]}{more}")
        result = RunResult(**{name: value for name, value in block.items() if name != "schema_version"})
        if result.ok and len(result.tokens["ids"]) != spec.batch_size:
            raise ValueError(f"its tokens are {len(result.tokens['ids'])} rows of ids, not {spec.batch_size}")
        return result

    def count_others(self, specs: Iterable[RunSpec]) -> int:
        """How many results of other runs lie in the folder."""
        own = {self.path(spec).name for spec in specs}
        return sum(path.name not in own for path in self.folder.glob(ANY_RESULT))

    def remove_torn(self, specs: Iterable[RunSpec]) -> None:
        """Remove the temporary files of these runs, which a sweep leaves when it is killed while it writes one."""
        own = {f".{self.path(spec).name}" for spec in specs}
        for path in self.folder.glob(".*.tmp"):
            name, _, _ = path.name.removesuffix(".tmp").rpartition(".")
            if name in own:
                path.unlink(missing_ok=True)


def _as_json(value: Any) -> Any:
    """As it is after it was written and read."""
    return json.loads(json.dumps(value))


def whole(results: Iterable[Result]) -> bool:
    """Whether nothing failed, neither a run nor the measurement of its quality."""
    return all(result.get("status") == "ok" and "error" not in (result.get("quality") or {}) for result in results)


def other_machine(one: RunResult, other: RunResult) -> list[str]:
    """In what two results' machines or programs differ, as `name: one -> other`; empty where nothing is known to."""
    return _differing(one.environment, other.environment, SAME_MACHINE)


def other_model(one: RunResult, other: RunResult) -> list[str]:
    """The same of their models, of results for which the same model was asked (`model_asked_for`)."""
    return _differing(one.model, other.model, SAME_MODEL)


def model_asked_for(result: RunResult) -> tuple:
    """The model of a result by its name and by how it was to be loaded."""
    return tuple(result.spec[name] for name in ASKED_FOR)


def _differing(one: dict[str, Any] | None, other: dict[str, Any] | None, names: Iterable[str]) -> list[str]:
    before, now = one or {}, other or {}
    return [
        f"{name}: {before[name]} -> {now[name]}"
        for name in names
        if before.get(name) is not None and now.get(name) is not None and before[name] != now[name]
    ]
