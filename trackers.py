"""Results handed on to experiment trackers as they arrive: TensorBoard, MLflow, or a class of one's own. Off unless
`--tracker` names one.

A tracker has two verbs:

    run(result)                one run has ended; its quality, if asked for, is measured only later
    finish(results, folder)    the sweep is over: all results, with their quality, and the folder of its summary

and is made with the results folder, `Tracker(folder)`, before anything runs, so that a library that is missing is found
out then. It is called between runs, never within a measured one. Whatever it raises is logged and ends neither the run
nor the sweep: the result files are what counts, and a tracker only shows them elsewhere.

The libraries are optional extras, imported only when asked for. Importing them adds to the process's memory (`rss_mb`,
not `rss_delta_mb`), and to nothing else that is measured. Nothing leaves the machine, unless MLFLOW_TRACKING_URI says
where to.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from quality_frame import FIDELITY
from registry import Registry
from result_frame import to_frame

if TYPE_CHECKING:
    from metrics import RunResult

log = logging.getLogger(__name__)

# What says which run it is, and not how it went.
_IDENTITY = (
    "repetition",
    "seed",
    "batch_size",
    "max_new_tokens",
    "requested_tokens",
    "page_size",
    "max_gpu_pages",
    "prefetch_k",
)

TRACKERS = Registry(
    "tracker",
    {"tensorboard": "tensorboard_tracker:TensorBoard", "mlflow": "mlflow_tracker:MLflow"},
    verbs=("run", "finish"),
)


class Tracker(Protocol):
    """The verbs of a tracker; see the module's docstring."""

    def run(self, result: RunResult) -> None: ...
    def finish(self, results: Sequence[RunResult], folder: Path) -> None: ...


class TrackerUnavailable(ValueError):
    """A tracker that was asked for cannot be used; the message says what is missing and how to get it."""


class Trackers:
    """The trackers of one sweep, each guarded: an error in one is logged, and reaches neither the others nor the runs.

    Args:
        by_name: the trackers, by the name they were asked for.
    """

    def __init__(self, by_name: Mapping[str, Tracker]):
        self.by_name = dict(by_name)

    @classmethod
    def named(cls, names: Sequence[str], folder: Path) -> Trackers:
        """The trackers of these names or import paths, for the results in `folder`.

        Raises:
            UnknownName: there is no such tracker, or it lacks a verb.
            TrackerUnavailable: its library is not installed, or it cannot be opened.
        """
        opened = {}
        for name in dict.fromkeys(names):
            tracker_class = TRACKERS.load(name)
            try:
                opened[name] = tracker_class(folder)
            except TrackerUnavailable:
                raise
            except Exception as error:
                raise TrackerUnavailable(f"--tracker {name} could not be opened: {error}") from error
        return cls(opened)

    def beside(self, watcher: Any) -> Any:
        """A watcher that tells the trackers too."""
        return _Tracked(watcher, self) if self.by_name else watcher

    def run(self, result: RunResult) -> None:
        self._tell(result.run_id, lambda tracker: tracker.run(result))

    def finish(self, results: Sequence[RunResult], folder: Path) -> None:
        self._tell("the end of the sweep", lambda tracker: tracker.finish(results, folder))

    def _tell(self, what: str, tell: Callable[[Tracker], None]) -> None:
        for name, tracker in self.by_name.items():
            try:
                tell(tracker)
            except Exception as error:
                log.warning("tracker %s: %s is not recorded: %s: %s", name, what, type(error).__name__, error)
                log.debug("tracker %s", name, exc_info=True)


class _Tracked:
    """A watcher in front of another: it passes everything on, and finished results to the trackers too."""

    def __init__(self, watcher: Any, trackers: Trackers):
        self._watcher, self._trackers = watcher, trackers

    def __getattr__(self, verb: str) -> Any:
        return getattr(self._watcher, verb)

    def finished(self, result: RunResult) -> None:
        self._watcher.finished(result)
        self._trackers.run(result)


def missing_extra(name: str, error: ImportError) -> TrackerUnavailable:
    """What to say of a tracker whose library cannot be imported."""
    return TrackerUnavailable(
        f'--tracker {name} needs what is not installed ({error}); install it with: pip install -e ".[{name}]"'
    )


# ----------------------------------------------------------------------------------------------------------------------
# A result, as trackers like it: flat
# ----------------------------------------------------------------------------------------------------------------------


def settings_of(result: RunResult) -> dict[str, str | int | float | bool]:
    """The spec, flat: `paging.page_size`; what is None or empty is left out, and lists are text."""
    return {
        name: value if isinstance(value, (bool, int, float, str)) else str(value)
        for name, value in _flat(result.spec)
        if value is not None
    }


def _flat(block: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs = []
    for key, value in block.items():
        if isinstance(value, Mapping):
            pairs += _flat(value, f"{prefix}{key}.")
        else:
            pairs.append((f"{prefix}{key}", value))
    return pairs


def figures_of(result: RunResult) -> dict[str, float]:
    """What was measured of a run, under the name of its column in the frame of runs: `tpot_ms`, `hit_rate`.

    Quality, which is known only once the sweep is over, is not among it, see `quality_of`.
    """
    return {name: value for name, value in _numbers(result).items() if name not in FIDELITY}


def quality_of(result: RunResult) -> dict[str, float]:
    """What was measured of a run's quality: `kl_mean` and so on, and the score of each task as `task/passkey/1000`."""
    figures = {name: value for name, value in _numbers(result).items() if name in FIDELITY}
    for task in (result.quality or {}).get("tasks") or []:
        figures[f"task/{task['task']}/{task['tokens']}"] = float(task["mean"])
    return figures


def _numbers(result: RunResult) -> dict[str, float]:
    row = to_frame([result.to_dict()]).select_dtypes("number").drop(columns=list(_IDENTITY)).iloc[0].dropna()
    return {str(name): float(value) for name, value in row.items()}


def steps_of(result: RunResult) -> list[dict[str, float]]:
    """Figures of each decode step, in order: the time of its token, and where pages are counted, their traffic.

    `itl_ms` stands for each token after the first. A paged run adds `hit_rate`, `hits`, `late`, `misses`, `evictions`,
    `prefetch_issued` and `stall_ms`; a step in which no page was asked for has no hit rate.
    """
    times_ms = (result.timing or {}).get("itl_ms") or []
    steps: list[dict[str, float]] = [{"itl_ms": time_ms} for time_ms in times_ms]
    records = [record for record in result.steps or [] if record["phase"] == "decode"]
    for place, record in enumerate(records):
        if place == len(steps):
            steps.append({})
        names = ("hits", "late", "misses", "evictions", "prefetch_issued", "stall_ms")
        steps[place] |= {name: float(record[name]) for name in names}
        if accesses := record["hits"] + record["late"] + record["misses"]:
            steps[place]["hit_rate"] = record["hits"] / accesses
    return steps
