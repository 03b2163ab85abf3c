"""The command lines of the three components: one mode, one model, a few prompts, shown on the console.

    python inference_baseline.py     --prompts "…" "…" | --find-max-context | a prompt of --context-length tokens
    python -m kv_paging              a paged generation beside the same one with transformers' own cache
    python -m predictive_prefetch    the same, with pages copied ahead

A `--config` file holds one experiment with the keys of the YAML list; a flag that is given overrides its key, and a
flag that is not given never does.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments import MODE_CLASSES, Experiment, load_experiment, override
from generation import HFCache, generate
from metrics import RunResult, spread
from models import LoadedModel, ModelUnavailable, load_model
from planning import fit_positions
from run_specs import RunSpec, expand
from utils import is_out_of_memory, write_json
from workloads import TokenRows, encode_prompts, prompt_tokens

log = logging.getLogger(__name__)

DEMONSTRATION = {"context_lengths": [1000], "num_runs": 1, "max_new_tokens": 50, "page_size": 128, "max_gpu_pages": 4}
FLAG_KEYS = {
    "model": "model_name",
    "quantization": "quantization",
    "max_new_tokens": "max_new_tokens",
    "device": "device",
    "dtype": "dtype",
    "seed": "seed",
}


def component_parser(module: str, description: str) -> argparse.ArgumentParser:
    """The flags that every component has."""
    parser = argparse.ArgumentParser(prog=module, description=description)
    parser.add_argument("--config", type=Path, metavar="FILE", help="JSON or YAML file with one experiment")
    parser.add_argument("--model", metavar="M", help="alias, Hub id, folder, .gguf file or random:<config>")
    parser.add_argument("--quantization", choices=("8bit", "4bit"), help="quantise the weights (bitsandbytes)")
    parser.add_argument("--context-length", type=int, metavar="N", help="tokens of the made prompt")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="tokens to generate")
    parser.add_argument("--device", metavar="D", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--seed", type=int, metavar="N")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the results there as JSON")
    parser.add_argument("-v", "--verbose", action="store_true", help="say more on stderr")
    return parser


def experiment_of(arguments: argparse.Namespace, mode: str, **more: Any) -> Experiment:
    """The experiment that a command line describes: the file, or the demonstration's defaults, under the flags.

    Raises:
        ConfigError: the file or a flag is wrong.
    """
    if arguments.config is not None:
        experiment = load_experiment(arguments.config, mode)
    else:
        known = MODE_CLASSES[mode].model_fields
        experiment = MODE_CLASSES[mode](mode=mode, **{k: v for k, v in DEMONSTRATION.items() if k in known})
    given = {key: getattr(arguments, flag) for flag, key in FLAG_KEYS.items() if getattr(arguments, flag) is not None}
    if arguments.context_length is not None:
        given["context_lengths"] = [arguments.context_length]
    return override(experiment, **given, **{key: value for key, value in more.items() if value is not None})


def component_specs(arguments: argparse.Namespace, mode: str, **more: Any) -> list[RunSpec]:
    """The runs that a command line describes."""
    return expand([experiment_of(arguments, mode, **more)])


def load_for(spec: RunSpec) -> LoadedModel:
    """The model of a run; with `-v` it is said where it came from."""
    model = load_model(**spec.model_options)
    log.info("%s: %s, %s on %s", spec.model_name, model.source, model.dtype_name, model.device)
    return model


def fitted_spec(spec: RunSpec, model: LoadedModel) -> RunSpec:
    """The run clamped to the model's positions; a clamp is said on stderr."""
    spec, notes = fit_positions(spec, model.shape)
    for note in notes:
        print(note, file=sys.stderr)
    return spec


