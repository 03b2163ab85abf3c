"""Selectors: which pages of the context a decode step attends to, judged by a digest of each page.

Attention is sparse: most of its mass falls on few pages, and on other pages in the next step. Which ones cannot be
known without the keys, and the keys are what does not fit. So of each page a small *digest* of its keys stays on the
device, and the query is held against the digests. A selector is these two verbs:

    digest(keys) -> digests           what stays of each page, made once, when the page is full
    score(query, digests) -> scores   how much each query head wants each page, asked in every decode step

`all` attends to every page, so its output is exact attention; any other is an approximation. Prefill always reads every
page. How scores become pages is the same for all of them: see page_selection.py.

Shapes: n full pages, K key/value heads, G query heads of each, P positions of a page, D head size.

A selector of your own derives from `Selector`. This module is read to check configs, so it does without torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


class Selector(Protocol):
    """The verbs of a selector; one instance serves one layer."""

    def digest(self, keys: torch.Tensor) -> torch.Tensor:
        """What stays on the device of each page.

        Args:
            keys: [n, K, P, D] of n full pages, with their positions in them (after RoPE).

        Returns:
            [n, K, ...] in the keys' dtype; it may share their memory.
        """
        raise NotImplementedError

    def score(self, query: torch.Tensor, digests: torch.Tensor) -> torch.Tensor:
        """How much attention each page would get, on the scale of logits: its largest one or their log-sum-exp.

        Args:
            query: [K, G, D] of one sequence in one layer, multiplied by the attention scale.
            digests: [n, K, ...].

        Returns:
            [n, K, G] float32, higher is more wanted; -inf is allowed.
        """
        raise NotImplementedError


def _dot(query: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """[K, G, D] with a vector of each page, [n, K, D] -> [n, K, G] float32."""
    # In float32: bfloat16 has 8 bits, which leaves logits of 40 in steps of a quarter.
    return (query.float() @ vectors.float().permute(1, 2, 0)).permute(2, 0, 1)


@dataclass(frozen=True)
class All(Selector):
    """Every page: exact attention. It needs no digests and scores nothing, so neither verb is called."""


@dataclass(frozen=True)
class Quest(Selector):
    """Quest's bound: the largest logit that any key between a page's smallest and largest could give.

    The digest is the minimum and the maximum of the keys in each channel, a box around them, [n, K, 2, D]. No key in
    the box gives more than sum_d max(q_d min_d, q_d max_d), so no page is thought less of than it deserves. Large pages
    have large boxes, and the bound is loose. Tang et al. 2024, https://arxiv.org/abs/2406.10774 (there with pages of
    16, and two dense layers).
    """

    def digest(self, keys: torch.Tensor) -> torch.Tensor:
        return _box(keys.amin(2), keys.amax(2))

    def score(self, query: torch.Tensor, digests: torch.Tensor) -> torch.Tensor:
        return _best_in_box(query, digests)


@dataclass(frozen=True)
class Cuboid(Selector):
    """ArkVale's cuboid-mean: as quest, with the box drawn in to the keys' mean distance from its middle.

    In each channel the digest is the middle of the smallest and the largest key, less and plus the mean distance of the
    keys from it, [n, K, 2, D]. What one outlier stretches counts for less, so the score is no bound but nearer to the
    page's largest logit. Chen et al. 2024, https://openreview.net/forum?id=4oAt5L4lYe, whose published code this
    follows; the best of the seven digests compared there.
    """

    def digest(self, keys: torch.Tensor) -> torch.Tensor:
        exact = keys.float()
        middle = (exact.amin(2) + exact.amax(2)) / 2
        radius = (exact - middle.unsqueeze(2)).abs().mean(2)
        return _box(middle - radius, middle + radius).to(keys.dtype)

    def score(self, query: torch.Tensor, digests: torch.Tensor) -> torch.Tensor:
        return _best_in_box(query, digests)


def _box(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Two corners [n, K, D] as a digest [n, K, 2, D]."""
    import torch

    return torch.stack([low, high], dim=2)


def _best_in_box(query: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """The largest dot product in each box: a channel asks for the corner of its own sign. Both corners are one vector
    of twice the length, so that it is one product."""
    import torch

    return _dot(torch.cat([query.clamp(max=0), query.clamp(min=0)], dim=-1), boxes.flatten(2))


@dataclass(frozen=True)
class MeanKey(Selector):
    """The mean of the keys: the page's mean logit, blind to a single key that stands out.

    The plainest digest, [n, K, D]: the centroid that ArkVale compares with, and the gate of MoBA (Lu et al. 2025,
    https://arxiv.org/abs/2502.13189), whose models are trained with it; here the model is not. (InfLLM, Xiao et al.
    2024, https://arxiv.org/abs/2402.04617, keeps a few representative keys of each block rather than their mean.)
    """

    def digest(self, keys: torch.Tensor) -> torch.Tensor:
        return keys.float().mean(2).to(keys.dtype)

    def score(self, query: torch.Tensor, digests: torch.Tensor) -> torch.Tensor:
        return _dot(query, digests)


@dataclass(frozen=True)
class Window(Selector):
    """Sinks and the most recent pages, whatever the query asks: StreamingLLM's pattern, the one to beat.

    The score is the page's number; the sinks are attended because they are always resident (`sink_pages`). The digest
    is empty, [n, K, 0]. Xiao et al. 2023, https://arxiv.org/abs/2309.17453; unlike there, keys keep their positions in
    the whole context.
    """

    def digest(self, keys: torch.Tensor) -> torch.Tensor:
        return keys[:, :, 0, :0]

    def score(self, query: torch.Tensor, digests: torch.Tensor) -> torch.Tensor:
        import torch

        numbers = torch.arange(digests.shape[0], dtype=torch.float32, device=query.device)
        return numbers[:, None, None].expand(-1, *query.shape[:2])


@dataclass(frozen=True)
class Oracle(Selector):
    """True attention: what a perfect digest would choose. A bound to compare with, not a method.

    The digest is the keys themselves, [n, K, P, D], all of them on the device, and is counted as such; the score is the
    log-sum-exp of the page's logits, whose softmax over all pages is each page's true share of the attention.
    """

    def digest(self, keys: torch.Tensor) -> torch.Tensor:
        return keys

    def score(self, query: torch.Tensor, digests: torch.Tensor) -> torch.Tensor:
        logits = digests.float() @ query.float().transpose(1, 2)  # [n, K, P, G]
        return logits.logsumexp(2)
