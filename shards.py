"""A plan in parts, for machines that know nothing of each other: `--shard 2/3` runs the second of three.

What is compared has to be measured on one machine, so a cell (one workload at one context length; see result_frame.py)
is never divided, and each part has the baselines of its runs. Every machine computes the same division from the list
alone. To merge, put the result files into one folder.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from planning import PlannedRun
from result_frame import WORKLOAD_FIELDS
from run_specs import RunSpec

# A decode step reads all weights for one token, and prefill for many at once; measured on the small model, on a CPU, a
# step takes as long as 30 to 80 tokens of prompt. For a division that is even enough, the middle will do.
PROMPT_TOKENS_PER_STEP = 50


def shard(planned: Sequence[PlannedRun], part: str) -> list[PlannedRun]:
    """The runs of one part, in the order of the plan; none where there are fewer cells than parts.

    Args:
        part: `"2/3"` is the second of three.

    Raises:
        ValueError: it is no such thing.
    """
    matched = re.fullmatch(r"(\d+)/(\d+)", part)
    number, n_parts = (int(group) for group in matched.groups()) if matched else (0, 0)
    if not 1 <= number <= n_parts:
        raise ValueError(f"--shard {part}: write i/n with 1 <= i <= n, for example 2/3 for the second of three parts")
    mine = _division(planned, n_parts)[number - 1]
    return [run for run in planned if _cell(run.spec) in mine]


def _division(planned: Sequence[PlannedRun], n_parts: int) -> list[set[tuple]]:
    """The cells of each part: the heaviest first, each to the part that has the least so far."""
    weights: dict[tuple, int] = {}
    for run in planned:
        cell = _cell(run.spec)
        weights[cell] = weights.get(cell, 0) + _weight(run.spec)
    parts: list[set[tuple]] = [set() for _ in range(n_parts)]
    loads = [0] * n_parts
    for cell in sorted(weights, key=weights.get, reverse=True):  # stable, so equal ones stay in the plan's order
        lightest = loads.index(min(loads))
        parts[lightest].add(cell)
        loads[lightest] += weights[cell]
    return parts


def _cell(spec: RunSpec) -> tuple:
    return (*(getattr(spec, field) for field in WORKLOAD_FIELDS), spec.context_length)


def _weight(spec: RunSpec) -> int:
    """About how long a run takes, in tokens of prompt."""
    return spec.batch_size * (spec.context_length + PROMPT_TOKENS_PER_STEP * spec.max_new_tokens)
