"""A page made of `html_text` shows any text as it is, and is well-formed whatever the text."""

from __future__ import annotations

from html.parser import HTMLParser

from hypothesis import example, given
from hypothesis import strategies as st

from html_text import Html, element, joined, printable, text


class Seen(HTMLParser):
    """What a parser finds: tags with their attributes, and text."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.tags, self.words = [], ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, words):
        self.words += words


@given(st.text())
def test_a_parser_finds_the_text_that_was_put_in_and_no_tag_more(words):
    seen = Seen(element("p", words, title=words))
    assert seen.tags == [("p", {"title": printable(words)})]
    assert seen.words == printable(words)


@given(st.text())
@example("half a character: \ud800, no character: \uffff, a bell: \a")
def test_any_text_can_be_written_to_a_file(words):
    text(words).encode("utf-8")
    assert "\0" not in text(words)


def test_text_is_escaped_once_and_html_not_at_all():
    inner = element("b", "1 < 2 & 3")
    assert inner == "<b>1 &lt; 2 &amp; 3</b>"
    assert element("p", inner, [" or ", None, ["x", 4]]) == f"<p>{inner} or x4</p>"
    assert joined(["<", Html("<br>")], " ") == "&lt; <br>"


def test_attributes_are_named_and_left_out_as_said():
    assert element("a", "x", href='"', class_="c", aria_label="l", id=None) == (
        '<a href="&quot;" class="c" aria-label="l">x</a>'
    )
    assert element("img", src="s", alt="") == '<img src="s" alt="">'


def test_a_name_that_ends_an_element_does_not():
    assert "</p>" not in element("p", "</p><script>alert(1)</script>")[3:-4]
