"""What an approximation costs, step by step: the model reads one text with two caches; does it say the same?

Free-running generations part at the first token that differs, and nothing after it can be compared. So both caches are
*teacher-forced* (reading.py): they are given the same prompt and then the same text, token by token, and what is
compared is what the model would have said next at each of these steps. One is transformers' own dynamic cache, attended
to as the model always does; the other is the cache of the run.

Where a run reads only a part of its pages, it is compared with true attention too: a third pass over the same text, in
which every page is read, gives each page's true share of the attention. Of that, the run read so much (*attention mass
recall*), and of as many pages with the largest shares as it read, so many (*page recall@k*).

Means come with n and a 95 % confidence interval (intervals.py). Its resampling takes steps for independent, which steps
of one text are not quite: it says what other steps of such a text might have given, not what another text would.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from intervals import mean_with_interval, score_with_interval
from reading import PagesOfSteps, PagesRead, Reading
from workloads import TokenRows

ROUNDING_NATS = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 1e-2}
"""Of an exact run, the mean divergence that the order of additions explains, in nats. SmolLM2-135M measures 3e-8 in
float32 and 2e-3 in bfloat16, whose numbers are 2^16 times as coarse. In bfloat16 a selector that reads nine tenths of
the pages stays below the bound too, so that alone proves nothing there: see `rounding_explains`."""


def compare(run: Reading, baseline: Reading, text: TokenRows, n_forced: int) -> dict[str, float | int | None]:
    """How far what the run said is from what the baseline said.

    Returns:
        `n_tokens` compared, all rows together; `kl_mean` and `kl_max`, the Kullback-Leibler divergence of the run's
        next-token distribution from the baseline's, in nats, the mean between `kl_low` and `kl_high`;
        `top1_agreement`, the share of steps in which both find the same token likeliest, between `top1_low` and
        `top1_high`; `perplexity` and `baseline_perplexity` of the text, over `perplexity_tokens`.

    Raises:
        ValueError: what one of them said is no distribution, or the run rules out a token that the baseline does not.
    """
    divergences, same = [], []
    for base, other in zip(baseline.log_probs.flatten(0, 1), run.log_probs.flatten(0, 1), strict=True):
        divergences.append(_divergence(base.double(), other.double()))
        same.append(float(base.argmax() == other.argmax()))
    kl, top1 = mean_with_interval(divergences), score_with_interval(same)
    return {
        "n_tokens": kl["n"],
        "kl_mean": kl["mean"],
        "kl_low": kl["low"],
        "kl_high": kl["high"],
        "kl_max": max(divergences),
        "top1_agreement": top1["mean"],
        "top1_low": top1["low"],
        "top1_high": top1["high"],
        "perplexity": perplexity(surprise(run, text, n_forced)),
        "baseline_perplexity": perplexity(surprise(baseline, text, n_forced)),
        "perplexity_tokens": len(text) * (n_forced - 1),
    }


def rounding_explains(figures: Mapping[str, Any], dtype_name: str, quantized: bool) -> bool:
    """Whether a run that claims to be exact may be: it read every page that there was, and is as near to the baseline
    as the order of additions allows. Of quantised weights only the first is asked, as their kernels round whatever they
    are given to a few bits, and a last bit of difference can come out as one in the third digit.

    Args:
        figures: of `compare` and `attention_recall`.
    """
    read_all = figures["attended_pages"] == figures["pages"]  # both None of a cache without pages
    return read_all and (quantized or figures["kl_mean"] <= ROUNDING_NATS[dtype_name])


def _divergence(base: torch.Tensor, other: torch.Tensor) -> float:
    """Of log-probabilities [V] from others, in nats."""
    for who, said in (("baseline", base), ("run", other)):
        if said.isnan().any():
            raise ValueError(f"the {who}'s next-token distribution has NaN in it")
    terms = torch.where(base == -math.inf, 0.0, base.exp() * (base - other))  # 0 * log 0 is 0
    divergence = max(terms.sum().item(), 0.0)
    if math.isinf(divergence):
        raise ValueError("the run gives no probability at all to a token that the baseline thinks possible")
    return divergence


def surprise(reading: Reading, text: TokenRows, n_forced: int) -> list[float]:
    """The negative log-likelihood, in nats, of each of the tokens of a text that were fed after the first one.

    What is said at a step is about the token fed at the next one; of what follows the last, nothing is known."""
    if n_forced == 1:
        return []
    following = torch.tensor(text)[:, 1 - n_forced :]
    return (-reading.log_probs[:, :-1].gather(-1, following.unsqueeze(-1)).double()).flatten().tolist()


def perplexity(surprises: list[float]) -> float | None:
    """exp of the mean; None of nothing."""
    return math.exp(math.fsum(surprises) / len(surprises)) if surprises else None


def attention_recall(run: PagesOfSteps, truth: PagesOfSteps, by_head: bool = False) -> dict[str, float | None]:
    """How much of the true attention fell on the pages that the run read, means over steps, layers and rows.

    Args:
        run: of a cache that may leave pages out.
        truth: of the same text with a cache that reads every page, so that its shares are those of full attention.
        by_head: each key/value head read pages of its own, and is compared with its own attention; else all heads read
            the same, which is compared with the mean of their attention.

    Returns:
        `attention_mass_recall`, the share of the true attention on the pages read; `page_recall`, of as many pages with
        the largest true shares as were read, the share that was among them; `attended_pages` of `pages`, the means of
        how many were read (by each head) and there. None without pages.
    """
    mass: list[float] = []
    among_best: list[float] = []
    for read_step, true_step in zip(run, truth, strict=True):
        for read, true in zip(read_step, true_step, strict=True):
            for pages, shares in _by_reader(read, true, by_head):
                mass.append(sum(shares[page] for page in pages) / sum(shares.values()))
                best = sorted(shares, key=lambda page: -shares[page])[: len(pages)]
                among_best.append(len(pages & set(best)) / len(pages))
    figures = {"attention_mass_recall": mass, "page_recall": among_best}
    means = {name: math.fsum(values) / len(values) if values else None for name, values in figures.items()}
    return means | mean_pages(run)


def _by_reader(read: PagesRead, true: PagesRead, by_head: bool) -> list[tuple[set[int], dict[int, float]]]:
    """The pages read, and every page's true share; of each key/value head, or once for all."""
    shares = true.shares()
    if not by_head:
        return [(set(read.pages), dict(zip(true.pages, shares.mean(1).tolist(), strict=True)))]
    return [
        (
            {page for page, was in zip(read.pages, seen, strict=True) if was},
            dict(zip(true.pages, of_head, strict=True)),
        )
        for seen, of_head in zip(read.seen().T.tolist(), shares.T.tolist(), strict=True)
    ]


def mean_pages(pages: PagesOfSteps) -> dict[str, float | None]:
    """How many pages were read of how many, means over steps, layers and rows; None of a cache without pages."""
    read = [each for step in pages for each in step]
    if not read:
        return {"attended_pages": None, "pages": None}
    per_head = [each.seen().float().sum(0).mean().item() for each in read]
    return {
        "attended_pages": math.fsum(per_head) / len(read),
        "pages": math.fsum(each.n_there for each in read) / len(read),
    }
