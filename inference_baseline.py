"""Mode 1, baseline: plain Hugging Face generation with transformers' own caches; and its command line.

    python inference_baseline.py --prompts "..." "..."    the texts as one batch, until the model ends them
    python inference_baseline.py --context-length 1000    one made prompt of just so many tokens
    python inference_baseline.py --find-max-context       the longest context that fits

The other modes are measured by the same loop, generation.py, and compared with this one.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from component_cli import (
    check_writable,
    component_parser,
    component_specs,
    configure_logging,
    exit_code,
    fitted_spec,
    guarded,
    load_for,
    measure_quality,
    padded_prompts,
    show_and_write,
)
from generation import HFCache, measured_run, model_block
from max_context import Attempt, find_max_context
from metrics import SCHEMA_VERSION, RunResult
from models import LoadedModel
from planning import fit_positions
from quality import needs_quality
from run_specs import RunSpec
from utils import environment, write_json
from workloads import token_sha256


def make_cache(spec: RunSpec, model: LoadedModel) -> HFCache:
    """The cache of a run, new and empty."""
    return HFCache(spec.cache_implementation or "dynamic", model)


def run(spec: RunSpec, model: LoadedModel, **how: Any) -> RunResult:
    """Keep the whole KV cache, with one of transformers' own caches.

    One run; see `generation.measured_run` for `how`.
    """
    return measured_run(spec, model, make_cache, **how)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = component_parser("inference_baseline.py", "Plain Hugging Face generation, measured.")
    parser.add_argument("--prompts", nargs="+", metavar="TEXT", help="texts to continue, as one batch")
    parser.add_argument("--find-max-context", action="store_true", help="search the longest context that fits")
    parser.add_argument("--memory-budget-mb", type=float, metavar="MIB", help="for the search: weights and KV cache")
    arguments = parser.parse_args(argv)
    if arguments.memory_budget_mb is not None and not arguments.find_max_context:
        parser.error("--memory-budget-mb is for --find-max-context")
    if arguments.prompts and arguments.find_max_context:
        parser.error("--find-max-context makes its own prompts; leave out --prompts")
    if arguments.prompts and arguments.context_length is not None:
        parser.error("--context-length is for prompts that are made, and --prompts gives texts; leave out one")
    configure_logging(arguments.verbose)
    return guarded(lambda: _main(arguments))


def _main(arguments: Namespace) -> int:
    check_writable(arguments.output)
    specs = component_specs(arguments, "baseline", stop_at_eos=True if arguments.prompts else None)
    model = load_for(specs[0])
    if arguments.find_max_context:
        return _search(specs[0], model, arguments)
    if arguments.prompts:
        results = _continue(specs, model, arguments.prompts)
    else:
        specs = [fitted_spec(spec, model) for spec in specs]
        results = [run(spec, model) for spec in specs]
        measure_quality(specs, results, model)
    show_and_write(results, arguments.output)
    return exit_code(results)


def _continue(specs: Sequence[RunSpec], model: LoadedModel, prompts: Sequence[str]) -> list[RunResult]:
    """Continue the texts, once for each repetition; the contexts of the specs give way to the texts."""
    rows, mask = padded_prompts(model, prompts)
    length = len(rows[0])
    results = []
    for spec in [spec for spec in specs if spec.context_length == specs[0].context_length]:
        spec = replace(
            spec,
            context_length=length,
            requested_context_length=length,
            batch_size=len(rows),
            prompt_sha256=token_sha256(rows),
        )
        fitted, _ = fit_positions(spec, model.shape)
        if fitted != spec:
            raise ValueError(
                f"the longest prompt has {length} tokens and the model {model.shape.max_positions} positions; with"
                f" {spec.max_new_tokens} new tokens it may have {fitted.context_length}"
            )
        result = run(spec, model, prompt=rows, attention_mask=mask)
        if needs_quality(spec):
            print("quality is measured on made prompts: --context-length instead of --prompts", file=sys.stderr)
        results.append(result)
    return results


def _search(spec: RunSpec, model: LoadedModel, arguments: Namespace) -> int:
    def say(attempt: Attempt) -> None:
        used = "out of memory" if attempt.used_mb is None else f"{attempt.used_mb:,.1f} MiB"
        verdict = "fits" if attempt.fits else "does not fit"
        print(f"{attempt.context_tokens:>9,} tokens: {used}, {verdict}", file=sys.stderr)

    found = find_max_context(spec, model, arguments.memory_budget_mb, say)
    print(f"longest context that fits: {found.context_tokens:,} tokens (limited by {found.limited_by})")
    if arguments.output is not None:
        record = {
            "schema_version": SCHEMA_VERSION,
            "spec": spec.to_dict(),
            "environment": environment(),
            "model": model_block(model),
            "max_context": found.to_dict(),
        }
        write_json(arguments.output, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
