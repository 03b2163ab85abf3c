"""Two results folders side by side: which runs belong together, what else differs, and what became better or worse.

The one idea: runs are matched by **what was asked for**, so that all else, the machine, the versions, the link, the
commit and the settings, may be what one wants to know the effect of. First runs with the very same spec are matched; of
the rest those that are the same entry of a list: mode, name, model, batch, generation settings, context and repetition,
of the same seed before those of another. So a list run on two machines, at two commits, or with another budget under
the same name, compares; what differs is listed (`differences`), and a run without a partner, or with several that it
cannot choose between, is listed too.

Each pair gives a ratio B / A for every metric; a cell (a strategy at a context) has the median, all contexts together
have the geometric mean, with intervals as in `run_statistics.py`. An interval covers what differs from repetition to
repetition. The two runs of such a pair were not made side by side, so a machine that was slower on one of the days
is in every pair and in no interval. `speedup` is what such a machine does not touch: it sets each run against the
baseline that was made beside it, in its own folder.

Metrics that are the same in every repetition (`once`) need no interval: one pair decides.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comparison import own_speedups
from registry import MODES
from result_frame import WORKLOAD_FIELDS, Result, context_tokens, count_at, describe_link, dig, load_results, to_frame
from run_statistics import NO_DIFFERENCE, Ratio, log_ratio, paired_ratio

if TYPE_CHECKING:
    import pandas as pd

BETTER, WORSE, TOO_FEW, MISSING = "better", "worse", "too few runs", "missing in"
NO_SUCH_RUN = "no such run"
SAME_ONCE = 1e-3
"""Figures measured once that differ by a smaller share differ by rounding."""

# Where a run took place, rather than what was asked for.
_PLACE_FIELDS = ("dtype", "device", "device_map")
# What says in a result where it took place and with what. `argv` names the output folder, so it always differs.
_MODEL_PLACE = ("source", "dtype", "device", "device_map", "attention", "random_weights")


@dataclasses.dataclass(frozen=True)
class Metric:
    """A column of the frame that two folders are compared in.

    Attributes:
        scale: from the frame's unit to the one shown.
        negligible: two values that are both no larger count as equal; in the frame's unit.
        once: whether every repetition gives the same, so that one pair decides.
    """

    name: str
    title: str
    unit: str
    lower_is_better: bool
    scale: float = 1.0
    negligible: float = 0.0
    once: bool = False


METRICS = {
    metric.name: metric
    for metric in (
        Metric("tpot_ms", "decode latency per token", "ms", True),
        Metric("speedup", "baseline latency / latency in the same folder", "x", False),
        Metric("itl_p99_ms", "slow tokens in decode, 99th percentile", "ms", True),
        Metric("ttft_ms", "time to the first token, prefill", "ms", True),
        Metric("tokens_per_second", "tokens per second, prefill included", "tok/s", False),
        Metric("stall_percent", "stall, of decode time", "%", True, negligible=0.1),
        Metric("hit_rate", "hit rate of pages in decode", "%", False, scale=100.0),
        Metric("accuracy", "prefetched pages that were used", "%", False, scale=100.0),
        Metric("device_kv_mb", "KV cache on the device", "MiB", True, once=True),
        Metric("host_kv_mb", "KV cache in host memory", "MiB", True, once=True),
        Metric("gpu_peak_mb", "peak GPU memory", "MiB", True),
        Metric("energy_j", "energy of the GPU", "J", True),
        Metric("kl_mean", "KL divergence from the baseline", "nats", True, negligible=1e-5, once=True),
        Metric("top1_agreement", "same likeliest token as the baseline", "%", False, scale=100.0, once=True),
    )
}


@dataclasses.dataclass(frozen=True)
class Folder:
    """The results of one folder; `problems` has a line for each file that could not be read."""

    path: Path
    results: list[dict[str, Any]]
    problems: list[str]

    @classmethod
    def read(cls, path: Path) -> Folder:
        """
        Raises:
            ValueError: no such folder, or no result in it that can be read.
        """
        if not path.is_dir():
            raise ValueError(
                f"--compare {path}: {'this is a file; name a folder' if path.exists() else 'no such folder'}"
            )
        results, problems = load_results(path)
        if not results:
            patterns = ", ".join(f"{mode}_*.json" for mode in MODES)
            unread = "".join(f"\n  {problem}" for problem in problems)
            raise ValueError(
                f"--compare {path}: no result ({patterns}) that can be read{':' if unread else ''}{unread}"
            )
        return cls(path, results, problems)

    @cached_property
    def frame(self) -> pd.DataFrame:
        """Row i is of `results[i]`, which are in the frame's order already."""
        return to_frame(self.results)

    def strategy(self, run: int) -> str:
        return self.frame["strategy"].iloc[run]

    @cached_property
    def _measured(self) -> dict[str, tuple[float | None, ...]]:
        return {}

    def measured(self, column: str) -> tuple[float | None, ...]:
        """A column by run, or the speed-up over the baseline in its own folder; None also of runs that failed."""
        if column not in self._measured:  # every cell asks for it
            self._measured[column] = tuple(self._read(column))
        return self._measured[column]

    def _read(self, column: str) -> list[float | None]:
        if column == "speedup":
            return own_speedups(self.frame)
        figures = self.frame[column].where(self.frame["status"].eq("ok").fillna(False))
        return [None if missing else float(value) for value, missing in zip(figures, figures.isna(), strict=True)]


