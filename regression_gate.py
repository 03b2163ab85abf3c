"""`--fail-if "tpot_ms>5%"`: a condition on two results folders that makes a command fail.

The grammar is one comparison, METRIC then `>` or `<` then a percentage:

    tpot_ms>5%            fails where B's latency is more than 5 % above A's
    tokens_per_second<5%  fails where B's throughput is more than 5 % below A's

The sign is the direction in which the metric gets worse; the other one is refused, since it would fail on progress. A
condition is looked up in every strategy at every context and over all of them. It holds where the *whole* 95 % interval
of the ratio B / A lies beyond the margin, so a small true change may pass.

**Noise alone trips it, the more often the fewer the pairs.** Of up to 5 pairs the interval is their range (see
`run_statistics.py`), and all n of them lie on the worse side by chance in 1 of 2^n cases where nothing differs. So at a
margin of 0 % a strategy at a context trips by chance in 1 of 4 cases with 2 repetitions, in 1 of 8 with 3, in 1 of 32
with 5; and each strategy and context is another chance. A margin wider than the spread of runs makes it seldom.

What B lost fails every condition: a run of A without a partner, a file of B that cannot be read, and a strategy at a
context of which B has fewer values of the metric than A, as when a repetition failed. A condition that found nothing to
judge fails too, since a gate that checked nothing has not passed. What else cannot be judged is said.
"""

from __future__ import annotations

import dataclasses
import difflib
import re

from folder_comparison import METRICS, MISSING, TOO_FEW, FolderComparison, Metric, MetricComparison
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
        """Whether the whole interval lies beyond the margin."""
        ratio = compared.ratio
        if ratio.low is None or ratio.high is None:
            return False
        return ratio.low > self.limit if self.metric.lower_is_better else ratio.high < self.limit


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a condition: what B lost, where it holds and where it could not be judged, in words; `n_judged` in
    number."""

    condition: Condition
    lost: tuple[str, ...]
    holds_at: tuple[str, ...]
    not_judged: tuple[str, ...]
    n_judged: int

    @property
    def passed(self) -> bool:
        return not self.lost and not self.holds_at and self.n_judged > 0


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


def judge(condition: Condition, compared: FolderComparison) -> Outcome:
    """Look a condition up in all figures of its metric, and for what B lost."""
    own = [figure for figure in compared.figures if figure.metric is condition.metric]
    fewer = [figure for figure in own if figure.n_a is not None and figure.n_b < figure.n_a]
    return Outcome(
        condition,
        (*_lost_runs(compared), *(_fewer(figure) for figure in fewer)),
        tuple(_reason(condition, figure) for figure in own if condition.holds(figure)),
        tuple(f"{figure.place}: {figure.verdict}" for figure in own if _is_unknown(figure)),
        len(own) - sum(_is_unknown(figure) or figure.verdict == f"{MISSING} B" for figure in own),
    )


def _is_unknown(figure: MetricComparison) -> bool:
    """Whether there is no saying if it became worse, of what B has not lost."""
    return figure.verdict in (TOO_FEW, f"{MISSING} A")


def _lost_runs(compared: FolderComparison) -> list[str]:
    """Runs of A that have no partner, and files of B, which may be what is missing."""
    lost = []
    for entry in compared.unmatched:
        if entry.side == "A":
            numbers = f"repetition{'s' if len(entry.repetitions) > 1 else ''} {', '.join(map(str, entry.repetitions))}"
            lost.append(f"{entry.strategy} at {entry.context_tokens}, {numbers}: {entry.reason}")
    return lost + [f"not read in B: {problem}" for problem in compared.b.problems]


def _fewer(figure: MetricComparison) -> str:
    values = "value" if figure.n_a == 1 else "values"
    return f"{figure.place}: B has {figure.n_b or 'none'} of A's {figure.n_a} {values} of {figure.metric.name}"


def _reason(condition: Condition, compared: MetricComparison) -> str:
    ratio = compared.ratio
    beyond = "above" if condition.metric.lower_is_better else "below"
    interval = "" if condition.metric.once else f" [{ratio_text(ratio.low)}-{ratio_text(ratio.high)}]"
    return f"{compared.place}: B / A = {ratio_text(ratio.ratio)}{interval}, {beyond} {condition.limit:g}"
