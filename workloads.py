"""Prompts of an exact length, made the same way every time, from nothing but what is installed.

A cache experiment needs prompts of exactly 500, 1,000 or 2,000 tokens, and the same ones for every mode it
compares. English comes from `pydoc_data.topics`, the language reference behind Python's `help()`: some 40,000
tokens of prose on every machine that runs this. It is cut into paragraphs; a prompt starts at one of them,
chosen by seed and row, and runs on, past the end back to the start, until it has its tokens.

The command shows the quality tasks, whose questions have right answers (`quality_tasks.py`):

    python workloads.py --list
    python workloads.py --show needle --tokens 1000 --depth 0.5

The reference is rewritten with every Python version, so prompts are equal between two runs of one version,
not between versions. Results therefore record `token_sha256`, and two results with different hashes saw
different prompts.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import random
import struct
import sys
from collections.abc import Sequence
from typing import Any

from registry import TASKS

TokenRows = list[list[int]]
"""Token ids, one list per sequence of the batch."""

SHORTEST_PARAGRAPH_CHARACTERS = 120

FIRST_ORDINARY_ID = 256
"""Low ids are often special tokens or single bytes; random prompts avoid them if the vocabulary is large."""

SHOWN_CHARACTERS = 600
"""Of a long text, so many at its start and as many at its end are shown."""


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


def text_repeats(tokenizer: Any, n_tokens: int) -> bool:
    """Whether prose of so many tokens is longer than all that there is, and begins again: then its end stands further
    up word by word, and can be copied instead of foreseen. Random ids do not repeat."""
    return tokenizer is not None and n_tokens > len(tokenised_prose(tokenizer)[0])


def random_tokens(vocab_size: int, n_tokens: int, batch_size: int, seed: int) -> TokenRows:
    """Seeded random ids, for models whose weights are random too."""
    lowest = FIRST_ORDINARY_ID if vocab_size >= 2 * FIRST_ORDINARY_ID else 0
    rows = [random.Random(f"{seed} {row}") for row in range(batch_size)]  # a longer prompt begins as a shorter one does
    return [[rng.randrange(lowest, vocab_size) for _ in range(n_tokens)] for rng in rows]


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


# --- the command --------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """List the quality tasks, or show one item of one. What a user can mend is one message and exit code 2."""
    arguments = task_parser().parse_args(argv)
    try:
        print(task_list() if arguments.list else shown_item(arguments))
    except ValueError as error:  # UnknownName is one
        print(error, file=sys.stderr)
        return 2
    return 0


def task_parser() -> argparse.ArgumentParser:
    """The flags of the command."""
    parser = argparse.ArgumentParser(prog="python workloads.py", description="Show the quality tasks and their texts.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--list", action="store_true", help="every task with its parameters")
    what.add_argument("--show", metavar="TASK", help="one item: its text, its answers, its number of tokens")
    parser.add_argument("--tokens", type=int, default=1000, metavar="N", help="length of the prompt (default 1000)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="another seed makes other items (default 0)")
    parser.add_argument("--index", type=int, default=0, metavar="N", help="which item of the seed (default 0)")
    parser.add_argument("--depth", type=float, metavar="D", help="where the needle stands, 0 to 1 (default: drawn)")
    parser.add_argument("--model", default="smollm2-135m", metavar="M", help="whose tokenizer (default smollm2-135m)")
    parser.add_argument("--full", action="store_true", help="the whole text, its middle too")
    return parser


def task_list() -> str:
    """Every quality task: its name, what it is, and its parameters with their defaults."""
    rows = []
    for name, parameters, text in TASKS.describe():
        settings = ", ".join(f"{key}={value!r}" for key, value in parameters.items()) or "none"
        rows.append(f"{name}\n    {text}\n    parameters: {settings}")
    return "\n".join(rows)


def shown_item(arguments: argparse.Namespace) -> str:
    """One item of a task as it is shown.

    Raises:
        ValueError: the task is unknown, its text does not fit, or there is no such tokenizer.
    """
    task = TASKS.create(arguments.show)
    tokenizer = tokenizer_of(arguments.model)
    item = task.item(tokenizer, arguments.tokens, arguments.seed, arguments.index, arguments.depth)
    depth = "none" if item.depth is None else f"{item.depth:.2f}"
    wanted = f"answers: {', '.join(item.answers)}" if item.answers else f"scored: the last {item.n_question - 1} tokens"
    return (
        f"task: {arguments.show}, seed {arguments.seed}, index {arguments.index}, depth {depth}\n"
        f"tokens: {len(item.prompt)} of {arguments.tokens} ({arguments.model}), the last {item.n_question} of them"
        f" fed one by one; up to {item.max_new_tokens} to answer\n"
        f"{wanted}\n\n"
        f"{item.text if arguments.full else shortened(item.text)}"
    )


def tokenizer_of(model_name: str) -> Any:
    """The tokenizer of a model.

    Raises:
        ValueError: it cannot be had; says what was tried.
    """
    from models import ModelUnavailable, load_only_tokenizer

    try:
        return load_only_tokenizer(model_name)
    except ModelUnavailable as unavailable:
        raise ValueError(str(unavailable)) from None


def shortened(text: str) -> str:
    """A long text without its middle, which is said."""
    left_out = len(text) - 2 * SHOWN_CHARACTERS
    if left_out <= 0:
        return text
    note = f"[... {left_out:,} characters; --full shows them ...]"
    return f"{text[:SHOWN_CHARACTERS]}\n\n{note}\n\n{text[-SHOWN_CHARACTERS:]}"


if __name__ == "__main__":
    sys.exit(main())
