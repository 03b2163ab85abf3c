"""The flags of `python main.py`, and the values that they take.

Nothing is imported for them that a result or a model needs, so that `--help` comes at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from utils import PROJECT_FOLDER

WHAT_IT_DOES = "Run a list of experiments and compare what keeping, paging and prefetching the KV cache cost."
DEFAULT_CONFIG = PROJECT_FOLDER / "experiment_config.yaml"
DEFAULT_OUTPUT = Path("logs")


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
    parser = argparse.ArgumentParser(
        prog="main.py",
        description=WHAT_IT_DOES,
    )
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


def plot_formats_of(arguments: argparse.Namespace) -> list[str]:
    """The formats in which plots are asked for; none for no plots."""
    return [] if arguments.no_plots else arguments.plot_format or ["png"]