@dataclasses.dataclass(frozen=True)
class Unmatched:
    """Runs of one strategy at one context that have no partner; `side` is A or B."""

    side: str
    strategy: str
    context_tokens: int | None
    repetitions: tuple[int, ...]
    why: str

    @property
    def reason(self) -> str:
        return f"{self.why} in {'B' if self.side == 'A' else 'A'}" if self.why == NO_SUCH_RUN else self.why


@dataclasses.dataclass(frozen=True)
class MetricComparison:
    """One metric of one strategy at one context, or over all of them (None).

    Attributes:
        a, b: medians over runs in the frame's unit; None where there is none, and over all contexts.
        ratio: B / A over pairs of runs.
        n_a, n_b: of how many of the matched runs; None over all contexts.
    """

    metric: Metric
    strategy: str
    context_tokens: int | None
    a: float | None
    b: float | None
    ratio: Ratio
    verdict: str
    n_a: int | None = None
    n_b: int | None = None

    @property
    def place(self) -> str:
        return f"{self.strategy} {'over all contexts' if self.context_tokens is None else f'at {self.context_tokens}'}"


@dataclasses.dataclass(frozen=True)
class FolderComparison:
    a: Folder
    b: Folder
    pairs: list[tuple[int, int]]
    unmatched: list[Unmatched]

    @cached_property
    def figures(self) -> list[MetricComparison]:
        """By metric, context and strategy; left out is what neither side has."""
        cells: dict[tuple[int | None, str], list[tuple[int, int]]] = {}
        for pair in self.pairs:
            context = context_tokens(self.a.results[pair[0]])
            cells.setdefault((context, self.a.strategy(pair[0])), []).append(pair)
        ordered = sorted(cells, key=lambda cell: cell[0] or 0)  # stable: strategies stay in the order of the modes
        found = []
        for metric in METRICS.values():
            by_strategy: dict[str, list[MetricComparison]] = {}
            logs: dict[str, list[list[float]]] = {}
            for context, strategy in ordered:
                compared = self._cell(
                    metric, strategy, context, cells[context, strategy], logs.setdefault(strategy, [])
                )
                if compared is not None:
                    by_strategy.setdefault(strategy, []).append(compared)
                    found.append(compared)
            for strategy, contexts in by_strategy.items():
                if len(contexts) > 1:
                    overall = _decided(metric, paired_ratio(logs[strategy]))
                    verdict = _verdict(metric, overall)
                    found.append(MetricComparison(metric, strategy, None, None, None, overall, verdict))
        return found

    def _cell(
        self,
        metric: Metric,
        strategy: str,
        context: int | None,
        pairs: Sequence[tuple[int, int]],
        logs: list[list[float]],
    ) -> MetricComparison | None:
        """One cell's comparison, None where neither side has the metric; adds the logs of its ratios to `logs`."""
        measured_a, measured_b = (folder.measured(metric.name) for folder in (self.a, self.b))
        values = [(measured_a[a], measured_b[b]) for a, b in pairs]
        of_a, of_b = ([value for value in side if value is not None] for side in zip(*values, strict=True))
        if not of_a and not of_b:
            return None
        logs.append([log for log in (_log_ratio(metric, a, b) for a, b in values) if log is not None])
        ratio = _decided(metric, paired_ratio([logs[-1]]))
        verdict = _verdict(metric, ratio) if of_a and of_b else f"{MISSING} {'B' if of_a else 'A'}"
        medians = (statistics.median(side) if side else None for side in (of_a, of_b))
        return MetricComparison(metric, strategy, context, *medians, ratio, verdict, len(of_a), len(of_b))

    @cached_property
    def same_tokens(self) -> tuple[int, int]:
        """Of how many pairs the generated tokens are the same, and of how many they are known."""
        hashes = [tuple(dig(side, "tokens.sha256") for side in self._results(pair)) for pair in self.pairs]
        known = [(a, b) for a, b in hashes if a is not None and b is not None]
        return sum(a == b for a, b in known), len(known)

    def _results(self, pair: tuple[int, int]) -> tuple[Result, Result]:
        return self.a.results[pair[0]], self.b.results[pair[1]]

    def differences(self) -> list[tuple[str, str, str]]:
        """What, in A, in B: of machine, versions, model, links and settings, where the matched runs differ."""
        runs = zip(*self.pairs, strict=True)
        sides = [_places(folder, own) for folder, own in zip((self.a, self.b), runs, strict=True)]
        found = []
        for what in dict.fromkeys([*sides[0], *sides[1]]):
            texts = ["; ".join(sorted(side.get(what, ["not recorded"]))) for side in sides]
            if texts[0] != texts[1]:
                found.append((what, *texts))
        settings: dict[tuple[str, str, str], list[str]] = {}
        for pair in self.pairs:
            before, after = (dict(_flat(result["spec"])) for result in self._results(pair))
            for key in dict.fromkeys([*before, *after]):
                if before.get(key) != after.get(key):
                    change = (key, _text(before.get(key)), _text(after.get(key)))
                    settings.setdefault(change, []).append(self.a.strategy(pair[0]))
        for (key, one, other), strategies in settings.items():
            found.append((f"{key} of {', '.join(dict.fromkeys(strategies))}", one, other))
        return found


