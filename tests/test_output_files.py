"""Pictures of a run: each kind hands what the run recorded, a title and the place it was given to what draws it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from variant_fixtures import make_run

from experiments import MODE_CLASSES
from output_files import DRAWINGS, drawings_of, title_of

BY_NAME = {drawing.name: drawing for drawing in DRAWINGS}
SPANS = [{"name": "attend"}, {"name": "copy"}]


def test_a_trace_gets_the_spans_of_the_run_and_what_was_run_as_its_title(monkeypatch):
    written = []
    monkeypatch.setitem(sys.modules, "timeline", SimpleNamespace(write_chrome_trace=lambda *how: written.append(how)))
    run, path = make_run(cache={"timeline": SPANS}), Path("trace.json")
    assert BY_NAME["trace"].draw(run, path) == [path]
    assert written == [(path, SPANS, title_of(run))]


def test_plots_get_the_result_as_it_is_written_and_give_their_files(monkeypatch):
    def draw(result, folder):
        assert result == run.to_dict()
        return [folder / "a.png", folder / "b.png"]

    run = make_run(cache={"timeline": SPANS})
    monkeypatch.setitem(sys.modules, "prefetch_plots", SimpleNamespace(draw_prefetch_plots=draw))
    assert BY_NAME["plots"].draw(run, Path("plots")) == [Path("plots/a.png"), Path("plots/b.png")]


def test_a_title_says_what_was_read_kept_and_predicted():
    kept = "tiny, 500 tokens in pages of 128: quest attends to 17 of 65 pages, lru keeps 4 on the device"
    assert title_of(make_run("reactive")) == kept
    assert title_of(make_run()) == f"{kept}, layer_ahead copies ahead"


def test_plots_are_of_prefetch_and_the_others_of_any_paging():
    assert [drawing.flag for drawing in drawings_of("reactive")] == ["--heat-map", "--trace"]
    assert [drawing.flag for drawing in drawings_of("predictive")] == ["--heat-map", "--trace", "--plots"]


@pytest.mark.parametrize("drawing", DRAWINGS, ids=lambda drawing: drawing.name)
def test_what_a_picture_needs_is_a_switch_of_its_modes_that_is_off(drawing):
    for mode in drawing.modes:
        assert MODE_CLASSES[mode].model_fields[drawing.needs].default is False
