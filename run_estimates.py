"""How long a list of runs will take, by what the same runs took before on this machine.

The one idea: nothing is known of a run's time that was not measured. An earlier result counts for a planned run if its
spec is the same but for the name, seed, repetition and context, and its machine is this one. The estimate is the median
of those at the same context. A context that was not measured is put on the straight line between the two measured ones
around it; beyond them it takes what the line through the nearest two gives, or a time in proportion to the context if
that is longer, so that the estimate errs on the long side. A run without any such result has no estimate.

The first repetition of an experiment holds its warm-up, so first ones are estimated from first ones where there are
any. `duration_seconds` is that of the run alone: loading the model and measuring quality come on top of it.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from planning import PlannedRun
from registry import MODES
from result_frame import is_finite, read_result
from utils import environment

MAX_BYTES_READ = 64 * 2**20  # of results, the newest first: half a second, and far more than a list leaves behind
# What two runs may differ in and still take the same time, or, of the contexts, a time that can be scaled.
_NOT_COMPARED = ("name", "repetition", "seed", "context_length", "requested_context_length", "quality")


@dataclass
class Timed:
    """Durations in seconds of the earlier runs of one setting, by context: of first repetitions, and of others."""

    first: dict[int, list[float]] = field(default_factory=dict)
    later: dict[int, list[float]] = field(default_factory=dict)

    def seconds(self, context: int, is_first: bool) -> tuple[float, bool]:
        """The estimate for a context, and whether it is scaled from other contexts."""
        preferred, others = (self.first, self.later) if is_first else (self.later, self.first)
        durations = next((by[context] for by in (preferred, others) if context in by), None)
        if durations is not None:
            return statistics.median(durations), False
        by_context = preferred or others
        return scaled(context, {known: statistics.median(times) for known, times in by_context.items()}), True

    def n_runs(self) -> int:
        return sum(len(times) for by in (self.first, self.later) for times in by.values())


@dataclass(frozen=True)
class Estimate:
    """What is known of a plan's time.

    Attributes:
        seconds: of the runs that have an estimate, together; None if none has.
        n_known: how many runs that is.
        n_scaled: of these, runs at a context that was not measured.
        n_earlier: how many earlier runs it rests on.
        unknown: strategy -> its runs without an estimate.
        folder: where the earlier results lie.
    """

    seconds: float | None
    n_known: int
    n_scaled: int
    n_earlier: int
    unknown: dict[str, int]
    folder: Path


def estimate(planned: Sequence[PlannedRun], folder: str | Path) -> Estimate:
    """The time of a plan, from the results that `folder` holds."""
    keys = [_setting(run.spec.to_dict()) for run in planned]
    timed = _earlier(Path(folder), set(keys))
    known = [
        timed[key].seconds(run.spec.context_length, run.spec.repetition == 0)
        for run, key in zip(planned, keys, strict=True)
        if key in timed
    ]
    return Estimate(
        seconds=sum(seconds for seconds, _ in known) if known else None,
        n_known=len(known),
        n_scaled=sum(is_scaled for _, is_scaled in known),
        n_earlier=sum(one.n_runs() for one in timed.values()),
        unknown=dict(Counter(run.spec.label for run, key in zip(planned, keys, strict=True) if key not in timed)),
        folder=Path(folder),
    )


def scaled(context: int, measured: Mapping[int, float]) -> float:
    """The seconds of a context that was not measured, from those that were, as the module's docstring says."""
    contexts = sorted(measured)
    shorter, longer = [c for c in contexts if c < context], [c for c in contexts if c > context]
    near = [shorter[-1], longer[0]] if shorter and longer else (shorter[-2:] or longer[:2])
    nearest = min(near, key=lambda c: abs(c - context))
    in_proportion = measured[nearest] * context / nearest
    if len(near) == 1:
        return in_proportion
    low, high = near
    on_line = measured[low] + (measured[high] - measured[low]) * (context - low) / (high - low)
    return on_line if shorter and longer else max(on_line, in_proportion)


