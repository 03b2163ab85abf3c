"""What a set of results was asked to do: the settings in which its strategies differ, and a list that makes it again.

A result carries its whole spec, so the experiment list can be written back from results alone, whatever became of the
file they were made with: `experiment_list` gives YAML that `main.py --config` takes, and whose runs have the very
specs, and so the run ids, of these. Only where two experiments had one name do the runs differ from these, in their
names, which tell them apart, and so in their ids. Settings that have their defaults are left out of it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from config_schema import MODE_CLASSES
from result_frame import Result, count_at, mode_rank, strategy_labels
from text_tables import DASH, Table

PER_RUN = ("context_length", "requested_context_length", "repetition", "seed")
_ABOUT_EACH = ("name", "mode")
_ALWAYS = ("model_name", "max_new_tokens")  # written also where they have their defaults, since one asks for them first


def settings_of(spec: Mapping[str, Any]) -> dict[str, Any]:
    """A spec without what varies from run to run, its blocks laid flat: the keys of a config."""
    flat: dict[str, Any] = {}
    for key, value in spec.items():
        if key in ("paging", "prefetch"):
            flat.update(value or {})
        elif key not in PER_RUN:
            flat[key] = value
    if spec.get("mode") != "baseline":
        flat.pop("cache_implementation", None)
    return flat


def settings_table(results: Iterable[Result]) -> Table:
    """A row for each strategy, and a column for each setting that is not the same in all strategies that have it."""
    of = _settings_of_strategies(results)
    differing = [key for key, shown in _values_by_key(of).items() if len(set(shown.values())) > 1]
    rows = [(strategy, *(_shown(settings, key) for key in differing)) for strategy, settings in of.items()]
    note = f"{DASH}: this mode has no such setting." if any(DASH in row for row in rows) else ""
    return Table("Settings in which the strategies differ", ("strategy", *differing), rows, note, sections=())


def shared_settings(results: Iterable[Result]) -> dict[str, dict[str, str]]:
    """Whose settings, in words -> setting -> value, of those that are the same in all strategies that have them."""
    of = _settings_of_strategies(results)
    shared: dict[str, dict[str, str]] = {}
    for key, shown in _values_by_key(of).items():
        if len(set(shown.values())) == 1:
            modes = dict.fromkeys(of[strategy]["mode"] for strategy in shown)
            named = f"mode{'s' if len(modes) > 1 else ''} {' and '.join(modes)}"
            who = "all strategies" if len(shown) == len(of) else named
            shared.setdefault(who, {})[key] = next(iter(shown.values()))
    return shared


def _values_by_key(of: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """Setting -> strategy that has it -> its value as text."""
    keys = dict.fromkeys(key for settings in of.values() for key in settings if key not in ("name", "prompt_sha256"))
    return {key: {name: _shown(settings, key) for name, settings in of.items() if key in settings} for key in keys}


def _settings_of_strategies(results: Iterable[Result]) -> dict[str, dict[str, Any]]:
    """Of each strategy the settings of its first run, baseline first."""
    results = sorted(results, key=mode_rank)
    of: dict[str, dict[str, Any]] = {}
    for label, result in zip(strategy_labels(results), results, strict=True):
        of.setdefault(label, settings_of(result["spec"]))
    return of


def _shown(settings: Mapping[str, Any], key: str) -> str:
    if key not in settings:
        return DASH
    value = settings[key]
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str) else _plain(value)


def _plain(value: Any) -> str:
    """`{name: s3fifo, small_fraction: 0.2}`, on one line."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_plain(inner)}' for key, inner in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_plain, value))}]"
    return value if isinstance(value, str) else json.dumps(value)


# --- the list again -----------------------------------------------------------------------------------------------


def experiment_list(results: Sequence[Result]) -> str:
    """The list of experiments that these results are of, as YAML for `main.py --config`.

    An experiment has all context lengths and as many repetitions as any of its results has, so that the list of an
    interrupted sweep has runs that it did not make. Where two experiments have one name, as in a folder that holds two
    sweeps, the settings or the seeds in which they differ are added to it.
    """
    import yaml

    groups: dict[tuple[str, int], list[Result]] = {}
    for label, result in zip(strategy_labels(results), results, strict=True):
        groups.setdefault((label, first_seed(result)), []).append(result)
    seeds = Counter(label for label, _ in groups)
    entries = [
        _entry(f"{label} seed={seed}" if seeds[label] > 1 else label, group) for (label, seed), group in groups.items()
    ]
    shared = {key: value for key, value in entries[0].items() if _is_shared(key, value, entries)}
    own = [{key: value for key, value in entry.items() if key not in shared} for entry in entries]
    values = {"defaults": shared, "experiments": own} if shared else {"experiments": own}
    return yaml.safe_dump(values, sort_keys=False, default_flow_style=None, allow_unicode=True, width=100)


def first_seed(result: Result) -> int:
    """The seed of the experiment: repetitions of a sampled run add their number to it."""
    spec = result["spec"]
    seed = count_at(result, "spec.seed") or 0
    return seed - (count_at(result, "spec.repetition") or 0) if spec.get("do_sample") else seed


def _entry(label: str, group: Sequence[Result]) -> dict[str, Any]:
    """One experiment: its mode, its name, the lengths and repetitions, and whatever is not at its default."""
    spec = group[0]["spec"]
    fields = MODE_CLASSES[spec["mode"]].model_fields
    entry: dict[str, Any] = {"mode": spec["mode"]}
    entry |= {"name": label} if label != spec["mode"] else {}
    for key, value in settings_of(spec).items():
        if key in fields and key not in (*_ABOUT_EACH, "quality"):
            entry |= {key: value} if key in _ALWAYS or value != fields[key].default else {}
    entry["context_lengths"] = list(dict.fromkeys(result["spec"]["requested_context_length"] for result in group))
    entry["num_runs"] = 1 + max(result["spec"]["repetition"] for result in group)
    entry["seed"] = first_seed(group[0])
    quality = spec.get("quality")
    entry["quality"] = {key: value for key, value in quality.items() if value is not None} if quality else False
    return entry


def _is_shared(key: str, value: Any, entries: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a setting can stand once for all: every experiment that knows the key has this value."""
    knowing = [entry for entry in entries if key in MODE_CLASSES[entry["mode"]].model_fields]
    return key not in _ABOUT_EACH and len(knowing) == len(entries) and all(one.get(key) == value for one in knowing)
