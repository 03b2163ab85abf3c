"""Whatever fails, the run ends with a clear error, no torn context is read again, and a reset cache is as good as new.

A fault is put in at every place where one can be: the copy that fails is each one in turn, memory and disk end at each
allocation, Ctrl-C comes at calls all over the code, and what a user can bring (a policy, a selector, a predictor) does
everything that it should not.
"""

from __future__ import annotations

import contextlib
import errno
import inspect
import json
import os
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from tiny_models import CONFIGS, continue_prompt, make_model, make_prompt
from transformers import DynamicCache

import host_pages
import main
import page_store
from host_pages import DiskTierFailed
from kv_paging import PagedKVCache
from metrics import Timing
from page_policies import LRU, ReplacementPolicy
from page_predictors import QuietPredictor
from page_selectors import MeanKey, Selector
from page_store import TransferFailed
from predictive_prefetch import PrefetchingKVCache
from registry import UnknownName
from utils import is_out_of_memory

pytestmark = pytest.mark.timeout(100)  # a wait that never ends is a failure as well

PROJECT = Path(main.__file__).parent
SMALL = {"page_size": 8, "max_gpu_pages": 3, "staging_pages": 2, "link": "memory"}
PREDICTIVE = {"predictor": "last_step", "prefetch_k": 2}
QUEST = {"selector": "quest", "attention_pages": 4}
PROMPT, NEW = make_prompt(44), 6
attached_or_not = pytest.mark.parametrize("attach", [True, False], ids=["attached", "not_attached"])


@pytest.fixture(scope="module")
def llama():
    return make_model(CONFIGS["llama_gqa"])


@pytest.fixture(scope="module", params=["llama_gqa", "gemma3_hybrid_sliding"])
def model(request):
    return make_model(CONFIGS[request.param])


@pytest.fixture(scope="module")
def expected(llama):
    return continue_prompt(llama, PROMPT, NEW)


def make_cache(model, **paging):
    kind = PrefetchingKVCache if "predictor" in paging else PagedKVCache
    return kind(model.config, **SMALL | paging)


def generated(model, cache, attach=True, prompt=PROMPT, new_tokens=NEW, **options):
    with cache.attached(model) if attach else contextlib.nullcontext():
        return continue_prompt(
            model, prompt, new_tokens, past_key_values=cache, **{"prefill_chunk_size": 16, **options}
        )


def require_whole_books(cache):
    """Each slot of the pool is resident, staged or free, and each host row has as many references as owners."""
    for layer in cache.paged_layers:
        pages = layer.pages
        slots = []
        for sequence in pages.sequences:
            table = sequence.table
            slots += [*table.resident.values(), *table.staged.values(), *table.free_slots]
            assert len(table.resident) <= table.max_resident
            assert set(sequence.arriving) <= set(table.staged)
        assert sorted(slots) == list(range(len(pages.store.pool)))
        owned = Counter(row for sequence in pages.sequences for row in sequence.host_rows)
        assert pages.store.host._references == owned


def require_refused(cache, model):
    assert cache.torn
    with pytest.raises(RuntimeError, match=r"call reset\(\) first"):
        cache.crop(-1)
    with pytest.raises(RuntimeError, match=r"call reset\(\) first"), torch.no_grad():
        model(PROMPT.ids, past_key_values=cache)


def require_as_new(cache, model, expected, attach=True):
    """After a reset nothing is held, and the prompt gives the tokens that it should."""
    cache.reset()
    assert cache.get_seq_length() == 0
    assert sum(layer.pages.store.host.n_taken for layer in cache.paged_layers if layer.pages is not None) == 0
    assert torch.equal(generated(model, cache, attach), expected)
    require_whole_books(cache)


# --- copies -------------------------------------------------------------------------------------------------------


class FailingCopy:
    """In place of `_copy_bytes`: copy number `fails` does not arrive. Notes how many there were."""

    def __init__(self, fails=None):
        self.fails, self.n_copies, self.original = fails, 0, page_store._copy_bytes

    def __call__(self, destination, source):
        self.n_copies += 1
        if self.n_copies == self.fails:
            raise OSError(f"copy {self.fails} broke off")
        self.original(destination, source)


def n_copies_of(model, monkeypatch, attach, paging):
    with monkeypatch.context() as patch:
        counted = FailingCopy()
        patch.setattr(page_store, "_copy_bytes", counted)
        cache = make_cache(model, **paging)
        generated(model, cache, attach)
        for transport in cache._transports.values():
            transport.busy_ms()  # waits for the last one
    return counted.n_copies


