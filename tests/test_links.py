"""A link is as wide as its name says, and takes the time that its width allows."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from links import BUS, MEMORY, NAMES, PRESETS, Link, choose_link


@pytest.mark.parametrize(
    ("name", "bandwidth_gb_s"),
    [
        ("pcie3-x16", 15.75),  # 8 GT/s x 16 lanes x 128/130 / 8 bits = 15.754 GB/s
        ("pcie4-x16", 31.51),  # 16 GT/s: 31.508
        ("pcie5-x16", 63.02),  # 32 GT/s: 63.015
    ],
)
def test_a_preset_has_the_raw_rate_of_its_generation(name, bandwidth_gb_s):
    link = choose_link(name, "cpu")
    assert (link.kind, link.name, link.bandwidth_gb_s, link.latency_us) == ("simulated", name, bandwidth_gb_s, 10.0)


def test_a_copy_takes_the_latency_and_its_bytes_over_the_bandwidth():
    link = Link("simulated", "custom", bandwidth_gb_s=2.0, latency_us=50.0)
    assert link.transfer_seconds(4_000_000) == pytest.approx(0.00205)  # 4 MB at 2 GB/s: 2 ms, and 50 us
    assert link.transfer_seconds(0) == pytest.approx(50e-6)


@pytest.mark.parametrize("link", [MEMORY, BUS])
def test_a_link_of_unknown_width_adds_no_time(link):
    assert link.bandwidth_gb_s is None
    assert link.transfer_seconds(10**12) == 0.0


@given(st.integers(0, 10**9), st.integers(0, 10**9))
def test_two_copies_cost_one_latency_more_than_one_copy_of_both(one, other):
    link = PRESETS["pcie4-x16"]
    apart = link.transfer_seconds(one) + link.transfer_seconds(other)
    assert apart == pytest.approx(link.transfer_seconds(one + other) + 10e-6)


@pytest.mark.parametrize("choice", [*NAMES, {"bandwidth_gb_s": 1.0}])
def test_on_cuda_pages_cross_the_real_bus_whatever_is_chosen(choice):
    assert choose_link(choice, "cuda") == BUS


@pytest.mark.parametrize("name", NAMES)
def test_every_name_leads_to_a_link(name):
    assert choose_link(name, "cpu").kind in ("simulated", "memory")


def test_on_a_cpu_auto_is_the_slowest_preset_and_memory_is_no_link_at_all():
    assert choose_link("auto", "cpu").bandwidth_gb_s == min(link.bandwidth_gb_s for link in PRESETS.values())
    assert choose_link("memory", "cpu") == MEMORY


def test_a_link_can_be_given_by_its_figures():
    assert choose_link({"bandwidth_gb_s": 12, "latency_us": 5}, "cpu") == Link("simulated", "custom", 12.0, 5.0)
    assert choose_link({"bandwidth_gb_s": 12}, "cpu").latency_us == 0.0


def test_an_unknown_name_is_refused_with_the_nearest_known_one():
    with pytest.raises(ValueError, match=r"unknown link 'pcie4x16'; did you mean 'pcie4-x16'\? \(known: auto, memory"):
        choose_link("pcie4x16", "cpu")
