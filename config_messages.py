"""What is wrong with an experiment, in plain sentences.

Pydantic finds the errors of an entry; its words ("Input should be a valid integer") are for programmers.
Here each becomes a `Fault`: the path of a key within the entry, and a sentence in the words of a config's
author, with the cure where there is an obvious one. Where the entry stands in a file is not known here;
`experiments` adds that.

The one subtlety: pydantic looks for conflicts between keys only once every key is right by itself, but all
errors of a file are to come at once. So an entry with broken keys is validated a second time without them,
and of what that finds the conflicts are kept in which no broken key takes part.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from pydantic import ValidationError

from config_schema import ALL_KEYS, MODE_CLASSES, QUALITY_KEYS, Experiment, LinkSpeed
from registry import UnknownName, nearest
from yaml_source import KeyPath, described


class Fault(NamedTuple):
    """One error of an entry.

    Attributes:
        loc: where in the entry.
        text: what to say.
        at_key: the key itself is at fault, not its value.
        keys: in a conflict, all keys that take part in it.
    """

    loc: KeyPath
    text: str
    at_key: bool = False
    keys: tuple[str, ...] = ()


def validated(cls: type[Experiment], values: dict[str, Any]) -> tuple[Experiment | None, list[Fault]]:
    """An experiment and no faults, or None and all of them."""
    try:
        return cls.model_validate(values), []
    except ValidationError as error:
        faults = _faults(cls, error)
    broken = {fault.loc[0] for fault in faults if not fault.keys}
    return None, faults + (_conflicts_beside(broken, cls, values) if broken else [])


def faults_in_every_mode(entry: dict[str, Any]) -> set[Fault]:
    """What can be said of an entry whose mode is not known: whatever would be wrong in every mode."""
    return set.intersection(*(set(validated(cls, entry | {"mode": mode})[1]) for mode, cls in MODE_CLASSES.items()))


def _conflicts_beside(broken: set, cls: type[Experiment], values: dict[str, Any]) -> list[Fault]:
    """The conflicts between keys that are right by themselves."""
    try:
        cls.model_validate({key: value for key, value in values.items() if key not in broken - {"mode"}})
    except ValidationError as error:
        return [fault for fault in _faults(cls, error) if fault.keys and broken.isdisjoint(fault.keys)]
    return []


def _faults(cls: type[Experiment], error: ValidationError) -> list[Fault]:
    return [
        Fault(
            loc=details["loc"],
            text=_sentence(cls, details),
            at_key=details["type"] in ("extra_forbidden", "unknown_parameter"),
            keys=tuple(details.get("ctx", {}).get("keys", ())),
        )
        for details in error.errors(include_url=False)
        if details["type"] != "default_factory_not_called"  # of 'name', when 'mode' is at fault
    ]


# --- sentences ----------------------------------------------------------------------------------------------

_RULES = {
    "int_type": "be a whole number",
    "float_type": "be a number",
    "finite_number": "be a finite number",
    "bool_type": "be true or false",
    "string_type": "be text",
    "list_type": "be a list in brackets, such as [500, 1000] for numbers",
    "greater_than": "be more than {gt:g}",
    "greater_than_equal": "be at least {ge:,}",
    "less_than_equal": "be at most {le:,}",
    "too_short": "have at least {min_length} value",
    "too_long": "have at most {max_length:,} values",
}


def _sentence(cls: type[Experiment], details: Any) -> str:
    """One error of pydantic's in the words of a config's author."""
    kind, loc, value, context = details["type"], details["loc"], details["input"], details.get("ctx", {})
    key = _dotted(loc)
    if kind in _RULES:
        rule = _RULES[kind].format(**context)
        return f"{key!r} must {rule}, found {described(value)}{_cure(kind, value)}"
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", context["expected"])
        return f"{key!r} must be {either(choices)}, found {described(value)}{nearest(value, choices)}"
    if kind in ("value_error", "unknown_parameter"):
        error = context["error"]
        return str(error) if isinstance(error, UnknownName) else f"{key!r} {error}"
    if kind == "conflict":
        return context["text"]
    if kind == "missing":
        return f"{key!r} is missing"
    if kind == "extra_forbidden" and len(loc) > 1:
        return unknown_key(loc[-1], QUALITY_KEYS if loc[0] == "quality" else LinkSpeed.model_fields)
    if kind == "extra_forbidden":
        return useless_key(loc[0], cls)
    return f"{key!r}: {details['msg']}"


def unknown_key(key: str, known: Iterable[str] = (*ALL_KEYS, "sweep", "exclude")) -> str:
    """A key that nothing knows, with the one that was probably meant."""
    return f"unknown key {key!r}{nearest(key, list(known))}"


def unknown_mode(value: Any) -> str:
    """A mode that there is not."""
    if not isinstance(value, str):
        return f"'mode' must be {either(MODE_CLASSES)}, found {described(value)}"
    return f"unknown mode {described(value)}{nearest(value, MODE_CLASSES)} (known: {', '.join(MODE_CLASSES)})"


def either(words: Iterable[str]) -> str:
    """`"a, b or c"`."""
    *others, last = words
    return f"{', '.join(others)} or {last}" if others else last


def useless_key(key: str, cls: type[Experiment]) -> str:
    """Why a key may not stand in an entry: it belongs to other modes, or to none."""
    owners = [mode for mode, other in MODE_CLASSES.items() if key in other.model_fields]
    if not owners:
        return unknown_key(key)
    mode = next(mode for mode, other in MODE_CLASSES.items() if other is cls)
    return f"{key!r} has no effect in mode {mode} (it belongs to {' and '.join(owners)})"


def _cure(kind: str, value: Any) -> str:
    """What to write instead, for the slips that YAML invites."""
    if kind == "bool_type" and isinstance(value, str) and value.lower() in ("yes", "on", "no", "off"):
        return f"; write {'true' if value.lower() in ('yes', 'on') else 'false'}"
    if kind in ("int_type", "float_type") and isinstance(value, str) and re.fullmatch(r"-?[\d.]+", value):
        return "; write the number without quotes and leading zeros"
    if kind == "int_type" and isinstance(value, float) and value.is_integer():
        return f"; write {int(value)}"
    if kind == "list_type" and isinstance(value, int):
        return f"; write [{value}]"
    return ""


def _dotted(path: KeyPath) -> str:
    """`("link", "latency_us")` as `link.latency_us`, `("context_lengths", 1)` as `context_lengths[1]`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")
