"""One run with each part: which variants there are, which are left out, and in what order they are tried."""

from __future__ import annotations

import pytest
from variant_fixtures import make_run

from config_schema import PredictiveExperiment, ReactiveExperiment
from registry import POLICIES, PREDICTORS, Registry
from run_specs import expand
from variant_runs import EachPart

PARTS = Registry("predictor", {name: PREDICTORS.table[name] for name in ("none", "ema", "ranked")})


def experiment(**keys):
    return PredictiveExperiment(mode="predictive", context_lengths=[40], **({"num_runs": 2} | keys))


def measured(each, start, refuse=lambda spec: False):
    """The runs that were begun, as (repetition, predictor), and the results of `each`."""
    begun = []

    def measure(spec):
        begun.append((spec.repetition, spec.prefetch.predictor))
        if refuse(spec):
            raise ValueError("no digests\nto go by")
        return make_run(repetition=spec.repetition)

    return begun, each.measure(expand([start]), measure)


def test_there_is_a_variant_for_each_registered_part_that_differs_in_nothing_else():
    start = ReactiveExperiment(mode="reactive", page_size=8, staging_pages=9)
    each = EachPart.of(start, POLICIES)
    assert list(each.fields) == list(POLICIES)
    for policy, fields in each.fields.items():
        assert fields["paging"].policy == policy
        assert (fields["paging"].page_size, fields["paging"].staging_pages) == (8, 9)


def test_a_chosen_part_with_parameters_comes_on_top():
    own = {"name": "ema", "smoothing": 0.5}
    each = EachPart.of(experiment(predictor=own), PARTS)
    assert list(each.fields) == ["none", "ema", "ranked", "ema (smoothing=0.5)"]
    assert each.fields["ema (smoothing=0.5)"]["prefetch"].predictor == own
    assert each.chosen == "ema (smoothing=0.5)"


def test_every_repetition_is_measured_with_every_part_the_chosen_one_first():
    start = experiment(predictor="ema")
    begun, results = measured(EachPart.of(start, PARTS), start)
    assert begun == [(repetition, part) for repetition in (0, 1) for part in ("ema", "none", "ranked")]
    assert list(results) == ["none", "ema", "ranked"]
    assert [[run.spec["repetition"] for run in runs] for runs in results.values()] == [[0, 1]] * 3


def test_a_part_that_refuses_a_run_is_left_out_with_its_reason_and_not_tried_again():
    start = experiment(predictor="none", num_runs=3)
    each = EachPart.of(start, PARTS)
    begun, results = measured(each, start, lambda spec: spec.prefetch.predictor == "ema" and spec.repetition == 1)
    assert list(results) == ["none", "ranked"]
    assert each.left_out == {"ema": "no digests; to go by"}
    assert [repetition for repetition, part in begun if part == "ema"] == [0, 1]


def test_a_part_whose_settings_are_refused_is_left_out_before_any_run():
    each = EachPart.of(experiment(predictor="ema"), Registry("predictor", {**PARTS.table, "gone": "nowhere:Gone"}))
    assert list(each.fields) == list(PARTS)
    assert "unknown predictor 'gone'" in each.left_out["gone"]


def test_what_is_wrong_with_the_chosen_part_is_raised_before_the_others_are_tried():
    start = experiment(predictor="ranked")
    begun = []

    def measure(spec):
        begun.append(spec.prefetch.predictor)
        raise ValueError("no digests")

    with pytest.raises(ValueError, match="no digests"):
        EachPart.of(start, PARTS).measure(expand([start]), measure)
    assert begun == ["ranked"]
