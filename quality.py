"""The quality of a run: what its cache costs in answers, beside what it saves in milliseconds.

Asked for by a `quality:` block, and measured apart from the timed generation, with a cache of the same settings:

* *fidelity* (fidelity.py): reading the run's own prompt and the text that goes on from it, with the run's cache and
  with transformers' own;
* *tasks* (quality_tasks.py): questions whose answers lie somewhere in a long prompt, answered by greedy generation.

Every score stands beside that of the baseline on the very same items. A small model fails some tasks with all of its
attention, and such a task tells nothing about a cache: then `discriminates` is False.

The question is part of the prompt, and prefill reads every page; so what a selector costs shows in the answer's tokens
after the first, and a cache that loses the question itself is not caught by it.

Prefetch never changes what is attended to, so a predictive run is judged with its paging alone; unless it may skip
pages, which then depends on what was copied ahead. What the baseline says of a text or an item depends on the model and
nothing else, and is kept for the other runs as long as the model is.
"""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable, Hashable
from dataclasses import asdict, replace
from typing import Any

from cache_settings import Paging
from fidelity import Reading, attention_recall, compare, read_text
from generation import HFCache, MeasuredCache, generate, made_prompt
from intervals import mean_with_interval
from kv_paging import MeasuredPagedCache, PagedKVCache
from models import LoadedModel
from predictive_prefetch import PrefetchingKVCache
from quality_tasks import TaskItem, items
from registry import TASKS, name_of
from run_specs import RunSpec

log = logging.getLogger(__name__)

LEAST_BASELINE_SCORE = 0.5  # below it, most of what a task asks is lost with full attention already

_known: weakref.WeakKeyDictionary[Any, dict[Hashable, Any]] = weakref.WeakKeyDictionary()


def quality_figures(spec: RunSpec, model: LoadedModel) -> dict[str, Any]:
    """What a run's `quality` block holds beside its tokens: `fidelity` and `tasks`, each None where not asked for.

    What could not be measured is left out, and `error` says why: a task that does not fit into the length asked for, a
    model without a tokenizer to write tasks with, or whatever else went wrong.
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
    scores = [
        measured(f"{task} at {length} tokens", lambda task=task, length=length: _task_score(spec, model, task, length))
        for task in quality.tasks
        for length in quality.lengths or [spec.context_length]
    ]
    figures = {"fidelity": fidelity, "tasks": [score for score in scores if score is not None] or None}
    return figures | ({"error": "; ".join(errors)} if errors else {})


def make_cache(spec: RunSpec, model: LoadedModel) -> MeasuredCache:
    """A cache that attends to what the run's attends to."""
    if spec.paging is None:
        return HFCache(spec.cache_implementation or "dynamic", model)
    config, paging = model.model.config, asdict(_what_decides(spec.paging))
    if spec.prefetch is None or spec.paging.on_miss == "wait":
        return MeasuredPagedCache(PagedKVCache(config, **paging), model)
    return MeasuredPagedCache(PrefetchingKVCache(config, **paging, **asdict(spec.prefetch)), model)


def _fidelity(spec: RunSpec, model: LoadedModel) -> dict[str, Any]:
    """Read the run's prompt and what follows it in the text."""
    n_forced, chunk = spec.quality.fidelity_tokens, spec.prefill_chunk_size
    n_text = spec.context_length + n_forced
    _require_positions(model, n_text, f"{spec.context_length} tokens of context and {n_forced} fidelity_tokens")
    text = made_prompt(spec, model, n_text)

    def read(cache: MeasuredCache) -> Reading:
        return read_text(model, cache, text, n_forced, chunk)

    key = ("text", n_text, n_forced, spec.batch_size, spec.seed, chunk)
    baseline = _kept(model, (*key, "dynamic"), lambda: read(HFCache("dynamic", model)))
    run = _kept_if_repeatable(spec, model, key, lambda: read(make_cache(spec, model)))
    figures: dict[str, Any] = compare(run, baseline, text, n_forced)
    if spec.paging is None or spec.paging.granularity == "kv_head":  # by head, no page is read or left out as a whole
        return figures | {"attention_mass_recall": None, "page_recall": None}
    size = spec.paging.page_size
    truth = _kept(model, (*key, size), lambda: read(_every_page(spec, model, n_text)))
    return figures | attention_recall(run, truth)


