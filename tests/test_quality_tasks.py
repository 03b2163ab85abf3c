"""Quality tasks have the length asked for, their needles where they are said to be, and answers that the text gives.

`solve` reads a prompt as a person would: with a regular expression or a counter, and knowing nothing of how it was
made. What it finds must be the answers.
"""

from __future__ import annotations

import collections
import json
import random
import re
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_workloads import WordTokenizer

import quality_tasks
import task_texts
from quality_tasks import contains, items
from registry import TASKS

WITH_DEPTH = ("passkey", "needle", "needle_multikey", "needle_multivalue", "needle_multiquery", "kv_retrieval")
NAMES = (*WITH_DEPTH, "variable_tracking", "frequent_words")
HANDFUL = 8
LONG_ENOUGH = 450
WORDS = WordTokenizer()


def question_of(text: str) -> str:
    return text.rpartition("\n\n")[2]


def pairs_of(text: str) -> list[tuple[str, str]]:
    """All that a text says has a value, as (name, value) in order."""
    if "{" in text:
        return list(json.loads(re.search(r"\{.*\}", text, re.DOTALL)[0]).items())
    if "pass key" in text:
        return [("key", number) for number in re.findall(r"The pass key is (\d+)\.", text)]
    return re.findall(r"The secret code of the (\w+ \w+) is (\d+)\.", text)


def variables_of(text: str) -> dict[str, str]:
    """Variable -> number, by carrying out the assignments from first to last."""
    values: dict[str, str] = {}
    for name, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", text):
        assert name not in values
        values[name] = source if source.isdigit() else values[source]
    return values


def ranking_of(text: str) -> list[tuple[str, int]]:
    """The words of the middle part and how often they are there, most frequent first, without the dots."""
    counts = collections.Counter(text.split("\n\n")[1].split())
    del counts["...."]
    return counts.most_common()


def asked_for(text: str) -> set[str]:
    question = question_of(text).partition("?")[0]
    if '"' in question:
        return set(re.findall(r'"(.*)"', question))
    return {"key"} if "pass key" in question else set(re.findall(r"the ([a-z]+ [a-z]+)(?=$|,| and )", question))


def solve(name: str, text: str) -> list[str]:
    if name == "variable_tracking":
        (value,) = set(re.findall(r"\d{5}", question_of(text)))
        return [variable for variable, held in variables_of(text).items() if held == value]
    if name == "frequent_words":
        return [word for word, _ in ranking_of(text)[: int(re.search(r"\d+", question_of(text))[0])]]
    return [value for key, value in pairs_of(text) if key in asked_for(text)]


def distractors(name: str, text: str) -> list[str]:
    """What the text offers and the question does not ask for."""
    right = set(solve(name, text))
    if name == "variable_tracking":
        offered = list(variables_of(text))
    elif name == "frequent_words":
        offered = [word for word, _ in ranking_of(text)]
    else:
        offered = [value for _, value in pairs_of(text)]
    return [each for each in offered if each not in right]


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def task(name):
    return TASKS.create(name)


# --- items ------------------------------------------------------------------------------------------------------


def test_every_registered_task_is_tested_here_and_names_itself_as_it_is_registered():
    assert tuple(TASKS) == (*NAMES, "prose_perplexity")
    assert all(TASKS.create(name).name == name for name in NAMES)
    assert tuple(name for name in NAMES if TASKS.create(name).has_depth) == WITH_DEPTH


