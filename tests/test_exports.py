"""The exports say what the results say, row by row and step by step, and can be read by others."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from result_fixtures import make_failure, make_result, make_sweep, make_task, with_tasks, write_results

import exports
from result_frame import strategy_labels, to_frame

EVIL = '<script>alert("x")</script>, "quoted"\nand_more | 100 % \ud800'


def written(results, folder):
    exports.write_exports(results, to_frame(results), folder)
    return {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()}


def rows_of(text):
    return list(csv.DictReader(text.splitlines(keepends=True)))


def strict_lines(text):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


# --- rows -----------------------------------------------------------------------------------------------------------


def test_results_csv_has_a_row_for_each_run_and_an_empty_cell_where_nothing_was_measured(tmp_path):
    results = [*make_sweep(repetitions=1), make_failure(make_result("reactive", 2000), error="no memory")]
    rows = rows_of(written(results, tmp_path)["results.csv"])
    assert sorted(row["run_id"] for row in rows) == sorted(result["run_id"] for result in results)
    by_id = {row["run_id"]: row for row in rows}
    for result in results:
        row = by_id[result["run_id"]]
        assert row["status"] == result["status"]
        if result["status"] == "ok":
            assert float(row["tpot_ms"]) == result["timing"]["tpot_ms"]
            assert row["gpu_memory_mb"] == ""
        else:
            assert row["tpot_ms"] == ""
            assert row["error"] == "no memory"


def test_a_name_with_commas_quotes_and_lines_stays_one_cell(tmp_path):
    rows = rows_of(written([make_result("reactive", name=EVIL)], tmp_path)["results.csv"])
    assert [row["strategy"] for row in rows] == [EVIL.replace("\ud800", "?")]


def test_task_scores_are_written_where_there_are_tasks_and_only_there(tmp_path):
    asked = [with_tasks(make_result(), make_task([1, 0, 1, 1], [1, 1, 1, 1]))]
    (row,) = rows_of(written(asked, tmp_path)["task_scores.csv"])
    assert (row["task"], row["n"], row["score"], row["baseline_score"]) == ("passkey", "4", "0.75", "1.0")
    assert "task_scores.csv" not in written([make_result()], tmp_path)  # nor is the old one left


# --- steps ----------------------------------------------------------------------------------------------------------


def test_steps_are_those_of_the_results_in_order_with_the_run_they_are_of(tmp_path):
    results = make_sweep(contexts=(500,), repetitions=2)
    expected = [
        (label, result["run_id"], result["spec"]["context_length"], result["spec"]["repetition"], step)
        for label, result in zip(strategy_labels(results), results, strict=True)
        for step in result["steps"] or []
    ]
    lines = strict_lines(written(results, tmp_path)["steps.jsonl"])
    assert len(lines) == len(expected) == 2 * 2 * 11
    names = ("strategy", "run_id", "context_tokens", "repetition")
    assert [(*(line.pop(name) for name in names), line) for line in lines] == expected


def test_a_baseline_has_no_steps_and_leaves_no_file(tmp_path):
    (tmp_path / "steps.jsonl").write_text("of an earlier sweep\n")
    assert "steps.jsonl" not in written([make_result()], tmp_path)


def test_a_time_that_is_no_number_is_null_in_the_steps(tmp_path):
    result = make_result("reactive")
    result["steps"][3]["stall_ms"] = float("nan")
    result["steps"][4]["stall_ms"] = float("inf")
    lines = strict_lines(written([result], tmp_path)["steps.jsonl"])
    assert [lines[place]["stall_ms"] for place in (3, 4)] == [None, None]
    assert lines[3]["hits"] == 9


def test_steps_are_made_one_at_a_time():
    results = [make_result("reactive", repetition=number) for number in range(40)]
    for result in results:
        result["steps"] = result["steps"] * 100
    tracemalloc.start()
    size = sum(map(len, exports.step_lines(results)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size > 5_000_000
    assert peak < size / 10


def test_steps_are_written_as_they_are_made(tmp_path, monkeypatch):
    sizes = []

    def lines(results):
        for number in range(3000):
            yield f"{number:01000d}\n"
            sizes.extend(path.stat().st_size for path in tmp_path.glob(".steps*") if number == 2500)

    monkeypatch.setattr(exports, "step_lines", lines)
    exports.write_exports([], to_frame([]), tmp_path)
    assert sizes and sizes[0] > 2_000_000
    assert (tmp_path / "steps.jsonl").stat().st_size == 3000 * 1001


# --- files ----------------------------------------------------------------------------------------------------------


def test_tables_are_written_in_both_formats_with_every_strategy(tmp_path):
    files = written(make_sweep(repetitions=1), tmp_path)
    for name in ("tables.md", "tables.tex"):
        for strategy in ("baseline", "reactive", "predictive"):
            assert strategy in files[name]
    assert files["tables.tex"].count(r"\begin{longtable}") == files["tables.tex"].count(r"\toprule") // 2 > 3


@pytest.mark.parametrize("results", [[], [make_failure(make_result())]], ids=["no run", "no successful run"])
def test_there_may_be_no_successful_run(tmp_path, results):
    files = written(results, tmp_path)
    assert r"\end{document}" in files["tables.tex"]
    assert ("results.csv" in files) == bool(results)


def test_a_file_that_could_not_be_finished_leaves_the_old_one(tmp_path, monkeypatch):
    written([make_result("reactive")], tmp_path)
    before = (tmp_path / "steps.jsonl").read_text()

    def torn(results):
        yield "{}\n"
        raise OSError("the disk is full")

    monkeypatch.setattr(exports, "step_lines", torn)
    with pytest.raises(OSError, match="full"):
        written([make_result("reactive")], tmp_path)
    assert (tmp_path / "steps.jsonl").read_text() == before
    assert not list(tmp_path.glob(".*"))


def test_the_command_writes_them_for_a_folder(tmp_path, capsys):
    folder = write_results(tmp_path / "runs", make_sweep(contexts=(500,), repetitions=1))
    assert exports.main([str(folder)]) == 0
    names = [Path(line).name for line in capsys.readouterr().out.splitlines()]
    assert names == ["results.csv", "tables.md", "tables.tex", "steps.jsonl"]
    assert exports.main([str(tmp_path / "none")]) == 1
    assert "no results there" in capsys.readouterr().err


def test_asking_for_help_loads_no_pandas():
    program = "import exports, report_html, sys; sys.exit('pandas' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", program], cwd=Path(exports.__file__).parent, check=False).returncode == 0
    )
