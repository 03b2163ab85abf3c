"""Where the jobs of a sweep are done: the contract, and the launcher that does them in this process.

A launcher turns jobs into outcomes and knows nothing of plans, files or comparisons; a sweep knows those and nothing of
processes or machines. The contract, which one set of tests holds every launcher to:

* each job is given back exactly once, with its outcome, in any order;
* a job that fails, or whose process dies, is given back as a failure's row, and the others go on;
* what a job logs arrives in this process's log;
* after `close`, nothing that was started is left.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from jobs import Job, Watcher, Worker
from registry import LAUNCHERS


class Launcher(Protocol):
    """Has jobs done.

    Attributes:
        by_model: whether it is to be given the jobs of one model at a time, so that those share a loaded model; else it
            gets all that can be done at once.
        name: which launcher it was, for the results.
    """

    by_model: bool
    name: str

    def perform(self, jobs: Sequence[Job], watcher: Watcher) -> Iterator[tuple[Job, Any]]:
        """Do the jobs and give each back with its outcome as soon as that is there."""

    def close(self) -> None:
        """Stop what is running, and free what is held."""


class LocalLauncher:
    """In this process, one after another; a model stays loaded for all its runs and is freed before the next."""

    by_model = True
    name = "local"

    def __init__(self) -> None:
        self._worker = Worker()

    def perform(self, jobs: Sequence[Job], watcher: Watcher) -> Iterator[tuple[Job, Any]]:
        for job in jobs:
            yield job, self._worker.do(job, watcher)

    def close(self) -> None:
        self._worker.close()


def make_launcher(name: str, address: str | None = None, cpus: int | None = None) -> Launcher:
    """The launcher of a name; `address` and `cpus` (of each run) are for Ray.

    Raises:
        ValueError: there is none of that name, an option that it has no use for, or no cluster at the address.
        ImportError: it needs a package that is not installed.
    """
    options = {key: value for key, value in (("address", address), ("cpus", cpus)) if value is not None}
    if options and name != "ray":
        raise ValueError(f"--ray-address and --ray-cpus are for --launcher ray, and the launcher is {name!r}")
    return LAUNCHERS.load(name)(**options)
