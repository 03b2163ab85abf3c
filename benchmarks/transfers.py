"""Exact streaming against its floor: how near a step that has to move pages comes to what the link and computing allow.

    python benchmarks/transfers.py
    python benchmarks/transfers.py --links auto --model random:configs/models/llama-3.1-8b.json --context 32000

Under exact attention every step needs every page, so what does not fit has to move in every step. Two things bound it:

    the link       the bytes that must move over its bandwidth, whatever is computed meanwhile
    computing      the same step with all pages on the device

The larger of the two is the floor. On a CPU there is a third, as host and device are the same memory and the same
cores: a copy takes bandwidth from computing and a core with it, which no bus does. That is measured as well, as steps
with all pages resident while a worker copies as many bytes, other ones for each layer, that nobody waits for. For each
link the contestants are

    reactive       a layer's missing pages are fetched when it asks
    predictive     a later layer's missing pages are copied while this one computes; several layers ahead, as the output
                   layer comes before the next step's first one, and a link would run dry in it

First the copies alone are measured: what bandwidth a transfer of pages reaches, by how many pages it has.
The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

from contest import (
    benchmark_parser,
    finished,
    in_turn,
    interval,
    loaded,
    publish,
    ratio_of,
    show,
    show_targets,
    summary,
    target,
)
from contexts import Context, Decoder, paged, pages_of, read_context
from links import choose_link
from models import LoadedModel
from page_store import PageStore, transport_for

COPY_SIZES = (1, 4, 16)  # pages of a transfer
COPY_ROUNDS = 15


def main() -> None:
    arguments = parser().parse_args()
    model = loaded(arguments)
    copies = copying_alone(model, arguments)
    show("Copies to the device, alone", ("pages", "MB", "GB/s"), [tuple(row.values())[:3] for row in copies])
    n_new = arguments.rounds * (arguments.tokens + 1) + 1
    context = read_context(model, arguments.context, n_new)
    cases = [case(model, arguments, context, link, copies) for link in arguments.links]
    targets = [goal for one in cases for goal in one.pop("targets")]
    show_targets(targets)
    publish("transfers", arguments, {"copies": copies, "cases": cases, "targets": targets})


def parser() -> argparse.ArgumentParser:
    options = benchmark_parser("Exact streaming against its floor, on each link.")
    options.add_argument("--context", type=int, default=4000, help="prompt length, in tokens")
    options.add_argument(
        "--links",
        nargs="+",
        default=["pcie5-x16", "pcie4-x16", "pcie3-x16", "0.5"],
        help="names, GB/s of simulated links, or auto for the device's own",
    )
    options.add_argument("--page-size", type=int, default=256, help="tokens in a page")
    options.add_argument("--resident", type=float, default=0.75, help="share of the pages on the device")
    options.add_argument("--lookahead", type=int, default=4, help="layers ahead that predictive streaming copies")
    options.add_argument("--policy", default="lru", help="which page to evict; exact attention hits as often under any")
    options.add_argument("--rounds", type=int, default=7, help="measurements of each contestant")
    options.add_argument("--tokens", type=int, default=4, help="tokens in one measurement")
    return options


def named_link(name: str) -> Any:
    """A link as settings name it; a number is its bandwidth in GB/s."""
    try:
        return {"bandwidth_gb_s": float(name), "latency_us": 10.0}
    except ValueError:
        return name


def copying_alone(model: LoadedModel, arguments: argparse.Namespace) -> list[dict[str, float]]:
    """What bandwidth transfers of pages reach when nothing else happens, on the device's own link (or memory)."""
    device, shape = model.device, model.shape
    transport = transport_for(device, choose_link("auto", device.type))
    page = (arguments.page_size, 2, shape.n_kv_heads, shape.head_dim)
    store = PageStore(max(COPY_SIZES), page, model.model.dtype, device, transport)
    rows = [store.host.take() for _ in range(max(COPY_SIZES))]
    measured = []
    for n_pages in COPY_SIZES:
        seconds = []
        for _ in range(COPY_ROUNDS):
            started = time.perf_counter()
            store.fetch(list(zip(range(n_pages), rows[:n_pages], strict=True))).wait()
            finished(device)
            seconds.append(time.perf_counter() - started)
        n_bytes = n_pages * store.page_bytes
        milliseconds = summary([1000.0 * one for one in seconds])
        gb_s = n_bytes / milliseconds["median"] / 1e6
        measured.append({"pages": n_pages, "megabytes": n_bytes / 1e6, "gb_s": gb_s, "milliseconds": milliseconds})
    return measured


