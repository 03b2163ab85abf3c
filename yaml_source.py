"""Read a YAML or JSON file into plain values that remember where they stood.

The one idea: validation happens long after parsing, yet its messages must still say `file:line:column`. So
the file is read with PyYAML's `compose`, which gives a tree of nodes with positions, and the tree is walked
once into two things: plain Python values, and a `Spot` for the path of every key and value (`("experiments",
0, "num_runs")`).

Words mean what they say: plain scalars follow the core schema of YAML 1.2
(https://yaml.org/spec/1.2.2/#103-core-schema) instead of PyYAML's 1.1, so `off` and `no` are text, `1e-3` is
a number, and `010` or `12:30` are never quietly turned into 8 or 750. JSON is nearly a subset of YAML and
takes the same path, so it has positions too.

A config is small, and anyone may hand one in: files beyond `MAX_BYTES`, and aliases that expand beyond
`MAX_VALUES` ("YAML bombs"), are refused before they cost anything. Tags that build Python objects are never
obeyed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

MAX_BYTES = 256 * 1024
MAX_VALUES = 10_000

KeyPath = tuple[str | int, ...]


class ConfigError(ValueError):
    """All that is wrong with a config: `messages`, each `file:line:column: text`; `str()` joins the lines."""

    def __init__(self, messages: Iterable[str]):
        self.messages = list(messages)
        super().__init__("\n".join(self.messages))


class Spot(NamedTuple):
    """A place in a file, both counted from 1."""

    line: int
    column: int


@dataclass
class Source:
    """One file: its plain values, where each key and value stands, and the problems found in it so far.

    Attributes:
        name: the file as the user wrote it, first word of every message.
        value: the document as dict, list, str, int, float, bool and None. Keys are always text.
        values: path -> where the value starts.
        keys: path -> where the key of that value starts.
    """

    name: str
    value: Any = None
    values: dict[KeyPath, Spot] = field(default_factory=dict)
    keys: dict[KeyPath, Spot] = field(default_factory=dict)
    problems: list[tuple[Spot, str]] = field(default_factory=list)

    def spot(self, path: KeyPath, at_key: bool = False) -> Spot:
        """Where `path` stands in the file, or the nearest thing around it that the file does hold."""
        if at_key and path in self.keys:
            return self.keys[path]
        while path and path not in self.values:
            path = path[:-1]
        return self.values.get(path, Spot(1, 1))

    def add(self, path: KeyPath, text: str, at_key: bool = False) -> None:
        """Note a problem at a value, or at its key."""
        self.problems.append((self.spot(path, at_key), text))

    def error(self, spot: Spot, text: str) -> ConfigError:
        """A single error, for what ends the reading."""
        return ConfigError([f"{self.name}:{spot.line}:{spot.column}: {text}"])

    def raise_problems(self) -> None:
        """Raise one `ConfigError` with every problem noted so far, in the order of the file."""
        if self.problems:
            raise ConfigError(
                f"{self.name}:{spot.line}:{spot.column}: {text}" for spot, text in sorted(set(self.problems))
            )


_START = "'python main.py --create-config' writes one to start from"


def read_source(path: str | Path) -> Source:
    """Read one YAML or JSON file.

    Raises:
        ConfigError: the file is missing, unreadable, empty, too large, not UTF-8 or malformed, or it holds
            duplicate keys, unknown tags, several documents, or aliases that expand without bound.
    """
    source = Source(str(path))
    text = _read_text(source.name)
    try:
        root = _compose(source, _yaml_text(source, text)) if text.strip() else None
        if root is None or (root.value == "" and root.tag == _TAG + "null"):
            raise source.error(Spot(1, 1), f"the file is empty; {_START}")
        source.value = _Walk(source).value_of(root, ())
    except RecursionError:
        raise source.error(Spot(1, 1), "values are nested too deeply") from None
    source.raise_problems()
    return source


def described(value: Any) -> str:
    """A plain value as the author of a config would call it, at most 60 characters."""
    if isinstance(value, dict | list):
        name = "mapping" if isinstance(value, dict) else "list"
        return f"a {name}" if value else f"an empty {name}"
    shown = json.dumps(value) if isinstance(value, bool | int | float | None) else repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


# --- bytes -> text ------------------------------------------------------------------------------------------


def _read_text(name: str) -> str:
    """The text of a file, decoded as UTF-8 (a byte order mark is dropped)."""
    try:
        with open(name, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError([f"{name}: there is no such file; {_START}"]) from None
    except IsADirectoryError:
        raise ConfigError([f"{name}: this is a directory; name a YAML or JSON file in it"]) from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        reason = getattr(error, "strerror", None) or error
        raise ConfigError([f"{name}: cannot be read ({reason})"]) from None
    if len(content) > MAX_BYTES:
        raise ConfigError([f"{name}: larger than {MAX_BYTES // 1024} KiB, which no config needs to be"])
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        column = error.start - content.rfind(b"\n", 0, error.start)
        text = f"byte 0x{content[error.start]:02x} is not UTF-8; save the file as UTF-8 text"
        raise ConfigError([f"{name}:{line}:{column}: {text}"]) from None


def _yaml_text(source: Source, text: str) -> str:
    """The text as YAML can take it. JSON may be indented with tabs, which YAML forbids: they become spaces.

    Inside a JSON string a tab is always written `\\t`, so replacing raw tabs changes no value and no column.
    """
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        if source.name.lower().endswith(".json"):
            reason = error.msg[0].lower() + error.msg[1:]
            raise source.error(Spot(error.lineno, error.colno), f"not JSON: {reason}") from None
        return text
    except ValueError:  # a number of thousands of digits; the walk will say where
        return text
    return text.replace("\t", " ")


# --- text -> nodes ------------------------------------------------------------------------------------------

_TAG = "tag:yaml.org,2002:"


class _CoreLoader(yaml.SafeLoader):
    """PyYAML's loader with the implicit types of YAML 1.2 (underscores in whole numbers stay allowed)."""

    yaml_implicit_resolvers = {}  # noqa: RUF012  (PyYAML's own protocol: a table on the class)


