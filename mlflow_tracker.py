"""Runs in MLflow: params, metrics, tags and the result file, in OUTPUT/mlruns or where MLFLOW_TRACKING_URI says.

A sweep is one MLflow run with the summary and the plots as its artifacts, and each of its runs a nested one:

    params      the spec, flat (`paging.page_size`)
    metrics     `tpot_ms`, `hit_rate` ...; by step `step/itl_ms`, `step/hit_rate` ...; `quality/kl_mean` at the end
    tags        `run_id` (that of the result file), `mode`, `model`
    artifacts   result.json

The local store is a SQLite file, as MLflow has put its plain folders into maintenance: look at it with `mlflow ui
--backend-store-uri sqlite:///OUTPUT/mlruns/mlflow.db` (of the whole `mlflow` package; what writes here is
`mlflow-skinny`, which has no pages to show). MLflow's own telemetry is switched off.
"""

from __future__ import annotations

import datetime
import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trackers import figures_of, missing_extra, quality_of, settings_of, steps_of

if TYPE_CHECKING:
    from metrics import RunResult

FOLDER = "mlruns"
EXPERIMENT = "kv-prefetch"
MOST_AT_ONCE, MOST_PARAMS_AT_ONCE = 1000, 100  # in one call, MLflow's limits
LONGEST_PARAM = 6000


class MLflow:
    """A nested run for each run, under one for the sweep; see the module's docstring."""

    def __init__(self, folder: Path):
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # it is read when MLflow is imported
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        try:
            if not uri:
                import alembic  # noqa: F401  what the SQLite store needs, and mlflow-skinny does not bring
                import sqlalchemy  # noqa: F401
            from mlflow.tracking import MlflowClient
        except ImportError as error:
            raise missing_extra("mlflow", error) from error
        for name in ("mlflow", "alembic"):  # they tell of tables made, in the middle of the progress
            logging.getLogger(name).setLevel(logging.WARNING)
        artifacts = None
        if not uri:
            store = (folder / FOLDER).resolve()
            store.mkdir(parents=True, exist_ok=True)
            uri, artifacts = f"sqlite:///{store / 'mlflow.db'}", (store / "artifacts").as_uri()
        self.client: Any = MlflowClient(tracking_uri=uri, registry_uri=uri if artifacts is None else store.as_uri())
        known = self.client.get_experiment_by_name(EXPERIMENT)
        self.experiment = known.experiment_id if known else self.client.create_experiment(EXPERIMENT, artifacts)
        self.sweep: str | None = None
        self.ids: dict[str, str] = {}

    def run(self, result: RunResult) -> None:
        spec = result.spec
        tags = {"run_id": result.run_id, "mode": spec["mode"], "model": spec["model_name"], "status": result.status}
        if result.error:
            tags["error"] = result.error[:LONGEST_PARAM]
        name = f"{spec['name']}, {spec['context_length']} tokens, run {spec['repetition'] + 1}"
        started_ms = _milliseconds(result.started_at)
        own_id = self._create(name, tags | {"mlflow.parentRunId": self._sweep_id()}, started_ms)
        self.ids[result.run_id] = own_id
        self._log_settings(own_id, settings_of(result))
        if result.ok:
            self._log(own_id, figures_of(result))
            for place, step in enumerate(steps_of(result), 1):
                self._log(own_id, {f"step/{key}": value for key, value in step.items()}, place)
        self.client.log_dict(own_id, result.to_dict(), "result.json")
        took_ms = None if result.duration_seconds is None else round(1000 * result.duration_seconds)
        ended_ms = None if started_ms is None or took_ms is None else started_ms + took_ms
        self.client.set_terminated(own_id, "FINISHED" if result.ok else "FAILED", ended_ms)

    def finish(self, results: Sequence[RunResult], folder: Path) -> None:
        for result in results:
            own_id, figures = self.ids.get(result.run_id), quality_of(result) if result.ok else {}
            if own_id is None or not figures:
                continue
            self._log(own_id, {f"quality/{name}": value for name, value in figures.items()})
            self.client.log_dict(own_id, result.to_dict(), "result.json")
        summary = folder / "experiment_summary.json"
        if summary.exists():
            self.client.log_artifact(self._sweep_id(), str(summary))
        if (folder / "plots").is_dir():
            self.client.log_artifacts(self._sweep_id(), str(folder / "plots"), "plots")
        self.client.set_terminated(self._sweep_id(), "FINISHED")

    def _sweep_id(self) -> str:
        """The MLflow run of the sweep, made with its first run: a sweep that never began leaves none."""
        if self.sweep is None:
            self.sweep = self._create("sweep", {"mode": "sweep"}, None)
        return self.sweep

    def _create(self, name: str, tags: Mapping[str, str], started_ms: int | None) -> str:
        made = self.client.create_run(self.experiment, start_time=started_ms, tags=dict(tags), run_name=name)
        return made.info.run_id

    def _log_settings(self, own_id: str, settings: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        params = [Param(name, str(value)[:LONGEST_PARAM]) for name, value in settings.items()]
        for start in range(0, len(params), MOST_PARAMS_AT_ONCE):
            self.client.log_batch(own_id, params=params[start : start + MOST_PARAMS_AT_ONCE])

    def _log(self, own_id: str, figures: Mapping[str, float], step: int = 0) -> None:
        from mlflow.entities import Metric

        now_ms = round(1000 * time.time())
        metrics = [Metric(name, value, now_ms, step) for name, value in figures.items()]
        for start in range(0, len(metrics), MOST_AT_ONCE):
            self.client.log_batch(own_id, metrics=metrics[start : start + MOST_AT_ONCE])


def _milliseconds(moment: str | None) -> int | None:
    """Of an ISO time since 1970."""
    return None if moment is None else round(1000 * datetime.datetime.fromisoformat(moment).timestamp())
