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
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments import MODE_CLASSES, ConfigError, Experiment, load_experiment, override
from inference_baseline import HFCache, generate
from metrics import RunResult
from models import LoadedModel, ModelUnavailable, load_model
from planning import fit_positions
from run_specs import RunSpec, expand
from utils import write_json
from workloads import TokenRows, encode_prompts, prompt_tokens

log = logging.getLogger(__name__)

DEMONSTRATION = {"context_lengths": [1000], "max_new_tokens": 50, "page_size": 128, "max_gpu_pages": 4}
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


def load_for(spec: RunSpec) -> LoadedModel:
    """The model of a run."""
    model = load_model(
        spec.model_name,
        dtype=spec.dtype,
        device=spec.device,
        device_map=spec.device_map,
        quantization=spec.quantization,
        trust_remote_code=spec.trust_remote_code,
    )
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
    """Run a command; what a user can mend is one clear message and exit code 2, Ctrl-C is 130."""
    try:
        return command()
    except (ConfigError, ModelUnavailable, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
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
    experiment = experiment_of(arguments, mode, **{flag: getattr(arguments, flag, None) for flag in own_flags})
    console, results = Console(highlight=False, markup=False), []
    specs = [spec for spec in expand([experiment]) if spec.repetition == 0]
    model = load_for(specs[0])
    for spec in specs:
        spec = fitted_spec(spec, model)
        prompt = prompt_tokens(model.tokenizer, model.shape.vocab_size, spec.context_length, spec.batch_size, spec.seed)
        reference = _reference_tokens(spec, model, prompt)
        result = run(spec, model, reference=reference, prompt=prompt)
        show_result(result, console)
        results.append(result.to_dict())
    if arguments.output is not None:
        write_json(arguments.output, results[0] if len(results) == 1 else results)
    return 0 if all(result["quality"]["matches_baseline"] for result in results) else 1


def _reference_tokens(spec: RunSpec, model: LoadedModel, prompt: TokenRows) -> TokenRows:
    plain = replace(spec, mode="baseline", paging=None, prefetch=None)
    return generate(plain, model, HFCache("dynamic", model), prompt, spec.max_new_tokens).tokens


def show_result(result: RunResult, console: Console) -> None:
    """Print a result for a reader: the text, then the figures that there are."""
    for row, text in enumerate(result.tokens["text"] or []):
        console.rule(f"generated text, sequence {row}", align="left")
        console.print(text.strip(), markup=False)
    table = Table(title=f"{result.spec['mode']}, {result.context['tokens']} tokens of context", title_justify="left")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in figures_of(result):
        table.add_row(name, value)
    console.print(table)


def figures_of(result: RunResult) -> list[tuple[str, str]]:
    """`(name with unit, value)` of what a reader asks of one result; figures that are missing are left out."""
    timing, memory, cache, prefetch = result.timing, result.memory, result.cache or {}, result.prefetch or {}
    link = cache.get("link") or {}
    rows: list[tuple[str, Any]] = [
        ("tokens equal to HF's", {True: "yes", False: "NO"}.get(result.quality["matches_baseline"])),
        ("time to first token, ms", timing["ttft_ms"]),
        ("time per output token, ms", timing["tpot_ms"]),
        ("total, ms", timing["e2e_ms"]),
        ("tokens per second, all sequences", timing["batch_tokens_per_second"]),
        ("GPU memory allocated, MiB", memory["gpu_memory_mb"]),
        ("GPU memory peak, MiB", memory["gpu_peak_mb"]),
        ("GPU memory delta, MiB", memory["gpu_delta_mb"]),
        ("process memory (RSS), MiB", memory["rss_mb"]),
        ("KV cache on the device, MiB", _mebibytes(memory["device_kv_bytes"])),
        ("KV cache on the host, MiB", _mebibytes(memory["host_kv_bytes"])),
        ("pages", cache.get("n_pages")),
        ("hit rate, %", _percent(cache.get("hit_rate"))),
        ("hits / late / misses", _joined(cache, "hits", "late", "misses")),
        ("evictions", cache.get("evictions")),
        ("to the device, MiB", _mebibytes(cache.get("h2d_bytes"))),
        ("link", f"{link['kind']} {link['name']}, {link['bandwidth_gb_s'] or '?'} GB/s" if link else None),
        ("stall, ms", cache.get("stall_ms")),
        ("stall, % of decode", cache.get("stall_percent")),
        ("prefetches issued", prefetch.get("issued")),
        ("prefetches on time / late / wasted", _joined(prefetch, "on_time", "late", "wasted")),
        ("prediction accuracy, %", _percent(prefetch.get("accuracy"))),
        ("prefetch coverage, %", _percent(prefetch.get("coverage"))),
    ]
    return [(name, f"{v:,.2f}" if isinstance(v, float) else f"{v}") for name, v in rows if v is not None]


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
