"""How well a model foresees the words of a long text: perplexity, as a task beside those with questions.

It is the oldest measure of a language model, and the mildest of a cache: most words are foreseen from the last few, so
a cache that has lost what lies far back hardly shows it. It stands beside the questions of quality_tasks.py so that
this can be seen. InfiniteBench and RULER leave it out for that reason; papers on caches from StreamingLLM (Xiao et al.
2023, https://arxiv.org/abs/2309.17453) on report it.

The text is the prose of workloads.py, each item from another place on. Only its last tokens are counted, each after
all that stands before it, read token by token.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, ClassVar

from quality_tasks import TaskItem
from workloads import cycled, front_tokens, text_repeats, tokenised_prose


@dataclass(frozen=True)
class ProsePerplexity:
    """Perplexity of the last words of a long text; lower is better.

    exp of the mean negative log-likelihood of the last `n_scored` tokens of n_tokens of prose.
    """

    name: ClassVar[str] = "prose_perplexity"
    has_depth: ClassVar[bool] = False
    unit: ClassVar[str] = "perplexity"
    n_scored: int = 64

    def __post_init__(self) -> None:
        if not isinstance(self.n_scored, int) or self.n_scored < 1:
            raise ValueError(f"task {self.name!r}: n_scored must be a whole number from 1 on, not {self.n_scored!r}")

    def item(self, tokenizer: Any, n_tokens: int, seed: int, index: int, depth: float | None = None) -> TaskItem:
        """Text number `index` of a seed, of exactly `n_tokens` tokens.

        Raises:
            ValueError: there is no tokenizer, the text is too short to be scored, or a depth is asked for.
        """
        if tokenizer is None:
            raise ValueError(f"task {self.name!r} is text, and this model has no tokenizer to read it with")
        if depth is not None:
            raise ValueError(f"task {self.name!r} has no depth: it asks for nothing in particular")
        n_fed = self.n_scored + 1  # what is said after the last token is about nothing that is known
        if n_tokens <= n_fed:
            raise ValueError(f"task {self.name!r} does not fit in {n_tokens} tokens: this item needs {n_fed + 1}")
        tokens, starts = tokenised_prose(tokenizer)
        if text_repeats(tokenizer, n_tokens):
            raise ValueError(f"task {self.name!r} has {len(tokens)} tokens of prose, and {n_tokens} would repeat it")
        if index >= len(starts):
            raise ValueError(f"task {self.name!r} has prose that begins in {len(starts)} places, so no item {index}")
        place = random.Random(f"{self.name}/{seed}").sample(starts, len(starts))[index]
        prompt = (front_tokens(tokenizer) + cycled(tokens, place, n_tokens))[:n_tokens]
        return TaskItem(prompt, (), 0, None, tokenizer.decode(prompt), n_fed)

    def score(self, text: str, item: TaskItem) -> float:
        """Raises TypeError: nothing is answered here."""
        raise TypeError(f"task {self.name!r} is scored by perplexity, not by an answer")
