"""What is said while a sweep runs: the time left from what is known, and lines that never wrap."""

from __future__ import annotations

import io
import logging
import random
import statistics
import sys
import time
from dataclasses import replace

import pytest
from rich.console import Console

import progress
from config_schema import MODE_CLASSES
from metrics import RunResult
from progress import Bar, Lines, outcome
from run_specs import expand
from sweep_pace import Pace, TimeLeft, clock_text

TINY = "random:configs/models/tiny-llama.json"
OTHER = "random:configs/models/llama-3.1-8b.json"
EXACT = {"exact": True, "matches_baseline": None, "first_divergent_token": None}
APPROXIMATE = {"exact": False, "matches_baseline": None, "first_divergent_token": None}


def specs_of(*entries, **shared):
    """Runs of `(mode, keys)`, of 11 new tokens each."""
    shared = {"context_lengths": [100], "num_runs": 1, "max_new_tokens": 11, "warmup_runs": 0} | shared
    return expand([MODE_CLASSES[mode](mode=mode, **{"model_name": TINY} | shared | keys) for mode, keys in entries])


def finished_run(spec, ttft_ms=1000.0, tpot_ms=100.0, status="ok", **blocks):
    """A result of 11 tokens: with these figures the run took 1 s + 10 x 0.1 s = 2 s."""
    timing = {"n_tokens": 11, "ttft_ms": ttft_ms, "tpot_ms": tpot_ms, "e2e_ms": ttft_ms + 10 * tpot_ms}
    measured = {"timing": timing, "quality": dict(EXACT)} if status == "ok" else {"error": "full"}
    return RunResult(spec=spec.to_dict(), run_id=spec.run_id, status=status, **measured | blocks)


class Clock:
    """A clock that stands still until it is put forward."""

    def __init__(self):
        self.seconds = 0.0

    def __call__(self):
        return self.seconds


@pytest.fixture
def clock():
    return Clock()


# --- the time left ----------------------------------------------------------------------------------------------------


def test_nothing_is_promised_before_anything_is_known(clock):
    (spec,) = specs_of(("baseline", {}))
    pace = Pace([spec], clock)
    assert str(pace.left()) == "?"
    pace.started(spec)
    clock.seconds = 30.0
    assert str(pace.left()) == "?"


def test_repetitions_are_expected_to_take_what_their_strategy_took_at_that_context(clock):
    specs = specs_of(("baseline", {}), ("reactive", {}), context_lengths=[100, 200], num_runs=3)
    pace = Pace(specs, clock)
    ttft_ms = {("baseline", 100): 1e3, ("baseline", 200): 2e3, ("reactive", 100): 4e3, ("reactive", 200): 8e3}
    for spec in specs:
        if spec.repetition < 2:
            pace.started(spec)
            pace.finished(finished_run(spec, ttft_ms[spec.name, spec.context_length]))
    # One of each is left: (1 + 1) + (2 + 1) + (4 + 1) + (8 + 1) s.
    assert pace.left() == TimeLeft(19.0)
    assert str(pace.left()) == "0:19"


def test_the_mean_of_finished_runs_of_the_same_kind_is_what_counts(clock):
    specs = specs_of(("baseline", {}), num_runs=3)
    pace = Pace(specs, clock)
    for spec, ttft_ms in zip(specs[:2], (1000.0, 3000.0), strict=True):
        pace.started(spec)
        pace.finished(finished_run(spec, ttft_ms))
    assert pace.left() == TimeLeft(3.0)  # the mean of 1 + 1 and 3 + 1


def test_another_context_is_estimated_from_tokens_and_marked_as_rough(clock):
    near, far = specs_of(("baseline", {}), context_lengths=[100, 400])
    pace = Pace([near, far], clock)
    pace.started(near)
    pace.finished(finished_run(near))
    assert pace.left() == TimeLeft(5.0, rough=True)  # four times the prefill of 1 s, and 10 tokens of 0.1 s
    assert str(pace.left()) == "~0:05"


def test_the_same_strategy_elsewhere_counts_before_another_strategy(clock):
    runs = specs_of(("baseline", {}), ("reactive", {}), context_lengths=[100, 200])
    pace = Pace(runs, clock)
    for spec in runs:
        if spec.context_length == 100:
            pace.started(spec)
            pace.finished(finished_run(spec, ttft_ms=1000.0, tpot_ms=100.0 if spec.name == "baseline" else 500.0))
    assert pace.left() == TimeLeft((2.0 + 1.0) + (2.0 + 5.0), rough=True)


