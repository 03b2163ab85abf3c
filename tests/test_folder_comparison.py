"""Two folders compared: which runs are matched, what is said to differ, and which verdict a figure gets."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from result_fixtures import approximately, make_failure, make_result, make_sweep, with_fidelity, write_results

import folder_comparison
from folder_comparison import METRICS, Folder, FolderComparison, compare_folders, match

FIGURES = {"tpot_ms": "timing", "ttft_ms": "timing", "tokens_per_second": "timing", "hit_rate": "cache"}


def scaled(results, metric, factor, **changed):
    """Copies whose figure is `factor` times as large, and so much of the spec changed."""
    copies = copy.deepcopy(results)
    for result in copies:
        block = result[FIGURES[metric]]
        if block:
            block[metric] *= factor
        result["spec"].update(changed)
    return copies


def compared(tmp_path, a, b):
    return compare_folders(write_results(tmp_path / "A", a), write_results(tmp_path / "B", b))


def figure(comparison, metric, strategy, context=500):
    (found,) = [
        c for c in comparison.figures if (c.metric.name, c.strategy, c.context_tokens) == (metric, strategy, context)
    ]
    return found


def runs(mode, times_ms, **spec):
    return [make_result(mode, repetition=r, tpot_ms=t, **spec) for r, t in enumerate(times_ms)]


# --- figures and verdicts -----------------------------------------------------------------------------------------


def test_a_folder_compares_with_itself_as_1_in_every_figure(tmp_path):
    comparison = compared(tmp_path, make_sweep(), make_sweep())
    assert {c.ratio.ratio for c in comparison.figures} == {1.0}
    assert {c.verdict for c in comparison.figures} == {"no difference shown"}
    assert (comparison.unmatched, comparison.differences(), len(comparison.pairs)) == ([], [], 18)


def test_a_figure_is_the_median_ratio_of_pairs_with_both_medians(tmp_path):
    # Ratios 110 / 100, 240 / 200, 390 / 300 = 1.1, 1.2, 1.3.
    comparison = compared(tmp_path, runs("baseline", (100.0, 200.0, 300.0)), runs("baseline", (110.0, 240.0, 390.0)))
    found = figure(comparison, "tpot_ms", "baseline")
    assert (found.a, found.b) == (200.0, 240.0)
    assert (found.ratio.ratio, found.ratio.low, found.ratio.high) == pytest.approx((1.2, 1.1, 1.3))
    assert (found.ratio.n_pairs, found.verdict) == (3, "worse")


def test_over_all_contexts_the_ratio_is_the_geometric_mean(tmp_path):
    sweep = make_sweep()
    slower = [r for r in scaled(sweep, "tpot_ms", 4.0) if r["spec"]["context_length"] == 1000]
    same = [r for r in sweep if r["spec"]["context_length"] == 500]
    comparison = compared(tmp_path, sweep, same + slower)
    assert figure(comparison, "tpot_ms", "reactive", None).ratio.ratio == pytest.approx(2.0)  # sqrt(1 x 4)
    assert figure(comparison, "tpot_ms", "reactive", None).a is None  # a median over contexts would be of nothing


@pytest.mark.parametrize(
    ("metric", "factor", "verdict"),
    [
        ("tpot_ms", 1.1, "worse"),
        ("tpot_ms", 0.9, "better"),
        ("tokens_per_second", 1.1, "better"),
        ("tokens_per_second", 0.9, "worse"),
        ("hit_rate", 0.9, "worse"),
    ],
)
def test_what_is_better_depends_on_the_metric(tmp_path, metric, factor, verdict):
    sweep = make_sweep(contexts=(500,))
    comparison = compared(tmp_path, sweep, scaled(sweep, metric, factor))
    assert figure(comparison, metric, "predictive").verdict == verdict


def test_a_speed_up_over_the_folders_own_baseline_does_not_mind_a_slower_machine(tmp_path):
    sweep = make_sweep()
    slower_machine = scaled(sweep, "tpot_ms", 3.0)
    for result in slower_machine:  # and prefetching became slower by a half besides
        result["timing"]["tpot_ms"] *= 1.5 if result["spec"]["mode"] == "predictive" else 1.0
    comparison = compared(tmp_path, sweep, slower_machine)
    reactive, predictive = (figure(comparison, "speedup", mode) for mode in ("reactive", "predictive"))
    assert (reactive.a, reactive.ratio.ratio, reactive.verdict) == pytest.approx((101 / 81, 1.0, "no difference shown"))
    assert (predictive.ratio.ratio, predictive.verdict) == (pytest.approx(1 / 1.5), "worse")
    assert not any(c.strategy == "baseline" for c in comparison.figures if c.metric.name == "speedup")


def test_runs_that_scatter_on_both_sides_of_1_show_no_difference(tmp_path):
    comparison = compared(tmp_path, runs("baseline", (100.0, 100.0, 100.0)), runs("baseline", (90.0, 150.0, 160.0)))
    assert figure(comparison, "tpot_ms", "baseline").verdict == "no difference shown"


def test_a_single_pair_is_too_few_for_times_and_enough_for_what_never_varies(tmp_path):
    a, b = with_fidelity(make_result("reactive"), kl_mean=0.1), with_fidelity(make_result("reactive"), kl_mean=0.3)
    b["memory"]["device_kv_bytes"] //= 2
    comparison = compared(tmp_path, [a], [b])
    assert figure(comparison, "tpot_ms", "reactive").verdict == "too few runs"
    assert figure(comparison, "device_kv_mb", "reactive").verdict == "better"
    assert figure(comparison, "kl_mean", "reactive").verdict == "worse"
    assert figure(comparison, "top1_agreement", "reactive").verdict == "no difference shown"


def test_rounding_is_no_difference(tmp_path):
    pairs = [(3e-8, 9e-8), (0.2, 0.20001), (3e-8, 0.2)]
    verdicts = []
    for index, (a, b) in enumerate(pairs):
        sides = [[with_fidelity(approximately(make_result("reactive")), kl_mean=kl)] for kl in (a, b)]
        verdicts.append(figure(compared(tmp_path / str(index), *sides), "kl_mean", "reactive").verdict)
    assert verdicts == ["no difference shown", "no difference shown", "worse"]


def test_a_stall_that_appears_is_worse_and_has_no_finite_ratio(tmp_path):
    a, b = runs("reactive", (80.0, 80.0)), runs("reactive", (80.0, 80.0))
    for result, stall in zip([*a, *b], (0.0, 0.0, 4.0, 5.0), strict=True):
        result["cache"]["stall_percent"] = stall
    found = figure(compared(tmp_path, a, b), "stall_percent", "reactive")
    assert (found.ratio.low, found.verdict) == (float("inf"), "worse")


def test_what_only_one_side_measured_is_missing_and_what_neither_did_is_left_out(tmp_path):
    failed = [make_failure(result) for result in runs("reactive", (80.0, 80.0))]
    good = runs("reactive", (80.0, 80.0))
    assert figure(compared(tmp_path / "1", good, failed), "tpot_ms", "reactive").verdict == "missing in B"
    assert figure(compared(tmp_path / "2", failed, good), "tpot_ms", "reactive").verdict == "missing in A"
    comparison = compared(tmp_path / "3", good, good)
    assert not any(c.metric.name in ("energy_j", "gpu_peak_mb", "kl_mean") for c in comparison.figures)


times = st.lists(st.tuples(st.floats(10, 500), st.floats(10, 500)), min_size=1, max_size=4)
OPPOSITE = {"better": "worse", "worse": "better", "missing in A": "missing in B", "missing in B": "missing in A"}


def of_times(pairs):
    """A comparison made without files, of baselines with these times in A and B."""
    a, b = (Folder(None, runs("baseline", side), []) for side in zip(*pairs, strict=True))
    return FolderComparison(a, b, [(i, i) for i in range(len(pairs))], [])


@settings(max_examples=15)
@given(times)
def test_swapped_folders_give_the_inverse_ratio_and_the_opposite_verdict(pairs):
    forth, back = of_times(pairs), of_times([pair[::-1] for pair in pairs])
    for one, other in zip(forth.figures, back.figures, strict=True):
        assert one.ratio.ratio * other.ratio.ratio == pytest.approx(1.0)
        assert other.verdict == OPPOSITE.get(one.verdict, one.verdict)


@settings(max_examples=15)
@given(times, st.floats(0.1, 10))
def test_machines_that_are_both_faster_by_the_same_factor_compare_alike(pairs, factor):
    one, other = of_times(pairs), of_times([(factor * a, factor * b) for a, b in pairs])
    tpot = figure(one, "tpot_ms", "baseline"), figure(other, "tpot_ms", "baseline")
    assert tpot[1].ratio.ratio == pytest.approx(tpot[0].ratio.ratio)


def test_the_interval_is_that_of_all_resamples_of_pairs(tmp_path):
    ratios = (0.8, 1.1, 1.15, 1.2, 1.3, 2.0)
    comparison = compared(tmp_path, runs("baseline", [100.0] * 6), runs("baseline", [100.0 * r for r in ratios]))
    found = figure(comparison, "tpot_ms", "baseline").ratio
    medians = np.exp([np.median(sample) for sample in itertools.product(np.log(ratios), repeat=6)])
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(medians, (0.025, 0.975))), rel=0.02)


# --- matching -----------------------------------------------------------------------------------------------------


def test_the_same_entry_of_a_list_is_matched_whatever_its_machine_link_and_settings(tmp_path):
    a, b = make_sweep(contexts=(500,)), make_sweep(contexts=(500,))
    for result in b:
        result["spec"]["dtype"] = "bfloat16"
        result["environment"] = {"cpu": "New CPU", "torch_threads": 2, "gpus": [], "packages": {"torch": "9.9"}}
        if result["cache"]:
            result["cache"]["link"]["bandwidth_gb_s"] = 64.0
            result["spec"]["paging"]["max_gpu_pages"] = 8
    comparison = compared(tmp_path, a, b)
    assert (len(comparison.pairs), comparison.unmatched) == (9, [])
    assert comparison.differences() == [
        ("cpu", "Test CPU", "New CPU"),
        ("link of reactive", "simulated pcie3-x16, 15.75 GB/s", "simulated pcie3-x16, 64 GB/s"),
        ("link of predictive", "simulated pcie3-x16, 15.75 GB/s", "simulated pcie3-x16, 64 GB/s"),
        ("torch", "not recorded", "9.9"),
        ("dtype of baseline, reactive, predictive", "none", "bfloat16"),
        ("paging.max_gpu_pages of reactive, predictive", "4", "8"),
    ]


@pytest.mark.parametrize(
    "change", [{"max_new_tokens": 99}, {"batch_size": 4}, {"model_name": "other"}, {"name": "another"}]
)
def test_runs_that_were_asked_for_other_work_have_no_partner(tmp_path, change):
    sweep = make_sweep(contexts=(500,))
    changed = scaled([r for r in sweep if r["spec"]["mode"] == "reactive"], "tpot_ms", 1.0, **change)
    comparison = compared(tmp_path, sweep, [r for r in sweep if r["spec"]["mode"] != "reactive"] + changed)
    assert [(u.side, u.context_tokens, u.repetitions, u.why) for u in comparison.unmatched] == [
        ("A", 500, (0, 1, 2), "no such run"),
        ("B", 500, (0, 1, 2), "no such run"),
    ]


def test_a_repetition_and_a_context_of_one_side_alone_are_listed_and_left_out(tmp_path):
    comparison = compared(tmp_path, make_sweep((500, 1000), 2), make_sweep((500,), 3))
    assert {(u.side, u.context_tokens, u.repetitions) for u in comparison.unmatched} == {
        ("A", 1000, (0, 1)),
        ("B", 500, (2,)),
    }
    assert figure(comparison, "tpot_ms", "baseline").ratio.n_pairs == 2


def test_namesakes_are_matched_by_their_whole_spec_and_else_not_at_all(tmp_path):
    def budget(pages):
        found = make_result("reactive")
        found["spec"]["paging"]["max_gpu_pages"] = pages
        return {**found, "run_id": f"{pages}"}

    comparison = compared(tmp_path / "1", [budget(4), budget(8)], [budget(8), budget(4)])
    assert all(comparison.a.results[a]["run_id"] == comparison.b.results[b]["run_id"] for a, b in comparison.pairs)
    assert len(comparison.pairs) == 2
    comparison = compared(tmp_path / "2", [make_result(), budget(4), budget(8)], [make_result(), budget(2)])
    assert {(u.side, u.why) for u in comparison.unmatched} == {
        ("A", "several runs of this name: which is meant?"),
        ("B", "several runs of this name: which is meant?"),
    }


def test_runs_of_several_seeds_are_matched_seed_by_seed_whatever_their_settings(tmp_path):
    a = [make_result("reactive", seed=seed, tpot_ms=100.0 * seed) for seed in (1, 2, 3)]
    b = [make_result("reactive", seed=seed, tpot_ms=200.0 * seed) for seed in (1, 2)]
    for number, result in enumerate([*a, *b]):
        result["run_id"] = str(number)
    for result in b:
        result["spec"]["paging"] = {**result["spec"]["paging"], "max_gpu_pages": 9}
    comparison = compared(tmp_path, a, b)
    found = figure(comparison, "tpot_ms", "reactive")
    assert (found.ratio.n_pairs, found.ratio.low, found.ratio.high) == (2, pytest.approx(2.0), pytest.approx(2.0))
    assert [(u.side, u.reason) for u in comparison.unmatched] == [("A", "no such run in B")]
    other_seed = [make_result("reactive", seed=7)]
    assert len(compared(tmp_path / "other", a[:1], other_seed).pairs) == 1  # a list run again with --seed


def test_a_column_is_read_once_for_all_its_cells(tmp_path, monkeypatch):
    asked = []
    speedups = folder_comparison.own_speedups
    monkeypatch.setattr(folder_comparison, "own_speedups", lambda frame: asked.append(1) or speedups(frame))
    comparison = compared(tmp_path, make_sweep(), make_sweep())
    assert figure(comparison, "speedup", "reactive", 1000).n_a == 3
    assert len(asked) == 2  # once in A and once in B, of six cells


def test_the_tokens_of_partners_are_compared(tmp_path):
    a, b = runs("baseline", (1.0, 1.0, 1.0)), runs("baseline", (1.0, 1.0, 1.0))
    for result, sha256 in zip([*a, *b], ("x", "y", None, "x", "z", "w"), strict=True):
        result["tokens"] = {"sha256": sha256}
    assert compared(tmp_path, a, b).same_tokens == (1, 2)


# --- folders that cannot be compared ------------------------------------------------------------------------------


def test_a_folder_that_is_not_there_or_is_a_file_or_is_empty_is_named(tmp_path):
    good, empty, file = write_results(tmp_path / "good", [make_result()]), tmp_path / "empty", tmp_path / "file"
    empty.mkdir()
    file.write_text("")
    for folder, message in ((tmp_path / "gone", "no such folder"), (file, "this is a file"), (empty, "no result")):
        with pytest.raises(ValueError, match=f"--compare .*{folder.name}: {message}"):
            compare_folders(good, folder)


def test_files_that_cannot_be_read_are_named_and_the_others_compared(tmp_path):
    a, b = (write_results(tmp_path / name, make_sweep()) for name in "ab")
    (b / "reactive_torn.json").write_text("{")
    (b / "baseline_binary.json").write_bytes(b"\xff\xfe\x00")
    (b / "predictive_list.json").write_text("[]")
    comparison = compare_folders(a, b)
    assert [problem.split(":")[0] for problem in comparison.b.problems] == [
        str(b / name) for name in ("baseline_binary.json", "predictive_list.json", "reactive_torn.json")
    ]
    assert len(comparison.pairs) == 18


def test_a_folder_of_torn_files_alone_names_them(tmp_path):
    torn = write_results(tmp_path / "a", [])
    torn.mkdir(exist_ok=True)
    (torn / "baseline_x.json").write_text("{")
    with pytest.raises(ValueError, match=r"that can be read:\n.*baseline_x.json"):
        compare_folders(torn, torn)


def test_folders_without_a_run_in_common_say_what_each_has(tmp_path):
    with pytest.raises(ValueError, match=r"no run .* has a partner.*A has baseline at 500; .*B has reactive at 1000"):
        compared(tmp_path, [make_result()], [make_result("reactive", 1000)])


anything = st.one_of(st.none(), st.booleans(), st.text(max_size=3), st.sampled_from([10**30, 10**400, -1.0, 0, []]))


@settings(max_examples=20)
@given(st.data())
def test_whatever_results_hold_they_are_compared_without_a_traceback(data):
    results = make_sweep(contexts=(500,), repetitions=2)
    torn = copy.deepcopy(results)
    for result in torn[1:]:  # one is left whole, so that there is something to match
        for block in data.draw(
            st.lists(st.sampled_from(["environment", "model", "tokens", "timing", "cache"]), max_size=2)
        ):
            result[block] = data.draw(anything, label=block)
        for block in ("timing", "cache", "spec"):
            if isinstance(result.get(block), dict):
                for key in data.draw(st.lists(st.sampled_from(sorted(set(result[block]) - {"mode"})), max_size=2)):
                    result[block][key] = data.draw(anything, label=key)
    comparison = match(Folder(None, results, []), Folder(None, torn, []))
    assert all(c.metric in METRICS.values() for c in comparison.figures)
    assert all(len(difference) == 3 for difference in comparison.differences())
