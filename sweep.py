"""Run a plan: load each model once, make its runs in order, write each result as it is there.

A failure is a row. Whatever a run raises becomes a result with a status and a reason, is written like any other, and
the sweep goes on; nothing already measured is lost. Ctrl-C ends the sweep and keeps what is finished.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Protocol

import torch

from generation import failed_run
from metrics import RunResult
from models import LoadedModel, load_model
from planning import PlannedRun, fit_positions
from quality import needs_quality, quality_figures
from registry import MODES
from run_specs import RunSpec
from utils import write_json
from workloads import TokenRows

log = logging.getLogger(__name__)


class Watcher(Protocol):
    """Told how a sweep goes on."""

    def loading(self, model_name: str) -> None: ...
    def started(self, spec: RunSpec) -> None: ...
    def token(self, n_tokens: int) -> None: ...
    def finished(self, result: RunResult) -> None: ...


class Sweep:
    """The runs of a plan, and their results so far.

    Args:
        planned: runs, those of one model next to each other.
        output: folder for the results; made if missing.
        watcher: told how it goes.
    """

    def __init__(self, planned: Sequence[PlannedRun], output: Path, watcher: Watcher):
        self.planned, self.output, self.watcher = planned, output, watcher
        self.results: list[RunResult] = []
        self.interrupted = False
        self._baseline_tokens: dict[tuple, TokenRows] = {}

    def run(self) -> None:
        """Make every run; `interrupted` tells whether Ctrl-C cut it short."""
        self._say_what_else_is_there()
        try:
            for _, group in groupby(self.planned, key=lambda planned: planned.spec.model_key):
                self._run_group([planned.spec for planned in group])
        except KeyboardInterrupt:
            self.interrupted = True
            log.warning("interrupted after %d of %d runs", len(self.results), len(self.planned))

    def _say_what_else_is_there(self) -> None:
        own = {f"{planned.spec.slug}.json" for planned in self.planned}
        others = [path for path in self.output.glob("*_ctx*_run*_*.json") if path.name not in own]
        if others:
            log.warning(
                "%s holds %d results of other runs; this summary leaves them out, but what reads the folder will see"
                " them",
                self.output,
                len(others),
            )

    def _run_group(self, specs: Sequence[RunSpec]) -> None:
        """All runs of one model, which is loaded once and freed after."""
        self.watcher.loading(specs[0].model_name)
        log.info("loading %s for %d runs", specs[0].model_name, len(specs))
        try:
            model = load_model(**specs[0].model_options)
        except Exception as error:
            log.exception("loading %s failed", specs[0].model_name)
            for spec in specs:
                self._keep(spec, failed_run(spec, error))
            return
        finished = [self._run_one(spec, model) for spec in specs]
        for spec, result in finished:  # only now, as it would show in the memory and the heat of what is timed
            if result.ok and needs_quality(spec):
                self._measure_quality(spec, model, result)
        del model
        _give_back_memory()

    def _run_one(self, spec: RunSpec, model: LoadedModel) -> tuple[RunSpec, RunResult]:
        """Make one run and keep its result; with it the spec as it was run, clamped or not."""
        self.watcher.started(spec)
        try:
            spec, notes = fit_positions(spec, model.shape)
            for note in notes:
                log.info("%s: %s", spec.slug, note)
            result = MODES.load(spec.mode)(
                spec, model, reference=self._baseline_tokens.get(spec.reference_key), on_token=self.watcher.token
            )
        except Exception as error:
            log.exception("%s failed", spec.slug)
            result = failed_run(spec, error)
        if not result.ok:  # only here has the error let go of the tensors in its traceback
            _give_back_memory()
        if result.ok and spec.is_reference:
            self._baseline_tokens.setdefault(spec.reference_key, result.tokens["ids"])
        if result.ok and result.quality["matches_baseline"] is False:
            log.log(
                logging.WARNING if spec.exact else logging.INFO,  # of an approximation it was to be expected
                "%s: tokens differ from the baseline's, first at %s",
                spec.slug,
                result.quality["first_divergent_token"],
            )
        self._keep(spec, result)
        return spec, result

    def _measure_quality(self, spec: RunSpec, model: LoadedModel, result: RunResult) -> None:
        """Add to the `quality` block of a result what was asked for, and write it again."""
        log.info("%s: measuring quality", spec.slug)
        result.quality |= quality_figures(spec, model)
        _give_back_memory()
        self._write(spec, result)

    def _keep(self, spec: RunSpec, result: RunResult) -> None:
        self.results.append(result)
        self._write(spec, result)
        log.info("%s: %s", spec.slug, result.status)
        self.watcher.finished(result)

    def _write(self, spec: RunSpec, result: RunResult) -> None:
        try:
            write_json(self.output / f"{spec.slug}.json", result.to_dict())
        except (OSError, ValueError) as error:  # a full disk, or a figure that is no number
            log.exception("%s could not be written", spec.slug)
            result.status, result.error = "error", f"measured, but not written: {error}"


def _give_back_memory() -> None:
    """Free what nothing refers to any more, on the device too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
