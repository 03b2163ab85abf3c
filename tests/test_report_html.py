"""The report is one well-formed page that needs nothing else, says what must be said, and takes no text for markup."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from result_fixtures import (
    approximately,
    make_failure,
    make_result,
    make_sweep,
    make_task,
    with_fidelity,
    with_tasks,
    write_results,
)

import report_html
from plot_list import PLOTS, drawn
from report_figures import MOST_SVG_BYTES, SHOWS, data_uri, drawings
from report_html import report_page
from report_style import DARK, LIGHT, PAIRS
from reporting import summarise
from result_frame import load_results, to_frame

SAMPLE = Path(__file__).parent.parent / "logs" / "sample"
EVIL = '<script>alert("x")</script>&amp;'
VOID = {"meta", "img", "br", "wbr", "hr"}


class Page(HTMLParser):
    """A page as a parser sees it. Raises ValueError where an element is not closed in the order of opening."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.words = [], [], ""
        self.feed(page)
        self.close()
        if self.open:
            raise ValueError(f"never closed: {self.open}")

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            raise ValueError(f"</{tag}> closes nothing")

    def handle_data(self, words):
        if self.open and self.open[-1] != "style":
            self.words += words

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def ids(self):
        return [attributes["id"] for _, attributes in self.elements if "id" in attributes]


def page_of(results, plots=False, problems=(), **known):
    summary = {**summarise(results, **known), "unreadable_files": list(problems)}
    return report_page(results, to_frame(results), summary, plots)


def words_of(*arguments, **options):
    return " ".join(Page(page_of(*arguments, **options)).words.split())


@pytest.fixture(scope="module")
def sample():
    """The page of the sample, with its figures."""
    results, _ = load_results(SAMPLE)
    return page_of(results, plots=True)


@pytest.fixture(scope="module")
def seen(sample):
    return Page(sample)


# --- a page by itself -----------------------------------------------------------------------------------------------


def test_the_reader_finds_what_is_not_closed():
    for torn in ("<p>", "<p></b>", "<b><p></b></p>"):
        with pytest.raises(ValueError):
            Page(torn)


def test_every_element_is_closed_and_every_id_is_one(sample, seen):
    assert sample.startswith("<!DOCTYPE html>\n<html lang=")
    assert len(seen.ids()) == len(set(seen.ids())) > 10


def test_an_html5_parser_finds_no_error(sample):
    html5lib = pytest.importorskip("html5lib")
    html5lib.HTMLParser(strict=True).parse(sample)


def test_nothing_is_loaded_from_elsewhere_and_nothing_runs(sample, seen):
    assert not seen.all("script") + seen.all("link") + seen.all("iframe") + seen.all("object")
    for _, attributes in seen.elements:
        assert not [name for name in attributes if name.startswith("on")]
        assert attributes.get("src", "data:image/").startswith("data:image/")
        assert attributes.get("href", "#").startswith("#")
    style = re.search(r"<style>(.*?)</style>", sample, re.DOTALL)[1]
    assert "url(" not in style
    assert "@import" not in style


def test_every_link_leads_somewhere_on_the_page(seen):
    places = set(seen.ids())
    for attributes in seen.all("a"):
        assert attributes["href"].removeprefix("#") in places
    for _, attributes in seen.elements:
        for name in ("aria-labelledby", "aria-describedby"):
            assert name not in attributes or attributes[name] in places


def test_each_table_can_be_understood_without_seeing_it(seen):
    tables, captions = seen.all("table"), seen.all("caption")
    assert len(tables) == len(captions) >= 8
    assert {attributes.get("scope") for attributes in seen.all("th")} == {"col", "row"}
    regions = [attributes for attributes in seen.all("div") if attributes.get("role") == "region"]
    assert all(attributes["tabindex"] == "0" for attributes in regions)


def test_each_figure_is_in_the_page_and_says_what_it_shows(sample, seen):
    images = seen.all("img")
    assert len(images) >= 6
    for image in images:
        assert len(image["alt"]) > 60
        kind, picture = re.fullmatch(r"data:image/(svg\+xml|png);base64,(.*)", image["src"]).groups()
        content = base64.b64decode(picture, validate=True)
        assert content.startswith(b"<?xml" if kind == "svg+xml" else b"\x89PNG")
        assert b"<script" not in content
    runs = to_frame(load_results(SAMPLE)[0])
    at_longest = runs[(runs["context_tokens"] == 2000) & (runs["strategy"] == "baseline")]
    latency = f"baseline {at_longest['tpot_ms'].mean():.1f} ms"
    assert any("2,000 tokens" in image["alt"] and latency in image["alt"] for image in images)
    assert len(sample) < 3_000_000


def test_the_page_is_the_same_each_time_it_is_made():
    results = [make_result("reactive")]
    assert page_of(results, plots=True) == page_of(results, plots=True)


# --- no text is taken for markup ------------------------------------------------------------------------------------