for _kind, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", list("-+0123456789")),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("merge", r"<<", ["<"]),
):
    _CoreLoader.add_implicit_resolver(_TAG + _kind, re.compile(rf"^(?:{_pattern})$"), _first)


def _compose(source: Source, text: str) -> yaml.Node | None:
    """The root node of the only document, or None for a file of comments."""
    try:
        return _CoreLoader(text).get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        spot = Spot(mark.line + 1, mark.column + 1) if mark else Spot(1, 1)
        raise source.error(spot, _plain_syntax_error(error)) from None
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        spot = Spot(before.count("\n") + 1, len(before) - before.rfind("\n"))
        text = f"the character {chr(error.character)!r} is not allowed in YAML"
        raise source.error(spot, text) from None


def _plain_syntax_error(error: yaml.MarkedYAMLError) -> str:
    """PyYAML's complaint as one sentence, with the cure for the two most usual causes."""
    problem = error.problem or error.context or "malformed"
    if "another document" in problem:
        return "a second document starts here; a config is one document (remove the '---')"
    if "'\\t'" in problem:
        return "a tab cannot indent YAML; use spaces"
    cure = "; put quotes around text that holds ': '" if "mapping values are not allowed" in problem else ""
    context = f" ({error.context})" if error.context and error.context != problem else ""
    return f"not YAML: {problem}{context}{cure}"


# --- nodes -> values ----------------------------------------------------------------------------------------


