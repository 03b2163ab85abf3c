"""Sweeps in a list: the experiments that come of them are those of a brute-force product, and slips are named."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import parameter_sweeps
from default_config import commented_yaml
from experiments import ConfigError, expand, load_experiment, load_experiments
from parameter_sweeps import comparable

PROJECT = Path(__file__).parent.parent
SAME_FOLDER = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def load(tmp_path):
    """The experiments of a list that is given as text or as values."""

    def load_list(content) -> list:
        path = tmp_path / "list.yaml"
        path.write_text(content if isinstance(content, str) else json.dumps(content, indent=1))
        return load_experiments(path)

    return load_list


@pytest.fixture
def errors(load):
    """The messages of a list, from the line on; none if it loads."""

    def messages(content) -> list[str]:
        try:
            load(content)
        except ConfigError as error:
            return [message.partition("list.yaml:")[2] for message in error.messages]
        return []

    return messages


# --- what a sweep stands for ------------------------------------------------------------------------------------

VALUES = {
    "max_gpu_pages": [4, 8, 16, 32],
    "policy": ["lru", "mru", {"name": "s3fifo", "small_fraction": 0.2}],
    "link": ["memory", {"bandwidth_gb_s": 1.5, "latency_us": 0.0}],
    "batch_size": [1, 2, 3],
    "prefill_chunk_size": [None, 64],
    "record_pages": [True, False],
    "context_lengths": [[500], [500, 1000]],
}


@st.composite
def sweeps(draw):
    """Some keys with some of their values, and exclusions of which each names values of some of them."""
    keys = draw(st.lists(st.sampled_from(sorted(VALUES)), min_size=1, max_size=4, unique=True))
    lists = {
        key: draw(st.lists(st.sampled_from(VALUES[key]), min_size=1, unique_by=lambda value: json.dumps(value)))
        for key in keys
    }
    rules = [
        {
            key: draw(st.sampled_from(lists[key]))
            for key in draw(st.lists(st.sampled_from(keys), min_size=1, unique=True))
        }
        for _ in range(draw(st.integers(0, 3)))
    ]
    return lists, rules


@SAME_FOLDER
@given(swept=sweeps())
def test_the_experiments_of_a_sweep_are_the_product_of_its_lists_without_what_is_excluded(load, errors, swept):
    lists, rules = swept
    wanted = [
        dict(zip(lists, values, strict=True))
        for values in itertools.product(*lists.values())
        if not any(all(dict(zip(lists, values, strict=True))[key] == rule[key] for key in rule) for rule in rules)
    ]
    entry = {"mode": "reactive", "sweep": lists} | ({"exclude": rules} if rules else {})
    if not wanted:
        (message,) = errors({"experiments": [entry]})
        assert "leaves out every combination" in message
        return
    found = load({"experiments": [entry]})
    assert [{key: getattr(one, key) for key in lists} for one in found] == wanted
    assert len({one.name for one in found}) == len(found)
    assert all(one.name.startswith("reactive ") and key in one.name for one in found for key in lists)


def test_a_combination_is_the_experiment_that_one_would_write_by_hand(load):
    swept = load({"experiments": [{"mode": "reactive", "sweep": {"max_gpu_pages": [8, 4], "policy": ["mru"]}}]})
    by_hand = load(
        """
        experiments:
          - {mode: reactive, name: reactive max_gpu_pages=8 policy=mru, max_gpu_pages: 8, policy: mru}
          - {mode: reactive, name: reactive max_gpu_pages=4 policy=mru, max_gpu_pages: 4, policy: mru}
        """
    )
    assert swept == by_hand
    assert [run.run_id for run in expand(swept)] == [run.run_id for run in expand(by_hand)]
    assert [run.slug for run in expand(swept)] == [run.slug for run in expand(by_hand)]
    assert len({run.slug for run in expand(swept)}) == len(expand(swept))


def test_a_name_of_ones_own_begins_the_names_of_the_combinations(load):
    one, other = load("experiments: [{mode: reactive, name: small pages, page_size: 16, sweep: {seed: [1, 2]}}]")
    assert (one.name, other.name) == ("small pages seed=1", "small pages seed=2")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (8, "8"),
        (0.25, "0.25"),
        (None, "null"),
        (True, "true"),
        ("lru", "lru"),
        ([500, 1000], "[500,1000]"),
        ({"name": "s3fifo", "small_fraction": 0.2}, "{name=s3fifo,small_fraction=0.2}"),
    ],
)
def test_every_kind_of_value_has_a_short_text_without_spaces(value, text):
    assert parameter_sweeps.combination_text({"key": parameter_sweeps.SweptValue((), value)}) == f"key={text}"


def test_a_key_inside_another_is_swept_by_its_dotted_name_or_in_a_mapping(load):
    dotted = load(
        """
        experiments:
          - mode: reactive
            link: {latency_us: 5}
            sweep: {link.bandwidth_gb_s: [1, 4]}
        """
    )
    nested = load(
        """
        experiments:
          - mode: reactive
            link: {latency_us: 5}
            sweep: {link: {bandwidth_gb_s: [1, 4]}}
        """
    )
    assert [one.link for one in nested] == [
        {"bandwidth_gb_s": 1.0, "latency_us": 5.0},
        {"bandwidth_gb_s": 4.0, "latency_us": 5.0},
    ]
    assert dotted == nested


def test_a_part_and_its_parameters_and_quality_can_be_swept(load):
    found = load(
        """
        experiments:
          - mode: reactive
            policy: s3fifo
            sweep:
              policy.small_fraction: [0.1, 0.2]
              quality.fidelity_tokens: [8, 16]
        """
    )
    assert [(one.policy, one.quality["fidelity_tokens"]) for one in found] == [
        ({"name": "s3fifo", "small_fraction": fraction}, tokens) for fraction in (0.1, 0.2) for tokens in (8, 16)
    ]
    assert found[0].name == "reactive policy.small_fraction=0.1 quality.fidelity_tokens=8"


def test_a_part_and_its_parameter_together_are_swept_where_the_part_has_it(load):
    found = load(
        """
        experiments:
          - mode: reactive
            sweep: {policy.small_fraction: [0.1, 0.2], policy: [s3fifo, lru]}
            exclude: [{policy: lru}]
        """
    )
    assert [one.policy["small_fraction"] for one in found] == [0.1, 0.2]


def test_values_are_compared_as_yaml_values():
    assert comparable(8) == comparable(8.0) != comparable("8")
    assert comparable(1) != comparable(True)
    assert comparable(0) != comparable(False) != comparable(None)
    assert comparable({"a": [1, True], "b": None}) == comparable({"b": None, "a": [1.0, True]})
    assert comparable({"a": [1, True]}) != comparable({"a": [True, 1]})


# --- sweeps in defaults -----------------------------------------------------------------------------------------


def test_a_sweep_in_defaults_multiplies_those_whose_mode_knows_the_key_and_no_baseline(load):
    found = load(
        """
        defaults: {sweep: {max_gpu_pages: [4, 8]}, exclude: [{max_gpu_pages: 8, policy: mru}]}
        experiments:
          - mode: baseline
          - {mode: reactive, sweep: {policy: [lru, mru]}}
          - {mode: predictive, predictor: last_step}
          - {mode: reactive, name: fixed, max_gpu_pages: 16}
        """
    )
    assert [one.name for one in found] == [
        "baseline",
        "reactive max_gpu_pages=4 policy=lru",
        "reactive max_gpu_pages=4 policy=mru",
        "reactive max_gpu_pages=8 policy=lru",
        "predictive max_gpu_pages=4",
        "predictive max_gpu_pages=8",
        "fixed",
    ]


def test_a_sweep_of_an_entry_wins_over_that_of_defaults(load):
    found = load(
        """
        defaults: {sweep: {page_size: [16, 32]}}
        experiments:
          - {mode: reactive, sweep: {page_size: [128, 256]}}
          - {mode: predictive, predictor: last_step}
        """
    )
    assert [one.page_size for one in found] == [128, 256, 16, 32]


def test_a_sweep_wins_over_a_single_value_in_defaults(load):
    found = load("defaults: {page_size: 64}\nexperiments: [{mode: reactive, sweep: {page_size: [16, 32]}}]")
    assert [one.page_size for one in found] == [16, 32]


# --- what is refused --------------------------------------------------------------------------------------------


def entry(*lines: str) -> str:
    """A list of one entry; its lines begin on line 3, at column 5."""
    return "\n".join(["experiments:", "  - mode: reactive", *(f"    {line}" for line in lines)])


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["sweep: {polcy: [lru]}"], "3:13: unknown key 'polcy'; did you mean 'policy'?"),
        (["sweep: {prefetch_k: [1]}"], "3:13: 'prefetch_k' has no effect in mode reactive (it belongs to predictive)"),
        (["sweep: {mode: [baseline]}"], "3:13: 'mode' cannot be swept; write an entry for each mode"),
        (["sweep: {name: [a, b]}"], "3:13: 'name' cannot be swept"),
        (["sweep: {exclude: [{seed: 1}]}"], "3:13: 'exclude' stands beside 'sweep', not in it"),
        (["sweep: {page_size.x: [1]}"], "3:13: 'page_size' has no keys inside"),
        (["sweep: [policy]"], "3:12: 'sweep' must be a mapping of keys to lists of values"),
        (["sweep: {}"], "3:12: 'sweep' must be a mapping of keys to lists of values"),
        (["sweep: {seed: []}"], "3:19: 'sweep' needs a list of values for 'seed', found an empty list"),
        (["sweep: {seed: 3}"], "3:19: 'sweep' needs a list of values for 'seed', found 3; write [3]"),
        (["sweep: {policy: {name: lru}}"], "3:28: 'sweep' needs a list of values for 'policy.name', found 'lru'"),
        (["sweep: {seed: [1, 2, 1.0]}"], "3:26: 'seed' is to be 1.0 twice; remove one"),
        (["sweep: {context_lengths: [500, 1000]}"], "3:31: each value of 'context_lengths' is a list itself"),
        (["seed: 1", "sweep: {seed: [1, 2]}"], "4:13: 'seed' is swept here and set on line 3; remove one"),
        (
            ["policy: {name: s3fifo, small_fraction: 0.1}", "sweep: {policy.small_fraction: [0.2]}"],
            "4:13: 'policy.small_fraction' is swept, and 'policy' sets 'small_fraction' as well",
        ),
        (["policy: lru", "sweep: {policy.name: [mru]}"], "4:13: 'policy.name' is swept, and 'policy' sets 'name'"),
        (
            ["sweep: {link: [memory], link.bandwidth_gb_s: [1]}"],
            "3:29: 'link.bandwidth_gb_s' is swept, but 'link' is 'memory', which has no keys inside",
        ),
        (["sweep: {link.bandwith_gb_s: [1]}"], "3:13: unknown key 'bandwith_gb_s'; did you mean 'bandwidth_gb_s'?"),
        (["sweep: {quality.sampels: [1]}"], "3:13: unknown key 'sampels'; did you mean 'samples'?"),
        (["sweep: {policy: [lru, mruu]}"], "3:27: unknown policy 'mruu'; did you mean 'mru'?"),
        (["sweep: {policy: [lru, {name: lru}]}"], "is the same experiment as 'reactive policy=lru'"),
        (["exclude: [{seed: 1}]"], "3:16: 'exclude' names 'seed', which is not swept (nothing is swept here; add"),
        (["sweep: {seed: [1]}", "exclude: {seed: 1}"], "4:14: 'exclude' must be a list of mappings"),
        (["sweep: {seed: [1]}", "exclude: [{}]"], "4:15: 'exclude' must be a list of mappings of swept keys"),
        (
            ["sweep: {seed: [1]}", "exclude: [{sed: 1}]"],
            "4:16: 'exclude' names 'sed', which is not swept; did you mean",
        ),
        (
            ["sweep: {seed: [1, 2]}", "exclude: [{seed: '1'}]"],
            "4:22: this exclusion matches nothing: 'seed' is never '1'; it is swept over 1, 2",
        ),
        (["sweep: {seed: [1]}", "exclude: [{seed: 1}]"], "4:14: 'exclude' leaves out every combination"),
    ],
)
def test_a_slip_in_a_sweep_is_one_error_with_its_place_and_what_to_do(errors, lines, expected):
    found = [message for message in errors(entry(*lines)) if "is missing" not in message]
    assert len(found) == 1
    assert expected in found[0]


def test_a_conflict_names_the_combination_and_the_exclusion_that_would_leave_it_out(errors):
    lines = ["sweep:", "  policy: [lru, mru]", "  max_gpu_pages: [2, 4, 8]"]
    (message,) = errors(entry(*lines))
    assert message == (
        "5:23: max_gpu_pages is 2, but sink_pages 1 + recent_pages 1 + 1 to work with need at least 3"
        " (in 'reactive policy=lru max_gpu_pages=2' and 1 more); mend it, or add 'exclude: [{max_gpu_pages: 2}]'"
    )
    (advised,) = re.findall(r"add '(.*)'$", message)
    assert errors(entry(*lines, advised)) == []


def test_the_advice_names_all_keys_that_make_the_conflict(errors):
    lines = ["sweep: {sink_pages: [1, 6], max_gpu_pages: [4, 16]}"]
    (message,) = errors(entry(*lines))
    assert "add 'exclude: [{sink_pages: 6, max_gpu_pages: 4}]'" in message


def test_a_fault_that_no_swept_value_has_is_said_once_and_of_the_entry(errors):
    assert errors(entry("page_size: 0", "sweep: {seed: [1, 2, 3]}")) == [
        "3:16: 'page_size' must be at least 1, found 0"
    ]


def test_the_part_that_lacks_a_swept_parameter_is_to_be_excluded(errors):
    (message,) = errors(entry("sweep: {policy: [lru, s3fifo], policy.small_fraction: [0.1, 0.2]}"))
    assert "policy 'lru' has no parameter 'small_fraction'" in message
    assert "add 'exclude: [{policy: lru}]'" in message


def test_beside_a_broken_sweep_the_entrys_other_faults_are_reported_too(errors):
    found = errors(entry("page_sise: 16", "selector: quest", "sweep: {attention_pages: 8, sed: [1]}"))
    assert [message.partition(":")[0] for message in found] == ["3", "5", "5"]
    assert not any("needs to know how many pages" in message for message in found)


def test_a_product_of_more_than_10_000_is_refused_before_it_is_made(errors):
    lists = {key: list(range(1, 102)) for key in ("max_gpu_pages", "seed")}
    (message,) = errors({"experiments": [{"mode": "reactive", "sweep": lists}]})
    assert "101 x 101 = 10,201 combinations and a list may have 10,000" in message
    halves = [
        {"mode": "reactive", "name": name, "sweep": {"seed": list(range(80)), "num_runs": list(range(1, 81))}}
        for name in ("one", "other")
    ]
    (message,) = errors({"experiments": halves})
    assert "80 x 80 = 6,400 combinations, after 6,400 of the entries before, and a list may have" in message


def test_two_sweeps_of_the_same_names_ask_for_a_name_once(errors):
    twice = "experiments:\n  - &one {mode: reactive, sweep: {seed: [1, 2]}}\n  - *one\n"
    (message,) = errors(twice)
    assert "a second experiment is called 'reactive seed=1'" in message
    assert "give it a 'name:' of its own" in message


@pytest.mark.parametrize(
    ("defaults", "expected"),
    [
        ("{sweep: {predictor: [none, ema]}}", "'predictor' is swept for no entry: each sets 'predictor' itself, or is"),
        ("{sweep: {seed: [1, 2]}}", "'seed' is swept for no entry"),
        ("{exclude: [{policy: mru}]}", "this exclusion matches no combination of any entry"),
        ("{seed: 1, sweep: {seed: [1, 2]}}", "'seed' is swept here and set on line 1"),
        ("{sweep: {sed: [1]}}", "unknown key 'sed'; did you mean 'seed'?"),
    ],
)
def test_what_defaults_sweep_has_to_make_a_difference(errors, defaults, expected):
    (message,) = errors(f"defaults: {defaults}\nexperiments: [{{mode: reactive, seed: 3}}]")
    assert expected in message


def test_a_sweep_at_the_top_or_in_a_components_config_says_where_it_belongs(errors, tmp_path):
    assert "'sweep' belongs in an entry" in errors("sweep: {seed: [1]}\nexperiments: [{mode: reactive}]")[0]
    path = tmp_path / "one.yaml"
    path.write_text("mode: reactive\nsweep: {seed: [1]}\n")
    with pytest.raises(ConfigError, match=r"one.yaml:2:1: 'sweep' is for the lists of main.py"):
        load_experiment(path, "reactive")


@SAME_FOLDER
@given(
    block=st.recursive(
        st.none() | st.booleans() | st.integers(0, 20) | st.sampled_from(["lru", "mru", "", "x y"]),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["policy", "seed", "link", "name", "link.latency_us", "no"]), inner, max_size=3
            )
        ),
        max_leaves=8,
    ),
    rules=st.lists(st.dictionaries(st.sampled_from(["policy", "seed", "link"]), st.integers(0, 3)), max_size=2),
    shared=st.booleans(),
)
def test_any_sweep_loads_or_gives_errors_with_a_place_and_nothing_else(errors, block, rules, shared):
    both = {"sweep": block, "exclude": rules}
    content = {"experiments": [{"mode": "reactive"} | ({} if shared else both)]} | (
        {"defaults": both} if shared else {}
    )
    assert all(re.match(r"\d+:\d+: \S", message) for message in errors(content))


# --- the default file -------------------------------------------------------------------------------------------


def test_the_sweep_that_the_default_file_explains_makes_what_it_says(load):
    lines = [line.removeprefix("#").strip("\n") for line in commented_yaml().splitlines() if line.startswith("#     ")]
    example = "\n".join(line for line in lines if "python" not in line)
    assert set(yaml.safe_load(example)[0]) == {"mode", "sweep", "exclude"}
    found = load("experiments:\n" + example)
    (count,) = re.findall(r"would be (\w+)", commented_yaml())
    assert len(found) == {"five": 5}[count]
    (name,) = re.findall(r"the first named '(.*?)'", commented_yaml())
    assert name == found[0].name


def test_the_sweep_in_the_readme_is_as_many_experiments_as_it_says(load):
    (example,) = re.findall(
        r"```yaml\n(experiments:(?:(?!```).)*?sweep.*?)```", (PROJECT / "README.md").read_text(), re.DOTALL
    )
    found = load(example)
    assert len(found) == 11
    assert found[1].name == "reactive max_gpu_pages=4 policy=lru link.bandwidth_gb_s=1"


def test_the_module_says_what_its_example_makes(load):
    example = re.search(r"\n\n((?:    .*\n)+)", parameter_sweeps.__doc__).group(1)
    names = [one.name for one in load("experiments:\n" + example)]
    assert len(names) == 5
    assert "reactive max_gpu_pages=4 policy=lru" in names
