"""The quality of a run: what its cache costs in answers, beside what it saves in milliseconds.

Asked for by a `quality:` block, and measured apart from the timed generation, with a cache of the same settings:

* *fidelity* (fidelity.py): reading the run's own prompt and the text that goes on from it, with the run's cache and
  with transformers' own;
* *tasks* (quality_tasks.py, prose_task.py): questions whose answers lie somewhere in a long prompt, answered by greedy
  generation, and texts whose words are to be foreseen. Questions are fed token by token, as prefill reads every page
  whatever a selector would choose.

Every score stands beside that of the baseline on the very same items. A small model fails some tasks with all of its
attention, and such a task tells nothing about a cache: then `discriminates` is False.

Prefetch never changes what is attended to, so a predictive run is judged with its paging alone; unless it may skip
pages, which then depends on what was copied ahead. What the baseline says of a text or an item depends on the model and
nothing else, and is kept for the other runs as long as the model is. Where the whole cache does not fit on the device,
which is what paging is for, an exact paged cache with the run's own budget stands in for the baseline, and `reference`
says so.
"""

from __future__ import annotations

import gc
import logging
import math
import weakref
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any

from cache_settings import Paging
from fidelity import attention_recall, compare, mean_pages, rounding_explains, surprise
from generation import HFCache, MeasuredCache, made_prompt
from intervals import mean_with_interval, score_with_interval
from models import LoadedModel
from quality_tasks import Task, TaskItem, items
from reading import Reading, answer, read_text
from registry import CACHES, TASKS, choice_text
from run_specs import RunSpec
from utils import is_out_of_memory
from workloads import text_repeats

log = logging.getLogger(__name__)

LEAST_BASELINE_SCORE = 0.5  # below it, most of what a task asks is lost with full attention already
MOST_READING_BYTES = 2 * 2**30  # of what a model said of one text
MOST_READINGS = 6  # kept for other runs, those that were wanted last
HF_CACHE, EXACT_PAGES = "transformers' dynamic cache", "exact paging: the whole cache does not fit"

_known: weakref.WeakKeyDictionary[Any, dict[Hashable, Any]] = weakref.WeakKeyDictionary()

MakeCache = Callable[[], MeasuredCache]
PageMeans = dict[str, float | None]


def needs_quality(spec: RunSpec) -> bool:
    """Whether a run's quality is to be measured: asked for, and of an experiment's repetitions the first. Greedy ones
    give the same; sampled ones have prompts of their own, of which one must do."""
    return spec.quality is not None and spec.repetition == 0