@attached_or_not
@pytest.mark.parametrize("paging", [{}, {"host_pages": 2}, PREDICTIVE], ids=["reactive", "on_disk", "predictive"])
def test_whichever_copy_fails_the_generation_ends_with_its_cause_or_did_not_need_it(
    llama, expected, paging, attach, monkeypatch
):
    """A page whose way to the host failed, and that is never asked for again, is missed by no one."""
    outcomes = Counter()
    n_copies = n_copies_of(llama, monkeypatch, attach, paging)
    assert n_copies >= 2 * 6  # both layers seal six pages
    for fails in range(1, n_copies + 1, 1 if attach and not paging else 3):
        cache = make_cache(llama, **paging)
        with monkeypatch.context() as patch:
            patch.setattr(page_store, "_copy_bytes", FailingCopy(fails))
            try:
                assert torch.equal(generated(llama, cache, attach), expected)
                outcomes["not needed"] += 1
                continue
            except TransferFailed as error:
                outcomes["raised"] += 1
                assert str(error) == f"copying a page failed: copy {fails} broke off"
                assert isinstance(error.__cause__, OSError)
        require_whole_books(cache)
        require_refused(cache, llama)
        require_as_new(cache, llama, expected, attach)
    assert outcomes["raised"] > outcomes["not needed"]


def test_a_crop_that_cannot_bring_its_page_back_leaves_a_torn_cache(llama, expected, monkeypatch):
    """The page that is open again was evicted, and its copy fails in the second layer, after the first was cropped."""
    cache = make_cache(llama)
    generated(llama, cache)
    for fails in (1, 2):
        with monkeypatch.context() as patch:
            patch.setattr(page_store, "_copy_bytes", FailingCopy(fails))
            with pytest.raises(TransferFailed, match=f"copy {fails} broke off"):
                cache.crop(-(44 + 5 - 12))  # 12 positions are left, one page and a half
        require_refused(cache, llama)
        require_as_new(cache, llama, expected)


@attached_or_not
@pytest.mark.parametrize("verb", ["reorder_cache", "batch_repeat_interleave", "batch_select_indices"])
@pytest.mark.parametrize("failing_layer", [0, 1])
def test_rows_that_only_some_layers_have_changed_are_refused(llama, verb, failing_layer, attach, monkeypatch):
    prompt = make_prompt(44, batch=2)
    expected = continue_prompt(llama, prompt, NEW)
    cache = make_cache(llama)
    assert torch.equal(generated(llama, cache, attach, prompt), expected)

    def fail(*arguments):
        raise MemoryError("no room for another pool")

    with monkeypatch.context() as patch:
        patch.setattr(cache.paged_layers[failing_layer].pages.store, "select_lanes", fail)
        with pytest.raises(MemoryError):
            getattr(cache, verb)(2 if verb == "batch_repeat_interleave" else torch.tensor([1, 0]))
    require_refused(cache, llama)
    cache.reset()
    assert torch.equal(generated(llama, cache, attach, prompt), expected)


def test_a_page_that_is_open_again_is_its_own_and_not_that_of_another_beam(llama):
    """Both rows share the pages of one prompt; then each writes its own into the page that a crop has opened."""
    caches = [make_cache(llama), DynamicCache(config=llama.config)]
    answers = []
    for cache in caches:
        with cache.attached(llama) if cache is caches[0] else contextlib.nullcontext(), torch.no_grad():
            for chunk in PROMPT.ids.split(16, dim=1):
                llama(chunk, past_key_values=cache)
            cache.batch_repeat_interleave(2)
            cache.crop(-32)  # 12 are left
            if cache is caches[0]:
                shared = [pages.sequences[0].host_rows == pages.sequences[1].host_rows for pages in paged(cache)]
                assert shared == [True, True]
            ids = torch.arange(10, 82).view(2, 36)
            for chunk in ids.split(12, dim=1):
                llama(chunk, past_key_values=cache)
            for step in range(5):
                logits = llama(torch.tensor([[50 + step], [90 - step]]), past_key_values=cache).logits
            answers.append(logits)
    torch.testing.assert_close(*answers, atol=2e-4, rtol=1e-4)
    require_whole_books(caches[0])
    for pages in paged(caches[0]):
        one, other = (sequence.host_rows for sequence in pages.sequences)
        assert one[0] == other[0] and not set(one[1:]) & set(other[1:])


def paged(cache):
    return [layer.pages for layer in cache.paged_layers]


