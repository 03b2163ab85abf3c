"""Mode 3, predictive: the paged cache, with pages copied ahead of need.

While one layer computes, the link is free. When a layer's own pages are all there or on their way, a predictor names
the pages that the *next* layer will ask for, and the first `prefetch_k` of them that are not on the device start to
travel, into free slots of that layer. When it then asks, it finds them there (on time) or on their way (late), and
waits less.

Prefetch moves bytes earlier and changes nothing else: which pages are attended to is the selector's choice, made when
the layer asks. So tokens are the same as without it, whatever is predicted. A page that was predicted and not asked for
gives its slot back, and its bytes are counted as wasted.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from component_cli import demonstrate
from generation import measured_run
from kv_paging import MeasuredPagedCache, PagedKVCache
from metrics import RunResult, Timing, prefetch_figures
from models import LoadedModel
from page_predictors import Predictor
from paged_layer import DecodeAttention, PagedLayer
from paged_sequence import PagedSequence
from registry import PREDICTORS
from run_specs import RunSpec


class PrefetchingKVCache(PagedKVCache):
    """A paged cache that copies pages ahead of need.

    Args:
        config: the model's config.
        predictor: a registered name, `"module:Class"`, or `{"name": ..., parameters}`.
        prefetch_k: most pages to copy ahead for one layer of one sequence at a time.
        **paging: as for `PagedKVCache`.

    Raises:
        ValueError: `prefetch_k` exceeds `staging_pages`, the slots that pages can travel to.
    """

    def __init__(
        self,
        config: Any,
        *,
        predictor: str | Mapping[str, Any] = "layer_ahead",
        prefetch_k: int = 4,
        **paging: Any,
    ):
        super().__init__(config, **paging)
        if not 1 <= prefetch_k <= self.paging.staging_pages:
            raise ValueError(f"prefetch_k={prefetch_k} must be between 1 and staging_pages={self.paging.staging_pages}")
        PREDICTORS.create(predictor)  # a wrong name or parameter is found now, not in the first decode step
        self._made_of = config, {"predictor": predictor, "prefetch_k": prefetch_k, **paging}
        self.predictor, self.prefetch_k = predictor, prefetch_k
        self._predictors: dict[int, Predictor] = {}
        following = self.paged_layers[1:] + self.paged_layers[:1]
        self._next_layer = dict(zip((layer.layer_idx for layer in self.paged_layers), following, strict=True))

    def reset(self) -> None:
        super().reset()
        self._predictors.clear()

    @property
    def _step(self) -> int:
        """Number of the decode step under way, from 0."""
        return self.n_decode_steps - 1

    def look_ahead(self, layer: PagedLayer, sequence: PagedSequence, wanted: Sequence[int]) -> None:
        """The link has time: copy ahead for the next layer (after the last one, the first one of the next step)."""
        if self.phase != "decode":
            return
        following = self._next_layer[layer.layer_idx]
        if following.n_rows <= sequence.lane:  # the first tokens of all: the next layer has no pages yet
            return
        wraps = following is self.paged_layers[0]
        predictor = self._predictor(sequence)
        with self._naming_the_predictor():
            predictor.want(layer.layer_idx, self._step, wanted)
            guesses = predictor.predict(following.layer_idx, self._step + wraps)
        following.pages.sequences[sequence.lane].prefetch([page for page, _ in guesses], self.prefetch_k)

    def attended(self, layer: PagedLayer, sequence: PagedSequence, attention: DecodeAttention) -> None:
        """Tell the predictor what attention looked at."""
        predictor = self._predictor(sequence)
        if getattr(predictor, "needs_mass", True):
            with self._naming_the_predictor():
                predictor.observe(layer.layer_idx, self._step, attention.pages, attention.mass)

    @contextmanager
    def _naming_the_predictor(self) -> Iterator[None]:
        """An error of a predictor says whose it is."""
        try:
            yield
        except Exception as error:
            raise RuntimeError(f"predictor {self.predictor!r} failed: {type(error).__name__}: {error}") from error

    def rows_selected(self, rows: Sequence[int]) -> None:
        """Let each row's predictor follow it."""
        old = self._predictors
        self._predictors = {lane: copy.deepcopy(old[row]) for lane, row in enumerate(rows) if row in old}

    def figures(self, timing: Timing) -> dict[str, Any]:
        """The result blocks `cache`, `prefetch` and `steps`."""
        return {**super().figures(timing), "prefetch": prefetch_figures(self.recorder, self.page_bytes)}

    def _predictor(self, sequence: PagedSequence) -> Predictor:
        if sequence.lane not in self._predictors:
            self._predictors[sequence.lane] = PREDICTORS.create(self.predictor)
        return self._predictors[sequence.lane]


def run(spec: RunSpec, model: LoadedModel, **how: Any) -> RunResult:
    """Page the KV cache and copy pages ahead of need.

    One run; see `generation.measured_run` for `how`.
    """
    options = asdict(spec.paging) | asdict(spec.prefetch)

    def make_cache() -> MeasuredPagedCache:
        return MeasuredPagedCache(PrefetchingKVCache(model.model.config, **options), model)

    return measured_run(spec, model, make_cache, **how)


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m predictive_prefetch`: a short generation with prefetching, next to the same one without paging."""
    return demonstrate("predictive", run, argv, module="predictive_prefetch")


if __name__ == "__main__":
    sys.exit(main())
