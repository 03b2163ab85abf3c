"""Tables in Markdown and LaTeX: no text of a result is taken for markup, and the LaTeX compiles."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from table_formats import latex_document, latex_text, markdown_text, to_latex, to_markdown
from text_tables import Table

ODD = r"""a_b & 100 % of #1 $x^2$ {y} ~ \emph{z} <script> "q" 'r' `s` [t] *u* |v| --no-plots ,, ± — − é 中"""
TABLE = Table(
    f"Title {ODD}",
    ("context\ntokens", "strategy", "latency\nms", "error"),
    [("500", ODD, "1.5 ± 0.1", "—"), ("500", "[plain]", "-2.5", "*"), ("1000", "x", "—", "a reason " * 30)],
    f"Note {ODD}\nA second line.",
)

# --- a small reader of LaTeX text, which knows only what a text may hold --------------------------------------------

COMMANDS = {
    r"\textbackslash": "\\",
    r"\textasciitilde": "~",
    r"\textasciicircum": "^",
    r"\textless": "<",
    r"\textgreater": ">",
    r"\textbar": "|",
    r"\textquotedbl": '"',
    r"\textquotesingle": "'",
    r"\textasciigrave": "`",
    r"\textperiodcentered": "·",
}


def read_latex(source):
    """What a reader of the compiled text sees. Raises ValueError at anything that would be markup."""
    seen = ""
    while source:
        for pattern, meaning in (
            (r"\\unichar\{([0-9A-F]{4,6})\}", lambda m: chr(int(m[1], 16))),
            (r"\\([{}$&#%_])", lambda m: m[1]),
            (r"(\\[a-z]+)\{\}", lambda m: COMMANDS[m[1]]),
            (r"\{([\[\]*])\}", lambda m: m[1]),
            (r"\$-\$", lambda m: "−"),
            (r"\$\\pm\$", lambda m: "±"),
            (r"\$\\times\$", lambda m: "×"),
            (r"\{\}", lambda m: ""),
            (r"---", lambda m: "—"),
            (r"--", lambda m: "–"),
            (r"\\-", lambda m: "\N{SOFT HYPHEN}"),
            (r"~", lambda m: "\N{NO-BREAK SPACE}"),
            (r"""[^\\{}$&#%_~^<>|"'`\[\]*]""", lambda m: m[0]),
        ):
            if found := re.match(pattern, source, re.DOTALL):
                seen += meaning(found)
                source = source[found.end() :]
                break
        else:
            raise ValueError(f"markup at {source[:20]!r}")
    return seen


def test_the_reader_finds_markup():
    for markup in ("a_b", "50 %", r"\input{x}", "a & b", "$x$", "{", "#", "^"):
        with pytest.raises(ValueError, match="markup"):
            read_latex(markup)


@given(st.text(st.characters(exclude_categories=("Cc", "Cs", "Zs", "Zl", "Zp", "Cn", "Co"))))
def test_latex_shows_any_text_as_it_is(words):
    assert read_latex(latex_text(words)) == words


def test_two_hyphens_stay_two_hyphens():
    assert latex_text("--no-plots") == "-{}-no-plots"
    assert latex_text("a---b") == "a-{}-{}-b"


@given(st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E)))
def test_markdown_leaves_no_sign_that_means_something(words):
    escaped = markdown_text(words)
    assert re.sub(r"\\([\\`*_{}\[\]<>#~&$!])", "", escaped) == re.sub(r"[\\`*_{}\[\]<>#~&$!]", "", words)
    assert re.sub(r"\\(.)", r"\1", escaped) == words


def test_markdown_has_as_many_cells_in_each_line_as_headings():
    lines = [line for line in to_markdown(TABLE).splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(TABLE.rows)
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {len(TABLE.headings) + 1}
    assert r"\<script\>" in lines[2]


def test_latex_has_as_many_cells_in_each_line_as_headings():
    body = to_latex(TABLE).split(r"\endfoot")[1].split(r"\end{longtable}")[0]
    lines = [line.removesuffix(r" \\") for line in body.strip().splitlines() if line != r"\addlinespace"]
    cells = [re.split(r" (?<!\\)& ", line) for line in lines]
    assert [tuple(map(read_latex, row)) for row in cells] == [tuple(" ".join(c.split()) for c in r) for r in TABLE.rows]
    assert {len(re.findall(r"(?<!\\)&", line)) for line in lines} == {len(TABLE.headings) - 1}
    assert body.count(r"\addlinespace") == 1  # where the context changes


def test_the_latex_compiles(tmp_path):
    if shutil.which("pdflatex") is None:
        pytest.skip("no pdflatex on this machine")
    (tmp_path / "tables.tex").write_text("".join(latex_document([TABLE, TABLE])), encoding="utf-8")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "tables.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout.decode(errors="replace")[-2000:]
    assert (tmp_path / "tables.pdf").stat().st_size > 5000