# --- memory and disk ------------------------------------------------------------------------------------------------


class FailingCall:
    """In place of a function: call number `fails` raises, and all after it."""

    def __init__(self, original, fails, error):
        self.original, self.fails, self.error, self.n_calls = original, fails, error, 0

    def __call__(self, *arguments, **options):
        self.n_calls += 1
        if self.n_calls >= self.fails:
            raise self.error
        return self.original(*arguments, **options)


@contextlib.contextmanager
def host_memory_ends(monkeypatch, at_segment):
    """Host memory for segment number `at_segment`, of all layers together, is not there."""
    allocate = host_pages.HostPages._memory_segment
    n_segments = 0

    def allocate_or_fail(pages, n_rows):
        nonlocal n_segments
        n_segments += 1
        if n_segments < at_segment:
            return allocate(pages, n_rows)
        with monkeypatch.context() as full:
            error = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate many bytes")
            full.setattr(torch, "empty", FailingCall(torch.empty, 1, error))
            return allocate(pages, n_rows)

    with monkeypatch.context() as patch:
        patch.setattr(host_pages.HostPages, "_memory_segment", allocate_or_fail)
        yield


@attached_or_not
@pytest.mark.parametrize("at_segment", [1, 2, 3, 4])
def test_host_memory_that_ends_is_out_of_memory_with_the_bytes(llama, attach, at_segment, monkeypatch):
    """Nothing is reserved, so each layer takes 16 rows at a time: first for the first page, then for the 17th."""
    prompt = make_prompt(140)
    expected = continue_prompt(llama, prompt, NEW)
    cache = make_cache(llama)
    one_page = 2 * 2 * 8 * 16 * 4  # keys and values, heads, positions, channels, bytes
    with host_memory_ends(monkeypatch, at_segment), pytest.raises(MemoryError) as caught:
        generated(llama, cache, attach, prompt)
    assert is_out_of_memory(caught.value)
    assert f"there are no {16 * one_page:,} bytes of host memory for 16 pages" in str(caught.value)
    require_refused(cache, llama)
    cache.reset()
    assert torch.equal(generated(llama, cache, attach, prompt), expected)


@attached_or_not
@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system reserves space in another way")
def test_a_disk_that_is_full_in_the_middle_of_a_generation_ends_it_with_what_was_asked_for(
    llama, attach, tmp_path, monkeypatch
):
    prompt = make_prompt(140)
    expected = continue_prompt(llama, prompt, NEW)
    cache = make_cache(llama, host_pages=0, disk_dir=str(tmp_path))
    full = FailingCall(os.posix_fallocate, 3, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(DiskTierFailed, match=rf"16 pages of a layer could be made in {tmp_path}.*No space left"):
            generated(llama, cache, attach, prompt)
    assert full.n_calls == 3 and cache.get_seq_length() > 0  # each layer had a file for its first 16 pages
    assert os.listdir(tmp_path) == []
    require_refused(cache, llama)
    cache.reset()
    assert torch.equal(generated(llama, cache, attach, prompt), expected)


def test_a_result_says_pinned_only_if_the_host_pages_of_every_layer_are(llama, monkeypatch):
    """Systems limit pinned memory, so it is the later layers that do not get any."""
    empty = torch.empty

    def pin_twice(*arguments, pin_memory=False, **options):
        nonlocal n_pinned
        n_pinned += pin_memory
        if pin_memory and n_pinned > granted:
            raise RuntimeError("the limit of pinned memory is reached")
        return empty(*arguments, **options)

    monkeypatch.setattr(torch, "empty", pin_twice)
    pages = host_pages.HostPages
    monkeypatch.setattr(page_store, "HostPages", lambda shape, dtype, pinned, *where: pages(shape, dtype, True, *where))
    said = {}
    for granted in (0, 1, 2):
        n_pinned = 0
        cache = make_cache(llama)
        assert torch.equal(generated(llama, cache), continue_prompt(llama, PROMPT, NEW))
        timing = Timing.from_token_times([1.0, 2.0, 3.0], 1, "wall")
        said[granted] = cache.figures(timing)["cache"]["host_is_pinned"]
    assert said == {0: False, 1: False, 2: True}


# --- Ctrl-C, and errors of the model ----------------------------------------------------------------------------------


class InterruptAtCall:
    """Raises KeyboardInterrupt as the n-th call of a function of this project begins, in this thread.

    The interpreter looks for signals where a function begins. Between any two lines it does not: an interrupt put in
    there could come as a lock is about to be released, and the real one cannot.
    """

    modules = frozenset(str(path) for path in PROJECT.glob("*.py"))

    def __init__(self, at_call=None):
        self.at_call, self.n_calls, self.before = at_call, 0, None

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self._called)
        return self

    def __exit__(self, *error):
        sys.settrace(self.before)

    def _called(self, frame, event, argument):
        resumed = frame.f_code.co_flags & inspect.CO_GENERATOR  # perhaps to be closed, where errors go nowhere
        if frame.f_code.co_filename in self.modules and not resumed:
            self.n_calls += 1
            if self.n_calls == self.at_call:
                raise KeyboardInterrupt


