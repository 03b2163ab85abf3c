"""Decoding: time per token with transformers' own caches and with ours, in turn, over the same context.

    python benchmarks/decode.py
    python benchmarks/decode.py --contexts 8000 --page-size 64
    python benchmarks/decode.py --model random:configs/models/llama-3.1-8b.json --contexts 32000 --link auto \\
        --attended-tokens 2048 --resident-tokens 4096

The ceiling is printed first: a step reads the weights and the keys and values it attends to once, so it takes at least
their bytes over the memory's bandwidth; and pages that are not on the device cross the link. Then the contestants:

    HF dynamic, HF static     transformers' caches; HF offloaded as well, on CUDA
    all resident              exact attention over pages, all of them on the device
    budget                    exact attention, half of the pages on the device: the others are fetched in every step
    selection                 a quarter of the pages attended to, all of them on the device
    selection, reactive       the same with three eighths of the pages on the device, fetched when asked for
    selection, predictive     the same, and copied ahead
    selection, device table   the same, found and fetched by the device; where no link is simulated

The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from contest import (
    benchmark_parser,
    console,
    in_turn,
    interval,
    loaded,
    memory_bandwidth_gb_s,
    publish,
    ratio_of,
    show,
    show_targets,
    summary,
    target,
    weight_bytes_per_token,
)
from contexts import Context, Decoder, hf_caches, paged, pages_of, read_context
from kv_paging import PagedKVCache
from links import choose_link
from metrics import percent
from models import LoadedModel

ATTENDED, RESIDENT = 0.25, 0.375  # shares of the pages, under selection
SPARE_PAGES = 2


def main() -> None:
    arguments = parser().parse_args()
    model = loaded(arguments)
    bandwidth = memory_bandwidth_gb_s(model.device)
    weights = weight_bytes_per_token(model.model)
    console.print(f"memory read at {bandwidth:.1f} GB/s; {weights / 1e6:.0f} MB of weights a token")
    cases = [case(model, arguments, n_tokens, bandwidth, weights) for n_tokens in arguments.contexts]
    targets = [goal for one in cases for goal in goals(one)]
    show_targets(targets)
    document = {"memory_gb_s": bandwidth, "weight_bytes_per_token": weights, "cases": cases, "targets": targets}
    publish("decode", arguments, document)


def parser() -> argparse.ArgumentParser:
    options = benchmark_parser("Time per decoded token: transformers' caches and ours, side by side.")
    options.add_argument("--contexts", type=int, nargs="+", default=[500, 2000, 8000], help="prompt lengths, in tokens")
    options.add_argument("--rounds", type=int, default=9, help="measurements of each contestant")
    options.add_argument("--tokens", type=int, default=6, help="tokens in one measurement")
    options.add_argument("--page-size", type=int, default=256, help="tokens in a page, for exact attention")
    options.add_argument("--selection-page-size", type=int, default=32, help="tokens in a page, under selection")
    options.add_argument("--selector", default="quest", help="which pages are attended to, under selection")
    options.add_argument("--predictor", default="ema", help="which pages are copied ahead")
    options.add_argument("--link", default="pcie4-x16", help="of the contestants with a budget; auto for the real one")
    options.add_argument("--attended-tokens", type=int, help="under selection, instead of a quarter of the context")
    options.add_argument("--resident-tokens", type=int, help="of selection with a budget, instead of three eighths")
    options.add_argument("--only", nargs="+", metavar="NAME", help="measure only these contestants, and HF dynamic")
    return options


def case(model: LoadedModel, arguments: argparse.Namespace, n_tokens: int, bandwidth: float, weights: int) -> dict:
    """All contestants at one length of context."""
    n_new = arguments.rounds * (arguments.tokens + 1)
    context = read_context(model, n_tokens, n_new + 1)
    ceiling = ceilings(arguments, context, bandwidth, weights)
    show(
        f"{n_tokens} tokens: {context.kv_bytes / 1e6:.0f} MB of keys and values; no step can be faster than",
        ("", "ms"),
        [(name, value) for name, value in ceiling.items() if value is not None],
    )
    decoders = {
        name: Decoder(model, context, context.poured_into(make()))
        for name, make in contestants(model, arguments, n_tokens, n_tokens + n_new + 1).items()
    }
    measured = in_turn(
        {name: lambda one=decoder: one.decode(arguments.tokens) for name, decoder in decoders.items()}, arguments.rounds
    )
    results = {name: figures(name, decoder, measured) for name, decoder in decoders.items()}
    show(
        f"{n_tokens} tokens, n = {arguments.rounds} rounds of {arguments.tokens} tokens",
        ("", "ms/token", "against HF dynamic", "same token", "KV on device MB", "transfers hidden %"),
        [
            (
                name,
                interval(one["ms_per_token"], "median"),
                interval(one["speedup"], "ratio"),
                f"{one['same_token']} of {one['n_tokens']}",
                None if one["device_kv_bytes"] is None else one["device_kv_bytes"] / 1e6,
                percent(one["decode"].get("hidden_transfer_share"), 1.0),
            )
            for name, one in results.items()
        ],
    )
    return {"context": n_tokens, "kv_bytes": context.kv_bytes, "ceiling_ms": ceiling, "contestants": results}


def contestants(
    model: LoadedModel, arguments: argparse.Namespace, n_tokens: int, n_positions: int
) -> dict[str, Callable[[], Any]]:
    """What makes each contestant's cache, by name."""
    whole, link = pages_of(n_positions, arguments.page_size), arguments.link
    n_small = pages_of(n_positions, arguments.selection_page_size)
    selection = {"page_size": arguments.selection_page_size, "selector": arguments.selector}
    if arguments.attended_tokens is None:
        selection["attention_fraction"] = ATTENDED
    else:
        selection["attention_pages"] = min(n_small, pages_of(arguments.attended_tokens, arguments.selection_page_size))
    n_resident = round(share(arguments.resident_tokens, n_tokens, RESIDENT) * n_small)
    budget = {"max_gpu_pages": max(4, n_resident), "staging_pages": max(4, n_resident // 3), "link": link}

    def ours(**settings: Any) -> Callable[[], PagedKVCache]:
        return lambda: paged(model, n_positions, **settings)

    made = hf_caches(model, n_positions) | {
        "all resident": ours(page_size=arguments.page_size, max_gpu_pages=max(3, whole), staging_pages=1),
        "selection": ours(**selection, max_gpu_pages=n_small + SPARE_PAGES, staging_pages=1),
        "selection, reactive": ours(**selection, **budget),
        "selection, predictive": ours(
            **selection, **budget, predictor=arguments.predictor, prefetch_k=budget["staging_pages"]
        ),
    }
    if choose_link(link, model.device.type).kind != "simulated":
        made["selection, device table"] = ours(**selection, **budget, page_table="device")
    if whole > 4:
        made["budget"] = ours(page_size=arguments.page_size, max_gpu_pages=half_of(whole), link=link)
    wanted = None if arguments.only is None else {"HF dynamic", *arguments.only}
    return {name: make for name, make in made.items() if wanted is None or name in wanted}


def share(n_tokens: int | None, of: int, otherwise: float) -> float:
    """A number of tokens as a share of a context; `otherwise` where none is given."""
    return otherwise if n_tokens is None else min(1.0, n_tokens / of)


def half_of(n_pages: int) -> int:
    """The budget of half the pages, as small as one may be."""
    return max(4, n_pages // 2)


def ceilings(arguments: argparse.Namespace, context: Context, bandwidth: float, weights: int) -> dict[str, float]:
    """The least a step can take, in ms: bytes that have to be read over the bandwidth of the memory, and bytes that
    have to move over the bandwidth of the link, where it is known."""
    link = choose_link(arguments.link, "cpu")
    whole = pages_of(context.n_tokens, arguments.page_size)
    moved = context.kv_bytes * max(0, whole - half_of(whole)) / whole
    attended = context.kv_bytes * share(arguments.attended_tokens, context.n_tokens, ATTENDED)
    return {
        "weights": weights / bandwidth / 1e6,
        "weights and all keys and values": (weights + context.kv_bytes) / bandwidth / 1e6,
        "weights and the selected keys and values": (weights + attended) / bandwidth / 1e6,
        "moving what exceeds the budget": moved / link.bandwidth_gb_s / 1e6 if link.bandwidth_gb_s else None,
    }


def figures(name: str, decoder: Decoder, measured: dict[str, list[float]]) -> dict[str, Any]:
    """One contestant's results."""
    same, n_tokens = decoder.agreement()
    ours = isinstance(decoder.cache, PagedKVCache)
    recorded = decoder.paging() if ours else {}
    return {
        "ms_per_token": summary(measured[name]),
        "speedup": ratio_of(measured["HF dynamic"], measured[name]),
        "against_all_resident": ratio_of(measured[name], measured["all resident"])
        if "all resident" in measured
        else None,
        "same_token": same,
        "n_tokens": n_tokens,
        "device_kv_bytes": decoder.cache.memory()["device_kv_bytes"] if ours else None,
        "decode": recorded,
        "measured_ms_per_token": measured[name],
    }


def goals(one: dict[str, Any]) -> list[dict[str, Any]]:
    """The targets that a case can be held to."""
    results, length = one["contestants"], one["context"]
    made = goals_on_cuda(results, length) if "HF offloaded" in results else []

    def speedup(name: str) -> float | None:
        return results[name]["speedup"]["ratio"] if name in results else None

    if length < 2000:
        return [*made, target(f"all resident at {length}: speed of HF dynamic", speedup("all resident"), at_least=0.98)]
    if length < 8000 or made:
        return made
    selection = results.get("selection")
    agreement = None if selection is None else selection["same_token"] / selection["n_tokens"]
    return [
        target(f"all resident at {length}: speed of HF dynamic", speedup("all resident"), at_least=1.3),
        target(f"selection at {length}: speed of HF dynamic", speedup("selection"), at_least=1.8),
        target(f"selection at {length}: same likeliest token", agreement, at_least=0.9),
    ]


def goals_on_cuda(results: dict[str, Any], length: int) -> list[dict[str, Any]]:
    """Those where pages really cross a bus: against the cache by which transformers pages, layer by layer, against
    having everything on the device, and how much of what the link does is hidden behind computing."""
    offloaded = results["HF offloaded"]["measured_ms_per_token"]
    made = []
    for name in ("budget", "selection, reactive", "selection, predictive", "selection, device table"):
        if name in results:
            against = ratio_of(offloaded, results[name]["measured_ms_per_token"])["ratio"]
            made.append(target(f"{name} at {length}: speed of HF offloaded", against, at_least=5.0))
        if name in results and name != "budget" and results[name]["against_all_resident"] is not None:
            against = results[name]["against_all_resident"]["ratio"]
            made.append(target(f"{name} at {length}: time of all resident", against, at_most=1.05))
    hidden = results.get("selection, predictive", {}).get("decode", {}).get("hidden_transfer_share")
    if hidden is not None:
        made.append(target(f"selection, predictive at {length}: transfers hidden", hidden, at_least=0.95))
    return made


if __name__ == "__main__":
    main()
