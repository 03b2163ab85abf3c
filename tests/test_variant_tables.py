"""Variants of a run side by side: the order of rows, the figures in them, and what the caption makes of the tokens."""

from __future__ import annotations

from io import StringIO

import pytest
from hypothesis import given
from hypothesis import strategies as st
from result_fixtures import MIB
from rich.console import Console
from variant_fixtures import make_run

from variant_tables import POLICIES_COMPARED, PREDICTORS_COMPARED, short, signed, variants_table

DASH = "\N{EM DASH}"


def printed(comparison, results, width=80, **how):
    console = Console(file=StringIO(), width=width, highlight=False, markup=False)
    console.print(variants_table(comparison, results, **how))
    return console.file.getvalue()


def rows_of(text, names):
    """The cells of each row, by name, in the order of the table."""
    return {cells[0]: cells[1:] for cells in map(str.split, text.splitlines()) if cells and cells[0] in names}


def words(text):
    """The text without its line breaks."""
    return " ".join(text.split())


def with_hit_rates(**rates):
    return {name: [make_run(cache={"hit_rate": rate})] for name, rate in rates.items()}


# --- cells --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (0.0, "0.0"),
        (0.06, "0.06"),
        (0.994, "0.99"),
        (0.996, "1.0"),
        (42, "42"),
        (4.25, "4.2"),
        (99.94, "99.9"),
        (99.96, "100"),
        (100.0, "100"),
        (9999, "9999"),
        (9999.4, "9999"),
        (9999.6, "10.0k"),
        (12345, "12.3k"),
        (123456, "123k"),
        (999499, "999k"),
        (999500, "1.0M"),
        (12_345_678, "12.3M"),
    ],
)
def test_a_number_is_cut_to_the_digits_that_say_most(number, text):
    assert short(number) == text


@given(st.one_of(st.integers(0, 10**12), st.floats(0, 1e12)))
def test_a_short_number_has_five_characters_at_most_and_is_the_number_nearly(number):
    text = short(number)
    assert len(text) <= 5
    scale = {"k": 1e3, "M": 1e6, "G": 1e9}.get(text[-1], 1)
    assert abs(float(text.rstrip("kMG")) * scale - number) <= max(0.0051, 0.051 * number)


@pytest.mark.parametrize(
    ("number", "text"), [(4.24, "+4.2"), (-0.31, "-0.3"), (-0.04, "+0.0"), (100.0, "+100"), (-99.96, "-100")]
)
def test_a_difference_says_its_sign_unless_it_is_none(number, text):
    assert signed(number) == text


# --- predictors ---------------------------------------------------------------------------------------------


def test_a_row_of_a_predictor_holds_the_figures_of_its_headings():
    (row,) = rows_of(printed(PREDICTORS_COMPARED, {"ema": [make_run()]}), {"ema"}).values()
    assert row == [
        "90.0",  # hit rate
        "12.0",  # 120 prefetched hits of 1,000 accesses
        "+10.0",  # over LRU of the same size
        "-2.0",  # over LRU with the staging slots
        *("80.0", "64.0", "75.0"),  # accuracy, coverage, timeliness
        "200",  # issued
        "3.0",  # MiB wasted
        "12.5",  # ms stall
        "50.0",  # ms per token
        "2.5",  # 25 ms of prediction over 10 tokens
    ]


def test_reactive_paging_is_on_top_the_bound_at_the_bottom_and_the_rest_by_hit_rate():
    rates = {"oracle": 0.7, "ema": 0.8, "none": 0.75, "random": 0.76, "ranked": 0.99, "layer_ahead": 0.85}
    rows = rows_of(printed(PREDICTORS_COMPARED, with_hit_rates(**rates)), rates)
    assert list(rows) == ["none", "ranked", "layer_ahead", "ema", "random", "oracle"]


def test_an_oracle_with_parameters_is_a_bound_too():
    results = {"oracle (depth=2)": [make_run(cache={"hit_rate": 0.99})]} | with_hit_rates(ema=0.5)
    text = printed(PREDICTORS_COMPARED, results, width=100)
    assert text.index("ema") < text.index("oracle (dep")


