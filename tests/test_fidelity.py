"""Reading one text with two caches says how far they are apart: against one plain forward pass over the whole text."""

from __future__ import annotations

import math

import pytest
import torch

from fidelity import attention_recall, compare, mean_pages
from generation import HFCache
from intervals import wilson
from kv_paging import MeasuredPagedCache, PagedKVCache
from reading import Reading, answer, read_text

N_FORCED, SIZE = 12, 8


@pytest.fixture(scope="module")
def tiny(tiny_llama):
    return tiny_llama


@pytest.fixture(scope="module")
def text(tiny):
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, tiny.shape.vocab_size, (2, 90), generator=generator).tolist()


def paged(tiny, **settings):
    options = {"page_size": SIZE, "max_gpu_pages": 5, "link": "memory"} | settings
    return MeasuredPagedCache(PagedKVCache(tiny.model.config, **options), tiny)


def every_page(tiny):
    return paged(tiny, max_gpu_pages=20)


@pytest.fixture(scope="module")
def whole(tiny, text):
    """Log-probabilities and attention of one forward pass over the whole text, with transformers' eager attention."""
    tiny.model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            out = tiny.model(torch.tensor(text), output_attentions=True)
    finally:
        tiny.model.set_attn_implementation("sdpa")
    return out.logits.log_softmax(-1), out.attentions


@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("make", [lambda tiny: HFCache("dynamic", tiny), paged, every_page], ids=["HF", "paged", "all"])
def test_token_by_token_an_exact_cache_says_what_one_pass_over_the_text_says(tiny, text, whole, make, chunk):
    reading = read_text(tiny, make(tiny), text, N_FORCED, chunk)
    torch.testing.assert_close(reading.log_probs, whole[0][:, -N_FORCED:], atol=2e-5, rtol=1e-4)
    figures = compare(reading, Reading(whole[0][:, -N_FORCED:], []), text, N_FORCED)
    assert figures["n_tokens"] == 2 * N_FORCED
    assert 0 <= figures["kl_mean"] <= figures["kl_max"] < 1e-6
    assert figures["top1_agreement"] == 1.0
    assert figures["perplexity"] == pytest.approx(figures["baseline_perplexity"], rel=1e-4)
    same = compare(reading, reading, text, N_FORCED)
    assert (same["kl_mean"], same["kl_low"], same["kl_high"], same["kl_max"]) == (0.0, 0.0, 0.0, 0.0)


def test_an_approximation_is_as_far_from_the_baseline_as_its_distributions_are(tiny, text, whole):
    reading = read_text(tiny, paged(tiny, selector="window", attention_pages=3), text, N_FORCED, None)
    figures = compare(reading, Reading(whole[0][:, -N_FORCED:], []), text, N_FORCED)
    base, run = whole[0][:, -N_FORCED:].double(), reading.log_probs.double()
    by_hand = torch.nn.functional.kl_div(run, base, reduction="none", log_target=True).sum(-1)
    assert figures["kl_mean"] == pytest.approx(by_hand.mean().item())
    assert figures["kl_max"] == pytest.approx(by_hand.max().item()) and figures["kl_max"] > 1e-6
    same = [int(a.argmax()) == int(b.argmax()) for a, b in zip(base.flatten(0, 1), run.flatten(0, 1), strict=True)]
    assert figures["top1_agreement"] == pytest.approx(sum(same) / len(same))
    assert (figures["top1_low"], figures["top1_high"]) == pytest.approx(wilson(sum(same) / len(same), len(same)))
    assert 0 < figures["kl_low"] < figures["kl_mean"] < figures["kl_high"] < figures["kl_max"]
    assert (figures["n_tokens"], figures["perplexity_tokens"]) == (2 * N_FORCED, 2 * (N_FORCED - 1))
    for name, said in (("perplexity", run), ("baseline_perplexity", base)):
        of_text = [
            said[row, step, text[row][90 - N_FORCED + step + 1]].item()
            for row in range(2)
            for step in range(N_FORCED - 1)
        ]
        assert figures[name] == pytest.approx(math.exp(-sum(of_text) / len(of_text)))


def true_shares(attentions, step):
    """By layer and row, each page's share of the attention of one position, averaged over heads."""
    position = 90 - N_FORCED + step
    return [
        [float(part.sum()) for part in weights[row, :, position, : position + 1].mean(0).split(SIZE)]
        for weights in attentions
        for row in range(2)
    ]


def test_recall_is_counted_in_true_attention(tiny, text, whole):
    truth = read_text(tiny, every_page(tiny), text, N_FORCED, None)
    for step, of_step in enumerate(truth.pages):
        for read, expected in zip(of_step, true_shares(whole[1], step), strict=True):
            shares = dict(zip(read.pages, read.shares().mean(1).tolist(), strict=True))
            assert [shares[page] for page in sorted(shares)] == pytest.approx(expected, abs=1e-5)
    run = read_text(tiny, paged(tiny, selector="window", attention_pages=4), text, N_FORCED, None)
    mass, pages = [], []
    for step in range(N_FORCED):
        for true in true_shares(whole[1], step):
            read = {0, len(true) - 3, len(true) - 2, len(true) - 1}  # a sink, and the last three
            mass.append(sum(true[page] for page in read) / sum(true))
            best = sorted(range(len(true)), key=lambda page: -true[page])[:4]
            pages.append(len(read & set(best)) / 4)
    recall = attention_recall(run.pages, truth.pages)
    assert recall["attention_mass_recall"] == pytest.approx(sum(mass) / len(mass), abs=1e-5)
    assert recall["page_recall"] == pytest.approx(sum(pages) / len(pages), abs=0.02)  # near-equal shares may swap
    assert recall["attended_pages"] == 4 and recall["pages"] == mean_pages(run.pages)["pages"]
    whole_of_it = attention_recall(truth.pages, truth.pages)
    assert (whole_of_it["attention_mass_recall"], whole_of_it["page_recall"]) == (pytest.approx(1.0), 1.0)
    assert whole_of_it["attended_pages"] == whole_of_it["pages"] == mean_pages(truth.pages)["attended_pages"]


