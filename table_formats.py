"""A `text_tables.Table` for other places than a console: Markdown and LaTeX, in which no text is taken for markup.

Names of strategies, tasks and errors come from users and libraries, and `_`, `%` or `<` among them mean something to
either format. So every text passes through `markdown_text` or `latex_text`, and nothing else does.

The LaTeX is a document of its own, with booktabs rules, that pdfLaTeX, XeLaTeX and LuaLaTeX compile; each table in it
can be copied into a paper that uses the same packages.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator
from itertools import groupby

from html_text import printable
from text_tables import TEXT_HEADINGS, Table, with_brackets

# --- Markdown -----------------------------------------------------------------------------------------------------


def markdown_text(text: str) -> str:
    """Text that Markdown shows as it is; `Table.to_markdown` takes care of `|`."""
    return re.sub(r"([\\`*_{}\[\]<>#~&$!])", r"\\\1", printable(text))


def to_markdown(table: Table) -> str:
    return dataclasses.replace(
        table,
        title=markdown_text(table.title),
        caption=markdown_text(table.caption),
        rows=[tuple(map(markdown_text, row)) for row in table.rows],
    ).to_markdown()


# --- LaTeX --------------------------------------------------------------------------------------------------------

_PREAMBLE = r"""% Written by KV Prefetch. Packages for a table of its own: booktabs, longtable, array.
\documentclass[a4paper,landscape,9pt]{extarticle}
\usepackage[margin=1.5cm]{geometry}
\usepackage{iftex}
\ifPDFTeX
  \usepackage[T1]{fontenc}
  \usepackage[utf8]{inputenc}
  \usepackage{lmodern}
\fi
\usepackage{textcomp}
\usepackage{array,booktabs,longtable}
% A character by its number: drawn where the engine can, and named where it cannot.
\newcommand{\unichar}[1]{\ifPDFTeX\texttt{U+#1}\else\symbol{"#1}\fi}
\setlength{\LTcapwidth}{\linewidth}
\setlength{\tabcolsep}{4.5pt}
\begin{document}
"""
_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "'": r"\textquotesingle{}",
    "`": r"\textasciigrave{}",
    "[": "{[}",  # after \\ it would begin an argument, and so would *
    "]": "{]}",
    "*": "{*}",
    "\N{EM DASH}": "---",
    "\N{EN DASH}": "--",
    "\N{MINUS SIGN}": "$-$",
    "\N{PLUS-MINUS SIGN}": r"$\pm$",
    "\N{MULTIPLICATION SIGN}": r"$\times$",
    "\N{MIDDLE DOT}": r"\textperiodcentered{}",
    "\N{NO-BREAK SPACE}": "~",
    "\N{SOFT HYPHEN}": r"\-",
}
_LIGATURES = re.compile(r"([-,])(?=\1)")  # two of them would become one other sign
_WIDEST_NAME = 34  # letters; a column with longer ones wraps them


def latex_text(text: str) -> str:
    """Text that LaTeX shows as it is; line breaks and tabs are spaces."""
    plain = _LIGATURES.sub("\\1\0", " ".join(printable(text).split()))
    return "".join("{}" if letter == "\0" else _latex_letter(letter) for letter in plain)


def _latex_letter(letter: str) -> str:
    if letter in _LATEX:
        return _LATEX[letter]
    code = ord(letter)
    if 0x20 <= code < 0x7F or 0xA1 <= code <= 0xFF:  # pdfLaTeX knows these
        return letter
    return rf"\unichar{{{code:04X}}}"


def latex_document(tables: Iterable[Table]) -> Iterator[str]:
    """A document with all the tables, piece by piece."""
    yield _PREAMBLE
    for table in tables:
        yield f"\n{to_latex(table)}\n"
    yield "\n\\end{document}\n"


def to_latex(table: Table) -> str:
    """A longtable, which may go on over pages, with its notes below."""
    columns = "".join(_column(table, place) for place in range(len(table.headings)))
    heads = " & ".join(_heading(heading) for heading in table.headings)
    head = rf"\toprule {heads} \\ \midrule"
    lines = [
        rf"\begin{{longtable}}{{@{{}}{columns}@{{}}}}",
        rf"\caption{{{latex_text(table.title)}}} \\",
        rf"{head} \endfirsthead",
        rf"{head} \endhead",
        r"\bottomrule \endfoot",
    ]
    places = [table.headings.index(heading) for heading in table.sections if heading in table.headings]
    for number, (_, section) in enumerate(groupby(table.rows, key=lambda row: [row[place] for place in places])):
        lines += [r"\addlinespace"] if number and places else []
        lines += [" & ".join(latex_text(with_brackets(cell)) for cell in row) + r" \\" for row in section]
    lines.append(r"\end{longtable}")
    notes = [rf"\noindent {latex_text(note)}\par" for note in table.caption.split("\n") if note.strip()]
    return "\n".join([*lines, *notes])


def _column(table: Table, place: int) -> str:
    heading = table.headings[place]
    if heading not in TEXT_HEADINGS:
        return "r"
    widest = max((len(row[place]) for row in table.rows), default=0)
    if widest <= _WIDEST_NAME:
        return "l"
    return rf">{{\raggedright\arraybackslash}}p{{{11 if heading == 'error' else 6}cm}}"


def _heading(heading: str) -> str:
    side = "l" if heading in TEXT_HEADINGS else "r"
    lines = r" \\ ".join(map(latex_text, heading.split("\n")))
    return rf"\begin{{tabular}}[b]{{@{{}}{side}@{{}}}}{lines}\end{{tabular}}"
