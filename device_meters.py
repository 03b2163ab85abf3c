"""What a machine can be asked while a model generates: when each token was there, how much memory, how much power.

Each meter answers for what it can read and says None for the rest: no GPU, no GPU figures; no NVML, no power.

* `TokenClock` is a stopping criterion that never stops: transformers calls it once after each token. On a CPU it reads
  the clock; on CUDA it records an event on the compute stream, and the events are read after the run, so that the clock
  makes nothing wait.
* `MemoryMeter` reads the allocator of each CUDA device and this process's resident set.
* `PowerMeter` samples NVML in a thread, for the GPUs the model is on.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import psutil
import torch
from transformers import StoppingCriteria

MEBIBYTE = 2**20
POWER_SAMPLE_SECONDS = 0.05

log = logging.getLogger(__name__)


class TokenClock(StoppingCriteria):
    """Records when each token of a generation was there.

    Args:
        device: where input ids go, and logits come back to; decides which clock is used.
        on_token: called after each token with the number of tokens so far, for progress.
    """

    def __init__(self, device: torch.device, on_token: Any = None):
        self.device, self.on_token = device, on_token
        self._marks: list[Any] = []
        self._start: Any = None

    @property
    def name(self) -> str:
        return "cuda_events" if self.device.type == "cuda" else "perf_counter"

    def start(self) -> None:
        """Start the clock, once everything issued before has finished."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._marks = []
        self._start = self._mark()

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.Tensor:
        self._marks.append(self._mark())
        if self.on_token is not None:
            self.on_token(len(self._marks))
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    def token_times_ms(self) -> list[float]:
        """When each token was there, in ms since `start`. On CUDA this waits for the last event, once."""
        if self.device.type != "cuda":
            return [1000.0 * (mark - self._start) for mark in self._marks]
        torch.cuda.synchronize(self.device)
        return [self._start.elapsed_time(mark) for mark in self._marks]

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event


class MemoryMeter:
    """Device and process memory of a run.

    Args:
        devices: the devices the model is on; those that are not CUDA are left out.
    """

    def __init__(self, devices: Sequence[torch.device]):
        self.devices = [device for device in devices if device.type == "cuda"]
        self._process = psutil.Process()

    def start(self) -> None:
        for device in self.devices:
            torch.cuda.reset_peak_memory_stats(device)
        self._allocated_before = self._allocated()
        self._rss_before = self._process.memory_info().rss

    def figures(self) -> dict[str, float | None]:
        """MiB: allocated now, the peak, and how far the peak is above the start; the same for the process (RSS)."""
        rss = self._process.memory_info().rss
        figures: dict[str, float | None] = {
            "gpu_memory_mb": None,
            "gpu_peak_mb": None,
            "gpu_delta_mb": None,
            "rss_mb": rss / MEBIBYTE,
            "rss_delta_mb": (rss - self._rss_before) / MEBIBYTE,
        }
        if self.devices:
            peak = sum(torch.cuda.max_memory_allocated(device) for device in self.devices)
            figures["gpu_memory_mb"] = self._allocated() / MEBIBYTE
            figures["gpu_peak_mb"] = peak / MEBIBYTE
            figures["gpu_delta_mb"] = (peak - self._allocated_before) / MEBIBYTE
        return figures

    def _allocated(self) -> int:
        return sum(torch.cuda.memory_allocated(device) for device in self.devices)


class PowerMeter:
    """Power, energy and utilisation of the GPUs during a `with` block, through NVML; None where it does not answer.

    Energy is the difference of the boards' own counters. Boards without one (before Volta) have their power sampled and
    integrated instead; on newer boards that reading is an average over a second, too slow for a short run.
    """

    def __init__(self, devices: Sequence[torch.device]):
        self._indices = [device.index or 0 for device in devices if device.type == "cuda"]
        self._samples: list[tuple[float, float, float]] = []  # seconds, watts, percent
        self._counters: list[tuple[float, float]] = []  # seconds, joules: at the start and at the end
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> PowerMeter:
        self._handles = self._open()
        if self._handles:
            self._read_counters()
            self._thread = threading.Thread(target=self._sample_until_stopped, name="power-meter", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        if self._thread is None:
            return
        self._thread.join()
        self._read_counters()

    def figures(self) -> dict[str, float | str | None]:
        """Mean power (W), energy over the block (J), mean utilisation (%), and what the energy was read from."""
        busy = [percent for _, _, percent in self._samples]
        utilization = sum(busy) / len(busy) if busy else None
        if len(self._counters) == 2:
            (start, joules_before), (end, joules_after) = self._counters
            energy_j, seconds, source = joules_after - joules_before, end - start, "nvml energy counter"
        elif len(self._samples) > 1:
            seconds = self._samples[-1][0] - self._samples[0][0]
            energy_j, source = _integrated(self._samples), "nvml power samples"
        else:
            return {"mean_power_w": None, "energy_j": None, "mean_utilization_percent": utilization, "source": None}
        return {
            "mean_power_w": energy_j / seconds,
            "energy_j": energy_j,
            "mean_utilization_percent": utilization,
            "source": source,
        }

    def _open(self) -> list[Any]:
        if not self._indices:
            return []
        try:
            import pynvml

            pynvml.nvmlInit()
            # NVML numbers all boards; torch numbers those that are visible. The UUID names one board to both.
            uuids = [str(torch.cuda.get_device_properties(index).uuid) for index in self._indices]
            return [pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode()) for uuid in uuids]
        except Exception as error:  # NVML's own error classes exist only once it is imported
            log.warning("no power figures: NVML does not answer (%s)", error)
            return []

    def _read_counters(self) -> None:
        """Note what the boards have used since the driver was loaded, unless one of them does not count."""
        import pynvml

        try:
            millijoules = sum(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) for handle in self._handles)
        except pynvml.NVMLError:
            return
        self._counters.append((time.perf_counter(), millijoules / 1000.0))

    def _sample_until_stopped(self) -> None:
        import pynvml

        while True:
            try:
                watts = sum(pynvml.nvmlDeviceGetPowerUsage(handle) for handle in self._handles) / 1000.0
                busy = [pynvml.nvmlDeviceGetUtilizationRates(handle).gpu for handle in self._handles]
            except pynvml.NVMLError as error:
                log.warning("power samples end here: %s", error)
                return
            self._samples.append((time.perf_counter(), watts, sum(busy) / len(busy)))
            if self._stop.wait(POWER_SAMPLE_SECONDS):
                return


def _integrated(samples: Sequence[tuple[float, float, float]]) -> float:
    """Joules under the power samples, by the trapezoid rule."""
    return sum((t1 - t0) * (p0 + p1) / 2 for (t0, p0, _), (t1, p1, _) in pairwise(samples))