def test_figures_of_repetitions_are_means():
    runs = [make_run(cache={"hit_rate": rate}, prefetch={"issued": issued}) for rate, issued in ((0.8, 10), (0.9, 13))]
    text = printed(PREDICTORS_COMPARED, {"ema": runs})
    row = rows_of(text, {"ema"})["ema"]
    assert "means of 2 runs" in words(text)
    assert (row[0], row[7]) == ("85.0", "11.5")


def test_a_figure_that_is_missing_in_one_repetition_is_the_mean_of_the_others():
    runs = [make_run(prefetch={"accuracy": accuracy}) for accuracy in (None, 0.5, 0.7)]
    assert rows_of(printed(PREDICTORS_COMPARED, {"ema": runs}), {"ema"})["ema"][4] == "60.0"


def test_what_was_not_measured_is_a_dash():
    gone = dict.fromkeys(("hits_beyond_lru", "gain_over_lru_all_slots", "stages"))
    run = make_run(cache=gone | {"stages": {}}, prefetch={"accuracy": None, "timeliness": None})
    row = rows_of(printed(PREDICTORS_COMPARED, {"none": [run]}), {"none"})["none"]
    assert [place for place, cell in enumerate(row) if cell == DASH] == [1, 3, 4, 6, 11]


def test_the_widest_figures_fit_a_screen_of_80_characters_uncut():
    large = {"hit_rate": 1.0, "accesses": 10**7, "hits": 10**7, "hits_beyond_lru": 10**7, "stall_ms": 123456.0}
    large |= {"gain_over_lru": -0.999, "gain_over_lru_all_slots": 0.999, "stages": {"predict_ms": 987654.0}}
    prefetch = {"accuracy": 1.0, "coverage": 1.0, "timeliness": 1.0, "issued": 123456, "wasted_bytes": 12345 * MIB}
    names = ("none", "layer_ahead", "cross_layer", "my_own_parts:WithALongName (smoothing=0.25)")
    results = {name: [make_run(cache=large, prefetch=prefetch)] for name in names}
    text = printed(PREDICTORS_COMPARED, results)
    assert max(map(len, text.splitlines())) <= 80
    wide = ["100", "100", "-99.9", "+99.9", "100", "100", "100", "123k", "12.3k", "123k", "50.0", "98.8k"]
    rows = [line for line in text.splitlines() if line.split()[-12:] == wide]
    assert [row.split()[0] for row in rows[:3]] == ["none", "layer_ahead", "cross_layer"]
    assert len(rows) == 4
    assert all(name[:11] in text for name in names)


def test_the_caption_says_what_was_read_and_what_plain_lru_would_have_hit():
    text = words(printed(PREDICTORS_COMPARED, with_hit_rates(none=0.8, ema=0.9)))
    assert "Attention reads 17 of 65 pages a step: selector quest. Link: simulated pcie3-x16, 15.75 GB/s." in text
    assert (
        "plain LRU of the same size would have hit 80.0 %, one with the staging slots on top would have hit 92.0 %"
        in text
    )
    assert "oracle" not in text


def test_lru_rates_that_differ_are_given_from_the_least_to_the_largest():
    runs = [make_run(cache={"shadow_lru_hit_rate": rate}) for rate in (0.8, 0.75, 0.77)]
    text = words(printed(PREDICTORS_COMPARED, {"none": runs[:1], "ema": runs[1:]}))
    assert "would have hit 75.0 to 80.0 %" in text


def test_the_bound_is_explained_where_there_is_one():
    text = words(printed(PREDICTORS_COMPARED, with_hit_rates(none=0.8, oracle=0.9)))
    assert "oracle knows what will be asked for: the bound for this prefetch_k" in text