def test_an_unknown_model_makes_the_estimate_a_lower_bound(clock):
    specs = specs_of(("baseline", {"num_runs": 2}), ("baseline", {"name": "large", "model_name": OTHER}))
    pace = Pace(specs, clock)
    pace.started(specs[0])
    pace.finished(finished_run(specs[0]))
    assert str(pace.left()) == ">0:02"


def test_a_first_repetition_has_its_warm_ups(clock):
    first, second = specs_of(("baseline", {"warmup_runs": 2}), ("baseline", {"name": "cold", "warmup_runs": 0}))
    pace = Pace([first, second], clock)
    pace.started(second)
    pace.finished(finished_run(second))
    assert pace.left() == TimeLeft(4.0, rough=True)  # three prefills of 1 s, and 10 x 0.1 s


def test_the_run_under_way_is_estimated_from_its_own_tokens(clock):
    (spec,) = specs_of(("baseline", {}))
    pace = Pace([spec], clock)
    pace.started(spec)
    clock.seconds = 100.0
    pace.token(1)
    assert (pace.tokens_per_second(), str(pace.left())) == (None, "?")
    clock.seconds = 104.0
    pace.token(3)  # 2 s a token, 8 are left
    assert pace.tokens_per_second() == 0.5
    assert pace.left() == TimeLeft(16.0)


def test_during_prefill_the_estimate_counts_down_and_not_below_zero(clock):
    one, two = specs_of(("baseline", {}), num_runs=2)
    pace = Pace([one, two], clock)
    pace.started(one)
    pace.finished(finished_run(one))
    pace.started(two)
    clock.seconds = 0.5
    assert pace.left() == TimeLeft(1.5)
    clock.seconds = 60.0
    assert pace.left() == TimeLeft(0.0)


def test_a_failed_run_teaches_nothing_and_is_not_waited_for(clock):
    one, two = specs_of(("baseline", {}), num_runs=2)
    pace = Pace([one, two], clock)
    pace.started(one)
    pace.finished(finished_run(one, status="out_of_memory"))
    assert str(pace.left()) == "?"
    pace.finished(finished_run(two, status="error"))  # its model could not be loaded, so it never started
    assert pace.left() == TimeLeft(0.0)


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (7, "0:07"), (190, "3:10"), (3599.7, "1:00:00")])
def test_times_are_read_like_a_clock(seconds, text):
    assert clock_text(seconds) == text


# --- the line of a finished run ---------------------------------------------------------------------------------------


def result_of(mode="baseline", quality_asked=None, repetition=0, **blocks):
    spec = specs_of((mode, {"name": "[my] run", "quality": quality_asked}), num_runs=2)[repetition]
    return finished_run(spec, tpot_ms=12.34, **blocks)


START = "[my] run, 100 tokens, run 1: "


@pytest.mark.parametrize(
    ("blocks", "line"),
    [
        ({}, "12.3 ms/token"),
        ({"cache": {"hit_rate": 0.756}}, "12.3 ms/token, hit rate 76 %"),
        ({"timing": {"tpot_ms": None}}, "ok"),
        (
            {"quality": EXACT | {"matches_baseline": False, "first_divergent_token": 3}},
            "12.3 ms/token, tokens DIFFER from the baseline's",
        ),
        (
            {"quality": APPROXIMATE | {"matches_baseline": False, "first_divergent_token": 3}},
            "12.3 ms/token, tokens differ from number 3 on, approximate, KL not measured",
        ),
        ({"quality": APPROXIMATE | {"fidelity": {"kl_mean": 0.12}}}, "12.3 ms/token, approximate, KL 0.12 nats"),
        ({"status": "error", "error": "first\nsecond"}, "error: first"),
    ],
)
def test_the_line_of_a_finished_run_says_what_matters(blocks, line):
    assert outcome(result_of(**blocks)) == START + line


def test_an_approximate_run_whose_quality_is_asked_for_says_that_it_is_still_to_be_measured():
    asked = {"quality_asked": {"fidelity_tokens": 8}, "quality": APPROXIMATE}
    assert outcome(result_of(**asked)) == f"{START}12.3 ms/token, approximate, quality to be measured"
    assert outcome(result_of(repetition=1, **asked)) == "[my] run, 100 tokens, run 2: 12.3 ms/token, approximate"


# --- where it is shown ------------------------------------------------------------------------------------------------


def test_without_a_terminal_each_run_is_one_plain_line_on_stderr(capsys):
    one, two = specs_of(("baseline", {"name": "[my] run"}), num_runs=2)
    lines = Lines([one, two])
    for spec in (one, two):
        lines.started(spec)
        lines.finished(finished_run(spec, tpot_ms=100.0))
    assert capsys.readouterr() == (
        "",
        "[1/2] [my] run, 100 tokens, run 1: 100.0 ms/token; ETA 0:02\n"
        "[2/2] [my] run, 100 tokens, run 2: 100.0 ms/token\n",
    )


