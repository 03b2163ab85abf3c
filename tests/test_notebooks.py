"""The notebook runs from its first cell to its last on a folder of results, and is stored clean.

The folder is made up by `result_fixtures`; its figures are no measurements.
"""

from __future__ import annotations

from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient
from result_fixtures import make_failure, make_result, make_sweep, write_results

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
TOUR = NOTEBOOKS / "results_tour.ipynb"


def cells_of(notebook):
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def run_tour(results_folder, monkeypatch):
    monkeypatch.setenv("KV_RESULTS", str(results_folder))
    notebook = nbformat.read(TOUR, as_version=4)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(NOTEBOOKS)}}).execute()
    return notebook


def outputs_of(notebook, mime_type):
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return [output.data[mime_type] for output in outputs if mime_type in output.get("data", {})]


@pytest.mark.timeout(180)
def test_the_tour_shows_tables_and_figures_of_a_results_folder(tmp_path, monkeypatch):
    failure = make_failure(make_result("reactive", repetition=3))
    notebook = run_tour(write_results(tmp_path, [*make_sweep(), failure]), monkeypatch)
    assert len(outputs_of(notebook, "image/png")) == 4  # comparison, tokens, layers, prefetch steps
    (tables,) = outputs_of(notebook, "text/markdown")
    assert "| predictive | 6 | 51.0 ± 1.0 |" in tables
    assert "CUDA out of memory" in tables


def test_the_notebook_and_its_script_are_in_step():
    assert cells_of(nbformat.read(TOUR, as_version=4)) == cells_of(jupytext.read(TOUR.with_suffix(".py")))


def test_the_notebook_is_stored_without_outputs():
    for cell in nbformat.read(TOUR, as_version=4).cells:
        assert cell.cell_type != "code" or (cell.outputs == [] and cell.execution_count is None)
