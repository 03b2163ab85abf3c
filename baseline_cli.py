"""The command line of the baseline: `python inference_baseline.py`.

Without `--prompts`, one prompt of `--context-length` tokens is made; with them, the texts go through the model as one
batch, padded on the left, and generation ends where the model ends it.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace

from rich.console import Console

from component_cli import (
    check_writable,
    component_parser,
    configure_logging,
    experiment_of,
    fitted_spec,
    guarded,
    load_for,
    padded_prompts,
    show_result,
)
from inference_baseline import run
from max_context import Attempt, find_max_context
from metrics import RunResult
from models import LoadedModel
from planning import fit_positions
from run_specs import RunSpec, expand
from utils import write_json


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = component_parser("inference_baseline.py", "Plain Hugging Face generation, measured.")
    parser.add_argument("--prompts", nargs="+", metavar="TEXT", help="texts to continue, as one batch")
    parser.add_argument("--find-max-context", action="store_true", help="search the longest context that fits")
    parser.add_argument("--memory-budget-mb", type=float, metavar="MIB", help="for the search: weights and KV cache")
    arguments = parser.parse_args(argv)
    if arguments.memory_budget_mb is not None and not arguments.find_max_context:
        parser.error("--memory-budget-mb is for --find-max-context")
    configure_logging(arguments.verbose)
    return guarded(lambda: _main(arguments))


def _main(arguments: Namespace) -> int:
    check_writable(arguments.output)
    stop_at_eos = True if arguments.prompts else None
    specs = [s for s in expand([experiment_of(arguments, "baseline", stop_at_eos=stop_at_eos)]) if s.repetition == 0]
    model = load_for(specs[0])
    if arguments.find_max_context:
        return _search(specs[0], model, arguments)
    if arguments.prompts:
        results = [_continue(specs[0], model, arguments.prompts)]
    else:
        results = [run(fitted_spec(spec, model), model) for spec in specs]
    console = Console(highlight=False, markup=False)
    for result in results:
        show_result(result, console)
    if arguments.output is not None:
        blocks = [result.to_dict() for result in results]
        write_json(arguments.output, blocks[0] if len(blocks) == 1 else blocks)
    return 0


def _continue(spec: RunSpec, model: LoadedModel, prompts: Sequence[str]) -> RunResult:
    rows, mask = padded_prompts(model, prompts)
    length = len(rows[0])
    spec = replace(spec, context_length=length, requested_context_length=length, batch_size=len(rows))
    fitted, _ = fit_positions(spec, model.shape)
    if fitted != spec:
        raise ValueError(
            f"the longest prompt has {length} tokens and the model {model.shape.max_positions} positions; with"
            f" {spec.max_new_tokens} new tokens it may have {fitted.context_length}"
        )
    return run(spec, model, prompt=rows, attention_mask=mask)


def _search(spec: RunSpec, model: LoadedModel, arguments: Namespace) -> int:
    def say(attempt: Attempt) -> None:
        used = "out of memory" if attempt.used_mb is None else f"{attempt.used_mb:,.1f} MiB"
        verdict = "fits" if attempt.fits else "does not fit"
        print(f"{attempt.context_tokens:>9,} tokens: {used}, {verdict}", file=sys.stderr)

    found = find_max_context(spec, model, arguments.memory_budget_mb, say)
    print(f"longest context that fits: {found.context_tokens:,} tokens (limited by {found.limited_by})")
    if arguments.output is not None:
        write_json(arguments.output, {"spec": spec.to_dict(), "max_context": found.to_dict()})
    return 0