def compare_folders(a: Path, b: Path) -> FolderComparison:
    """Read two folders and match their runs.

    Raises:
        ValueError: a folder is not there or has no results, or no run of one has a partner in the other.
    """
    return match(Folder.read(a), Folder.read(b))


def match(a: Folder, b: Folder) -> FolderComparison:
    """Match the runs of two folders that have been read.

    Raises:
        ValueError: no run of one has a partner in the other.
    """
    folders = a, b
    pairs = []
    rest = [list(range(len(folder.results))) for folder in folders]
    for key in (_spec, _seeded_entry, _entry):
        one, other = (_by_key(folder, runs, key) for folder, runs in zip(folders, rest, strict=True))
        pairs += [(one[k][0], other[k][0]) for k in one if len(one[k]) == 1 and len(other.get(k, [])) == 1]
        taken = [{pair[side] for pair in pairs} for side in (0, 1)]
        rest = [[run for run in runs if run not in taken[side]] for side, runs in enumerate(rest)]
    if not pairs:
        held = "; ".join(f"{folder.path} has {_contents(folder)}" for folder in folders)
        raise ValueError(
            "--compare: no run of one folder has a partner in the other, of the same mode, name, model, batch,"
            f" generation settings, context and repetition: {held}"
        )
    unmatched = [
        entry
        for side, folder, other, runs, others in (("A", *folders, *rest), ("B", *folders[::-1], *rest[::-1]))
        for entry in _unmatched(side, folder, other, runs, others)
    ]
    return FolderComparison(*folders, sorted(pairs), unmatched)


