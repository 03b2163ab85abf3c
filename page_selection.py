"""Selection: from the digests of all pages to the few that one decode step attends to.

A selector (see page_selectors.py) says how much each query head wants each page. Two things are left, and they are the
same for every selector: to keep the digests on the device (`PageDigests`), and to turn scores into pages
(`choose_pages`).

Heads that share pages must agree, and their scores are logits, which cannot be compared between heads: one head's
logits differ by 30 from page to page, another's by 1. What can be compared is attention. So each head's scores become
shares by softmax over the pages there are to choose from, shares are averaged over the heads that choose together, and
the largest win. With the oracle's scores the shares are true attention, and where no page is attended to always, no
other choice holds more of it; with a digest's they are an estimate.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch


class PageDigests:
    """The digests of the full pages of one layer's sequences, on the device.

    Rewriting a context needs no word to it: what is put for a page later replaces what was there.

    Args:
        n_rows: sequences.
        like: [m, K, ...], digests of any m pages: those to come have this shape, dtype and device.
    """

    def __init__(self, n_rows: int, like: torch.Tensor):
        self._digests = _zeros(n_rows, 0, like)

    @property
    def capacity(self) -> int:
        """Pages of each sequence that memory is allocated for."""
        return self._digests.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes allocated on the device."""
        return self._digests.nbytes

    def reserve(self, n_pages: int) -> None:
        """Allocate for `n_pages` of each sequence at once, so that nothing need grow later."""
        if n_pages > self.capacity:
            larger = _zeros(self._digests.shape[0], n_pages, self._digests[0])
            larger[:, : self.capacity] = self._digests
            self._digests = larger

    def put(self, row: int, first_page: int, digests: torch.Tensor) -> None:
        """Keep `[m, K, ...]` for the pages of a sequence from `first_page` on. Memory grows by doubling."""
        end = first_page + digests.shape[0]
        if end > self.capacity:
            self.reserve(max(end, 2 * self.capacity))
        self._digests[row, first_page:end] = digests.detach()

    def of(self, row: int, n: int) -> torch.Tensor:
        """The digests of a sequence's first `n` pages, `[n, K, ...]`: a view, not a copy."""
        return self._digests[row].narrow(0, 0, n)

    def select_rows(self, rows: Sequence[int]) -> None:
        """Make sequence i what sequence `rows[i]` was, as beam search asks; the number of sequences may change."""
        with torch.inference_mode(False):
            self._digests = self._digests[list(rows)]


def _zeros(n_rows: int, n_pages: int, like: torch.Tensor) -> torch.Tensor:
    """Memory for digests. Never an inference tensor, which a caller outside inference mode could not write to."""
    with torch.inference_mode(False):
        return torch.zeros((n_rows, n_pages, *like.shape[1:]), dtype=like.dtype, device=like.device)


UNRANKED = -1  # stands for every page where one has a score that cannot be ranked
UNRANKABLE = "a page's score is NaN or +inf: the keys or the query are, or the selector overflowed"


@dataclass(frozen=True)
class Choice:
    """The pages that one sequence attends to in one layer of one decode step.

    Attributes:
        pages: those always attended in ascending order, then the chosen ones, best first; each once.
        heads: bool [n_pages, K], which key/value head attends to which page of the context; None where all heads attend
            to all of `pages`.
    """

    pages: list[int]
    heads: torch.Tensor | None


