"""Spans of a run lie as the run went, add up to its record, and become a trace that viewers open."""

from __future__ import annotations

import json
import random
from itertools import pairwise

import pytest
import torch
from tiny_models import CONFIGS, continue_prompt, make_model, make_prompt

from kv_paging import PagedKVCache
from metrics import Timing
from predictive_prefetch import PrefetchingKVCache
from recorder import Recorder
from timeline import TRACKS, DeviceTime, Timeline, chrome_trace, write_chrome_trace

PAGE_BYTES = 2 * 2 * 16 * 16 * 4  # keys and values, 2 heads, 16 positions of 16 float32
PAGE_MS, LATENCY_MS = 2.0, 1.0
SLOW = {"bandwidth_gb_s": PAGE_BYTES / (PAGE_MS * 1e6), "latency_us": 1000.0 * LATENCY_MS}
PAGING = {"page_size": 16, "max_gpu_pages": 3, "staging_pages": 2, "link": SLOW}
TIMING = Timing.from_token_times([1.0, 2.0], batch_size=1, clock="made up")
NEW_TOKENS = 20  # of 100 positions and 7 pages; the seventh fills at 112


@pytest.fixture(scope="module")
def llama():
    return make_model(CONFIGS["llama_gqa"])


def run(model, cache, new_tokens=NEW_TOKENS, **prompt):
    with cache.attached(model):
        tokens = continue_prompt(model, make_prompt(100, **prompt), new_tokens, past_key_values=cache)
    return tokens, cache.figures(TIMING)


def cache_for(mode, model, **options):
    options = PAGING | {"record_timeline": True} | options
    if mode == "reactive":
        return PagedKVCache(model.config, **options)
    return PrefetchingKVCache(model.config, prefetch_k=2, predictor=mode, **options)


@pytest.fixture(scope="module", params=["reactive", "layer_ahead", "last_step", "selecting"])
def figures(request, llama):
    """The figures of a run on a slow link, in which a page takes 3 ms alone."""
    if request.param != "selecting":
        return run(llama, cache_for(request.param, llama))[1]
    options = {"selector": "quest", "attention_pages": 5}
    return run(llama, cache_for("last_step", llama, **options), batch=2)[1]


def of_track(figures, *tracks):
    return [span for span in figures["cache"]["timeline"] if span["track"] in tracks]


def length_ms(span):
    return span["end_ms"] - span["start_ms"]


def test_computation_and_waiting_take_turns(figures):
    spans = of_track(figures, "compute", "wait")
    assert all(one["end_ms"] <= other["start_ms"] for one, other in pairwise(spans))
    assert all(length_ms(span) > 0 for span in spans)
    # A layer goes through before the next one begins, and a step before the next step.
    places = [(span["step"], span["layer"]) for span in spans]
    assert places == sorted(places)
    by_place = {place: [span["track"] for span in spans if (span["step"], span["layer"]) == place] for place in places}
    assert all(tracks[-1] == "compute" for tracks in by_place.values())
    assert any("wait" in tracks for tracks in by_place.values())


def test_waits_are_the_recorded_stalls_step_by_step(figures):
    waits = of_track(figures, "wait")
    assert figures["cache"]["stall_ms"] > 0
    for step in figures["steps"]:
        waited_ms = sum(length_ms(span) for span in waits if span["step"] == step["step"])
        assert waited_ms == pytest.approx(step["stall_ms"] if step["phase"] == "decode" else 0.0, abs=1e-5)


@pytest.mark.parametrize(("name", "stage"), [("attention", "attend_ms"), ("page selection", "select_ms")])
def test_spans_of_a_stage_are_the_stages_time(figures, name, stage):
    spans = [span for span in of_track(figures, "compute") if span["name"] == name]
    assert sum(map(length_ms, spans)) == pytest.approx(figures["cache"]["stages"][stage], abs=1e-5)