def quality_figures(spec: RunSpec, model: LoadedModel) -> dict[str, Any]:
    """What a run's `quality` block holds beside its tokens: `fidelity` and `tasks`, each None where not asked for.

    What could not be measured is left out, and `error` says why: a task that does not fit into the length asked for, a
    model without a tokenizer to write tasks with, or whatever else went wrong. It is an error too if a run that claims
    to be exact is further from the baseline than rounding explains.
    """
    quality, errors = spec.quality, []

    def measured(what: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        try:
            return measure()
        except Exception as error:
            log.exception("%s: measuring %s failed", spec.slug, what)
            errors.append(f"{what}: {type(error).__name__}: {error}")
            return None
        finally:
            gc.collect()  # the cache of one reading before that of the next

    fidelity = measured("fidelity", lambda: _fidelity(spec, model)) if quality.fidelity_tokens else None
    if fidelity is not None and fidelity["within_rounding"] is False:
        errors.append(f"not exact, though it should be: KL {fidelity['kl_mean']:.2g} nats from the baseline")
    scores = [
        measured(f"{task} at {length} tokens", lambda task=task, length=length: _task_score(spec, model, task, length))
        for task in quality.tasks
        for length in quality.lengths or [spec.context_length]
    ]
    figures = {"fidelity": fidelity, "tasks": [score for score in scores if score is not None] or None}
    return figures | ({"error": "; ".join(errors)} if errors else {})


# --- caches ---------------------------------------------------------------------------------------------------------


def judged_spec(spec: RunSpec) -> RunSpec:
    """The run with what decides its tokens: without what is only recorded, and without prefetch unless pages that come
    late are skipped."""
    if spec.paging is None:
        return spec
    spec = replace(spec, paging=replace(spec.paging, record_pages=False, record_timeline=False))
    return spec if spec.paging.on_miss == "skip" else replace(spec, mode="reactive", prefetch=None)


def make_cache(spec: RunSpec, model: LoadedModel) -> MeasuredCache:
    """A cache that attends to what the run's attends to."""
    spec = judged_spec(spec)
    return CACHES.load(spec.mode)(spec, model)


def exact_pages(spec: RunSpec) -> RunSpec:
    """A paged run whose attention reads every page, in the memory that this one has."""
    paging = spec.paging
    kept = Paging(
        page_size=paging.page_size,
        max_gpu_pages=paging.max_gpu_pages,
        staging_pages=paging.staging_pages,
        sink_pages=paging.sink_pages,
        recent_pages=paging.recent_pages,
        host_pages=paging.host_pages,
        disk_dir=paging.disk_dir,
        link="memory",  # nothing is timed
    )
    return replace(spec, mode="reactive", paging=kept, prefetch=None)


def _of_baseline(spec: RunSpec, model: LoadedModel, key: tuple, make: Callable[[MakeCache], Any]) -> tuple[Any, str]:
    """What `make` gives with transformers' cache, or where that does not fit with exact paging; and which it was."""
    try:
        return _kept(model, (*key, HF_CACHE), lambda: make(lambda: HFCache("dynamic", model))), HF_CACHE
    except Exception as error:
        if spec.paging is None or not is_out_of_memory(error):
            raise
        log.warning("%s: the whole cache does not fit, so exact paging stands in for the baseline", spec.slug)
    gc.collect()  # only here has the error let go of the tensors in its traceback
    return _of_run(exact_pages(spec), model, key, make), EXACT_PAGES


def _of_run(spec: RunSpec, model: LoadedModel, key: tuple, make: Callable[[MakeCache], Any]) -> Any:
    """What `make` gives with a run's cache. Runs that attend to the same pages say the same, whatever is predicted;
    unless pages that come late are skipped."""

    def made() -> Any:
        return make(lambda: make_cache(spec, model))

    if spec.paging is not None and spec.paging.on_miss == "skip":
        return made()
    what = spec.cache_implementation if spec.paging is None else judged_spec(spec).paging
    return _kept(model, (*key, str(what)), made)


def _kept(model: LoadedModel, key: Hashable, make: Callable[[], Any]) -> Any:
    """What `make` gives for a model, made once for each key; of readings, which are large, the last few."""
    kept = _known.setdefault(model.model, {})
    kept[key] = kept.pop(key) if key in kept else make()  # the last in order is the last wanted
    readings = [key for key, value in kept.items() if isinstance(value, Reading)]
    for oldest in readings[:-MOST_READINGS]:
        del kept[oldest]
    return kept[key]


# --- fidelity -------------------------------------------------------------------------------------------------------


def _fidelity(spec: RunSpec, model: LoadedModel) -> dict[str, Any]:
    """Read the run's prompt and what follows it in the text. Where the model has not positions enough for both, the
    prompt gives way: a run clamped to them has filled them with its own new tokens."""
    n_forced, chunk = spec.quality.fidelity_tokens, spec.prefill_chunk_size
    n_prompt = min(spec.context_length, (model.shape.max_positions or math.inf) - n_forced)
    if n_prompt < 1:
        raise ValueError(f"{n_forced} fidelity_tokens leave no room for a prompt; ask for fewer")
    n_text = n_prompt + n_forced
    _require_memory(spec, model, n_text)
    text = made_prompt(spec, model, n_text)

    def read(make: MakeCache) -> Reading:
        return read_text(model, make(), text, n_forced, chunk)

    key = ("text", n_text, n_forced, spec.batch_size, spec.seed, chunk)
    baseline, reference = _of_baseline(spec, model, key, read)
    run = _of_run(spec, model, key, read)
    truth = baseline if spec.paging is None else _of_run(exact_pages(spec), model, key, read)
    by_head = spec.paging is not None and spec.paging.granularity == "kv_head"
    figures: dict[str, Any] = {
        "reference": reference,
        "prompt_tokens": n_prompt,
        "text_repeats": text_repeats(model.tokenizer, n_text),
        **compare(run, baseline, text, n_forced),
        **attention_recall(run.pages, truth.pages, by_head),
    }
    quantized = spec.quantization is not None
    figures["within_rounding"] = rounding_explains(figures, model.dtype_name, quantized) if spec.exact else None
    return figures


def _require_memory(spec: RunSpec, model: LoadedModel, n_text: int) -> None:
    """Raises ValueError where what is kept of a text is too much: a probability of every word at each step, and of a
    paged cache each page's weight with each head of each layer."""
    n_forced, per_step = spec.quality.fidelity_tokens, model.shape.vocab_size
    if spec.paging is not None:
        n_heads = model.model.config.get_text_config().num_attention_heads
        per_step += model.shape.n_paged_layers * n_heads * -(-n_text // spec.paging.page_size)
    n_bytes = 4 * spec.batch_size * n_forced * per_step
    if n_bytes > MOST_READING_BYTES:
        raise ValueError(
            f"{n_forced} fidelity_tokens in {spec.batch_size} rows are {n_bytes / 2**30:.1f} GiB to keep; ask for at"
            f" most {n_forced * MOST_READING_BYTES // n_bytes}"
        )


# --- tasks ----------------------------------------------------------------------------------------------------------


def _task_score(spec: RunSpec, model: LoadedModel, choice: Any, n_tokens: int) -> dict[str, Any]:
    """The mean score of a task with its confidence interval, the baseline's beside it, and both by depth."""
    if model.tokenizer is None:
        raise ValueError("quality tasks need a tokenizer, and this model has none; ask for fidelity_tokens alone")
    task, quality = TASKS.create(choice), spec.quality
    asked = items(task, model.tokenizer, n_tokens, quality.samples, spec.seed)
    n_answer, limit = max(item.max_new_tokens for item in asked), model.shape.max_positions or math.inf
    if n_tokens + n_answer > limit:  # beyond which some would read past a table in memory
        if quality.lengths is not None:
            raise ValueError(f"with up to {n_answer} tokens of an answer they exceed the model's {limit} positions")
        n_tokens = limit - n_answer  # the prompt of a run that has filled the positions with its own new tokens
        asked = items(task, model.tokenizer, n_tokens, quality.samples, spec.seed)
    unit = getattr(task, "unit", "share")
    score_item = _surprise_at if unit == "perplexity" else _score_of_answer

    def scored(make: MakeCache) -> list[tuple[float, PageMeans]]:
        return [score_item(spec, model, make(), task, item) for item in asked]

    key = ("task", str(choice), n_tokens, quality.samples, spec.seed, spec.prefill_chunk_size)
    of_baseline, reference = _of_baseline(spec, model, key, scored)
    of_run = _of_run(spec, model, key, scored)
    scores, baseline_scores = ([score for score, _ in of_items] for of_items in (of_run, of_baseline))
    baseline = _summed_up(baseline_scores, unit)
    return {
        "task": choice_text(choice),
        "unit": unit,
        "tokens": n_tokens,
        **_summed_up(scores, unit),
        "reference": reference,
        "baseline": baseline,
        "discriminates": None if unit == "perplexity" else baseline["mean"] >= LEAST_BASELINE_SCORE,
        **_mean_of_items([pages for _, pages in of_run]),
        "items": [
            {"depth": item.depth, "score": _in_unit(score, unit), "baseline_score": _in_unit(base, unit)}
            for item, score, base in zip(asked, scores, baseline_scores, strict=True)
        ],
    }


def _score_of_answer(
    spec: RunSpec, model: LoadedModel, cache: MeasuredCache, task: Task, item: TaskItem
) -> tuple[float, PageMeans]:
    """How right the answer to an item is, 0 to 1."""
    eos = model.model.generation_config.eos_token_id
    stop = {eos} if isinstance(eos, int) else set(eos or ())
    said = answer(model, cache, item.prompt, item.n_question, item.max_new_tokens, stop, spec.prefill_chunk_size)
    return task.score(model.tokenizer.decode(said.tokens, skip_special_tokens=True), item), mean_pages(said.pages)


def _surprise_at(
    spec: RunSpec, model: LoadedModel, cache: MeasuredCache, task: Task, item: TaskItem
) -> tuple[float, PageMeans]:
    """The mean negative log-likelihood of the last tokens of an item's text, in nats."""
    reading = read_text(model, cache, [item.prompt], item.n_question, spec.prefill_chunk_size)
    surprises = surprise(reading, [item.prompt], item.n_question)
    return math.fsum(surprises) / len(surprises), mean_pages(reading.pages)


def _mean_of_items(pages: list[PageMeans]) -> PageMeans:
    return {
        name: None if None in figures else math.fsum(figures) / len(figures)
        for name, figures in zip(pages[0], zip(*(item.values() for item in pages), strict=True), strict=True)
    }


def _summed_up(scores: list[float], unit: str) -> dict[str, Any]:
    """Mean and 95 % confidence interval; of mean negative log-likelihoods, as perplexities."""
    if unit != "perplexity":
        return score_with_interval(scores)
    return {name: value if name == "n" else _in_unit(value, unit) for name, value in mean_with_interval(scores).items()}


def _in_unit(score: float | None, unit: str) -> float | None:
    return math.exp(score) if unit == "perplexity" and score is not None else score