@settings(max_examples=30)
@given(
    name=st.sampled_from(NAMES),
    n_tokens=st.integers(LONG_ENOUGH, 3000),
    seed=st.integers(0, 2**32),
    index=st.integers(0, 1000),
    depth=st.floats(0, 1),
    front=st.lists(st.integers(0, 5), max_size=2),
)
def test_an_item_has_its_length_its_answers_and_no_others(name, n_tokens, seed, index, depth, front):
    task, tokenizer = TASKS.create(name), WordTokenizer(front)
    item = task.item(tokenizer, n_tokens, seed, index, depth if task.has_depth else None)
    assert 0 <= n_tokens - len(item.prompt) <= 2  # whole words; "... " at the cut is one more
    assert item.prompt == tokenizer(item.text)["input_ids"]
    assert collections.Counter(solve(name, item.text)) == collections.Counter(item.answers)
    assert task.score(", ".join(solve(name, item.text)), item) == 1.0
    assert task.score(" ".join(distractors(name, item.text)), item) == 0.0
    assert item.text.endswith((" is", " are", " are, in this order,"))
    assert item.n_question == len(tokenizer(question_of(item.text), add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("n_tokens", [LONG_ENOUGH, 1501])
def test_a_real_tokenizer_gets_the_same_exact_items(smollm2, name, task, n_tokens):
    for item in items(task, smollm2.tokenizer, n_tokens, samples=4, seed=3):
        assert 0 <= n_tokens - len(item.prompt) <= HANDFUL
        assert item.prompt == smollm2.tokenizer(item.text)["input_ids"]
        assert sorted(solve(name, item.text)) == sorted(item.answers)
        n_answer = len(smollm2.tokenizer(" " + ", ".join(item.answers))["input_ids"])
        assert n_answer < item.max_new_tokens < 2 * n_answer + 10


def test_the_question_is_the_last_tokens_of_a_real_prompt(smollm2, task):
    item = task.item(smollm2.tokenizer, 600, 0, 0)
    assert smollm2.tokenizer.decode(item.prompt[-item.n_question :]).strip() == question_of(item.text)


@pytest.mark.parametrize("name", ["needle_multikey", "kv_retrieval", "variable_tracking", "frequent_words"])
def test_there_are_distractors_to_fall_for(name):
    item = TASKS.create(name).item(WORDS, LONG_ENOUGH, 0, 0)
    assert len(distractors(name, item.text)) >= 5


def test_the_answer_to_another_item_is_wrong(task):
    one, other = items(task, WORDS, 600, samples=2, seed=0)
    assert task.score(", ".join(other.answers), one) == 0.0


def test_the_same_arguments_make_the_same_item_and_others_another(task):
    def item(seed=1, index=2, n_tokens=700):
        return task.item(WordTokenizer(), n_tokens, seed, index)

    assert item() == item()
    assert item().answers != item(seed=2).answers != item(index=3).answers != item().answers


def test_what_is_asked_does_not_depend_on_length_or_depth(name, task):
    depths = (0.0, 1.0, None) if task.has_depth else (None,)
    made = [task.item(WORDS, n, seed=5, index=1, depth=depth) for n in (LONG_ENOUGH, 2500) for depth in depths]
    assert len({item.answers for item in made}) == 1
    assert len({question_of(item.text) for item in made}) == 1


def test_different_tasks_do_not_share_their_numbers():
    answers = [answer for name in NAMES for answer in TASKS.create(name).item(WORDS, 600, 0, 0).answers]
    assert len({answer.lower() for answer in answers}) == len(answers)


@pytest.mark.parametrize("depth", [0.0, 0.2, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("name", WITH_DEPTH)
def test_the_needle_stands_at_its_depth_in_tokens(smollm2, name, depth):
    task, tokenizer = TASKS.create(name), smollm2.tokenizer
    for index in range(3):
        item = task.item(tokenizer, 2000, seed=0, index=index, depth=depth)
        assert item.depth == depth
        body = item.text[: -len(question_of(item.text))]
        before, _, after = body.partition(item.answers[0])
        n_before, n_after = (len(tokenizer(part)["input_ids"]) for part in (before, after))
        assert n_before / (n_before + n_after) == pytest.approx(depth, abs=0.08)


def test_depths_go_evenly_from_start_to_end():
    needle = TASKS.create("needle")
    assert [item.depth for item in items(needle, WORDS, 300, 5, 0)] == [0, 0.25, 0.5, 0.75, 1]
    assert [item.depth for item in items(needle, WORDS, 300, 1, 0)] == [0.5]
    assert items(needle, WORDS, 300, 0, 0) == []
    assert [item.depth for item in items(TASKS.create("variable_tracking"), WORDS, 300, 2, 0)] == [None, None]


def test_a_depth_that_is_not_given_is_drawn():
    drawn = [TASKS.create("needle").item(WORDS, 300, 0, index).depth for index in range(40)]
    assert len(set(drawn)) == 40 and min(drawn) < 0.2 and max(drawn) > 0.8


@pytest.mark.parametrize(("name", "times"), [("passkey", 2), *((name, 1) for name in WITH_DEPTH[1:])])
def test_an_answer_stands_in_the_text_as_often_as_it_should(name, times):
    for item in items(TASKS.create(name), WORDS, 900, 5, seed=8):
        assert [item.text.count(answer) for answer in item.answers] == [times] * len(item.answers)


def test_look_alike_names_share_one_word_with_the_one_asked_for():
    item = TASKS.create({"name": "needle_multikey", "n_keys": 12}).item(WORDS, 900, 0, 0)
    (asked,) = asked_for(item.text)
    others = {name for name, _ in pairs_of(item.text)} - {asked}
    assert len(others) == 11
    assert all(len(set(other.split()) & set(asked.split())) == 1 for other in others)


def test_parameters_say_how_many():
    def answers(**choice):
        return TASKS.create(choice).item(WORDS, 900, 0, 0).answers

    assert len(answers(name="needle_multivalue", n_values=6)) == 6
    assert len(answers(name="needle_multiquery", n_queries=2)) == 2
    assert len(answers(name="variable_tracking", n_chains=3, n_hops=2)) == 3
    assert len(answers(name="frequent_words", top=2)) == 2


def test_the_codes_of_one_name_stand_in_different_places():
    item = TASKS.create("needle_multivalue").item(WORDS, 3000, 0, 0, depth=0.5)
    places = [item.text.index(answer) for answer in item.answers]
    assert min(abs(a - b) for a in places for b in places if a != b) > 100


def test_a_chain_is_as_long_as_its_hops_and_starts_with_a_number():
    item = TASKS.create({"name": "variable_tracking", "n_hops": 3}).item(WORDS, 600, 0, 0)
    lines = re.findall(r"VAR \w+ = [^.]*\.", item.text)
    chain = [line for line in lines if any(f"VAR {name} =" in line for name in item.answers)]
    sources = [line.partition("= ")[2].rstrip(".") for line in chain]
    assert sources[0].isdigit() and sources[1:] == [f"VAR {name}" for name in item.answers[:-1]]


def fewest_tokens(task) -> int:
    with pytest.raises(ValueError) as refused:
        task.item(WORDS, 1, 0, 0)
    return int(re.search(r"needs (\d+)", str(refused.value))[1])


@pytest.mark.parametrize("alpha", [1.3, 2.0, 4.0])
def test_word_frequencies_follow_zipf(alpha):
    item = TASKS.create({"name": "frequent_words", "alpha": alpha}).item(WORDS, 5000, 0, 0)
    words = item.text.split("\n\n")[1].split()
    zeta = sum(k**-alpha for k in range(1, 200_000)) + 200_000 ** (1 - alpha) / (alpha - 1)
    expected = [len(words) / zeta * rank**-alpha for rank in (1, 2, 3, 4)]
    assert words.count("....") == pytest.approx(expected[0], abs=1)
    assert [words.count(answer) for answer in item.answers] == pytest.approx(expected[1:], abs=1)


@pytest.mark.parametrize("alpha", [1.3, 2.0, 4.0])
def test_no_word_ties_with_the_top_at_any_length(alpha):
    task = TASKS.create({"name": "frequent_words", "alpha": alpha})
    fewest = fewest_tokens(task)
    for n_tokens in range(fewest, fewest + 120):
        counts = [count for _, count in ranking_of(task.item(WORDS, n_tokens, 0, 0).text)]
        assert counts[2] > counts[3]


# --- refusals ---------------------------------------------------------------------------------------------------


def test_too_few_tokens_are_refused_with_how_many_it_takes(name, task):
    with pytest.raises(ValueError, match=rf"task '{name}' does not fit in 5 tokens: this item needs \d+"):
        task.item(WORDS, 5, 0, 0)
    needed = fewest_tokens(task)
    item = task.item(WORDS, needed, 0, 0)
    assert len(item.prompt) == needed and sorted(solve(name, item.text)) == sorted(item.answers)
    with pytest.raises(ValueError, match="does not fit"):
        task.item(WORDS, needed - 1, 0, 0)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"name": "needle_multikey", "n_keys": 1}, "n_keys is 1, but must be at least 2"),
        ({"name": "needle_multikey", "n_keys": 5000}, "names that look alike, not 5000"),
        ({"name": "needle_multivalue", "n_values": 0}, "n_values is 0, but must be at least 2"),
        ({"name": "needle_multiquery", "n_queries": 1}, "n_queries is 1, but must be at least 2"),
        ({"name": "variable_tracking", "n_hops": 0}, "n_hops is 0, but must be at least 1"),
        ({"name": "frequent_words", "alpha": 1.0}, "alpha is 1, but must be above 1"),
        ({"name": "needle_multikey", "keys": 3}, "has no parameter 'keys'; did you mean 'n_keys'?"),
    ],
)
def test_parameters_that_make_no_task_are_refused(choice, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        TASKS.create(choice)


def test_depths_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="not between 0"):
        TASKS.create("needle").item(WORDS, 300, 0, 0, depth=1.5)
    with pytest.raises(ValueError, match="'variable_tracking' has no depth"):
        TASKS.create("variable_tracking").item(WORDS, 300, 0, 0, depth=0.5)