def test_copies_of_one_direction_go_one_after_another(figures):
    for track in ("to device", "to host"):
        spans = of_track(figures, track)
        assert spans
        assert all(one["end_ms"] <= other["start_ms"] for one, other in pairwise(spans))


def test_a_copy_takes_the_links_time(figures):
    """It may take longer where the worker thread came to it late, but most copies do not. None takes less."""
    copies = of_track(figures, "to device", "to host")
    excess_ms = sorted(length_ms(span) - (LATENCY_MS + span["pages"] * PAGE_MS) for span in copies)
    assert excess_ms[0] == pytest.approx(0.0, abs=1e-5)
    assert excess_ms[len(excess_ms) // 2] == pytest.approx(0.0, abs=1e-5)


def test_copies_are_those_that_were_counted(figures):
    def pages(name):
        return sum(span["pages"] for span in figures["cache"]["timeline"] if span["name"] == name)

    assert {span["name"] for span in of_track(figures, "to device")} <= {"fetch", "prefetch"}
    decode = [step for step in figures["steps"] if step["phase"] == "decode"]
    prefetched = sum(step["prefetch_issued"] for step in decode)
    assert pages("prefetch") == prefetched
    assert (prefetched > 0) == ("prefetch" in figures and figures["prefetch"]["issued"] > 0)
    assert pages("fetch") == sum(step["h2d_pages"] for step in decode) - prefetched
    assert pages("seal") == sum(step["d2h_pages"] for step in decode)


def test_time_counts_from_the_first_decode_step(figures):
    spans = figures["cache"]["timeline"]
    first = min(step["step"] for step in figures["steps"] if step["phase"] == "decode")
    assert {span["step"] for span in spans} == set(range(first, first + NEW_TOKENS - 1))
    assert [span["start_ms"] for span in spans] == sorted(span["start_ms"] for span in spans)
    assert spans[0]["step"] == first
    assert spans[0]["start_ms"] >= 0
    json.dumps(spans, allow_nan=False)


@pytest.mark.parametrize("mode", ["reactive", "layer_ahead"])
def test_a_timeline_is_kept_only_when_asked_for_and_changes_no_token(llama, mode):
    tokens, figures = run(llama, cache_for(mode, llama, link="memory"))
    without = cache_for(mode, llama, link="memory", record_timeline=False)
    plain_tokens, plain_figures = run(llama, without)
    assert without.recorder.timeline is None
    assert figures["cache"]["timeline"]
    assert "timeline" not in plain_figures["cache"]
    assert torch.equal(tokens, plain_tokens)


def test_a_reset_cache_starts_its_timeline_again(llama):
    cache = cache_for("reactive", llama, link="memory")
    run(llama, cache)
    cache.reset()
    assert cache.recorder.timeline.spans() == []
    _, figures = run(llama, cache, new_tokens=3)
    assert {span["step"] for span in figures["cache"]["timeline"]} == {1, 2}


def test_a_prompt_of_one_token_is_recorded_from_when_pages_are_allocated(llama):
    cache = cache_for("reactive", llama, link="memory")
    with cache.attached(llama):
        continue_prompt(llama, make_prompt(1), 6, past_key_values=cache)
    assert {span["step"] for span in cache.figures(TIMING)["cache"]["timeline"]} == {1, 2, 3, 4, 5}


# --- moments of devices -------------------------------------------------------------------------------------------


class FakeEvent:
    """An event of a device that knows when it happened, in ms, and tells only events of the same device."""

    def __init__(self, at_ms, device="cuda:0"):
        self.at_ms, self.device = at_ms, device

    def elapsed_time(self, end):
        assert end.device == self.device
        return end.at_ms - self.at_ms


class FakeCopy:
    def __init__(self, *moments):
        self.moments = lambda: moments or None


def test_times_of_a_cpu_end_as_they_are_reported(monkeypatch):
    timeline = Timeline()
    timeline.begin_step(3, True, lambda: [50.0])  # in seconds, as a CPU counts
    monkeypatch.setattr("timeline.time.perf_counter", lambda: 51.0)
    timeline.spent(2, "select", 100.0)
    timeline.copying(1, "seal", FakeCopy(50.25, 50.5), 1)
    assert timeline.spans() == [
        {"track": "to host", "name": "seal", "layer": 1, "step": 3, "pages": 1, "start_ms": 250.0, "end_ms": 500.0},
        {
            **{"track": "compute", "name": "page selection", "layer": 2, "step": 3},
            **{"start_ms": pytest.approx(900.0), "end_ms": 1000.0},
        },
    ]


def test_times_of_devices_are_placed_by_their_events_each_device_from_its_own_start():
    recorder = Recorder(timeline=Timeline())
    recorder.begin_step("decode")
    recorder.timeline.begin_step(7, True, lambda: [FakeEvent(100.0), FakeEvent(900.0, "cuda:1")])
    recorder.copying(1, "prefetch", FakeCopy(FakeEvent(101.5), FakeEvent(104.0)), 3)
    recorder.copying(1, "fetch", FakeCopy(), 2)  # failed
    recorder.spent(0, "attend", DeviceTime([(FakeEvent(103.0), FakeEvent(105.0))]))
    recorder.waited(1, DeviceTime([(FakeEvent(905.0, "cuda:1"), FakeEvent(906.0, "cuda:1"))] * 2))
    recorder.waited(1, 0.0)
    recorder.spent(0, "select", 4.0)  # of the host, whose clock is not the devices'
    recorder.settle()
    wait = {"track": "wait", "name": "wait", "layer": 1, "step": 7, "start_ms": 5.0, "end_ms": 6.0}
    assert recorder.timeline.spans() == [
        {"track": "to device", "name": "prefetch", "layer": 1, "step": 7, "pages": 3, "start_ms": 1.5, "end_ms": 4.0},
        {"track": "compute", "name": "attention", "layer": 0, "step": 7, "start_ms": 3.0, "end_ms": 5.0},
        wait,
        wait,
    ]
    assert recorder.snapshot("decode")["stall_ms"] == 2.0  # both waits


def test_nothing_is_read_from_a_device_before_the_end(monkeypatch):
    monkeypatch.setattr(FakeEvent, "elapsed_time", lambda *given: pytest.fail("read during the run"))
    timeline = Timeline()
    timeline.begin_step(1, True, lambda: [FakeEvent(0.0)])
    timeline.spent(0, "attend", DeviceTime([(FakeEvent(1.0), FakeEvent(2.0))]))
    timeline.copying(0, "fetch", FakeCopy(FakeEvent(1.0), FakeEvent(2.0)), 1)
    timeline.begin_step(2, True, lambda: pytest.fail("the start is that of the first step"))


@pytest.mark.cuda
@pytest.mark.parametrize("mode", ["reactive", "layer_ahead"])
def test_on_cuda_spans_lie_as_the_run_went_as_well(mode):
    model = make_model(CONFIGS["llama_gqa"]).cuda()
    prompt = make_prompt(100)
    cache = cache_for(mode, model)
    with cache.attached(model):
        continue_prompt(model, type(prompt)(prompt.ids.cuda(), prompt.mask.cuda()), NEW_TOKENS, past_key_values=cache)
    figures = cache.figures(TIMING)
    resolution_ms = 0.002
    for tracks in (("compute", "wait"), ("to device",), ("to host",)):
        spans = of_track(figures, *tracks)
        assert spans
        assert spans[0]["start_ms"] >= 0
        assert all(one["end_ms"] <= other["start_ms"] + resolution_ms for one, other in pairwise(spans))
    waits = of_track(figures, "wait")
    stall_ms = figures["cache"]["stall_ms"]
    assert sum(map(length_ms, waits)) == pytest.approx(stall_ms, abs=resolution_ms * (1 + len(waits)))


# --- traces -------------------------------------------------------------------------------------------------------

SPANS = [
    {"track": "compute", "name": "attention", "layer": 0, "step": 1, "start_ms": 0.5, "end_ms": 2.25},
    {"track": "to device", "name": "prefetch", "layer": 1, "step": 1, "start_ms": 1.0, "end_ms": 3.5, "pages": 4},
    {"track": "wait", "name": "wait", "layer": 1, "step": 1, "start_ms": 2.25, "end_ms": 3.5},
    {"track": "to host", "name": "seal", "layer": 1, "step": 2, "start_ms": 4.0, "end_ms": 4.0005, "pages": 1},
]


def named(thread, name):
    base = {"ph": "M", "pid": 1, "tid": thread}
    return [
        {**base, "name": "thread_name", "args": {"name": name}},
        {**base, "name": "thread_sort_index", "args": {"sort_index": thread}},
    ]


def test_a_trace_has_a_named_thread_for_each_track_and_microseconds():
    assert chrome_trace(SPANS, "one run") == {
        "displayTimeUnit": "ms",
        "traceEvents": [
            {"ph": "M", "pid": 1, "name": "process_name", "args": {"name": "one run"}},
            *named(1, "compute"),
            *named(2, "wait"),
            *named(3, "to device"),
            *named(4, "to host"),
            {
                **{"ph": "X", "pid": 1, "tid": 1, "name": "attention", "cat": "compute", "ts": 500.0, "dur": 1750.0},
                "args": {"layer": 0, "step": 1},
            },
            {
                **{"ph": "X", "pid": 1, "tid": 3, "name": "prefetch", "cat": "to device", "ts": 1000.0, "dur": 2500.0},
                "args": {"layer": 1, "step": 1, "pages": 4},
            },
            {
                **{"ph": "X", "pid": 1, "tid": 2, "name": "wait", "cat": "wait", "ts": 2250.0, "dur": 1250.0},
                "args": {"layer": 1, "step": 1},
            },
            {
                **{"ph": "X", "pid": 1, "tid": 4, "name": "seal", "cat": "to host", "ts": 4000.0, "dur": 0.5},
                "args": {"layer": 1, "step": 2, "pages": 1},
            },
        ],
    }


def test_spans_that_touch_touch_in_the_trace_as_well():
    """Viewers nest events of a thread that overlap, be it by a nanosecond."""
    rng = random.Random(5)
    ends = [0.0]
    for _ in range(500):
        ends.append(ends[-1] + rng.uniform(1e-6, 0.01))
    spans = [SPANS[0] | {"start_ms": start, "end_ms": end} for start, end in pairwise(ends)]
    events = [event for event in chrome_trace(spans, "steps")["traceEvents"] if event["ph"] == "X"]
    for one, other in pairwise(events):
        assert one["ts"] + one["dur"] == pytest.approx(other["ts"], abs=1e-6)
        assert one["dur"] >= 0


def test_a_trace_is_written_as_strict_json(tmp_path):
    path = write_chrome_trace(tmp_path / "new" / "trace.json", SPANS, "one run")
    assert json.loads(path.read_text()) == chrome_trace(SPANS, "one run")
    with pytest.raises(ValueError, match="Out of range float"):
        write_chrome_trace(path, [SPANS[0] | {"end_ms": float("nan")}], "no number")
    assert json.loads(path.read_text()) == chrome_trace(SPANS, "one run")
    assert [one.name for one in path.parent.iterdir()] == ["trace.json"]


def test_every_track_of_a_run_has_a_thread(figures):
    assert {span["track"] for span in figures["cache"]["timeline"]} <= set(TRACKS)
    events = chrome_trace(figures["cache"]["timeline"], "a run")["traceEvents"]
    assert sum(event["ph"] == "X" for event in events) == len(figures["cache"]["timeline"])
