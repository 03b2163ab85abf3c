"""Names for the parts a user can choose or bring: modes, policies, selectors, predictors, tasks, launchers.

A registry is a table of `"name": "module:Class"`. Nothing is imported until a name is resolved, so a module that needs
torch costs nothing to be listed here. Reading a config resolves the parts it names, to check their parameters; the
built-in ones need no torch. A name that contains a colon is an import path of the user's own class
(`"my_module:MyPolicy"`), looked up from the current folder like any Python module.

Parameters of a part are the fields of its dataclass: `policy: lru` or `policy: {name: lru, ...}` in YAML.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

IMPORT_PATH = re.compile(r"\w+(\.\w+)*:\w+")


class UnknownName(ValueError):
    """A name of a part, or of a parameter of it, that is not known, with the nearest known one; or a user's own part
    that lacks a verb."""


def nearest(word: str, known: list[str] | set[str] | Mapping[str, Any]) -> str:
    """`"; did you mean 'x'?"` for the known word nearest to `word`, or an empty string when none is near."""
    begun = [one for one in known if one.startswith(f"{word}_")]  # 'model' was meant for 'model_name', not for 'mode'
    matches = begun if len(begun) == 1 else difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.6)
    return f"; did you mean {matches[0]!r}?" if matches else ""


class Registry:
    """A lazy table of names to `"module:Class"`.

    Args:
        kind: what the names name, in the singular (`"policy"`); used in messages.
        table: name -> import path.
        verbs: methods that a user's own class must have.
    """

    def __init__(self, kind: str, table: dict[str, str], verbs: Sequence[str] = ()):
        self.kind, self.table, self.verbs = kind, dict(table), tuple(verbs)

    def __iter__(self):
        return iter(self.table)

    def check(self, name: str) -> None:
        """Raise `UnknownName` unless `name` is registered, or the import path of a module that is there."""
        if name not in self.table and not IMPORT_PATH.fullmatch(name):
            known = ", ".join(sorted(self.table))
            raise UnknownName(
                f"unknown {self.kind} {name!r}{nearest(name, self.table)} (known: {known}; or 'module:Class')"
            )
        if name not in self.table:
            self._find_module(name)

    def _find_module(self, name: str) -> None:
        """Raise UnknownName where an import path leads to no module. Imports at most the packages it lies in."""
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())
        module_name = name.partition(":")[0]
        try:
            found = importlib.util.find_spec(module_name)
        except ModuleNotFoundError as error:
            if not f"{module_name}.".startswith(f"{error.name}."):  # something that the package itself imports
                raise
            found = None
        if found is None:
            raise UnknownName(f"{self.kind} {name!r}: there is no module {module_name!r} to import")

    def load(self, name: str) -> Any:
        """The class or function behind `name`.

        Raises:
            UnknownName: the name is not registered, or its import path leads nowhere, or to a class without the verbs.
        """
        self.check(name)
        path = self.table.get(name, name)
        module_name, _, attribute = path.partition(":")
        module = importlib.import_module(module_name)
        try:
            part = getattr(module, attribute)
        except AttributeError:
            raise UnknownName(f"{self.kind} {name!r}: module {module_name!r} has no {attribute!r}") from None
        if isinstance(part, type) and name not in self.table:  # `all`, which is in it, needs no verbs
            missing = [verb for verb in self.verbs if not _defines(part, verb)]
            if missing:
                raise UnknownName(f"{self.kind} {name!r} lacks {', '.join(missing)} (verbs: {', '.join(self.verbs)})")
        return part

    def create(self, choice: str | Mapping[str, Any]) -> Any:
        """A new instance from `"name"` or `{"name": ..., parameter: value}`.

        Raises:
            UnknownName: the name is unknown, or a parameter; the message lists those there are.
        """
        for refused in self.refused_parameters(choice).values():
            raise refused
        parameters = {} if isinstance(choice, str) else {k: v for k, v in choice.items() if k != "name"}
        return self.load(name_of(choice))(**parameters)

    def asks_for(self, choice: str | Mapping[str, Any], feature: str) -> bool:
        """Whether the part's class sets the attribute `feature`, such as `needs_mass`, to something true."""
        return bool(getattr(self.load(name_of(choice)), feature, False))

    def refused_parameters(self, choice: str | Mapping[str, Any]) -> dict[str, UnknownName]:
        """The parameters of a choice that its part does not have, each with what to say of it.

        Raises:
            UnknownName: as for `load`.
        """
        name = name_of(choice)
        known = parameters_of(self.load(name))
        there_are = f"(parameters: {', '.join(known) or 'none'})"
        return {
            key: UnknownName(f"{self.kind} {name!r} has no parameter {key!r}{nearest(key, known)} {there_are}")
            for key in ([] if isinstance(choice, str) else choice)
            if key not in known and key != "name"
        }

    def describe(self) -> list[tuple[str, dict[str, Any], str]]:
        """`(name, {parameter: default}, first line of the docstring)` for every registered name."""
        rows = []
        for name in self.table:
            cls = self.load(name)
            doc = (cls.__doc__ or "").strip().splitlines()
            rows.append((name, parameters_of(cls), doc[0] if doc else ""))
        return rows


