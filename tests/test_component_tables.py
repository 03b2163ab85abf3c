"""The figures of one run: which rows there are, and that each holds the figure that its name promises."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console
from variant_fixtures import make_run

from component_tables import figures_table


def rows_of(*results):
    """The table's rows as it is printed, `name: value`."""
    console = Console(file=StringIO(), width=100)
    console.print(figures_table(results))
    cells = [[cell.strip() for cell in line.split("│")] for line in console.file.getvalue().splitlines()]
    return {row[1]: row[2] for row in cells if len(row) == 4}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("- selecting pages, ms per token", "6.00"),  # 60 ms over 10 decode steps
        ("- predicting pages, ms per token", "2.50"),  # 25 ms
        ("- waiting for pages, ms per token", "1.25"),
        ("- asking for copies, ms per token", "0.50"),
        ("- attention over pages, ms per token", "10.00"),
        ("hit rate, %", "90.00"),
        ("hit rate of plain LRU, %", "80.00"),
        ("hit rate of LRU with all slots, %", "92.00"),
        ("hits / late / misses", "900 / 40 / 60"),
        ("hits of LRU / beyond it", "780 / 120"),
        ("transfer hidden behind computing, %", "62.50"),
        ("prefetches on time / late / wasted / unused yet", "120 / 40 / 40 / 5"),
        ("guesses held back by the threshold", "1,234"),
        ("pollution, misses", "7"),
    ],
)
def test_a_row_holds_the_figure_that_it_names(name, value):
    assert rows_of(make_run())[name] == value


def test_repetitions_show_mean_and_spread():
    rows = rows_of(*(make_run(prefetch={"declined": declined}) for declined in (10, 14)))
    assert rows["guesses held back by the threshold"] == "12.00 ± 2.83"  # the square root of 8


def test_rows_of_prefetch_are_left_out_without_it():
    without = rows_of(make_run()).keys() - rows_of(make_run("reactive")).keys()
    assert without == {
        "- predicting pages, ms per token",
        "hits of LRU / beyond it",
        "prefetches issued",
        "prefetches on time / late / wasted / unused yet",
        "guesses held back by the threshold",
        "pollution, misses",
        "prediction accuracy, %",
        "prefetch coverage, %",
    }


@pytest.mark.parametrize(
    ("block", "figure", "row"),
    [
        ("cache", "shadow_lru_all_slots_hit_rate", "hit rate of LRU with all slots, %"),
        ("cache", "lru_hits", "hits of LRU / beyond it"),
        ("cache", "hidden_transfer_share", "transfer hidden behind computing, %"),
        ("prefetch", "declined", "guesses held back by the threshold"),
        ("prefetch", "pollution", "pollution, misses"),
    ],
)
def test_what_was_not_measured_has_no_row(block, figure, row):
    rows, others = rows_of(make_run(**{block: {figure: None}})), rows_of(make_run())
    assert others.keys() - rows.keys() == {row}


@pytest.mark.parametrize(("on_miss", "shown"), [("skip", "12.50"), ("wait", None)])
def test_skipped_accesses_have_a_row_where_they_may_be_skipped(on_miss, shown):
    run = make_run(paging={"on_miss": on_miss}, cache={"skipped": 125, "skipped_rate": 0.125})
    assert rows_of(run).get("skipped accesses, %") == shown