def test_a_model_without_a_tokenizer_is_refused(name, task):
    with pytest.raises(ValueError, match=f"'{name}' is text, and this model has no tokenizer"):
        task.item(None, 300, 0, 0)


# --- scores -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answer", "is_there"),
    [
        ("12345", "12345", True),
        ("It is 12345.", "12345", True),
        (' "12345", I think', "12345", True),
        ("912345", "12345", False),
        ("123456", "12345", False),
        ("x12345", "12345", False),
        ("12345\n67", "12345", True),
        ("", "12345", False),
        ("TOKARI, then", "tokari", True),
        ("var tokari = 5", "TOKARI", True),
        ("tokarido", "TOKARI", False),
        ("a-b.c", "a.b", False),
        ("9b1deb4d-3b7d-4bad-9bdd-2b0d7b3dcb6d", "9B1DEB4D-3B7D-4BAD-9BDD-2B0D7B3DCB6D", True),
    ],
)
def test_only_whole_words_and_numbers_count(text, answer, is_there):
    assert contains(text, answer) is is_there


@pytest.mark.parametrize(
    ("text", "score"), [("11, 22, 33 and 44", 1.0), ("44 22", 0.5), ("11 11 11", 0.25), ("5", 0.0), ("1122 3344", 0.0)]
)
def test_the_score_is_the_share_of_answers_found_in_any_order(text, score):
    assert quality_tasks.Needle().score(text, SimpleNamespace(answers=("11", "22", "33", "44"))) == score


