"""Plain LRU is asked afterwards, and says what it would have said at once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import recorder as recorder_module
from recorder import Recorder
from shadow_lru import ShadowLRU
from yardstick import Yardstick

PAGES = st.integers(0, 7)
EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), st.lists(PAGES, unique=True), st.sets(PAGES), st.booleans()),
        st.tuples(st.just("open"), PAGES, st.sets(PAGES)),
        st.tuples(st.just("crop"), st.integers(0, 8)),
        st.tuples(st.just("copy")),
        st.tuples(st.just("read")),
    ),
    max_size=30,
)
COUNTED = "shadow_hits", "shadow_slots_hits", "lru_hits"


def decoding() -> Recorder:
    recorder = Recorder()
    recorder.begin_step("decode")
    return recorder


def counts_of(recorder: Recorder) -> dict[str, int]:
    decode = recorder.snapshot("decode")
    return {name: decode[name] for name in COUNTED}


@given(EVENTS, st.integers(1, 4), st.integers(0, 3), st.sampled_from([0, 2000, 10**8]))
def test_later_counts_what_asking_at_once_would(events, budget, staging, most_later):
    recorder, expected = decoding(), dict.fromkeys(COUNTED, 0)
    made = Yardstick(recorder, 0, budget, budget + staging)
    naive = ShadowLRU(budget), ShadowLRU(budget + staging)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recorder_module, "MOST_LATER_BYTES", most_later)
        for kind, *given in events:
            if kind == "ask":
                held, by_all_slots = (shadow.ask(*given) for shadow in naive)
                asked, hits = made.asked(*given), given[0][::2]
                recorder.count(0, lru_hits=asked.hit(hits[:1]))
                recorder.count(0, lru_hits=asked.hit(hits[1:]))
                found = len(held), len(by_all_slots), len(held.intersection(hits))
                expected = {name: expected[name] + n for name, n in zip(COUNTED, found, strict=True)}
            elif kind == "open":
                made.opened(*given)
                for shadow in naive:
                    shadow.insert(*given)
            elif kind == "crop":
                made.truncate(*given)
                for shadow in naive:
                    shadow.truncate(*given)
            elif kind == "copy":
                left_behind, made = made, made.copy()
                left_behind.opened(99, ())
            else:
                assert counts_of(recorder) == expected
    assert counts_of(recorder) == expected


@given(st.lists(st.integers(0, 12), min_size=1), st.integers(1, 8))
def test_who_holds_all_hits_every_page_that_was_opened(lengths, budget):
    """Contexts that grow and are cropped: pages 0..n-1 are opened in order, each once while it is there."""
    recorder, n_pages = decoding(), 0
    made = Yardstick(recorder, 0, budget, budget)
    for length in lengths:
        for page in range(n_pages, length):
            made.opened(page, ())
        if length < n_pages:
            made.truncate(length)
        n_pages = length
        if made.holds_all:
            before = counts_of(recorder)["shadow_hits"]
            made.asked(range(n_pages), (), True)
            assert counts_of(recorder)["shadow_hits"] == before + n_pages
        else:
            assert max(lengths) > budget


def test_what_was_asked_counts_for_its_own_step_and_layer_whenever_it_is_read():
    recorder = Recorder()
    made = [Yardstick(recorder, layer, 4, 4) for layer in (0, 1)]
    for n_pages in (1, 2):
        recorder.begin_step("decode")
        for layer, one in enumerate(made):
            one.opened(n_pages - 1, ())
            one.asked(range(n_pages - layer), (), True)
    assert [step["shadow_hits"] for step in recorder.step_dicts()] == [1, 3]
    assert [layer["shadow_hits"] for layer in recorder.layer_dicts()] == [3, 1]


def test_a_page_that_turns_out_to_be_a_hit_after_plain_lru_was_asked_is_counted_once():
    recorder = decoding()
    made = Yardstick(recorder, 0, 4, 4)
    made.opened(0, ())
    asked = made.asked([0], (), True)
    waits = 0.0
    assert counts_of(recorder)["lru_hits"] == 0
    recorder.waited(0, lambda: waits, 1, 0, lambda: asked.hit([0]))
    recorder.settle()
    assert counts_of(recorder)["lru_hits"] == 1


def test_forgetting_the_counts_does_not_forget_what_plain_lru_was_asked():
    recorder = decoding()
    made = Yardstick(recorder, 0, 1, 1)
    made.opened(0, ())
    made.opened(1, ())
    recorder.reset()
    recorder.begin_step("decode")
    made.asked([0], (), True)
    assert counts_of(recorder)["shadow_hits"] == 0
    made.asked([0], (), True)
    assert counts_of(recorder)["shadow_hits"] == 1


def test_no_more_is_kept_for_later_than_the_limit_also_of_requests_that_repeat(monkeypatch):
    recorder, kept = decoding(), []
    monkeypatch.setattr(recorder_module, "MOST_LATER_BYTES", 40_000)
    made = Yardstick(recorder, 0, 4, 6)
    for _ in range(500):
        made.asked(range(4), (), True, hits=range(4))
        kept.append(len(recorder._later))
    assert 50 < max(kept) <= 100
