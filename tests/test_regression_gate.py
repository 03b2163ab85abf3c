"""`--fail-if`: what is a condition, where it holds, and what is said where it cannot be judged."""

from __future__ import annotations

import itertools

import pytest
from result_fixtures import make_failure, make_result, make_sweep, with_fidelity, write_results
from test_folder_comparison import compared, runs, scaled

import main
from folder_comparison import METRICS, Folder, compare_folders, match
from regression_gate import judge, parse_condition


def outcome(tmp_path, a, b, text):
    return judge(parse_condition(text), compared(tmp_path, a, b))


@pytest.mark.parametrize("text", ["tpot_ms>5%", " tpot_ms > 5 % ", "tpot_ms>5.0%"])
def test_a_condition_is_a_metric_a_sign_and_a_percentage(text):
    condition = parse_condition(text)
    assert (condition.metric.name, condition.percent, str(condition)) == ("tpot_ms", 5.0, "tpot_ms>5%")
    assert condition.limit == pytest.approx(1.05)
    assert parse_condition("hit_rate<2%").limit == pytest.approx(0.98)


@pytest.mark.parametrize(
    "text", ["", "tpot_ms", "tpot_ms>5", "tpot_ms>=5%", "tpot_ms>-5%", "5%<tpot_ms", "tpot_ms>5%%", "a b>1%"]
)
def test_what_is_no_condition_gets_an_example_and_the_known_metrics(text):
    with pytest.raises(ValueError, match=r"no condition.*such as 'tpot_ms>5%'") as error:
        parse_condition(text)
    assert all(name in str(error.value) for name in METRICS)


def test_an_unknown_metric_is_named_with_the_nearest_one():
    with pytest.raises(ValueError, match="unknown metric 'tpot'; did you mean 'tpot_ms'") as error:
        parse_condition("tpot>5%")
    assert "tokens_per_second" in str(error.value)


@pytest.mark.parametrize(
    ("text", "right"), [("tpot_ms<5%", "tpot_ms>5%"), ("tokens_per_second>2.5%", "tokens_per_second<2.5%")]
)
def test_a_condition_that_would_fail_on_progress_is_refused(text, right):
    with pytest.raises(ValueError, match=f"would fail on progress.*write '{right}'"):
        parse_condition(text)


def test_nothing_is_more_than_100_percent_lower():
    with pytest.raises(ValueError, match="more than 100 % lower"):
        parse_condition("hit_rate<100%")
    assert parse_condition("tpot_ms>150%").limit == 2.5


@pytest.mark.parametrize(("text", "holds"), [("tpot_ms>5%", True), ("tpot_ms>9.9%", True), ("tpot_ms>15%", False)])
def test_10_percent_slower_is_more_than_5_and_not_more_than_15(tmp_path, text, holds):
    sweep = make_sweep()
    found = outcome(tmp_path, sweep, scaled(sweep, "tpot_ms", 1.1), text)
    assert found.passed is not holds
    assert (len(found.holds_at), found.n_judged) == (9 if holds else 0, 9)  # 3 strategies at 2 contexts and over all


def test_the_whole_interval_has_to_lie_beyond_the_margin(tmp_path):
    a = runs("baseline", (100.0, 100.0, 100.0))
    assert outcome(tmp_path / "1", a, runs("baseline", (104.0, 120.0, 130.0)), "tpot_ms>5%").passed
    assert not outcome(tmp_path / "2", a, runs("baseline", (106.0, 120.0, 130.0)), "tpot_ms>5%").passed


@pytest.mark.parametrize(
    ("metric", "factor", "passed"),
    [
        ("tokens_per_second", 0.9, False),
        ("tokens_per_second", 1.2, True),
        ("hit_rate", 0.97, False),
        ("hit_rate", 0.99, True),
    ],
)
def test_of_throughput_and_hits_less_is_worse(tmp_path, metric, factor, passed):
    sweep = make_sweep(contexts=(500,))
    assert outcome(tmp_path, sweep, scaled(sweep, metric, factor), f"{metric}<2%").passed is passed


def test_what_was_measured_once_decides_alone(tmp_path):
    a, b = ([with_fidelity(make_result("reactive"), kl_mean=kl)] for kl in (0.1, 0.12))
    found = outcome(tmp_path, a, b, "kl_mean>10%")
    assert found.holds_at == ("reactive at 500: B / A = 1.20, above 1.1",)


def test_a_figure_that_b_lost_fails_the_condition_and_one_that_b_gained_does_not(tmp_path):
    good = runs("reactive", (80.0, 80.0))
    failed = [make_failure(result) for result in good]
    lost = outcome(tmp_path / "2", good, failed, "tpot_ms>5%")
    assert (lost.passed, lost.lost) == (False, ("reactive at 500: B has none of A's 2 values of tpot_ms",))
    assert (lost.n_judged, lost.not_judged) == (0, ())
    gained = outcome(
        tmp_path / "3", runs("baseline", (1.0, 1.0)) + failed, runs("baseline", (1.0, 1.0)) + good, "tpot_ms>5%"
    )
    assert (gained.passed, gained.not_judged) == (True, ("reactive at 500: missing in A",))


