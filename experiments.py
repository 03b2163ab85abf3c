"""From a YAML or JSON file to validated experiments.

A config is a list, `experiments:`, and an optional block, `defaults:`, shared by all entries. In
`defaults:` keys of any mode may stand and each entry takes those its mode knows; in an entry itself, a key
that its mode ignores is an error, for it would promise something that does not happen. An entry with `sweep:` stands
for many experiments; see `parameter_sweeps`.

The one idea: a file is never judged by its first error. Every function below notes what it finds in the
`Source`, which knows the places, and goes on; at the end all of it is raised at once, in the order of the
file: `experiment_config.yaml:14:5: unknown key 'page_sise'; did you mean 'page_size'?`

This module is the front door to configs. Behind it are the keys (`config_schema`), the sentences
(`config_messages`), the reading of files (`yaml_source`), sweeps (`parameter_sweeps`) and the single runs
(`run_specs`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cache_settings import Paging, PrefetchSpec
from config_messages import Fault, either, faults_in_every_mode, unknown_key, unknown_mode, validated
from config_schema import (
    ALL_KEYS,
    MODE_CLASSES,
    BaselineExperiment,
    Experiment,
    PredictiveExperiment,
    ReactiveExperiment,
)
from parameter_sweeps import (
    SWEEP_KEYS,
    Combination,
    NothingInside,
    Sweep,
    applied,
    check_size,
    combination_text,
    comparable,
    for_entry,
    read_sweep,
    yaml_text,
)
from run_specs import RunSpec, clamp, expand
from yaml_source import ConfigError, KeyPath, Source, described, read_source

__all__ = [
    "MODE_CLASSES",
    "BaselineExperiment",
    "ConfigError",
    "Experiment",
    "Paging",
    "PredictiveExperiment",
    "PrefetchSpec",
    "ReactiveExperiment",
    "RunSpec",
    "clamp",
    "expand",
    "load_experiment",
    "load_experiments",
    "override",
]


def load_experiments(path: str | Path) -> list[Experiment]:
    """The experiments of a list file (`experiments:` and, if wanted, `defaults:`).

    Raises:
        ConfigError: anything is wrong with the file; `messages` holds all of it, in the order of the file.
    """
    source = read_source(path)
    top = _mapping(source, "the file must be a mapping with 'experiments:'")
    _check_top_keys(source, top)
    defaults, shared = _read_defaults(source, top.get("defaults"))
    entries = _read_entries(source, top)
    experiments: list[Experiment] = []
    labels: list[tuple[str, KeyPath]] = []
    sweeps: list[Sweep] = []
    for index, entry in enumerate(entries):
        path = ("experiments", index)
        sweep = _sweep_of(source, path, entry, defaults, shared, sum(other.size for other in sweeps))
        plain = {key: entry[key] for key in entry if key not in SWEEP_KEYS} if isinstance(entry, dict) else entry
        if sweep is None:
            read = [_read_entry(source, path, plain, defaults)]
            labels += _label(path, plain, defaults)
        else:
            sweeps.append(sweep)
            read, names = _read_sweep(source, path, plain, defaults, sweep)
            labels += names
        experiments += [experiment for experiment in read if experiment is not None]
    _check_shared(source, shared, sweeps)
    _check_labels(source, labels)
    source.raise_problems()
    return experiments


def load_experiment(path: str | Path, mode: str) -> Experiment:
    """The one experiment of a component's config, its keys at the top of the file; `mode:` may be left out.

    Raises:
        ConfigError: anything is wrong with the file, or it is for another mode.
    """
    source = read_source(path)
    entry = _mapping(source, "the file must be a mapping with the keys of one experiment")
    if "experiments" in entry:
        source.add((), "this is a list of experiments, for main.py; a component takes a single one")
        source.raise_problems()
    for key in SWEEP_KEYS:
        if key in entry:
            text = (
                f"{key!r} is for the lists of main.py; a component runs a single experiment, so write one value a key"
            )
            source.add((key,), text, at_key=True)
    entry = {"mode": mode} | {key: value for key, value in entry.items() if key not in SWEEP_KEYS}
    if entry["mode"] != mode and _is_mode(entry["mode"]):
        source.add(("mode",), f"this file is for mode {entry['mode']}, but mode {mode} was asked for")
    experiment = _read_entry(source, (), entry, {})
    source.raise_problems()
    return experiment


def override(experiment: Experiment, **values: Any) -> Experiment:
    """The same experiment with some keys replaced (command-line flags over a file), checked again as a whole.

    Raises:
        ConfigError: a value is wrong; its messages name no file, for the values come from none.
    """
    changed, faults = validated(type(experiment), experiment.model_dump() | values)
    if changed is None:
        raise ConfigError(fault.text for fault in faults)
    return changed


# --- the file as a whole ------------------------------------------------------------------------------------


def _mapping(source: Source, rule: str) -> dict[str, Any]:
    """The file as a mapping; anything else ends the loading, for nothing inside it can be checked."""
    if not isinstance(source.value, dict):
        source.add((), f"{rule}, found {described(source.value)}")
        source.raise_problems()
    return source.value


def _check_top_keys(source: Source, top: dict[str, Any]) -> None:
    """A list file holds two keys. One that is an experiment itself is told so, and not key by key."""
    if "experiments" not in top and not top.keys().isdisjoint(ALL_KEYS):
        source.add((), "this file is one experiment, not a list; put it under 'experiments:', behind a '- '")
        source.raise_problems()
    for key in top.keys() - {"experiments", "defaults"}:
        if key in ALL_KEYS or key in SWEEP_KEYS:
            text = f"{key!r} belongs in an entry of 'experiments:' or in 'defaults:', not at the top"
        else:
            text = unknown_key(key, ["experiments", "defaults"])
        source.add((key,), text, at_key=True)


def _read_entries(source: Source, top: dict[str, Any]) -> list[Any]:
    """The entries as they stand in the file; none after noting that there are none."""
    entries = top.get("experiments")
    if isinstance(entries, list) and entries:
        return entries
    rule = "'experiments' must be a list with at least one entry such as '- mode: baseline'"
    found = described(entries) if "experiments" in top else "no such key"
    source.add(("experiments",), f"{rule}, found {found}")
    return []


def _label(path: KeyPath, entry: Any, defaults: Mapping[str, Any]) -> list[tuple[str, KeyPath]]:
    """What an entry without a sweep will be called, and the place that says so; nothing if that is no text."""
    if not isinstance(entry, dict):
        return []
    label = entry.get("name", entry.get("mode", defaults.get("mode")))
    return [(label, (*path, "name" if "name" in entry else "mode"))] if isinstance(label, str) else []


def _check_labels(source: Source, labels: Iterable[tuple[str, KeyPath]]) -> None:
    """Results of two experiments with one label could not be told apart, so labels are unique."""
    first_lines: dict[str, int] = {}
    clashing: set[KeyPath] = set()
    for label, path in labels:
        if label not in first_lines:
            first_lines[label] = source.spot(path).line
        elif path not in clashing:  # once for each entry is enough
            clashing.add(path)
            text = f"a second experiment is called {label!r} (first on line {first_lines[label]})"
            source.add(path, f"{text}; give it a 'name:' of its own")


# --- defaults -----------------------------------------------------------------------------------------------


def _read_defaults(source: Source, defaults: Any) -> tuple[dict[str, Any], Sweep]:
    """The keys of `defaults:` that entries can take, and the sweep that they share."""
    if defaults is not None and not isinstance(defaults, dict):
        source.add(("defaults",), f"'defaults' must be a mapping, found {described(defaults)}")
    if not isinstance(defaults, dict):
        return {}, Sweep(("defaults", "sweep"))
    _check_default_keys(source, defaults)
    known = {key: value for key, value in defaults.items() if key in ALL_KEYS and key != "name"}
    _check_default_values(source, known)
    return known, read_sweep(source, ("defaults",), defaults)


def _check_default_keys(source: Source, defaults: dict[str, Any]) -> None:
    for key in defaults:
        if key == "name":
            source.add(("defaults", key), "'name' labels one experiment; write it in its entry", at_key=True)
        elif key not in ALL_KEYS and key not in SWEEP_KEYS:
            source.add(("defaults", key), unknown_key(key), at_key=True)


def _check_default_values(source: Source, defaults: dict[str, Any]) -> None:
    """Check each value in every mode that knows its key, whether or not an entry takes it."""
    if "mode" in defaults and not _is_mode(defaults["mode"]):
        source.add(("defaults", "mode"), unknown_mode(defaults["mode"]))
    for mode, cls in MODE_CLASSES.items():
        _, faults = validated(cls, _keys_of(cls, defaults) | {"mode": mode})
        for fault in faults:
            if not fault.keys:  # a conflict matters only in an entry, which may set the other side of it
                source.add(("defaults", *fault.loc), fault.text, fault.at_key)


# --- one entry ----------------------------------------------------------------------------------------------


def _read_entry(source: Source, path: KeyPath, entry: Any, defaults: dict[str, Any]) -> Experiment | None:
    """One validated entry, or None after noting what is wrong with it."""
    if not isinstance(entry, dict):
        source.add(path, f"an entry must be a mapping such as 'mode: baseline', found {described(entry)}")
        return None
    mode = entry.get("mode", defaults.get("mode"))
    if _is_mode(mode):
        cls = MODE_CLASSES[mode]
        experiment, faults = validated(cls, _keys_of(cls, defaults) | entry)
    else:
        experiment, faults = None, faults_in_every_mode(entry)
        if "mode" in entry:
            source.add((*path, "mode"), unknown_mode(mode))
        elif "mode" not in defaults:
            source.add(path, f"'mode' is missing; add 'mode: {either(MODE_CLASSES)}'")
    for fault in faults:
        source.add(_place(fault, path, entry, defaults), fault.text, fault.at_key)
    return experiment


def _place(fault: Fault, path: KeyPath, entry: Mapping[str, Any], defaults: Mapping[str, Any]) -> KeyPath:
    """Where the value at fault is written: in the entry, or in `defaults:`."""
    # Of a conflict, blame a key that the entry sets itself, if there is one.
    key = next((key for key in fault.keys if key in entry), fault.loc[0])
    inherited = key in defaults and key not in entry
    return (*(("defaults",) if inherited else path), key, *fault.loc[1:])


def _is_mode(value: Any) -> bool:
    return isinstance(value, str) and value in MODE_CLASSES


def _keys_of(cls: type[Experiment], values: dict[str, Any]) -> dict[str, Any]:
    """Those values whose keys a mode knows."""
    return {key: value for key, value in values.items() if key in cls.model_fields}


# --- one entry that stands for many -------------------------------------------------------------------------


def _sweep_of(
    source: Source, path: KeyPath, entry: Any, defaults: Mapping[str, Any], shared: Sweep, n_before: int
) -> Sweep | None:
    """What an entry sweeps; None if nothing."""
    if not isinstance(entry, dict):
        return None
    own = read_sweep(source, path, entry)
    mode = entry.get("mode", defaults.get("mode"))
    if not _is_mode(mode):
        return None
    sweep = for_entry(source, own, shared, entry, MODE_CLASSES[mode])
    if not sweep.broken:
        check_size(source, sweep, n_before)
    return sweep if sweep.lists or sweep.broken else None


def _check_shared(source: Source, shared: Sweep, sweeps: Iterable[Sweep]) -> None:
    """What `defaults:` sweep or exclude has to make a difference to some entry."""
    sweeps = list(sweeps)
    if shared.broken or any(sweep.broken for sweep in sweeps):
        return
    for key, values in shared.lists.items():
        if not any(sweep.lists.get(key) is values for sweep in sweeps):
            text = (
                f"{key!r} is swept for no entry: each sets {key.partition('.')[0]!r} itself, or is of a mode without it"
            )
            source.add(values[0].path[:-1], text, at_key=True)
    for rule in shared.exclusions:
        if not any(rule.matches_some(sweep) for sweep in sweeps):
            source.add(rule.path, "this exclusion matches no combination of any entry; mend it or remove it")


def _read_sweep(
    source: Source, path: KeyPath, entry: dict[str, Any], defaults: Mapping[str, Any], sweep: Sweep
) -> tuple[list[Experiment], list[tuple[str, KeyPath]]]:
    """The experiments of a swept entry, and what each is called; none after noting what is wrong."""
    mode = entry.get("mode", defaults.get("mode"))
    cls, label = MODE_CLASSES[mode], entry.get("name", mode)
    settings = _keys_of(cls, defaults) | entry
    if sweep.broken:  # conflicts may be of the keys that are not to be had; the others are those of any entry
        for fault in validated(cls, settings)[1]:
            if not fault.keys:
                source.add(_place(fault, path, entry, defaults), fault.text, fault.at_key)
        return [], []
    combinations = sweep.combinations()
    if not combinations:
        source.add(sweep.exclusions[0].path[:-1], "'exclude' leaves out every combination; remove an exclusion")
    found: dict[tuple[KeyPath, Fault], list[Combination]] = {}
    experiments: dict[Any, Experiment] = {}
    names: list[tuple[str, KeyPath]] = []
    for combination in combinations:
        name = f"{label} {combination_text(combination)}" if isinstance(label, str) else label
        names += [(name, (*path, "name" if "name" in entry else "mode"))] if isinstance(label, str) else []
        try:
            experiment, faults = validated(cls, applied(combination, settings, cls) | {"name": name})
        except NothingInside as error:
            experiment, faults = None, [Fault(tuple(error.key.split(".")), str(error), at_key=True)]
        for fault in faults:
            place = _swept_place(fault, combination) or _place(fault, path, entry, defaults)
            found.setdefault((place, fault), []).append(combination)
        if experiment is not None:
            first = experiments.setdefault(comparable(experiment.model_dump(exclude={"name"})), experiment)
            if first is not experiment:
                text = f"{experiment.name!r} is the same experiment as {first.name!r}; remove one of the values"
                source.add(next(iter(combination.values())).path[:-1], text)
    for (place, fault), concerned in found.items():
        text = _fault_in(fault, label, concerned, len(combinations))
        source.add(place, text, fault.at_key)
    return list(experiments.values()), names


def _swept_place(fault: Fault, combination: Combination) -> KeyPath | None:
    """Where the swept value at fault is written; None if no swept value is."""
    if fault.keys:  # of a conflict, a swept value rather than one that all combinations share
        return next((swept.path for key, swept in combination.items() if key.partition(".")[0] in fault.keys), None)
    for key in sorted(combination, key=lambda key: -key.count(".")):
        inner = tuple(key.split("."))
        if fault.loc[: len(inner)] == inner:
            exactly = fault.at_key and len(fault.loc) == len(inner)
            return combination[key].path[:-1] if exactly else (*combination[key].path, *fault.loc[len(inner) :])
    return None


def _fault_in(fault: Fault, label: Any, concerned: list[Combination], n_combinations: int) -> str:
    """The sentence of a fault with the combination that has it, and how to leave that out if the rest is right."""
    heads = fault.keys or fault.loc[:1]
    keys = [key for key in concerned[0] if key.partition(".")[0] in heads]
    if not keys:
        return fault.text
    more = f" and {len(concerned) - 1:,} more" if len(concerned) > 1 else ""
    text = f"{fault.text} (in {f'{label} {combination_text(concerned[0])}'!r}{more})"
    common = {
        key: concerned[0][key].value for key in keys if all(one[key].same_as(concerned[0][key]) for one in concerned)
    }
    if len(concerned) < n_combinations and common and (fault.keys or len(keys) > 1):
        return f"{text}; mend it, or add 'exclude: [{yaml_text(common)}]'"
    return text
