"""How long a plan takes rests on earlier runs of this machine, or is said to be unknown; sums are made by hand."""

from __future__ import annotations

import json
import re
from io import StringIO

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import run_estimates
from experiments import BaselineExperiment, ReactiveExperiment
from plan_table import print_plan
from planning import plan
from run_estimates import describe_estimate, duration_text, estimate, scaled
from run_specs import expand
from utils import environment

MODEL = "random:configs/models/tiny-llama.json"


def planned(*contexts, n=2, cls=ReactiveExperiment, mode="reactive", **keys):
    """A plan of one experiment on a CPU, `n` repetitions for each context."""
    shared = {"model_name": MODEL, "device": "cpu", "context_lengths": list(contexts), "num_runs": n, "quality": False}
    return plan(expand([cls(mode=mode, **shared, **keys)]), allow_network=False)


@pytest.fixture
def keep(tmp_path):
    """Write results of planned runs that took so many seconds, with some blocks replaced."""

    def write(runs, seconds, **blocks):
        for run in runs:
            own = seconds(run.spec) if callable(seconds) else seconds
            result = {"schema_version": 1, "spec": run.spec.to_dict(), "status": "ok", "duration_seconds": own}
            result |= {"environment": environment(), "model": {"device": "cpu"}} | blocks
            (tmp_path / f"{run.spec.slug}.json").write_text(json.dumps(result))
        return tmp_path

    return write


def test_runs_that_were_made_before_take_what_they_took(keep):
    folder = keep(planned(500, 1000), lambda spec: spec.context_length / 100 + (3 if spec.repetition == 0 else 0))
    known = estimate(planned(500, 1000), folder)
    assert known.seconds == pytest.approx((8 + 5) + (13 + 10))  # the first repetition has the warm-up
    assert (known.n_known, known.n_scaled, known.n_earlier, known.unknown) == (4, 0, 4, {})


def test_more_repetitions_of_the_same_take_the_median_of_the_later_ones(keep):
    seconds = {0: 50.0, 1: 10.0, 2: 20.0, 3: 90.0}
    folder = keep(planned(500, n=4), lambda spec: seconds[spec.repetition])
    assert estimate(planned(500, n=6), folder).seconds == pytest.approx(50 + 5 * 20)


def test_another_name_seed_or_quality_changes_nothing(keep):
    folder = keep(planned(500), 7.0)
    same = planned(500, name="another", seed=5)
    assert estimate(same, folder).seconds == 14.0


@pytest.mark.parametrize(
    "other",
    [
        {"max_gpu_pages": 5},
        {"policy": "mru"},
        {"batch_size": 2},
        {"max_new_tokens": 9},
        {"dtype": "bfloat16"},
        {"link": "memory"},
    ],
)
def test_what_changes_the_work_makes_it_another_setting(keep, other):
    folder = keep(planned(500), 7.0)
    known = estimate(planned(500, **other), folder)
    assert known.seconds is None
    assert known.unknown == {"reactive": 2}


@pytest.mark.parametrize(
    "blocks",
    [
        {"status": "out_of_memory"},
        {"duration_seconds": None},
        {"environment": {**environment(), "cpu": "another"}},
        {"environment": {**environment(), "cpu_count": 512}},
        {"environment": {**environment(), "cpu": None}},
        {"environment": None},
        {"environment": "x"},
        {"environment": {**environment(), "gpus": [["one"]]}, "model": {"device": "cuda:0"}},
        {"model": "x"},
        {"duration_seconds": float("nan")},
        {"duration_seconds": 10**400},
        {"duration_seconds": "7"},
        {"schema_version": 99},
        {"environment": {**environment(), "gpus": ["another"]}, "model": {"device": "cuda:0"}},
        {"spec": None},
    ],
)
def test_failures_and_results_of_other_machines_tell_no_time(keep, blocks):
    assert estimate(planned(500), keep(planned(500), 7.0, **blocks)).seconds is None


def test_a_run_on_gpus_that_are_here_counts(keep, monkeypatch):
    monkeypatch.setattr(run_estimates, "_gpu_names", lambda: {"one", "other"})
    blocks = {"environment": {**environment(), "gpus": ["one"]}, "model": {"device": "cuda:0"}}
    assert estimate(planned(500), keep(planned(500), 7.0, **blocks)).seconds == 14.0


def test_broken_files_and_a_folder_that_is_not_there_are_no_earlier_runs(tmp_path):
    for name, text in (("reactive_a.json", "{"), ("reactive_b.json", "[1]"), ("baseline_c.json", '{"spec": 3}')):
        (tmp_path / name).write_text(text)
    for folder in (tmp_path, tmp_path / "nothing"):
        assert estimate(planned(500), folder).seconds is None


