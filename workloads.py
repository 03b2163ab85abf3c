"""Prompts of an exact length, made the same way every time, from nothing but what is installed.

A cache experiment needs prompts of exactly 500, 1,000 or 2,000 tokens, and the same ones for every mode it
compares. English comes from `pydoc_data.topics`, the language reference behind Python's `help()`: some 40,000
tokens of prose on every machine that runs this. It is cut into paragraphs; a prompt starts at one of them,
chosen by seed and row, and runs on, past the end back to the start, until it has its tokens.

The reference is rewritten with every Python version, so prompts are equal between two runs of one version,
not between versions. Results therefore record `token_sha256`, and two results with different hashes saw
different prompts.
"""

from __future__ import annotations

import functools
import hashlib
import random
import struct
from collections.abc import Sequence
from typing import Any

TokenRows = list[list[int]]
"""Token ids, one list per sequence of the batch."""

SHORTEST_PARAGRAPH_CHARACTERS = 120

FIRST_ORDINARY_ID = 256
"""Low ids are often special tokens or single bytes; random prompts avoid them if the vocabulary is large."""


def prompt_tokens(tokenizer: Any, vocab_size: int, n_tokens: int, batch_size: int, seed: int) -> TokenRows:
    """`batch_size` prompts of exactly `n_tokens` tokens each.

    Args:
        tokenizer: a Hugging Face tokenizer, or None for a model that has none: then the ids are random.
        vocab_size: number of ids the model knows.
        n_tokens: length of every prompt, including the tokens the tokenizer puts in front (such as BOS).
        batch_size: number of prompts; each starts at another place.
        seed: another seed starts at other places.

    Raises:
        ValueError: the tokenizer makes ids that the model does not know.
    """
    if tokenizer is None:
        return random_tokens(vocab_size, n_tokens, batch_size, seed)
    tokens, starts = tokenised_prose(tokenizer)
    if max(tokens) >= vocab_size:
        raise ValueError(f"the tokenizer makes id {max(tokens)}, but the model knows only {vocab_size} ids")
    front = front_tokens(tokenizer)
    places = [starts[(seed * batch_size + row) % len(starts)] for row in range(batch_size)]
    return [(front + cycled(tokens, place, n_tokens))[:n_tokens] for place in places]


def random_tokens(vocab_size: int, n_tokens: int, batch_size: int, seed: int) -> TokenRows:
    """Seeded random ids, for models whose weights are random too."""
    lowest = FIRST_ORDINARY_ID if vocab_size >= 2 * FIRST_ORDINARY_ID else 0
    rng = random.Random(seed)
    return [[rng.randrange(lowest, vocab_size) for _ in range(n_tokens)] for _ in range(batch_size)]


def encode_prompts(tokenizer: Any, prompts: Sequence[str]) -> tuple[TokenRows, TokenRows]:
    """The user's own prompts as `(input_ids, attention_mask)`, padded on the left to the longest.

    Padding goes to the left so that every sequence ends in its last real token, where generation goes on.

    Raises:
        ValueError: there is no tokenizer, or a prompt has no tokens.
    """
    if tokenizer is None:
        raise ValueError("this model has no tokenizer to read text with; give a context length instead")
    rows = [list(tokenizer(prompt)["input_ids"]) for prompt in prompts]
    if not all(rows):
        raise ValueError(f"prompt {rows.index([]) + 1} has no tokens")
    width = max(map(len, rows), default=0)
    pad = first_id(tokenizer.pad_token_id, tokenizer.eos_token_id)
    input_ids = [[pad] * (width - len(row)) + row for row in rows]
    return input_ids, [[0] * (width - len(row)) + [1] * len(row) for row in rows]


def token_sha256(rows: TokenRows) -> str:
    """A hash of token ids and their division into rows; equal prompts, and only those, hash equal."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(struct.pack(f"<Q{len(row)}I", len(row), *row))
    return digest.hexdigest()


@functools.cache
def prose_paragraphs() -> tuple[str, ...]:
    """The paragraphs of Python's language reference that read as prose, in order of topic."""
    from pydoc_data.topics import topics

    paragraphs = (" ".join(part.split()) for name in sorted(topics) for part in topics[name].split("\n\n"))
    return tuple(dict.fromkeys(text for text in paragraphs if is_prose(text)))


def is_prose(text: str) -> bool:
    """Whether a paragraph is sentences, rather than a heading, code, grammar or a list."""
    return len(text) >= SHORTEST_PARAGRAPH_CHARACTERS and text[0].isupper() and text.endswith(".")


@functools.lru_cache(maxsize=2)
def tokenised_prose(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The prose as one run of tokens, and where paragraphs start in it, in an order shuffled once for all."""
    tokens: list[int] = []
    starts: list[int] = []
    texts = [f"{paragraph}\n\n" for paragraph in prose_paragraphs()]
    for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]:
        starts.append(len(tokens))
        tokens.extend(ids)
    random.Random(0).shuffle(starts)
    return tokens, starts


def front_tokens(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text: BOS for Llama, nothing for GPT-2."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    return list(full[: full.index(bare[0])])


def cycled(tokens: list[int], start: int, n_tokens: int) -> list[int]:
    """`n_tokens` tokens from `start` on, going round the end."""
    return [tokens[(start + offset) % len(tokens)] for offset in range(n_tokens)]


def first_id(*ids: int | None) -> int:
    """The first id that is one; 0 if none is."""
    return next((token for token in ids if token is not None), 0)
