"""What the benchmarks share: contestants measured in turn, ratios of pairs, ceilings, and one JSON document at the end.

Machines are noisy, and drift. So contestants run in one process and take turns: each round measures all of them once,
one after the other, and begins with another of them. A ratio is the median over rounds of the ratio within a round,
with the interval of its bootstrap; what slows a whole round slows both sides of it.

A ceiling is computed from what the hardware can do at most, measured here, before anything is timed against it.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from models import LoadedModel, load_model
from run_statistics import log_ratio, median_with_interval, paired_ratio
from utils import environment, write_json

BANDWIDTH_BYTES = 2**29  # more than any cache holds
BANDWIDTH_PASSES = 7

console = Console(stderr=True, highlight=False, width=110)


def finished(device: torch.device) -> None:
    """Wait until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(work: Callable[[], Any], device: torch.device) -> float:
    """What `work` takes, up to the last thing that it asks of the device."""
    finished(device)
    started = time.perf_counter()
    work()
    finished(device)
    return 1000.0 * (time.perf_counter() - started)


def in_turn(contestants: Mapping[str, Callable[[], float]], n_rounds: int) -> dict[str, list[float]]:
    """Measure each contestant once in every round.

    Args:
        contestants: by name, what makes one measurement and returns it.

    Returns:
        By name the measurements, one for each round.
    """
    names = list(contestants)
    measured: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    for turn in range(n_rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            measured[name].append(contestants[name]())
    return measured


def summary(values: Sequence[float]) -> dict[str, Any]:
    """The measurements of one contestant: median with its 95 % interval, range and n."""
    figures = median_with_interval(values)
    return {**figures, "min": min(values, default=None), "max": max(values, default=None)}


def ratio_of(numerators: Sequence[float], denominators: Sequence[float]) -> dict[str, Any]:
    """The ratio of two contestants over the rounds, paired, with its 95 % interval."""
    logs = [log_ratio(above, below) for above, below in zip(numerators, denominators, strict=True)]
    ratio = paired_ratio([[log for log in logs if log is not None]])
    return {"n": ratio.n_pairs, "ratio": ratio.ratio, "low": ratio.low, "high": ratio.high}


def target(what: str, value: float | None, at_least: float | None = None, at_most: float | None = None) -> dict:
    """One goal, and whether it was reached; None where its value is not known here."""
    met = None
    if value is not None:
        met = (at_least is None or value >= at_least) and (at_most is None or value <= at_most)
    return {"what": what, "value": value, "at_least": at_least, "at_most": at_most, "met": met}


def memory_bandwidth_gb_s(device: torch.device) -> float:
    """How fast the device reads its memory: the best of several sums over more than its caches hold."""
    numbers = torch.ones(BANDWIDTH_BYTES // 4, device=device)
    numbers.sum()
    best = min(milliseconds(numbers.sum, device) for _ in range(BANDWIDTH_PASSES))
    return BANDWIDTH_BYTES / best / 1e6


def weight_bytes_per_token(model: Any) -> int:
    """Bytes of weights that one decode step reads: all but a table of embeddings that is not the output layer too."""
    table = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    tied = head is not None and head.weight.data_ptr() == table.data_ptr()
    return sum(tensor.nbytes for tensor in model.parameters()) - (0 if tied else table.nbytes)


def benchmark_parser(description: str) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", default="smollm2-135m", help="alias, Hub id, folder, GGUF file or random:<config>")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16, float16, or auto")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto")
    parser.add_argument("--output", type=Path, help="write the JSON document to this file too")
    return parser


def loaded(arguments: argparse.Namespace) -> LoadedModel:
    """The model that the options ask for, with transformers' own fastest attention."""
    model = load_model(arguments.model, dtype=arguments.dtype, device=arguments.device)
    console.print(f"{arguments.model}, {model.dtype_name}, on {model.device}; {torch.get_num_threads()} threads")
    return model


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table for people, on stderr."""
    table = Table(title=title, title_justify="left")
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place == 0 else "right")
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    console.print(table)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}" if value < 100 else f"{value:.0f}"
    return str(value)


def interval(figures: Mapping[str, Any], key: str) -> str:
    """A figure with its interval, for a table."""
    if figures[key] is None:
        return "-"
    if figures["low"] is None:
        return _cell(figures[key])
    return f"{_cell(figures[key])} [{_cell(figures['low'])}-{_cell(figures['high'])}]"


def show_targets(targets: Sequence[Mapping[str, Any]]) -> None:
    words = {True: "met", False: "missed", None: "not measured here"}
    rows = []
    for goal in targets:
        bound = f">= {goal['at_least']}" if goal["at_least"] is not None else f"<= {goal['at_most']}"
        rows.append((goal["what"], goal["value"], bound, words[goal["met"]]))
    show("Targets", ("target", "measured", "wanted", ""), rows)


def publish(name: str, arguments: argparse.Namespace, document: Mapping[str, Any]) -> None:
    """Print the document as the last line of stdout, and write it where `--output` says."""
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
    document = {"benchmark": name, "settings": settings, "environment": environment(), **document}
    if arguments.output is not None:
        write_json(arguments.output, document)
    print(json.dumps(document), flush=True)
