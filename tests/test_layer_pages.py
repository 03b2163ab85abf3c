"""A layer's pages against plain tensors: whatever is appended, cropped, repeated or reordered, with padding or without,
they hold the same positions, and attention over them is attention over those positions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cache_settings import Paging
from layer_pages import LayerPages
from links import MEMORY
from padding import kept_of, read_padding
from page_selectors import Quest
from page_store import ThreadTransport
from recorder import Recorder

N_KV_HEADS, HEAD_DIM = 2, 4
TRANSPORT = ThreadTransport(MEMORY)


def make_pages(batch_size: int = 1, selector=None, **paging) -> LayerPages:
    recorder = Recorder()
    recorder.begin_step("decode")
    settings = {"page_size": 3, "max_gpu_pages": 3, "staging_pages": 1, "link": "memory", **paging}
    return LayerPages(
        0,
        Paging(**settings),
        recorder,
        TRANSPORT,
        batch_size,
        (N_KV_HEADS, HEAD_DIM),
        torch.float32,
        torch.device("cpu"),
        selector=selector,
    )


def read_all(sequence) -> dict[int, torch.Tensor]:
    """Every page of a sequence, as attention is given it."""
    pages = {}
    for wave in sequence.resolve(list(range(sequence.n_pages)), sequence.pinned_pages(), lambda wanted: None):
        pages |= {page: sequence.store.pool[slot].clone() for page, slot in wave.items()}
    return pages


class PagesAgainstTensors(RuleBasedStateMachine):
    """The model is one tensor [2, B, K, positions, D] and a mask [B, positions]."""

    @initialize(batch_size=st.integers(1, 3), page_size=st.integers(1, 5), in_memory=st.none() | st.integers(0, 2))
    def start(self, batch_size, page_size, in_memory):
        self.generator = torch.Generator().manual_seed(page_size)
        self.selector = Quest()
        self.pages = make_pages(batch_size, self.selector, page_size=page_size, host_pages=in_memory)
        self.states = torch.zeros(2, batch_size, N_KV_HEADS, 0, HEAD_DIM)
        self.mask = torch.ones(batch_size, 0, dtype=torch.bool)

    @property
    def n_rows(self) -> int:
        return self.states.shape[1]

    def padding(self, past):
        """`(past, new)` of the rows' masked positions, as the layer is given them."""
        found = read_padding(self.mask[:, None, None, :], past)
        return (None, None) if found is None else (found.past, found.new)

    @rule(length=st.integers(1, 13), data=st.data())
    def append(self, length, data):
        new = torch.randn(2, self.n_rows, N_KV_HEADS, length, HEAD_DIM, generator=self.generator)
        mask = torch.ones(self.n_rows, length, dtype=torch.bool)
        if data.draw(st.booleans(), label="padded"):
            cells = st.lists(st.booleans(), min_size=mask.numel(), max_size=mask.numel())
            mask = torch.tensor(data.draw(cells, label="mask")).reshape(mask.shape)
        self.mask = torch.cat([self.mask, mask], dim=1)
        self.pages.append(new[0], new[1], self.padding(self.mask.shape[1] - length)[1])
        self.states = torch.cat([self.states, new], dim=3)

    @rule(share=st.floats(0, 1))
    def truncate(self, share):
        kept = int(share * self.mask.shape[1])
        self.pages.truncate(kept)
        self.states, self.mask = self.states[:, :, :, :kept], self.mask[:, :kept]

    @rule(data=st.data())
    def select_rows(self, data):
        rows = data.draw(st.lists(st.integers(0, self.n_rows - 1), min_size=1, max_size=4), label="rows")
        self.pages.select_rows(rows)
        self.states, self.mask = self.states[:, rows], self.mask[rows]

    @rule()
    def attend(self):
        """The pages give back what the rows hold; this also moves pages in and out."""
        for row, sequence in enumerate(self.pages.sequences):
            pages = read_all(sequence)
            assert sorted(pages) == list(range(sequence.n_pages))
            if pages:
                together = torch.cat([pages[page] for page in sorted(pages)])[: sequence.n_tokens].permute(1, 2, 0, 3)
                assert torch.equal(together, self.states[:, row][:, :, self.mask[row]])

    @rule(data=st.data())
    def prefetch(self, data):
        for sequence in self.pages.sequences:
            guessed = data.draw(st.lists(st.integers(-1, 12), max_size=4, unique=True))
            absent = [page for page in guessed if page in sequence.absent(guessed)]
            sequence.prefetch(absent, guessed, may_evict=data.draw(st.booleans()))

    @precondition(lambda self: self.mask.shape[1])
    @rule(data=st.data())
    def mask_more(self, data):
        """Positions that were stored and are masked now, as when a padded context was written without its mask."""
        position = data.draw(st.integers(0, self.mask.shape[1] - 1))
        self.mask[:, position] = False
        self.pages.agree_with(self.padding(self.mask.shape[1])[0])

    @rule()
    def clear(self):
        self.pages.clear()
        self.states, self.mask = self.states[:, :, :, :0], self.mask[:, :0]

    @invariant()
    def all_positions_are_there(self):
        keys, values = self.pages.materialise()
        expected = torch.where(self.mask[None, :, None, :, None], self.states, 0.0)
        assert torch.equal(torch.stack([keys, values]), expected)

    @invariant()
    def the_budget_holds(self):
        for sequence in self.pages.sequences:
            assert len(sequence.table.resident) <= self.pages.paging.max_gpu_pages
            slots = [*sequence.table.resident.values(), *sequence.table.staged.values(), *sequence.table.free_slots]
            first = sequence.lane * self.pages.paging.slots
            assert sorted(slots) == list(range(first, first + self.pages.paging.slots))

    @invariant()
    def the_digests_are_those_of_the_full_pages(self):
        for row, sequence in enumerate(self.pages.sequences):
            stored, size = self.states[0, row][:, self.mask[row]], self.pages.paging.page_size
            assert sequence.n_sealed == stored.shape[1] // size
            if sequence.n_sealed:
                full = stored[:, : sequence.n_sealed * size].unflatten(1, (-1, size)).transpose(0, 1)
                assert torch.equal(self.pages.digests.of(row, sequence.n_sealed), self.selector.digest(full))

    @invariant()
    def a_host_row_is_taken_as_long_as_a_sequence_has_it(self):
        rows = [row for sequence in self.pages.sequences for row in sequence.host_rows]
        assert self.pages.store.host.n_taken == len(set(rows))
        assert len(self.pages.sequences) == self.n_rows


