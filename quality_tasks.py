"""Questions about a long text with one right answer: what a KV cache that leaves something out may lose.

A cache that keeps or reads only part of the context can look good in every average and still have dropped the one
sentence that a question is about. These tasks ask for it. They are synthetic, so nothing is downloaded and nobody can
have learnt them by heart: the same parameters, tokenizer, length, seed and index always give the same item. What is
asked for does not depend on the length; only the filler around it does. Definitions follow

- the pass key of Mohtashami & Jaggi 2023 (Landmark Attention, https://arxiv.org/abs/2305.16300);
- RULER, Hsieh et al. 2024 (https://arxiv.org/abs/2404.06654): needles, variable tracking, frequent words;
- the retrieval of key-value pairs of Liu et al. 2023 (Lost in the Middle, https://arxiv.org/abs/2307.03172), which
  InfiniteBench (Zhang et al. 2024, https://arxiv.org/abs/2402.13718) made long;

the texts are this project's own, so scores are not comparable with published ones. Prompts end in the middle of
a sentence that the answer completes, so that a base model can be asked too. `intervals.py` sums up the scores.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from task_texts import (
    WALK,
    Draft,
    Filler,
    TooShort,
    coded_words,
    different_numbers,
    encoded,
    hide,
    listed,
    look_alikes,
    plain_sentences,
    random_uuid,
    sized_text,
    two_word_names,
    zeta,
)


@dataclass(frozen=True)
class TaskItem:
    """One question: a prompt and what a right continuation of it contains."""

    prompt: list[int]
    """Token ids: as many as were asked for, or at most a handful fewer."""
    answers: tuple[str, ...]
    max_new_tokens: int
    """Enough for the answers."""
    depth: float | None
    """Where in the filler the needle that is asked for first stands: 0 start, 1 end; None for what has no one place."""
    text: str
    n_question: int = 1
    """How many of the prompt's last tokens are the question. They are fed in decode steps, so that a cache that leaves
    something out must find the answer with them; at least 1."""


class Task(Protocol):
    """A kind of question. A class of one's own needs these two verbs, and `has_depth`.

    One whose `unit` is `perplexity`, rather than the share of what was right, asks nothing: its prompts are texts, of
    which the last `n_question` tokens are scored by how well each is foreseen (prose_task.py).
    """

    has_depth: ClassVar[bool]

    def item(self, tokenizer: Any, n_tokens: int, seed: int, index: int, depth: float | None = None) -> TaskItem: ...

    def score(self, text: str, item: TaskItem) -> float: ...


@dataclass(frozen=True)
class GeneratedTask:
    """What the tasks share: sizing and scoring. Each says in `draft` what is asked, and how."""

    name: ClassVar[str]
    has_depth: ClassVar[bool] = True
    unit: ClassVar[str] = "share"

    def draft(self, rng: random.Random, depth: float) -> Draft:
        """The item of this random state. Whatever is drawn from `rng` is the same for every length and depth."""
        raise NotImplementedError

    def item(self, tokenizer: Any, n_tokens: int, seed: int, index: int, depth: float | None = None) -> TaskItem:
        """Item number `index` of a seed, of `n_tokens` tokens including what the tokenizer puts in front.

        Args:
            depth: where in the filler the needle asked for first stands, 0 to 1; None draws it.

        Raises:
            ValueError: there is no tokenizer, the item needs more tokens, or the depth cannot be.
        """
        if tokenizer is None:
            raise ValueError(f"task {self.name!r} is text, and this model has no tokenizer to read it with")
        if depth is not None and not self.has_depth:
            raise ValueError(f"task {self.name!r} has no depth: what it asks for stands all over the text")
        if depth is not None and not 0 <= depth <= 1:
            raise ValueError(f"depth {depth:g} is not between 0 (start) and 1 (end)")
        rng = random.Random(f"{self.name}/{seed}/{index}")  # of a text, which hashes alike everywhere
        drawn = rng.random()  # also where it is not used, so that what is drawn later stays the same
        depth = drawn if depth is None else depth
        draft = self.draft(rng, depth)
        try:
            text = sized_text(draft, tokenizer, n_tokens)
        except TooShort as short:
            raise ValueError(f"task {self.name!r} does not fit in {n_tokens} tokens: this item needs {short}") from None
        answer_tokens = len(encoded(tokenizer, " " + ", ".join(draft.answers)))
        prompt = encoded(tokenizer, text)
        return TaskItem(
            prompt=prompt,
            answers=draft.answers,
            max_new_tokens=answer_tokens * 3 // 2 + 8,  # for words around the answers
            depth=depth if self.has_depth else None,
            text=text,
            n_question=len(prompt) - len(encoded(tokenizer, text.removesuffix(draft.question))),
        )

    def score(self, text: str, item: TaskItem) -> float:
        """The share of the answers that a generated text contains, 0 to 1; RULER's string match.

        Upper and lower case are alike. An answer counts only as a whole word or number.
        """
        return sum(contains(text, answer) for answer in item.answers) / len(item.answers)

    def at_least(self, **lowest: int) -> None:
        """Raises ValueError for a parameter that is no whole number, or below its lowest value."""
        for parameter, value in lowest.items():
            given = getattr(self, parameter)
            if not isinstance(given, int):
                raise ValueError(f"task {self.name!r}: {parameter} must be a whole number, not {given!r}")
            if given < value:
                raise ValueError(f"task {self.name!r}: {parameter} is {given}, but must be at least {value}")


def contains(text: str, answer: str) -> bool:
    """Whether `answer` stands in `text` as a whole word or number, in upper or lower case."""
    return re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text, re.IGNORECASE) is not None


# --- needles in prose ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Passkey(GeneratedTask):
    """A five-digit pass key in a text that repeats itself; the easiest of all.

    Mohtashami & Jaggi 2023, https://arxiv.org/abs/2305.16300: the key is said twice in one place, in between the same
    few sentences over and over, and asked for at the end.
    """

    name = "passkey"

    def draft(self, rng: random.Random, depth: float) -> Draft:
        (key,) = different_numbers(rng, 1, digits=5)
        filler = Filler(WALK)
        needle = f"The pass key is {key}. Keep it in mind: {key} is the pass key."

        def context_of(n_words: int) -> str:
            haystack = hide(filler.words(n_words), [(depth, needle)])
            return f"A pass key is hidden in the text below. Find it and memorize it.\n\n{haystack}"

        return Draft((key,), context_of, "Which number is the pass key? The pass key is")


def code_draft(
    rng: random.Random, depth: float, codes: Sequence[tuple[str, str]], question: str, answers: Sequence[str]
) -> Draft:
    """Sentences that give names their codes, hidden in prose: the first at `depth`, the others anywhere."""
    needles = [f"The secret code of the {name} is {code}." for name, code in codes]
    depths = [depth, *(rng.random() for _ in codes[1:])]
    sentences = plain_sentences()
    filler = Filler(sentences, end=rng.randrange(len(sentences)))

    def context_of(n_words: int) -> str:
        haystack = hide(filler.words(n_words), list(zip(depths, needles, strict=True)))
        return f"Secret codes are hidden in the text below. Find and memorize them.\n\n{haystack}"

    return Draft(tuple(answers), context_of, question)


@dataclass(frozen=True)
class Needle(GeneratedTask):
    """A needle in a haystack: one code in prose, asked for by its name.

    RULER's single needle (S-NIAH), https://arxiv.org/abs/2404.06654: a name is given a number of seven digits somewhere
    in a text about other things.
    """

    name = "needle"

    def draft(self, rng: random.Random, depth: float) -> Draft:
        (name,) = two_word_names(rng, 1)
        (code,) = different_numbers(rng, 1, digits=7)
        question = f"What is the secret code of the {name}? The secret code of the {name} is"
        return code_draft(rng, depth, [(name, code)], question, [code])


@dataclass(frozen=True)
class NeedleMultiKey(GeneratedTask):
    """Needles of many names that look alike, of which one is asked for; the others distract.

    RULER's multi-key needles (MK-NIAH), https://arxiv.org/abs/2404.06654. Every distractor shares a word with the name
    asked for, so a page cannot be told from another by one word of the question.
    """

    name = "needle_multikey"
    n_keys: int = 8

    def __post_init__(self) -> None:
        self.at_least(n_keys=2)
        look_alikes(random.Random(0), self.n_keys)  # refuses too many before anything is run

    def draft(self, rng: random.Random, depth: float) -> Draft:
        names = look_alikes(rng, self.n_keys)
        codes = different_numbers(rng, self.n_keys, digits=7)
        question = f"What is the secret code of the {names[0]}? The secret code of the {names[0]} is"
        return code_draft(rng, depth, list(zip(names, codes, strict=True)), question, codes[:1])


@dataclass(frozen=True)
class NeedleMultiValue(GeneratedTask):
    """Several codes of one name, in several places, all asked for.

    RULER's multi-value needles (MV-NIAH), https://arxiv.org/abs/2404.06654; the score is the share of the codes found.
    """

    name = "needle_multivalue"
    n_values: int = 4

    def __post_init__(self) -> None:
        self.at_least(n_values=2)

    def draft(self, rng: random.Random, depth: float) -> Draft:
        (name,) = two_word_names(rng, 1)
        codes = different_numbers(rng, self.n_values, digits=7)
        question = (
            f"What are the {self.n_values} secret codes of the {name}? "
            f"The {self.n_values} secret codes of the {name} are"
        )
        return code_draft(rng, depth, [(name, code) for code in codes], question, codes)


@dataclass(frozen=True)
class NeedleMultiQuery(GeneratedTask):
    """Several names with one code each, all asked for in one question.

    RULER's multi-query needles (MQ-NIAH), https://arxiv.org/abs/2404.06654; the score is the share of the codes found.
    """

    name = "needle_multiquery"
    n_queries: int = 4

    def __post_init__(self) -> None:
        self.at_least(n_queries=2)

    def draft(self, rng: random.Random, depth: float) -> Draft:
        names = two_word_names(rng, self.n_queries)
        codes = different_numbers(rng, self.n_queries, digits=7)
        asked = listed([f"the {name}" for name in names])
        question = f"What are the secret codes of {asked}? The secret codes of {asked} are, in this order,"
        return code_draft(rng, depth, list(zip(names, codes, strict=True)), question, codes)


# --- other texts --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KVRetrieval(GeneratedTask):
    """The value of one key in a JSON object of random UUIDs, where nothing but the key tells pairs apart.

    Liu et al. 2023, https://arxiv.org/abs/2307.03172, and InfiniteBench's Retrieve.KV, https://arxiv.org/abs/2402.13718:
    the pairs are the filler. There is at least one besides the one asked for. What is too little for another pair is
    filled with words before the object.
    """

    name = "kv_retrieval"

    def draft(self, rng: random.Random, depth: float) -> Draft:
        key, value = random_uuid(rng), random_uuid(rng)
        others, filler = rng.getrandbits(64), Filler(WALK)

        def context_of(n_pairs: int, n_words: int = 0) -> str:
            drawn = random.Random(others)  # anew, so that the first pairs are the same however many there are
            lines = [f'"{random_uuid(drawn)}": "{random_uuid(drawn)}"' for _ in range(n_pairs + 1)]
            lines.insert(round(depth * len(lines)), f'"{key}": "{value}"')
            padding = " ".join(filler.words(n_words)) + "\n\n" if n_words else ""
            pairs = ",\n".join(lines)
            return f"{padding}A JSON object of keys and values:\n\n{{{pairs}}}"

        return Draft((value,), context_of, f'The value of the key "{key}" is', pads=True)


@dataclass(frozen=True)
class VariableTracking(GeneratedTask):
    """All variables that hold a value, which was assigned to one and handed on from one to the next.

    RULER's variable tracking (VT), https://arxiv.org/abs/2404.06654: a chain of `n_hops` copies spread over the text in
    order, among `n_chains - 1` chains of other values. RULER has one chain unless told otherwise; here there
    are two, so that naming every variable in sight is a wrong thing to do, though recall does not punish it.
    """

    name = "variable_tracking"
    has_depth = False
    n_chains: int = 2
    n_hops: int = 4

    def __post_init__(self) -> None:
        self.at_least(n_chains=1, n_hops=1)

    def draft(self, rng: random.Random, depth: float) -> Draft:
        n_each = self.n_hops + 1
        words = itertools.islice(coded_words(rng), self.n_chains * n_each)
        names = [word.upper() for word in words]
        chains = [names[start : start + n_each] for start in range(0, len(names), n_each)]
        values = different_numbers(rng, self.n_chains, digits=5)
        needles = []
        for chain, value in zip(chains, values, strict=True):
            sources = [value, *(f"VAR {name}" for name in chain)]
            lines = [f"VAR {name} = {source}." for name, source in zip(chain, sources[:-1], strict=True)]
            needles += list(zip(sorted(rng.random() for _ in lines), lines, strict=True))
        filler = Filler(WALK)

        def context_of(n_words: int) -> str:
            haystack = hide(filler.words(n_words), needles)
            return f"Variables are assigned in the text below. Keep track of their values.\n\n{haystack}"

        question = (
            f"Which {n_each} variables hold the value {values[0]}? The {n_each} variables that hold the value "
            f"{values[0]} are"
        )
        return Draft(tuple(chains[0]), context_of, question)


@dataclass(frozen=True)
class FrequentWords(GeneratedTask):
    """The most frequent words of a made-up text, for which all of it must be counted.

    RULER's frequent words extraction (FWE), https://arxiv.org/abs/2404.06654: the word of rank k is there about
    n / (zeta(alpha) * k ** alpha) times, in random order. Rank 1 are dots, which do not count; `top` words after
    them are asked for. A lower `alpha` makes the frequencies more alike, and the task harder.
    """

    name = "frequent_words"
    has_depth = False
    top: int = 3
    alpha: float = 2.0

    def __post_init__(self) -> None:
        self.at_least(top=1)
        if not self.alpha > 1:
            raise ValueError(f"task {self.name!r}: alpha is {self.alpha:g}, but must be above 1 (a zeta distribution)")

    def draft(self, rng: random.Random, depth: float) -> Draft:
        order, made_up = rng.getrandbits(64), coded_words(rng)
        words = ["....", *itertools.islice(made_up, self.top)]
        last, next_one = self.share(self.top + 1), self.share(self.top + 2)
        fewest = math.ceil(max(1 / (last - next_one), 2 / last))  # from here on no other word is as frequent as the top

        def context_of(n_more: int) -> str:
            n = fewest + n_more
            text: list[str] = []
            for rank in itertools.count(1):
                if len(text) >= n:
                    break
                if rank > len(words):
                    words.append(next(made_up))
                # What is lost by rounding down goes to the rarest words, once each.
                text += [words[rank - 1]] * max(int(n * self.share(rank)), 1)
            random.Random(order).shuffle(text)
            return f"Count how often each made-up word occurs in the text below. Dots do not count.\n\n{' '.join(text)}"

        question = f"Which {self.top} words occur most often? The {self.top} most frequent words are"
        return Draft(tuple(words[1 : self.top + 1]), context_of, question)

    def share(self, rank: int) -> float:
        """The share of the words that have this rank in a zeta distribution."""
        return rank**-self.alpha / zeta(self.alpha)


# --- many items ---------------------------------------------------------------------------------------------


def items(task: Task, tokenizer: Any, n_tokens: int, samples: int, seed: int) -> list[TaskItem]:
    """Items 0 to `samples - 1` of a seed, their depths spread evenly from start to end where the task has depth.

    Raises:
        ValueError: as for the task's `item`.
    """
    depths = [0.5] if samples == 1 else [index / (samples - 1) for index in range(samples)]
    return [
        task.item(tokenizer, n_tokens, seed, index, depth if task.has_depth else None)
        for index, depth in enumerate(depths)
    ]
