"""`--fail-if "tpot_ms>5%"`: a condition on two results folders that makes a command fail.

The grammar is one comparison, METRIC then `>` or `<` then a percentage:

    tpot_ms>5%            fails where B's latency is more than 5 % above A's
    tokens_per_second<5%  fails where B's throughput is more than 5 % below A's

The sign is the direction in which the metric gets worse; the other one is refused, since it would fail on progress. A
condition is looked up in every strategy at every context and over all of them. It holds where the *whole* 95 % interval
of the ratio B / A lies beyond the margin, so noise alone seldom trips it, and a small true change may pass.

What cannot be judged is said. A figure that A has and B lost fails the condition; and so does a condition that found
nothing to judge, since a gate that checked nothing has not passed.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Sequence

from folder_comparison import METRICS, MISSING, TOO_FEW, Metric, MetricComparison
from text_tables import ratio_text

_GRAMMAR = re.compile(r"\s*([A-Za-z0-9_]+)\s*([<>])\s*([0-9]+(?:\.[0-9]+)?)\s*%\s*")


@dataclasses.dataclass(frozen=True)
class Condition:
    """A parsed `--fail-if`; `percent` is the margin, not below 0."""

    metric: Metric
    percent: float

    @property
    def sign(self) -> str:
        return _worse_sign(self.metric)

    @property
    def limit(self) -> float:
        """The ratio B / A beyond which it holds."""
        return 1.0 + self.percent / 100.0 if self.metric.lower_is_better else 1.0 - self.percent / 100.0

    def __str__(self) -> str:
        return f"{self.metric.name}{self.sign}{self.percent:g}%"

    def holds(self, compared: MetricComparison) -> bool:
        ratio = compared.ratio
        if compared.verdict.startswith(MISSING):
            return compared.b is None
        if ratio.low is None or ratio.high is None:
            return False
        return ratio.low > self.limit if self.metric.lower_is_better else ratio.high < self.limit


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a condition: where it holds and where it could not be judged, in words; `n_judged` in number."""

    condition: Condition
    holds_at: tuple[str, ...]
    not_judged: tuple[str, ...]
    n_judged: int

    @property
    def passed(self) -> bool:
        return not self.holds_at and self.n_judged > 0


def parse_condition(text: str) -> Condition:
    """
    Raises:
        ValueError: it is no condition, with the known metrics and an example.
    """
    parsed = _GRAMMAR.fullmatch(text)
    if parsed is None:
        raise ValueError(
            f"--fail-if {text!r} is no condition: write METRIC>N% or METRIC<N%, such as 'tpot_ms>5%'\n{_known()}"
        )
    name, sign, number = parsed.groups()
    if name not in METRICS:
        near = difflib.get_close_matches(name, METRICS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"--fail-if {text!r}: unknown metric {name!r}{hint}\n{_known()}")
    metric, percent = METRICS[name], float(number)
    if sign != _worse_sign(metric):
        more_or_less = "higher" if metric.lower_is_better else "lower"
        raise ValueError(
            f"--fail-if {text!r} would fail on progress: {name} is worse when it is {more_or_less};"
            f" write '{name}{_worse_sign(metric)}{number}%'"
        )
    if sign == "<" and percent >= 100:
        raise ValueError(f"--fail-if {text!r}: nothing can be more than 100 % lower; name a smaller percentage")
    return Condition(metric, percent)


def _worse_sign(metric: Metric) -> str:
    return ">" if metric.lower_is_better else "<"


def _known() -> str:
    worse = {sign: ", ".join(m.name for m in METRICS.values() if _worse_sign(m) == sign) for sign in "><"}
    return f"higher is worse, METRIC>N%: {worse['>']}\nlower is worse, METRIC<N%: {worse['<']}"


def judge(condition: Condition, figures: Sequence[MetricComparison]) -> Outcome:
    """Look a condition up in all figures of its metric."""
    own = [compared for compared in figures if compared.metric is condition.metric]
    unknown = [c for c in own if (c.verdict == TOO_FEW or c.verdict.startswith(MISSING)) and not condition.holds(c)]
    return Outcome(
        condition,
        tuple(_reason(condition, compared) for compared in own if condition.holds(compared)),
        tuple(f"{compared.place}: {compared.verdict}" for compared in unknown),
        len(own) - len(unknown),
    )


def _reason(condition: Condition, compared: MetricComparison) -> str:
    if compared.verdict.startswith(MISSING):
        return f"{compared.place}: {compared.verdict}"
    ratio = compared.ratio
    beyond = "above" if condition.metric.lower_is_better else "below"
    interval = "" if condition.metric.once else f" [{ratio_text(ratio.low)}-{ratio_text(ratio.high)}]"
    return f"{compared.place}: B / A = {ratio_text(ratio.ratio)}{interval}, {beyond} {condition.limit:g}"