def test_verbose_lines_also_say_what_starts(capsys):
    (spec,) = specs_of(("baseline", {"quality": {"fidelity_tokens": 8}}))
    Lines([spec], verbose=True).started(spec)
    assert capsys.readouterr().err == "baseline, 100 tokens, run 1 starts; ETA ? + quality\n"


def terminal(monkeypatch, width):
    screen = io.StringIO()
    console = progress.Console(file=screen, force_terminal=True, color_system=None, width=width)
    monkeypatch.setattr(progress, "Console", lambda **options: console)
    return screen


@pytest.mark.parametrize("width", [80, 120])
def test_on_a_terminal_the_bar_shows_names_as_they_are_and_never_wraps(monkeypatch, width):
    screen = terminal(monkeypatch, width)
    name = "[my] run of a strategy with a name so long that nobody would want to read all of it on one line"
    one, two = specs_of(("baseline", {"name": name, "quality": {"fidelity_tokens": 8}}), num_runs=2)
    with progress.watch([one, two], quiet=False) as watcher:
        assert isinstance(watcher, Bar)
        watcher.loading("a model")
        watcher.started(one)
        watcher.token(3)
        drawn = watcher.progress.console.render_lines(watcher.progress.get_renderable(), pad=False)
        watcher.finished(finished_run(one))
    lines = ["".join(segment.text for segment in line) for line in drawn]
    assert len(lines) == 2
    assert all(len(line) <= width for line in lines)
    assert "0/2" in lines[0]
    assert lines[0].rstrip().endswith("ETA ? + quality")
    assert lines[1].startswith("[my] run of a strategy")
    assert lines[1].rstrip().endswith("…, 100 tokens, run 1: token 3 of 11")
    assert "1/2" in screen.getvalue()


def test_a_long_model_name_is_cut_while_it_is_loaded():
    bar = Bar(specs_of(("baseline", {})), progress.Console(file=io.StringIO(), width=80))
    bar.loading("an-organisation/" + "a-model " * 20)
    drawn = bar.progress.console.render_lines(bar.progress.get_renderable(), pad=False)
    assert len(drawn) == 2
    assert "".join(segment.text for segment in drawn[1]).rstrip().endswith("…")


def test_the_line_under_the_bar_follows_the_run(monkeypatch):
    one, two = specs_of(("reactive", {"selector": "quest", "attention_pages": 4}), num_runs=2)
    clock = Clock()
    bar = Bar([one, two], progress.Console(file=io.StringIO(), width=120))
    bar.pace = Pace([one, two], clock)
    bar.loading("a model")
    assert bar.line_of_run() == "loading a model"
    bar.started(one)
    assert bar.line_of_run() == "reactive, 100 tokens, run 1: prefill, approximate"
    bar.token(1, None)
    clock.seconds = 0.5
    bar.token(2, 0.615)
    line = "reactive, 100 tokens, run 1: token 2 of 11, 2.0 tokens/s, approximate"
    assert bar.line_of_run() == f"{line}, hit rate 62 %"
    bar.finished(finished_run(one, cache={"hit_rate": 0.62}))
    bar.started(two)
    assert bar.line_of_run() == "reactive, 100 tokens, run 2: prefill, approximate"
    assert bar.eta() == "ETA 0:02 + quality"
    bar.finished(finished_run(two))
    assert (bar.line_of_run(), bar.eta()) == ("measuring quality", "")


def test_where_there_is_no_room_a_figure_is_left_out_rather_than_cut(monkeypatch):
    (spec,) = specs_of(("reactive", {"name": "a rather long name", "selector": "quest", "attention_pages": 4}))
    clock = Clock()
    bar = Bar([spec], progress.Console(file=io.StringIO(), width=80))
    bar.pace = Pace([spec], clock)
    bar.started(spec)
    bar.token(1)
    clock.seconds = 0.5
    bar.token(2, 0.62)
    full = ", 100 tokens, run 1: token 2 of 11, 2.0 tokens/s, approximate"
    assert bar.line_of_run() == "a rather long name" + full
    bar.progress.console.width = 120
    assert bar.line_of_run() == f"a rather long name{full}, hit rate 62 %"


def test_log_lines_go_above_the_bar_and_afterwards_where_they_went_before(monkeypatch, logging_restored):
    screen = terminal(monkeypatch, 80)
    handler = logging.StreamHandler()
    logging.basicConfig(handlers=[handler], force=True)
    (spec,) = specs_of(("baseline", {}))
    with progress.watch([spec], quiet=False):
        logging.getLogger("test").warning("a word of warning")
    assert "a word of warning\n" in screen.getvalue()
    assert handler.stream is sys.stderr


