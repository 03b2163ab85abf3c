"""Each job as a Ray task, on as many machines as a cluster has: `pip install -e ".[cluster]"`.

A task has a worker process of its own, so a crash ends that task only. What it takes of the cluster is what keeps timed
runs out of each other's way: on machines with GPUs one GPU and its share of the machine's cores, elsewhere all cores of
the smallest machine. `cpus` asks for another number of cores, and so for more runs at a time on one machine; they share
no core then either, but the memory bus, which decides how long a decode step takes.

A cluster loses workers: a machine is taken away, the system kills the largest process. A job whose worker died is done
again, `RETRIES` times, and its result records why in `environment.retries`. A job that dies each time is a row.

Without an address a cluster of this machine alone is started, which listens on the loopback interface only. On other
machines the program has to be installed, with the same versions; results come back through Ray, so no folder is shared.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from jobs import Failure, Job, Watcher, do_alone
from metrics import RunResult
from progress import Silent
from run_specs import RunSpec

log = logging.getLogger(__name__)

RETRIES = 2
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # what later versions do, and this one would warn of
}
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # Ray's own way, on any system, to keep to 127.0.0.1


class RayLauncher:
    """Jobs in parallel on a Ray cluster.

    Args:
        address: of a running cluster, as `ray.init` takes it; None for RAY_ADDRESS where that is set, else a cluster
            of this machine.
        cpus: cores that each job takes; None for a share that lets no two timed runs be on one machine, or one GPU.

    Raises:
        ImportError: Ray is not installed.
        ValueError: no cluster answers at the address, or none of its machines has so many cores.
    """

    by_model = False
    name = "ray"

    def __init__(self, address: str | None = None, cpus: int | None = None):
        here_only = address is None and "RAY_ADDRESS" not in os.environ
        for name, value in (QUIET | LOOPBACK if here_only else QUIET).items():
            os.environ.setdefault(name, value)
        try:
            import ray
        except ImportError as error:
            raise ImportError("--launcher ray needs Ray, which is an extra: pip install -e '.[cluster]'") from error
        if cpus is not None and cpus < 1:
            raise ValueError(f"--ray-cpus {cpus}: a run takes at least 1 core")
        self.ray, self.cpus = ray, cpus
        # "local": given None, Ray would try a cluster that was left behind on this machine, and for long if it is gone.
        options = {"address": "local", "include_dashboard": False} if here_only else {"address": address}
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR, ignore_reinit_error=True, **options)
        except (ConnectionError, ValueError) as error:
            raise ValueError(f"--ray-address {address}: no Ray cluster answers there: {error}") from error
        most = int(max((machine["CPU"] for machine in self._machines()), default=0))
        if cpus is not None and cpus > most:  # Ray would wait for ever for a machine that has them
            self.close()
            raise ValueError(f"--ray-cpus {cpus}: the largest machine of the cluster has {most} cores; ask for no more")
        # One task for each worker: the next would find the memory, and the warmth, that this one left.
        self._task = ray.remote(max_calls=1, max_retries=0)(_in_a_worker)

    def perform(self, jobs: Sequence[Job], watcher: Watcher) -> Iterator[tuple[Job, Any]]:
        pending = {self._submit(job): job for job in jobs}
        lost: dict[Job, list[str]] = {}
        try:
            while pending:
                (done,), _ = self.ray.wait(list(pending), num_returns=1)
                job = pending.pop(done)
                retries = lost.setdefault(job, [])
                outcome, died = self._outcome(done, job)
                if died is not None:
                    retries.append(died)
                    if len(retries) <= RETRIES:
                        log.warning("%s: %s; done again", job, died)
                        pending[self._submit(job)] = job
                        continue
                    outcome = job.failed(Failure("crashed", f"{len(retries)} workers died of it: {died}"))
                    log.error("%s: given up after %d workers died of it", job, len(retries))
                if retries and isinstance(outcome, RunResult):
                    outcome.environment = {**outcome.environment, "retries": retries}
                yield job, outcome
        finally:
            for task in pending:
                self.ray.cancel(task, force=True)

    def _submit(self, job: Job) -> Any:
        return self._task.options(name=str(job), **self._share(job.spec)).remote(job, sys.argv, sys.path)

    def _outcome(self, task: Any, job: Job) -> tuple[Any, str | None]:
        """The outcome of a task that has ended, or how its worker was lost."""
        errors = self.ray.exceptions
        try:
            outcome, records = self.ray.get(task)
        except errors.OutOfMemoryError as error:
            return job.failed(Failure("out_of_memory", _lines_of(error)[0])), None
        except (errors.WorkerCrashedError, errors.NodeDiedError, errors.ObjectLostError) as error:
            return None, f"{type(error).__name__}: {_lines_of(error)[0]}"
        except Exception as error:  # of Ray, or of a worker in which this program could not even be imported
            log.exception("%s failed", job)
            return job.failed(Failure("error", _lines_of(error)[-1])), None
        for record in records:
            logging.getLogger(record.name).handle(record)
        return outcome, None

    def _machines(self) -> list[dict[str, float]]:
        """What each machine of the cluster has that takes tasks."""
        return [node["Resources"] for node in self.ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]

    def _share(self, spec: RunSpec) -> dict[str, float]:
        """What of a machine a job takes: `num_gpus` and `num_cpus`."""
        machines = self._machines()
        with_gpu = [machine for machine in machines if machine.get("GPU")]
        if with_gpu and spec.device != "cpu":
            n_gpus = min(machine["GPU"] for machine in with_gpu) if spec.device_map else 1
            n_cpus = min(machine["CPU"] * n_gpus // machine["GPU"] for machine in with_gpu)
        else:
            n_gpus, n_cpus = 0, min((machine["CPU"] for machine in machines), default=1)
        return {"num_gpus": n_gpus, "num_cpus": self.cpus or max(1, int(n_cpus))}

    def close(self) -> None:
        """End a cluster that was started here, or leave one that was not; either ends the tasks."""
        self.ray.shutdown()


def _in_a_worker(job: Job, argv: list[str], search_path: list[str]) -> tuple[Any, list[logging.LogRecord]]:
    """One task: the job's outcome and what it logged."""
    sys.argv = argv  # which a result records as the command behind it
    sys.path += [folder for folder in search_path if folder not in sys.path]
    records: list[logging.LogRecord] = []
    return do_alone(job, Silent(), records.append), records


def _lines_of(error: Exception) -> list[str]:
    """The lines of an error's message, at least one: of an empty message the kind of the error."""
    return str(error).strip().splitlines() or [type(error).__name__]
