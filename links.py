"""The bus between host and device: what it is called, how wide it is, and what it would cost to send bytes over it.

On CUDA the link is the real bus. On a CPU both sides are the same memory, so a copy between them says nothing about a
bus; a *simulated* link then delays the completion of each real copy as a bus of that bandwidth and latency would. Every
result says which it was.

The presets are the raw rates of PCI Express with 16 lanes after 128b/130b line coding, per direction: 8, 16 and 32 GT/s
per lane for generations 3, 4 and 5 (PCI-SIG base specifications 3.0, 4.0, 5.0). Packet headers take a further 5-20 %
in practice, so a preset is the most a bus of that kind can do. Their latency of 10 us stands for asking for the pages
of one request. A simulated link only ever delays: where the copy itself takes longer than the bus would, the copy's
time counts, and a result's `effective_bandwidth_gb_s` shows it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from registry import nearest


def _pcie_x16_gb_s(gigatransfers_per_second: float) -> float:
    lanes, payload, bits_per_byte = 16, 128 / 130, 8
    return gigatransfers_per_second * lanes * payload / bits_per_byte


@dataclass(frozen=True)
class Link:
    """A bus, per direction.

    Attributes:
        kind: `"bus"` (a real one), `"simulated"`, or `"memory"` (plain copies, as fast as they go).
        name: the preset's name, or `"custom"`.
        bandwidth_gb_s: 10^9 bytes per second, or None where it is not known beforehand.
        latency_us: time from a request to its first byte, in microseconds.
    """

    kind: str
    name: str
    bandwidth_gb_s: float | None = None
    latency_us: float = 0.0

    def transfer_seconds(self, n_bytes: int) -> float:
        """Time the link needs for one copy of `n_bytes`; 0 where no bandwidth is known."""
        if self.bandwidth_gb_s is None:
            return 0.0
        return self.latency_us / 1e6 + n_bytes / (self.bandwidth_gb_s * 1e9)


MEMORY = Link("memory", "memory")
BUS = Link("bus", "pcie")
PRESETS = {
    f"pcie{generation}-x16": Link("simulated", f"pcie{generation}-x16", round(_pcie_x16_gb_s(rate), 2), 10.0)
    for generation, rate in ((3, 8.0), (4, 16.0), (5, 32.0))
}
NAMES = ("auto", "memory", *PRESETS)


def choose_link(choice: str | Mapping[str, Any], device_type: str) -> Link:
    """The link a run uses.

    Args:
        choice: one of `NAMES`, or `{"bandwidth_gb_s": float, "latency_us": float}`. It is for a CPU: on CUDA pages
            cross the real bus whatever is chosen, so that one experiment list serves both.
        device_type: `"cuda"` or `"cpu"`.

    Raises:
        ValueError: the name is unknown.
    """
    if device_type == "cuda":
        return BUS
    if isinstance(choice, Mapping):
        return Link("simulated", "custom", float(choice["bandwidth_gb_s"]), float(choice.get("latency_us", 0.0)))
    if choice == "memory":
        return MEMORY
    if choice == "auto":
        return PRESETS["pcie3-x16"]
    if choice in PRESETS:
        return PRESETS[choice]
    raise ValueError(f"unknown link {choice!r}{nearest(choice, NAMES)} (known: {', '.join(NAMES)})")
