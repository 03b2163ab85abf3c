"""Prompts have the exact length asked for and are the same every time; the command shows the quality tasks."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import workloads
from registry import TASKS

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


# --- the command ------------------------------------------------------------------------------------------------


@pytest.fixture
def words_of_any_model(tokenizer, monkeypatch):
    monkeypatch.setattr(workloads, "tokenizer_of", lambda model_name: tokenizer)


def test_every_task_is_listed_with_its_parameters_without_importing_torch():
    program = "import sys, workloads; code = workloads.main(['--list']); sys.exit(code or 3 * ('torch' in sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0
    assert all(f"{name}\n" in done.stdout for name in TASKS)
    assert "n_keys=8" in done.stdout and "top=3, alpha=2.0" in done.stdout


def test_an_item_is_shown_with_its_answers_and_its_length(words_of_any_model, tokenizer, capsys):
    flags = ["--tokens", "900", "--seed", "4", "--index", "2", "--depth", "0.25"]
    item = TASKS.create("needle").item(tokenizer, 900, 4, 2, 0.25)
    assert workloads.main(["--show", "needle", *flags, "--full"]) == 0
    shown = capsys.readouterr().out
    assert f"tokens: {len(item.prompt)} of 900" in shown and "depth 0.25" in shown
    assert f"answers: {item.answers[0]}\n" in shown and item.text in shown
    assert workloads.main(["--show", "needle", *flags]) == 0
    short = capsys.readouterr().out
    note = re.search(r"\n\n\[\.\.\. ([\d,]+) characters; --full shows them \.\.\.\]\n\n", short)
    assert len(short) - len(note[0]) + int(note[1].replace(",", "")) == len(shown)
    assert short.rstrip("\n").endswith(item.text[-workloads.SHOWN_CHARACTERS :])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--show", "needel"], "unknown task 'needel'; did you mean 'needle'?"),
        (["--show", "needle", "--tokens", "9"], "task 'needle' does not fit in 9 tokens: this item needs "),
        (["--show", "needle", "--depth", "2"], "depth 2 is not between 0 (start) and 1 (end)"),
        (["--show", "frequent_words", "--depth", "0"], "task 'frequent_words' has no depth"),
    ],
)
def test_what_cannot_be_shown_is_one_line_and_exit_code_2(words_of_any_model, capsys, flags, message):
    assert workloads.main(flags) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(message) and captured.err.count("\n") == 1 and captured.out == ""


def test_random_weights_have_no_tokenizer_to_show_with(capsys):
    assert workloads.main(["--show", "needle", "--model", "random:configs/models/tiny-llama.json"]) == 2
    assert "random weights have no tokenizer" in capsys.readouterr().err


def test_only_the_tokenizer_is_loaded_and_it_is_the_models_own(smollm2, tmp_path, monkeypatch):
    import models

    smollm2.tokenizer.save_pretrained(tmp_path / "whole")
    smollm2.model.config.save_pretrained(tmp_path / "whole")
    smollm2.model.config.save_pretrained(tmp_path / "bare")
    monkeypatch.setattr(models, "load_from", None)  # what reads weights
    text = "The page table knows where a page is."
    for name in ("smollm2-135m", str(tmp_path / "whole")):
        assert workloads.tokenizer_of(name)(text)["input_ids"] == smollm2.tokenizer(text)["input_ids"]
    with pytest.raises(ValueError, match="it has no tokenizer files"):
        workloads.tokenizer_of(str(tmp_path / "bare"))