def choose_pages(
    scores: torch.Tensor,
    n_pages: int,
    always: Collection[int],
    n_attended: int,
    per_kv_head: bool,
) -> Choice:
    """The pages to attend to: those always attended, and those with the largest shares of the others.

    Where shares are equal the earlier page goes first. A score of -inf is a share of nothing, and a head whose scores
    are all -inf has no say; such pages are chosen when there are no others. On CUDA the host waits once, for one small
    copy, and not at all where there is nothing to choose.

    Args:
        scores: [n, K, G] of the n full pages, as from `Selector.score`.
        n_pages: pages of the context; n, or n + 1 with the open page.
        always: pages attended to whatever their score, the open page among them; all below `n_pages`.
        n_attended: how many pages to attend to, those in `always` included; at most all there are.
        per_kv_head: each key/value head chooses its own pages, that many of them; `pages` is what any of them chose,
            the largest share that it has in any head first. Otherwise all heads choose together.

    Raises:
        ValueError: a page to choose from has a score of NaN or +inf, which ranks nowhere; the open page is not in
            `always`; or `n_attended` is less than `always`.
    """
    n_scored, n_kv_heads, _ = scores.shape
    if not set(range(n_scored, n_pages)) <= set(always):
        raise ValueError(f"only {n_scored} of {n_pages} pages have scores, and the others are not always attended to")
    if n_attended < len(always):
        raise ValueError(f"{len(always)} pages are always attended to, which is more than {n_attended}")
    runs = _runs_without(always, n_scored)
    n_candidates = sum(run.stop - run.start for run in runs)
    n_chosen = min(n_attended - len(always), n_candidates)
    if n_chosen == 0:
        return Choice(sorted(always), None)

    wanted = scores[runs[0]] if len(runs) == 1 else torch.cat([scores[run] for run in runs])
    shares, top, ranked = _largest(wanted, per_kv_head, n_chosen)
    candidates = _Candidates(runs)
    if not per_kv_head:
        return Choice(sorted(always) + candidates.pages(torch.where(ranked, top[:, 0], UNRANKED).tolist()), None)

    chosen = torch.zeros_like(shares, dtype=torch.bool).scatter_(0, top, True)
    by_any = chosen.any(1)
    best = shares.amax(1).masked_fill(~by_any, -1.0)  # what no head chose goes behind all that one did
    order = best.sort(descending=True, stable=True).indices[: top.numel()]
    *places, count = torch.where(ranked, torch.cat([order, by_any.sum().unsqueeze(0)]), UNRANKED).tolist()
    pages = sorted(always) + candidates.pages(places[:count] if places[0] != UNRANKED else places)
    if count == n_chosen:
        return Choice(pages, None)
    heads = torch.ones((n_pages, n_kv_heads), dtype=torch.bool, device=scores.device)
    start = 0
    for run in runs:
        length = run.stop - run.start
        heads[run] = chosen[start : start + length]
        start += length
    return Choice(pages, heads)


def choose_on_device(scores: torch.Tensor, first: int, end: int, n_chosen: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What `choose_pages` chooses where all heads choose together, and the host waits for nothing.

    Args:
        scores: [n, K, G] of the full pages.
        first, end: of the pages there are to choose from.
        n_chosen: how many to choose, at least 1.

    Returns:
        Page ids [n_chosen], best first; and whether the scores could be ranked, bool []: if not, see `UNRANKABLE`.
    """
    _, top, ranked = _largest(scores[first:end], False, n_chosen)
    return top[:, 0] + first, ranked


def page_shares(scores: torch.Tensor) -> torch.Tensor:
    """Each page's estimated share of the attention, averaged over all heads: [n, K, G] -> [n], of sum 1."""
    return scores.float().softmax(0).nan_to_num(nan=0.0).mean((1, 2))


@dataclass(frozen=True)
class _Candidates:
    """The pages there are to choose from, in the stretches in which they lie."""

    runs: list[slice]

    def pages(self, places: list[int]) -> list[int]:
        """Page numbers of places among them.

        Raises:
            ValueError: the places are UNRANKED.
        """
        if places[0] == UNRANKED:
            raise ValueError(UNRANKABLE)
        if len(self.runs) == 1:
            first = self.runs[0].start
            return [first + place for place in places]
        pages = [page for run in self.runs for page in range(run.start, run.stop)]
        return [pages[place] for place in places]


def _largest(scores: torch.Tensor, per_kv_head: bool, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Shares as from `_shares`; the places of the `n` largest in each column, best first; and whether the scores could
    be ranked, bool []."""
    shares = _shares(scores, per_kv_head)
    top = shares.sort(dim=0, descending=True, stable=True).indices[:n]  # topk leaves the order of ties open
    return shares, top, scores.amax() < math.inf  # not so if any is NaN, either


def _shares(scores: torch.Tensor, per_kv_head: bool) -> torch.Tensor:
    """Each page's share, summed over query heads: [n, K, G] -> [n, K], or [n, 1] over all heads.

    A sum ranks as a mean does. In float64, because shares far below what float32 can hold must still be ranked.
    """
    by_head = scores.permute(1, 2, 0).softmax(-1, dtype=torch.float64).nan_to_num(0.0)  # NaN: all -inf
    return by_head.sum(1).T if per_kv_head else by_head.sum((0, 1)).unsqueeze(1)


def _runs_without(pages: Collection[int], n: int) -> list[slice]:
    """The stretches of 0..n-1 between `pages`. As slices, for an index would have to be sent to the device."""
    edges = [-1, *sorted(page for page in pages if page < n), n]
    return [slice(left + 1, right) for left, right in itertools.pairwise(edges) if right > left + 1]
