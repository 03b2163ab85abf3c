"""How much of an answer is left as a cache reads less: quality against the share of pages that it may read or hold.

Two figures of one kind, a row for each measure (divergence from the baseline, agreement on the likeliest token, the
score of each task) and a column for each context. `attended_figure` has the pages that a decode step attends to along
its x axis, which is what a selector is told; `resident_figure` those that the budget holds, which decides about
answers only where a step does without what is not there (`on_miss: skip`). Grey lines join settings that differ in
nothing else.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from paper_plots import draw_line_legend
from plots import FAINT, INK, clear_frame, line_styles, titled_grid
from quality_frame import task_scores
from result_frame import (
    Result,
    context_tokens,
    count_at,
    describe_setting,
    dig,
    mode_rank,
    number_at,
    strategy_labels,
    unique,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DODGE_POINTS = 6.0  # between strategies at one share, so that one does not hide the other
LEAST_NATS = 1e-6  # less is what rounding alone can make, and drawn as 0
KL, TOP1 = "KL divergence\nfrom the baseline, nats", "same likeliest token\nas the baseline, %"
_NOT_A_SETTING = ("name", "repetition", "seed", "requested_context_length", "quality")


@dataclasses.dataclass(frozen=True)
class Answer:
    """One measure of one strategy at one context.

    Attributes:
        measure: what it is and in which unit, as the axis says it.
        share: of the context's pages, in percent: the x axis.
        value, low, high: the figure, and its 95 % interval where it has one.
        n: items that it is the mean of, where it is one of items.
        baseline: the baseline's figure on the same items, where there is one.
        family: equal for settings that differ only in the share.
    """

    measure: str
    strategy: str
    context_tokens: int
    share: float
    value: float
    low: float | None
    high: float | None
    n: int | None
    baseline: float | None
    family: str


def attended_share(result: Result) -> float | None:
    """The pages that a decode step attends to, in percent of the context's; of selecting layers, if some are dense.

    None of a cache that then leaves out some of these, as they are not there: how many differs from step to step.
    """
    if dig(result, "spec.paging.on_miss") == "skip":
        return None
    return _percent(count_at(result, "cache.attended_pages"), count_at(result, "cache.n_pages"))


def resident_share(result: Result) -> float | None:
    """The pages that the budget holds, in percent of the context's; None of a cache that waits for the others."""
    if dig(result, "spec.paging.on_miss") != "skip":
        return None
    return _percent(count_at(result, "spec.paging.max_gpu_pages"), count_at(result, "cache.n_pages"))


def _percent(part: int | None, whole: int | None) -> float | None:
    return min(100.0, 100.0 * part / whole) if part is not None and whole else None


def attended_figure(frame: pd.DataFrame, results: Sequence[Result]) -> Figure | None:
    """Quality against the share of pages that a step attends to; None unless two shares were measured."""
    found = answers(results, attended_share, ("attention_pages", "attention_fraction"))
    return _figure(frame, found, "Quality against the pages read", "pages attended to, % of the context's")


def resident_figure(frame: pd.DataFrame, results: Sequence[Result]) -> Figure | None:
    """Quality against the share of pages that is resident, of caches that do without the others."""
    found = answers(results, resident_share, ("max_gpu_pages",))
    return _figure(
        frame, found, "Quality against the budget, missing pages skipped", "budget, % of the context's pages"
    )


def answers(
    results: Sequence[Result], share_of: Callable[[Result], float | None], varied: Sequence[str]
) -> list[Answer]:
    """Every measure of every strategy that has a share and had its quality measured.

    Args:
        share_of: where a result stands on the x axis; None leaves it out.
        varied: keys of paging that decide about it.
    """
    results = sorted(results, key=mode_rank)
    found = []
    for name, result in zip(strategy_labels(results), results, strict=True):
        share, context = share_of(result), context_tokens(result)
        if result.get("status") != "ok" or share is None or context is None:
            continue
        place = {"strategy": name, "context_tokens": context, "share": share, "family": _family(result, varied)}
        found += [Answer(**place, **measured) for measured in _measures(result, context)]
    # Repetitions of one strategy would give the same: the first that was measured stands for all.
    return list({(one.strategy, one.context_tokens, one.measure): one for one in reversed(found)}.values())[::-1]


def _measures(result: Result, context: int) -> list[dict[str, Any]]:
    """What a run's quality block says, as the fields of `Answer`."""
    measured = []
    for measure, path, scale in ((KL, "kl_mean", 1.0), (TOP1, "top1_agreement", 100.0)):
        value = number_at(result, f"quality.fidelity.{path}")
        if value is not None:
            bare = {"low": None, "high": None, "n": None, "baseline": None}
            measured.append({"measure": measure, "value": scale * value, **bare})
    for task in task_scores([result]).astype(object).to_dict("records"):
        score = _plain(task["score"])
        if score is not None:
            where = "" if task["tokens"] == context else f" at {task['tokens']:,} tokens"
            ends = {end: _plain(task[end]) for end in ("low", "high")} | {"n": count_at(task, "n")}
            baseline = _plain(task["baseline_score"])
            measured.append(
                {"measure": f"{task['task']}{where},\n% right", "value": score, **ends, "baseline": baseline}
            )
    return measured


def _plain(score: Any) -> float | None:
    """A score of 0 to 1 in percent; None where it is missing."""
    return 100.0 * score if isinstance(score, int | float) else None


def _family(result: Result, varied: Sequence[str]) -> str:
    spec = {key: value for key, value in result["spec"].items() if key not in _NOT_A_SETTING}
    paging = {key: value for key, value in (spec.get("paging") or {}).items() if key not in varied}
    return json.dumps({**spec, "paging": paging, "context_length": context_tokens(result)}, sort_keys=True, default=str)


