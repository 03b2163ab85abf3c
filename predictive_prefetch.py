"""Mode 3, predictive: the paged cache, with pages copied ahead of need.

While one layer computes, the link is free. When a layer's own pages are all there or on their way, a predictor names
the pages that a later layer will ask for (the next one, or `lookahead` layers on); of the best of them, those that are
not on the device and are worth a copy (prefetch_threshold.py) start to travel, at most `prefetch_k`. When that layer
then asks, it finds them there (on time) or on their way (late), and waits less.

Prefetch moves bytes earlier and changes nothing else: which pages are attended to is the selector's choice, made when
the layer asks. So tokens are the same as without it, whatever is predicted.

A page that was copied ahead and not asked for stays where it is until its slot is needed, as the next step may ask for
it; then its bytes are counted as wasted. What can be on its way at a time is bounded by the slots: copies ahead take
free ones and those of pages no longer guessed, and never the slot of a page that is wanted now.
"""

from __future__ import annotations

import copy
import math
import operator
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NoReturn

from cache_settings import PrefetchSpec, prefetch_conflicts
from component_cli import demonstrate
from decode_attention import DecodeAttention
from fading import Guesses
from generation import generate, made_prompt, measured_run
from kv_paging import MeasuredPagedCache, PagedKVCache
from metrics import RunResult, Timing, prefetch_figures
from models import LoadedModel
from page_predictors import Predictor
from page_selection import page_shares
from paged_attention import group_heads
from paged_layer import PagedLayer
from paged_sequence import PagedSequence
from prefetch_threshold import ConfidenceThreshold
from query_foresight import QueryForesight
from recorder import PageRequest
from registry import PREDICTORS, name_of
from run_specs import RunSpec
from utils import is_out_of_memory


