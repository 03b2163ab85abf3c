"""The meters read what there is and say None for the rest."""

from __future__ import annotations

import itertools
import sys
import threading
import types

import psutil
import pytest
import torch

import device_meters
from device_meters import MemoryMeter, PowerMeter, TokenClock

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
PATIENCE_S = 30


# --- when each token was there ------------------------------------------------------------------------------


def tick(clock, n_tokens, device=CPU):
    for _ in range(n_tokens):
        clock(torch.zeros(2, 1, dtype=torch.long, device=device), torch.zeros(2, 5, device=device))


def test_the_clock_gives_one_ascending_time_for_each_token():
    clock = TokenClock(CPU)
    clock.start()
    tick(clock, 5)
    times = clock.token_times_ms()
    assert len(times) == 5
    assert all(earlier < later for earlier, later in itertools.pairwise([0.0, *times]))


def test_token_times_are_milliseconds_since_the_start(monkeypatch):
    seconds = iter([10.0, 10.25, 10.75])
    monkeypatch.setattr(device_meters.time, "perf_counter", lambda: next(seconds))
    clock = TokenClock(CPU)
    clock.start()
    tick(clock, 2)
    assert clock.token_times_ms() == [250.0, 750.0]


def test_a_clock_that_is_started_again_has_forgotten_the_tokens_before():
    clock = TokenClock(CPU)
    clock.start()
    tick(clock, 3)
    clock.start()
    assert clock.token_times_ms() == []


def test_the_clock_stops_no_sequence():
    clock = TokenClock(CPU)
    clock.start()
    stop = clock(torch.zeros(3, 1, dtype=torch.long), torch.zeros(3, 5))
    assert stop.tolist() == [False, False, False]


def test_the_clock_tells_how_many_tokens_there_are():
    told = []
    clock = TokenClock(CPU, told.append)
    clock.start()
    tick(clock, 3)
    assert told == [1, 2, 3]


def test_the_clock_is_named_after_what_it_reads():
    assert (TokenClock(CPU).name, TokenClock(GPU).name) == ("perf_counter", "cuda_events")


@pytest.mark.cuda
def test_on_cuda_the_clock_gives_one_ascending_time_for_each_token():
    clock = TokenClock(GPU)
    work = torch.randn(512, 512, device=GPU)
    clock.start()
    for _ in range(5):
        work = work @ work
        tick(clock, 1, GPU)
    times = clock.token_times_ms()
    assert len(times) == 5
    assert all(earlier < later for earlier, later in itertools.pairwise([0.0, *times]))


# --- memory -------------------------------------------------------------------------------------------------


def test_without_a_gpu_there_are_no_gpu_figures():
    meter = MemoryMeter([CPU])
    meter.start()
    figures = meter.figures()
    assert [figures[key] for key in ("gpu_memory_mb", "gpu_peak_mb", "gpu_delta_mb")] == [None, None, None]


def test_process_memory_is_what_psutil_says_at_that_moment_in_mebibytes(monkeypatch):
    """What psutil said is noted as the meter asks, as memory may change from one moment to the next."""
    meter = MemoryMeter([CPU])
    rss_mb = []
    memory_info = psutil.Process.memory_info

    def noted(process):
        info = memory_info(process)
        rss_mb.append(info.rss / 2**20)
        return info

    monkeypatch.setattr(psutil.Process, "memory_info", noted)
    meter.start()
    held = torch.ones(64 * 2**20, dtype=torch.uint8)
    figures = meter.figures()
    before, after = rss_mb
    assert held.all() and figures["rss_mb"] == after
    assert figures["rss_delta_mb"] == pytest.approx(after - before)


@pytest.mark.cuda
def test_on_cuda_the_peak_outlives_what_was_freed():
    held = torch.ones(8 * 2**20, dtype=torch.uint8, device=GPU)
    meter = MemoryMeter([GPU])
    meter.start()
    freed = torch.ones(32 * 2**20, dtype=torch.uint8, device=GPU)
    del freed
    figures = meter.figures()
    assert figures["gpu_delta_mb"] == pytest.approx(32)
    assert figures["gpu_peak_mb"] == pytest.approx(figures["gpu_memory_mb"] + 32)
    assert figures["gpu_memory_mb"] >= held.nbytes / 2**20


# --- power --------------------------------------------------------------------------------------------------

NO_POWER = {"mean_power_w": None, "energy_j": None, "mean_utilization_percent": None, "source": None}


class FakeNvml(types.ModuleType):
    """NVML that gives the scripted `(seconds, watts of each board, percent of each board)`, then an error."""

    class NVMLError(Exception):
        pass

    def __init__(self, samples):
        super().__init__("pynvml")
        self.samples, self.turn, self.exhausted = samples, -1, threading.Event()
        self.asked_for = []

    def nvmlInit(self):
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid):
        self.asked_for.append(uuid)
        return len(self.asked_for) - 1

    def nvmlDeviceGetTotalEnergyConsumption(self, board):
        raise self.NVMLError("this board does not count")

    def nvmlDeviceGetPowerUsage(self, board):
        self.turn += board == 0
        if self.turn == len(self.samples):
            self.exhausted.set()
            raise self.NVMLError("the board fell off the bus")
        return 1000 * self.samples[self.turn][1][board]  # milliwatts

    def nvmlDeviceGetUtilizationRates(self, board):
        return types.SimpleNamespace(gpu=self.samples[self.turn][2][board])