class _Walk:
    """One walk over the nodes of a file: builds values, notes spots, counts what aliases expand to."""

    def __init__(self, source: Source):
        self.source = source
        self.n_values = 0
        self.open_nodes: set[int] = set()  # ids of the nodes we are inside of: meeting one again is a cycle

    def value_of(self, node: yaml.Node, path: KeyPath) -> Any:
        """The plain value of a node that stands at `path`."""
        spot = _start(node)
        self.n_values += 1
        if self.n_values > MAX_VALUES:
            raise self.source.error(spot, f"more than {MAX_VALUES:,} values once all aliases are expanded")
        if id(node) in self.open_nodes:
            raise self.source.error(spot, "an alias here points to the value that it is part of")
        self.open_nodes.add(id(node))
        try:
            value = self._plain(node, path)
        finally:
            self.open_nodes.remove(id(node))
        self.source.values[path] = spot  # last, because a merged mapping was walked under the same path
        return value

    def _plain(self, node: yaml.Node, path: KeyPath) -> Any:
        kind = node.tag.removeprefix(_TAG)
        if isinstance(node, yaml.MappingNode) and kind == "map":
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and kind == "seq":
            return [self.value_of(item, (*path, index)) for index, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode) and kind in _SCALARS:
            return self._scalar(node, kind)
        shown = node.tag.replace(_TAG, "!!")
        self._note(node, f"the tag {shown} is not known here; write the plain value")
        return None

    def _scalar(self, node: yaml.ScalarNode, kind: str) -> Any:
        meaning, read = _SCALARS[kind]
        try:
            return read(node.value)
        except (KeyError, ValueError):  # UnicodeError is a ValueError
            shown = node.value if len(node.value) <= 40 else node.value[:37] + "..."
            self._note(node, f"{shown!a} cannot be read as {meaning}")
            return None

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        """Merged keys first (`<<: *base`), so that own keys win; a key written twice is a problem."""
        merged: dict[str, Any] = {}
        own: list[tuple[str, yaml.Node, yaml.Node]] = []
        for key_node, value_node in node.value:
            if key_node.tag == _TAG + "merge":
                merged.update(self._merge(value_node, path))
            elif isinstance(key_node, yaml.ScalarNode):
                own.append((self._scalar(key_node, "str"), key_node, value_node))
            else:
                self._note(key_node, "a key must be plain text")
        first_lines: dict[str, int] = {}
        for key, key_node, value_node in own:
            here = _start(key_node)
            if key in first_lines:
                self._note(key_node, f"duplicate key {key!r} (first on line {first_lines[key]})")
            else:
                first_lines[key] = here.line
                self.source.keys[(*path, key)] = here
                merged[key] = self.value_of(value_node, (*path, key))
        return merged

    def _merge(self, node: yaml.Node, path: KeyPath) -> dict[str, Any]:
        """The keys that `<<:` brings in: one mapping, or a list of mappings of which earlier ones win."""
        mappings = node.value if isinstance(node, yaml.SequenceNode) else [node]
        merged: dict[str, Any] = {}
        for mapping in reversed(mappings):
            if isinstance(mapping, yaml.MappingNode):
                merged.update(self.value_of(mapping, path))
            else:
                self._note(mapping, "'<<' merges mappings only")
        return merged

    def _note(self, node: yaml.Node, text: str) -> None:
        self.source.problems.append((_start(node), text))


def _start(node: yaml.Node) -> Spot:
    return Spot(node.start_mark.line + 1, node.start_mark.column + 1)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("beyond the range of a float")
    return number


def _whole_characters(text: str) -> str:
    """Text with surrogate pairs joined, as JSON escapes an emoji; half a pair alone is a UnicodeError."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16")


_SCALARS = {
    "null": ("null", lambda text: None),
    "bool": ("true or false", lambda text: {"true": True, "false": False}[text.lower()]),
    "int": ("a whole number", lambda text: int(text.replace("_", ""))),
    "float": ("a number (floats end at 1.8e308)", _finite),
    "str": ("text", _whole_characters),
    "merge": ("text", str),  # '<<' as a value is just text
}
