"""Run a plan: decide what is to be made, have it made, and keep each result as soon as it is there.

A sweep takes from the results folder what a former one has left there (`resume`), gives the rest to a launcher as jobs,
timed runs first and then the quality of those that are to have one, and compares each run's tokens with the
baseline's, whichever of the two comes first. Where and how a job is done is the launcher's affair (launchers.py).

A failure is a row. Whatever happens to a run becomes a result with a status and a reason, is written like any other,
and the sweep goes on; nothing already measured is lost. Ctrl-C ends the sweep and keeps what is finished.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from jobs import Failure, QualityMeasurement, TimedRun, Watcher, moment
from launchers import Launcher
from metrics import RunResult, token_agreement
from planning import PlannedRun
from quality import needs_quality
from result_store import ResultStore, model_asked_for, other_machine, other_model, whole
from run_specs import RunSpec
from utils import environment
from workloads import TokenRows

log = logging.getLogger(__name__)

Kept = tuple[RunSpec, RunResult]  # a run and its result; the spec is the run as it was made, clamped or not


class Sweep:
    """The runs of a plan, and their results so far.

    Args:
        planned: runs, those of one model next to each other.
        store: where results are kept.
        launcher: has the jobs done; closed at the end.
        watcher: told how it goes.

    Attributes:
        interrupted: whether Ctrl-C cut it short.
        n_reused: how many results were there already.
        seconds: wall-clock time of `run`, and of each result that was there already its own `duration_seconds`, which
            leaves out loading its model and measuring its quality.
    """

    def __init__(self, planned: Sequence[PlannedRun], store: ResultStore, launcher: Launcher, watcher: Watcher):
        self.specs = [run.spec for run in planned]
        self.store, self.launcher, self.watcher = store, launcher, watcher
        self.interrupted, self.n_reused, self.seconds = False, 0, 0.0
        self._kept: dict[str, Kept] = {}  # by the run_id of the plan
        self._baselines = BaselineTokens()
        self._retry_failed = False
        self._elsewhere: list[RunResult] = []  # good ones, until their machine has been compared with this one
        self._same_model: list[RunResult] = []  # and until their model has been

    @property
    def results(self) -> list[RunResult]:
        """Those there are, in the order of the plan."""
        return [self._kept[spec.run_id][1] for spec in self.specs if spec.run_id in self._kept]

    # --- what is there already --------------------------------------------------------------------------------------

    def resume(self, retry_failed: bool = False) -> None:
        """Take from the folder the results of this plan's runs, so that they are not made again.

        Args:
            retry_failed: make again what has failed. Otherwise a failure is a result like any other.
        """
        self._retry_failed = retry_failed
        self.store.remove_torn(self.specs)
        found = self.store.find(self.specs)
        for problem in found.problems:
            log.warning("%s; this run is made again", problem)
        taken = [(spec, result) for spec, result in found.results if result.ok or not retry_failed]
        for spec, result in taken:
            self._kept[spec.run_id] = (spec, result)
            self.seconds += result.duration_seconds or 0.0
        for changed in [changed for kept in taken for changed in self._compare(*kept)]:
            self._write(*changed)
        self._elsewhere = self._same_model = [result for _, result in taken if result.ok]
        self.n_reused = len(taken)
        n_failed = sum(not whole([result.to_dict()]) for _, result in found.results)
        note = f"{len(taken)} of {len(self.specs)} runs have a result in {self.store.folder}"
        if n_failed:
            note += f"; {n_failed} failed, and " + (
                "will be made again" if retry_failed else "stay so, as only --retry-failed makes them again"
            )
        log.info("resumed: %s", note)
        self.watcher.resumed([result for _, result in taken], note)

    # --- what is to be made -----------------------------------------------------------------------------------------

    def run(self) -> None:
        """Make every run that has no result; `interrupted` tells whether Ctrl-C cut it short."""
        self._say_what_else_is_there()
        started = time.perf_counter()
        try:
            for specs in self._portions():
                self._make_runs([spec for spec in specs if spec.run_id not in self._kept])
                self._measure_quality([self._kept[spec.run_id] for spec in specs])
        except KeyboardInterrupt:
            self.interrupted = True
            log.warning("interrupted after %d of %d runs", len(self._kept), len(self.specs))
        finally:
            self.launcher.close()
            self.seconds += time.perf_counter() - started

    def _say_what_else_is_there(self) -> None:
        n_others = self.store.count_others(self.specs)
        if n_others:
            log.warning(
                "%s holds %d results of other runs, or of other settings; this summary leaves them out, but what reads"
                " the folder will see them",
                self.store.folder,
                n_others,
            )

    def _portions(self) -> Iterator[Sequence[RunSpec]]:
        """The runs of one model, and of the next; or all at once where no two runs share a loaded model."""
        if not self.launcher.by_model:
            yield self.specs
            return
        for _, of_model in groupby(self.specs, key=lambda spec: spec.model_key):
            yield list(of_model)

    def _make_runs(self, specs: Sequence[RunSpec]) -> None:
        for job, result in self.launcher.perform([TimedRun(spec) for spec in specs], self.watcher):
            made = replace(job.spec, context_length=result.spec["context_length"])  # clamped only when it was loaded
            if result.environment is not None:
                result.environment["launcher"] = self.launcher.name
            self._kept[job.spec.run_id] = (made, result)
            self._compare_and_write((made, result))
            self._say_if_elsewhere(result)
            log.info("%s: %s", made.slug, result.status)
            self.watcher.finished(result)

    def _measure_quality(self, kept: Sequence[Kept]) -> None:
        """Add to the `quality` block what was asked for; after the timed runs, as it would show in memory and heat."""
        jobs = {QualityMeasurement(spec): result for spec, result in kept if self._lacks_quality(spec, result)}
        for job, figures in self.launcher.perform(list(jobs), self.watcher):
            result = jobs[job]
            if (fault := _no_json(figures)) is not None:  # its timed run is whole, and stays
                figures = job.failed(Failure("error", f"measured, but not written: {fault}"))
            result.quality.pop("error", None)
            result.quality |= figures
            self._write(job.spec, result)

    def _lacks_quality(self, spec: RunSpec, result: RunResult) -> bool:
        if not (result.ok and needs_quality(spec)):
            return False
        return "fidelity" not in result.quality or ("error" in result.quality and self._retry_failed)

    # --- what is kept -----------------------------------------------------------------------------------------------

    def _compare_and_write(self, new: Kept) -> None:
        """Compare a new result with its baseline, and with it those that have waited for it; write what has changed."""
        others = [kept for kept in self._compare(*new) if kept[1] is not new[1]]
        self._write(*new, is_new=True)
        for spec, result in others:
            self._write(spec, result)

    def _compare(self, spec: RunSpec, result: RunResult) -> list[Kept]:
        """What changed by the comparison, and say where tokens differ."""
        changed = self._baselines.compare(spec, result)
        for spec, result in changed:
            if result.quality["matches_baseline"] is False:
                log.log(
                    logging.WARNING if spec.exact else logging.INFO,  # of an approximation it was to be expected
                    "%s: tokens differ from the baseline's, first at %s",
                    spec.slug,
                    result.quality["first_divergent_token"],
                )
        return changed

    def _write(self, spec: RunSpec, result: RunResult, is_new: bool = False) -> None:
        """Write a result, or its failure's row, which it then becomes. What is left of a run that was made anew is
        never the file of a former one, which would pass for it."""
        try:
            try:
                self.store.write(spec, result)
            except (TypeError, ValueError) as error:  # a figure that is no number
                log.exception("%s could not be written", spec.slug)
                reason = f"measured, but not written: {error}"
                row = TimedRun(spec).failed(Failure("error", reason, environment(), result.started_at or moment()))
                vars(result).update(vars(row))
                self.store.write(spec, result)
        except (OSError, TypeError, ValueError) as error:  # a full disk
            log.exception("%s could not be written", spec.slug)
            result.status, result.error = "error", f"measured, but not written: {error}"
            if is_new:
                self._remove(spec)

    def _remove(self, spec: RunSpec) -> None:
        try:
            self.store.remove(spec)
        except OSError:
            log.exception("%s: the file of a former run stays", spec.slug)

    def _say_if_elsewhere(self, result: RunResult) -> None:
        """Where old results and new ones are of different machines, versions or models, they do not compare."""
        if not result.ok:
            return
        _warn_of(self._elsewhere, result, other_machine, "machine or version, so times may not compare")
        self._elsewhere = []
        same = [old for old in self._same_model if model_asked_for(old) == model_asked_for(result)]
        _warn_of(same, result, other_model, f"model that was called {result.spec['model_name']}, so nothing compares")
        self._same_model = [old for old in self._same_model if model_asked_for(old) != model_asked_for(result)]


def _warn_of(
    old: Sequence[RunResult], new: RunResult, compare: Callable[[RunResult, RunResult], list[str]], what: str
) -> None:
    differing = [lines for lines in (compare(one, new) for one in old) if lines]
    if differing:
        log.warning("%d of the results found are of another %s: %s", len(differing), what, "; ".join(differing[0]))


def _no_json(figures: Mapping[str, Any]) -> str | None:
    """Why figures cannot be written, or None where they can."""
    try:
        json.dumps(figures, allow_nan=False)
    except (TypeError, ValueError) as error:
        return str(error)
    return None


class BaselineTokens:
    """Compares runs with the tokens of the baseline that has the same `reference_key`, whichever comes first.

    The first baseline of a key that is plain generation (`is_reference`) is what the others are compared with.
    """

    def __init__(self) -> None:
        self._tokens: dict[tuple, TokenRows] = {}
        self._waiting: dict[tuple, list[Kept]] = {}

    def compare(self, spec: RunSpec, result: RunResult) -> list[Kept]:
        """Fill in the first figures of the `quality` block as far as is known by now; those it changed are returned."""
        key = spec.reference_key
        if not result.ok:
            return []
        if key in self._tokens:
            comparable = [(spec, result)]
        elif spec.is_reference:
            self._tokens[key] = result.tokens["ids"]
            comparable = [kept for kept in self._waiting.pop(key, []) if kept[1].ok]  # and was written
        else:
            self._waiting.setdefault(key, []).append((spec, result))
            comparable = []
        return [kept for kept in comparable if self._changes(key, kept[1])]

    def _changes(self, key: tuple, result: RunResult) -> bool:
        before = dict(result.quality)
        result.quality |= token_agreement(result.tokens["ids"], self._tokens[key])
        return result.quality != before