class CopyingBeside:
    """A decoder with all pages resident, beside whose steps as many bytes are copied as streaming has to move."""

    def __init__(self, decoder: Decoder, bytes_per_step: int):
        self.decoder = decoder
        device = decoder.model.device
        self.transport = transport_for(device, choose_link("auto", device.type))
        layers = decoder.cache.paged_layers
        n_bytes = bytes_per_step // len(layers)
        # Each layer has bytes of its own, as its pages are: what was copied just before is still in a CPU's caches.
        sources = torch.ones((len(layers), n_bytes), dtype=torch.uint8, pin_memory=device.type == "cuda")
        targets = torch.zeros((len(layers), n_bytes), dtype=torch.uint8, device=device)
        self.moves = dict(zip((layer.layer_idx for layer in layers), zip(targets, sources, strict=True), strict=True))

    def decode(self, n_tokens: int) -> float:
        def copy(module: Any, *_: Any) -> None:
            self.transport.copy([self.moves[module.layer_idx]], to_device=True)

        modules = {getattr(module, "layer_idx", None): module for module in self.decoder.model.model.modules()}
        hooks = [modules[layer].register_forward_pre_hook(copy) for layer in self.moves]
        try:
            taken = self.decoder.decode(n_tokens)
        finally:
            for hook in hooks:
                hook.remove()
            self.transport.busy_ms()  # what is still to be copied is not the next contestant's to bear
        return taken


def case(
    model: LoadedModel, arguments: argparse.Namespace, context: Context, name: str, copies: list[dict[str, Any]]
) -> dict[str, Any]:
    """Streaming over one link; `copies` say what the device's own reaches."""
    size, link = arguments.page_size, named_link(name)
    n_positions = context.n_tokens + len(context.continuation)
    whole = pages_of(n_positions, size)
    budget = max(4, round(arguments.resident * whole))
    staging = max(4, 2 * (whole - budget))
    settings = {"page_size": size, "max_gpu_pages": budget, "staging_pages": staging, "link": link}
    settings["policy"] = arguments.policy
    ahead = {"lookahead": arguments.lookahead, "prefetch_k": staging, "prefetch_evicts": False}
    made = {
        "all resident": paged(model, n_positions, page_size=size, max_gpu_pages=whole, staging_pages=1),
        "reactive": paged(model, n_positions, **settings),
        "predictive": paged(model, n_positions, "layer_ahead", **settings, **ahead),
    }
    decoders = {one: Decoder(model, context, context.poured_into(cache)) for one, cache in made.items()}
    bandwidth = choose_link(link, model.device.type).bandwidth_gb_s
    page_bytes = decoders["reactive"].cache.page_bytes
    moved = (whole - budget) * page_bytes * len(decoders["reactive"].cache.paged_layers)
    runs = {one: lambda decoder=decoder: decoder.decode(arguments.tokens) for one, decoder in decoders.items()}
    if model.device.type == "cpu":
        beside = paged(model, n_positions, page_size=size, max_gpu_pages=whole, staging_pages=1)
        copying = CopyingBeside(Decoder(model, context, context.poured_into(beside)), moved)
        runs["all resident, copying beside"] = lambda: copying.decode(arguments.tokens)
    measured = in_turn(runs, arguments.rounds)
    results = {one: summary(times) for one, times in measured.items()}
    for one in ("reactive", "predictive"):
        counted = decoders[one].paging()
        bytes_moved = counted["h2d_pages"] * page_bytes / counted["steps"]
        must_move = counted["must_move"] * page_bytes / counted["steps"]
        link_gb_s = bandwidth or max(row["gb_s"] for row in copies)
        link_ms = must_move / link_gb_s / 1e6
        floors = [max(link_ms, time_of_all) for time_of_all in measured["all resident"]]
        on_cpu = measured.get("all resident, copying beside")
        results[one] |= {
            "bytes_per_token": bytes_moved,
            "must_move_bytes_per_token": must_move,
            "link_gb_s": link_gb_s,
            "link_ms": link_ms,
            "stall_ms_per_token": counted["stall_ms"] / counted["steps"],
            "hidden_transfer_share": counted["hidden_transfer_share"],
            "over_floor": ratio_of(measured[one], floors),
            "over_shared_memory_floor": None
            if on_cpu is None
            else ratio_of(measured[one], [max(link_ms, copying_ms) for copying_ms in on_cpu]),
        }
    show(
        f"{name}: {moved / 1e6:.0f} MB of {context.kv_bytes / 1e6:.0f} move per token; n = {arguments.rounds}",
        ("", "ms/token", "link ms", "stall ms", "over floor", "over that of shared memory"),
        [
            (
                one,
                interval(figures, "median"),
                figures.get("link_ms"),
                figures.get("stall_ms_per_token"),
                interval(figures["over_floor"], "ratio") if "over_floor" in figures else None,
                interval(figures["over_shared_memory_floor"], "ratio")
                if figures.get("over_shared_memory_floor")
                else None,
            )
            for one, figures in results.items()
        ],
    )
    best = results["predictive"]
    against = best["over_shared_memory_floor"] or best["over_floor"]
    what = "floor of shared memory" if best["over_shared_memory_floor"] else "floor"
    goals = [target(f"{name}: predictive exact streaming, times its {what}", against["ratio"], at_most=1.10)]
    return {"link": name, "moved_bytes": moved, "contestants": results, "measured_ms": measured, "targets": goals}


if __name__ == "__main__":
    main()
