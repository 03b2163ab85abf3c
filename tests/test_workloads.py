"""Prompts have the exact length asked for and are the same every time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import workloads

PROJECT = Path(__file__).parent.parent


class WordTokenizer:
    """A tokenizer of whole words, the simplest there is. `front` is put before every text, like BOS."""

    pad_token_id, eos_token_id = None, 2

    def __init__(self, front=()):
        self.front, self.ids, self.n_calls = list(front), {}, 0

    def __call__(self, text, add_special_tokens=True):
        self.n_calls += 1
        if isinstance(text, list):
            return {"input_ids": [self(part, add_special_tokens)["input_ids"] for part in text]}
        words = [self.ids.setdefault(word, len(self.ids) + 10) for word in text.split()]
        return {"input_ids": (self.front if add_special_tokens else []) + words}

    def decode(self, ids):
        words = {number: word for word, number in self.ids.items()}
        return " ".join(words[number] for number in ids)


@pytest.fixture
def tokenizer():
    return WordTokenizer()


@pytest.mark.parametrize("n_tokens", [1, 7, 500, 2000])
def test_every_row_has_exactly_the_tokens_asked_for(tokenizer, n_tokens):
    rows = workloads.prompt_tokens(tokenizer, 10**6, n_tokens, batch_size=3, seed=0)
    assert [len(row) for row in rows] == [n_tokens] * 3


def test_a_prompt_longer_than_the_text_goes_round(tokenizer):
    text, _ = workloads.tokenised_prose(tokenizer)
    (row,) = workloads.prompt_tokens(tokenizer, 10**6, len(text) + 50, batch_size=1, seed=0)
    assert len(row) == len(text) + 50
    assert row[:50] == row[len(text) :]


def test_a_prompt_is_prose_that_starts_with_a_sentence(tokenizer):
    (row,) = workloads.prompt_tokens(tokenizer, 10**6, 30, batch_size=1, seed=3)
    text = tokenizer.decode(row)
    assert text[0].isupper()
    assert any(paragraph.startswith(text[:100]) for paragraph in workloads.prose_paragraphs())


def test_the_same_seed_gives_the_same_prompts_with_another_tokenizer_object():
    first, second = (workloads.prompt_tokens(WordTokenizer(), 10**6, 200, 2, seed=5) for _ in range(2))
    assert first == second


def test_every_row_and_every_seed_starts_at_another_place(tokenizer):
    starts = [
        tuple(row)
        for seed in range(4)
        for row in workloads.prompt_tokens(tokenizer, 10**6, 40, batch_size=3, seed=seed)
    ]
    assert len(set(starts)) == 12


def test_a_longer_prompt_begins_with_the_shorter_one(tokenizer):
    (short,) = workloads.prompt_tokens(tokenizer, 10**6, 100, 1, seed=0)
    (long,) = workloads.prompt_tokens(tokenizer, 10**6, 300, 1, seed=0)
    assert long[:100] == short


def test_the_tokens_a_tokenizer_puts_in_front_count():
    (row,) = workloads.prompt_tokens(WordTokenizer(front=[1]), 10**6, 20, 1, seed=0)
    assert row[0] == 1 and 1 not in row[1:] and len(row) == 20


def test_the_prose_is_tokenised_once(tokenizer):
    workloads.prompt_tokens(tokenizer, 10**6, 10, 1, seed=0)
    calls = tokenizer.n_calls
    workloads.prompt_tokens(tokenizer, 10**6, 10, 1, seed=1)
    assert tokenizer.n_calls - calls == 2  # only the two short looks at what stands in front


def test_ids_the_model_does_not_know_are_refused(tokenizer):
    with pytest.raises(ValueError, match="the model knows only 50 ids"):
        workloads.prompt_tokens(tokenizer, 50, 10, 1, seed=0)


def test_without_a_tokenizer_ids_are_random_but_seeded():
    first, again, other = (workloads.prompt_tokens(None, 1000, 64, 2, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    assert [len(row) for row in first] == [64, 64]
    assert first[0] != first[1]


@pytest.mark.parametrize(("vocab_size", "lowest"), [(100, 0), (512, 256), (50_000, 256)])
def test_random_ids_leave_out_low_ids_where_the_vocabulary_allows(vocab_size, lowest):
    (row,) = workloads.prompt_tokens(None, vocab_size, 2000, 1, seed=0)
    assert lowest <= min(row) and max(row) < vocab_size


def test_prompts_are_padded_on_the_left(tokenizer):
    input_ids, mask = workloads.encode_prompts(tokenizer, ["one", "one two three"])
    assert mask == [[0, 0, 1], [1, 1, 1]]
    assert input_ids[0][:2] == [2, 2]
    assert tokenizer.decode(input_ids[1]) == "one two three" and input_ids[0][2] == input_ids[1][0]


def test_a_prompt_needs_a_tokenizer_and_tokens(tokenizer):
    with pytest.raises(ValueError, match="no tokenizer"):
        workloads.encode_prompts(None, ["hello"])
    with pytest.raises(ValueError, match="prompt 2 has no tokens"):
        workloads.encode_prompts(tokenizer, ["hello", " "])


def test_only_equal_prompts_have_equal_hashes():
    different = [[[1, 2], [3]], [[1], [2, 3]], [[1, 2, 3]], [[1, 2, 3], []], [[258, 3]], []]
    hashes = {workloads.token_sha256(rows) for rows in different}
    assert len(hashes) == len(different)
    assert workloads.token_sha256([[1, 2], [3]]) in hashes


def test_importing_the_module_imports_no_torch():
    code = "import sys, workloads; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT).returncode == 0
