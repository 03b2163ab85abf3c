"""Mode 2, reactive: a KV cache in pages, of which a fixed budget is on the device.

A *page* is `page_size` consecutive positions of one layer of one sequence, keys and values of all heads. Each layer
keeps at most `max_gpu_pages` pages of each sequence resident on its device; the rest are in host memory and are
fetched when attention asks for them. `PagedKVCache` is a drop-in `Cache` for `model.generate(past_key_values=cache)`:

* inside `with cache.attached(model):`, attention runs over pages and the budget holds for a context of any length;
* not attached, `update` returns all keys and values, so that any attention works (the device then holds them all).

    cache = PagedKVCache(model.config, page_size=256, max_gpu_pages=8)
    with cache.attached(model):
        tokens = model.generate(**inputs, past_key_values=cache, max_new_tokens=50)
    print(cache.recorder.snapshot("decode"))

This module is the cache as a whole; a layer of it is in paged_layer.py, a sequence in a layer in paged_sequence.py.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

import hf_attention
from cache_settings import Paging
from component_cli import demonstrate
from decode_attention import DecodeAttention
from generation import measured_run
from hf_attention import CannotPage
from links import choose_link
from lockstep import Lockstep
from metrics import RunResult, Timing, cache_figures
from models import LoadedModel
from padding import Padding, read_padding
from page_store import Transport, transport_for
from paged_layer import PagedLayer
from paged_sequence import PagedSequence
from recorder import Recorder
from registry import POLICIES, SELECTORS, nearest
from run_specs import RunSpec
from stage_clock import clock_for
from timeline import Timeline


class PagedKVCache(Cache):
    """A KV cache in pages, for any Hugging Face causal model with full-attention layers.

    A layer with sliding-window attention keeps transformers' own small cache.

    Where a selector leaves pages out and the prompt comes in chunks, announce the prompt's length by setting
    `prompt_tokens`: prefill reads every page, and without it a chunk of one token is taken for a decode step.

    Args:
        config: the model's config.
        **paging: the fields of `cache_settings.Paging`: `page_size`, `max_gpu_pages`, `staging_pages`, `policy`,
            `selector` with `attention_pages` or `attention_fraction`, `granularity` and `dense_layers`, `sink_pages`,
            `recent_pages`, `access_order`, `on_miss`, `page_table`, `host_pages` and `disk_dir`, `link`,
            `record_pages`, `record_timeline`.

    Raises:
        CannotPage: the config has layers that hold something other than keys and values, or none with full attention.
        ValueError: a setting is unknown or out of range, or two contradict each other.
    """

    def __init__(self, config: Any, **paging: Any):
        for name in paging:
            if name not in Paging.__dataclass_fields__:
                raise ValueError(f"unknown setting {name!r}{nearest(name, Paging.__dataclass_fields__)}")
        self.paging = Paging(**paging)
        for parts, choice in ((POLICIES, self.paging.policy), (SELECTORS, self.paging.selector)):
            parts.create(choice)  # a wrong name or parameter is found now, not as the first keys come in
        choose_link(self.paging.link, "cpu")
        self.recorder = Recorder(self.paging.record_pages, Timeline() if self.paging.record_timeline else None)
        self.phase = "prefill"
        self.prompt_tokens: int | None = None
        self._transports: dict[torch.device, Transport] = {}
        self._n_attached = 0
        self.watches_attention = type(self).attended is not PagedKVCache.attended
        self.looks_ahead = type(self).look_ahead is not PagedKVCache.look_ahead
        self.lockstep = None if self.looks_ahead else Lockstep()
        self.torn = False
        self.n_decode_steps = 0
        self._made_of = config, paging
        self._past = 0
        self._mask_read: tuple[torch.Tensor, Padding | None] | None = None
        layers = [self._paged_or_kept(index, layer) for index, layer in enumerate(DynamicCache(config=config).layers)]
        super().__init__(layers=layers)
        self.paged_layers = [layer for layer in layers if isinstance(layer, PagedLayer)]
        if not self.paged_layers:
            raise CannotPage("no layer of this model has full attention, so there is nothing to page")

    def _paged_or_kept(self, index: int, layer: Any) -> Any:
        if type(layer) is DynamicLayer:
            return PagedLayer(index, self.paging, self)
        if type(layer) is DynamicSlidingWindowLayer:
            return layer
        kind = type(layer).__name__
        why = "has no keys and values of its own" if kind == "DummyLayer" else "holds more than keys and values"
        raise CannotPage(f"layer {index} needs a {kind}, which cannot be paged: it {why}")

    def allocate(
        self, model: PreTrainedModel, batch_size: int, n_kv_heads: int, head_dim: int, max_tokens: int
    ) -> None:
        """Allocate pools and host pages now, rather than as the first keys come in.

        Args:
            model: tells the device of each layer, and the dtype.
            batch_size: sequences.
            n_kv_heads, head_dim: of every paged layer.
            max_tokens: positions of each sequence that host memory is reserved for; more may follow.
        """
        devices = _attention_devices(model)
        for layer in self.paged_layers:
            device = devices.get(layer.layer_idx, model.device)
            layer.allocate(batch_size, n_kv_heads, head_dim, model.dtype, device, max_tokens)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values `[B, K, T, D]` of a layer; returns those that attention needs to be given."""
        if hf_attention.only_asking():
            return key_states, value_states
        layer = self.layers[layer_idx]
        if layer_idx == 0:
            self._begin_step(key_states.shape[2])
        if self._n_attached:
            pages_attend = isinstance(layer, PagedLayer)
            hf_attention.hand_over(layer_idx, layer if pages_attend else None)
            if pages_attend:
                return key_states, value_states
        with self._torn_by_an_error():
            return layer.update(key_states, value_states, *args, **kwargs)

    def _begin_step(self, n_new: int) -> None:
        """Note which phase this forward pass belongs to. Where the prompt's length was announced (`prompt_tokens`),
        decode begins after it; else one new token is taken for a decode step."""
        self._require_whole()
        self._mask_read, self._past = None, self.paged_layers[0].n_tokens
        decoding = n_new == 1 if self.prompt_tokens is None else self._past >= self.prompt_tokens
        if decoding and self.n_decode_steps == 0:
            for transport in self._transports.values():
                transport.restart_clock()
        self.n_decode_steps += decoding
        self.phase = "decode" if decoding else "prefill"
        self.recorder.begin_step(self.phase)
        if self.lockstep is not None:
            self.lockstep.begin_step()
        if self.recorder.timeline is not None:
            self.recorder.timeline.begin_step(len(self.recorder.steps) - 1, decoding, self._now)

    def _now(self) -> list[Any]:
        """This moment, on the clock of each device."""
        return [clock_for(device).now() for device in self._transports]

    def _require_whole(self) -> None:
        """Refuse a context that only some layers have written, or whose pages something has failed to change."""
        if self.torn or len({layer.get_seq_length() for layer in self.layers}) > 1:
            raise RuntimeError("a forward pass with this cache failed midway and left it torn; call reset() first")

    @contextmanager
    def _torn_by_an_error(self) -> Iterator[None]:
        """What fails inside may have changed some layers, rows or pages and left others as they were."""
        try:
            yield
        except BaseException:
            self.torn = True
            raise

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` positions of every layer."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative count of positions to remove, not {tokens_to_remove}")
        self._require_whole()
        for layer in self._kept_layers():  # transformers refuses to crop a full window; nothing has changed by then
            layer.crop(tokens_to_remove)
        with self._torn_by_an_error():
            for layer in self.paged_layers:
                layer.crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Make row i the old row `beam_idx[i]`."""
        self._select_rows(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times."""
        self._select_rows([row for row in range(self.paged_layers[0].n_rows) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only the rows `indices`."""
        n_rows = self.paged_layers[0].n_rows
        if n_rows:
            self._select_rows(torch.arange(n_rows)[indices.cpu()].tolist())

    def _select_rows(self, rows: list[int]) -> None:
        self._require_whole()
        with self._torn_by_an_error():
            for layer in self.paged_layers:
                layer.select_rows(rows)
            for layer in self._kept_layers():
                if layer.get_seq_length():
                    layer.batch_select_indices(torch.tensor(rows, device=layer.keys.device))
            self.rows_selected(rows)

    def _kept_layers(self) -> list[Any]:
        """The layers that are not paged."""
        return [layer for layer in self.layers if not isinstance(layer, PagedLayer)]

    def __deepcopy__(self, memo: dict[int, Any]) -> PagedKVCache:
        """A cache with the same context that goes its own way from here, as one prompt is continued several times. Its
        pages are written anew, and its record begins with that."""
        self._require_whole()
        config, options = self._made_of
        other = type(self)(config, **options)
        memo[id(self)] = other
        other.recorder.begin_step("prefill")
        for index, layer in enumerate(self.layers):
            if isinstance(layer, PagedLayer):
                other.layers[index].continue_from(layer)
            else:
                other.layers[index] = copy.deepcopy(layer, memo)
        return other

    @contextmanager
    def attached(self, model: PreTrainedModel) -> Iterator[PagedKVCache]:
        """Attention of `model` runs over pages inside the block; undone on any exit.

        Raises:
            CannotPage: the model does not route attention through transformers' AttentionInterface.
        """
        with hf_attention.attached(model):
            self._n_attached += 1
            try:
                yield self
            finally:
                self._n_attached -= 1
                for layer in self.paged_layers:
                    layer.attention = None  # or the cache would keep the model alive
                self._settle()

    def _settle(self) -> None:
        """Read what the device has measured, once it has finished."""
        for device in self._transports:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        self.recorder.settle()

    def reset(self) -> None:
        """Forget the context and the record of it; keep the memory, unless an error has torn the cache."""
        hf_attention.take_back()
        with self._torn_by_an_error():
            super().reset()
        self.recorder.reset()
        self.phase, self.prompt_tokens = "prefill", None
        self.torn, self.n_decode_steps = False, 0

    # --- what layers need, and where predictive paging hooks in -----------------------------------------------------

    def padding(self, allowed: torch.Tensor | None) -> Padding | None:
        """What the mask `[B, 1, 1, positions]` leaves out, read once for all layers of a forward pass; None if nothing.
        Over several devices each layer may be given a copy of it."""
        if allowed is None:
            return None
        read = self._mask_read
        if read is None or not (allowed is read[0] or allowed.device != read[0].device):
            self._mask_read = read = (allowed, read_padding(allowed, self._past))
        return read[1]

    def transport(self, device: torch.device) -> Transport:
        """What copies to and from `device` travel on; one for all layers there."""
        if device not in self._transports:
            self._transports[device] = transport_for(device, choose_link(self.paging.link, device.type))
        return self._transports[device]

    def look_ahead(self, layer: PagedLayer, sequence: PagedSequence, wanted: Sequence[int]) -> None:
        """Every page that the layer asked for is there or on its way. Called where `looks_ahead` says so, for reactive
        paging does nothing with the time."""

    def attended(self, layer: PagedLayer, sequence: PagedSequence, attention: DecodeAttention) -> None:
        """A decode step's attention of one layer and sequence is done. Called where `watches_attention` says so, as
        shares of single pages cost time; reactive paging learns nothing from them."""

    def rows_selected(self, rows: Sequence[int]) -> None:
        """Row i of the batch is now what row `rows[i]` was; reactive paging keeps nothing by row outside its layers."""

    # --- figures ----------------------------------------------------------------------------------------------------

    @property
    def page_bytes(self) -> int:
        """Bytes of one page of one layer and sequence, keys and values."""
        return self.paged_layers[0].pages.store.page_bytes

    def memory(self) -> dict[str, int | None]:
        """Bytes of keys and values by place. On a CPU device and host are the same memory; the pool stands for the
        device.

        Returns:
            `device_kv_bytes`, pools and kept layers, with `staging_bytes` (slots on top of the budget) among them;
            `resident_bytes`, what the resident pages take of it now; `digest_bytes`, summaries of pages, on the device
            as well but no keys and values; `host_kv_bytes` in host memory and `disk_kv_bytes` in files.
        """
        paged = [layer.pages for layer in self.paged_layers if layer.pages is not None]
        kept = [layer for layer in self._kept_layers() if layer.is_initialized]
        sequences = [sequence for pages in paged for sequence in pages.sequences]
        page_bytes = self.page_bytes if paged else 0
        return {
            "device_kv_bytes": sum(pages.store.pool.nbytes for pages in paged)
            + sum(layer.keys.nbytes + layer.values.nbytes for layer in kept),
            "staging_bytes": len(sequences) * self.paging.staging_pages * page_bytes,
            "resident_bytes": sum(sequence.n_resident for sequence in sequences) * page_bytes,
            "digest_bytes": sum(pages.digests.nbytes for pages in paged if pages.digests is not None),
            "host_kv_bytes": sum(pages.store.host.nbytes for pages in paged),
            "disk_kv_bytes": sum(pages.store.host.disk_bytes for pages in paged),
        }

    def figures(self, timing: Timing) -> dict[str, Any]:
        """The result blocks `cache` and `steps` of a generation that took `timing`."""
        transfer_ms = sum(transport.busy_ms() for transport in self._transports.values())
        if self.paging.page_table == "device":  # kernels bring pages in as they compute: no transport knows how long
            transfer_ms = None
        self._settle()
        pages = self.paged_layers[0].pages
        link = asdict(pages.store.transport.link)
        figures = cache_figures(self.recorder, timing, self.page_bytes, link, transfer_ms)
        figures |= {
            "exact": self.paging.exact,
            "n_pages": pages.n_pages,
            "attended_pages": self.paging.n_attended(pages.n_pages),
            "page_bytes": self.page_bytes,
            "n_paged_layers": len(self.paged_layers),
            "host_is_pinned": all(layer.pages.store.host.is_pinned for layer in self.paged_layers),
        }
        if self.recorder.keep_requests:
            figures["requests"] = self.recorder.request_dicts()
        if self.recorder.timeline is not None:
            figures["timeline"] = self.recorder.timeline.spans()
        return {"cache": figures, "steps": self.recorder.step_dicts()}


def _attention_devices(model: PreTrainedModel) -> dict[int, torch.device]:
    """Where each layer's attention is computed, by layer index. accelerate brings offloaded weights to the device of
    its hook for that."""
    devices: dict[int, torch.device] = {}
    for module in model.modules():
        layer_idx = getattr(module, "layer_idx", None)
        if isinstance(layer_idx, int) and (parameter := next(module.parameters(), None)) is not None:
            place = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
            devices.setdefault(layer_idx, parameter.device if place is None else torch.device(place))
    return devices


class MeasuredPagedCache:
    """A paged cache as the measured loop takes it: allocated before the clock starts."""

    def __init__(self, cache: PagedKVCache, model: LoadedModel):
        self.cache, self.model = cache, model
        self.memory, self.figures, self.attached = cache.memory, cache.figures, cache.attached
        self.hit_rate_so_far = cache.recorder.hit_rate_so_far

    def start(self, batch_size: int, prompt_tokens: int, new_tokens: int) -> Cache:
        shape = self.model.shape
        max_tokens = prompt_tokens + new_tokens
        self.cache.prompt_tokens = prompt_tokens
        self.cache.allocate(self.model.model, batch_size, shape.n_kv_heads, shape.head_dim, max_tokens)
        return self.cache


def make_cache(spec: RunSpec, model: LoadedModel) -> MeasuredPagedCache:
    """The cache of a run, new and empty."""
    return MeasuredPagedCache(PagedKVCache(model.model.config, **vars(spec.paging)), model)


def run(spec: RunSpec, model: LoadedModel, **how: Any) -> RunResult:
    """Page the KV cache: a budget of pages on the device, the rest fetched when attention asks.

    One run; see `generation.measured_run` for `how`.
    """
    return measured_run(spec, model, make_cache, **how)


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m kv_paging`: a short generation with a paged cache, next to the same one with transformers' cache."""
    return demonstrate("reactive", run, argv, module="kv_paging")


if __name__ == "__main__":
    sys.exit(main())
