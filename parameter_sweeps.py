"""One entry of a list that stands for many: `sweep:` and `exclude:`.

    - mode: reactive
      sweep: {max_gpu_pages: [4, 8, 16], policy: [lru, mru]}
      exclude: [{max_gpu_pages: 16, policy: mru}]

The one idea: a sweep is only a way of writing. Every combination of the listed values, but for those that a mapping
under `exclude` matches, becomes an experiment exactly as if somebody had written it by hand, with a name that says
what was swept: `reactive max_gpu_pages=4 policy=lru`. So it is validated, run, compared and drawn like any other.

A key with keys inside (`link`, `quality`, a part with parameters) can be swept as a whole or by one of its keys,
`link.bandwidth_gb_s: [1, 4]` or, the same, `link: {bandwidth_gb_s: [1, 4]}`. In `defaults:` a sweep is shared: each
entry takes the keys that its mode knows and that it does not set itself, so that a baseline is not multiplied by the
keys of paging.

Values are compared as YAML values: 8 and 8.0 are one number, `true` is no number, and `"8"` is a text.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from config_messages import unknown_key, useless_key
from config_schema import ALL_KEYS, MAPPING_KEYS, PART_KEYS, Experiment
from registry import nearest
from yaml_source import KeyPath, Source, described

SWEEP_KEYS = ("sweep", "exclude")
MAX_COMBINATIONS = 10_000
_EXAMPLE = "such as 'max_gpu_pages: [4, 8]'"


@dataclass(frozen=True)
class SweptValue:
    """One value of a swept key, and where it stands in the file."""

    path: KeyPath
    value: Any

    def same_as(self, other: SweptValue) -> bool:
        return comparable(self.value) == comparable(other.value)


Combination = dict[str, SweptValue]  # swept key, dotted where it lies inside another -> its value


@dataclass(frozen=True)
class Exclusion:
    """One mapping under `exclude`: the combinations that have all of these values are left out."""

    path: KeyPath
    values: Combination

    def matches(self, combination: Combination) -> bool:
        return all(combination[key].same_as(ruled) for key, ruled in self.values.items())

    def matches_some(self, sweep: Sweep) -> bool:
        """Whether any combination of a sweep matches: all keys are swept, and over these values among others."""
        return all(
            any(ruled.same_as(swept) for swept in sweep.lists.get(key, ())) for key, ruled in self.values.items()
        )


@dataclass
class Sweep:
    """What an entry, or `defaults:`, sweeps. `broken` once something in it has been refused."""

    path: KeyPath
    lists: dict[str, list[SweptValue]] = field(default_factory=dict)
    exclusions: list[Exclusion] = field(default_factory=list)
    broken: bool = False

    @property
    def size(self) -> int:
        return math.prod(map(len, self.lists.values()))

    def product(self) -> Iterator[Combination]:
        """Every combination, exclusions or not; the key written last varies fastest."""
        for values in itertools.product(*self.lists.values()):
            yield dict(zip(self.lists, values, strict=True))

    def combinations(self) -> list[Combination]:
        """Those that no exclusion matches."""
        return [one for one in self.product() if not any(rule.matches(one) for rule in self.exclusions)]


def comparable(value: Any) -> Any:
    """Something hashable that two values share exactly if they are the same YAML value."""
    if isinstance(value, Mapping):
        return "mapping", frozenset((key, comparable(inner)) for key, inner in value.items())
    if isinstance(value, list | tuple):
        return "list", tuple(map(comparable, value))
    return (
        ("number", value)
        if isinstance(value, int | float) and not isinstance(value, bool)
        else (str(type(value)), value)
    )


def yaml_text(value: Any) -> str:
    """A value as it would be written on one line of a config: `8`, `null`, `{name: s3fifo, small_fraction: 0.2}`."""
    text = yaml.safe_dump(value, default_flow_style=True, width=math.inf, sort_keys=False, allow_unicode=True)
    return text.strip().removesuffix("...").strip()


def combination_text(combination: Combination) -> str:
    """`max_gpu_pages=8 policy=mru`; in values that are lists or mappings no spaces, so that words stay apart."""
    return " ".join(f"{key}={_value_text(swept.value)}" for key, swept in combination.items())


def _value_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    text = yaml_text(value)
    return text.replace(": ", "=").replace(", ", ",") if isinstance(value, dict | list) else text


# ----------------------------------------------------------------------------------------------------------------------
# Reading
# ----------------------------------------------------------------------------------------------------------------------


def read_sweep(source: Source, path: KeyPath, holder: Mapping[str, Any]) -> Sweep:
    """What `sweep:` and `exclude:` of an entry, or of `defaults:`, at `path` say; what is wrong is noted.

    Keys are held against all modes here; `for_entry` holds them against the entry's own.
    """
    sweep = Sweep((*path, "sweep"))
    n_problems = len(source.problems)
    if "sweep" in holder:
        _read_lists(source, sweep, holder)
    if "exclude" in holder:
        _read_exclusions(source, sweep, (*path, "exclude"), holder["exclude"])
    sweep.broken = len(source.problems) > n_problems
    return sweep


def _read_lists(source: Source, sweep: Sweep, holder: Mapping[str, Any]) -> None:
    block = holder["sweep"]
    if not isinstance(block, dict) or not block:
        source.add(
            sweep.path, f"'sweep' must be a mapping of keys to lists of values, {_EXAMPLE}, found {described(block)}"
        )
        return
    for key, path, values in _flat(sweep.path, block):
        reason = _no_sweep_of(key)
        if reason is not None:
            source.add(path, reason, at_key=True)
        elif not isinstance(values, list) or not values:
            rule = f"'sweep' needs a list of values for {key!r}"
            cure = (
                f"; write [{yaml_text(values)}]" if not isinstance(values, dict | list) and values is not None else ""
            )
            source.add(path, f"{rule}, found {described(values)}{cure}")
        elif key in sweep.lists:
            source.add(path, f"{key!r} is swept twice; keep one of the lists", at_key=True)
        else:
            sweep.lists[key] = [SweptValue((*path, index), value) for index, value in enumerate(values)]
            _check_values(source, key, sweep.lists[key])
    for key in sweep.lists:
        _check_set_once(source, sweep, key, holder)


def _flat(path: KeyPath, block: Mapping[str, Any], start: str = "") -> Iterator[tuple[str, KeyPath, Any]]:
    """Dotted key, path and value; a mapping under a key that has keys inside is taken apart."""
    for key, value in block.items():
        dotted = f"{start}{key}"
        if isinstance(value, dict) and value and dotted.partition(".")[0] in (*MAPPING_KEYS, *PART_KEYS):
            yield from _flat((*path, key), value, f"{dotted}.")
        else:
            yield dotted, (*path, key), value


def _no_sweep_of(key: str) -> str | None:
    """Why a key cannot be swept in any mode; None if it can."""
    head, dot, _ = key.partition(".")
    if key == "mode":
        return "'mode' cannot be swept; write an entry for each mode, and what they share under 'sweep:' in 'defaults:'"
    if key == "name":
        return "'name' cannot be swept; each combination is named after the entry and what is swept"
    if key in SWEEP_KEYS:
        return f"{key!r} stands beside 'sweep', not in it; indent it less"
    if head not in ALL_KEYS:
        return unknown_key(head)
    if dot and head not in (*MAPPING_KEYS, *PART_KEYS):
        return f"{head!r} has no keys inside, so {key!r} cannot be swept; sweep {head!r}"
    return None


def _check_values(source: Source, key: str, values: Sequence[SweptValue]) -> None:
    seen: dict[Any, SweptValue] = {}
    for swept in values:
        first = seen.setdefault(comparable(swept.value), swept)
        if first is not swept:
            source.add(swept.path, f"{key!r} is to be {yaml_text(swept.value)} twice; remove one")
    unlisted = next((swept for swept in values if not isinstance(swept.value, list)), None)
    if key == "context_lengths" and unlisted is not None:
        source.add(
            unlisted.path,
            f"each value of 'context_lengths' is a list itself, so a sweep of it is a list of lists, such as [[500],"
            f" [1000, 2000]], found {described(unlisted.value)}; several contexts need no sweep:"
            " write 'context_lengths: [500, 1000]' in the entry",
        )


def _check_set_once(source: Source, sweep: Sweep, key: str, holder: Mapping[str, Any]) -> None:
    """A key that is swept may not be set beside that, neither by itself nor inside a mapping."""
    head, _, inner = key.partition(".")
    path = _path_of(sweep.lists[key])
    if key in holder:
        line = source.spot((*sweep.path[:-1], key), at_key=True).line
        source.add(path, f"{key!r} is swept here and set on line {line}; remove one", at_key=True)
    others = [holder[head]] if head in holder else [swept.value for swept in sweep.lists.get(head, ())]
    if inner and any(_holds(other, inner.split("."), head) for other in others):
        source.add(path, f"{key!r} is swept, and {head!r} sets {inner!r} as well; remove one", at_key=True)


def _holds(value: Any, keys: Sequence[str], head: str) -> bool:
    if isinstance(value, str):
        return head in PART_KEYS and list(keys) == ["name"]
    while keys and isinstance(value, Mapping) and keys[0] in value:
        value, keys = value[keys[0]], keys[1:]
    return not keys


def _path_of(values: Sequence[SweptValue]) -> KeyPath:
    """Where the list of a swept key stands."""
    return values[0].path[:-1]


def _read_exclusions(source: Source, sweep: Sweep, path: KeyPath, rules: Any) -> None:
    if not isinstance(rules, list) or not rules:
        rule = "'exclude' must be a list of mappings, such as '- {max_gpu_pages: 4, policy: mru}'"
        source.add(path, f"{rule}, found {described(rules)}")
        return
    for index, rule in enumerate(rules):
        if isinstance(rule, dict) and rule:
            sweep.exclusions.append(Exclusion((*path, index), _flat_rule((*path, index), rule, sweep)))
        else:
            source.add(
                (*path, index),
                f"'exclude' must be a list of mappings of swept keys to values, found {described(rule)} in it",
            )


def _flat_rule(path: KeyPath, rule: Mapping[str, Any], sweep: Sweep) -> Combination:
    """The mapping of an exclusion with dotted keys, but for what is swept as a whole."""
    flat: Combination = {}
    for key, value in rule.items():
        whole = key in sweep.lists or not isinstance(value, dict)
        for dotted, place, inner in [(key, (*path, key), value)] if whole else _flat(path, {key: value}):
            flat[dotted] = SweptValue(place, inner)
    return flat


# ----------------------------------------------------------------------------------------------------------------------
# What an entry makes of it
# ----------------------------------------------------------------------------------------------------------------------


def for_entry(source: Source, own: Sweep, shared: Sweep, entry: Mapping[str, Any], cls: type[Experiment]) -> Sweep:
    """The sweep of one entry: its own, and of that in `defaults:` what its mode knows and it does not set itself.

    Exclusions in `defaults:` count where all of their keys are swept. What is wrong is noted, and makes it broken.
    """
    n_problems = len(source.problems)
    for key, values in own.lists.items():
        if key.partition(".")[0] not in cls.model_fields:
            source.add(_path_of(values), useless_key(key.partition(".")[0], cls), at_key=True)
    own_heads = {key.partition(".")[0] for key in (*own.lists, *entry)}
    taken = {
        key: values
        for key, values in shared.lists.items()
        if (head := key.partition(".")[0]) in cls.model_fields and head not in own_heads
    }
    sweep = Sweep(own.path if own.lists else shared.path, taken | own.lists)
    if not own.broken and not shared.broken:
        _check_exclusions(source, sweep, own.exclusions)
        sweep.exclusions = [rule for rule in shared.exclusions if rule.values.keys() <= sweep.lists.keys()]
        sweep.exclusions += own.exclusions
    sweep.broken = own.broken or shared.broken or len(source.problems) > n_problems
    return sweep


def _check_exclusions(source: Source, sweep: Sweep, rules: Sequence[Exclusion]) -> None:
    """An exclusion that leaves nothing out is a slip: it names what is not swept, or values that are not listed."""
    for rule in rules:
        for key, ruled in rule.values.items():
            if key not in sweep.lists:
                swept = f"swept here: {', '.join(sweep.lists)}"
                words = swept if sweep.lists else "nothing is swept here; add 'sweep:' or remove 'exclude:'"
                meant = nearest(key, list(sweep.lists))
                source.add(ruled.path, f"'exclude' names {key!r}, which is not swept{meant} ({words})", at_key=True)
            elif not any(ruled.same_as(swept) for swept in sweep.lists[key]):
                listed = ", ".join(yaml_text(swept.value) for swept in sweep.lists[key])
                text = f"this exclusion matches nothing: {key!r} is never {yaml_text(ruled.value)}"
                source.add(ruled.path, f"{text}; it is swept over {listed}")


def check_size(source: Source, sweep: Sweep, n_before: int) -> None:
    """Refuse a product beyond `MAX_COMBINATIONS`, those of the entries before included."""
    if n_before + sweep.size > MAX_COMBINATIONS:
        factors = " x ".join(str(len(values)) for values in sweep.lists.values())
        before = f", after {n_before:,} of the entries before," if n_before else ""
        source.add(
            sweep.path,
            f"this sweep has {factors} = {sweep.size:,} combinations{before} and a list may have {MAX_COMBINATIONS:,};"
            " shorten its lists or split the file",
        )
        sweep.broken = True


class NothingInside(ValueError):
    """A swept key lies inside a value that is no mapping; `key` is the swept one."""

    def __init__(self, key: str, value: Any):
        head = key.partition(".")[0]
        cure = f"write {head!r} as a mapping, or sweep {head!r}"
        super().__init__(f"{key!r} is swept, but {head!r} is {described(value)}, which has no keys inside; {cure}")
        self.key = key


def applied(combination: Combination, settings: Mapping[str, Any], cls: type[Experiment]) -> dict[str, Any]:
    """The settings of an entry with the values of a combination put in: whole keys first, then the keys inside them.

    A part that is given by its name becomes a mapping with that name, and a key that is set nowhere starts from its
    default.

    Raises:
        NothingInside: `link.bandwidth_gb_s` is swept, and the link is `pcie3-x16`.
    """
    settings = dict(settings)
    for key in sorted(combination, key=lambda key: key.count(".")):
        head, *inner = key.split(".")
        value = combination[key].value
        settings[head] = _put(_opened(settings, key, cls), inner, value) if inner else value
    return settings


def _opened(settings: Mapping[str, Any], key: str, cls: type[Experiment]) -> Mapping[str, Any]:
    """The mapping that the first part of a dotted key holds, or is short for."""
    head = key.partition(".")[0]
    value = settings.get(head, cls.model_fields[head].default)
    if isinstance(value, Mapping):
        return value
    if head in PART_KEYS and isinstance(value, str):
        return {"name": value}
    if head not in settings or value is None:
        return {}
    raise NothingInside(key, value)


def _put(mapping: Mapping[str, Any], keys: Sequence[str], value: Any) -> dict[str, Any]:
    """A copy of the mapping with one value inside replaced."""
    first, *rest = keys
    inner = mapping.get(first)
    return {**mapping, first: _put(inner if isinstance(inner, Mapping) else {}, rest, value) if rest else value}
