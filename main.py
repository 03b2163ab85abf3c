"""KV Prefetch: run a list of experiments and compare what keeping, paging and prefetching the KV cache cost.

    python main.py                        run experiment_config.yaml, results in logs/
    python main.py --config F --output D  another list, another folder
    python main.py --plan                 what would run, and the floor of each run; loads nothing
    python main.py --resume               run what has no result yet in the output folder
    python main.py --isolate              each run in a process of its own; --launcher ray: on a cluster
    python main.py --shard 2/3            the second of three parts of the list
    python main.py --summarise DIR        summary, tables and plots of the results in a folder; runs nothing
    python main.py --list                 modes, policies, selectors and predictors with their parameters
    python main.py --create-config [F]    write a commented experiment list to start from

Exit codes: 0 all runs succeeded, 1 some failed (their rows say why), 2 the configuration is wrong, 130 interrupted.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils import PROJECT_FOLDER

if TYPE_CHECKING:
    from rich.console import Console

    from planning import PlannedRun
    from result_frame import Result

DEFAULT_CONFIG = PROJECT_FOLDER / "experiment_config.yaml"
DEFAULT_OUTPUT = Path("logs")
OK, FAILED, WRONG_CONFIG, INTERRUPTED = 0, 1, 2, 130


def seed(text: str) -> int:
    """A seed as the config takes it."""
    number = int(text)
    if not 0 <= number < 2**32:
        raise argparse.ArgumentTypeError(f"must be between 0 and {2**32 - 1}, found {text}")
    return number


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="main.py", description=__doc__.split("\n")[0])
    parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG, metavar="F", help="experiment list (YAML)")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, metavar="DIR", help="results folder (logs)")
    parser.add_argument("--no-plots", action="store_true", help="write no plots")
    parser.add_argument("--plan", action="store_true", help="print the runs, their sizes and floors; run nothing")
    parser.add_argument("--list", action="store_true", help="print modes, policies, selectors, predictors")
    parser.add_argument("--seed", type=seed, metavar="N", help="replaces the seed of every experiment")
    parser.add_argument(
        "--create-config",
        type=Path,
        nargs="?",
        const=Path("experiment_config.yaml"),
        metavar="F",
        help="write a commented experiment list (to experiment_config.yaml) and stop",
    )
    parser.add_argument("--force", action="store_true", help="let --create-config overwrite a file")
    parser.add_argument("--resume", action="store_true", help="run only what has no result; failures stay as they are")
    parser.add_argument("--retry-failed", action="store_true", help="resume, and run again what has failed")
    parser.add_argument("--launcher", default="local", metavar="L", help="where runs are made: local, process or ray")
    parser.add_argument("--isolate", dest="launcher", action="store_const", const="process", help="--launcher process")
    parser.add_argument("--ray-address", metavar="ADDR", help="of a Ray cluster; without it one of this machine")
    parser.add_argument("--ray-cpus", type=int, metavar="N", help="cores of each run (as many as a machine has)")
    parser.add_argument("--shard", metavar="i/n", help="only the i-th of n parts; runs that compare stay together")
    parser.add_argument("--summarise", type=Path, metavar="DIR", help="report on the results in DIR; run nothing")
    loudness = parser.add_mutually_exclusive_group()
    loudness.add_argument("-q", "--quiet", action="store_true", help="tables only, no progress")
    loudness.add_argument("-v", "--verbose", action="store_true", help="say more on stderr")
    return parser.parse_args(argv)


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
    if arguments.summarise is not None:
        return report_on(arguments)
    try:
        planned = planned_runs(arguments)
    except (ValueError, ImportError) as error:  # ConfigError is a ValueError with one line for each fault
        print(error, file=sys.stderr)
        return WRONG_CONFIG
    if arguments.plan:
        from plan_table import print_plan

        print_plan(planned, _stdout())
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
    """Make the runs, then summarise whatever there is."""
    from progress import log_to, watch
    from result_store import ResultStore, whole

    try:
        log_to(arguments.output, arguments.verbose)
    except OSError as error:
        print(f"--output {arguments.output}: {error.strerror}", file=sys.stderr)
        return WRONG_CONFIG
    for note in dict.fromkeys(f"{p.spec.model_name}: {note}" for p in planned for note in p.notes):
        logging.getLogger(__name__).warning(note)
    with watch(len(planned), arguments.quiet) as watcher:
        from launchers import make_launcher
        from sweep import Sweep

        try:
            launcher = make_launcher(arguments.launcher, arguments.ray_address, arguments.ray_cpus)
        except (ValueError, ImportError) as error:
            print(error, file=sys.stderr)
            return WRONG_CONFIG
        sweep = Sweep(planned, ResultStore(arguments.output), launcher, watcher)
        if arguments.resume or arguments.retry_failed:
            sweep.resume(arguments.retry_failed)
        sweep.run()
    blocks = [result.to_dict() for result in sweep.results]
    counts = {"planned": len(planned), "interrupted": sweep.interrupted, "reused": sweep.n_reused}
    summarise(blocks, sweep.seconds, arguments, **counts)
    return INTERRUPTED if sweep.interrupted else OK if whole(blocks) else FAILED


def report_on(arguments: argparse.Namespace) -> int:
    """Summarise what a folder holds, of one sweep or put together from several."""
    from reporting import load_results
    from result_frame import number_at
    from result_store import whole

    folder = arguments.output = arguments.summarise
    blocks, problems = load_results(folder)
    for problem in problems:
        print(f"left out: {problem}", file=sys.stderr)
    if not blocks:
        print(f"--summarise {folder}: there are no results; name a folder that a run has written to", file=sys.stderr)
        return WRONG_CONFIG
    seconds = sum(number_at(block, "duration_seconds") or 0.0 for block in blocks)
    summarise(blocks, seconds, arguments, reused=len(blocks), problems=problems)
    return OK if whole(blocks) and not problems else FAILED


def summarise(blocks: Sequence[Result], seconds: float, arguments: argparse.Namespace, **counts: Any) -> None:
    """Write the summary and the plots, print the tables."""
    from reporting import print_tables, task_scores, to_frame, write_summary

    write_summary(arguments.output, seconds, blocks, **counts)
    frame = to_frame(blocks)
    print_tables(frame, _stdout(), task_scores(blocks))
    if not arguments.no_plots:
        from plots import save_plots
        from quality_plots import save_quality_plots

        save_plots(frame, arguments.output)
        save_quality_plots(blocks, arguments.output)
    print(f"results: {arguments.output}, summary: {arguments.output / 'experiment_summary.json'}")


def _stdout() -> Console:
    from rich.console import Console

    return Console(highlight=False, markup=False)  # names are the user's; [brackets] in them are no markup


if __name__ == "__main__":
    sys.exit(main())