def test_only_the_newest_results_are_read_where_there_are_too_many(keep, monkeypatch):
    folder = keep(planned(500, 1000), 7.0)
    (size,) = {len(path.read_text()) for path in folder.glob("*ctx500*")}
    monkeypatch.setattr(run_estimates, "MAX_BYTES_READ", 2 * size + size // 2)
    assert estimate(planned(500, 1000), folder).n_earlier == 2


# --- contexts that were not measured ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("context", "measured", "seconds"),
    [
        (1500, {1000: 10.0, 2000: 30.0}, 20.0),  # half way
        (4000, {1000: 10.0, 2000: 30.0}, 70.0),  # 20 s for each 1000 more; in proportion it would be 60
        (4000, {1000: 10.0, 2000: 12.0}, 24.0),  # on the line only 16; in proportion 24
        (500, {1000: 10.0, 2000: 12.0}, 9.0),  # on the line; in proportion only 5
        (500, {1000: 10.0, 2000: 30.0}, 5.0),  # on the line 0
        (3000, {1000: 10.0}, 30.0),
        (3000, {500: 1.0, 1000: 10.0, 2000: 30.0}, 50.0),  # the nearest two
    ],
)
def test_a_context_that_was_not_measured_is_scaled_as_documented(context, measured, seconds):
    assert scaled(context, measured) == pytest.approx(seconds)


@given(
    measured=st.dictionaries(st.integers(1, 10**6), st.floats(0.01, 1e5), min_size=1, max_size=5),
    context=st.integers(1, 10**6),
)
def test_a_scaled_time_is_positive_and_between_its_neighbours_where_it_has_two(measured, context):
    measured.pop(context, None)
    if not measured:
        return
    seconds = scaled(context, measured)
    shorter, longer = [c for c in measured if c < context], [c for c in measured if c > context]
    assert seconds > 0
    if shorter and longer:
        low, high = sorted((measured[max(shorter)], measured[min(longer)]))
        assert low * (1 - 1e-9) <= seconds <= high * (1 + 1e-9)


def test_the_estimate_says_how_many_runs_are_scaled(keep):
    known = estimate(planned(500, 1500), keep(planned(500, 1000, 2000), 7.0))
    assert (known.n_known, known.n_scaled, known.n_earlier) == (4, 2, 6)
    assert "2 of them are at contexts not measured there, and scaled." in describe_estimate(known)


# --- in words ---------------------------------------------------------------------------------------------------


def test_an_unknown_time_says_how_to_get_one(tmp_path):
    text = describe_estimate(estimate(planned(500), tmp_path))
    assert text.startswith(f"Time: unknown, as {tmp_path} holds no earlier run of these settings from this machine")
    assert "'num_runs: 1'" in text


def test_a_time_that_is_known_in_part_says_of_which_runs_it_is_not(keep):
    folder = keep(planned(500), 45.0)
    both = planned(500) + planned(500, cls=BaselineExperiment, mode="baseline")
    text = describe_estimate(estimate(both, folder))
    assert f"Time: about 2 min for 2 of 4 runs, from 2 earlier runs in {folder} on this machine." in text
    assert "No estimate for 2: baseline (2);" in text
    assert "Loading models and measuring quality come on top." in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "1 s"), (45.4, "45 s"), (89.4, "89 s"), (91, "2 min"), (5000, "83 min"), (12_000, "3 h 20 min")],
)
def test_a_duration_is_told_no_finer_than_it_is_known(seconds, text):
    assert duration_text(seconds) == text


def test_the_plan_adds_up_the_bytes_of_all_runs_and_names_the_largest(tmp_path):
    runs = planned(1000, 2000, max_new_tokens=1)  # 1000 and 2000 positions of 768 bytes, twice each
    stream = StringIO()
    print_plan(runs, Console(file=stream, width=200), estimate(runs, tmp_path))
    assert "4 runs of 1 experiment; KV cache at most 1.5 MiB at a time, 4.4 MiB over all runs." in stream.getvalue()
    assert re.search(r"^Time: unknown", stream.getvalue(), re.MULTILINE)
    unknown = plan(expand([BaselineExperiment(mode="baseline", model_name="./none")]), allow_network=False)
    stream = StringIO()
    print_plan(unknown, Console(file=stream, width=200))
    assert "9 runs of 1 experiment; KV cache: size not known before the run." in stream.getvalue()
    assert "Time" not in stream.getvalue()
