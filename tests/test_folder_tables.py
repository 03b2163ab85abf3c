"""What `--compare` prints: within 80 columns, the digest before the figures, and nothing heavy loaded for it."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from pathlib import Path

import pytest
from result_fixtures import make_failure, make_result, make_sweep, with_fidelity, write_results
from rich.console import Console
from test_folder_comparison import compared, scaled

import main
from folder_comparison import METRICS, compare_folders
from folder_tables import (
    difference_table,
    digest_table,
    folder_tables,
    header,
    metric_table,
    print_comparison,
    unmatched_table,
)

PROJECT = Path(main.__file__).parent


def printed(folders, width=80, conditions=()):
    pipe = io.StringIO()
    print_comparison(folders, conditions, Console(width=width, file=pipe))
    return pipe.getvalue()


def test_a_metric_has_a_row_per_context_and_strategy_and_one_over_all_contexts(tmp_path):
    sweep = make_sweep()
    table = metric_table(compared(tmp_path, sweep, scaled(sweep, "tpot_ms", 1.2)), METRICS["tpot_ms"])
    modes = ("baseline", "reactive", "predictive")
    assert [row[:2] for row in table.rows] == [(c, m) for c in ("500", "1000", "all") for m in modes]
    assert table.rows[1] == ("500", "reactive", "3", "81.0", "97.2", "1.20", "1.20-1.20", "worse")
    assert table.rows[-1] == ("all", "predictive", "6", "—", "—", "1.20", "1.20-1.20", "worse")


def test_the_digest_counts_verdicts_without_the_rows_over_all_contexts(tmp_path):
    a = make_sweep()
    b = [make_failure(r) if r["spec"]["mode"] == "predictive" else r for r in scaled(a, "tpot_ms", 1.2)]
    table = digest_table(compared(tmp_path, a, b))
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["tpot_ms"] == ("0", "4", "0", "0", "2")  # worse; missing
    assert rows["ttft_ms"] == ("0", "0", "4", "0", "2")
    assert "leaves out 1 by chance alone in 25 of 100 cases" in table.caption
    assert "simulated link (simulated pcie3-x16, 15.75 GB/s)" in table.caption


@pytest.mark.parametrize(
    ("repetitions", "words"), [(1, None), (2, "in 50 of 100"), (5, "in 6 of 100"), (6, "in 5 to 12 of 100")]
)
def test_the_digest_says_what_its_verdicts_are_worth(tmp_path, repetitions, words):
    results = [make_result(repetition=r) for r in range(repetitions)]
    caption = digest_table(compared(tmp_path, results, results)).caption
    assert words in caption if words else "by chance" not in caption


def test_of_what_was_measured_once_one_pair_decides_and_the_caption_says_so(tmp_path):
    sides = [[with_fidelity(make_result("reactive"), kl_mean=kl)] for kl in (0.0004, 0.0002)]
    comparison = compared(tmp_path, *sides)
    assert metric_table(comparison, METRICS["kl_mean"]).rows == [
        ("500", "reactive", "1", "0.00040", "0.00020", "0.50", "—", "better")
    ]
    assert "One pair decides for device_kv_mb, host_kv_mb, kl_mean, top1_agreement" in digest_table(comparison).caption


def test_folders_that_differ_in_nothing_say_so(tmp_path):
    same = compared(tmp_path, make_sweep(), make_sweep())
    assert "Machine, versions, commit, links and settings are the same." in header(same)
    assert "18 pairs of runs" in header(same)
    assert difference_table(same).rows == [] and unmatched_table(same).rows == []


def awkward_folders(tmp_path):
    """Long names, large numbers, a failure, a torn file, other versions, and runs without a partner."""
    a = [*make_sweep((1000, 128_000)), make_result("reactive", 128_000, 7, name="another [bold] thing")]
    a += [
        make_result("reactive", 128_000, r, tpot_ms=12_345.6, name="reactive-with-a-remarkably-long-name")
        for r in (0, 1)
    ]
    b = [*copy.deepcopy(a[:-3] + a[-2:]), make_failure(make_result("predictive", 1000, 9))]
    for result in b:
        result["environment"] = {
            "cpu": "A processor of a very long name @ 2.00 GHz",
            "git_commit": "0123456789abcdef" * 2,
        }
    folders = write_results(tmp_path / "A", a), write_results(tmp_path / "B", b)
    (folders[1] / "baseline_torn.json").write_text("{")
    return folders


@pytest.mark.parametrize("width", [80, 120])
def test_the_tables_fit_and_cut_no_number(tmp_path, width):
    comparison = compared_folders(tmp_path)
    for table in folder_tables(comparison):
        pipe = io.StringIO()
        Console(width=width, file=pipe, markup=False).print(table.to_rich())
        text = pipe.getvalue()
        assert max(map(len, text.splitlines())) <= width, table.title
        assert "…" not in text
        words = set(text.split())
        for row in table.rows:
            wrapped = ("strategy", "verdict", "what differs", "in A", "in B", "why")
            numbers = {cell for heading, cell in zip(table.headings, row, strict=True) if heading not in wrapped}
            assert {word for number in numbers for word in number.split()} <= words, table.title


def compared_folders(tmp_path):
    return compare_folders(*awkward_folders(tmp_path))


def test_what_was_not_read_what_failed_and_what_has_no_partner_is_said(tmp_path):
    text = printed(awkward_folders(tmp_path))
    for words in (
        "not read: ",
        "baseline_torn.json",
        "1 of them failed",
        "another [bold] thing",
        "git commit",
        "not recorded",
    ):
        assert words in text, words
    assert text.index("B against A") < text.index("tpot_ms: decode latency")


def test_runs_of_a_folder_that_differ_much_are_warned_of(tmp_path):
    a, b = ([make_result(repetition=r, tpot_ms=t) for r, t in enumerate(times)] for times in ((100, 101), (100, 130)))
    said = header(compared(tmp_path, a, b))
    assert said.count("WARNING") == 1
    assert "runs of B differ by more than 10 %" in said and "baseline at 500 (26 %)" in said  # 30 / 115


def test_the_sample_compared_with_itself_is_1_everywhere_and_fits_80_columns():
    sample = PROJECT / "logs" / "sample"
    text = printed((sample, sample), conditions=("tpot_ms>0%", "tokens_per_second<0%", "kl_mean>0%"))
    assert "36 pairs of runs; the same tokens in 36 of 36" in text
    assert text.count(": passed") == 3
    assert {c.verdict for c in compare_folders(sample, sample).figures} == {"no difference shown"}
    assert (
        max(len(line) for line in text.split("\n\n", 1)[1].splitlines()) <= 80
    )  # below the header, which names folders


def test_comparing_imports_no_torch():
    probe = (
        "import sys, main\n"
        "assert main.main(['--compare', 'logs/sample', 'logs/sample']) == 0\n"
        "sys.exit(bool({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", probe], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
