"""The default list of experiments, as a YAML file that explains every key.

The one idea: the file is written from the schema. Each key's meaning, choices and default are those of its
`Field` in `config_schema`, so the file cannot tell of a key that is gone or keep a default that has
changed. Only what makes it *this* list stands here: the values in `_CHOSEN`, and the three experiments.

`experiment_config.yaml` in the repository is exactly this text.
"""

from __future__ import annotations

import json
import textwrap
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from config_schema import BaselineExperiment, Experiment, PredictiveExperiment, ReactiveExperiment
from registry import Registry

_HEADER = """\
# The default experiments of KV Prefetch: a small language model with its KV cache kept whole (baseline), in
# pages fetched when attention asks for them (reactive), and in pages fetched ahead of need (predictive).
#
#     python main.py --config <this file>
#
# It takes about 6 minutes on 2 CPU cores, and needs no network and no GPU.
#
# Every key there is stands here once. A key behind '#' shows its default: remove the '# ' to change it.
# An entry takes from 'defaults' what its mode knows; what it sets itself wins.
"""
_SWEEP = """\
# An entry can stand for many. 'sweep' gives keys lists of values, and each combination is an experiment of
# its own; 'exclude' leaves out the combinations that match one of its mappings. This would be five
# experiments, the first named 'reactive max_gpu_pages=4 policy=lru':
#
#     - mode: reactive
#       sweep: {max_gpu_pages: [4, 8, 16], policy: [lru, mru]}
#       exclude: [{max_gpu_pages: 16, policy: mru}]
#
# A key inside another is swept as 'link.bandwidth_gb_s'. In 'defaults' a sweep is shared by the entries whose
# mode knows its keys.
"""
_CHOSEN = {
    "model_name": "smollm2-135m",
    "context_lengths": [500, 1000, 2000],
    "num_runs": 3,
    "max_new_tokens": 50,
    "page_size": 128,
    "max_gpu_pages": 6,
    "staging_pages": 6,
    "link": {"bandwidth_gb_s": 1.0, "latency_us": 10.0},
    "quality": {"fidelity_tokens": 32},
}
_REASONS = {
    "link": "Slowed to 1 GB/s (PCIe 3.0 x16 moves 15.75) so that waiting for pages is visible beside the computing of"
    " a CPU; this is a model of no real bus.",
    "quarter": "An approximation, in the same memory: each step attends to a quarter of the pages, of a quarter the"
    " size, and ranked guesses which. What that costs in answers stands beside its speed.",
    "predictor": "Attention reads every page here, so it is certain that a layer asks for what the one before did."
    " Where a selector chooses pages, ranked (the default) and cross_layer know more.",
}
_GROUPS = (
    ("all modes", Experiment, ("mode", "name")),
    ("mode baseline", BaselineExperiment, tuple(Experiment.model_fields)),
    ("modes reactive and predictive", ReactiveExperiment, tuple(Experiment.model_fields)),
)
_WIDTH = 110
_COMMENT_COLUMN = 36


def commented_yaml() -> str:
    """The default list of experiments as YAML, with every key explained; `load_experiments` accepts it."""
    return "\n".join([_HEADER, "defaults:", *_defaults(), _SWEEP, *_experiments()]) + "\n"


def _defaults() -> list[str]:
    """Every key that entries can share, by the modes that know it: set if chosen here, else as a comment."""
    lines = []
    for title, cls, left_out in _GROUPS:
        lines.append(f"  # --- {title} ---")
        for key in [key for key in cls.model_fields if key not in left_out]:
            if key in _REASONS:
                lines += ["", _wrapped(_REASONS[key], "  # ", "  # ")]
            if key in _CHOSEN:
                lines.append(_explained("  ", cls, key, _CHOSEN[key]))
            else:
                lines.append(_explained("  # ", cls, key, cls.model_fields[key].default))
        lines.append("")
    return lines


def _experiments() -> list[str]:
    return [
        "experiments:",
        _explained("  - ", Experiment, "mode", "baseline"),
        _explained("    # ", Experiment, "name", "baseline"),
        "  - mode: reactive",
        "  - mode: predictive",
        _wrapped(_REASONS["predictor"], "    # ", "    # "),
        _explained("    ", PredictiveExperiment, "predictor", "layer_ahead"),
        _explained("    ", PredictiveExperiment, "prefetch_k", 4),
        *(
            _explained("    # ", PredictiveExperiment, key, field.default)
            for key, field in PredictiveExperiment.model_fields.items()
            if key not in ReactiveExperiment.model_fields and key not in ("predictor", "prefetch_k")
        ),
        "  - mode: predictive",
        "    name: a quarter of the pages",
        _wrapped(_REASONS["quarter"], "    # ", "    # "),
        "    selector: quest",
        "    attention_fraction: 0.25",
        "    page_size: 32",
        "    max_gpu_pages: 24",
        "    staging_pages: 24",
        "    prefetch_k: 8",
        "    quality: {fidelity_tokens: 32, tasks: [needle], samples: 5}",
    ]


def _explained(start: str, cls: type[Experiment], key: str, value: Any) -> str:
    """`key: value  # what it means [choices]`, continued below where that is long."""
    field = cls.model_fields[key]
    choices = _choices(field)
    meaning = f"{field.description} [{' | '.join(choices)}]" if choices else field.description
    written = f"{start}{key}: {_yaml(value)}".ljust(_COMMENT_COLUMN)
    return _wrapped(meaning, f"{written}  # ", f"{' ' * len(written)}  # ")


def _wrapped(text: str, first_start: str, next_start: str) -> str:
    return textwrap.fill(text, _WIDTH, initial_indent=first_start, subsequent_indent=next_start, break_on_hyphens=False)


def _yaml(value: Any) -> str:
    """A default on one line: JSON without its quotes, since no word among the defaults needs them."""
    return json.dumps(value).replace('"', "")


def _choices(field: FieldInfo) -> list[str]:
    """The words a key takes: those of its `Literal`, its registry or its tuple of names."""
    types = [field.annotation, *get_args(field.annotation)]
    literals = [word for kind in types if get_origin(kind) is Literal for word in get_args(kind)]
    named = [name for names in field.metadata if isinstance(names, Registry | tuple) for name in names]
    return literals + named
