"""How well a model foresees the words of a long text: perplexity, as a task beside those with questions.

It is the oldest measure of a language model, and the mildest of a cache: most words are foreseen from the last few, so
a cache that has lost what lies far back hardly shows it. It stands beside the questions of quality_tasks.py so that
this can be seen. InfiniteBench and RULER leave it out for that reason; papers on caches from StreamingLLM (Xiao et al.
2023, https://arxiv.org/abs/2309.17453) on report it.

The text is the prose of workloads.py, each item from another place on. Only its last tokens are counted, each after
all that stands before it, read token by token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from quality_tasks import TaskItem
from workloads import prompt_tokens

PLACES_OF_A_SEED = 10_007  # more than a task has items, so that seeds do not share them


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
        if self.n_scored < 1:
            raise ValueError(f"task {self.name!r}: n_scored is {self.n_scored}, but must be at least 1")

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
        (prompt,) = prompt_tokens(tokenizer, len(tokenizer), n_tokens, 1, seed * PLACES_OF_A_SEED + index)
        return TaskItem(prompt, (), 0, None, tokenizer.decode(prompt), n_fed)
