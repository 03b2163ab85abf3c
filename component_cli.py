"""The command lines of the three components: one mode, one model, a few prompts, shown on the console.

    python inference_baseline.py     --prompts "…" "…" | --find-max-context | a prompt of --context-length tokens
    python -m kv_paging              a paged generation beside the same one with transformers' own cache
    python -m kv_paging --compare-policies    the same with every replacement policy, in one table
    python -m predictive_prefetch    the same, with pages copied ahead
    python -m predictive_prefetch --compare-predictors    the same with every predictor, in one table

A `--config` file holds one experiment with the keys of the YAML list; a flag that is given overrides its key, and a
flag that is not given never does.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console

from cache_settings import is_exact
from component_tables import figures_table, quality_words
from experiments import MODE_CLASSES, Experiment, load_experiment, override
from generation import HFCache, generate, made_prompt
from host_pages import DiskTierFailed
from metrics import RunResult
from models import LoadedModel, ModelUnavailable, load_model
from output_files import Drawing, check_writable, drawings_of
from planning import fit_positions
from quality import needs_quality, quality_figures
from quality_frame import task_scores
from quality_tables import tasks_table
from run_specs import RunSpec, expand
from utils import is_out_of_memory, write_json
from variant_runs import EachPart
from variant_tables import POLICIES_COMPARED, PREDICTORS_COMPARED, SideBySide, variants_table
from workloads import TokenRows, encode_prompts

log = logging.getLogger(__name__)

DEMONSTRATION = {"context_lengths": [1000], "num_runs": 1, "max_new_tokens": 50, "page_size": 128, "max_gpu_pages": 4}
DEFAULT_FRACTION = 0.25
LINK_LATENCY_US = 10.0
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
    parser.add_argument("--no-quality", action="store_true", help="leave out what an approximation costs in answers")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the results there as JSON")
    parser.add_argument("-v", "--verbose", action="store_true", help="say more on stderr")
    return parser


def starting_experiment(arguments: argparse.Namespace, mode: str) -> Experiment:
    """The experiment that flags then override: the file, or the demonstration's defaults.

    Raises:
        ConfigError: the file is wrong.
    """
    if arguments.config is not None:
        return load_experiment(arguments.config, mode)
    known = MODE_CLASSES[mode].model_fields
    return MODE_CLASSES[mode](mode=mode, **{key: value for key, value in DEMONSTRATION.items() if key in known})


def experiment_from(start: Experiment, arguments: argparse.Namespace, **more: Any) -> Experiment:
    """An experiment under the flags that are given, and `more` keys where they are not None.

    Raises:
        ConfigError: a flag is wrong.
    """
    given = {key: getattr(arguments, flag) for flag, key in FLAG_KEYS.items() if getattr(arguments, flag) is not None}
    if arguments.context_length is not None:
        given["context_lengths"] = [arguments.context_length]
    if arguments.no_quality:
        given["quality"] = False
    return override(start, **given, **{key: value for key, value in more.items() if value is not None})


def component_specs(arguments: argparse.Namespace, mode: str, **more: Any) -> list[RunSpec]:
    """The runs that a command line describes: the file, or the demonstration's defaults, under the flags.

    Raises:
        ConfigError: the file or a flag is wrong.
    """
    return expand([experiment_from(starting_experiment(arguments, mode), arguments, **more)])


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


def guarded(command: Callable[[], int]) -> int:
    """Run a command; what a user can mend is one clear message and exit code 2, full memory is 1, Ctrl-C is 130."""
    try:
        return command()
    except (ModelUnavailable, DiskTierFailed, ValueError) as error:  # ConfigError and CannotPage are ValueErrors
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
    _add_paging_flags(parser)
    if mode == "predictive":
        _add_prefetch_flags(parser)
    for drawing in drawings_of(mode):
        parser.add_argument(drawing.flag, type=Path, metavar=drawing.metavar, help=drawing.help)
    comparison = PREDICTORS_COMPARED if mode == "predictive" else POLICIES_COMPARED
    comparing = f"--compare-{comparison.plural}"
    parser.add_argument(comparing, dest="compare", action="store_true", help=f"one table of all {comparison.plural}")
    arguments = parser.parse_args(argv)
    asked = [drawing for drawing in drawings_of(mode) if getattr(arguments, drawing.name) is not None]
    if arguments.compare and asked:
        parser.error(f"{asked[0].flag} draws one run; leave out {comparing}, and choose one with --{comparison.kind}")
    configure_logging(arguments.verbose)
    if arguments.compare:
        return guarded(lambda: _compare(comparison, mode, run, arguments))
    return guarded(lambda: _demonstrate(mode, run, arguments, {each: getattr(arguments, each.name) for each in asked}))


def _add_paging_flags(parser: argparse.ArgumentParser) -> None:
    """Flags named like their keys. Their values are judged as those of a file are, so none is limited here."""
    pages = parser.add_argument_group("paging; page counts are per layer and sequence")
    pages.add_argument("--page-size", type=int, metavar="N", help="positions in a page")
    pages.add_argument("--max-gpu-pages", type=int, metavar="N", help="pages on the device")
    pages.add_argument("--staging-pages", type=int, metavar="N", help="slots on top of that, for pages on their way")
    pages.add_argument("--policy", metavar="P", help="which page to evict")
    pages.add_argument("--access-order", metavar="O", help="resident_first or position")
    pages.add_argument("--on-miss", metavar="O", help="wait for a page that is not there, or skip it in this step")
    pages.add_argument("--page-table", metavar="T", help="who knows where pages are: host, or device")
    pages.add_argument("--host-pages", type=int, metavar="N", help="pages in host memory; later ones go to disk")
    pages.add_argument("--disk-dir", metavar="DIR", help="folder for those on disk")
    pages.add_argument("--link", type=_link_choice, metavar="L", help="on a CPU: a preset, memory, or a number of GB/s")
    reads = parser.add_argument_group("which pages a decode step attends to")
    reads.add_argument("--selector", metavar="S", help="all is exact; any other reads a part, such as quest")
    reads.add_argument("--attention-pages", type=int, metavar="N", help="how many pages")
    reads.add_argument("--attention-fraction", type=float, metavar="F", help="which share of them, such as 0.25")
    reads.add_argument("--granularity", metavar="G", help="layer, or kv_head: each key/value head chooses its own")
    reads.add_argument("--dense-layers", type=int, metavar="N", help="first layers that attend to every page")


def _add_prefetch_flags(parser: argparse.ArgumentParser) -> None:
    ahead = parser.add_argument_group("copying ahead")
    ahead.add_argument("--predictor", metavar="P", help="which pages to copy ahead")
    ahead.add_argument("--prefetch-k", type=int, metavar="N", help="how many pages, for one layer")
    ahead.add_argument("--overfetch", type=float, metavar="M", help="times what a layer reads: how many guesses to try")
    ahead.add_argument("--lookahead", type=int, metavar="N", help="how many layers ahead")
    ahead.add_argument(
        "--min-confidence", type=_number_or_name, metavar="C", help="of a guess worth a copy: adaptive, or 0 to 1"
    )
    evicts = "let a guess take the place of a resident page"
    ahead.add_argument("--prefetch-evicts", action="store_const", const=True, help=evicts)


PAGING_FLAGS = (
    *(
        "page_size",
        "max_gpu_pages",
        "staging_pages",
        "policy",
        "access_order",
        "on_miss",
        "page_table",
        "host_pages",
        "disk_dir",
    ),
    *("link", "selector", "attention_pages", "attention_fraction", "granularity", "dense_layers", "predictor"),
    *("prefetch_k", "overfetch", "lookahead", "min_confidence", "prefetch_evicts"),
)


def _number_or_name(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _link_choice(text: str) -> str | dict[str, float]:
    """A preset's name as it stands; a number is the bandwidth of a link with the latency of the presets."""
    choice = _number_or_name(text)
    return choice if isinstance(choice, str) else {"bandwidth_gb_s": choice, "latency_us": LINK_LATENCY_US}


