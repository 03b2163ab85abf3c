"""HTML out of values: text is escaped wherever it comes in, and every element that is opened is closed.

The one idea: `Html` is text that is HTML already, and only `element` makes it. Whatever else is put into an element, a
name that somebody gave an experiment or the message of an error, is plain text and is shown as just that. So a page
made of these functions holds no markup but its own.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping
from typing import Any

VOID = {"br", "hr", "img", "meta"}


class Html(str):
    """Text that is HTML already; never made of text from outside."""

    __slots__ = ()


def element(name: str, /, *inner: Any, **attributes: Any) -> Html:
    """`<name attributes>inner</name>`.

    Args:
        inner: `Html` stays as it is, all else is escaped; None is left out, and what stands in a list comes in order.
        attributes: `class_` is `class` and `aria_label` `aria-label`; None leaves one out.
    """
    words = [name]
    for key, value in attributes.items():
        if value is not None:
            words.append(f'{key.rstrip("_").replace("_", "-")}="{text(value)}"')
    opening = Html(f"<{' '.join(words)}>")
    return opening if name in VOID else Html(f"{opening}{joined(inner)}</{name}>")


def joined(inner: Iterable[Any], between: str = "") -> Html:
    """The parts one after another, those of lists in their order."""
    return Html(text(between).join(_parts(inner)))


def _parts(inner: Iterable[Any]) -> Iterable[Html]:
    for one in inner:
        if one is None:
            continue
        if isinstance(one, Iterable) and not isinstance(one, str | Mapping):
            yield from _parts(one)
        else:
            yield text(one)


def text(value: Any) -> Html:
    """A value as HTML that shows it: escaped, unless it is `Html` already. What no page may hold becomes U+FFFD."""
    return value if isinstance(value, Html) else Html(html.escape(printable(str(value))))


def printable(words: str) -> str:
    """The same text, with U+FFFD for control characters and halves of characters, which a file cannot hold."""
    return "".join("\N{REPLACEMENT CHARACTER}" if _is_refused(letter) else letter for letter in words)


def _is_refused(letter: str) -> bool:
    code = ord(letter)
    is_control = (code < 0x20 and letter not in "\n\t") or 0x7F <= code < 0xA0
    return is_control or 0xD800 <= code < 0xE000 or code & 0xFFFE == 0xFFFE