def _what_decides(paging: Paging) -> Paging:
    """The paging without what is only recorded of it."""
    return replace(paging, record_pages=False, record_timeline=False)


def _require_positions(model: LoadedModel, n_tokens: int, what: str) -> None:
    """Raises ValueError where a text is longer than the model's positions, beyond which some would read past a table
    in memory."""
    limit = model.shape.max_positions
    if limit is not None and n_tokens > limit:
        raise ValueError(f"{what} are {n_tokens} positions, and the model has {limit}; ask for fewer")


def _every_page(spec: RunSpec, model: LoadedModel, n_tokens: int) -> MeasuredPagedCache:
    """A paged cache in which every page is resident and read."""
    n_pages = max(3, -(-n_tokens // spec.paging.page_size))
    cache = PagedKVCache(model.model.config, page_size=spec.paging.page_size, max_gpu_pages=n_pages, link="memory")
    return MeasuredPagedCache(cache, model)


def _task_score(spec: RunSpec, model: LoadedModel, choice: Any, n_tokens: int) -> dict[str, Any]:
    """The mean score of a task with its confidence interval, the baseline's beside it, and both by depth."""
    if model.tokenizer is None:
        raise ValueError("quality tasks need a tokenizer, and this model has none; ask for fidelity_tokens alone")
    task, quality = TASKS.create(choice), spec.quality
    asked = items(task, model.tokenizer, n_tokens, quality.samples, spec.seed)
    _require_positions(model, n_tokens + max(item.max_new_tokens for item in asked), "a task's prompt and its answer")

    def answer(make: Callable[[], MeasuredCache]) -> list[float]:
        return [task.score(_answer(spec, model, make(), item), item) for item in asked]

    key = ("task", str(choice), n_tokens, quality.samples, spec.seed, spec.prefill_chunk_size)
    of_baseline = _kept(model, (*key, "dynamic"), lambda: answer(lambda: HFCache("dynamic", model)))
    scores = _kept_if_repeatable(spec, model, key, lambda: answer(lambda: make_cache(spec, model)))
    run, baseline = mean_with_interval(scores), mean_with_interval(of_baseline)
    return {
        "task": name_of(choice),
        "tokens": n_tokens,
        **run,
        "baseline": baseline,
        "discriminates": baseline["mean"] >= LEAST_BASELINE_SCORE,
        "items": [
            {"depth": item.depth, "score": score, "baseline_score": base}
            for item, score, base in zip(asked, scores, of_baseline, strict=True)
        ],
    }


def _answer(spec: RunSpec, model: LoadedModel, cache: MeasuredCache, item: TaskItem) -> str:
    """What the model answers to an item, greedily."""
    greedy = replace(spec, do_sample=False, stop_at_eos=True, batch_size=1)
    tokens = generate(greedy, model, cache, [item.prompt], item.max_new_tokens).tokens[0]
    return model.tokenizer.decode(tokens, skip_special_tokens=True)


def _kept_if_repeatable(spec: RunSpec, model: LoadedModel, key: tuple, make: Callable[[], Any]) -> Any:
    """The same for a run's own cache: runs that attend to the same pages say the same, whatever is predicted; unless
    pages that come late are skipped."""
    if spec.paging is not None and spec.paging.on_miss == "skip":
        return make()
    what = spec.cache_implementation if spec.paging is None else _what_decides(spec.paging)
    return _kept(model, (*key, str(what)), make)


def _kept(model: LoadedModel, key: Hashable, make: Callable[[], Any]) -> Any:
    """What `make` gives for a model, made once for each key."""
    kept = _known.setdefault(model.model, {})
    if key not in kept:
        kept[key] = make()
    return kept[key]


def needs_quality(spec: RunSpec) -> bool:
    """Whether a run's quality is to be measured: asked for, and once for all repetitions, which give the same."""
    return spec.quality is not None and spec.repetition == 0
