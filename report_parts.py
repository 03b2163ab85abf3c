"""What a report is made of: a table, a list of terms, a notice and a figure, as HTML.

A part says on its own what it is: a table has a caption, headings with a scope and its notes tied to it, a box that
scrolls can be reached by keyboard, a picture has words for who cannot see it. Strategies that need a word of warning
wear it wherever they are named: `Marks`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from html_text import Html, element, joined, text
from text_tables import DASH, TEXT_HEADINGS, Table

LONG_CELL, LONG_NAME = 40, 28  # letters, from which on a cell of text, and the name of a strategy, may wrap
MANY_COLUMNS = 8
_NUMBER = re.compile(rf"[-+]?[\d,.]+(e[-+]?\d+)?(/[\d,.]+)?( ± [\d.]+)?( x \d+)?|{DASH}|ref\.")


@dataclass(frozen=True)
class Marks:
    """Strategies whose figures are approximate, and those whose figures are under a simulated link."""

    approximate: frozenset[str] = frozenset()
    simulated: frozenset[str] = frozenset()

    def of(self, strategy: str) -> list[Html]:
        marks = [element("span", "approx.", class_="tag")] if strategy in self.approximate else []
        marks += [element("span", "sim. link", class_="tag sim")] if strategy in self.simulated else []
        return [joined([" ", mark]) for mark in marks]


def table_part(table: Table, number: int, marks: Marks) -> Html:
    """A table in a box that scrolls where it is too wide, with its notes below."""
    name = f"table-{number}"
    texts = {heading for place, heading in enumerate(table.headings) if _is_text(table, place)}
    places = [table.headings.index(heading) for heading in table.sections if heading in table.headings]
    rows, before = [], None
    for row in table.rows:
        key = [row[place] for place in places]
        begins = before is not None and key != before
        before = key
        cells = [
            _cell(heading, cell, heading in texts, marks) for heading, cell in zip(table.headings, row, strict=True)
        ]
        rows.append(element("tr", cells, class_="section" if begins else None))
    heads = [
        element("th", _broken(heading), scope="col", class_="text" if heading in texts else None)
        for heading in table.headings
    ]
    title = element("span", element("b", f"Table {number}."), " ", table.title)
    notes = [line for line in table.caption.split("\n") if line.strip()]
    made = element(
        "table",
        element("caption", title, id=f"{name}-title"),
        element("thead", element("tr", heads)),
        element("tbody", rows),
        class_="wide" if len(table.headings) > MANY_COLUMNS else None,
        aria_describedby=f"{name}-notes" if notes else None,
    )
    box = element("div", made, class_="scroll", role="region", aria_labelledby=f"{name}-title", tabindex="0")
    below = element("div", [element("p", note, class_="note") for note in notes], id=f"{name}-notes") if notes else None
    return element("div", box, below, id=name)


def _is_text(table: Table, place: int) -> bool:
    """Whether a column is set flush left: one of words, in which not all that is there is a number."""
    if table.headings[place] in TEXT_HEADINGS:
        return True
    return not all(_NUMBER.fullmatch(_without_interval(row[place])) for row in table.rows)


def _without_interval(cell: str) -> str:
    """The figure of a cell that has its interval beneath it or in brackets behind it."""
    return re.split(r"\n| \[", cell)[0]


def _cell(heading: str, cell: str, is_text: bool, marks: Marks) -> Html:
    if heading == "strategy":
        is_long = len(cell) > LONG_NAME
        return element("th", cell, marks.of(cell), scope="row", class_="long" if is_long else None)
    classes = ["text"] if is_text else []
    classes += ["long"] if is_text and len(cell) > LONG_CELL else []
    classes += ["none"] if cell == DASH else []
    shown = joined(cell.split("\n"), " ") if is_text else joined(_figures(cell), " ")
    return element("td", shown, class_=" ".join(classes) or None)


def _figures(cell: str) -> list[Any]:
    """A figure, and its interval where there is one, smaller."""
    figure = _without_interval(cell)
    between = cell[len(figure) :].strip(" \n[]")
    return [_number(figure), *([element("small", f"[{between}]")] if between else [])]


def _number(cell: str) -> str:
    """As a page shows it: `−1,082.5` for `-1082.5`, with the minus sign that is as wide as a plus."""
    cell = re.sub(r"^-(?=\d)", "\N{MINUS SIGN}", cell)
    return re.sub(r"(?<![\d.])\d{4,}", lambda digits: f"{int(digits[0]):,}", cell)


def _broken(heading: str) -> Html:
    """A heading over several lines; one that is a key may break behind its underscores, and none at a hyphen."""
    lines = [text(line).replace("_", "_<wbr>").replace("-", "\N{NON-BREAKING HYPHEN}") for line in heading.split("\n")]
    return Html("<br>".join(lines))


def terms_part(terms: Mapping[str, Any] | Iterable[tuple[str, Any]], class_: str) -> Html:
    """A list of terms and what is said of each."""
    pairs = terms.items() if isinstance(terms, Mapping) else terms
    return element(
        "dl", [element("div", element("dt", key), element("dd", said)) for key, said in pairs], class_=class_
    )


def notice_part(kind: str, title: str, *paragraphs: Any) -> Html:
    """What must not be overlooked; `kind` is `warn` or `bad`."""
    inner = [element("p", paragraph) for paragraph in paragraphs]
    return element("div", element("h2", title), inner, class_=f"notice {kind}", role="note")


def figure_part(number: int, name: str, title: str, caption: str, shows: str, address: str, inches: float) -> Html:
    """A figure: `address` holds the picture itself, `shows` says in words what it shows.

    It is as wide as the page, but no smaller than its letters can be read, and scrolls then; `inches` is the width it
    was drawn for.
    """
    picture = element("img", src=address, alt=f"{title}. {shows}", style=f"--drawn: {96 * inches:.0f}px")
    words = element("figcaption", element("b", f"Figure {number}. {title}."), f" {caption}")
    box = element("div", picture, class_="card", role="region", aria_label=f"Figure {number}", tabindex="0")
    return element("figure", box, words, id=f"figure-{number}-{name}")


def section_part(name: str, title: str, *inner: Any) -> Html:
    """A section with its heading, which contents can point to."""
    return element(
        "section", element("h2", title, id=f"{name}-heading"), *inner, id=name, aria_labelledby=f"{name}-heading"
    )


def code_part(code: str) -> Html:
    return element("pre", element("code", code), tabindex="0")