def describe_estimate(known: Estimate) -> str:
    """The estimate in words, with what it rests on, what it leaves out, and how to get one."""
    how = f"run the list once with 'num_runs: 1' and --output {known.folder}, and --plan can tell"
    if known.seconds is None:
        return f"Time: unknown, as {known.folder} holds no earlier run of these settings from this machine; {how}."
    n_all = known.n_known + sum(known.unknown.values())
    runs = f"all {n_all} runs" if not known.unknown else f"{known.n_known} of {n_all} runs"
    words = [
        f"Time: about {duration_text(known.seconds)} for {runs}, from {known.n_earlier} earlier runs in {known.folder}"
        " on this machine."
    ]
    if known.n_scaled:
        words.append(f"{known.n_scaled} of them are at contexts not measured there, and scaled.")
    if known.unknown:
        names = [f"{name} ({count})" for name, count in list(known.unknown.items())[:3]]
        more = f" and {len(known.unknown) - 3} more" if len(known.unknown) > 3 else ""
        words.append(f"No estimate for {sum(known.unknown.values())}: {', '.join(names)}{more}; {how}.")
    words.append("Loading models and measuring quality come on top.")
    return " ".join(words)


def duration_text(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 20 min`: no finer than such an estimate is."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60:,} h {minutes % 60} min"


# ----------------------------------------------------------------------------------------------------------------------
# Earlier results
# ----------------------------------------------------------------------------------------------------------------------


def _setting(spec: Mapping[str, Any]) -> str:
    """What decides a run's time, but for its context, as one comparable text."""
    return json.dumps({key: value for key, value in spec.items() if key not in _NOT_COMPARED}, sort_keys=True)


def _earlier(folder: Path, wanted: set[str]) -> dict[str, Timed]:
    """Of each wanted setting the successful runs of this machine."""
    timed: dict[str, Timed] = {}
    machine = environment() if folder.is_dir() else {}
    for result in _results(folder):
        try:
            spec, key = result["spec"], _setting(result["spec"])
            seconds, context, is_first = result["duration_seconds"], spec["context_length"], spec["repetition"] == 0
            is_timed = result["status"] == "ok" and _is_positive(seconds) and _is_positive(context)
            usable = is_timed and key in wanted and _is_from(result, machine)
        except (KeyError, TypeError, AttributeError):  # no result of this program, or of another version of it
            continue
        if usable:
            one = timed.setdefault(key, Timed())
            (one.first if is_first else one.later).setdefault(context, []).append(seconds)
    return timed


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and value > 0 and is_finite(value)


def _results(folder: Path) -> Iterable[Any]:
    """The files of results in a folder newest first, up to `MAX_BYTES_READ`. What is unreadable tells no time; whoever
    reports on the folder says so."""
    files = [(path.stat(), path) for mode in MODES for path in folder.glob(f"{mode}_*.json") if path.is_file()]
    left = MAX_BYTES_READ
    for status, path in sorted(files, key=lambda one: one[0].st_mtime, reverse=True):
        left -= status.st_size
        if left < 0:
            return
        try:
            yield read_result(path)
        except (OSError, ValueError, RecursionError):
            continue


def _is_from(result: Mapping[str, Any], machine: Mapping[str, Any]) -> bool:
    """Whether a result was made on this machine: the same CPU and, of a run on GPUs, GPUs that are here."""
    there = result.get("environment") or {}
    if there.get("cpu") is None or any(there.get(key) != machine.get(key) for key in ("cpu", "cpu_count")):
        return False
    on_cpu = str((result.get("model") or {}).get("device", "")).startswith("cpu")
    return on_cpu or (bool(there.get("gpus")) and set(there["gpus"]) <= _gpu_names())


@cache
def _gpu_names() -> set[str]:
    """The GPUs that the driver knows, without asking torch; none without a driver."""
    try:
        import pynvml

        pynvml.nvmlInit()
        try:
            handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
            return {str(pynvml.nvmlDeviceGetName(handle)) for handle in handles}
        finally:
            pynvml.nvmlShutdown()
    except Exception:  # no driver, no library: NVML's error classes exist only once it is imported
        return set()