def check_writable(output: Path | None) -> None:
    """Find out before the run, rather than after it, that its results have no place to go.

    Raises:
        ValueError: `output` is a folder, or lies under something that is none.
    """
    if output is None:
        return
    if output.is_dir():
        raise ValueError(f"--output {output} is a folder; name a file")
    existing = next(folder for folder in output.absolute().parents if folder.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        raise ValueError(f"--output {output}: cannot write to {existing}")


def guarded(command: Callable[[], int]) -> int:
    """Run a command; what a user can mend is one clear message and exit code 2, full memory is 1, Ctrl-C is 130."""
    try:
        return command()
    except (ModelUnavailable, ValueError) as error:  # ConfigError and CannotPage are ValueErrors
        print(error, file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        print(f"out of memory: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def demonstrate(mode: str, run: Callable[..., RunResult], argv: Sequence[str] | None, module: str) -> int:
    """The demonstration of a paged mode: generate with transformers' cache, then with pages, and compare."""
    parser = component_parser(f"python -m {module}", f"Generate with a {mode} paged KV cache and show what it did.")
    parser.add_argument("--max-gpu-pages", type=int, metavar="N", help="pages on the device, per layer")
    parser.add_argument("--page-size", type=int, metavar="N", help="positions in a page")
    parser.add_argument("--policy", metavar="P", help="which page to evict")
    if mode == "predictive":
        parser.add_argument("--predictor", metavar="P", help="which pages to copy ahead")
        parser.add_argument("--prefetch-k", type=int, metavar="N", help="pages to copy ahead for one layer")
    arguments = parser.parse_args(argv)
    configure_logging(arguments.verbose)
    return guarded(lambda: _demonstrate(mode, run, arguments))


def _demonstrate(mode: str, run: Callable[..., RunResult], arguments: argparse.Namespace) -> int:
    check_writable(arguments.output)
    own_flags = ("max_gpu_pages", "page_size", "policy", "predictor", "prefetch_k")
    specs = component_specs(arguments, mode, **{flag: getattr(arguments, flag, None) for flag in own_flags})
    model, results = load_for(specs[0]), []
    references: dict[tuple, TokenRows] = {}
    for spec in specs:
        spec = fitted_spec(spec, model)
        prompt = prompt_tokens(model.tokenizer, model.shape.vocab_size, spec.context_length, spec.batch_size, spec.seed)
        if spec.reference_key not in references:
            references[spec.reference_key] = _reference_tokens(spec, model, prompt)
        results.append(run(spec, model, reference=references[spec.reference_key], prompt=prompt))
    show_and_write(results, arguments.output)
    return 0


def _reference_tokens(spec: RunSpec, model: LoadedModel, prompt: TokenRows) -> TokenRows:
    plain = replace(spec, mode="baseline", paging=None, prefetch=None)
    return generate(plain, model, HFCache("dynamic", model), prompt, spec.max_new_tokens).tokens


def show_and_write(results: Sequence[RunResult], output: Path | None) -> None:
    """Print the results, repetitions of one context together; and write them if asked, several as a list."""
    console = Console(highlight=False, markup=False)
    for _, repetitions in groupby(results, key=lambda result: result.context["tokens"]):
        show_repetitions(list(repetitions), console)
    if output is not None:
        blocks = [result.to_dict() for result in results]
        write_json(output, blocks[0] if len(blocks) == 1 else blocks)


def show_repetitions(results: Sequence[RunResult], console: Console) -> None:
    """Print the text of the first repetition, and the figures of all of them."""
    first = results[0]
    for row, text in enumerate(first.tokens["text"] or []):
        console.rule(f"generated text, sequence {row}", align="left")
        console.print(text.strip())
    runs = f", mean ± std of {len(results)} runs" if len(results) > 1 else ""
    title = f"{first.spec['mode']}, {first.context['tokens']} tokens of context{runs}"
    table = Table(title=title, title_justify="left")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, values in zip(FIGURES, zip(*map(figures_of, results), strict=True), strict=True):
        if (text := _summary(values)) is not None:
            table.add_row(name, text)
    console.print(table)


def _summary(values: Sequence[Any]) -> str | None:
    """One cell: mean and spread of numbers, else the values that occur; None if nothing is there."""
    present = [value for value in values if value is not None]
    if not present:
        return None
    if not all(isinstance(value, int | float) for value in present):
        return ", ".join(dict.fromkeys(map(str, present)))
    if len(set(present)) == 1:
        return f"{present[0]:,}" if isinstance(present[0], int) else f"{present[0]:,.2f}"
    figures = spread(present)
    return f"{figures['mean']:,.2f} ± {figures['std']:,.2f}"


FIGURES = (
    "tokens equal to HF's",
    "time to first token, ms",
    "time per output token, ms",
    "total, ms",
    "tokens per second, all sequences",
    "GPU memory allocated, MiB",
    "GPU memory peak, MiB",
    "GPU memory delta, MiB",
    "process memory (RSS), MiB",
    "KV cache on the device, MiB",
    "KV cache on the host, MiB",
    "pages",
    "hit rate, %",
    "hits / late / misses",
    "evictions",
    "to the device, MiB",
    "link",
    "stall, ms",
    "stall, % of decode",
    "prefetches issued",
    "prefetches on time / late / wasted",
    "prediction accuracy, %",
    "prefetch coverage, %",
)


def figures_of(result: RunResult) -> tuple[Any, ...]:
    """What a reader asks of one result, in the order of `FIGURES`; None where it is missing."""
    timing, memory, cache, prefetch = result.timing, result.memory, result.cache or {}, result.prefetch or {}
    return (
        {True: "yes", False: "NO"}.get(result.quality["matches_baseline"]),
        timing["ttft_ms"],
        timing["tpot_ms"],
        timing["e2e_ms"],
        timing["batch_tokens_per_second"],
        memory["gpu_memory_mb"],
        memory["gpu_peak_mb"],
        memory["gpu_delta_mb"],
        memory["rss_mb"],
        _mebibytes(memory["device_kv_bytes"]),
        _mebibytes(memory["host_kv_bytes"]),
        cache.get("n_pages"),
        _percent(cache.get("hit_rate")),
        _joined(cache, "hits", "late", "misses"),
        cache.get("evictions"),
        _mebibytes(cache.get("h2d_bytes")),
        _link_text(cache.get("link")),
        cache.get("stall_ms"),
        cache.get("stall_percent"),
        prefetch.get("issued"),
        _joined(prefetch, "on_time", "late", "wasted"),
        _percent(prefetch.get("accuracy")),
        _percent(prefetch.get("coverage")),
    )


def _link_text(link: dict[str, Any] | None) -> str | None:
    if link is None:
        return None
    width = f", {link['bandwidth_gb_s']:g} GB/s" if link["bandwidth_gb_s"] else ""
    return f"{link['kind']} {link['name']}{width}" if link["name"] != link["kind"] else f"{link['kind']}{width}"


def _mebibytes(n_bytes: int | None) -> float | None:
    return None if n_bytes is None else n_bytes / 2**20


def _percent(share: float | None) -> float | None:
    return None if share is None else 100.0 * share


def _joined(block: dict[str, Any], *names: str) -> str | None:
    return " / ".join(f"{block[name]:,}" for name in names) if block else None


def padded_prompts(model: LoadedModel, prompts: Sequence[str]) -> tuple[TokenRows, TokenRows]:
    """Token ids and mask of texts, padded on the left to one length.

    Raises:
        ValueError: the model has no tokenizer.
    """
    if model.tokenizer is None:
        raise ValueError("--prompts needs a tokenizer, and this model has none; use --context-length")
    return encode_prompts(model.tokenizer, prompts)


def configure_logging(verbose: bool) -> None:
    """Warnings on stderr, and everything with `-v`."""
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(levelname)s: %(message)s")
