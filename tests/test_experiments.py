"""Configs: what is read, what is refused and in which words, and which runs come of it."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import links
import registry
from default_config import commented_yaml
from experiments import (
    MODE_CLASSES,
    ConfigError,
    Paging,
    PredictiveExperiment,
    PrefetchSpec,
    RunSpec,
    clamp,
    expand,
    load_experiment,
    load_experiments,
    override,
)
from page_policies import LRU
from yaml_source import MAX_BYTES, read_source

ROOT = Path(__file__).resolve().parent.parent
ALL_KEYS = sorted({key for cls in MODE_CLASSES.values() for key in cls.model_fields})
SAME_FOLDER = settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])


@dataclasses.dataclass(frozen=True)
class Aging(LRU):
    """A policy with parameters, named in configs by its import path."""

    decay: float = 0.9
    age: int = 3


@pytest.fixture
def write(tmp_path):
    """Write a config file and give back its path."""

    def write_file(text: str | bytes, name: str = "list.yaml") -> Path:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write_file


@pytest.fixture
def errors(write):
    """The messages that a list file gives, without the path of the file; none if it loads."""

    def messages(text: str | bytes, name: str = "list.yaml") -> list[str]:
        path = write(text, name)
        try:
            load_experiments(path)
        except ConfigError as error:
            assert str(error) == "\n".join(error.messages)
            assert all(message.startswith(str(path)) for message in error.messages)
            return [message.removeprefix(f"{path}:").strip() for message in error.messages]
        return []

    return messages


# --- the files of the repository ----------------------------------------------------------------------------


def test_the_default_file_is_exactly_what_the_schema_writes():
    assert (ROOT / "experiment_config.yaml").read_text() == commented_yaml()


def test_the_default_list_is_the_three_modes_and_an_approximation_on_the_small_model():
    baseline, reactive, predictive, quarter = load_experiments(ROOT / "experiment_config.yaml")
    assert (quarter.mode, quarter.predictor, quarter.selector) == ("predictive", "ranked", "quest")
    assert all(one.quality["fidelity_tokens"] == 32 for one in (baseline, reactive, predictive, quarter))
    assert quarter.quality["tasks"] == ["needle"]
    memory = {one.page_size * (one.max_gpu_pages + one.staging_pages) for one in (reactive, predictive, quarter)}
    assert len(memory) == 1
    assert [e.mode for e in (baseline, reactive, predictive)] == ["baseline", "reactive", "predictive"]
    for experiment in (baseline, reactive, predictive):
        assert experiment.model_name == "smollm2-135m"
        assert experiment.context_lengths == [500, 1000, 2000]
        assert (experiment.num_runs, experiment.max_new_tokens, experiment.warmup_runs) == (3, 50, 1)
    for experiment in (reactive, predictive):
        assert (experiment.page_size, experiment.max_gpu_pages, experiment.staging_pages) == (128, 6, 6)
        assert experiment.link == {"bandwidth_gb_s": 1.0, "latency_us": 10.0}
    assert (predictive.predictor, predictive.prefetch_k) == ("layer_ahead", 4)


def test_the_default_file_shows_every_key_once_with_a_description():
    shown = re.findall(r"^ +(?:# |- )?(\w+): .*# \w", commented_yaml(), re.MULTILINE)
    assert sorted(shown) == ALL_KEYS


def test_removing_every_comment_mark_of_the_default_file_changes_nothing(write):
    bare = re.sub(r"^( {2,4})# (\w+: )", r"\1\2", commented_yaml(), flags=re.MULTILINE)
    assert bare != commented_yaml()
    assert load_experiments(write(bare)) == load_experiments(ROOT / "experiment_config.yaml")


def test_no_line_of_the_default_file_is_longer_than_110_characters():
    assert max(map(len, commented_yaml().splitlines())) <= 110


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.json")), ids=lambda path: path.name)
def test_every_component_config_loads_in_its_mode(path):
    mode = json.loads(path.read_text())["mode"]
    assert load_experiment(path, mode).mode == mode


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_list_config_loads(path):
    assert load_experiments(path)


def test_there_is_a_config_for_every_component_and_for_the_original_experiment():
    names = "baseline_config small_model_config large_model_config paged_kv_config predictive_prefetch_config"
    assert {path.stem for path in (ROOT / "configs").glob("*.json")} >= set(names.split())
    assert (ROOT / "configs" / "dialogpt_small.yaml").exists()


def test_the_original_experiment_keeps_its_figures_and_its_longest_context_is_clamped_to_974():
    experiments = load_experiments(ROOT / "configs" / "dialogpt_small.yaml")
    assert [e.mode for e in experiments] == ["baseline", "reactive", "predictive"]
    predictive = experiments[2]
    assert (predictive.page_size, predictive.max_gpu_pages, predictive.prefetch_k) == (128, 8, 4)
    runs = [clamp(run, 1024) for run in expand(experiments)]
    assert {(run.requested_context_length, run.context_length) for run in runs} == {
        (100, 100),
        (500, 500),
        (1000, 974),
    }


def test_the_default_file_says_why_its_bus_is_slow_right_above_it():
    text = re.sub(r"\n +# ", " ", commented_yaml())
    assert "Slowed to 1 GB/s (PCIe 3.0 x16 moves 15.75)" in text
    assert "a model of no real bus.\n  link: {bandwidth_gb_s: 1.0, latency_us: 10.0}" in text


@pytest.mark.parametrize("name", ["paged_kv_config", "predictive_prefetch_config"])
def test_the_paged_configs_ask_for_more_pages_than_may_be_resident(name):
    path = ROOT / "configs" / f"{name}.json"
    experiment = load_experiment(path, json.loads(path.read_text())["mode"])
    (context_length,) = experiment.context_lengths
    assert context_length > experiment.max_gpu_pages * experiment.page_size


def test_the_small_model_config_samples():
    small = load_experiment(ROOT / "configs" / "small_model_config.json", "baseline")
    assert (small.model_name, small.do_sample) == ("smollm2-135m", True)
    assert (small.temperature, small.top_p, small.top_k) == (0.7, 0.9, 50)


def test_the_large_model_config_asks_for_4_bits_spread_over_all_devices():
    large = load_experiment(ROOT / "configs" / "large_model_config.json", "baseline")
    assert large.model_name == "meta-llama/Llama-2-7b-hf"
    assert (large.quantization, large.device_map) == ("4bit", "auto")


def test_the_schema_and_the_registry_know_the_same_modes():
    assert list(MODE_CLASSES) == list(registry.MODES)


# --- files that cannot be read ------------------------------------------------------------------------------

UNREADABLE = {
    "an empty file": (b"", "1:1: the file is empty"),
    "a file of blanks": (b" \n\n", "1:1: the file is empty"),
    "a file of comments": (b"# nothing\n", "1:1: the file is empty"),
    "a bare document mark": (b"---\n", "1:1: the file is empty"),
    "a list at the top": (
        b"- mode: baseline\n",
        "1:1: the file must be a mapping with 'experiments:', found a l",
    ),
    "a word at the top": (b"hello\n", "1:1: the file must be a mapping with 'experiments:', found 'hello'"),
    "a byte that is not UTF-8": (b"experiments:\n  - \xff\n", "2:5: byte 0xff is not UTF-8"),
    "a control character": (b"a: b\nc: \x01\n", "2:4: the character '\\x01' is not allowed in YAML"),
    "an open bracket": (b"experiments: [1, 2\n", "2:1: not YAML: "),
    "an unquoted colon": (b"name: a: b\n", "1:8: not YAML: mapping values are not allowed here; put quotes"),
    "a tab as indentation": (
        b"experiments:\n\t- mode: baseline\n",
        "2:1: a tab cannot indent YAML; use spaces",
    ),
    "two documents": (b"a: 1\n---\nb: 2\n", "2:1: a second document starts here"),
    "an alias without anchor": (b"a: *nowhere\n", "1:4: not YAML: found undefined alias 'nowhere'"),
    "an alias to itself": (b"a: &a [1, *a]\n", "1:4: an alias here points to the value that it is part of"),
    "a merge of itself": (b"a: &a {<<: *a}\n", "1:4: an alias here points to the value that it is part of"),
    "a Python object": (
        b"a: !!python/object/apply:os.system [ls]\n",
        "1:4: the tag !!python/object/apply:os",
    ),
    "a tag of the user's": (b"a: !mine 1\n", "1:4: the tag !mine is not known here"),
    "a tag that does not fit": (b"a: !!int x\n", "1:4: 'x' cannot be read as a whole number"),
    "a number beyond floats": (b"a: 1e999\n", "1:4: '1e999' cannot be read as a number"),
    "a number of 10,000 digits": (b"a: " + b"9" * 10_000, "1:4: '9999"),
    "half an emoji": (rb'a: "\ud83d"', "1:4: '\\ud83d' cannot be read as text"),
    "a list as key": (b"? [1]\n: 2\n", "1:3: a key must be plain text"),
    "a merge of a word": (b"<<: word\n", "1:5: '<<' merges mappings only"),
    "brackets 5,000 deep": (b"[" * 5000 + b"]" * 5000, "1:1: values are nested too deeply"),
    "duplicate keys": (b"a: 1\nb: 2\na: 3\n", "3:1: duplicate key 'a' (first on line 1)"),
}


@pytest.mark.parametrize(("content", "expected"), UNREADABLE.values(), ids=UNREADABLE)
def test_a_file_that_cannot_be_read_gives_one_clear_error(errors, content, expected):
    (message,) = errors(content)
    assert message.startswith(expected)


def test_a_missing_file_says_so_and_how_to_make_one():
    with pytest.raises(ConfigError, match=r"^nowhere\.yaml: there is no such file; .*--create-config"):
        load_experiments("nowhere.yaml")


def test_a_directory_says_that_it_is_one(tmp_path):
    with pytest.raises(ConfigError, match="this is a directory"):
        load_experiments(tmp_path)


def test_a_name_that_no_file_can_have_is_an_error_like_any_other():
    with pytest.raises(ConfigError, match="cannot be read"):
        load_experiments("a\0b")


def test_a_file_far_too_large_is_refused_unread(errors):
    assert errors(b"# " + b"x" * MAX_BYTES) == ["larger than 256 KiB, which no config needs to be"]


@pytest.mark.parametrize("merge", [False, True], ids=["in lists", "in merge keys"])
def test_a_yaml_bomb_is_refused_before_it_is_expanded(errors, merge):
    links = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    if merge:
        links = [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 30)]
    (message,) = errors("\n".join(["a0: &a0 {lol: 1}", *links]))
    assert "more than 10,000 values once all aliases are expanded" in message


# --- YAML and JSON read alike -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("off", "off"),
        ("no", "no"),
        ("yes", "yes"),
        ("true", True),
        ("1e-3", 0.001),
        ("1.5e3", 1500.0),
        ("-2", -2),
        (".5", 0.5),
        ("1_000", 1000),
        ("010", "010"),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("~", None),
        ("", None),
        ("'3'", "3"),
        ("!!str 3", "3"),
        ("<<", "<<"),
    ],
)
def test_plain_words_follow_yaml_1_2(write, written, value):
    read = read_source(write(f"key: {written}\n")).value["key"]
    assert (read, type(read)) == (value, type(value))


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x7f"), max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abc<.-: 😀", max_size=5), inner, max_size=4),
    max_leaves=15,
)


@SAME_FOLDER
@given(document=json_values, indent=st.sampled_from([None, 2, "\t"]))
def test_json_gives_the_values_that_the_json_module_gives(write, document, indent):
    path = write(json.dumps(document, indent=indent), "document.json")
    assert read_source(path).value == document


@pytest.mark.parametrize("name", ["list.json", "list.yaml", "list"])
def test_json_with_tabs_loads_whatever_the_suffix(write, name):
    text = json.dumps({"experiments": [{"mode": "baseline"}]}, indent="\t")
    assert load_experiments(write(text, name))[0].mode == "baseline"


def test_a_json_error_stands_at_the_place_where_json_breaks(errors):
    assert errors('{"experiments": [\n  {"mode": "baseline",}\n]}', "list.json")[0].startswith("2:2")
    assert "not JSON" in errors("experiments: []", "list.json")[0]


def test_a_byte_order_mark_and_windows_line_ends_are_harmless(write):
    text = "experiments:\r\n  - mode: baseline\r\n"
    assert load_experiments(write(b"\xef\xbb\xbf" + text.encode()))[0].mode == "baseline"


def test_every_key_and_value_of_the_default_file_is_found_where_it_stands():
    lines = commented_yaml().splitlines()
    source = read_source(ROOT / "experiment_config.yaml")
    for path, spot in source.keys.items():
        assert lines[spot.line - 1][spot.column - 1 :].startswith(f"{path[-1]}:")
    for path, spot in source.values.items():
        value = source.value
        for part in path:
            value = value[part]
        if not isinstance(value, dict | list):
            assert lines[spot.line - 1][spot.column - 1 :].startswith(str(value))


def test_merge_keys_bring_in_what_the_mapping_does_not_set_itself(write):
    text = (
        "defaults: &base {num_runs: 7, seed: 3}\n"
        "experiments:\n"
        "  - {mode: baseline, <<: *base, seed: 4}\n"
        "  - {<<: [{dtype: float16}, {dtype: bfloat16, batch_size: 2}], mode: reactive}\n"
    )
    baseline, reactive = load_experiments(write(text))
    assert (baseline.num_runs, baseline.seed) == (7, 4)
    assert (reactive.dtype, reactive.batch_size) == ("float16", 2)


def test_a_mapping_keeps_its_own_place_when_it_merges_another(errors):
    text = "defaults: &base {num_runs: 7}\nexperiments:\n  - mode: reactive\n    policy: {<<: *base}\n"
    assert errors(text) == ["4:13: 'policy.name' is missing"]


@SAME_FOLDER
@given(
    place=st.integers(0, len(commented_yaml())),
    cut=st.integers(0, 30),
    put=st.text(st.sampled_from("\n\t :-#&*!{}[]'\"<aA0.é\0"), max_size=6),
)
def test_a_damaged_file_loads_or_gives_a_config_error_and_nothing_else(errors, place, cut, put):
    errors(commented_yaml()[:place] + put + commented_yaml()[place + cut :])


@SAME_FOLDER
@given(
    entry=st.dictionaries(st.sampled_from([*ALL_KEYS, "zzz"]), json_values, max_size=6),
    defaults=st.dictionaries(st.sampled_from([*ALL_KEYS, "zzz"]), json_values, max_size=4),
    mode=st.sampled_from([*MODE_CLASSES, None]),
)
def test_any_values_load_or_give_plain_sentences(errors, entry, defaults, mode):
    entry |= {"mode": mode} if mode else {}
    for message in errors(json.dumps({"experiments": [entry], "defaults": defaults})):
        assert re.match(r"\d+:\d+: ", message)
        assert "Input should" not in message and "[type=" not in message and "pydantic" not in message


# --- the schema: one wrong value for every key --------------------------------------------------------------

WRONG = [
    (
        "mode",
        "reactiv",
        "unknown mode 'reactiv'; did you mean 'reactive'? (known: baseline, reactive, predictive)",
    ),
    ("mode", "off", "unknown mode 'off' (known: "),
    ("mode", "[baseline]", "'mode' must be baseline, reactive or predictive, found a list"),
    ("name", "3", "'name' must be text, found 3"),
    ("name", "''", "'name' must be printable text that is not blank, found ''"),
    ("model_name", "null", "'model_name' must be text, found null"),
    (
        "context_lengths",
        "5",
        "'context_lengths' must be a list in brackets, such as [500, 1000] for numbers, found 5; write [5]",
    ),
    ("context_lengths", "[]", "'context_lengths' must have at least 1 value, found an empty list"),
    ("context_lengths", "[5, 5]", "'context_lengths' must name each length once, found 5 twice"),
    ("num_runs", "three", "'num_runs' must be a whole number, found 'three'"),
    ("num_runs", "true", "'num_runs' must be a whole number, found true"),
    ("num_runs", "0", "'num_runs' must be at least 1, found 0"),
    ("num_runs", "1e9", "'num_runs' must be a whole number, found 1000000000.0; write 1000000000"),
    ("num_runs", "1_000_000", "'num_runs' must be at most 1,000, found 1000000"),
    ("max_new_tokens", "2.5", "'max_new_tokens' must be a whole number, found 2.5"),
    ("batch_size", "'2'", "'batch_size' must be a whole number, found '2'; write the number without quotes"),
    ("do_sample", "yes", "'do_sample' must be true or false, found 'yes'; write true"),
    ("do_sample", "1", "'do_sample' must be true or false, found 1"),
    ("temperature", "0", "'temperature' must be more than 0, found 0"),
    ("temperature", "hot", "'temperature' must be a number, found 'hot'"),
    ("top_p", "1.5", "'top_p' must be at most 1.0, found 1.5"),
    ("top_k", "-1", "'top_k' must be at least 0, found -1"),
    ("stop_at_eos", "off", "'stop_at_eos' must be true or false, found 'off'; write false"),
    (
        "dtype",
        "float61",
        "'dtype' must be auto, float32, bfloat16 or float16, found 'float61'; did you mean 'float16'?",
    ),
    ("device", "cdua", "'device' must be auto, cpu, cuda or cuda:N, found 'cdua'; did you mean 'cuda'?"),
    ("device", "cuda:x", "'device' must be auto, cpu, cuda or cuda:N, found 'cuda:x'"),
    ("device_map", "balanced", "'device_map' must be auto or none, found 'balanced'"),
    (
        "quantization",
        "8bits",
        "'quantization' must be 8bit, 4bit or none, found '8bits'; did you mean '8bit'?",
    ),
    ("seed", "-1", "'seed' must be at least 0, found -1"),
    ("seed", "null", "'seed' must be a whole number, found null"),
    ("warmup_runs", "{}", "'warmup_runs' must be a whole number, found an empty mapping"),
    ("prefill_chunk_size", "0", "'prefill_chunk_size' must be at least 1, found 0"),
    ("trust_remote_code", "'true'", "'trust_remote_code' must be true or false, found 'true'"),
    (
        "cache_implementation",
        "ofloaded",
        "'cache_implementation' must be dynamic, offloaded, static or quantized",
    ),
    ("page_size", "0", "'page_size' must be at least 1, found 0"),
    ("max_gpu_pages", "010", "'max_gpu_pages' must be a whole number, found '010'; write the number without"),
    ("staging_pages", "[4]", "'staging_pages' must be a whole number, found a list"),
    ("staging_pages", "null", "'staging_pages' must be a whole number, found null"),
    ("staging_pages", "0", "'staging_pages' must be at least 1, found 0"),
    ("policy", "lur", "unknown policy 'lur'; did you mean 'lru'? (known: "),
    ("policy", "{name: lur}", "unknown policy 'lur'; did you mean 'lru'? (known: "),
    ("policy", "3", "'policy' must be a name or a mapping with 'name', found 3"),
    ("policy", "{nam: lru}", "'policy.name' is missing"),
    ("policy", "{name: lru, siez: 3}", "policy 'lru' has no parameter 'siez' (parameters: none)"),
    ("policy", "page_policies:LUR", "policy 'page_policies:LUR': module 'page_policies' has no 'LUR'"),
    ("policy", "no_such_module:Mine", "policy 'no_such_module:Mine': there is no module 'no_such_module' to import"),
    (
        "policy",
        "{name: 'test_experiments:Aging', decy: 0.5}",
        "policy 'test_experiments:Aging' has no parameter 'decy'; did you mean 'decay'? (parameters: decay, age)",
    ),
    ("selector", "{name: all, k: 4}", "selector 'all' has no parameter 'k' (parameters: none)"),
    ("predictor", "{name: last_step, depth: 2}", "predictor 'last_step' has no parameter 'depth' (parameters: none)"),
    ("selector", "al", "unknown selector 'al'; did you mean 'all'? (known: "),
    ("predictor", "layer_ahed", "unknown predictor 'layer_ahed'; did you mean 'layer_ahead'? (known: "),
    ("sink_pages", "-1", "'sink_pages' must be at least 0, found -1"),
    ("recent_pages", "0", "'recent_pages' must be at least 1, found 0"),
    ("attention_pages", "0", "'attention_pages' must be at least 1, found 0"),
    ("attention_fraction", "1.5", "'attention_fraction' must be at most 1.0, found 1.5"),
    ("attention_fraction", "0.0", "'attention_fraction' must be more than 0, found 0.0"),
    ("granularity", "head", "'granularity' must be layer or kv_head, found 'head'"),
    ("dense_layers", "-1", "'dense_layers' must be at least 0, found -1"),
    ("access_order", "random", "'access_order' must be resident_first or position, found 'random'"),
    ("host_pages", "-1", "'host_pages' must be at least 0, found -1"),
    ("disk_dir", "3", "'disk_dir' must be"),
    ("record_pages", "1", "'record_pages' must be true or false, found 1"),
    ("record_timeline", "1", "'record_timeline' must be true or false, found 1"),
    (
        "link",
        "pcie4",
        "'link' must be auto, memory, pcie3-x16, pcie4-x16, pcie5-x16 or a mapping with bandwidth",
    ),
    ("link", "{latency_us: 10}", "'link.bandwidth_gb_s' is missing"),
    ("link", "{bandwidth_gb_s: 1, latency_us: -1}", "'link.latency_us' must be at least 0.0, found -1"),
    ("link", "{bandwidth_gb_s: fast}", "'link.bandwidth_gb_s' must be a number, found 'fast'"),
    ("link", "{bandwidth_gb_s: 0, latency_us: 1}", "'link.bandwidth_gb_s' must be more than 0, found 0"),
    (
        "link",
        "{bandwidth_gb_s: 1, latency_us: 1, latency: 2}",
        "unknown key 'latency'; did you mean 'latency_us'?",
    ),
    ("prefetch_k", "0", "'prefetch_k' must be at least 1, found 0"),
    ("overfetch", "0.5", "'overfetch' must be at least 1.0, found 0.5"),
    ("lookahead", "0", "'lookahead' must be at least 1, found 0"),
    ("min_confidence", "1.5", "'min_confidence' must be adaptive or a number from 0 to 1, found 1.5"),
    ("min_confidence", "adaptve", "'min_confidence' must be adaptive or a number from 0 to 1, found 'adaptve'"),
    ("min_confidence", "true", "'min_confidence' must be adaptive or a number from 0 to 1, found true"),
    ("prefetch_evicts", "3", "'prefetch_evicts' must be true or false, found 3"),
    ("quality", "3", "'quality' must be a mapping with fidelity_tokens, tasks, samples or lengths, or false, found 3"),
    ("quality", "{fidelity_tokens: -1}", "'quality.fidelity_tokens' must be at least 0, found -1"),
    ("quality", "{fidelity_tokens: 0}", "'quality' must ask for something: fidelity_tokens above 0, or tasks"),
    ("quality", "{tasks: [paskey]}", "unknown task 'paskey'; did you mean 'passkey'?"),
    (
        "quality",
        "{tasks: passkey}",
        "'quality.tasks' must be a list in brackets, such as [500, 1000] for numbers, found 'passkey'",
    ),
    ("on_miss", "wiat", "'on_miss' must be wait or skip, found 'wiat'; did you mean 'wait'?"),
    ("page_table", "devise", "'page_table' must be host or device, found 'devise'; did you mean 'device'?"),
]


def mode_that_knows(key: str) -> str:
    return next(mode for mode, cls in MODE_CLASSES.items() if key in cls.model_fields)


@pytest.mark.parametrize(("key", "written", "expected"), WRONG, ids=[f"{key}: {text}" for key, text, _ in WRONG])
def test_a_wrong_value_is_named_in_plain_words_at_its_place(errors, key, written, expected):
    mode = "" if key == "mode" else f"    mode: {mode_that_knows(key)}\n"
    (message,) = errors(f"experiments:\n  - {key}: {written}\n{mode}")
    place, _, text = message.partition(": ")
    assert text.startswith(expected)
    assert place.startswith("2:")


@pytest.mark.parametrize(("key", "written", "expected"), WRONG, ids=[f"{key}: {text}" for key, text, _ in WRONG])
def test_a_wrong_value_in_defaults_is_reported_once_even_if_no_entry_takes_it(errors, key, written, expected):
    first, *others = errors(f"defaults:\n  {key}: {written}\nexperiments:\n  - mode: baseline\n")
    assert others == [] and first.startswith("2:")
    assert expected in first or key == "name"


def test_every_parameter_that_a_part_does_not_have_is_reported_at_its_name(errors):
    policy = "    policy:\n      name: lru\n      siez: 3\n      more: 4\n"
    text = f"experiments:\n  - mode: reactive\n{policy}    page_sise: 1\n"
    assert [message.partition(": ")[0] for message in errors(text)] == ["5:7", "6:7", "7:5"]


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("import something_not_installed", "ModuleNotFoundError: No module named 'something_not_installed'"),
        ("def f(:", "SyntaxError: invalid syntax (broken_parts.py, line 1)"),
        ("raise SystemExit(3)", "SystemExit: 3"),
    ],
    ids=["raises", "lacks a module", "does not parse", "exits"],
)
def test_a_module_of_the_users_that_breaks_as_it_is_imported_is_one_error_at_its_name(
    errors, tmp_path, monkeypatch, program, reason
):
    (tmp_path / "broken_parts.py").write_text(program)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    text = "experiments:\n  - mode: reactive\n    policy: broken_parts:Mine\n    num_runs: 0\n"
    assert errors(text) == [
        f"3:13: policy 'broken_parts:Mine': importing it failed ({reason})",
        "4:15: 'num_runs' must be at least 1, found 0",
    ]


def test_every_key_has_a_wrong_value_above():
    assert {key for key, _, _ in WRONG} == set(ALL_KEYS)


def test_every_key_has_a_description_of_one_sentence():
    for cls in MODE_CLASSES.values():
        for key in cls.model_fields.keys() - {"mode"}:
            assert cls.model_fields[key].description.endswith("."), key


def test_an_unknown_key_is_answered_with_the_key_that_was_meant(errors):
    text = "experiments:\n  - mode: reactive\n    page_sise: 3\n"
    assert errors(text) == ["3:5: unknown key 'page_sise'; did you mean 'page_size'?"]


def test_a_key_of_another_mode_has_no_effect_and_says_so(errors):
    text = "experiments:\n  - mode: baseline\n    page_size: 3\n  - mode: reactive\n    prefetch_k: 2\n"
    assert errors(text) == [
        "3:5: 'page_size' has no effect in mode baseline (it belongs to reactive and predictive)",
        "5:5: 'prefetch_k' has no effect in mode reactive (it belongs to predictive)",
    ]


def test_in_defaults_keys_of_any_mode_may_stand_and_each_entry_takes_its_own(write):
    text = "defaults: {prefetch_k: 2, cache_implementation: static, page_size: 64}\nexperiments:\n"
    text += "".join(f"  - mode: {mode}\n" for mode in MODE_CLASSES)
    baseline, reactive, predictive = load_experiments(write(text))
    assert baseline.cache_implementation == "static"
    assert (reactive.page_size, predictive.page_size, predictive.prefetch_k) == (64, 64, 2)


def test_an_entry_wins_over_defaults_and_may_take_its_mode_from_them(write):
    text = "defaults: {mode: reactive, seed: 1}\nexperiments:\n  - {}\n  - {seed: 2, name: other}\n"
    assert [(e.mode, e.name, e.seed) for e in load_experiments(write(text))] == [
        ("reactive", "reactive", 1),
        ("reactive", "other", 2),
    ]


def test_empty_defaults_are_no_defaults(write):
    assert load_experiments(write("defaults:\nexperiments:\n  - mode: baseline\n"))


def test_the_top_of_a_list_file_holds_two_keys_only(errors):
    text = "experiment: 1\nseed: 1\nexperiments:\n  - mode: baseline\n"
    assert errors(text) == [
        "1:1: unknown key 'experiment'; did you mean 'experiments'?",
        "2:1: 'seed' belongs in an entry of 'experiments:' or in 'defaults:', not at the top",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("experiments: []", "1:14: 'experiments' must be a list with at least one entry such as"),
        ("experiments:", "1:13: 'experiments' must be a list with at least one entry such as"),
        ("defaults: {}", "1:1: 'experiments' must be a list with at least one entry such as"),
        (
            "experiments: {mode: baseline}",
            "1:14: 'experiments' must be a list with at least one entry such as",
        ),
        (
            "experiments: [baseline]",
            "1:15: an entry must be a mapping such as 'mode: baseline', found 'baseline'",
        ),
        ("experiments: [{}]", "1:15: 'mode' is missing; add 'mode: baseline, reactive or predictive'"),
        ("experiments: [{mode: baseline}]\ndefaults: 3", "2:11: 'defaults' must be a mapping, found 3"),
        ("mode: baseline\nseed: 3", "1:1: this file is one experiment, not a list"),
    ],
)
def test_a_list_file_of_another_shape_says_what_shape_is_needed(errors, text, expected):
    (message,) = errors(text)
    assert message.startswith(expected)


def test_all_errors_of_a_file_come_at_once_in_the_order_of_its_lines(errors):
    text = (
        "experiments:\n"
        "  - mode: predictiv\n"
        "    num_runs: 0\n"
        "  - mode: reactive\n"
        "    page_sise: 4\n"
        "    max_gpu_pages: 2\n"
        "    policy: lur\n"
        "defaults:\n"
        "  tempreature: 1\n"
    )
    assert [message.split(":")[0] for message in errors(text)] == ["2", "3", "5", "6", "7", "9"]


def test_an_entry_of_unknown_mode_still_has_its_other_errors_reported(errors):
    text = "experiments:\n  - mode: base\n    dtype: f32\n    page_size: 3\n    zzz: 1\n"
    assert [message.split(":")[0] for message in errors(text)] == ["2", "3", "5"]


def test_one_label_for_two_experiments_asks_for_a_name(errors):
    text = "experiments:\n  - mode: reactive\n  - mode: reactive\n    page_size: 64\n"
    assert errors(text) == [
        "3:11: a second experiment is called 'reactive' (first on line 2); give it a 'name:' of its own"
    ]
    assert errors(text + "    name: small pages\n") == []


# --- values that are right alone and wrong together ---------------------------------------------------------

CONFLICTS = [
    (
        "{mode: baseline, temperature: 0.5}",
        "'temperature' has no effect without sampling; add 'do_sample: true'",
    ),
    ("{mode: baseline, top_p: 0.5}", "'top_p' has no effect without sampling"),
    ("{mode: baseline, top_k: 5}", "'top_k' has no effect without sampling"),
    (
        "{mode: baseline, device: cpu, cache_implementation: offloaded}",
        "'cache_implementation: offloaded' needs CUDA",
    ),
    (
        "{mode: reactive, max_gpu_pages: 2}",
        "max_gpu_pages is 2, but sink_pages 1 + recent_pages 1 + 1 to work with",
    ),
    (
        "{mode: reactive, sink_pages: 7}",
        "max_gpu_pages is 8, but sink_pages 7 + recent_pages 1 + 1 to work with",
    ),
    (
        "{mode: predictive, staging_pages: 3}",
        "prefetch_k is 4, but staging_pages gives only 3 slots for pages on their way;"
        " set staging_pages to at least 4, or prefetch_k to at most 3",
    ),
    ("{mode: predictive, prefetch_k: 7}", "prefetch_k is 7, but staging_pages gives only 6 slots"),
    ("{mode: reactive, attention_pages: 4}", "'attention_pages' has no effect with 'selector: all'"),
    ("{mode: reactive, attention_fraction: 0.5}", "'attention_fraction' has no effect with 'selector: all'"),
    ("{mode: reactive, granularity: kv_head}", "'granularity' has no effect with 'selector: all'"),
    ("{mode: reactive, dense_layers: 2}", "'dense_layers' has no effect with 'selector: all'"),
    (
        "{mode: predictive, predictor: oracle, on_miss: skip}",
        "this predictor knows a recording of the same generation, and with 'on_miss: skip'",
    ),
    ("{mode: reactive, disk_dir: /tmp}", "'disk_dir' has no effect without host_pages"),
]
ALLOWED_TOGETHER = [
    "{mode: baseline, temperature: 1.0, top_k: 50, top_p: 1}",
    "{mode: baseline, temperature: 0.5, do_sample: true}",
    "{mode: baseline, device: auto, cache_implementation: offloaded}",
    "{mode: reactive, max_gpu_pages: 3}",
    "{mode: reactive, staging_pages: 1}",
    "{mode: predictive, staging_pages: 4}",
    "{mode: predictive, predictor: oracle}",
    "{mode: predictive, predictor: ranked, on_miss: skip}",
    "{mode: predictive, prefetch_k: 40, staging_pages: 40}",
]


@pytest.mark.parametrize(("entry", "expected"), CONFLICTS, ids=[entry for entry, _ in CONFLICTS])
def test_a_conflict_between_two_values_is_named_with_both(errors, entry, expected):
    (message,) = errors(f"experiments:\n  - {entry}\n")
    assert message.partition(": ")[2].startswith(expected)


@pytest.mark.parametrize("entry", ALLOWED_TOGETHER)
def test_values_that_do_not_conflict_are_left_alone(errors, entry):
    assert errors(f"experiments:\n  - {entry}\n") == []


def test_a_conflict_stands_at_the_key_that_is_written_also_when_that_is_in_defaults(errors):
    assert errors("defaults: {sink_pages: 9}\nexperiments: [{mode: reactive}]")[0].startswith("2:15: max_gpu")
    assert errors("defaults: {max_gpu_pages: 2}\nexperiments: [{mode: reactive}]")[0].startswith("1:27: max_gpu")
    assert errors("defaults: {max_gpu_pages: 2}\nexperiments: [{mode: baseline}]") == []


def test_a_conflict_is_found_beside_other_errors_but_not_imagined_from_them(errors):
    text = "experiments: [{mode: reactive, seed: x, max_gpu_pages: 2}]"
    assert [message.partition(": ")[2][:13] for message in errors(text)] == ["'seed' must b", "max_gpu_pages"]
    (only,) = errors("experiments: [{mode: reactive, max_gpu_pages: x, sink_pages: 9}]")
    assert "'max_gpu_pages' must be a whole number" in only


# --- components and flags -----------------------------------------------------------------------------------


def test_a_component_config_may_leave_out_its_mode(write):
    experiment = load_experiment(write('{"page_size": 64}', "paged.json"), "reactive")
    assert (experiment.mode, experiment.name, experiment.page_size) == ("reactive", "reactive", 64)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mode: baseline\n", "1:7: this file is for mode baseline, but mode reactive was asked for"),
        ("mode: reactiv\n", "1:7: unknown mode 'reactiv'; did you mean 'reactive'?"),
        ("mode: [reactive]\n", "1:7: 'mode' must be baseline, reactive or predictive, found a list"),
        ("experiments: []\n", "1:1: this is a list of experiments, for main.py"),
        ("page_sise: 3\n", "1:1: unknown key 'page_sise'; did you mean 'page_size'?"),
        ("- page_size: 3\n", "1:1: the file must be a mapping with the keys of one experiment, found a list"),
    ],
)
def test_a_component_config_of_another_kind_is_refused(write, text, expected):
    with pytest.raises(ConfigError) as caught:
        load_experiment(write(text, "one.yaml"), "reactive")
    (message,) = caught.value.messages
    assert message.split("one.yaml:")[1].startswith(expected)


def test_flags_replace_keys_and_are_checked_with_the_rest(write):
    experiment = load_experiment(write("page_size: 64\n"), "reactive")
    changed = override(experiment, context_lengths=[7], model_name="gpt2")
    assert (changed.context_lengths, changed.model_name, changed.page_size) == ([7], "gpt2", 64)
    with pytest.raises(ConfigError) as caught:
        override(experiment, max_gpu_pages=1, batch_size=0)
    assert caught.value.messages[0] == "'batch_size' must be at least 1, found 0"
    assert caught.value.messages[1].startswith("max_gpu_pages is 1, but")


# --- runs ---------------------------------------------------------------------------------------------------


def predictive_spec(**values) -> RunSpec:
    return expand([PredictiveExperiment(mode="predictive", **values)])[0]


def test_runs_are_interleaved_by_context_then_repetition_with_the_baseline_first(write):
    text = (
        "defaults: {num_runs: 2, context_lengths: [20, 10]}\n"
        "experiments:\n"
        "  - mode: reactive\n"
        "  - {mode: reactive, name: other model, model_name: gpt2, num_runs: 1, context_lengths: [5]}\n"
        "  - {mode: baseline, context_lengths: [10, 30]}\n"
    )
    runs = [(run.name, run.context_length, run.repetition) for run in expand(load_experiments(write(text)))]
    assert runs == [
        ("reactive", 20, 0),
        ("reactive", 20, 1),
        ("baseline", 10, 0),
        ("reactive", 10, 0),
        ("baseline", 10, 1),
        ("reactive", 10, 1),
        ("baseline", 30, 0),
        ("baseline", 30, 1),
        ("other model", 5, 0),
    ]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["baseline", "reactive", "predictive"]),
            st.sampled_from(["a", "b"]),
            st.lists(st.integers(1, 5), min_size=1, max_size=3, unique=True),
            st.integers(1, 3),
        ),
        max_size=4,
    )
)
def test_expanding_gives_every_run_exactly_once(plan):
    experiments = [
        MODE_CLASSES[mode](mode=mode, name=str(i), model_name=model, context_lengths=lengths, num_runs=n)
        for i, (mode, model, lengths, n) in enumerate(plan)
    ]
    wanted = [
        (e.name, length, repetition)
        for e in experiments
        for length in e.context_lengths
        for repetition in range(e.num_runs)
    ]
    runs = expand(experiments)
    assert sorted((run.name, run.context_length, run.repetition) for run in runs) == sorted(wanted)
    assert len({run.run_id for run in runs}) == len({run.slug for run in runs}) == len(runs)


def test_every_mode_fills_its_own_part_of_the_spec():
    runs = {mode: expand([cls(mode=mode)])[0] for mode, cls in MODE_CLASSES.items()}
    assert runs["baseline"].cache_implementation == "dynamic"
    assert (runs["baseline"].paging, runs["baseline"].prefetch) == (None, None)
    assert runs["reactive"].paging == Paging(256, 8, 6, "lru", "all", sink_pages=1, recent_pages=1, link="auto")
    assert (runs["reactive"].cache_implementation, runs["reactive"].prefetch) == (None, None)
    assert runs["predictive"].paging == runs["reactive"].paging
    assert runs["predictive"].prefetch == PrefetchSpec("ranked", 4, 2.0, 1, "adaptive", False)


def test_a_link_is_any_name_that_links_knows_or_its_figures_with_a_latency_of_0_if_left_out():
    for name in links.NAMES:
        assert predictive_spec(link=name).paging.link == name
    assert predictive_spec(link={"bandwidth_gb_s": 12}).paging.link == {
        "bandwidth_gb_s": 12.0,
        "latency_us": 0.0,
    }


def test_greedy_repetitions_share_the_seed_and_sampled_ones_count_it_up():
    greedy = expand([PredictiveExperiment(mode="predictive", seed=5, context_lengths=[10])])
    sampled = expand([PredictiveExperiment(mode="predictive", seed=5, context_lengths=[10], do_sample=True)])
    assert [run.seed for run in greedy] == [5, 5, 5]
    assert [run.seed for run in sampled] == [5, 6, 7]
    replaced = expand([PredictiveExperiment(mode="predictive", seed=5, context_lengths=[10])], seed=9)
    assert {run.seed for run in replaced} == {9}


def test_none_in_words_is_null_and_a_part_without_parameters_is_its_name():
    spec = predictive_spec(quantization="none", device_map="none", policy={"name": "lru"})
    assert (spec.quantization, spec.device_map, spec.paging.policy) == (None, None, "lru")
    assert spec.run_id == predictive_spec().run_id


def test_a_spec_goes_through_json_unchanged():
    spec = predictive_spec(
        policy={"name": "test_experiments:Aging", "decay": 0.5}, link={"bandwidth_gb_s": 12, "latency_us": 1}
    )
    assert json.loads(json.dumps(spec.to_dict())) == spec.to_dict()
    assert spec in {spec}


def test_a_slug_begins_with_the_mode_and_is_safe_as_a_file_name():
    spec = predictive_spec(name="../é small/pages", model_name="org/Model:v1")
    assert re.fullmatch(r"predictive_small-pages_Model-v1_ctx500_run0_[0-9a-f]{12}", spec.slug)


def test_the_reference_key_joins_modes_and_parts_whatever_changes_tokens():
    baseline = expand([MODE_CLASSES["baseline"](mode="baseline")])[0]
    assert baseline.reference_key == predictive_spec(page_size=64, prefetch_k=2).reference_key
    for change in (
        {"model_name": "gpt2"},
        {"seed": 1},
        {"batch_size": 2},
        {"dtype": "float16"},
        {"device": "cpu"},
    ):
        assert baseline.reference_key != predictive_spec(**change).reference_key
    hash(baseline.reference_key)


def test_the_reference_key_leaves_out_which_repetition_it_is():
    first, second, *_ = expand([MODE_CLASSES["baseline"](mode="baseline")])
    assert (first.repetition, second.repetition) == (0, 1)
    assert first.reference_key == second.reference_key


def test_only_a_baseline_with_the_dynamic_cache_is_a_reference_and_it_runs_first():
    baseline = MODE_CLASSES["baseline"]
    runs = expand(
        [
            PredictiveExperiment(mode="predictive", context_lengths=[10], num_runs=1),
            baseline(mode="baseline", cache_implementation="quantized", context_lengths=[10], num_runs=1),
            baseline(mode="baseline", context_lengths=[10], num_runs=1),
        ]
    )
    assert [(run.mode, run.cache_implementation, run.is_reference) for run in runs] == [
        ("baseline", "dynamic", True),
        ("baseline", "quantized", False),
        ("predictive", None, False),
    ]
    assert len({run.reference_key for run in runs}) == 1


words = st.text("abcxyz:-_", min_size=1, max_size=8)
counts = st.integers(1, 10_000)
parameters = st.dictionaries(words, st.integers() | words | st.booleans(), max_size=3)
parts = words | parameters.map(lambda values: {"name": "page_policies:LRU", **values})
specs = st.builds(
    RunSpec,
    mode=words,
    name=words,
    model_name=words,
    **dict.fromkeys(["context_length", "requested_context_length", "repetition", "seed", "max_new_tokens"], counts),
    **dict.fromkeys(["batch_size", "top_k", "warmup_runs"], counts),
    **dict.fromkeys(["do_sample", "stop_at_eos", "trust_remote_code"], st.booleans()),
    **dict.fromkeys(["temperature", "top_p"], st.floats(0.01, 2)),
    **dict.fromkeys(["dtype", "device"], words),
    **dict.fromkeys(["device_map", "quantization", "cache_implementation"], st.none() | words),
    prefill_chunk_size=st.none() | counts,
    paging=st.none()
    | st.builds(
        Paging,
        counts,
        st.integers(20_001, 40_000),  # always enough for sink and recent pages
        counts,
        policy=parts,
        selector=parts,
        attention_pages=st.integers(20_000, 40_000),
        sink_pages=counts,
        recent_pages=counts,
        link=parts,
    ),
    prefetch=st.none() | st.builds(PrefetchSpec, predictor=parts, prefetch_k=counts),
)


@given(spec=specs, other=specs, field=st.sampled_from([field.name for field in dataclasses.fields(RunSpec)]))
def test_the_run_id_differs_when_any_field_differs(spec, other, field):
    changed = dataclasses.replace(spec, **{field: getattr(other, field)})
    before, after = (json.dumps(one.to_dict()[field], sort_keys=True) for one in (spec, changed))
    assert (changed.run_id == spec.run_id) == (before == after)
    assert re.fullmatch(r"[0-9a-f]{12}", spec.run_id)


@given(order=st.permutations(["mode", "seed", "policy", "link", "prefetch_k", "num_runs"]), flip=st.booleans())
def test_the_run_id_does_not_depend_on_the_order_of_keys(order, flip):
    entry = {
        "mode": "predictive",
        "seed": 3,
        "policy": {"name": "test_experiments:Aging", "decay": 0.5, "age": 2},
        "link": {"bandwidth_gb_s": 12.0, "latency_us": 10.0},
        "prefetch_k": 2,
        "num_runs": 1,
    }
    reordered = {key: entry[key] for key in order}
    if flip:
        reordered["policy"] = dict(reversed(entry["policy"].items()))
        reordered["link"] = dict(reversed(entry["link"].items()))
    ids = [[run.run_id for run in expand([PredictiveExperiment(**values)])] for values in (entry, reordered)]
    assert ids[0] == ids[1]


def test_the_run_id_of_a_spec_is_the_same_in_another_process():
    program = (
        "from experiments import PredictiveExperiment, expand\n"
        "print(expand([PredictiveExperiment(mode='predictive', page_size=64)])[0].run_id)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == predictive_spec(page_size=64).run_id


# --- the clamp ----------------------------------------------------------------------------------------------


@given(context=counts, new=counts, positions=st.none() | st.integers(1, 20_000))
def test_a_clamped_run_fits_and_is_as_long_as_can_be(context, new, positions):
    spec = predictive_spec(context_lengths=[context], max_new_tokens=new)
    if positions is not None and new >= positions:
        with pytest.raises(ValueError, match="leaves no room for a prompt"):
            clamp(spec, positions)
        return
    clamped = clamp(spec, positions)
    assert clamped.requested_context_length == context
    if positions is None or context + new <= positions:
        assert clamped == spec
    else:
        assert clamped.context_length + new == positions
        assert clamped.run_id != spec.run_id


def test_a_model_without_room_for_a_single_prompt_token_says_what_to_lower():
    with pytest.raises(ValueError, match="lower max_new_tokens to at most 1023"):
        clamp(predictive_spec(max_new_tokens=1024), 1024)
