"""What an approximation costs, step by step: the model reads one text with two caches; does it say the same?

Free-running generations part at the first token that differs, and nothing after it can be compared. So both caches are
*teacher-forced*: they are given the same prompt and then the same text, token by token, and what is compared is what
the model would have said next at each of these steps. One is transformers' own dynamic cache, attended to as the model
always does; the other is the cache of the run.

Where a run reads only a part of its pages, it is compared with true attention too: a third pass over the same text, in
which every page is resident and read, gives each page's true share of the attention. Of that, the run read so much
(*attention mass recall*), and of as many pages with the largest shares as it read, so many (*page recall@k*).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from generation import MeasuredCache
from models import LoadedModel
from workloads import TokenRows

PageShares = list[dict[int, float]]  # of each layer's attention to each sequence, in the order of attending


@dataclass(frozen=True)
class Reading:
    """What a model said while it read a text.

    Attributes:
        log_probs: [B, n, V], of the next token at each step but the first, which prefill has made; float32 on the CPU.
        attention: of each step, the pages read with their shares, if the cache has pages.
    """

    log_probs: torch.Tensor
    attention: list[PageShares]


def read_text(model: LoadedModel, cache: MeasuredCache, text: TokenRows, n_forced: int, chunk: int | None) -> Reading:
    """Prefill all but the last `n_forced` tokens of each row of a text, and feed those one by one.

    Args:
        text: token rows of one length.
        n_forced: tokens fed in decode steps, at least 1 and fewer than the text has.
        chunk: prompt tokens per forward pass; None for all.
    """
    device = model.model.get_input_embeddings().weight.device
    ids = torch.tensor(text, device=device)
    n_prompt = ids.shape[1] - n_forced
    past = cache.start(len(text), n_prompt, n_forced)
    logits: list[torch.Tensor] = []
    attended: list[list[tuple[list[int], Callable[[], list[float]]]]] = []
    with cache.attached(model.model), _watching(past) as seen, torch.inference_mode():
        for start in range(0, n_prompt, chunk or n_prompt):
            part = ids[:, start : min(start + (chunk or n_prompt), n_prompt)]
            model.model(part, past_key_values=past, use_cache=True, logits_to_keep=1)
        for place in range(n_prompt, ids.shape[1]):
            seen.clear()
            logits.append(model.model(ids[:, place : place + 1], past_key_values=past, use_cache=True).logits[:, -1])
            attended.append(list(seen))
    # Only now, for a cache that skips pages that are not there must not be given time for them to arrive.
    log_probs = torch.stack([step.float().log_softmax(-1).cpu() for step in logits], dim=1)
    shares = [[dict(zip(pages, mass(), strict=True)) for pages, mass in step] for step in attended]
    return Reading(log_probs, shares)


@contextmanager
def _watching(cache: Any) -> Iterator[list[tuple[list[int], Callable[[], list[float]]]]]:
    """The pages that each layer of a paged cache attends to, and their shares; nothing for another cache."""
    seen: list[tuple[list[int], Callable[[], list[float]]]] = []
    attended = getattr(cache, "attended", None)
    if attended is None:
        yield seen
        return

    def watched(layer: Any, sequence: Any, attention: Any) -> None:
        seen.append((attention.pages, attention.mass))
        attended(layer, sequence, attention)

    cache.attended = watched
    try:
        yield seen
    finally:
        del cache.attended


def compare(run: Reading, baseline: Reading, text: TokenRows, n_forced: int) -> dict[str, float | int | None]:
    """How far what the run said is from what the baseline said.

    Returns:
        `n_tokens` compared, all rows together; `kl_mean` and `kl_max`, the Kullback-Leibler divergence of the run's
        next-token distribution from the baseline's, in nats; `top1_agreement`, the share of steps in which both find
        the same token likeliest; `perplexity` of the text for both.

    Raises:
        ValueError: what one of them said is no distribution, or the run rules out a token that the baseline does not.
    """
    base, other = baseline.log_probs.double(), run.log_probs.double()
    for who, said in (("baseline", base), ("run", other)):
        if said.isnan().any():
            raise ValueError(f"the {who}'s next-token distribution has NaN in it")
    terms = torch.where(base == -math.inf, 0.0, base.exp() * (base - other))  # 0 * log 0 is 0
    divergence = terms.sum(-1).clamp(min=0.0)
    if not divergence.isfinite().all():
        raise ValueError("the run gives no probability at all to a token that the baseline thinks possible")
    same = base.argmax(-1) == other.argmax(-1)
    # What is said at a step is about the token fed at the next one; of what follows the last, nothing is known.
    following = torch.tensor(text)[:, -n_forced + 1 :] if n_forced > 1 else None
    return {
        "n_tokens": divergence.numel(),
        "kl_mean": divergence.mean().item(),
        "kl_max": divergence.max().item(),
        "top1_agreement": same.double().mean().item(),
        "perplexity": _perplexity(other, following),
        "baseline_perplexity": _perplexity(base, following),
    }


def _perplexity(log_probs: torch.Tensor, following: torch.Tensor | None) -> float | None:
    if following is None:
        return None
    of_tokens = log_probs[:, :-1].gather(-1, following.unsqueeze(-1))
    return math.exp(-of_tokens.mean().item())


def attention_recall(run: Reading, truth: Reading) -> dict[str, float | None]:
    """How much of the true attention fell on the pages that the run read, means over steps, layers and rows.

    Args:
        run: of a cache that may leave pages out.
        truth: of the same text with a cache that reads every page, so that its shares are those of full attention.

    Returns:
        `attention_mass_recall`, the share of the true attention on the pages read; `page_recall`, of as many pages with
        the largest true shares as were read, the share that was among them. None without pages.
    """
    mass: list[float] = []
    pages: list[float] = []
    for read_step, true_step in zip(run.attention, truth.attention, strict=True):
        for read, true in zip(read_step, true_step, strict=True):
            mass.append(sum(true[page] for page in read) / sum(true.values()))
            best = sorted(true, key=lambda page: -true[page])[: len(read)]
            pages.append(len(read.keys() & best) / len(read))
    if not mass:
        return {"attention_mass_recall": None, "page_recall": None}
    return {"attention_mass_recall": math.fsum(mass) / len(mass), "page_recall": math.fsum(pages) / len(pages)}