def _paged_experiment(start: Experiment, arguments: argparse.Namespace, **more: Any) -> Experiment:
    """The experiment of a paged mode. A selector from the command line that nobody gave a number of pages gets a
    share."""
    given = {flag: getattr(arguments, flag, None) for flag in PAGING_FLAGS} | more
    sized = any(
        value is not None
        for key in ("attention_pages", "attention_fraction")
        for value in (given[key], getattr(start, key))
    )
    if given["selector"] is None or is_exact(given["selector"]) or sized:
        return experiment_from(start, arguments, **given)
    experiment = experiment_from(start, arguments, **given | {"attention_fraction": DEFAULT_FRACTION})
    if arguments.selector is not None:
        print(
            f"--selector {arguments.selector}: attending to {DEFAULT_FRACTION:.0%} of the pages at each step;"
            " --attention-fraction or --attention-pages changes that",
            file=sys.stderr,
        )
    return experiment


def _demonstrate(
    mode: str, run: Callable[..., RunResult], arguments: argparse.Namespace, drawings: Mapping[Drawing, Path]
) -> int:
    check_writable(arguments.output)
    for drawing, place in drawings.items():
        drawing.check(place, drawing.flag)
    start = starting_experiment(arguments, mode)
    specs = expand([_paged_experiment(start, arguments, **{drawing.needs: True for drawing in drawings})])
    model = load_for(specs[0])
    measure, specs = BesideHF(model, run), [fitted_spec(spec, model) for spec in specs]
    results = [measure(spec) for spec in specs]
    measure_quality(specs, results, model)
    show_and_write(results, arguments.output)
    for drawing, place in drawings.items():
        if len(results) > 1:
            print(f"{drawing.flag} draws the first of {len(results)} runs", file=sys.stderr)
        for path in drawing.draw(results[0], place):
            print(f"wrote {path}")
    return exit_code(results)


