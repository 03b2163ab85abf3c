"""The kernels do what their definition does, interpreted and compiled, and compile without a GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from device_page_table import gather_with_torch, look_up_with_torch

PROJECT = Path(__file__).resolve().parent.parent


def test_the_kernels_do_what_the_definition_does():
    run_apart("compare_kernels('cpu')", TRITON_INTERPRET="1")


def test_the_kernels_compile_for_a_gpu_without_one():
    run_apart("compile_kernels()")


def run_apart(call, **environment):
    """In a process of its own: whether Triton interprets is settled as it is imported, and its compiler complains of
    itself as a process ends."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton, which requirements-dev.txt brings on Linux")
    paths = os.pathsep.join([str(PROJECT), str(PROJECT / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | environment | {"PYTHONPATH": paths}
    code = f"import test_page_kernels as t; t.{call}"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def compile_kernels():
    """For an H100: a look-up among few slots and many, and a gather that reads and writes 16 bytes at once."""
    import page_kernels

    tables = [f"{name}_ptr" for name in ("wanted", "slot_of", "page_in", "used_at", "order", "slots")]
    types = dict.fromkeys(tables, "*i64") | {"was_there_ptr": "*i8", "now": "i32", "n_wanted": "i32", "n_slots": "i32"}
    for n_slots in (1, 128, 1024, 4096):
        constants = {"WANTED": n_slots, "SLOTS": n_slots, "CHUNK": page_kernels.chunk_of(n_slots)}  # as it is launched
        assembly = compiled(page_kernels._look_up, types, constants)
        assert assembly.count("bar.sync") >= 3  # what one part stores another loads

    pointers = dict.fromkeys(("places_ptr", "slots_ptr"), "*i64") | {"was_there_ptr": "*i8"}
    pointers |= dict.fromkeys(("wanted_ptr", "address_of_ptr", "known_ptr"), "*i64")
    types = {"block_ptr": "*i32", "pool_ptr": "*i32", **pointers, "n_wanted": "i32", "n_words": "i32"}
    aligned = [list(types).index(name) for name in ("block_ptr", "pool_ptr", "n_words")]
    assembly = compiled(page_kernels._gather, types, {"WORDS": page_kernels.WORDS_AT_ONCE, "ALIGNED": 16}, aligned)
    for verb in ("ld", "st"):
        assert f"{verb}.global.v4.b32" in assembly and f"{verb}.global.b32" not in assembly


def compiled(kernel, types, constants, aligned=()):
    """The PTX of a kernel; `aligned` arguments are multiples of 16, as Triton finds out at a launch."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = types | dict.fromkeys(constants, "constexpr")
    attributes = {(place,): [["tt.divisibility", 16]] for place in aligned}
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert made.asm["cubin"]
    return made.asm["ptx"]


@pytest.mark.cuda
def test_the_compiled_kernels_do_what_the_definition_does():
    compare_kernels("cuda")


def compare_kernels(device):
    """Random requests, looked up and gathered by kernels and by torch, side by side; few slots compared at a time or
    many."""
    import page_kernels

    compare_on(device, torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page_kernels, "MOST_PAIRS", 2**9)
        compare_on(device, torch.bfloat16)


def compare_on(device, dtype):
    import page_kernels

    generator = torch.Generator().manual_seed(0)

    def number(low, high):
        return int(torch.randint(low, high, (1,), generator=generator))

    for n_slots in (1, 2, 3, 7, 16, 33, 100):
        n_pages, now = n_slots + number(1, 20), 1
        shape = (3, 2, 2, 4) if n_slots < 100 else (40, 2, 2, 16)
        host = torch.randn(n_pages, *shape, generator=generator).to(dtype)
        host = host.pin_memory() if device == "cuda" else host
        pool = torch.randn(n_slots + 5, *shape, generator=generator).to(device, dtype)
        order = torch.randperm(n_slots + 5, generator=generator).to(device)
        places, known = order[:n_slots], order[n_slots : n_slots + number(0, 4)]
        address_of = torch.tensor([page.data_ptr() for page in host], device=device)
        pools = pool, pool.clone()
        tables = [
            [torch.full((n,), -1, device=device) for n in (n_pages, n_slots)]
            + [torch.zeros(n_slots, dtype=torch.int64, device=device)]
            for _ in range(2)
        ]
        for _ in range(6):
            wanted = torch.randperm(n_pages, generator=generator)[: number(1, n_slots + 1)].to(device)
            expected = look_up_with_torch(wanted, *tables[0], now)
            found = page_kernels.look_up(wanted, *tables[1], now)
            now += len(wanted)
            for one, other in zip([*expected, *tables[0]], [*found, *tables[1]], strict=True):
                assert torch.equal(one, other)
            hosts = [host[page] for page in wanted.tolist()]
            block = gather_with_torch(pools[0], places, *expected, hosts, known)
            assert torch.equal(block[: len(wanted)].cpu(), torch.stack(hosts))
            gathered = page_kernels.gather(pools[1], places, *found, wanted, address_of, known)
            assert torch.equal(gathered, block) and torch.equal(*pools)
