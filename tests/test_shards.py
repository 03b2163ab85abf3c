"""Shards divide a plan: every run is in exactly one, what is compared stays together, and the parts weigh alike."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config_schema import MODE_CLASSES
from planning import PlannedRun
from run_specs import expand
from shards import shard


def plan_of(*entries):
    shared = {"num_runs": 2, "max_new_tokens": 8, "device": "cpu"}
    experiments = [MODE_CLASSES[mode](mode=mode, **shared | keys) for mode, keys in entries]
    return [PlannedRun(spec) for spec in expand(experiments)]


LENGTHS = {"context_lengths": [100, 200, 400, 800, 1600]}
PLAN = plan_of(
    ("baseline", LENGTHS),
    ("reactive", LENGTHS),
    ("predictive", LENGTHS),
    ("baseline", LENGTHS | {"name": "other", "model_name": "other"}),
    ("reactive", LENGTHS | {"name": "other paged", "model_name": "other"}),
)


@given(st.integers(1, 15))
def test_every_run_is_in_one_shard_in_the_order_of_the_plan(n):
    shards = [shard(PLAN, f"{number}/{n}") for number in range(1, n + 1)]
    ids = [run.spec.run_id for runs in shards for run in runs]
    assert sorted(ids) == sorted(run.spec.run_id for run in PLAN)
    place = {run.spec.run_id: place for place, run in enumerate(PLAN)}
    for runs in shards:
        places = [place[run.spec.run_id] for run in runs]
        assert places == sorted(places)


@given(st.integers(1, 15))
def test_a_shard_has_all_runs_of_a_model_at_a_context_or_none(n):
    whole = Counter((run.spec.model_name, run.spec.context_length) for run in PLAN)
    for number in range(1, n + 1):
        part = Counter((run.spec.model_name, run.spec.context_length) for run in shard(PLAN, f"{number}/{n}"))
        assert part == {cell: whole[cell] for cell in part}


def test_shards_weigh_alike():
    """Cells weigh 6 (model `smollm2-135m`) or 4 runs x (context + 50 x 8): no part is more than a third above another,
    where the heaviest cell alone is 12,000 of 64,000 in all."""
    weights = [sum(run.spec.context_length + 400 for run in shard(PLAN, f"{number}/3")) for number in (1, 2, 3)]
    assert sum(weights) == 5 * (3100 + 5 * 400) * 2
    assert max(weights) <= 4 / 3 * min(weights)


def test_a_sampled_repetition_has_another_seed_and_stays_with_the_others():
    plan = plan_of(("baseline", {"do_sample": True, "context_lengths": [100, 200]}))
    assert len({run.spec.seed for run in plan}) == 2
    assert [len(shard(plan, f"{number}/4")) for number in (1, 2, 3, 4)] == [2, 2, 0, 0]


@pytest.mark.parametrize("part", ["0/3", "4/3", "1/0", "1", "a/b", "1/2/3", "-1/2", "1.5/2", ""])
def test_what_is_no_part_is_refused_with_an_example(part):
    with pytest.raises(ValueError, match=r"--shard .*: write i/n with 1 <= i <= n, for example 2/3"):
        shard(PLAN, part)
