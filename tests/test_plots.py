"""Figures: a panel for each answer, honest axes, and the same colours everywhere."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from result_fixtures import PAGED, make_failure, make_result, make_sweep, write_results

import plots
import run_plots
from result_frame import to_frame

MODES = ["baseline", "reactive", "predictive"]


def png_size(path: Path) -> tuple[int, int]:
    """Width and height from the header that every PNG begins with (https://www.w3.org/TR/png/#11IHDR)."""
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(header[16:20], "big"), int.from_bytes(header[20:24], "big")


def panel_titles(results):
    figure = plots.comparison_figure(to_frame(results))
    return [axis.get_title(loc="left") for axis in figure.axes if axis.axison]


def test_the_plot_is_a_png_large_enough_to_read(tmp_path):
    path = tmp_path / "plot.png"
    path.write_bytes(plots.to_png(plots.comparison_figure(to_frame(make_sweep()))))
    width, height = png_size(path)
    assert 1200 <= width <= 4000
    assert 600 <= height <= 3000
    assert path.stat().st_size > 20_000


def test_the_plot_has_a_panel_for_each_question_that_was_answered():
    assert len(panel_titles(make_sweep())) == 6
    assert panel_titles([make_result()]) == ["Decode latency", "KV cache on the device, staging included"]


def test_the_plot_takes_eight_strategies_one_context_and_failures(tmp_path):
    results = [make_result()] + [make_result("reactive", name=f"budget {n} pages", tpot_ms=90.0 + n) for n in range(7)]
    results[3] = make_failure(results[3])
    figure = plots.comparison_figure(to_frame(results))
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(names) == 9
    assert names[-1] == "no run succeeded"
    (tmp_path / "plot.png").write_bytes(plots.to_png(figure))
    png_size(tmp_path / "plot.png")


def test_bars_stand_on_zero_also_when_every_strategy_is_slower():
    slower = [make_result("reactive", tpot_ms=150.0), make_result("predictive", tpot_ms=120.0)]
    figure = plots.comparison_figure(to_frame([make_result(), *slower]))
    for axis in (axis for axis in figure.axes if axis.axison):
        low, high = axis.get_ylim()
        assert low <= 0.0 < high


def test_a_strategy_keeps_its_colour_from_panel_to_panel_and_from_plot_to_plot():
    colours = plots.strategy_styles(["baseline", "reactive", "predictive"])
    assert len({style["color"] for style in colours.values()}) == 3
    figure = run_plots.latency_trace_figure([make_failure(make_result()), make_result("reactive")])
    (line,) = figure.axes[0].get_lines()
    assert line.get_color() == colours["reactive"]["color"]


def test_where_no_run_succeeded_there_is_no_plot():
    with pytest.raises(ValueError, match="no successful run"):
        plots.comparison_figure(to_frame([make_failure(make_result())]))


def test_every_figure_of_a_simulated_link_says_so():
    results = [make_result(), make_result("predictive")]
    for figure in (
        run_plots.latency_trace_figure(results),
        run_plots.step_figure("predictive", results[1]),
    ):
        assert "simulated pcie3-x16, 15.75 GB/s" in figure.axes[0].get_title(loc="left").replace("\n", " ")
    (_, words) = plots.comparison_figure(to_frame(results)).texts
    assert "simulated pcie3-x16, 15.75 GB/s" in words.get_text().replace("\n", " ")
    assert "link" not in run_plots.latency_trace_figure(results[:1]).axes[0].get_title(loc="left")


def test_traces_show_the_first_run_at_the_longest_context():
    runs = run_plots.longest_runs(make_sweep())
    assert {name: (run["spec"]["context_length"], run["spec"]["repetition"]) for name, run in runs.items()} == {
        mode: (1000, 0) for mode in ("baseline", "reactive", "predictive")
    }


def test_drawing_leaves_pyplot_alone(tmp_path):
    folder = Path(plots.__file__).parent
    write_results(tmp_path, [make_result(), make_result("reactive")])
    probe = (
        "import sys, plot_list, plots, result_frame, run_plots;"
        "results, _ = result_frame.load_results(sys.argv[1]);"
        "plot_list.save_all_plots(results, sys.argv[1], plots.FORMATS);"
        "print('matplotlib.pyplot' in sys.modules)"
    )
    command = [sys.executable, "-c", probe, str(tmp_path)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_legend_of_long_names_stays_inside_its_figure():
    link = {"bandwidth_gb_s": 1.0, "latency_us": 0.0}
    paged = [make_result(mode, paging={**PAGED, "link": setting}) for mode in MODES[1:] for setting in ("auto", link)]
    for figure in (run_plots.latency_trace_figure([make_result(), *paged]), plots.comparison_figure(to_frame(paged))):
        plots.to_png(figure)
        legend = figure.legends[0].get_window_extent()
        assert legend.x0 >= 0
        assert legend.x1 <= figure.bbox.x1


def test_dots_below_zero_are_inside_the_speed_up_panel():
    baseline = [make_result(repetition=r) for r in range(3)]
    reactive = [make_result("reactive", repetition=r, tpot_ms=t) for r, t in enumerate((80.0, 90.0, 200.0))]
    figure = plots.comparison_figure(to_frame(baseline + reactive))
    (axis,) = (axis for axis in figure.axes if axis.get_title(loc="left") == "Decode speed-up")
    assert axis.get_ylim()[0] < -50.0  # 100 x (100 / 200 - 1) = -50


def test_a_speed_up_says_what_it_is_against_also_where_no_baseline_ran():
    paged = [result for result in make_sweep() if result["spec"]["mode"] != "baseline"]
    for results, against in ((make_sweep(), "% against the baseline"), (paged, "% against reactive")):
        labels = [axis.get_ylabel() for axis in plots.comparison_figure(to_frame(results)).axes]
        assert any(label.startswith(against) for label in labels)
