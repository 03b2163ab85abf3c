"""Host rows, in memory and on disk, keep what was written to them while anyone refers to them, and leave nothing."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import host_pages
from host_pages import HOST_ROWS_ADDED, DiskTierFailed, HostPages, pinned_lengths
from utils import is_out_of_memory

PAGE_SHAPE = (2, 2, 4, 8)  # keys and values, K, P, D
PAGE_BYTES = 2 * 2 * 4 * 8 * 4  # in float32
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PROJECT = Path(__file__).resolve().parent.parent


def make_pages(memory_rows=None, disk_dir=None, dtype=torch.float32, pinned=False) -> HostPages:
    return HostPages(PAGE_SHAPE, dtype, pinned, memory_rows, disk_dir)


# --- against a model --------------------------------------------------------------------------------------------


class RowsAgainstModel(RuleBasedStateMachine):
    """The model: the number of references to each taken row, the value that fills it, and how many rows there are."""

    @initialize(memory_rows=st.none() | st.integers(0, 12), dtype=st.sampled_from(DTYPES))
    def make(self, memory_rows, dtype):
        self.folder = tempfile.TemporaryDirectory()
        self.pages = make_pages(memory_rows, self.folder.name, dtype)
        self.memory_rows, self.page_bytes = memory_rows, PAGE_BYTES * dtype.itemsize // 4
        self.references: dict[int, int] = {}
        self.values: dict[int, int] = {}
        self.n_rows = self.n_written = 0

    def teardown(self):
        if hasattr(self, "folder"):
            self.folder.cleanup()

    def taken_row(self, data) -> int:
        return data.draw(st.sampled_from(sorted(self.references)))

    @rule(n_rows=st.integers(0, 40))
    def reserve(self, n_rows):
        self.pages.reserve(n_rows)
        self.n_rows = max(self.n_rows, n_rows)

    @rule()
    def take(self):
        free = [row for row in range(self.n_rows) if row not in self.references]
        expected = min(free, default=self.n_rows)
        if not free:
            self.n_rows += HOST_ROWS_ADDED
        assert self.pages.take() == expected
        self.references[expected] = 1
        self.write(expected)

    def write(self, row):
        self.n_written += 1
        self.values[row] = self.n_written % 200  # which every dtype holds exactly
        self.pages.page(row).fill_(self.values[row])

    @precondition(lambda self: self.references)
    @rule(data=st.data())
    def share(self, data):
        row = self.taken_row(data)
        self.pages.share(row)
        self.references[row] += 1

    @precondition(lambda self: self.references)
    @rule(data=st.data())
    def release(self, data):
        row = self.taken_row(data)
        self.references[row] -= 1
        assert self.pages.release(row) == (self.references[row] == 0)
        if self.references[row] == 0:
            del self.references[row], self.values[row]

    @rule(row=st.integers(-1, 60))
    def refuse_a_row_that_is_not_taken(self, row):
        if row in self.references:
            return
        for verb in (self.pages.share, self.pages.release, self.pages.page):
            with pytest.raises(RuntimeError, match=f"host row {row} is not taken"):
                verb(row)

    @precondition(lambda self: len(self.references) > 3)
    @rule()
    def clear(self):
        self.pages.clear()
        self.references.clear()
        self.values.clear()

    @invariant()
    def every_taken_row_holds_its_own_value(self):
        for row, value in self.values.items():
            assert (self.pages.page(row) == value).all()

    @invariant()
    def neighbours_in_a_segment_are_one_stretch(self):
        for row in self.references:
            if row + 1 in self.references and self.pages.same_segment(row, row + 1):
                both = self.pages.stretch(row, 2)
                assert both.shape == (2, *PAGE_SHAPE) and both.is_contiguous()
                assert [int(page.flatten()[0]) for page in both] == [self.values[row], self.values[row + 1]]

    @invariant()
    def bytes_are_counted_where_they_lie(self):
        in_memory = self.n_rows if self.memory_rows is None else min(self.memory_rows, self.n_rows)
        assert self.pages.nbytes == in_memory * self.page_bytes
        assert self.pages.disk_bytes == (self.n_rows - in_memory) * self.page_bytes
        assert (self.pages.n_rows, self.pages.n_taken) == (self.n_rows, len(self.references))

    @invariant()
    def nothing_is_left_in_the_folder(self):
        assert os.listdir(self.folder.name) == []


TestRowsAgainstModel = RowsAgainstModel.TestCase
TestRowsAgainstModel.settings = settings(max_examples=80, stateful_step_count=30)


# --- rows ---------------------------------------------------------------------------------------------------------


def taken(pages: HostPages, n_rows: int) -> HostPages:
    for row in range(n_rows):
        assert pages.take() == row
    return pages


def test_memory_and_disk_are_never_one_stretch(tmp_path):
    pages = make_pages(memory_rows=3, disk_dir=tmp_path)
    pages.reserve(6)
    taken(pages, 6)
    assert [pages.same_segment(row, row + 1) for row in range(5)] == [True, True, False, True, True]
    with pytest.raises(ValueError, match="host rows 2 to 3 do not lie in one segment"):
        pages.stretch(2, 2)
    assert pages.stretch(3, 3).shape == (3, *PAGE_SHAPE)


def test_a_stretch_with_a_free_row_in_it_is_refused():
    pages = taken(make_pages(), 3)
    pages.release(1)
    with pytest.raises(RuntimeError, match="host row 1 is not taken"):
        pages.stretch(0, 3)


@pytest.mark.parametrize("memory_rows", [None, 0], ids=["memory", "disk"])
def test_rows_made_in_inference_mode_can_be_written_outside_of_it(memory_rows, tmp_path):
    with torch.inference_mode():
        pages = taken(make_pages(memory_rows, tmp_path), 1)
    pages.page(0).fill_(2.0)  # an inference tensor would raise
    assert (pages.page(0) == 2.0).all()


# --- disk ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_page_on_disk_comes_back_bit_for_bit(dtype, tmp_path):
    pages = taken(make_pages(0, tmp_path, dtype), 2)
    page = torch.randn(PAGE_SHAPE).to(dtype)
    page[0, 0, 0, :3] = torch.tensor([float("nan"), float("inf"), -0.0])
    pages.page(1).copy_(page)
    assert torch.equal(pages.page(1).view(torch.uint8), page.view(torch.uint8))


def test_the_temporary_folder_serves_where_none_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(DiskTierFailed, match="nowhere"):
        make_pages(memory_rows=0).take()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert make_pages(memory_rows=0).take() == 0


def test_all_in_memory_needs_no_folder(tmp_path):
    assert make_pages(disk_dir=tmp_path / "nowhere").take() == 0


@pytest.fixture(params=["posix_fallocate", "zeros"])
def way_to_reserve(request, monkeypatch):
    """Both ways in which space is reserved: the system's, and writing zeros."""
    if request.param == "zeros":
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
        monkeypatch.setattr(host_pages, "ZEROS_WRITTEN", 1000)  # several writes, the last one shorter
    elif not hasattr(os, "posix_fallocate"):
        pytest.skip("this system has no posix_fallocate")