def test_whatever_a_text_holds_it_is_shown_as_it_is():
    evil = make_result("predictive", name=EVIL, model_name=f"model {EVIL}")
    evil["environment"] |= {"cpu": EVIL, "argv": [EVIL], "git_commit": EVIL, "packages": {EVIL: EVIL}}
    evil["model"] |= {"source": EVIL}
    evil["spec"]["paging"] |= {"policy": {"name": EVIL, EVIL: EVIL}}
    evil["cache"]["link"]["name"] = EVIL
    quality = with_tasks(with_fidelity(approximately(evil)), make_task([1, 0], [1, 1], task=EVIL))
    failure = make_failure(make_result("reactive", name=f"reactive {EVIL}"), "error", f"ValueError: {EVIL} \x00 \ud800")
    page = page_of([make_result(), quality, failure], plots=True, problems=[f"{EVIL}: torn"])
    page.encode("utf-8")
    seen = Page(page)
    assert not seen.all("script")
    assert "<script" not in page
    assert seen.words.count(EVIL) > 15


# --- what it says ---------------------------------------------------------------------------------------------------


def test_every_failure_is_there_with_its_reason():
    results = make_sweep(contexts=(500,), repetitions=2)
    for number in (1, 2, 4):
        results[number] = make_failure(results[number], "error", f"ValueError: reason number {number}, at length")
    words = words_of(results)
    assert "3 of 6 runs failed" in words
    for number in (1, 2, 4):
        assert f"ValueError: reason number {number}, at length" in words


def test_runs_that_failed_alike_are_counted_on_one_line():
    results = [make_failure(make_result(repetition=number), error="no memory") for number in range(3)]
    results.append(make_failure(make_result(context=1000), "error", "no memory"))
    rows = re.findall(r"<tr>(<th.*?)</tr>", page_of(results).partition('id="failures"')[2])
    cells = [re.sub(r"<[^>]+>", " ", row).split() for row in rows]
    assert cells[:3] == [
        ["strategy", "context", "tokens", "runs", "status", "error"],
        ["baseline", "500", "3", "out_of_memory", "no", "memory"],
        ["baseline", "1,000", "1", "error", "no", "memory"],
    ]


def test_there_may_be_no_successful_run_and_no_run_at_all():
    failures = [make_failure(result, error="out of memory") for result in make_sweep(repetitions=1)]
    words = words_of(failures, plots=True)
    assert "No run succeeded" in words
    assert "All 6 runs failed" in words
    assert "No run was made" in words_of([], plots=True)


def test_a_run_alone_has_a_page():
    words = words_of([make_result("reactive")], plots=True)
    assert "1 run: 1 strategy at 500 tokens of context." in words
    assert "Settings in which the strategies differ" not in words


def test_a_simulated_link_is_said_first_and_beside_each_strategy_that_used_it():
    page = page_of(make_sweep(contexts=(500,), repetitions=1))
    assert page.index("Simulated link: pcie3-x16, 15.75 GB/s") < page.index("<nav")
    rows = re.findall(r'<th scope="row">(.*?)</th>', page)
    marked = {re.match(r"\w+", row)[0] for row in rows if "sim. link" in row}
    assert marked == {"reactive", "predictive"}
    real = make_result("reactive")
    real["cache"]["link"] |= {"kind": "bus", "name": "pcie", "bandwidth_gb_s": None}
    assert "imulated link" not in words_of([make_result(), real])


def test_an_approximation_is_marked_and_so_is_that_nobody_measured_its_price():
    quick = approximately(make_result("predictive", name="quick"))
    page = page_of([make_result(), quick])
    assert "Quality not measured: quick" in page
    assert all("approx." in row for row in re.findall(r'<th scope="row">(quick.*?)</th>', page))
    assert "Quality not measured" not in page_of([make_result(), with_fidelity(quick, kl_mean=0.2)])


def test_an_interrupted_sweep_torn_files_and_random_weights_are_said():
    results = make_sweep(contexts=(500,), repetitions=1)
    results[0]["model"]["random_weights"] = True
    words = words_of(results, planned=9, interrupted=True, problems=["baseline_x.json: torn"])
    for said in (
        "Interrupted",
        "9 were planned",
        "1 file could not be read",
        "baseline_x.json: torn",
        "Random weights",
    ):
        assert said in words


def test_the_machine_the_commit_and_the_versions_are_those_of_the_results(seen):
    result = load_results(SAMPLE)[0][0]
    found = result["environment"]
    facts = (found["cpu"], found["git_commit"], found["python"], found["packages"]["torch"], result["model"]["source"])
    assert all(fact in seen.words for fact in facts)