# ----------------------------------------------------------------------------------------------------------------------
# Drawing
# ----------------------------------------------------------------------------------------------------------------------


def _figure(frame: pd.DataFrame, found: Sequence[Answer], title: str, unit: str) -> Figure | None:
    by_context: dict[int, set[float]] = {}
    for answer in found:
        by_context.setdefault(answer.context_tokens, set()).add(answer.share)
    if not any(len(shares) > 1 for shares in by_context.values()):  # two points at least, or there is no "against"
        return None
    contexts = sorted({answer.context_tokens for answer in found})
    measures = list(
        dict.fromkeys(answer.measure for answer in sorted(found, key=lambda a: a.measure not in (KL, TOP1)))
    )
    styles = line_styles(unique(frame, "strategy"))
    size = (max(3.4, 9.0 / len(contexts)), 2.7)
    sentences = [describe_setting(frame), _reading(frame, found)]
    figure, axes = titled_grid(title, sentences, len(measures) * len(contexts), len(contexts), size)
    for index, axis in enumerate(axes):
        measure, context = measures[index // len(contexts)], contexts[index % len(contexts)]
        of_measure = [answer for answer in found if answer.measure == measure]
        shown = [answer for answer in of_measure if answer.context_tokens == context]
        _draw_answers(axis, shown, styles)
        _scale_measure(axis, measure, [answer.value for answer in of_measure])
        axis.set_xlim(-4.0, 106.0)
        clear_frame(axis)
        axis.grid(axis="x", color=FAINT, linewidth=0.7, zorder=0)
        if index < len(contexts):
            axis.set_title(f"{context:,} tokens of context", loc="left", size=11, weight="bold", color=INK)
        axis.set_ylabel(measure if index % len(contexts) == 0 else "", size=9.5, color=INK)
        axis.set_xlabel(unit if index >= len(axes) - len(contexts) else "", size=9.5, color=INK)
    drawn = {answer.strategy for answer in found}
    draw_line_legend(figure, _unjoined(styles), [name for name in styles if name in drawn])
    return figure


def _unjoined(styles: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: {**style, "linestyle": ""} for name, style in styles.items()}


def _reading(frame: pd.DataFrame, found: Sequence[Answer]) -> str:
    counts = sorted({int(count) for count in unique(frame, "fidelity_tokens")})
    sentences = []
    if counts and any(answer.measure in (KL, TOP1) for answer in found):
        sentences.append(f"Divergence and likeliest token: over {' or '.join(map(str, counts))} tokens of text, once.")
    if any(answer.baseline is not None for answer in found):
        items = sorted({answer.n for answer in found if answer.n is not None})
        n = f" of n = {' or '.join(map(str, items))} items" if items else ""
        sentences.append(f"Tasks: mean score{n} with its 95 % interval; dashed: the baseline's on the same items.")
    if len({(answer.family, answer.share) for answer in found}) > len({answer.family for answer in found}):
        sentences.append("Grey lines join settings that differ in nothing else.")
    sentences.append("Marks of one share stand side by side.")
    return " ".join(sentences)


def _draw_answers(axis: Axes, shown: Sequence[Answer], styles: Mapping[str, Mapping[str, Any]]) -> None:
    if not shown:
        axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", va="center", color="#777777")
    for family in dict.fromkeys(answer.family for answer in shown):
        line = sorted((answer.share, _drawn(answer)) for answer in shown if answer.family == family)
        if len({share for share, _ in line}) > 1:
            axis.plot(*zip(*line, strict=True), color="#888888", linewidth=1.2, zorder=2, gid="family")
    for level in sorted({answer.baseline for answer in shown if answer.baseline is not None}):
        axis.axhline(level, color=INK, linewidth=1.0, linestyle=(0, (5, 3)), zorder=1.5, gid="baseline")
    from matplotlib.transforms import ScaledTranslation

    for answer in shown:
        style = {**styles[answer.strategy], "linestyle": ""}
        beside = [other.strategy for other in shown if other.share == answer.share]
        aside = DODGE_POINTS * (beside.index(answer.strategy) - (len(beside) - 1) / 2)
        moved = {"transform": axis.transData + ScaledTranslation(aside / 72, 0, axis.figure.dpi_scale_trans)}
        axis.plot(answer.share, _drawn(answer), **style, **moved, zorder=4, clip_on=False, gid="answer")
        if answer.low is not None and answer.high is not None:
            reach = [[max(0.0, answer.value - answer.low)], [max(0.0, answer.high - answer.value)]]
            bar = {"fmt": "none", "ecolor": style["color"], "elinewidth": 1.6, "capsize": 3.5, "zorder": 3}
            axis.errorbar(answer.share, answer.value, yerr=reach, **bar, **moved)


def _drawn(answer: Answer) -> float:
    return 0.0 if answer.measure == KL and answer.value < LEAST_NATS else answer.value


def _scale_measure(axis: Axes, measure: str, figures: Sequence[float]) -> None:
    """Percentages from 0 to 100; divergences in decades with 0 below them, the same for all contexts."""
    if measure != KL:
        axis.set_ylim(-4.0, 106.0)
        axis.set_yticks([0, 25, 50, 75, 100])
        return
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    above = [value for value in figures if value >= LEAST_NATS] or [LEAST_NATS]
    first, last = math.floor(math.log10(min(above))), math.ceil(math.log10(max(above)))
    last = max(last, first + 1)
    axis.set_yscale("symlog", linthresh=10.0**first, linscale=0.6)
    axis.set_ylim(-0.15 * 10.0**first, 1.3 * 10.0**last)
    decades = range(first, last + 1, -(-(last - first) // 4))
    axis.yaxis.set_major_locator(FixedLocator([0.0, *(10.0**decade for decade in decades)]))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_locator(NullLocator())
