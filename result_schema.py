"""Whether a result file is one: its four kinds, a check with words, and the JSON Schema for other programs.

    python result_schema.py                        print the JSON Schema (draft 2020-12) of a result file
    python result_schema.py --check logs/sample    say what is wrong with the results in a folder, or in single files

A result is a finished run of one of the three modes, or a run that failed, and each kind says which blocks it has. So
a reader need not guess when `cache` may be null: it is for a baseline, and never for a finished paged run. The blocks
themselves are described in `result_blocks.py`. At the top level no other key may stand, as a new block is a new
version; inside the blocks others may.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag, TypeAdapter, ValidationError

from metrics import SCHEMA_VERSION
from registry import MODES
from result_blocks import (
    BaselineSpec,
    Block,
    Cache,
    Context,
    Environment,
    Memory,
    Model,
    Power,
    PredictiveSpec,
    Prefetch,
    Quality,
    ReactiveSpec,
    Step,
    Timing,
    Tokens,
    says,
)
from result_frame import dig, is_finite

OK, WRONG = 0, 1

# --- the four kinds -----------------------------------------------------------------------------------------------


class _Run(Block):
    """What every result has."""

    model_config = ConfigDict(extra="forbid")

    schema_version: Literal[SCHEMA_VERSION]
    run_id: str = Field(pattern="^[0-9a-f]{12}$", description="hash of the spec as it was run")
    started_at: str = says("ISO 8601, with the offset from UTC")
    environment: Environment


class _Finished(_Run):
    status: Literal["ok"]
    error: None
    duration_seconds: float = Field(ge=0, description="seconds, warm-up runs included")
    model: Model
    context: Context
    timing: Timing
    memory: Memory
    power: Power
    quality: Quality
    tokens: Tokens


class BaselineResult(_Finished):
    """A finished run with transformers' own cache."""

    spec: BaselineSpec
    cache: None
    prefetch: None
    steps: None


class ReactiveResult(_Finished):
    """A finished run with a paged cache."""

    spec: ReactiveSpec
    cache: Cache
    prefetch: None
    steps: list[Step]


class PredictiveResult(_Finished):
    """A finished run with a paged cache whose pages were copied ahead."""

    spec: PredictiveSpec
    cache: Cache
    prefetch: Prefetch
    steps: list[Step]


class FailedResult(_Run):
    """A run that did not finish; what was measured before it failed is not kept."""

    status: Literal["out_of_memory", "error", "crashed"] = says("crashed: its process died")
    error: str = says("what happened")
    spec: Annotated[BaselineSpec | ReactiveSpec | PredictiveSpec, Field(discriminator="mode")]
    duration_seconds: None
    model: None
    context: None
    timing: None
    memory: None
    power: None
    cache: None
    prefetch: None
    quality: None
    tokens: None
    steps: None


def _kind(result: Any) -> str | None:
    return "failed" if dig(result, "status") != "ok" else dig(result, "spec.mode")


_ANY_RESULT = TypeAdapter(
    Annotated[
        Annotated[BaselineResult, Tag("baseline")]
        | Annotated[ReactiveResult, Tag("reactive")]
        | Annotated[PredictiveResult, Tag("predictive")]
        | Annotated[FailedResult, Tag("failed")],
        Discriminator(_kind),
    ]
)

# --- what can be asked of them ------------------------------------------------------------------------------------


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a result file, draft 2020-12, as plain values."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"KV Prefetch result, schema version {SCHEMA_VERSION}",
        "description": "One run: `<mode>_*.json`, strict JSON without NaN. Missing is null, never 0. Inside the blocks"
        " keys that are not described here may stand, since a new figure does not change the older ones.",
        **_ANY_RESULT.json_schema(),
    }


def problems_of(result: Any) -> list[str]:
    """What is wrong with a result, a line for each place; none if it is as it should be."""
    lines = [f"{place}: {number} is no number of JSON" for place, number in _not_finite(result)]
    try:
        _ANY_RESULT.validate_python(result)
    except ValidationError as error:
        lines += [f"{_place(one['loc'])}: {one['msg']}" for one in error.errors() if one["type"] != "finite_number"]
    return lines


def _place(location: Sequence[str | int]) -> str:
    """`cache.by_layer.0.hits`. The kind, first, is no key; nor is the mode by which a failed run's spec is read."""
    kind, *keys = location or ("",)
    if kind == "failed" and keys[:1] == ["spec"]:
        del keys[1:2]
    return ".".join(map(str, keys)) or "the result"


def _not_finite(value: Any, place: str = "") -> Iterator[tuple[str, float]]:
    """NaN and infinities, wherever they stand; also under keys that are not described."""
    if isinstance(value, float) and not is_finite(value):
        yield place, value
    inner = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        yield from _not_finite(one, f"{place}.{key}" if place else str(key))


def check(path: Path) -> Iterator[str]:
    """What is wrong with a result file, or with the result files in a folder: lines that begin with the file's name."""
    if path.is_dir():
        files = sorted(file for mode in MODES for file in path.glob(f"{mode}_*.json"))
        if not files:
            yield f"{path}: holds no result files ({', '.join(f'{mode}_*.json' for mode in MODES)})"
        for file in files:
            yield from check(file)
        return
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        yield f"{path}: {error}"
        return
    yield from (f"{path}: {problem}" for problem in problems_of(result))


def main(argv: Sequence[str] | None = None) -> int:
    """Print the schema or check files; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", type=Path, nargs="+", metavar="PATH", help="result files, or folders of them")
    arguments = parser.parse_args(argv)
    if arguments.check is None:
        print(json.dumps(json_schema(), indent=2))
        return OK
    problems = [problem for path in arguments.check for problem in check(path)]
    print("\n".join(problems) or "no problems")
    return WRONG if problems else OK


if __name__ == "__main__":
    sys.exit(main())