def test_the_command_and_the_list_make_the_runs_again(sample):
    blocks = [block.replace("&quot;", '"') for block in re.findall(r"<pre[^>]*><code>(.*?)</code>", sample, re.DOTALL)]
    assert "python main.py --config experiments.yaml --seed 0" in blocks[0]
    assert [entry["mode"] for entry in yaml.safe_load(blocks[1])["experiments"]] == [
        "baseline",
        "reactive",
        "predictive",
        "predictive",
    ]
    assert "python main.py --output logs/sample" in blocks[2]


def test_a_commit_that_is_not_all_of_the_program_is_said():
    clean, dirty = make_result(), make_result("reactive")
    clean["environment"] |= {"git_commit": "abc123", "git_dirty": False}
    dirty["environment"] |= {"git_commit": "abc123", "git_dirty": True}
    assert "git checkout abc123" in words_of([clean, dirty])
    assert "Tracked files differed" in words_of([clean, dirty])
    assert "Tracked files differed" not in words_of([clean])
    dirty["environment"]["git_commit"] = "def456"
    assert "git checkout" not in words_of([clean, dirty])
    assert "not of one known commit" in words_of([clean, dirty])


def test_every_definition_of_the_summary_is_there(seen):
    definitions = summarise(SAMPLE)["definitions"]
    words = " ".join(seen.words.split())
    assert all(" ".join(said.split()) in words for said in definitions.values())


def test_numbers_are_those_of_the_tables_with_a_minus_sign_and_thousands():
    slow = make_result("reactive", tpot_ms=2000.0)
    slow["timing"] |= {"tokens_per_second": 4.0, "ttft_ms": 2392.0}
    page = page_of([make_result(), slow])
    gain = 100.0 * (4.0 / make_result()["timing"]["tokens_per_second"] - 1.0)
    assert f">\N{MINUS SIGN}{-gain:.1f}<" in page
    assert f">{gain:.1f}<" not in page
    assert ">2,392<" in page


# --- figures --------------------------------------------------------------------------------------------------------


def test_a_page_has_every_plot_of_the_list_and_says_what_each_shows():
    results = make_sweep(contexts=(500, 1000), repetitions=2)
    found = list(drawings(results, to_frame(results)))
    plots = [plot.name for plot, _ in drawn(results)]
    assert [one.name for one in found][: len(plots)] == plots
    assert set(SHOWS) <= {plot.name for plot in PLOTS}
    shown = {one.name: one.shows for one in found}
    assert "ms a token, 40.0 MiB of KV cache on the device" in shown["kv_cache_comparison"]
    assert "times" in shown["speedup_by_context"]


def test_without_plots_there_are_no_figures():
    assert not Page(page_of(make_sweep(contexts=(500,), repetitions=1), plots=False)).all("img")


def test_a_figure_whose_svg_would_be_too_large_is_a_png():
    from matplotlib.figure import Figure

    figure = Figure()
    axis = figure.subplots()
    axis.plot([0, 1])
    assert data_uri(figure).startswith("data:image/svg+xml;base64,")
    axis.scatter(range(20_000), range(20_000))
    uri = data_uri(figure)
    assert uri.startswith("data:image/png;base64,")
    assert len(uri) < MOST_SVG_BYTES


def test_figures_beyond_what_a_page_can_hold_are_named(monkeypatch):
    monkeypatch.setattr(report_html, "MOST_FIGURE_BYTES", 200_000)
    page = page_of(make_sweep(contexts=(500,), repetitions=1), plots=True)
    assert 0 < len(Page(page).all("img")) < 5
    assert "Left out, to keep this page small: " in page


# --- style ----------------------------------------------------------------------------------------------------------


def luminance(colour):
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize(("ink", "behind"), PAIRS)
def test_text_has_the_contrast_of_wcag_aa(colours, ink, behind):
    light, dark = sorted((luminance(colours[ink]), luminance(colours[behind])), reverse=True)
    assert (light + 0.05) / (dark + 0.05) >= 4.5


def test_the_measure_of_contrast_is_that_of_the_standard():
    assert (luminance("#ffffff") + 0.05) / (luminance("#000000") + 0.05) == pytest.approx(21)
    assert (luminance("#ffffff") + 0.05) / (luminance("#777777") + 0.05) == pytest.approx(4.48, abs=0.01)


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command_writes_the_page_of_a_folder(tmp_path, capsys):
    folder = write_results(tmp_path / "runs", make_sweep(contexts=(500,), repetitions=1))
    (folder / "reactive_torn.json").write_text("{")
    assert report_html.main([str(folder), "--no-plots"]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "reactive_torn.json" in Page(page).words
    assert report_html.main([str(tmp_path / "none")]) == 1
    assert "no results there" in capsys.readouterr().err


def test_an_interval_stands_smaller_behind_its_figure_and_leaves_its_column_one_of_numbers():
    results = [make_result(mode, repetition=n, tpot_ms=80.0 + n) for mode in ("baseline", "reactive") for n in range(3)]
    page = page_of(results)
    assert re.search(r"<td>81\.0 <small>\[80\.0-82\.0\]</small></td>", page)