def _by_key(folder: Folder, runs: Sequence[int], key: Callable[[Result], Hashable]) -> dict[Hashable, list[int]]:
    groups: dict[Hashable, list[int]] = {}
    for run in runs:
        groups.setdefault(key(folder.results[run]), []).append(run)
    return groups


def _spec(result: Result) -> str:
    return json.dumps(result["spec"], sort_keys=True)


def _entry(result: Result) -> str:
    """The entry of a list that a run belongs to, its context and its repetition."""
    spec = result["spec"]
    fields = [field for field in ("mode", "name", "repetition", *WORKLOAD_FIELDS) if field not in _PLACE_FIELDS]
    return json.dumps([context_tokens(result), *(spec.get(field) for field in fields)])


def _seeded_entry(result: Result) -> str:
    return json.dumps([_entry(result), result["spec"].get("seed")])


def _unmatched(
    side: str, folder: Folder, other: Folder, runs: Sequence[int], others: Sequence[int]
) -> Iterator[Unmatched]:
    """The runs of a folder that are left over, where `others` are those of the other folder."""
    ambiguous = {_entry(other.results[run]) for run in others}
    cells: dict[tuple[str, int | None, str], list[int]] = {}
    for run in runs:
        result = folder.results[run]
        why = "several runs of this name: which is meant?" if _entry(result) in ambiguous else NO_SUCH_RUN
        cells.setdefault((folder.strategy(run), context_tokens(result), why), []).append(run)
    for (strategy, context, why), own in sorted(cells.items(), key=lambda cell: cell[0][1] or 0):
        repetitions = sorted(count_at(folder.results[run], "spec.repetition") or 0 for run in own)
        yield Unmatched(side, strategy, context, tuple(repetitions), why)


def _contents(folder: Folder) -> str:
    return ", ".join(
        dict.fromkeys(
            f"{folder.strategy(run)} at {context_tokens(result)}" for run, result in enumerate(folder.results)
        )
    )


def _log_ratio(metric: Metric, a: float | None, b: float | None) -> float | None:
    if a is not None and b is not None and 0 <= a <= metric.negligible and 0 <= b <= metric.negligible:
        return 0.0
    return log_ratio(b, a)


def _decided(metric: Metric, ratio: Ratio) -> Ratio:
    """A metric that is the same in every repetition has no spread between them: its ratio is its interval."""
    if not metric.once or ratio.ratio is None:
        return ratio
    near = ratio.ratio > 0 and abs(math.log(ratio.ratio)) < SAME_ONCE if math.isfinite(ratio.ratio) else False
    limit = 1.0 if near else ratio.ratio
    return dataclasses.replace(ratio, low=limit, high=limit)


def _verdict(metric: Metric, ratio: Ratio) -> str:
    if ratio.ratio is None or ratio.differs is None:
        return TOO_FEW
    if not ratio.differs:
        return NO_DIFFERENCE
    return BETTER if (ratio.high < 1.0) == metric.lower_is_better else WORSE


def _places(folder: Folder, runs: Sequence[int]) -> dict[str, set[str]]:
    """What machine, versions, model and links these runs had: what -> all values, as text."""
    places: dict[str, set[str]] = {}
    for run in runs:
        result = folder.results[run]
        environment = dig(result, "environment")
        found = [(key.removeprefix("packages."), value) for key, value in _flat(environment) if key != "argv"]
        found = [(key, str(value)[:12] if key == "git_commit" else value) for key, value in found]
        found += [(f"model {key}", dig(result, f"model.{key}")) for key in _MODEL_PLACE]
        link = describe_link(result)
        found += [(f"link of {folder.strategy(run)}", link)] if link else []
        for what, value in found:
            if value is not None:
                places.setdefault(what.replace("_", " "), set()).add(_text(value))
    return places


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted path and value of everything in nested mappings that is there."""
    for key, inner in value.items() if isinstance(value, Mapping) else ():
        if isinstance(inner, Mapping):
            yield from _flat(inner, f"{path}{key}.")
        elif inner is not None:
            yield f"{path}{key}", inner


def _text(value: Any) -> str:
    return (
        "none"
        if value is None or value == []
        else ", ".join(map(str, value))
        if isinstance(value, list)
        else str(value)
    )
