"""A plan's sizes and floors are right before anything is loaded; they are worked out here by hand."""

from __future__ import annotations

import re
import sys
import types
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from experiments import BaselineExperiment, PredictiveExperiment, ReactiveExperiment
from plan_table import print_plan
from planning import plan
from run_specs import expand

PROJECT = Path(__file__).parent.parent
LLAMA = "random:configs/models/tiny-llama.json"  # 3 layers, 2 key/value heads of 16: rotary positions up to 4096
GPT2 = "random:configs/models/tiny-gpt2.json"  # 3 layers, 4 heads of 64 / 4 = 16; 1024 learned positions
MQA = "random:configs/models/tiny-mqa.json"  # as GPT-2, with one key/value head
TOKEN_BYTES = 2 * 3 * 2 * 16 * 4  # keys and values x layers x heads x head size x bytes of float32


def planned(cls, **keys):
    """The plan of one experiment with one repetition."""
    mode = {BaselineExperiment: "baseline", ReactiveExperiment: "reactive", PredictiveExperiment: "predictive"}[cls]
    keys = {"model_name": LLAMA, "num_runs": 1, "context_lengths": [1000], "max_new_tokens": 25, "device": "cpu"} | keys
    return plan(expand([cls(mode=mode, **keys)]), allow_network=False)


def paged(**keys):
    """The plan of a reactive run over 1000 + 25 - 1 = 1024 positions: 8 pages of 128."""
    (run,) = planned(ReactiveExperiment, **{"page_size": 128, "max_gpu_pages": 4, "staging_pages": 2} | keys)
    return run


# --- sizes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_name", "kv_bytes"),
    [(LLAMA, 2 * 3 * 2 * 16 * 4), (GPT2, 2 * 3 * 4 * 16 * 4), (MQA, 2 * 3 * 1 * 16 * 4)],
)
def test_a_token_adds_a_key_and_a_value_for_every_layer_and_key_value_head(model_name, kv_bytes):
    (run,) = planned(BaselineExperiment, model_name=model_name, context_lengths=[10])
    assert run.kv_bytes_per_token == kv_bytes


def test_half_precision_halves_the_bytes():
    (run,) = planned(BaselineExperiment, dtype="bfloat16")
    assert run.kv_bytes_per_token == TOKEN_BYTES // 2


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_cache_ends_with_every_position_but_the_last_tokens(batch_size):
    (run,) = planned(BaselineExperiment, batch_size=batch_size)
    assert run.kv_bytes == 1024 * TOKEN_BYTES * batch_size  # the last token is never fed back
    assert (run.device_kv_bytes, run.resident_fraction, run.transfer_floor_ms) == (run.kv_bytes, 1.0, 0.0)


def test_an_offloaded_cache_holds_two_layers_of_three_on_the_device():
    (run,) = planned(BaselineExperiment, device="cuda", dtype="float32", cache_implementation="offloaded")
    assert run.resident_fraction == pytest.approx(2 / 3)
    assert run.device_kv_bytes == round(1024 * TOKEN_BYTES * 2 / 3)
    assert run.transfer_floor_ms is None  # the bus is measured, not known


def test_what_a_quantised_cache_takes_is_measured_and_not_planned():
    (run,) = planned(BaselineExperiment, cache_implementation="quantized")
    assert (run.device_kv_bytes, run.resident_fraction, run.transfer_floor_ms) == (None, None, None)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_paged_cache_takes_its_budget_and_its_staging_slots_on_the_device(batch_size):
    run = paged(batch_size=batch_size)
    assert run.device_kv_bytes == (4 + 2) * 128 * TOKEN_BYTES * batch_size
    assert run.resident_fraction == pytest.approx(4 / 8)


def test_a_page_that_is_only_begun_counts_as_a_page():
    assert paged(max_new_tokens=26).resident_fraction == pytest.approx(4 / 9)  # 1025 positions


# --- floors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_floor_is_the_bytes_that_do_not_fit_over_the_bandwidth(batch_size):
    run = paged(batch_size=batch_size, link={"bandwidth_gb_s": 0.5})
    must_move = (8 - 4) * 128 * TOKEN_BYTES * batch_size  # 393,216 bytes for one sequence
    assert run.transfer_floor_ms == pytest.approx(must_move / 0.5e9 * 1000)  # 0.79 ms


def test_on_a_cpu_the_link_is_simulated_as_the_slowest_preset():
    assert paged().transfer_floor_ms == pytest.approx(4 * 128 * TOKEN_BYTES / 15.75e9 * 1000)


@pytest.mark.parametrize("max_gpu_pages", [8, 20])
@pytest.mark.parametrize("link", ["auto", "memory"])
def test_nothing_has_to_move_when_everything_fits(link, max_gpu_pages):
    run = paged(max_gpu_pages=max_gpu_pages, link=link)
    assert (run.resident_fraction, run.transfer_floor_ms) == (1.0, 0.0)


@pytest.mark.parametrize("where", [{"link": "memory"}, {"device": "cuda", "dtype": "float32"}], ids=str)
def test_a_link_of_unknown_width_gives_no_floor(where):
    run = paged(**where)
    assert run.resident_fraction == pytest.approx(0.5)
    assert run.transfer_floor_ms is None


