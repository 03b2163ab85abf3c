"""What CONTRIBUTING.md tells a newcomer to write works as it stands there.

A block whose first line is a comment with a file's name is that file. The parts are found by import path, as a user's
own are; the mode is added to the registry and the config as the text says, for the length of a test.
"""

from __future__ import annotations

import random
import re
import sys
from pathlib import Path

import pytest
import torch
from test_quality_tasks import WordTokenizer

import config_schema
import experiments
import main
import reporting
import run_settings
from registry import MODES, PREDICTORS, TASKS

PROJECT = Path(main.__file__).parent
TEXT = (PROJECT / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCKS = {
    match["file"]: match["block"]
    for match in re.finditer(
        r"^```(?:python|yaml)\n(?P<block># (?P<file>\S+\.\w+)\b.*?)^```$", TEXT, re.DOTALL | re.MULTILINE
    )
}
OWN = ("my_policy", "my_selector", "my_predictor", "my_task", "roomy_cache", "my_tracker")

pytestmark = pytest.mark.usefixtures("logging_restored")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder of a newcomer who has written every file."""
    for name, block in BLOCKS.items():
        if name not in ("registry.py", "config_schema.py"):
            model = PROJECT / "configs" / "models" / "tiny-llama.json"
            (tmp_path / name).write_text(block.replace("configs/models/tiny-llama.json", str(model)), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in OWN:
        sys.modules.pop(name, None)


def test_every_block_of_code_is_a_file_that_the_tests_know():
    fences = re.findall(r"^```(?:python|yaml)$", TEXT, re.MULTILINE)
    expected = {f"{name}.py" for name in OWN} | {"my_list.yaml", "registry.py", "config_schema.py"}
    assert (BLOCKS.keys(), len(fences)) == (expected, len(expected))


def test_the_parts_run_from_the_list_and_the_tracker_writes_each_run_down(folder):
    command = ["--config", "my_list.yaml", "--output", "out", "--no-plots", "-q", "--tracker", "my_tracker:Csv"]
    assert main.main(command) == main.OK
    results, _ = reporting.load_results("out")
    baseline, reactive, predictive = results
    assert reactive["spec"]["paging"]["policy"] == "my_policy:RandomPage"
    assert reactive["cache"]["evictions"] > 0  # so the policy was asked for victims
    assert reactive["cache"]["attended_pages"] < reactive["cache"]["n_pages"]  # and the selector for scores
    assert predictive["prefetch"]["issued"] > 0
    lines = (folder / "out" / "runs.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["baseline", "reactive", "predictive"]
    assert float(lines[0].split(",")[1]) == baseline["timing"]["tpot_ms"]


def test_the_policy_names_any_page_but_a_pinned_one(folder):
    from my_policy import RandomPage

    policy = RandomPage(seed=1)
    for page in range(6):
        policy.insert(page)
    policy.remove(5)
    assert {policy.victim(pinned={0, 1}) for _ in range(100)} == {2, 3, 4}


def test_the_selector_finds_the_largest_logit_where_every_key_is_a_sample(folder):
    from my_selector import Samples

    torch.manual_seed(0)
    query, keys = torch.randn(2, 3, 8), torch.randn(5, 2, 4, 8)
    logits = torch.einsum("kgd,nkpd->nkgp", query, keys)
    every = Samples(n_keys=4)
    torch.testing.assert_close(every.score(query, every.digest(keys)), logits.amax(-1))
    ends = Samples(n_keys=2)
    torch.testing.assert_close(ends.score(query, ends.digest(keys)), logits[..., [0, 3]].amax(-1))


def test_the_predictor_guesses_what_came_back(folder):
    predictor = PREDICTORS.create("my_predictor:BeforeLast")
    assert predictor.predict(0, 1) == []
    predictor.want(0, 1, [1, 2, 3])
    assert predictor.predict(0, 2) == []
    predictor.want(0, 2, [3, 4])
    assert predictor.predict(0, 3) == [(1, 0.5), (2, 0.5)]
    predictor.want(0, 3, [1])
    assert predictor.predict(0, 4) == [(3, 0.5), (4, 0.5)]


def test_the_task_asks_for_what_its_text_says_whatever_the_length(folder):
    task, tokenizer = TASKS.create("my_task:Door"), WordTokenizer()
    short, long = (task.item(tokenizer, n_tokens, seed=3, index=0) for n_tokens in (100, 400))
    assert short.answers == long.answers
    (number,) = long.answers
    assert long.text.count(f"The number of the door is {number}.") == 1
    assert len(long.prompt) == 400
    assert (task.score(f" {number}.", long), task.score(" 12.", long)) == (1.0, 0.0)


@pytest.fixture
def with_the_mode(folder, monkeypatch):
    """The mode, added as the text says."""
    monkeypatch.setattr(MODES, "table", MODES.table | eval(BLOCKS["registry.py"]))
    schema = dict(vars(config_schema))
    exec(BLOCKS["config_schema.py"], schema)
    classes = config_schema.MODE_CLASSES | {"roomy": schema["RoomyExperiment"]}
    monkeypatch.setattr(config_schema, "MODE_CLASSES", classes)
    for module in (experiments, run_settings):
        monkeypatch.setattr(module, "MODE_CLASSES", classes)


def test_the_mode_gives_the_tokens_of_the_baseline(folder, with_the_mode):
    listed = "defaults: {model_name: MODEL, context_lengths: [300], num_runs: 1, max_new_tokens: 30}\nexperiments: "
    model = f"random:{PROJECT / 'configs' / 'models' / 'tiny-llama.json'}"
    (folder / "modes.yaml").write_text(listed.replace("MODEL", model) + "[{mode: baseline}, {mode: roomy}]")
    assert main.main(["--config", "modes.yaml", "--output", "out", "--no-plots", "-q"]) == main.OK
    _, roomy = reporting.load_results("out")[0]
    assert (roomy["spec"]["mode"], roomy["quality"]["matches_baseline"]) == ("roomy", True)
    assert roomy["memory"]["device_kv_bytes"] == 3 * 2 * 2 * (300 + 256) * 16 * 4  # layers, K and V, heads, rooms


def test_the_room_of_the_mode_is_allocated_anew_when_it_is_full(folder, monkeypatch):
    import roomy_cache
    from transformers.cache_utils import DynamicLayer

    monkeypatch.setattr(roomy_cache, "ROOM", 3)
    roomy, plain, rng = roomy_cache.RoomyLayer(), DynamicLayer(), random.Random(0)
    torch.manual_seed(0)
    for _ in range(20):
        states = [torch.randn(1, 2, rng.randint(1, 4), 8) for _ in range(2)]
        states[1] = states[1][:, :, :1].expand_as(states[0]).contiguous()
        for kept, expected in zip(roomy.update(*states), plain.update(*states), strict=True):
            torch.testing.assert_close(kept, expected)
    assert roomy.get_seq_length() == plain.get_seq_length()


def test_the_model_of_the_list_is_there():
    (named,) = re.findall(r"random:(\S+)", BLOCKS["my_list.yaml"])
    assert (PROJECT / named).exists()
