"""A table of finished text, for a console of 80 columns or more and as Markdown, and how numbers stand in it.

What a table says is settled before it is known where it is shown, so both forms hold the same figures. On a console
only words may wrap: a number that was cut would still look like a number.
"""

from __future__ import annotations

import dataclasses
import re
from itertools import groupby
from typing import TYPE_CHECKING, Any

from quality_frame import quality_note
from result_frame import under_simulated_link

if TYPE_CHECKING:
    import pandas as pd

DASH = "\N{EM DASH}"
# The others head numbers.
TEXT_HEADINGS = (
    "model",
    "strategy",
    "task",
    "note",
    "status",
    "error",
    "metric",
    "verdict",
    "what differs",
    "in A",
    "in B",
    "why",
)


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of finished text. A line break in a heading is where a console breaks it.

    On a console a gap stands wherever a cell under one of `sections` differs from the one above it.
    """

    title: str
    headings: tuple[str, ...]
    rows: list[tuple[str, ...]]
    caption: str = ""
    sections: tuple[str, ...] = ("context\ntokens",)

    def to_markdown(self) -> str:
        rule = [":---" if heading in TEXT_HEADINGS else "---:" for heading in self.headings]
        body = "\n".join(f"| {' | '.join(map(_one_line, line))} |" for line in (self.headings, rule, *self.rows))
        return "\n\n".join(part for part in (f"**{self.title}**", body, self.caption) if part)

    def to_rich(self) -> Any:
        """A `rich.table.Table`. Only text may wrap: a number that was cut would still look like a number."""
        from rich import box
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(
            title=Text(self.title, style="bold"),
            title_justify="left",
            caption=Text(self.caption),
            caption_justify="left",
            box=box.SIMPLE_HEAD,
            show_edge=False,
            pad_edge=False,
            padding=(0, 1, 0, 0),
        )
        for heading in self.headings:
            is_text = heading in TEXT_HEADINGS
            justify = "left" if is_text else "right"
            table.add_column(Text(heading), justify=justify, overflow="fold", no_wrap=not is_text)
        keys = [self.headings.index(heading) for heading in self.sections if heading in self.headings]
        for _, section in groupby(self.rows, key=lambda row: [row[key] for key in keys]):
            for row in section:
                table.add_row(*map(Text, row))
            table.add_section()
        return table


def with_brackets(text: str) -> str:
    """A cell on one line: `0.63 [0.62-0.64]` of a figure with its interval beneath it."""
    return re.sub(r"\n(\S*\d-[>\d]\S*)$", r" [\1]", text)


def _one_line(text: str) -> str:
    return " ".join(with_brackets(text).replace("|", "\\|").split())


def number_text(value: float | None) -> str:
    return DASH if value is None else f"{value:.{decimals(value)}f}"


def decimals(value: float) -> int:
    """As many as leave three digits or more, which say enough for any of these figures."""
    return 2 if abs(value) < 9.995 else 1 if abs(value) < 999.95 else 0


def ratio_text(ratio: float) -> str:
    """Two decimals, or three where two would read as no difference at all; beyond 1000 the figure says nothing more."""
    if ratio > 1000:
        return ">1000"
    return f"{ratio:.3f}" if 0.995 <= ratio < 1.005 else f"{ratio:.2f}"


def caveats(frame: pd.DataFrame) -> str:
    """Whose answers are approximate, and by how much; and whose figures are modelled, as far as a link delayed the
    copies."""
    links, approximations = under_simulated_link(frame).items(), quality_note(frame)
    return (f" {approximations}" if approximations else "") + "".join(
        f" Figures of {', '.join(strategies)} are under a simulated link ({link.removeprefix('simulated ')})."
        for link, strategies in links
    )