def test_prefetching_does_not_lower_the_floor():
    (run,) = planned(PredictiveExperiment, page_size=128, max_gpu_pages=4, staging_pages=4)
    assert run.transfer_floor_ms == paged().transfer_floor_ms


# --- positions --------------------------------------------------------------------------------------------------


def test_a_context_beyond_the_learned_positions_is_clamped_and_the_clamp_is_said():
    (run,) = planned(BaselineExperiment, model_name=GPT2, context_lengths=[2000], max_new_tokens=50)
    assert (run.spec.context_length, run.spec.requested_context_length) == (974, 2000)  # 1024 - 50
    assert run.notes == ("context clamped from 2000 to 974: the model has 1024 positions, 50 of them for new tokens",)
    assert run.kv_bytes == (974 + 49) * run.kv_bytes_per_token


def test_a_context_that_just_fits_is_left_alone():
    (run,) = planned(BaselineExperiment, model_name=GPT2, context_lengths=[974], max_new_tokens=50)
    assert (run.spec.context_length, run.notes) == (974, ())


def test_runs_that_the_clamp_makes_the_same_are_made_once_and_every_clamp_is_said():
    runs = planned(BaselineExperiment, model_name=GPT2, context_lengths=[974, 2000, 3000, 500], max_new_tokens=50)
    assert [run.spec.context_length for run in runs] == [974, 500]
    assert [note.split(":")[0] for note in runs[0].notes] == [
        "context clamped from 2000 to 974",
        "context clamped from 3000 to 974",
    ]


def test_repetitions_of_a_clamped_run_are_all_made():
    runs = planned(BaselineExperiment, model_name=GPT2, context_lengths=[2000, 3000], num_runs=3)
    assert [run.spec.repetition for run in runs] == [0, 1, 2]


def test_rotary_positions_are_no_limit_but_the_excess_is_said():
    (run,) = planned(BaselineExperiment, context_lengths=[5000])
    assert run.spec.context_length == 5000
    assert run.notes == ("5025 positions exceed the 4096 the model was made for; quality suffers",)


def test_a_model_without_room_for_a_prompt_stops_the_plan():
    with pytest.raises(ValueError, match="leaves no room for a prompt before 1024 new tokens"):
        planned(BaselineExperiment, model_name=GPT2, max_new_tokens=1024)


def test_a_model_that_cannot_be_looked_at_is_planned_without_sizes():
    (run,) = planned(BaselineExperiment, model_name="./no-such-folder", context_lengths=[5000])
    assert run.spec.context_length == 5000
    assert (run.kv_bytes_per_token, run.kv_bytes, run.device_kv_bytes, run.resident_fraction) == (None,) * 4
    assert len(run.notes) == 1
    assert run.notes[0].startswith("sizes unknown: model './no-such-folder' cannot be had")


@pytest.mark.parametrize(("n_gpus", "link_is_known"), [(1, False), (0, True)])
def test_device_auto_is_planned_for_a_gpu_where_the_driver_knows_one(monkeypatch, n_gpus, link_is_known):
    driver = types.ModuleType("pynvml")
    driver.nvmlInit = driver.nvmlShutdown = lambda: None
    driver.nvmlDeviceGetCount = lambda: n_gpus
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    assert (paged(device="auto").transfer_floor_ms is not None) == link_is_known


def test_a_driver_that_cannot_count_its_gpus_is_planned_as_a_cpu(monkeypatch):
    def fail():
        raise RuntimeError("NVML: Driver/library version mismatch")

    driver = types.ModuleType("pynvml")
    driver.nvmlInit = driver.nvmlShutdown = lambda: None
    driver.nvmlDeviceGetCount = fail
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    assert paged(device="auto").transfer_floor_ms == paged(device="cpu").transfer_floor_ms


# --- the table --------------------------------------------------------------------------------------------------


def printed(runs) -> str:
    stream = StringIO()
    print_plan(runs, Console(file=stream, width=200))
    return stream.getvalue()


def cells_of_row(text: str) -> list[str]:
    """The cells of the run of 1000 + 25 tokens, from its context on."""
    (row,) = [line for line in text.splitlines() if "1000+25" in line]
    cells = re.sub("[│|]", " ", row).split()
    return cells[cells.index("1000+25") + 1 :]


def test_the_table_shows_sizes_in_mib_and_the_share_that_fits():
    text = printed([paged(link={"bandwidth_gb_s": 0.5})])
    assert "768 KV bytes per token" in text
    # repetition 1; 1024 x 768 bytes = 0.75 MiB; (4 + 2) pages x 128 x 768 bytes = 0.5625 MiB; half; 0.786 ms
    assert cells_of_row(text) == ["1", "0.8", "0.6", "50", "0.79"]


def test_the_table_shows_a_dash_for_what_is_not_known_and_says_why():
    text = printed(planned(BaselineExperiment, model_name="./no-such-folder"))
    assert cells_of_row(text) == ["1", "—", "—", "—", "—"]
    assert "./no-such-folder: sizes unknown" in text