def test_heads_that_choose_their_own_pages_are_held_against_their_own_attention(tiny, text, whole):
    truth = read_text(tiny, every_page(tiny), text, N_FORCED, None)
    settings = {"selector": "quest", "granularity": "kv_head", "attention_pages": 4}
    run = read_text(tiny, paged(tiny, **settings), text, N_FORCED, None)
    n_kv, mass, among_best = tiny.shape.n_kv_heads, [], []
    for step, reads in enumerate(run.pages):
        position = 90 - N_FORCED + step
        for place, read in enumerate(reads):
            layer, row = divmod(place, 2)
            weights = whole[1][layer][row, :, position, : position + 1]
            for head, of_head in enumerate(weights.reshape(n_kv, -1, weights.shape[-1])):
                shares = [float(part.sum()) for part in of_head.mean(0).split(SIZE)]
                mine = {page for page, was in zip(read.pages, read.seen()[:, head].tolist(), strict=True) if was}
                assert len(mine) == 4 and {0, len(shares) - 1} <= mine  # the sink and the open page
                mass.append(sum(shares[page] for page in mine) / sum(shares))
                best = sorted(range(len(shares)), key=lambda page: -shares[page])[:4]
                among_best.append(len(mine & set(best)) / 4)
    assert any(not read.seen().all() for reads in run.pages for read in reads)  # heads did differ
    recall = attention_recall(run.pages, truth.pages, by_head=True)
    assert recall["attention_mass_recall"] == pytest.approx(sum(mass) / len(mass), abs=1e-5)
    assert recall["page_recall"] == pytest.approx(sum(among_best) / len(among_best), abs=0.02)
    assert recall["attended_pages"] == mean_pages(run.pages)["attended_pages"] == 4


def test_an_answer_is_that_of_plain_greedy_generation_wherever_the_question_begins(tiny, text):
    prompt = text[0][:60]
    ids = torch.tensor([prompt])
    plain = tiny.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=9)
    expected = plain[0, 60:].tolist()
    for n_question in (1, 13):
        for make in (lambda: HFCache("dynamic", tiny), lambda: paged(tiny)):
            said = answer(tiny, make(), prompt, n_question, 9, (), 16)
            assert said.tokens == expected
    assert len(said.pages) == 13 + 8  # the last word is not fed back
    until_there = expected[: expected.index(expected[4])]
    assert answer(tiny, paged(tiny), prompt, 1, 9, {expected[4]}, None).tokens == until_there


def test_a_question_is_put_to_the_selector_and_not_read_by_prefill(tiny, text):
    prompt = text[0][:80]
    said = answer(tiny, paged(tiny, selector="window", attention_pages=3), prompt, 6, 1, (), None)
    assert len(said.pages) == 6
    assert all(len(read.pages) == 3 < read.n_there for reads in said.pages for read in reads)


def test_a_cache_without_pages_has_no_recall(tiny, text):
    reading = read_text(tiny, HFCache("dynamic", tiny), text, 2, None)
    truth = read_text(tiny, HFCache("dynamic", tiny), text, 2, None)
    nothing = {"attended_pages": None, "pages": None}
    assert mean_pages(reading.pages) == nothing
    assert attention_recall(reading.pages, truth.pages) == nothing | {
        "attention_mass_recall": None,
        "page_recall": None,
    }


def test_the_cache_is_no_longer_watched_afterwards(tiny, text):
    cache = paged(tiny)
    read_text(tiny, cache, text, 2, None)
    assert "attended" not in vars(cache.cache)


def test_one_token_has_no_perplexity(tiny, text):
    reading = read_text(tiny, HFCache("dynamic", tiny), text, 1, None)
    figures = compare(reading, reading, text, 1)
    assert figures["perplexity"] is None and figures["n_tokens"] == 2


def said(*rows):
    return Reading(torch.tensor([rows]).log(), [])


def test_what_is_no_distribution_is_an_error_and_not_a_difference_of_nothing():
    fine, broken = said([0.5, 0.5], [0.25, 0.75]), said([0.5, 0.5], [math.nan, 0.75])
    with pytest.raises(ValueError, match="the run's next-token distribution has NaN in it"):
        compare(broken, fine, [[0, 1]], 2)
    with pytest.raises(ValueError, match="the baseline's"):
        compare(fine, broken, [[0, 1]], 2)


def test_a_token_that_only_one_of_them_rules_out():
    """0 * log 0 is 0, and log(1 / 0) is without bound."""
    both, first = said([0.5, 0.5], [0.5, 0.5]), said([0.5, 0.5], [1.0, 0.0])
    assert compare(both, first, [[0, 1]], 2)["kl_max"] == pytest.approx(math.log(2))
    with pytest.raises(ValueError, match="no probability at all to a token that the baseline thinks possible"):
        compare(first, both, [[0, 1]], 2)