def test_the_space_of_a_file_is_set_aside_and_not_only_named(way_to_reserve, tmp_path):
    with open(tmp_path / "file", "wb", buffering=0) as file:
        file.truncate(10_000)
        host_pages._reserve_space(file.fileno(), 10_000)
        status = os.fstat(file.fileno())
        written = os.lseek(file.fileno(), 0, os.SEEK_CUR)
    assert status.st_size == 10_000
    assert written == 10_000 or status.st_blocks * 512 >= 10_000  # st_blocks counts 512 bytes everywhere


def test_rows_on_disk_work_with_either_way_to_reserve_space(way_to_reserve, tmp_path):
    pages = taken(make_pages(0, tmp_path), HOST_ROWS_ADDED)
    for row in range(HOST_ROWS_ADDED):
        pages.page(row).fill_(row)
    assert [int(page.sum()) for page in pages.stretch(0, HOST_ROWS_ADDED)] == [
        row * PAGE_BYTES // 4 for row in range(HOST_ROWS_ADDED)
    ]


def refuse_space(descriptor, offset, n_bytes):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_named_with_what_was_asked_for_and_what_is_free(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", refuse_space, raising=False)
    monkeypatch.setattr(host_pages.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 4321}))
    pages = make_pages(memory_rows=2, disk_dir=tmp_path)
    with pytest.raises(DiskTierFailed) as caught:
        pages.reserve(10)
    for part in (f"{8 * PAGE_BYTES:,} bytes for 8 pages", str(tmp_path), "4,321 are free", "No space left", "disk_dir"):
        assert part in str(caught.value)
    assert caught.value.__cause__.errno == errno.ENOSPC
    assert not is_out_of_memory(caught.value)
    assert os.listdir(tmp_path) == []


def test_after_a_full_disk_the_rows_in_memory_can_be_used_and_the_disk_be_tried_again(tmp_path, monkeypatch):
    pages = make_pages(memory_rows=2, disk_dir=tmp_path)
    with monkeypatch.context() as full:
        full.setattr(os, "posix_fallocate", refuse_space, raising=False)
        with pytest.raises(DiskTierFailed):
            pages.reserve(10)
        assert (pages.nbytes, pages.disk_bytes) == (2 * PAGE_BYTES, 0)
        assert [pages.take(), pages.take()] == [0, 1]
        with pytest.raises(DiskTierFailed):
            pages.take()
        assert pages.n_taken == 2
    assert pages.take() == 2
    assert pages.disk_bytes == HOST_ROWS_ADDED * PAGE_BYTES


