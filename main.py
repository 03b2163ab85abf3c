"""KV Prefetch: run a list of experiments and compare what keeping, paging and prefetching the KV cache cost.

    python main.py                        run experiment_config.yaml, results in logs/
    python main.py --config F --output D  another list, another folder
    python main.py --plan                 what would run, and the floor of each run; loads nothing
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
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from utils import PROJECT_FOLDER

if TYPE_CHECKING:
    from rich.console import Console

    from metrics import RunResult
    from planning import PlannedRun

DEFAULT_CONFIG = PROJECT_FOLDER / "experiment_config.yaml"
DEFAULT_OUTPUT = Path("logs")
OK, FAILED, WRONG_CONFIG, INTERRUPTED = 0, 1, 2, 130


def seed(text: str) -> int:
    """A seed as the config takes it."""
    number = int(text)
    if not 0 <= number < 2**32:
        raise argparse.ArgumentTypeError(f"must be between 0 and {2**32 - 1}, found {text}")
    return number


def plot_formats(text: str) -> list[str]:
    """Formats of plots, with commas between."""
    from plots import parse_formats

    try:
        return parse_formats(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="main.py", description=__doc__.split("\n")[0])
    parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG, metavar="F", help="experiment list (YAML)")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, metavar="DIR", help="results folder (logs)")
    parser.add_argument("--no-plots", action="store_true", help="write no plots")
    parser.add_argument(
        "--plot-format",
        type=plot_formats,
        action="extend",
        metavar="F",
        help="png, pdf, svg; several with commas (png)",
    )
    parser.add_argument("--plan", action="store_true", help="print the runs, their sizes and floors; run nothing")
    parser.add_argument("--list", action="store_true", help="print modes, policies, selectors, predictors")
    parser.add_argument(
        "--tracker", action="append", default=[], metavar="T", help="also record in tensorboard or mlflow; repeatable"
    )
    parser.add_argument("--seed", type=seed, metavar="N", help="replaces the seed of every experiment")
    parser.add_argument(
        "--create-config",
        type=Path,
        nargs="?",
        const=Path("experiment_config.yaml"),
        metavar="F",
        help="write a commented experiment list (to experiment_config.yaml) and stop",
    )
    parser.add_argument(
        "--compare", type=Path, nargs=2, metavar=("A", "B"), help="compare two results folders, and stop"
    )
    parser.add_argument(
        "--fail-if",
        action="append",
        default=[],
        metavar="COND",
        help="with --compare: exit with 1 if B is worse than A by more, such as 'tpot_ms>5%%'; repeatable",
    )
    parser.add_argument("--force", action="store_true", help="let --create-config overwrite a file")
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
    if arguments.compare or arguments.fail_if:
        return compare(arguments.compare, arguments.fail_if)
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

    return plan(expand(load_experiments(arguments.config), seed=arguments.seed))


def run(planned: Sequence[PlannedRun], arguments: argparse.Namespace) -> int:
    """Make the runs, then summarise whatever there is."""
    from progress import watch
    from trackers import Trackers

    try:
        trackers = Trackers.named(arguments.tracker, arguments.output)
    except ValueError as error:
        print(error, file=sys.stderr)
        return WRONG_CONFIG
    try:
        log_to(arguments.output, arguments.verbose)
    except OSError as error:
        print(f"--output {arguments.output}: {error.strerror}", file=sys.stderr)
        return WRONG_CONFIG
    for note in dict.fromkeys(f"{p.spec.model_name}: {note}" for p in planned for note in p.notes):
        logging.getLogger(__name__).warning(note)
    started = time.perf_counter()
    with watch([run.spec for run in planned], arguments.quiet, arguments.verbose) as watcher:
        from sweep import Sweep

        sweep = Sweep(planned, arguments.output, trackers.beside(watcher))
        sweep.run()
    seconds = time.perf_counter() - started
    summarise(sweep.results, seconds, len(planned), sweep.interrupted, arguments)
    trackers.finish(sweep.results, arguments.output)
    if sweep.interrupted:
        return INTERRUPTED
    whole = all(result.ok and "error" not in (result.quality or {}) for result in sweep.results)
    return OK if whole else FAILED


def summarise(
    results: Sequence[RunResult], seconds: float, n_planned: int, interrupted: bool, arguments: argparse.Namespace
) -> None:
    """Write the summary, the plots, the exports and the report, print the tables."""
    from exports import write_exports
    from report_html import write_report
    from reporting import print_tables, task_scores, to_frame, write_summary

    blocks = [result.to_dict() for result in results]
    summary = write_summary(arguments.output, seconds, blocks, n_planned, interrupted)
    frame = to_frame(blocks)
    print_tables(frame, _stdout(), task_scores(blocks))
    if not arguments.no_plots:
        from plot_list import save_all_plots

        save_all_plots(blocks, arguments.output, arguments.plot_format or ["png"])
    write_exports(blocks, frame, arguments.output)
    report = write_report(blocks, frame, summary, arguments.output, plots=not arguments.no_plots)
    print(f"results: {arguments.output}, summary: {arguments.output / 'experiment_summary.json'}, report: {report}")


def log_to(folder: Path, verbose: bool) -> None:
    """Log to `run.log` in the results folder; warnings also on stderr, and everything with `-v`."""
    folder.mkdir(parents=True, exist_ok=True)
    to_file = logging.FileHandler(folder / "run.log", encoding="utf-8")
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    to_stderr = logging.StreamHandler()
    to_stderr.setLevel(logging.INFO if verbose else logging.WARNING)
    to_stderr.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    # A failure's traceback goes to the file; on the console its row in the table says enough.
    to_stderr.addFilter(lambda record: verbose or record.exc_info is None)
    logging.basicConfig(level=logging.INFO, handlers=[to_file, to_stderr], force=True)


def _stdout() -> Console:
    from rich.console import Console

    return Console(highlight=False, markup=False)  # names are the user's; [brackets] in them are no markup


if __name__ == "__main__":
    sys.exit(main())