def measured_power(monkeypatch, samples, devices=(GPU,)):
    """What the meter makes of scripted samples, and the fake that gave them."""
    nvml = FakeNvml(samples)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index: types.SimpleNamespace(uuid=f"uuid-of-{index}")
    )
    monkeypatch.setattr(device_meters, "POWER_SAMPLE_SECONDS", 0.0)
    seconds = iter([sample[0] for sample in samples])
    monkeypatch.setattr(device_meters, "time", types.SimpleNamespace(perf_counter=lambda: next(seconds)))
    with PowerMeter(devices) as meter:
        assert nvml.exhausted.wait(PATIENCE_S)
    return meter.figures(), nvml


def test_energy_is_power_integrated_over_uneven_time(monkeypatch):
    """10 to 20 W in 1 s is 15 J, 20 to 40 W in 2 s is 60 J: 75 J in 3 s are 25 W."""
    samples = [(100.0, [10], [30]), (101.0, [20], [60]), (103.0, [40], [90])]
    figures, _ = measured_power(monkeypatch, samples)
    assert figures == {
        "mean_power_w": 25.0,
        "energy_j": 75.0,
        "mean_utilization_percent": 60.0,
        "source": "nvml power samples",
    }


def test_the_power_of_several_gpus_is_added_and_their_utilisation_averaged(monkeypatch):
    """30 W and 70 W for 2 s are 200 J; 20 % and 80 % are 50 %."""
    samples = [(0.0, [30, 70], [20, 80]), (2.0, [30, 70], [20, 80])]
    figures, nvml = measured_power(monkeypatch, samples, [GPU, torch.device("cuda", 3)])
    assert figures == {
        "mean_power_w": 100.0,
        "energy_j": 200.0,
        "mean_utilization_percent": 50.0,
        "source": "nvml power samples",
    }
    assert nvml.asked_for == [b"GPU-uuid-of-0", b"GPU-uuid-of-3"]


@pytest.mark.parametrize(
    ("samples", "percent"), [([], None), ([(0.0, [50], [10])], 10.0)], ids=["no_sample", "one_sample"]
)
def test_fewer_than_two_samples_make_no_energy(monkeypatch, samples, percent):
    assert measured_power(monkeypatch, samples)[0] == NO_POWER | {"mean_utilization_percent": percent}


def test_a_board_that_counts_its_energy_is_believed(monkeypatch):
    """The counter goes from 1,000 to 4,000 mJ in 2 s: 3 J, 1.5 W. Samples do not matter."""
    readings, seconds = iter([1000, 4000]), iter([10.0, 11.0, 12.0])
    nvml = FakeNvml([(0.0, [500], [50])])
    nvml.nvmlDeviceGetTotalEnergyConsumption = lambda board: next(readings)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: types.SimpleNamespace(uuid="u"))
    monkeypatch.setattr(device_meters, "POWER_SAMPLE_SECONDS", 0.0)
    monkeypatch.setattr(device_meters, "time", types.SimpleNamespace(perf_counter=lambda: next(seconds)))
    with PowerMeter([GPU]) as meter:
        assert nvml.exhausted.wait(PATIENCE_S)
    assert meter.figures() == {
        "mean_power_w": 1.5,
        "energy_j": 3.0,
        "mean_utilization_percent": 50.0,
        "source": "nvml energy counter",
    }


def test_without_a_gpu_nvml_is_not_asked(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)  # an import would raise
    with PowerMeter([CPU]) as meter:
        assert meter._thread is None
    assert meter.figures() == NO_POWER


def test_where_nvml_does_not_answer_there_is_a_warning_and_no_figure(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with PowerMeter([GPU]) as meter:
        pass
    assert meter.figures() == NO_POWER
    assert "NVML does not answer" in caplog.text


def test_the_sampling_thread_ends_with_the_block_also_after_an_error(monkeypatch):
    samples = [(float(second), [10], [10]) for second in range(1000)]
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(samples))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: types.SimpleNamespace(uuid="u"))
    meter = PowerMeter([GPU])
    with pytest.raises(ZeroDivisionError), meter:
        raise ZeroDivisionError
    assert not meter._thread.is_alive()


@pytest.mark.cuda
def test_on_cuda_a_busy_second_has_power_and_energy():
    work = torch.randn(2048, 2048, device=GPU)
    with PowerMeter([GPU]) as meter:
        for _ in range(2000):
            work = torch.tanh(work @ work)
        torch.cuda.synchronize()
        meter._stop.wait(3 * device_meters.POWER_SAMPLE_SECONDS)
    figures = meter.figures()
    if figures["source"] is None:
        pytest.skip("NVML does not answer here")
    assert figures["mean_power_w"] > 1
    assert figures["energy_j"] > 0