@pytest.mark.parametrize("name", ["passkey", "needle"])
def test_the_easy_tasks_are_mostly_solved_by_the_small_model(smollm2, name):
    import torch

    task, scores = TASKS.create(name), []
    for item in items(task, smollm2.tokenizer, 300, samples=3, seed=0):
        ids = torch.tensor([item.prompt])
        out = smollm2.model.generate(ids, attention_mask=ids * 0 + 1, max_new_tokens=8, do_sample=False)
        scores.append(task.score(smollm2.tokenizer.decode(out[0, ids.shape[1] :]), item))
    assert sum(scores) >= 2


# --- what texts are made of -------------------------------------------------------------------------------------


def test_filler_is_cut_at_the_front_and_goes_round():
    filler = task_texts.Filler(
        ("One two.", "Three four five.", "Six."), end=2
    )  # circle: Six. One two. Three four five.
    assert filler.words(0) == []
    assert filler.words(3) == ["Three", "four", "five."]
    assert filler.words(4) == ["... two.", "Three", "four", "five."]
    assert filler.words(6) == ["Six.", "One", "two.", "Three", "four", "five."]
    assert " ".join(filler.words(8)) == "... four five. Six. One two. Three four five."
    assert " ".join(filler.words(13)) == "... five. Six. One two. Three four five. Six. One two. Three four five."


def test_needles_are_put_between_sentences_in_order_of_depth():
    words = ["A", "b.", "C", "d.", "E", "f."]
    assert task_texts.hide(words, [(0.5, "Y."), (0.0, "X."), (1.0, "Z.")]) == "X. A b. Y. C d. E f. Z."
    assert task_texts.hide(words, [(0.3, "Y."), (0.3, "X.")]) == "A b. Y. X. C d. E f."
    assert task_texts.hide([], [(0.9, "Y."), (0.1, "X.")]) == "X. Y."


