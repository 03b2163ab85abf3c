"""The notebooks run from their first cell to their last, and are stored clean, each beside the same as plain text.

The tour is run on the sample that comes with the project, and on a folder made up by `result_fixtures`, whose figures
are no measurements. The lesson is run with its tiny model of random weights.
"""

from __future__ import annotations

from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient
from result_fixtures import make_failure, make_result, make_sweep, write_results

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
NAMES = ("results_tour", "your_own_parts")


def stored(name):
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


def cells_of(notebook):
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def run_through(name):
    notebook = stored(name)
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(NOTEBOOKS)}}).execute()
    return notebook


def outputs_of(notebook, mime_type):
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return [output.data[mime_type] for output in outputs if mime_type in output.get("data", {})]


def said_by(notebook):
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(output.text for output in outputs if output.output_type == "stream")


def complete(results):
    """Results whose steps have what those of real runs have."""
    for result in results:
        for step in result["steps"] or []:
            step |= {"stall_ms": 0.5, "evictions": 2, "must_move": 2, "lru_hits": 8}
    return results


@pytest.mark.timeout(240)
def test_the_tour_shows_tables_and_figures_of_a_results_folder(tmp_path, monkeypatch):
    results = complete([*make_sweep(), make_failure(make_result("reactive", repetition=3))])
    monkeypatch.setenv("KV_RESULTS", str(write_results(tmp_path, results)))
    notebook = run_through("results_tour")
    # Comparison, tokens, steps of the two that page, hits and stall, layers: nothing of quality, which was not asked.
    assert len(outputs_of(notebook, "image/png")) == 6
    (tables,) = outputs_of(notebook, "text/markdown")
    assert "| predictive | 6 | 51.0 ± 1.0 |" in tables
    assert "CUDA out of memory" in tables
    assert "no run of this folder had its quality measured" in said_by(notebook)
    assert "no tasks were asked" in said_by(notebook)


@pytest.mark.timeout(240)
def test_the_tour_shows_all_of_the_sample(monkeypatch):
    monkeypatch.delenv("KV_RESULTS", raising=False)
    notebook = run_through("results_tour")
    assert "36 runs, 36 of them successful" in said_by(notebook)
    assert len(outputs_of(notebook, "image/png")) == 9  # quality and a task as well, and a third strategy that pages


@pytest.mark.timeout(240)
def test_the_lesson_runs_its_own_parts_beside_the_built_in_ones(monkeypatch):
    monkeypatch.delenv("KV_MODEL", raising=False)
    notebook = run_through("your_own_parts")
    assert "12 runs in" in said_by(notebook)
    tables = outputs_of(notebook, "text/plain")
    for own in ("LRU-2", "ball", "neighbours, every guess"):
        assert any(own in table for table in tables)
    assert len(outputs_of(notebook, "image/png")) == 3
    for verdict in ("every victim as looked up", "above the largest logit"):
        assert verdict in said_by(notebook)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_and_its_script_are_in_step(name):
    assert cells_of(stored(name)) == cells_of(jupytext.read(NOTEBOOKS / f"{name}.py"))


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_stored_without_outputs(name):
    for cell in stored(name).cells:
        assert cell.cell_type != "code" or (cell.outputs == [] and cell.execution_count is None)


def test_every_notebook_is_tested():
    assert (
        {path.stem for path in NOTEBOOKS.glob("*.ipynb")}
        == {path.stem for path in NOTEBOOKS.glob("*.py")}
        == set(NAMES)
    )