def test_a_predictor_that_cannot_be_run_is_named_with_the_reason():
    text = words(printed(PREDICTORS_COMPARED, with_hit_rates(none=0.8), left_out={"cross_layer": "no [digests]"}))
    assert "Left out: cross_layer (no [digests])." in text


@pytest.mark.parametrize("chose_quest", [True, False])
def test_why_quest_was_taken_is_said_where_nobody_chose_it(chose_quest):
    text = words(printed(PREDICTORS_COMPARED, with_hit_rates(none=0.8), chose_quest=chose_quest))
    assert ("layer_ahead is always right; so quest was taken" in text) == chose_quest


# --- the law ------------------------------------------------------------------------------------------------

BOTH = pytest.mark.parametrize(
    ("comparison", "first", "other"), [(PREDICTORS_COMPARED, "none", "ema"), (POLICIES_COMPARED, "lru", "fifo")]
)


@BOTH
def test_the_same_tokens_are_said_to_be_the_same(comparison, first, other):
    text = words(printed(comparison, with_hit_rates(**{first: 0.5, other: 0.6})))
    assert f"All {comparison.plural} gave the same tokens, as they must" in text
    assert "WRONG" not in text


@BOTH
def test_other_tokens_in_any_repetition_are_shouted(comparison, first, other):
    results = {first: [make_run(), make_run()], other: [make_run(), make_run(tokens=(5, 6, 8))]}
    text = words(printed(comparison, results))
    assert f"WRONG: NOT THE SAME TOKENS FROM {other} AS FROM {first}. This is a fault." in text
    assert "gave the same tokens" not in text


@BOTH
@pytest.mark.parametrize(
    ("tokens", "differ"), [((5, 6, 7), "here they do not."), ((5, 9, 7), "here they do: {other} from {first}.")]
)
def test_other_tokens_are_no_fault_where_pages_may_be_skipped(comparison, first, other, tokens, differ):
    skipping = {"paging": {"on_miss": "skip"}, "cache": {"skipped_rate": 0.125}}
    text = words(printed(comparison, {first: [make_run(**skipping)], other: [make_run(tokens=tokens, **skipping)]}))
    assert "left out (on_miss: skip), 12.5 % of what was asked for. So tokens may differ" in text
    assert differ.format(first=first, other=other) in text
    assert "WRONG" not in text
    assert "gave the same tokens" not in text


# --- policies -----------------------------------------------------------------------------------------------


def test_a_row_of_a_policy_holds_the_figures_of_its_headings():
    run = make_run("reactive", quality={"matches_baseline": False, "first_divergent_token": 4})
    (row,) = rows_of(printed(POLICIES_COMPARED, {"lru": [run]}), {"lru"}).values()
    assert row == ["90.00", "80.00", "60", "55", "7.00", "12.50", "50.00", "token", "4"]


def test_policies_stand_in_the_order_of_their_hit_rates():
    rates = {"lru": 0.5, "fifo": 0.4, "mru": 0.7}
    assert list(rows_of(printed(POLICIES_COMPARED, with_hit_rates(**rates)), rates)) == ["mru", "lru", "fifo"]


def test_repetitions_that_diverge_from_hfs_in_other_places_name_both():
    never = make_run("reactive")
    once = make_run("reactive", quality={"matches_baseline": False, "first_divergent_token": 4})
    assert "never, token 4" in words(printed(POLICIES_COMPARED, {"lru": [never, once]}, width=120))


def test_where_a_screen_of_80_characters_is_too_narrow_for_policies_a_name_wraps_and_no_number_does():
    large = {"misses": 123_456, "evictions": 123_456, "h2d_bytes": 12345 * MIB, "stall_ms": 12345.6, "hit_rate": 1.0}
    text = printed(POLICIES_COMPARED, {"attention": [make_run("reactive", cache=large)]})
    assert max(map(len, text.splitlines())) <= 80
    (row,) = (line.split() for line in text.splitlines() if line.startswith("atten"))
    assert row[1:] == ["100.00", "80.00", "123,456", "123,456", "12,345.00", "12,345.60", "50.00", "never"]
