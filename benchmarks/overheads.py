"""What the harness itself costs: starting, planning, loading a model, and the bookkeeping of a decode step.

    python benchmarks/overheads.py

Bookkeeping is what a paged cache does beside computing, choosing and copying: the page tables, the policies, and the
record. (The plain LRUs that hits are held against are asked after the run.) Its time is read off clocks around the
functions that do it, whose own cost is in it; what they call of attention, of copies, of waiting for them and of scores
is not.

The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from contest import benchmark_parser, in_turn, interval, loaded, publish, show, show_targets, summary, target
from contexts import Decoder, paged, pages_of, read_context
from lockstep import FirstRequest, RepeatedRequest
from models import LoadedModel
from page_store import PageStore, _StreamTicket, _ThreadTicket
from page_table import PageTable
from paged_sequence import PagedSequence
from recorder import Recorder
from resolution import Resolution
from yardstick import Yardstick

PROJECT = Path(__file__).resolve().parent.parent
COMMANDS = {
    "main.py --help": ("main.py", "--help"),
    "main.py --plan": ("main.py", "--plan"),
    "load the cached model": ("-c", "from models import load_model; load_model({model!r})"),
}
# Bookkeeping, and what it calls that is none.
BOOKKEEPING = (
    (PagedSequence, ("resolve", "ask_again", "pinned_pages", "own_table")),
    (Resolution, ("_next_arrivals", "_release")),
    (FirstRequest, ("_fetch_missing",)),
    (RepeatedRequest, ("_next_arrivals", "_release")),
    (PageTable, ("open",)),
    (Yardstick, ("opened",)),
    (Recorder, ("count", "count_later", "spent", "waited", "begin_step")),
)
NOT_BOOKKEEPING = ((PageStore, ("fetch", "await_slot", "seal")), (_ThreadTicket, ("wait",)), (_StreamTicket, ("wait",)))


def main() -> None:
    arguments = parser().parse_args()
    starts = in_turn({name: lambda name=name: start(name, arguments) for name in COMMANDS}, arguments.rounds)
    show(
        f"Processes, n = {arguments.rounds}",
        ("", "seconds"),
        [(name, interval(summary(times), "median")) for name, times in starts.items()],
    )
    model = loaded(arguments)
    steps = {name: bookkeeping(model, arguments, **how) for name, how in settings_of(arguments).items()}
    show(
        f"Decode steps at {arguments.context} tokens, n = {arguments.rounds} x {arguments.tokens}",
        ("", "ms/token", "bookkeeping ms", "%"),
        [
            (name, interval(one["ms_per_token"], "median"), one["bookkeeping_ms"], one["percent"])
            for name, one in steps.items()
        ],
    )
    medians = {name: summary(times)["median"] for name, times in starts.items()}
    targets = [
        target("main.py --help, seconds", medians["main.py --help"], at_most=0.3),
        target("main.py --plan, seconds", medians["main.py --plan"], at_most=1.0),
        target("load the cached model, seconds", medians["load the cached model"], at_most=4.0),
        *(target(f"bookkeeping, {name}, % of a step", one["percent"], at_most=2.0) for name, one in steps.items()),
    ]
    show_targets(targets)
    publish("overheads", arguments, {"seconds": starts, "steps": steps, "targets": targets})


def parser() -> argparse.ArgumentParser:
    options = benchmark_parser("What the harness itself costs.")
    options.add_argument("--context", type=int, default=2000, help="prompt length, in tokens")
    options.add_argument("--rounds", type=int, default=5, help="measurements of each")
    options.add_argument("--tokens", type=int, default=6, help="tokens in one measurement")
    return options


def settings_of(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What a decode step may be like."""
    exact, small = pages_of(arguments.context, 256) + 2, pages_of(arguments.context, 32) + 4
    selection = {"page_size": 32, "selector": "quest", "attention_fraction": 0.25}
    return {
        "all resident": {"page_size": 256, "max_gpu_pages": exact, "staging_pages": 1},
        "all resident, pages of 32": {"page_size": 32, "max_gpu_pages": small, "staging_pages": 1},
        "budget of half": {"page_size": 256, "max_gpu_pages": max(3, exact // 2), "link": "pcie4-x16"},
        "selection": {**selection, "max_gpu_pages": small, "staging_pages": 1},
    }


def start(name: str, arguments: argparse.Namespace) -> float:
    """Seconds that a process takes from its start to its end."""
    command = [part.format(model=arguments.model) for part in COMMANDS[name]]
    started = time.perf_counter()
    subprocess.run([sys.executable, *command], cwd=PROJECT, check=True, capture_output=True)
    return time.perf_counter() - started


class Stopwatch:
    """Sums the time inside some functions, less that inside others that they call."""

    def __init__(self) -> None:
        self.seconds, self._depth = 0.0, 0

    def around(self, function: Callable, counts: bool) -> Callable:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if counts == (self._depth > 0):  # inside one that is timed already, or of no interest
                return function(*args, **kwargs)
            self._depth += 1 if counts else -1
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                taken = time.perf_counter() - started
                self._depth -= 1 if counts else -1
                self.seconds += taken if counts else -taken

        return timed

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside the block, the functions are timed."""
        named = [(cls, name, True) for cls, names in BOOKKEEPING for name in names]
        named += [(cls, name, False) for cls, names in NOT_BOOKKEEPING for name in names]
        before = [(cls, name, cls.__dict__[name]) for cls, name, _ in named]
        for cls, name, counts in named:
            setattr(cls, name, self.around(cls.__dict__[name], counts))
        try:
            yield
        finally:
            for cls, name, function in before:
                setattr(cls, name, function)


def bookkeeping(model: LoadedModel, arguments: argparse.Namespace, **settings: Any) -> dict[str, Any]:
    """The bookkeeping of decode steps."""
    n_new = (arguments.rounds + 1) * (arguments.tokens + 1) + 1
    context = read_context(model, arguments.context, n_new)
    decoder = Decoder(model, context, context.poured_into(paged(model, arguments.context + n_new, **settings)))
    decoder.decode(arguments.tokens)
    times, shares, kept = [], [], []
    for _ in range(arguments.rounds):
        watch = Stopwatch()
        with watch.watching():
            times.append(decoder.decode(arguments.tokens))
        kept.append(1000.0 * watch.seconds / (arguments.tokens + 1))  # one token of them was fed before the clock
        shares.append(100.0 * kept[-1] / times[-1])
    return {
        "ms_per_token": summary(times),
        "bookkeeping_ms": summary(kept)["median"],
        "percent": summary(shares)["median"],
        "measured_percent": shares,
    }


if __name__ == "__main__":
    main()