def test_a_strategy_that_b_lost_fails_any_condition(tmp_path):
    sweep = make_sweep(contexts=(500,))
    found = outcome(tmp_path, sweep, [r for r in sweep if r["spec"]["mode"] != "reactive"], "tpot_ms>5%")
    assert (found.passed, found.holds_at, found.n_judged) == (False, (), 2)
    assert found.lost == ("reactive at 500, repetitions 0, 1, 2: no such run in B",)
    assert outcome(tmp_path / "gained", sweep[:1] + sweep[3:4], sweep, "tpot_ms>5%").passed


def test_a_file_of_b_that_cannot_be_read_fails_any_condition(tmp_path):
    folders = [write_results(tmp_path / side, make_sweep(contexts=(500,))) for side in "AB"]
    (folders[1] / "reactive_torn.json").write_text("{")
    found = judge(parse_condition("tpot_ms>5%"), compare_folders(*folders))
    assert (found.passed, found.n_judged) == (False, 3)
    assert (
        len(found.lost) == 1 and found.lost[0].startswith("not read in B: ") and "reactive_torn.json" in found.lost[0]
    )
    assert judge(parse_condition("tpot_ms>5%"), compare_folders(*folders[::-1])).passed


@pytest.mark.parametrize("text", ["tpot_ms>5%", "speedup<5%"])
def test_a_repetition_that_failed_in_b_alone_fails_the_condition(tmp_path, text):
    sweep = make_sweep(contexts=(500,), repetitions=4)
    torn = [make_failure(r) if r["run_id"] == "reac-reactive-500-2" else r for r in sweep]
    found = outcome(tmp_path / "lost", sweep, torn, text)
    assert found.lost == (f"reactive at 500: B has 3 of A's 4 values of {text[:-3]}",)
    assert not found.passed and not found.holds_at
    assert outcome(tmp_path / "both", torn, torn, text).passed
    assert outcome(tmp_path / "gained", torn, sweep, text).passed


@pytest.mark.parametrize("n", [2, 3, 5])
def test_at_no_margin_noise_alone_trips_one_in_two_to_the_n(n):
    tripped = 0
    for signs in itertools.product((0.9, 1.1), repeat=n):  # all equally likely where nothing differs
        sides = (Folder(None, runs("baseline", times), []) for times in ([100.0] * n, [100.0 * s for s in signs]))
        tripped += not judge(parse_condition("tpot_ms>0%"), match(*sides)).passed
    assert tripped == 1


def test_a_condition_that_judged_nothing_has_not_passed(tmp_path):
    single = outcome(tmp_path / "1", [make_result()], [make_result()], "tpot_ms>5%")
    assert (single.passed, single.not_judged) == (False, ("baseline at 500: too few runs",))
    assert not outcome(tmp_path / "2", make_sweep(), make_sweep(), "energy_j>5%").passed


# --- the command --------------------------------------------------------------------------------------------------


def command(capsys, *arguments):
    code = main.main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


@pytest.fixture
def slower(tmp_path):
    sweep = make_sweep()
    return write_results(tmp_path / "A", sweep), write_results(tmp_path / "B", scaled(sweep, "tpot_ms", 1.1))


def test_the_command_exits_1_where_a_condition_holds_and_names_it(slower, capsys):
    code, out, _ = command(capsys, "--compare", *slower, "--fail-if", "ttft_ms>5%", "--fail-if", "tpot_ms>5%")
    assert code == 1
    assert "--fail-if ttft_ms>5%: passed (9 figures judged)" in out
    assert (
        "--fail-if tpot_ms>5%: FAILED (9 figures judged)\n  baseline at 500: B / A = 1.10 [1.10-1.10], above 1.05"
        in out
    )


def test_the_command_exits_1_and_says_what_is_lost(slower, capsys):
    (slower[1] / "reactive_reac-reactive-500-1.json").write_text("{")
    code, out, _ = command(capsys, "--compare", *slower, "--fail-if", "tpot_ms>15%")
    assert code == 1
    assert "--fail-if tpot_ms>15%: FAILED" in out
    assert "  lost: reactive at 500, repetition 1: no such run in B\n  lost: not read in B: " in out


def test_the_command_exits_0_where_none_holds(slower, capsys):
    assert command(capsys, "--compare", *slower, "--fail-if", "tpot_ms>15%")[0] == 0
    assert command(capsys, "--compare", *slower)[0] == 0


def test_a_wrong_condition_or_folder_exits_2_before_anything_is_printed(slower, capsys, tmp_path):
    for arguments, message in (
        (("--compare", *slower, "--fail-if", "speed>5%"), "unknown metric 'speed'"),
        (("--compare", slower[0], tmp_path / "gone"), "gone: no such folder"),
        (("--fail-if", "tpot_ms>5%"), "name them with --compare A B"),
    ):
        code, out, err = command(capsys, *arguments)
        assert (code, out) == (2, "")
        assert message in err
