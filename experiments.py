"""From a YAML or JSON file to validated experiments.

A config is a list, `experiments:`, and an optional block, `defaults:`, shared by all entries. In
`defaults:` keys of any mode may stand and each entry takes those its mode knows; in an entry itself, a key
that its mode ignores is an error, for it would promise something that does not happen.

The one idea: a file is never judged by its first error. Every function below notes what it finds in the
`Source`, which knows the places, and goes on; at the end all of it is raised at once, in the order of the
file: `experiment_config.yaml:14:5: unknown key 'page_sise'; did you mean 'page_size'?`

This module is the front door to configs. Behind it are the keys (`config_schema`), the sentences
(`config_messages`), the reading of files (`yaml_source`) and the single runs (`run_specs`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cache_settings import Paging, PrefetchSpec
from config_messages import either, faults_in_every_mode, unknown_key, unknown_mode, validated
from config_schema import (
    ALL_KEYS,
    MODE_CLASSES,
    BaselineExperiment,
    Experiment,
    PredictiveExperiment,
    ReactiveExperiment,
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
    defaults = _read_defaults(source, top.get("defaults"))
    entries = _read_entries(source, top)
    read = [_read_entry(source, ("experiments", i), entry, defaults) for i, entry in enumerate(entries)]
    _check_labels(source, entries, defaults)
    source.raise_problems()
    return [experiment for experiment in read if experiment is not None]


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
    entry = {"mode": mode} | entry
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
        if key in ALL_KEYS:
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


def _check_labels(source: Source, entries: list[Any], defaults: dict[str, Any]) -> None:
    """Results of two experiments with one label could not be told apart, so labels are unique."""
    first_lines: dict[str, int] = {}
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict):
            continue
        label = entry.get("name", entry.get("mode", defaults.get("mode")))
        path = ("experiments", index, "name" if "name" in entry else "mode")
        if isinstance(label, str) and label in first_lines:
            text = f"a second experiment is called {label!r} (first on line {first_lines[label]})"
            source.add(path, f"{text}; give it a 'name:' of its own")
        elif isinstance(label, str):
            first_lines[label] = source.spot(path).line


# --- defaults -----------------------------------------------------------------------------------------------


def _read_defaults(source: Source, defaults: Any) -> dict[str, Any]:
    """The keys of `defaults:` that entries can take."""
    if defaults is None:
        return {}
    if not isinstance(defaults, dict):
        source.add(("defaults",), f"'defaults' must be a mapping, found {described(defaults)}")
        return {}
    _check_default_keys(source, defaults)
    known = {key: value for key, value in defaults.items() if key in ALL_KEYS and key != "name"}
    _check_default_values(source, known)
    return known


def _check_default_keys(source: Source, defaults: dict[str, Any]) -> None:
    for key in defaults:
        if key == "name":
            source.add(("defaults", key), "'name' labels one experiment; write it in its entry", at_key=True)
        elif key not in ALL_KEYS:
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
        # Of a conflict, blame a key that the entry sets itself, if there is one.
        key = next((key for key in fault.keys if key in entry), fault.loc[0])
        inherited = key in defaults and key not in entry
        source.add((*(("defaults",) if inherited else path), key, *fault.loc[1:]), fault.text, fault.at_key)
    return experiment


def _is_mode(value: Any) -> bool:
    return isinstance(value, str) and value in MODE_CLASSES


def _keys_of(cls: type[Experiment], values: dict[str, Any]) -> dict[str, Any]:
    """Those values whose keys a mode knows."""
    return {key: value for key, value in values.items() if key in cls.model_fields}
