"""Every plot of a results folder in one list, and their files.

`PLOTS` names each with its title, its caption and the function that draws it, so that whatever shows plots (a folder, a
report) shows the same ones. A maker takes the frame of runs and the results, and gives None where there is nothing to
draw: then no file is written, and one that an earlier sweep left is removed, since it would pass for this one's.

Heat maps of tasks are as many as there are tasks; `drawn` adds them behind the others.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from paper_plots import floor_figure, latency_figure, layer_rate_figure, speedup_figure, stage_figure
from plots import COLOURS, FORMATS, HATCHES, comparison_figure, rendered
from quality_budget import attended_figure, resident_figure
from quality_frame import task_items, task_scores
from quality_plots import pareto_figure, placed_items, quality_points, task_figure
from result_frame import Result, successful, to_frame, unique
from run_plots import latency_trace_figure

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

MANY = 200  # strategies of which a plot still says something as a whole
Maker = Callable[["pd.DataFrame", Sequence[Result]], "Figure | None"]


@dataclasses.dataclass(frozen=True)
class Plot:
    """One plot: `name` is that of its file without the suffix; `caption` says what it shows, in one or two sentences.

    What was run, on what, over which link, how often, and what marks and bars mean, stands in the figure itself.
    """

    name: str
    title: str
    caption: str
    make: Maker
    most_strategies: int = len(COLOURS) * len(HATCHES)  # beyond it colours and marks would come again


def _comparison(frame: pd.DataFrame, results: Sequence[Result]) -> Figure | None:
    return None if successful(frame).empty else comparison_figure(frame)


def _pareto(frame: pd.DataFrame, results: Sequence[Result]) -> Figure | None:
    scores = task_scores(results)
    return pareto_figure(frame, scores) if quality_points(frame, scores) else None


def _trace(frame: pd.DataFrame, results: Sequence[Result]) -> Figure | None:
    return None if successful(frame).empty else latency_trace_figure(results)


PLOTS = (
    Plot(
        "kv_cache_comparison",
        "KV cache strategies compared",
        "Latency, speed-up, memory, stall, hit rate and prediction accuracy of every strategy at every context.",
        _comparison,
        MANY,
    ),
    Plot(
        "latency_by_context",
        "Decode latency by context",
        "Median time per token with its 95 % bootstrap interval over repetitions.",
        latency_figure,
    ),
    Plot(
        "speedup_by_context",
        "Decode speed-up by context",
        "How many times as fast as the baseline, pair by pair of the same repetition: median and 95 % bootstrap"
        " interval. Below the line at 1 the baseline is faster.",
        speedup_figure,
    ),
    Plot(
        "step_stages",
        "Where the time of a decode step goes",
        "Mean time per token by stage: computing, attention over pages, choosing pages, predicting, asking for copies"
        " and waiting for pages.",
        stage_figure,
    ),
    Plot(
        "floor_by_context",
        "Distance to the floor by context",
        "Time per token over the larger of computing and moving the bytes that must move: median and 95 % bootstrap"
        " interval. At 1 no order of copies could be faster.",
        floor_figure,
    ),
    Plot(
        "hit_rate_by_layer",
        "Hit rate by layer",
        "Share of the pages that a layer asked for in decode steps which were there in time.",
        layer_rate_figure,
    ),
    Plot(
        "token_times",
        "Time of each token",
        "One run of each strategy at its longest context, token by token.",
        _trace,
    ),
    Plot(
        "quality_pareto",
        "Quality against cost",
        "Divergence from the baseline's predictions, and what scores lose, against latency and against device memory;"
        " lines join what no other point beats.",
        _pareto,
        MANY,
    ),
    Plot(
        "quality_by_attended_pages",
        "Quality against the pages read",
        "Divergence, agreement on the likeliest token and task scores against the share of pages that a decode step"
        " attends to.",
        attended_figure,
    ),
    Plot(
        "quality_by_budget",
        "Quality against the budget, missing pages skipped",
        "The same against the share of pages that the budget holds, of caches that do without the others.",
        resident_figure,
    ),
)


def drawn(results: Sequence[Result], makers: Mapping[str, Maker] | None = None) -> Iterator[tuple[Plot, Figure]]:
    """Every plot that these results have something for, with its figure, in the order of the list.

    Args:
        makers: by name of the plot, to draw it in another form.

    Plots that cannot be read with so many strategies are left out, and a warning says so.
    """
    frame = to_frame(results)
    n_strategies = len(unique(frame, "strategy"))
    for plot in (*PLOTS, *_task_plots(frame, results)):
        if n_strategies > plot.most_strategies:
            log.warning("%s is not drawn: it has room for %d strategies", plot.name, plot.most_strategies)
            continue
        figure = (makers or {}).get(plot.name, plot.make)(frame, results)
        if figure is not None:
            yield plot, figure


def _task_plots(frame: pd.DataFrame, results: Sequence[Result]) -> Iterator[Plot]:
    """A plot of scores by depth and length for each task; `task_passkey`, and letters that no file takes replaced."""
    items, taken = placed_items(task_items(results)), set()
    for task in unique(items, "task"):
        name = plain = f"task_{re.sub(r'[^A-Za-z0-9._-]+', '_', task)}"
        number = 2
        while name in taken:
            name, number = f"{plain}_{number}", number + 1
        taken.add(name)
        caption = "Mean score by where in the prompt the answer lies and how long the prompt is."
        yield Plot(name, f"Task {task}", caption, partial(_task_map, items, task), MANY)


def _task_map(items: pd.DataFrame, task: str, frame: pd.DataFrame, results: Sequence[Result]) -> Figure:
    return task_figure(frame, items, task)


def save_all_plots(results: Sequence[Result], folder: str | Path, formats: Sequence[str] = ("png",)) -> list[Path]:
    """Write every plot to `plots/` in the folder, in each of some of `plots.FORMATS`, and return the paths."""
    plots = Path(folder) / "plots"
    for name in (*(plot.name for plot in PLOTS), "task_*"):
        for file_format in FORMATS:
            for old in plots.glob(f"{name}.{file_format}"):
                old.unlink()
    paths = []
    for plot, figure in drawn(results):
        plots.mkdir(parents=True, exist_ok=True)
        for file_format in formats:
            paths.append(plots / f"{plot.name}.{file_format}")
            paths[-1].write_bytes(rendered(figure, file_format))
    return paths