class PrefetchingKVCache(PagedKVCache):
    """A paged cache that copies pages ahead of need.

    Args:
        config: the model's config.
        predictor, prefetch_k, overfetch, lookahead, min_confidence, prefetch_evicts: see `cache_settings.PrefetchSpec`.
        **paging: as for `PagedKVCache`.

    Raises:
        ValueError: a setting is out of range, or two contradict each other, as when `prefetch_k` exceeds
            `staging_pages`, the slots that pages can travel to.
    """

    def __init__(self, config: Any, **settings: Any):
        given = {name: settings[name] for name in settings if name in PrefetchSpec.__dataclass_fields__}
        super().__init__(config, **{name: value for name, value in settings.items() if name not in given})
        self._made_of = config, settings
        self.prefetching = PrefetchSpec(**given)
        made = PREDICTORS.create(self.prefetching.predictor)  # what is wrong with it is found now, not in a decode step
        needs = {name for name in ("needs_scores", "needs_recording") if getattr(made, name, False)}
        for _, conflict in prefetch_conflicts(self.prefetching, self.paging, needs):
            raise ValueError(conflict)
        watched_by_another = type(self).attended is not PrefetchingKVCache.attended
        self.watches_attention = watched_by_another or getattr(made, "needs_mass", True)
        uses_scores = self.paging.selects and getattr(made, "uses_scores", False)
        self._foresight = QueryForesight(self) if uses_scores else None
        self._later_layer = self._layers_ahead(self.prefetching.lookahead)
        self._forget_guesses()

    def _layers_ahead(self, n: int) -> dict[int, tuple[PagedLayer, int]]:
        """For each layer the one `n` paged layers on, and how many decode steps later that is."""
        layers = self.paged_layers
        later = [divmod(place + n, len(layers)) for place in range(len(layers))]
        return {layer.layer_idx: (layers[place], steps) for layer, (steps, place) in zip(layers, later, strict=True)}

    def _forget_guesses(self) -> None:
        self.threshold = ConfidenceThreshold(self.prefetching.min_confidence)
        self._predictors: dict[int, Predictor] = {}
        self._n_asked: dict[tuple[int, int], int] = {}
        self._step_began: tuple[float, list[float]] | None = None

    def reset(self) -> None:
        super().reset()
        self._forget_guesses()

    @contextmanager
    def attached(self, model: Any) -> Iterator[PrefetchingKVCache]:
        with super().attached(model):
            if self._foresight is None:
                yield self
            else:
                with self._foresight.watching(model):
                    yield self

    @property
    def _step(self) -> int:
        """Number of the decode step under way, from 0."""
        return self.n_decode_steps - 1

    def _begin_step(self, n_new: int) -> None:
        super()._begin_step(n_new)
        if self.phase == "decode":
            self.threshold.begin_step(self._link_load())
        else:
            self._step_began = None

    def _link_load(self) -> float | None:
        """The share of the time since the last decode step began that the busiest link has spent moving pages."""
        now, busy_ms = time.perf_counter(), [transport.busy_ms_so_far() for transport in self._transports.values()]
        before, self._step_began = self._step_began, (now, busy_ms)
        if before is None or len(before[1]) != len(busy_ms) or self._step == 0:
            return None
        moved_ms = max(after - earlier for after, earlier in zip(busy_ms, before[1], strict=True))
        return moved_ms / (1000.0 * (now - before[0]))

    def look_ahead(self, layer: PagedLayer, sequence: PagedSequence, wanted: Sequence[int]) -> None:
        """The link has time: copy ahead for a later layer (after the last one, for those of the next step)."""
        if self.phase != "decode":
            return
        started = time.perf_counter()
        self.threshold.judge((layer.layer_idx, sequence.lane, self._step), wanted)
        self._n_asked[layer.layer_idx, sequence.lane] = len(wanted)
        later, steps = self._later_layer[layer.layer_idx]
        if later.n_rows <= sequence.lane:  # the first tokens of all: the later layer has no pages yet
            return
        predictor = self._predictor(sequence)
        foreseen = self._foreseen(layer, later, sequence.lane) if steps == 0 else None
        try:
            predictor.want(layer.layer_idx, self._step, wanted)
            if foreseen is not None:
                predictor.hint(later.layer_idx, self._step, *foreseen)
            guesses = _checked(predictor.predict(later.layer_idx, self._step + steps))
        except Exception as error:
            self._blame_predictor(error)
        pages = self._plan_copies(later, sequence.lane, self._step + steps, guesses)
        self._spent_predicting(layer, started)
        if pages:
            theirs = later.pages.sequences[sequence.lane]
            # The later layer may be this one, in a later step: then its pages are still to be attended.
            attended_now = wanted if theirs is sequence else ()
            theirs.prefetch(pages, (page for page, _ in guesses), attended_now, self.prefetching.prefetch_evicts)

    def _plan_copies(self, later: PagedLayer, lane: int, step: int, guesses: Guesses) -> list[int]:
        """The pages to copy ahead for a later layer in a step: of its best guesses, to which `guesses` is cut down,
        those that are absent and worth a copy."""
        theirs = later.pages.sequences[lane]
        if self.prefetching.overfetch is not None:
            asked_before = self._n_asked.get((later.layer_idx, lane), self.paging.n_attended(theirs.n_pages))
            del guesses[math.ceil(min(self.prefetching.overfetch * asked_before, len(guesses))) :]
        are_absent = theirs.absent(page for page, _ in guesses)
        absent: dict[int, float] = {}
        for page, confidence in guesses:
            if page in are_absent:
                absent.setdefault(page, confidence)
        limit = self.prefetching.prefetch_k
        chosen = self.threshold.worth_copying((later.layer_idx, lane, step), list(absent.items()), limit)
        if n_declined := min(limit, len(absent)) - len(chosen):
            self.recorder.count(later.layer_idx, prefetch_declined=n_declined)
        return chosen

    def _foreseen(self, layer: PagedLayer, later: PagedLayer, lane: int) -> tuple[dict[int, float], int] | None:
        """What the selector would make of a later layer's pages, were its input this layer's, as `Predictor.hint` takes
        it: the shares of the pages to choose from, and how many are chosen. None where nobody asks for it."""
        if self._foresight is None or later.selector is None:
            return None
        foreseen = self._foresight.query(later.attention, given_to=layer.attention)
        if foreseen is None:
            return None
        query, scale = foreseen
        theirs = later.pages.sequences[lane]
        grouped = group_heads(query[lane : lane + 1], later.pages.kind[1])[0] * scale  # [K, G, D]
        # Pages that are pinned take part in no choice, so they have no share either: heads would weigh less that look
        # at them most.
        first, end = self.paging.sink_pages, theirs.n_pages - self.paging.recent_pages
        shares = page_shares(later.pages.scores(lane, grouped)[first : max(first, end)]).tolist()
        n_chosen = max(0, self.paging.n_attended(theirs.n_pages) - len(theirs.pinned_pages()))
        return dict(enumerate(shares, start=first)), n_chosen

    def attended(self, layer: PagedLayer, sequence: PagedSequence, attention: DecodeAttention) -> None:
        """Tell the predictor what attention looked at."""
        predictor = self._predictor(sequence)
        if getattr(predictor, "needs_mass", True):
            started = time.perf_counter()
            try:
                predictor.observe(layer.layer_idx, self._step, attention.pages, attention.mass)
            except Exception as error:
                self._blame_predictor(error)
            self._spent_predicting(layer, started)

    def _spent_predicting(self, layer: PagedLayer, started: float) -> None:
        self.recorder.spent(layer.layer_idx, "predict", 1000.0 * (time.perf_counter() - started))

    def _blame_predictor(self, error: Exception) -> NoReturn:
        """An error of a predictor says whose it is."""
        if is_out_of_memory(error):
            raise error
        name = name_of(self.prefetching.predictor)
        raise RuntimeError(f"predictor {name!r} failed: {type(error).__name__}: {error}") from error

    def rows_selected(self, rows: Sequence[int]) -> None:
        """Let each row's predictor follow it."""
        if list(rows) == list(range(len(rows))) and all(lane < len(rows) for lane in self._predictors):
            return
        if not PREDICTORS.asks_for(self.prefetching.predictor, "needs_recording"):  # which changed its rows alike
            old, self._predictors = self._predictors, {}
            for lane, row in enumerate(rows):
                if row in old:
                    self._predictors[lane] = copy.deepcopy(old[row])
        self.threshold.forget()
        self._n_asked.clear()

    def figures(self, timing: Timing) -> dict[str, Any]:
        """The result blocks `cache`, `prefetch` and `steps`."""
        learnt = {"calibration": self.threshold.calibration.bins(), "thresholds": self.threshold.history}
        figures = prefetch_figures(self.recorder, self.page_bytes)
        return {**super().figures(timing), "prefetch": figures | learnt}

    def _predictor(self, sequence: PagedSequence) -> Predictor:
        if sequence.lane not in self._predictors:
            choice = self.prefetching.predictor
            if PREDICTORS.asks_for(choice, "needs_recording"):
                choice = {**choice, "sequence": sequence.lane}
            self._predictors[sequence.lane] = PREDICTORS.create(choice)
        return self._predictors[sequence.lane]


