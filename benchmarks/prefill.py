"""Prefill: time to read a prompt with transformers' own cache and with ours, in turn.

    python benchmarks/prefill.py
    python benchmarks/prefill.py --contexts 8000 --chunk 512

Prefill is bound by arithmetic, so paging has to cost next to nothing: its ceiling is what transformers' own cache
takes, at the same chunk size. A chunk attends to all earlier pages, wherever they are, and pages that fill are written
to the host while it goes on. The contestants are

    HF dynamic        transformers' cache, the same chunks
    all resident      our pages, all of them on the device
    budget            a quarter of the pages on the device: earlier pages stream in for every chunk

The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from transformers import DynamicCache

from contest import (
    benchmark_parser,
    in_turn,
    interval,
    loaded,
    milliseconds,
    publish,
    ratio_of,
    show,
    summary,
)
from contexts import paged, pages_of
from kv_paging import PagedKVCache
from models import LoadedModel
from workloads import prompt_tokens


def main() -> None:
    arguments = parser().parse_args()
    model = loaded(arguments)
    cases = [case(model, arguments, n_tokens) for n_tokens in arguments.contexts]
    publish("prefill", arguments, {"cases": cases})


def parser() -> argparse.ArgumentParser:
    options = benchmark_parser("Time to read a prompt: transformers' cache and ours, side by side.")
    options.add_argument("--contexts", type=int, nargs="+", default=[500, 2000], help="prompt lengths, in tokens")
    options.add_argument("--chunk", type=int, default=512, help="prompt tokens in a forward pass")
    options.add_argument("--rounds", type=int, default=5, help="measurements of each contestant")
    options.add_argument("--page-size", type=int, default=128, help="tokens in a page")
    options.add_argument("--link", default="pcie4-x16", help="of the contestant with a budget; auto for the real one")
    return options


def case(model: LoadedModel, arguments: argparse.Namespace, n_tokens: int) -> dict[str, Any]:
    """All contestants at one length of prompt."""
    prompt = prompt_tokens(model.tokenizer, model.shape.vocab_size, n_tokens, 1, seed=0)
    ids = torch.tensor(prompt, device=model.device)
    whole = pages_of(n_tokens, arguments.page_size)
    size, link = arguments.page_size, arguments.link
    made: dict[str, Callable[[], Any]] = {
        "HF dynamic": lambda: DynamicCache(config=model.model.config),
        "all resident": lambda: paged(model, n_tokens, page_size=size, max_gpu_pages=max(3, whole), staging_pages=1),
    }
    if whole > 8:
        made["budget"] = lambda: paged(model, n_tokens, page_size=size, max_gpu_pages=whole // 4, link=link)
    last: dict[str, torch.Tensor] = {}

    def read(name: str) -> float:
        cache = made[name]()  # its memory is allocated before the clock starts, as in a run
        ours = isinstance(cache, PagedKVCache)
        if ours:
            cache.prompt_tokens = n_tokens
        with cache.attached(model.model) if ours else nullcontext(), torch.inference_mode():

            def forward() -> None:
                for chunk in ids.split(arguments.chunk, dim=1):
                    last[name] = model.model(chunk, past_key_values=cache, logits_to_keep=1).logits[0, -1]

            return milliseconds(forward, model.device)

    for name in made:
        read(name)  # once unmeasured
    measured = in_turn({name: lambda name=name: read(name) for name in made}, arguments.rounds)
    results = {
        name: {
            "ms": summary(times),
            "speedup": ratio_of(measured["HF dynamic"], times),
            "largest_logit_difference": float((last[name] - last["HF dynamic"]).abs().max()),
            "measured_ms": times,
        }
        for name, times in measured.items()
    }
    show(
        f"{n_tokens} tokens in chunks of {arguments.chunk}, n = {arguments.rounds}",
        ("", "ms", "against HF dynamic", "largest difference of a logit"),
        [
            (
                name,
                interval(one["ms"], "median"),
                interval(one["speedup"], "ratio"),
                f"{one['largest_logit_difference']:.1g}",
            )
            for name, one in results.items()
        ],
    )
    return {"context": n_tokens, "contestants": results}


if __name__ == "__main__":
    main()
