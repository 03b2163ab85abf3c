"""What quality tasks are made of: filler, needles between its sentences, invented names, and the right length.

A long-context task hides a few sentences ("needles") in text that has nothing to do with them. Filler is a circle of
plain sentences, from which any number of words can be cut. The cut is at the front, marked with an ellipsis, so that
the last sentence, before the question, is whole. A needle stands between two sentences, at the gap nearest to
its depth. How much filler makes a prompt of n tokens depends on the tokenizer, so it is searched for: the text is
tokenised whole each time, as the model will read it.
"""

from __future__ import annotations

import bisect
import functools
import math
import random
import re
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from workloads import front_tokens, prose_paragraphs

WALK = ("The road is long.", "The hills are grey.", "The rain has stopped.", "We walk on.", "Soon we rest again.")
"""Filler that says the same thing over and over, as in the pass key task."""

FEWEST_WORDS = 3
LONGEST_WORD_CHARACTERS = 14
"""A longer word is several tokens, and a prompt can only be sized to the word."""


def words_of(text: str) -> tuple[str, ...]:
    """The words of a text: a list of many is easier to read so."""
    return tuple(text.split())


ADJECTIVES = words_of(
    "amber brave bright calm clever copper crimson curious dusty eager early fading gentle golden green happy hidden "
    "hollow humble idle ivory jolly keen lazy lively lonely lucky merry misty noble olive patient proud purple quiet "
    "rapid rusty silent silver sleepy steady sunny tidy velvet wild windy wooden yellow"
)
NOUNS = words_of(
    "anchor badger basket beaver bridge candle canyon castle cedar comet dolphin eagle falcon feather ferry forest "
    "fountain garden glacier hammer harbor heron island kettle ladder lantern lemon lizard maple meadow mirror nutmeg "
    "orchard otter panther pebble pepper piano pigeon rabbit ribbon rocket saddle salmon tiger tunnel turtle valley "
    "violin walnut window wizard"
)

N_NAMES = len(ADJECTIVES) * len(NOUNS)