def test_the_prose_is_plain_sentences_and_enough_of_them():
    sentences = task_texts.plain_sentences()
    assert len(set(sentences)) == len(sentences) > 300
    assert all(re.fullmatch(r"[A-Z][^.\d_`]*\.", sentence) for sentence in sentences)


def test_made_up_names_are_different():
    rng = random.Random(0)
    coded = task_texts.coded_words(rng)
    drawn = [next(coded) for _ in range(5000)]
    assert len(set(drawn)) == 5000 and all(len(word) == 6 for word in drawn)
    assert len(set(task_texts.two_word_names(rng, 1000))) == 1000
    assert len(set(task_texts.ADJECTIVES)) == len(task_texts.ADJECTIVES)
    assert len(set(task_texts.NOUNS)) == len(task_texts.NOUNS)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=400), st.integers(0, 3000))
def test_the_largest_that_fits_is_what_trying_every_size_finds(steps, limit):
    sizes = [0]
    for step in steps:
        sizes.append(sizes[-1] + step)

    def size_of(n):
        return sizes[n] if n < len(sizes) else sizes[-1] + 10 * (n - len(sizes) + 1)

    found = task_texts.largest_that_fits(size_of, limit)
    assert found == max(n for n in range(3001) if size_of(n) <= limit)


def test_sizing_takes_few_looks():
    looks = []
    task_texts.largest_that_fits(lambda n: looks.append(n) or 40 + n * 13 // 10, 128_000)
    assert len(looks) < 30


def test_zeta_is_what_is_known_of_it():
    assert task_texts.zeta(2.0) == pytest.approx(1.6449340668482264, abs=1e-9)  # pi ** 2 / 6
    assert task_texts.zeta(4.0) == pytest.approx(1.0823232337111382, abs=1e-9)  # pi ** 4 / 90
    assert task_texts.zeta(1.5) == pytest.approx(2.612375348685488, abs=1e-6)


def test_a_task_of_ones_own_that_does_not_say_whether_it_has_depth_is_refused(tmp_path, monkeypatch):
    (tmp_path / "own_task.py").write_text("class Mine:\n    def item(self): ...\n    def score(self): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="'own_task:Mine' lacks has_depth"):
        TASKS.create("own_task:Mine")


# --- prose ------------------------------------------------------------------------------------------------------


def test_prose_is_a_text_of_that_length_another_for_each_item_and_seed(smollm2):
    task = TASKS.create({"name": "prose_perplexity", "n_scored": 20})
    made = [task.item(smollm2.tokenizer, 300, seed, index) for seed in (0, 1) for index in range(3)]
    assert all(len(item.prompt) == 300 and item.n_question == 21 for item in made)
    assert len({tuple(item.prompt) for item in made}) == 6
    assert made[1] == task.item(smollm2.tokenizer, 300, 0, 1)
    assert all(len(item.text.split()) > 150 for item in made)


def test_prose_that_cannot_be_scored_is_refused():
    task = TASKS.create("prose_perplexity")
    with pytest.raises(ValueError, match="does not fit in 65 tokens: this item needs 66"):
        task.item(WORDS, 65, 0, 0)
    with pytest.raises(ValueError, match="has no depth"):
        task.item(WORDS, 650, 0, 0, 0.5)
    with pytest.raises(ValueError, match="no tokenizer"):
        task.item(None, 650, 0, 0)
    for wrong in (0, 2.5, "4"):
        with pytest.raises(ValueError, match="n_scored must be a whole number from 1 on"):
            TASKS.create({"name": "prose_perplexity", "n_scored": wrong})
    with pytest.raises(ValueError, match="would repeat it"):
        task.item(WORDS, 100_000, 0, 0)
    with pytest.raises(ValueError, match="so no item 5000"):
        task.item(WORDS, 650, 0, 5000)
    with pytest.raises(TypeError, match="scored by perplexity"):
        task.score("", None)


def test_prose_of_one_seed_begins_in_different_places():
    task = TASKS.create("prose_perplexity")
    first = [tuple(task.item(WORDS, 90, 4, index).prompt) for index in range(100)]
    other = [tuple(task.item(WORDS, 90, 0, index).prompt) for index in range(100)]
    assert len(set(first)) == 100
    assert len(set(first) & set(other)) < 50