def test_a_folder_that_is_missing_or_none_is_named(tmp_path):
    (tmp_path / "a file").write_text("")
    for folder in (tmp_path / "nowhere", tmp_path / "a file"):
        with pytest.raises(DiskTierFailed, match=rf"could be made in {folder}, where .* are free"):
            make_pages(0, folder).take()


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="permissions do not hold root back")
def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(DiskTierFailed, match="Permission denied"):
        make_pages(0, tmp_path).take()


def test_a_file_that_cannot_be_mapped_is_a_failure_of_the_disk_tier_and_leaves_nothing(tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise RuntimeError("unable to mmap 4096 bytes")

    monkeypatch.setattr(torch, "from_file", refuse)
    with pytest.raises(DiskTierFailed, match="unable to mmap 4096 bytes"):
        make_pages(0, tmp_path).take()
    assert os.listdir(tmp_path) == []


def test_a_limit_on_the_size_of_files_is_an_error_and_no_signal(tmp_path):
    """In a process of its own, as the limit would hold for all that the tests write."""
    pytest.importorskip("resource")
    program = (
        "import resource, sys, torch\n"
        "from host_pages import DiskTierFailed, HostPages\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({50 * PAGE_BYTES}, {50 * PAGE_BYTES}))\n"
        f"pages = HostPages({PAGE_SHAPE}, torch.float32, False, 0, sys.argv[1])\n"
        "try:\n    pages.reserve(100)\n"
        "except DiskTierFailed as error:\n    sys.exit(error.__cause__.errno)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=PROJECT, check=False)
    assert done.returncode == errno.EFBIG
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="this system does not list open descriptors")
def test_rows_on_disk_hold_no_descriptor_open(tmp_path):
    def n_open() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = n_open()
    pages = taken(make_pages(0, tmp_path), 5 * HOST_ROWS_ADDED)  # five files
    assert n_open() == before
    assert not pages.same_segment(0, 5 * HOST_ROWS_ADDED - 1)


# --- memory -------------------------------------------------------------------------------------------------------


def test_memory_that_is_not_there_is_asked_for_with_the_bytes_and_the_way_out():
    pages = make_pages()
    n_rows = 2**50 // PAGE_BYTES  # 1 PiB
    with pytest.raises(MemoryError, match=f"{2**50:,} bytes of host memory.*host_pages") as caught:
        pages.reserve(n_rows)
    assert is_out_of_memory(caught.value)
    assert (pages.n_rows, pages.nbytes) == (0, 0)
    assert pages.take() == 0  # less can be had


def test_an_error_that_is_not_about_memory_is_raised_as_it_is(monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("something else")

    monkeypatch.setattr(torch, "empty", fail)
    with pytest.raises(RuntimeError, match=r"^something else$"):
        make_pages().reserve(1)


@pytest.fixture
def pinning_refused(monkeypatch):
    empty = torch.empty

    def refuse_pinned(*arguments, pin_memory=False, **options):
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory\nand much advice")
        return empty(*arguments, **options)

    monkeypatch.setattr(torch, "empty", refuse_pinned)


def test_pinned_memory_that_is_refused_is_replaced_and_said_once(pinning_refused, caplog):
    pages = make_pages(pinned=True)
    assert pages.is_pinned
    with caplog.at_level(logging.WARNING):
        pages.reserve(10)
        pages.reserve(20)
    assert not pages.is_pinned
    (warning,) = caplog.messages
    first = 8 * PAGE_BYTES  # of ten rows: the largest power of two, which PyTorch would not round up
    assert f"pinning {first:,} bytes of host memory was refused (CUDA error: out of memory);" in warning
    assert pages.page(taken(pages, 20).n_taken - 1).shape == PAGE_SHAPE


@pytest.mark.cuda
def test_on_cuda_rows_in_memory_are_pinned_and_rows_on_disk_are_not(tmp_path):
    pages = make_pages(2, tmp_path, pinned=True)
    pages.reserve(4)
    taken(pages, 4)
    assert [pages.page(row).is_pinned() for row in range(4)] == [True, True, False, False]
    assert pages.is_pinned


@given(st.integers(0, 5000), st.integers(1, 2**20))
def test_pinned_memory_is_asked_for_in_sizes_that_pytorch_hardly_rounds_up(n_rows, page_bytes):
    lengths = pinned_lengths(n_rows, page_bytes)
    assert sum(lengths) == n_rows and all(length > 0 for length in lengths)
    for length in lengths:
        n_bytes = length * page_bytes
        lost = (1 << (n_bytes - 1).bit_length()) - n_bytes
        assert lost <= n_bytes // 8 or lost < page_bytes