SYLLABLES = tuple(consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou")


# --- filler -------------------------------------------------------------------------------------------------


@functools.cache
def plain_sentences() -> tuple[str, ...]:
    """The sentences of Python's language reference without numbers, names of code and the like, in their order."""
    found = (
        sentence
        for paragraph in prose_paragraphs()
        for sentence in re.split(r"(?<=\.) (?=[A-Z])", paragraph)
        if re.fullmatch(r"""[A-Z][A-Za-z ,;:'"()-]+\.""", sentence)
        and len(words := sentence.split()) >= FEWEST_WORDS
        and max(map(len, words)) <= LONGEST_WORD_CHARACTERS
    )
    return tuple(dict.fromkeys(found))


@dataclass(frozen=True)
class Filler:
    """Sentences in a circle; text cut from it ends with the sentence before number `end`."""

    sentences: tuple[str, ...]
    end: int = 0

    def words(self, n_words: int) -> list[str]:
        """The last `n_words` words before the end, going round; a first sentence that is cut begins with `...`."""
        place = self.end % len(self.sentences)
        circle = " ".join(self.sentences[place:] + self.sentences[:place]).split()
        whole, rest = divmod(n_words, len(circle))
        words = circle[len(circle) - rest :] + circle * whole
        if rest and not circle[-rest - 1].endswith("."):
            words[0] = f"... {words[0]}"
        return words


def hide(words: Sequence[str], needles: Sequence[tuple[float, str]]) -> str:
    """Filler words as one text, with every needle between two sentences.

    Args:
        words: filler that ends with a whole sentence; may be empty.
        needles: `(depth, sentence)`, depth 0 at the start and 1 at the end. Of needles in one gap, the deeper comes
            later, and of equally deep ones the later in the list.
    """
    gaps = [0] + [place for place, word in enumerate(words, 1) if word.endswith(".")]
    parts, done = [], 0
    for depth, needle in sorted(needles, key=lambda pair: pair[0]):
        gap = nearest_of(gaps, depth * len(words))
        parts += [*words[done:gap], needle]
        done = gap
    return " ".join([*parts, *words[done:]])


def nearest_of(rising: Sequence[int], value: float) -> int:
    """The number nearest to `value` in a rising list."""
    after = bisect.bisect_left(rising, value)
    return min(rising[max(after - 1, 0) : after + 1], key=lambda number: abs(number - value))


# --- names --------------------------------------------------------------------------------------------------


def look_alikes(rng: random.Random, n: int) -> list[str]:
    """`n` different names of two words, such as `brave otter`; each shares exactly one word with the first.

    Raises:
        ValueError: there are not so many.
    """
    adjective, noun = rng.choice(ADJECTIVES), rng.choice(NOUNS)
    alike = [f"{other} {noun}" for other in ADJECTIVES if other != adjective]
    alike += [f"{adjective} {other}" for other in NOUNS if other != noun]
    if n - 1 > len(alike):
        raise ValueError(f"there are only {len(alike) + 1} names that look alike, not {n}")
    return [f"{adjective} {noun}", *rng.sample(alike, n - 1)]


def two_word_names(rng: random.Random, n: int) -> list[str]:
    """`n` different names of two words, such as `brave otter`."""
    return [f"{ADJECTIVES[i % len(ADJECTIVES)]} {NOUNS[i // len(ADJECTIVES)]}" for i in rng.sample(range(N_NAMES), n)]


def coded_words(rng: random.Random) -> Iterator[str]:
    """Different made-up words without end, such as `tokari`; of three syllables while there are any left."""
    seen: set[str] = set()
    for n_drawn in range(10**12):
        n_syllables = 3 if n_drawn < len(SYLLABLES) ** 3 // 2 else 5
        word = "".join(rng.choices(SYLLABLES, k=n_syllables))
        if word not in seen:
            seen.add(word)
            yield word


def different_numbers(rng: random.Random, n: int, digits: int) -> list[str]:
    """`n` different numbers of so many digits, none with a leading 0."""
    return [str(number) for number in rng.sample(range(10 ** (digits - 1), 10**digits), n)]


def random_uuid(rng: random.Random) -> str:
    """A UUID of version 4."""
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def listed(words: Sequence[str]) -> str:
    """`a`, `a and b`, or `a, b and c`."""
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


@functools.cache
def zeta(alpha: float) -> float:
    """Riemann's zeta function for alpha > 1: the sum of k ** -alpha over all k, the tail by Euler and Maclaurin."""
    n = 1000
    return math.fsum(k**-alpha for k in range(1, n)) + n ** (1 - alpha) / (alpha - 1) + n**-alpha / 2


# --- length -------------------------------------------------------------------------------------------------


def encoded(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a whole text with what the tokenizer puts in front, such as BOS, and nothing behind it."""
    return front_tokens(tokenizer) + list(tokenizer(text, add_special_tokens=False)["input_ids"])


def largest_that_fits(size_of: Callable[[int], int], limit: int) -> int:
    """The largest n with `size_of(n) <= limit`, for sizes that rise about evenly with n.

    Doubles n until it no longer fits, then closes in by interpolation and halving in turn, so that a size that rises
    unevenly costs a few more looks, never a wrong answer: n fits and n + 1 does not.

    Raises:
        ValueError: not even 0 fits.
    """
    low, low_size, high = 0, size_of(0), 16
    if low_size > limit:
        raise ValueError(f"size {low_size} of nothing exceeds {limit}")
    while (high_size := size_of(high)) <= limit:
        low, low_size, high = high, high_size, 2 * high
    halve = False
    while high - low > 1:
        share = 0.5 if halve else (limit - low_size) / (high_size - low_size)
        middle = min(max(low + round(share * (high - low)), low + 1), high - 1)
        size = size_of(middle)
        if size <= limit:
            low, low_size = middle, size
        else:
            high, high_size = middle, size
        halve = not halve
    return low


@dataclass(frozen=True)
class Draft:
    """An item before it has its length: the answers, the question, and the context for any amount of filler."""

    answers: tuple[str, ...]
    context_of: Callable[..., str]
    """What stands before the question with n units of filler; with `pads`, and with m words of padding besides:
    `context_of(n, m)`."""
    question: str
    """Ends where the answer is to begin."""
    pads: bool = False
    """Whether a unit of filler is so many tokens that words must make up for what is left."""

    def text_of(self, *filler: int) -> str:
        """The prompt with so much filler."""
        return f"{self.context_of(*filler)}\n\n{self.question}"


class TooShort(ValueError):
    """A prompt without any filler is longer than it may be; says how many tokens it needs."""


def sized_text(draft: Draft, tokenizer: Any, n_tokens: int) -> str:
    """The prompt with the most filler that `n_tokens` tokens hold.

    Raises:
        TooShort: it needs more even without.
    """
    needed = len(encoded(tokenizer, draft.text_of(0)))
    if needed > n_tokens:
        raise TooShort(needed)
    n_units = largest_that_fits(lambda n: len(encoded(tokenizer, draft.text_of(n))), n_tokens)
    if not draft.pads:
        return draft.text_of(n_units)
    n_words = largest_that_fits(lambda n: len(encoded(tokenizer, draft.text_of(n_units, n))), n_tokens)
    return draft.text_of(n_units, n_words)