def _compare(comparison: SideBySide, mode: str, run: Callable[..., RunResult], arguments: argparse.Namespace) -> int:
    """Every run of the command once with each part of a kind; a table for each context length."""
    check_writable(arguments.output)
    start = starting_experiment(arguments, mode)
    undecided = arguments.selector is None and "selector" not in start.model_fields_set
    experiment = _paged_experiment(start, arguments, **({"selector": "quest"} if undecided else {}))
    variants, specs = EachPart.of(experiment, comparison.registry), expand([experiment])
    model = load_for(specs[0])
    measure = BesideHF(model, run)
    console = Console(highlight=False, markup=False)
    results: list[RunResult] = []
    fitted = [fitted_spec(spec, model) for spec in specs]
    measured: list[tuple[list[RunSpec], dict[str, list[RunResult]]]] = []
    for _, group in groupby(fitted, key=lambda spec: spec.context_length):
        repetitions = list(group)
        measured.append((repetitions, variants.measure(repetitions, measure)))
    for repetitions, by_variant in measured:  # quality only now, as it would show in the memory of what is timed
        console.print(variants_table(comparison, by_variant, undecided, variants.left_out))
        for line in _variant_quality(variants, repetitions, by_variant, model):
            console.print(line)
        results += [result for runs in by_variant.values() for result in runs]
    if arguments.output is not None:
        write_json(arguments.output, [result.to_dict() for result in results])
    return exit_code(results)


def _variant_quality(
    variants: EachPart, repetitions: Sequence[RunSpec], by_variant: dict[str, list[RunResult]], model: LoadedModel
) -> Iterator[str]:
    """Measure what variants cost in answers: what evicts or predicts decides about none, so one stands for all; unless
    pages that come late are skipped. A line for each that was measured."""
    if repetitions[0].paging.on_miss == "skip":
        for variant, runs in by_variant.items():
            specs = [replace(spec, **variants.fields[variant]) for spec in repetitions]
            measure_quality(specs, runs, model)
            yield from (f"{variant}: {words}" for words in [quality_words(runs[0])] if words)
        return
    chosen = by_variant[variants.chosen]
    measure_quality(repetitions, chosen, model)
    for runs in by_variant.values():
        for result, judged in zip(runs, chosen, strict=True):
            result.quality |= {
                key: judged.quality[key] for key in ("fidelity", "tasks", "error") if key in judged.quality
            }
    yield from (f"All of them: {words}" for words in [quality_words(chosen[0])] if words)


class BesideHF:
    """Measures runs of one model, and compares their tokens with those of transformers' cache for the same prompt.

    Args:
        model: loaded for all of them.
        run: the mode's.
    """

    def __init__(self, model: LoadedModel, run: Callable[..., RunResult]):
        self.model, self.run = model, run
        self._references: dict[tuple, TokenRows] = {}

    def __call__(self, spec: RunSpec) -> RunResult:
        """Measure one run. Transformers' own cache is asked once for all runs that must give the same tokens."""
        prompt = made_prompt(spec, self.model)
        if spec.reference_key not in self._references:
            self._references[spec.reference_key] = _reference_tokens(spec, self.model, prompt)
        return self.run(spec, self.model, reference=self._references[spec.reference_key], prompt=prompt)


def _reference_tokens(spec: RunSpec, model: LoadedModel, prompt: TokenRows) -> TokenRows:
    plain = replace(spec, mode="baseline", paging=None, prefetch=None)
    return generate(plain, model, HFCache("dynamic", model), prompt, spec.max_new_tokens).tokens


def measure_quality(specs: Sequence[RunSpec], results: Sequence[RunResult], model: LoadedModel) -> None:
    """Add to each result what its run costs in answers, if that was asked for; after all that is timed."""
    for spec, result in zip(specs, results, strict=True):
        if needs_quality(spec):
            log.info("measuring quality at %d tokens of context", spec.context_length)
            result.quality |= quality_figures(spec, model)


def exit_code(results: Sequence[RunResult]) -> int:
    """1 where something about the quality of a run went wrong, as for a list of experiments."""
    return 1 if any("error" in result.quality for result in results) else 0


def show_and_write(results: Sequence[RunResult], output: Path | None) -> None:
    """Print the results, repetitions of one context together; and write them if asked, several as a list."""
    console = Console(highlight=False, markup=False)
    for _, repetitions in groupby(results, key=lambda result: result.context["tokens"]):
        show_repetitions(list(repetitions), console)
    scores = task_scores([result.to_dict() for result in results])
    if len(scores):
        console.print(tasks_table(scores).to_rich())
    if output is not None:
        blocks = [result.to_dict() for result in results]
        write_json(output, blocks[0] if len(blocks) == 1 else blocks)


def show_repetitions(results: Sequence[RunResult], console: Console) -> None:
    """Print the text of the first repetition, and the figures of all of them."""
    for row, text in enumerate(results[0].tokens["text"] or []):
        console.rule(f"generated text, sequence {row}", align="left")
        console.print(text.strip())
    console.print(figures_table(results))


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