def require_refused_or_whole(cache, naive):
    """Either the cache may not be used before it is reset, or it holds just what transformers' own holds by then."""
    try:
        cache.reorder_cache(torch.tensor([0]))
    except RuntimeError as refused:
        assert "call reset() first" in str(refused)
        return "refused"
    length = cache.get_seq_length()
    for layer, other in zip(cache.layers, naive.layers, strict=True):
        assert layer.get_seq_length() == length
        if layer in cache.paged_layers and length:
            for got, expected in zip(layer.pages.materialise(), (other.keys, other.values), strict=True):
                torch.testing.assert_close(got, expected[:, :, :length], atol=1e-3, rtol=1e-3)
    return "whole"


@attached_or_not
@pytest.mark.parametrize("paging", [{}, PREDICTIVE | QUEST], ids=["reactive", "predictive"])
def test_wherever_ctrl_c_comes_the_context_is_refused_or_whole_and_a_reset_cache_works(llama, paging, attach):
    naive = DynamicCache(config=llama.config)
    continue_prompt(llama, PROMPT, NEW, past_key_values=naive)
    undisturbed = generated(llama, make_cache(llama, **paging), attach)
    with InterruptAtCall() as counted:
        generated(llama, make_cache(llama, **paging), attach)
    assert counted.n_calls > 1000
    found = Counter()
    # How many calls there are depends on who waits for whom, so the last ones may not come.
    for at_call in range(7, counted.n_calls * 9 // 10, counted.n_calls // 60):
        cache = make_cache(llama, **paging)
        with InterruptAtCall(at_call), pytest.raises(KeyboardInterrupt):
            generated(llama, cache, attach)
        if "selector" not in paging:  # else later positions are not those of the naive cache
            found[require_refused_or_whole(cache, naive)] += 1
        require_as_new(cache, llama, undisturbed, attach)
    assert "selector" in paging or found["refused"] > found["whole"]


@attached_or_not
@pytest.mark.parametrize("verb", ["crop", "select", "reset"])
def test_wherever_ctrl_c_comes_while_a_cache_is_changed_it_can_be_reset(llama, expected, verb, attach):
    change = {
        "crop": lambda cache: cache.crop(-30),
        "select": lambda cache: cache.batch_repeat_interleave(3),
        "reset": lambda cache: cache.reset(),
    }[verb]
    cache = make_cache(llama, **QUEST)
    undisturbed = generated(llama, cache, attach)
    with InterruptAtCall() as counted:
        change(cache)
    for at_call in range(1, counted.n_calls, max(1, counted.n_calls // 40)):
        cache = make_cache(llama, **QUEST)
        generated(llama, cache, attach)
        with InterruptAtCall(at_call), pytest.raises(KeyboardInterrupt):
            change(cache)
        require_as_new(cache, llama, undisturbed, attach)


@attached_or_not
def test_an_error_between_two_layers_leaves_no_context_that_is_taken_for_whole(model, attach):
    """Also where only one layer is paged, or the first of them comes after others that are not."""
    naive = DynamicCache(config=model.config)
    expected = continue_prompt(model, PROMPT, NEW, past_key_values=naive)
    found = []
    for block in model.model.layers:
        cache = make_cache(model)
        calls = []

        def fail_in_the_second_chunk(module, inputs, calls=calls):
            calls.append(1)
            if len(calls) == 2:
                raise ZeroDivisionError("a bug of the model")

        hook = block.mlp.register_forward_pre_hook(fail_in_the_second_chunk)
        with pytest.raises(ZeroDivisionError):
            generated(model, cache, attach)
        hook.remove()
        found.append(require_refused_or_whole(cache, naive))
        require_as_new(cache, model, expected, attach)
    assert found == ["refused"] * (len(model.model.layers) - 1) + ["whole"]


# --- what users bring -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PolicyThatRaises(LRU):
    """Fails in one of its verbs."""

    verb: str = "victim"

    def insert(self, page):
        self._fail("insert")
        super().insert(page)

    def touch(self, page):
        self._fail("touch")
        super().touch(page)

    def victim(self, pinned):
        self._fail("victim")
        return super().victim(pinned)

    def remove(self, page):
        self._fail("remove")
        super().remove(page)

    def _fail(self, verb):
        if verb == self.verb and len(self._order) >= 2:
            raise LookupError(f"no idea how to {verb}")


@dataclass(frozen=True)
class PolicyThatNamesAPinnedPage(LRU):
    """Wants to evict the sink."""

    def victim(self, pinned):
        return 0


@dataclass(frozen=True)
class PolicyThatNamesNoPage(LRU):
    """Wants to evict what is not there."""

    def victim(self, pinned):
        return None


class PolicyWithoutVictim:
    """Has three of four verbs."""

    def insert(self, page): ...
    def touch(self, page): ...
    def remove(self, page): ...


class PolicyOfStubs(ReplacementPolicy):
    """Has the verbs of the protocol, and nothing in them."""

    def insert(self, page):
        pass


class SelectorThatRaises(MeanKey):
    """Fails."""

    def score(self, query, digests):
        raise LookupError("no idea")


class SelectorOfNan(MeanKey):
    """Scores that are no numbers."""

    def score(self, query, digests):
        return super().score(query, digests) * float("nan")


class SelectorOfHeadsAlone(MeanKey):
    """Forgets the query heads."""

    def score(self, query, digests):
        return super().score(query, digests).sum(2)


class SelectorOfOneGroup(MeanKey):
    """Sums over the query heads, and keeps the dimension."""

    def score(self, query, digests):
        return super().score(query, digests).sum(2, keepdim=True)


class SelectorOfOneDigest(MeanKey):
    """Makes one digest of all pages."""

    def digest(self, keys):
        return super().digest(keys).mean(0, keepdim=True)[:0]


class SelectorWithoutScore(Selector):
    """Makes digests only."""

    def digest(self, keys):
        return keys


class PredictorThatRaises(QuietPredictor):
    """Fails in the third step."""

    def predict(self, layer, step):
        if step == 3:
            raise LookupError("no forecast today")
        return []


class PredictorOfNonsense(QuietPredictor):
    """Names pages that are not there, and one several times."""

    def predict(self, layer, step):
        return [(-1, 1.0), (10**6, float("nan")), (1, -1.0), (1, 2.0)]


class PredictorWithoutPredict:
    """Only listens."""

    def want(self, layer, step, pages): ...
    def observe(self, layer, step, pages, mass): ...


def own(cls):
    return f"{__name__}:{cls.__name__}"


def chosen(selector):
    return {"selector": own(selector), "attention_pages": 3}


FAULTY = {
    **{
        f"policy_{verb}": ({"policy": {"name": own(PolicyThatRaises), "verb": verb}}, LookupError, f"how to {verb}")
        for verb in ("insert", "touch", "victim", "remove")
    },
    "policy_pinned": (
        {"policy": own(PolicyThatNamesAPinnedPage)},
        RuntimeError,
        "PolicyThatNamesAPinnedPage chose page 0, which is pinned",
    ),
    "policy_none": ({"policy": own(PolicyThatNamesNoPage)}, RuntimeError, "PolicyThatNamesNoPage chose page None"),
    "selector_raises": (chosen(SelectorThatRaises), LookupError, "no idea"),
    "selector_nan": (chosen(SelectorOfNan), ValueError, "score is NaN"),
    "selector_shape": (
        chosen(SelectorOfHeadsAlone),
        ValueError,
        r"SelectorOfHeadsAlone gave scores \(5, 2\) for 5 pages and a query \(2, 2, 16\); they must be \(5, 2, 2\)",
    ),
    "selector_heads": (chosen(SelectorOfOneGroup), ValueError, r"gave scores \(5, 2, 1\) for 5 pages"),
    "selector_digests": (
        chosen(SelectorOfOneDigest),
        ValueError,
        r"SelectorOfOneDigest made digests \(0, 2, 16\) of keys \(2, 2, 8, 16\)",
    ),
    "predictor_raises": (
        {"predictor": own(PredictorThatRaises), "prefetch_k": 1},
        RuntimeError,
        "PredictorThatRaises' failed: LookupError: no forecast today",
    ),
}


@pytest.mark.parametrize("fault", FAULTY)
def test_a_part_of_the_users_that_fails_ends_the_generation_with_its_own_error(llama, fault):
    paging, error, message = FAULTY[fault]
    cache = make_cache(llama, **paging)
    with pytest.raises(error, match=message):
        generated(llama, cache)
    require_refused(cache, llama)
    cache.reset()
    with pytest.raises(error, match=message):  # and not with another one that the first has led to
        generated(llama, cache)


def test_pages_that_are_not_there_are_passed_over_as_guesses(llama, expected):
    cache = make_cache(llama, predictor=own(PredictorOfNonsense), prefetch_k=2)
    assert torch.equal(generated(llama, cache), expected)
    require_whole_books(cache)


@pytest.mark.parametrize(
    ("paging", "message"),
    [
        (
            {"policy": own(PolicyWithoutVictim)},
            r"PolicyWithoutVictim' lacks victim \(verbs: insert, touch, victim, remove\)",
        ),
        ({"policy": own(PolicyOfStubs)}, r"PolicyOfStubs' lacks touch, victim, remove \(verbs"),
        (chosen(SelectorWithoutScore), r"SelectorWithoutScore' lacks score \(verbs: digest, score\)"),
    ],
)
def test_a_part_that_lacks_a_verb_is_refused_as_the_cache_is_made(llama, paging, message):
    with pytest.raises(UnknownName, match=message):
        make_cache(llama, **paging)


# --- as runs ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def run_of(tmp_path, logging_restored, capsys):
    """`run_of(mode=..., **settings)`: the exit code, the rows, and what was said, of a run and one without paging."""

    def run(**settings):
        shared = {
            "model_name": "random:configs/models/tiny-llama.json",
            "device": "cpu",
            "context_lengths": [60],
            "num_runs": 1,
            "max_new_tokens": 4,
            "warmup_runs": 0,
        }
        config = tmp_path / "experiments.yaml"
        experiments = [SMALL | {"mode": "reactive"} | settings, {"mode": "baseline"}]
        config.write_text(yaml.safe_dump({"defaults": shared, "experiments": experiments}))
        results = tmp_path / "results"
        code = main.main(["--config", str(config), "--output", str(results), "--no-plots"])
        said = capsys.readouterr()
        rows = {
            row["spec"]["mode"]: row for row in map(json.loads, (p.read_text() for p in results.glob("*_ctx*.json")))
        }
        return code, rows, said.out + said.err

    return run


def test_a_run_whose_host_memory_ends_is_a_row_that_says_out_of_memory_and_the_next_run_is_made(run_of, monkeypatch):
    with host_memory_ends(monkeypatch, at_segment=2):
        code, rows, _ = run_of()
    assert code == 1
    assert {mode: row["status"] for mode, row in rows.items()} == {"reactive": "out_of_memory", "baseline": "ok"}
    assert rows["reactive"]["error"].startswith("MemoryError: there are no 16,384 bytes of host memory for 8 pages")


def test_a_run_with_a_folder_that_is_not_there_is_a_row_that_names_it(run_of, tmp_path):
    code, rows, _ = run_of(host_pages=1, disk_dir=str(tmp_path / "nowhere"))
    assert code == 1
    assert {mode: row["status"] for mode, row in rows.items()} == {"reactive": "error", "baseline": "ok"}
    message = rows["reactive"]["error"]
    assert message.startswith("DiskTierFailed: no file of") and message.count("\n") == 0
    assert str(tmp_path / "nowhere") in message and "choose another folder with disk_dir" in message


def test_a_run_with_a_predictor_that_raises_is_a_row_and_the_next_run_is_made(run_of):
    code, rows, _ = run_of(mode="predictive", predictor=own(PredictorThatRaises), prefetch_k=1, max_new_tokens=8)
    assert code == 1
    assert {mode: row["status"] for mode, row in rows.items()} == {"predictive": "error", "baseline": "ok"}
    assert rows["predictive"]["error"].endswith("PredictorThatRaises' failed: LookupError: no forecast today")


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"policy": own(PolicyWithoutVictim)}, "lacks victim"),
        (chosen(SelectorWithoutScore), "lacks score"),
        ({"mode": "predictive", "predictor": own(PredictorWithoutPredict)}, "lacks predict"),
    ],
)
def test_a_part_that_lacks_a_verb_is_named_before_any_run(run_of, settings, part):
    code, rows, said = run_of(**settings)
    assert code == 2 and not rows
    assert part in said and "experiments.yaml:" in said
