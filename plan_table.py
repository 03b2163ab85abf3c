"""The table of `--plan`: what would run, how much of its context fits, and what has to cross the link regardless.

The floor is that of the transfer alone, the least time per token for the bytes that must cross the link; what a token
takes to compute is not in it, and is not known before the run. A floor is known only where the bandwidth is, and
before the run that is so of a simulated link alone. The caption names it.

Below stands what all runs come to: the bytes of their KV caches, and how long they will take by what they took before
(see `run_estimates`).
"""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from links import choose_link
from planning import PlannedRun
from run_estimates import Estimate, describe_estimate


def print_plan(planned: Sequence[PlannedRun], console: Console, known: Estimate | None = None) -> None:
    """Print one row for each run, then the notes, and what they come to. A dash is what is not known before the run.

    Args:
        known: how long it will take; nothing is said of that if left out.
    """
    for model, per_token in dict.fromkeys((run.spec.model_name, run.kv_bytes_per_token) for run in planned):
        console.print(f"{model}: {_text(per_token, ',.0f')} KV bytes per token of one sequence")
    table = Table(
        title=_count(planned),
        title_justify="left",
        caption=Text(_caption(planned)),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
    )
    table.add_column("run", no_wrap=True)
    table.add_column("strategy", overflow="fold")
    table.add_column("context", no_wrap=True)
    for heading in ("rep", "KV\nMiB", "on device\nMiB", "resident\n%", "transfer floor\nms/token"):
        table.add_column(heading, justify="right", no_wrap=True)
    for run in planned:
        table.add_row(*_row(run))
    console.print(table)
    for note in dict.fromkeys(f"{run.spec.model_name}: {note}" for run in planned for note in run.notes):
        console.print(note, markup=False)
    console.print(_total(planned), markup=False)
    if known is not None:
        console.print(describe_estimate(known), markup=False)


def _row(run: PlannedRun) -> tuple[str, ...]:
    spec = run.spec
    return (
        spec.run_id,
        spec.label,
        f"{spec.context_length}+{spec.max_new_tokens}",
        str(spec.repetition + 1),
        _text(run.kv_bytes, ",.1f", 2**20),
        _text(run.device_kv_bytes, ",.1f", 2**20),
        _text(run.resident_fraction, ".0f", 0.01),
        _text(run.transfer_floor_ms, ".2f"),
    )


def _caption(planned: Sequence[PlannedRun]) -> str:
    """What the floors mean, as far as the table has such floors."""
    floors, links = [run.transfer_floor_ms for run in planned], _simulated_links(planned)
    over = f"over the simulated link ({'; '.join(links)})" if links else "over the link"
    sentences = [f"Transfer floor: least time for the bytes that must cross, {over}; computing is not in it."]
    if 0.0 in floors:
        sentences.append("0.00: what a step reads fits on the device.")
    if None in floors:
        sentences.append("—: not known before the run.")
    return " ".join(sentences)


def _total(planned: Sequence[PlannedRun]) -> str:
    """How many runs there are, and the KV bytes that they hold one after the other."""
    sizes = [run.kv_bytes for run in planned if run.kv_bytes is not None]
    labels = {(run.spec.model_name, run.spec.label) for run in planned}
    experiments = "1 experiment" if len(labels) == 1 else f"{len(labels):,} experiments"
    words = f"{_count(planned)} of {experiments}; KV cache"
    if not sizes:
        return f"{words}: size not known before the run."
    unknown = f"; {len(planned) - len(sizes):,} of unknown size" if len(sizes) < len(planned) else ""
    return f"{words} at most {_size_text(max(sizes))} at a time, {_size_text(sum(sizes))} over all runs{unknown}."


def _count(planned: Sequence[PlannedRun]) -> str:
    return "1 run" if len(planned) == 1 else f"{len(planned):,} runs"


def _size_text(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:,.1f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:,.1f} MiB"


def _simulated_links(planned: Sequence[PlannedRun]) -> list[str]:
    """The links of the floors above 0: these took a bandwidth that is known beforehand, as only a simulated one is."""
    links = [choose_link(run.spec.paging.link, "cpu") for run in planned if run.transfer_floor_ms]
    return list(dict.fromkeys(f"{link.name}, {link.bandwidth_gb_s:g} GB/s" for link in links))


def _text(value: float | None, form: str, unit: float = 1.0) -> str:
    return "—" if value is None else format(value / unit, form)