def name_of(choice: str | Mapping[str, Any]) -> str:
    """The name in a choice, with or without parameters."""
    return choice if isinstance(choice, str) else choice["name"]


def choice_text(choice: str | Mapping[str, Any]) -> str:
    """A choice as tables name it: `lru`, or `s3fifo (small_fraction=0.2)`."""
    if isinstance(choice, str):
        return choice
    parameters = ", ".join(f"{key}={value}" for key, value in choice.items() if key != "name")
    return f"{choice['name']} ({parameters})" if parameters else choice["name"]


def _defines(cls: type, verb: str) -> bool:
    """Whether a class has a verb with something in it; a Protocol that it derives from has it in name only."""
    owner = next((base for base in cls.__mro__ if verb in vars(base)), None)
    return owner is not None and not getattr(owner, "_is_protocol", False)


def parameters_of(cls: Any) -> dict[str, Any]:
    """The fields a user may set on a dataclass, with their defaults; empty for anything else."""
    if not dataclasses.is_dataclass(cls):
        return {}
    return {
        field.name: None if field.default is dataclasses.MISSING else field.default
        for field in dataclasses.fields(cls)
        if field.init
    }


MODES = Registry(
    "mode",
    {
        "baseline": "inference_baseline:run",
        "reactive": "kv_paging:run",
        "predictive": "predictive_prefetch:run",
    },
)
CACHES = Registry(  # what makes the cache of a mode, to attend with where nothing is timed
    "mode", {mode: f"{path.partition(':')[0]}:make_cache" for mode, path in MODES.table.items()}
)
POLICIES = Registry(
    "policy",
    {
        "lru": "page_policies:LRU",
        "mru": "page_policies:MRU",
        "fifo": "page_policies:FIFO",
        "lfu": "page_policies:LFU",
        "clock": "page_policies:Clock",
        "s3fifo": "page_policies:S3FIFO",
        "attention": "page_policies:AttentionMass",
    },
    verbs=("insert", "touch", "victim", "remove"),
)
SELECTORS = Registry(
    "selector",
    {
        "all": "page_selectors:All",
        "quest": "page_selectors:Quest",
        "cuboid": "page_selectors:Cuboid",
        "mean_key": "page_selectors:MeanKey",
        "window": "page_selectors:Window",
        "oracle": "page_selectors:Oracle",
    },
    verbs=("digest", "score"),
)
PREDICTORS = Registry(
    "predictor",
    {
        "none": "page_predictors:NoPrediction",
        "last_step": "page_predictors:LastStep",
        "layer_ahead": "page_predictors:LayerAhead",
        "ema": "page_predictors:Ema",
        "frequency": "page_predictors:Frequency",
        "ranked": "page_predictors:Ranked",
        "cross_layer": "page_predictors:CrossLayer",
        "random": "page_predictors:Random",
        "oracle": "page_predictors:Oracle",
    },
    verbs=("want", "predict", "observe"),
)
TASKS = Registry(
    "task",
    {
        "passkey": "quality_tasks:Passkey",
        "needle": "quality_tasks:Needle",
        "needle_multikey": "quality_tasks:NeedleMultiKey",
        "needle_multivalue": "quality_tasks:NeedleMultiValue",
        "needle_multiquery": "quality_tasks:NeedleMultiQuery",
        "kv_retrieval": "quality_tasks:KVRetrieval",
        "variable_tracking": "quality_tasks:VariableTracking",
        "frequent_words": "quality_tasks:FrequentWords",
        "prose_perplexity": "prose_task:ProsePerplexity",
    },
    verbs=("item", "score", "has_depth"),
)
LAUNCHERS = Registry(
    "launcher",
    {
        "local": "launchers:LocalLauncher",
        "process": "process_launcher:ProcessLauncher",
        "ray": "ray_launcher:RayLauncher",
    },
    verbs=("perform", "close"),
)