def _checked(guesses: Iterable[tuple[int, float]]) -> Guesses:
    """The guesses of a predictor of anybody's as page numbers and confidences; TypeError or ValueError if they are
    something else."""
    return [(operator.index(page), float(confidence)) for page, confidence in guesses]


def make_cache(spec: RunSpec, model: LoadedModel) -> MeasuredPagedCache:
    """The cache of a run, new and empty."""
    settings = vars(spec.paging) | vars(spec.prefetch)  # asdict would copy a recording
    return MeasuredPagedCache(PrefetchingKVCache(model.model.config, **settings), model)


def run(spec: RunSpec, model: LoadedModel, **how: Any) -> RunResult:
    """Page the KV cache and copy pages ahead of need.

    One run; see `generation.measured_run` for `how`. A predictor that needs a recording of the generation gets one:
    the same is generated once more beforehand, without prefetch, and not measured.
    """
    choice = spec.prefetch.predictor
    if not PREDICTORS.asks_for(choice, "needs_recording"):
        return measured_run(spec, model, make_cache, **how)
    given = {"name": choice} if isinstance(choice, str) else dict(choice)
    knowing = {**given, "requests": recorded_requests(spec, model, how)}

    def make_knowing_cache(spec: RunSpec, model: LoadedModel) -> MeasuredPagedCache:
        return make_cache(replace(spec, prefetch=replace(spec.prefetch, predictor=knowing)), model)

    return measured_run(spec, model, make_knowing_cache, **how)


def recorded_requests(spec: RunSpec, model: LoadedModel, how: Mapping[str, Any]) -> list[PageRequest]:
    """What the layers ask for in the generation of a run, made without prefetch; `how` as for `run`."""
    prompt = how.get("prompt") or made_prompt(spec, model)
    cache = PagedKVCache(model.model.config, **vars(replace(spec.paging, record_pages=True)))
    generate(
        spec,
        model,
        MeasuredPagedCache(cache, model),
        prompt,
        spec.max_new_tokens,
        attention_mask=how.get("attention_mask"),
    )
    return cache.recorder.requests


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m predictive_prefetch`: a short generation with prefetching, next to the same one without paging."""
    return demonstrate("predictive", run, argv, module="predictive_prefetch")


if __name__ == "__main__":
    sys.exit(main())