def test_quiet_shows_nothing_on_any_stream(capsys):
    (spec,) = specs_of(("baseline", {}))
    with progress.watch([spec], quiet=True) as watcher:
        watcher.loading("a model")
        watcher.started(spec)
        watcher.token(1)
        watcher.finished(finished_run(spec))
    assert capsys.readouterr() == ("", "")


# --- long lists -------------------------------------------------------------------------------------------------------


def naive_left(to_come, finished):
    """The estimate from its definition: for each run to come the means of what is nearest among the finished."""
    seconds, rough, missing = 0.0, False, False
    for spec in to_come:
        cell = (spec.model_name, spec.name, spec.requested_context_length)
        near = next(
            (ends for depth in (3, 2, 1) if (ends := [e for e in finished if e[0][:depth] == cell[:depth]])), []
        )
        if not near:
            missing = True
            continue
        warmups = spec.warmup_runs if spec.repetition == 0 else 0
        if near[0][0] == cell:
            seconds += sum((1 + warmups) * ttft_ms + 10 * tpot_ms for _, ttft_ms, tpot_ms in near) / len(near) / 1000
            continue
        rough = True
        prefill = sum(ttft_ms / known[2] for known, ttft_ms, _ in near) / len(near)
        decode = sum(tpot_ms for _, _, tpot_ms in near) / len(near)
        seconds += ((1 + warmups) * spec.context_length * prefill + (spec.max_new_tokens - 1) * decode) / 1000
    return seconds, rough, missing


@pytest.mark.parametrize("seed", range(5))
def test_the_estimate_that_is_kept_up_to_date_is_the_one_made_anew(seed):
    chance = random.Random(seed)
    entries = [
        (mode, {"name": f"{mode}{number}", "model_name": model, "warmup_runs": number})
        for mode in ("baseline", "reactive")
        for number in range(2)
        for model in (TINY, OTHER)
    ]
    specs = specs_of(*entries, context_lengths=[100, 200], num_runs=3)
    chance.shuffle(specs)
    pace, finished = Pace(specs), []

    def end(spec):
        ttft_ms, tpot_ms = chance.uniform(1, 1e4), chance.uniform(1, 1e3)
        if chance.random() < 0.2:
            return finished_run(spec, status="error")
        finished.append(((spec.model_name, spec.name, spec.requested_context_length), ttft_ms, tpot_ms))
        return finished_run(spec, ttft_ms, tpot_ms)

    pace.resumed([end(spec) for spec in specs[:7]])
    for place, spec in enumerate(specs[7:], 8):
        if chance.random() < 0.8:  # the others could not even begin
            pace.started(spec)
        pace.finished(end(spec))
        seconds, rough, missing = naive_left(specs[place:], finished)
        left = pace.left()
        assert (left.rough, left.missing) == (rough, missing)
        assert left.seconds == pytest.approx(seconds)


def test_ten_thousand_strategies_are_resumed_at_once_and_followed_without_delay():
    (spec,) = specs_of(("baseline", {}))
    specs = [replace(spec, name=f"strategy {number}") for number in range(10_000)]
    results = [finished_run(one) for one in specs[:5_000]]
    started = time.perf_counter()
    pace = Pace(specs)
    pace.resumed(results)
    assert time.perf_counter() - started < 1.0
    assert pace.left() == TimeLeft(pytest.approx(10_000.0), rough=True)
    steps = []
    for one in specs[5_000:5_020]:
        for step, given in ((pace.started, one), (pace.finished, finished_run(one))):
            started = time.perf_counter()
            step(given)
            steps.append(time.perf_counter() - started)
    assert statistics.median(steps) < 0.005
    assert pace.left().seconds == pytest.approx(2 * 4_980)


def test_a_watcher_tells_its_pace_of_resumed_runs_all_at_once(monkeypatch):
    specs = specs_of(("baseline", {}), num_runs=3)
    sums = []
    watchers = [Lines(specs), Bar(specs, Console(file=io.StringIO()))]
    monkeypatch.setattr(Pace, "_sum", lambda self: sums.append(self) or TimeLeft())
    for watcher in watchers:
        watcher.resumed([finished_run(spec) for spec in specs], "three are there")
        assert watcher.n_finished == 3
    assert sums == [watcher.pace for watcher in watchers]


def test_a_failure_without_a_word_is_a_line_too():
    (spec,) = specs_of(("baseline", {}))
    assert outcome(finished_run(spec, status="crashed", error="")) == "baseline, 100 tokens, run 1: crashed: "
