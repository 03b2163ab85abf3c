"""KV Prefetch: run a list of experiments and compare what keeping, paging and prefetching the KV cache cost.

    python main.py                        run experiment_config.yaml, results in logs/
    python main.py --config F --output D  another list, another folder
    python main.py --plan                 what would run, and the floor of each run; loads nothing
    python main.py --resume               run what has no result yet in the output folder
    python main.py --isolate              each run in a process of its own; --launcher ray: on a cluster
    python main.py --shard 2/3            the second of three parts of the list
    python main.py --summarise DIR        summary, tables and plots of the results in a folder; runs nothing
    python main.py --list                 modes, policies, selectors and predictors with their parameters
    python main.py --compare A B          what differs between two results folders; --fail-if "tpot_ms>5%" for CI
    python main.py --create-config [F]    write a commented experiment list to start from

Exit codes: 0 all runs succeeded, 1 some failed (their rows say why) or a --fail-if holds, 2 the configuration is wrong,
130 interrupted.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from command_line import parse_arguments, plot_formats_of

if TYPE_CHECKING:
    from rich.console import Console

    from planning import PlannedRun

OK, FAILED, WRONG_CONFIG, INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    try:
        return command(parse_arguments(argv))
    except KeyboardInterrupt:  # outside of the sweep, which keeps what is finished: nothing was being measured
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def command(arguments: argparse.Namespace) -> int:
    """Do what the flags say; returns the exit code."""
    if arguments.create_config is not None:
        return create_config(arguments.create_config, arguments.force)
    if arguments.list:
        return list_parts()
    if arguments.compare or arguments.fail_if:
        return compare(arguments.compare, arguments.fail_if)
    if arguments.summarise is not None:
        return report_on(arguments)
    try:
        planned = planned_runs(arguments)
    except (ValueError, ImportError) as error:  # ConfigError is a ValueError with one line for each fault
        print(error, file=sys.stderr)
        return WRONG_CONFIG
    if arguments.plan:
        from plan_table import print_plan
        from run_estimates import estimate

        print_plan(planned, _stdout(), estimate(planned, arguments.output))
        return OK
    if not planned:
        print(f"--shard {arguments.shard}: this part of the list has no runs")
        return OK
    return run(planned, arguments)


def create_config(path: Path, force: bool) -> int:
    """Write the commented default list; an existing file is kept unless forced."""
    from default_config import commented_yaml
    from utils import atomic_write_text

    if path.is_dir():
        print(f"{path} is a folder; name a file", file=sys.stderr)
        return WRONG_CONFIG
    if path.exists() and not force:
        print(f"{path} exists; --force overwrites it, or name another file", file=sys.stderr)
        return WRONG_CONFIG
    try:
        atomic_write_text(path, commented_yaml())
    except OSError as error:
        print(f"cannot write {path}: {error.strerror}", file=sys.stderr)
        return WRONG_CONFIG
    print(f"wrote {path}; try: python main.py --config {path} --plan")
    return OK


def compare(folders: Sequence[Path] | None, conditions: Sequence[str]) -> int:
    """Print how two results folders compare."""
    from folder_tables import print_comparison

    if folders is None:
        print("--fail-if is a condition on two results folders: name them with --compare A B", file=sys.stderr)
        return WRONG_CONFIG
    try:
        return OK if print_comparison(folders, conditions, _stdout()) else FAILED
    except ValueError as error:
        print(error, file=sys.stderr)
        return WRONG_CONFIG


def list_parts() -> int:
    """Print what a config can name."""
    from rich.table import Table

    from registry import MODES, POLICIES, PREDICTORS, SELECTORS, TASKS

    table = Table(title="what a config can name", title_justify="left")
    for column in ("kind", "name", "parameters", "what it is"):
        table.add_column(column)
    for registry in (MODES, POLICIES, SELECTORS, PREDICTORS, TASKS):
        for name, parameters, text in registry.describe():
            settings = ", ".join(f"{key}={value!r}" for key, value in parameters.items())
            table.add_row(registry.kind, name, settings or "—", text)
    _stdout().print(table)
    return OK


def planned_runs(arguments: argparse.Namespace) -> list[PlannedRun]:
    """The runs of the config, sized and clamped. Raises ValueError for whatever a user can mend."""
    from experiments import load_experiments
    from planning import plan
    from run_specs import expand

    planned = plan(expand(load_experiments(arguments.config), seed=arguments.seed))
    if arguments.shard is None:
        return planned
    from shards import shard

    return shard(planned, arguments.shard)


def run(planned: Sequence[PlannedRun], arguments: argparse.Namespace) -> int:
    """Make the runs, then publish whatever there is."""
    from progress import log_to, watch
    from publishing import publish
    from result_store import ResultStore, whole
    from trackers import Trackers

    try:
        trackers = Trackers.named(arguments.tracker, arguments.output)
        log_to(arguments.output, arguments.verbose)
    except ValueError as error:
        print(error, file=sys.stderr)
        return WRONG_CONFIG
    except OSError as error:
        is_file = isinstance(error, FileExistsError | NotADirectoryError)
        reason = "is a file, or lies in one; name a folder" if is_file else error.strerror
        print(f"--output {arguments.output}: {reason}", file=sys.stderr)
        return WRONG_CONFIG
    for note in dict.fromkeys(f"{p.spec.model_name}: {note}" for p in planned for note in p.notes):
        logging.getLogger(__name__).warning(note)
    with watch([run.spec for run in planned], arguments.quiet, arguments.verbose) as watcher:
        from launchers import make_launcher
        from sweep import Sweep

        try:
            launcher = make_launcher(arguments.launcher, arguments.ray_address, arguments.ray_cpus)
        except (ValueError, ImportError) as error:
            print(error, file=sys.stderr)
            return WRONG_CONFIG
        sweep = Sweep(planned, ResultStore(arguments.output), launcher, trackers.beside(watcher))
        if arguments.resume or arguments.retry_failed:
            sweep.resume(arguments.retry_failed)
        sweep.run()
    blocks = [result.to_dict() for result in sweep.results]
    counts = {"planned": len(planned), "interrupted": sweep.interrupted, "reused": sweep.n_reused}
    formats = plot_formats_of(arguments)
    publish(blocks, arguments.output, _stdout(), formats, duration_seconds=sweep.seconds, **counts)
    trackers.finish(sweep.results, arguments.output)
    return INTERRUPTED if sweep.interrupted else OK if whole(blocks) else FAILED


def report_on(arguments: argparse.Namespace) -> int:
    """Publish what a folder holds, of one sweep or put together from several."""
    from publishing import publish_folder

    try:
        is_whole = publish_folder(arguments.summarise, _stdout(), plot_formats_of(arguments))
    except ValueError as error:
        print(f"--summarise {error}", file=sys.stderr)
        return WRONG_CONFIG
    return OK if is_whole else FAILED


def _stdout() -> Console:
    from rich.console import Console

    return Console(highlight=False, markup=False)  # names are the user's; [brackets] in them are no markup


if __name__ == "__main__":
    sys.exit(main())
