"""One run with each part of a kind: every policy, or every predictor, in turn, and all else the same.

Not every part can do every run. A predictor that goes by a selector's digests has nothing to go by where attention
reads all pages, and says so: as its settings are checked, or as its cache is made. Such a variant is left out with its
reason, and the others go on. The part that the command itself chose is another matter: it was asked for, so what is
wrong with it is raised, and it is tried first, before time goes into the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from experiments import Experiment, override
from metrics import RunResult
from registry import Registry, choice_text
from run_specs import RunSpec


@dataclass
class EachPart:
    """The variants of an experiment: one with every registered part, and with the chosen one where it is another or
    has parameters.

    Attributes:
        chosen: the name of the variant that is the experiment as it stands.
        fields: by variant, in the order of the registry, the fields of `RunSpec` that differ.
        left_out: variants that cannot be run, and why.
    """

    chosen: str
    fields: dict[str, dict[str, Any]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, experiment: Experiment, registry: Registry) -> EachPart:
        """The parts of one kind; that is also the key by which an experiment chooses one."""
        key = registry.kind
        own = getattr(experiment, key)
        each = cls(choice_text(own))
        for choice in [*registry, *([] if own in registry else [own])]:
            try:
                each.fields[choice_text(choice)] = override(experiment, **{key: choice}).cache_fields()
            except ValueError as error:  # not the experiment's own choice, which has been checked with it
                each.leave_out(choice_text(choice), error)
        return each

    def leave_out(self, variant: str, error: ValueError) -> None:
        self.left_out[variant] = "; ".join(str(error).splitlines())

    def measure(
        self, repetitions: Sequence[RunSpec], measure: Callable[[RunSpec], RunResult]
    ) -> dict[str, list[RunResult]]:
        """Measure every variant of each repetition; a variant that refuses one of them is left out from then on.

        Returns:
            by variant, the results of all repetitions, in the order of the registry.

        Raises:
            ValueError: the variant that was chosen cannot be run.
        """
        results: dict[str, list[RunResult]] = {variant: [] for variant in self.fields}
        for spec in repetitions:
            for variant in sorted(self.fields, key=lambda variant: variant != self.chosen):
                if variant in self.left_out:
                    continue
                try:
                    results[variant].append(measure(replace(spec, **self.fields[variant])))
                except ValueError as error:
                    if variant == self.chosen:
                        raise
                    self.leave_out(variant, error)
        return {variant: runs for variant, runs in results.items() if variant not in self.left_out}
