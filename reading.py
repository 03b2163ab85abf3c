"""A model reads a text with some cache: the first part at once and exactly, the rest token by token, as it decodes.

What a cache leaves out shows in decode steps alone, for prefill reads every page. So whatever is to be put to the test
is fed in decode steps: a text that goes on from a prompt (`read_text`), or the question at the end of a long prompt
(`answer`), which is then answered greedily. Nothing is timed here.

Of a cache with pages it is seen which pages each layer attended to, and with what share of its attention.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from generation import MeasuredCache
from models import LoadedModel
from workloads import TokenRows

Step = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class PagesRead:
    """What one layer's attention to one sequence read in one decode step.

    Attributes:
        pages: n of them.
        lse: [n, K, G] log-sum-exps of the scores; minus infinity where a key/value head did not read the page.
        total: [1, K, G] log-sum-exps over all that was read.
        n_there: pages that the sequence had.
    """

    pages: list[int]
    lse: torch.Tensor
    total: torch.Tensor
    n_there: int

    def on_host(self) -> PagesRead:
        """The same, out of the device's memory."""
        return replace(self, lse=self.lse.cpu(), total=self.total.cpu())

    def shares(self) -> torch.Tensor:
        """[n, K], each page's share of the attention of each key/value head, averaged over its queries; 0 of a page
        that the head did not read."""
        return torch.exp(self.lse - self.total).nan_to_num(0.0).mean(2)

    def seen(self) -> torch.Tensor:
        """[n, K], whether a key/value head read the page."""
        return self.lse.amax(2) > float("-inf")


PagesOfSteps = list[list[PagesRead]]
"""Of every decode step, what each layer read of each sequence, in the order of attending."""


@dataclass(frozen=True)
class Reading:
    """What a model said while it read a text.

    Attributes:
        log_probs: [B, n, V], of the next token at each step but the first, which prefill has made; float32 on the CPU.
        pages: what was read; nothing in the steps of a cache without pages.
    """

    log_probs: torch.Tensor
    pages: PagesOfSteps


@dataclass(frozen=True)
class Answer:
    """What a model said at the end of a prompt, greedily, and what was read meanwhile."""

    tokens: list[int]
    pages: PagesOfSteps


def read_text(model: LoadedModel, cache: MeasuredCache, text: TokenRows, n_forced: int, chunk: int | None) -> Reading:
    """Prefill all but the last `n_forced` tokens of each row of a text, and feed those one by one.

    Args:
        text: token rows of one length.
        n_forced: tokens fed in decode steps, at least 1 and fewer than the text has.
        chunk: prompt tokens per forward pass; None for all.
    """
    ids = _on_device(model, text)
    n_prompt = ids.shape[1] - n_forced
    with _prefilled(model, cache, ids[:, :n_prompt], n_forced, chunk) as (step, pages):
        logits = [step(ids[:, place : place + 1]) for place in range(n_prompt, ids.shape[1])]
        # Only now, for a cache that skips pages that are not there must not be given time for them to arrive.
        log_probs = torch.stack([each.float().log_softmax(-1).cpu() for each in logits], dim=1)
        return Reading(log_probs, [[read.on_host() for read in step] for step in pages])


def answer(
    model: LoadedModel,
    cache: MeasuredCache,
    prompt: list[int],
    n_question: int,
    n_new: int,
    stop: Collection[int],
    chunk: int | None,
) -> Answer:
    """Prefill a prompt without its last `n_question` tokens, feed those one by one, and go on greedily.

    Args:
        n_question: at least 1 and fewer than the prompt has.
        n_new: most tokens to say.
        stop: tokens that end an answer, and are not part of it.
        chunk: as in `read_text`.
    """
    ids, said = _on_device(model, [prompt]), []
    n_context = len(prompt) - n_question
    with _prefilled(model, cache, ids[:, :n_context], n_question + n_new, chunk) as (step, pages):
        for place in range(n_context, len(prompt)):
            logits = step(ids[:, place : place + 1])
        while len(said) < n_new:
            token = logits.argmax(-1, keepdim=True)
            if (word := token.item()) in stop:
                break
            said.append(word)
            if len(said) < n_new:
                logits = step(token)
    return Answer(said, pages)


def _on_device(model: LoadedModel, rows: TokenRows) -> torch.Tensor:
    return torch.tensor(rows, device=model.model.get_input_embeddings().weight.device)


@contextmanager
def _prefilled(
    model: LoadedModel, cache: MeasuredCache, ids: torch.Tensor, n_more: int, chunk: int | None
) -> Iterator[tuple[Step, PagesOfSteps]]:
    """A cache that has read `ids`, as what feeds one more column of tokens `[B, 1]` and gives logits `[B, V]`, and the
    pages that its steps have read so far."""
    n_prompt = ids.shape[1]
    past = cache.start(ids.shape[0], n_prompt, n_more)
    pages: PagesOfSteps = []

    def forward(part: torch.Tensor) -> torch.Tensor:
        return model.model(part, past_key_values=past, use_cache=True, logits_to_keep=1).logits[:, -1]

    def step(column: torch.Tensor) -> torch.Tensor:
        pages.append([])
        return forward(column)

    with cache.attached(model.model), torch.inference_mode():
        for start in range(0, n_prompt, chunk or n_prompt):
            forward(ids[:, start : start + (chunk or n_prompt)])
        with _watched(past, pages):
            yield step, pages


@contextmanager
def _watched(cache: Any, pages: PagesOfSteps) -> Iterator[None]:
    """Note what each layer of a paged cache reads, under the last of the steps; nothing of another cache."""
    attended = getattr(cache, "attended", None)
    if attended is None:
        yield
        return

    def noted(layer: Any, sequence: Any, attention: Any) -> None:
        lse = torch.cat([part for _, part in attention.parts])
        pages[-1].append(PagesRead(attention.pages, lse, attention.total, sequence.n_pages))
        attended(layer, sequence, attention)

    learns = cache.watches_attention
    cache.attended, cache.watches_attention = noted, True
    try:
        yield
    finally:
        del cache.attended
        cache.watches_attention = learns