TestPagesAgainstTensors = PagesAgainstTensors.TestCase
TestPagesAgainstTensors.settings = settings(max_examples=60, stateful_step_count=20)


def test_rows_that_are_repeated_share_their_full_pages_on_the_host():
    pages = make_pages()
    pages.append(*torch.randn(2, 1, N_KV_HEADS, 10, HEAD_DIM))
    pages.select_rows([0, 0, 0])
    assert pages.store.host.n_taken == 3  # 10 positions are three full pages of 3, and an open one
    pages.append(*torch.randn(2, 3, N_KV_HEADS, 2, HEAD_DIM))
    assert pages.store.host.n_taken == 3 + 3  # each row filled a page of its own


def test_a_page_that_is_cropped_into_is_written_to_the_host_again_when_it_fills():
    pages = make_pages()
    states = torch.randn(2, 1, N_KV_HEADS, 9, HEAD_DIM)
    pages.append(*states)
    pages.truncate(7)
    other = torch.randn(2, 1, N_KV_HEADS, 12, HEAD_DIM)
    pages.append(*other)
    expected = torch.cat([states[:, :, :, :7], other], dim=3)
    (sequence,) = pages.sequences
    assert [sequence.table.slot(page) for page in (1, 2)] == [None, None]  # they come from the host
    assert torch.equal(torch.stack(pages.materialise()), expected)


def test_padding_that_was_not_stored_cannot_be_attended_to_later():
    pages = make_pages(2)
    pages.append(*torch.randn(2, 2, N_KV_HEADS, 8, HEAD_DIM), [[0, 1, 2], []])
    for masked in (None, [[0, 1], []]):
        with pytest.raises(ValueError, match=r"row 0: positions [02]\.\.2 were padding"):
            pages.agree_with(masked)
    pages.agree_with([[0, 1, 2], []])


@pytest.mark.parametrize(
    ("masked", "past", "length", "kept"),
    [
        ([], 5, 3, slice(0, 3)),
        ([0, 1], 0, 4, slice(2, 4)),
        ([0, 1, 2, 3], 0, 4, slice(0, 0)),
        ([0, 1, 4], 4, 3, slice(1, 3)),
        ([6], 4, 3, slice(0, 2)),
        ([5], 4, 3, [0, 2]),
        ([9], 4, 3, slice(0, 3)),
    ],
)
def test_what_is_kept_of_new_positions_is_what_is_not_masked(masked, past, length, kept):
    assert kept_of(masked, past, length) == kept
