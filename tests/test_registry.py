"""A registry knows names without importing what they name, and says what is wrong with a name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from registry import MODES, POLICIES, PREDICTORS, SELECTORS, Registry, UnknownName, nearest

PROJECT = Path(__file__).parent.parent
REGISTRIES = (MODES, POLICIES, SELECTORS, PREDICTORS)


@pytest.fixture
def user_folder(tmp_path, monkeypatch):
    """A current folder for a user's own modules; what they leave in this process is undone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("own_policy", None)


def test_checking_a_name_imports_nothing():
    program = (
        "import sys, registry\n"
        "before = set(sys.modules)\n"
        "for table in (registry.MODES, registry.POLICIES, registry.SELECTORS, registry.PREDICTORS):\n"
        "    for name in table:\n"
        "        table.check(name)\n"
        "registry.POLICIES.check('page_policies:MyPolicy')\n"
        "print(sorted(set(sys.modules) - before))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_loading_a_name_imports_its_module_alone():
    program = (
        "import sys, registry\n"
        "registry.POLICIES.create('lru')\n"
        "print('page_policies' in sys.modules, 'page_predictors' in sys.modules, 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False", "False"]


@pytest.mark.parametrize("registry", REGISTRIES, ids=lambda registry: registry.kind)
def test_every_registered_name_leads_to_something_that_says_what_it_is(registry):
    described = registry.describe()
    assert [name for name, _, _ in described] == list(registry)
    assert all(len(text.split()) >= 3 for _, _, text in described)


@pytest.mark.parametrize(
    ("registry", "typo", "meant"),
    [(POLICIES, "lur", "lru"), (POLICIES, "fif0", "fifo"), (PREDICTORS, "layer-ahead", "layer_ahead")],
)
def test_a_misspelt_name_is_refused_with_the_nearest_one_and_all_known_ones(registry, typo, meant):
    with pytest.raises(UnknownName) as refused:
        registry.check(typo)
    message = str(refused.value)
    assert message.startswith(f"unknown {registry.kind} {typo!r}; did you mean {meant!r}? (known: ")
    assert all(name in message for name in registry)


def test_a_name_like_no_other_gets_no_suggestion():
    assert nearest("zzz", ["lru", "mru"]) == ""


def test_the_only_name_that_a_word_begins_is_nearer_than_one_spelt_alike():
    assert nearest("model", ["mode", "model_name"]) == "; did you mean 'model_name'?"
    assert nearest("page", ["pages", "page_size", "page_table"]) == "; did you mean 'pages'?"
    with pytest.raises(UnknownName, match=r"unknown policy 'zzz' \(known: attention, clock, fifo"):
        POLICIES.load("zzz")


def test_each_creation_is_a_new_instance():
    assert POLICIES.create("lru") is not POLICIES.create("lru")


def test_a_name_can_be_given_with_parameters_or_without_any():
    assert type(POLICIES.create({"name": "mru"})) is type(POLICIES.create("mru"))


OWN_POLICY = """
from dataclasses import dataclass

from page_policies import LRU

@dataclass(frozen=True)
class Mine(LRU):
    decay: float = 0.5
    age: int = 3
"""


def test_a_users_own_class_is_found_in_the_current_folder_and_gets_its_parameters(user_folder):
    (user_folder / "own_policy.py").write_text(OWN_POLICY)
    assert POLICIES.create("own_policy:Mine").decay == 0.5
    mine = POLICIES.create({"name": "own_policy:Mine", "decay": 0.25})
    assert (mine.decay, mine.age) == (0.25, 3)
    mine.insert(7)
    assert mine.victim(()) == 7


def test_an_unknown_parameter_is_refused_with_those_there_are(user_folder):
    (user_folder / "own_policy.py").write_text(OWN_POLICY)
    with pytest.raises(ValueError, match=r"has no parameter 'decy'; did you mean 'decay'\? \(parameters: decay, age\)"):
        POLICIES.create({"name": "own_policy:Mine", "decy": 1})
    with pytest.raises(ValueError, match=r"policy 'lru' has no parameter 'size' \(parameters: none\)"):
        POLICIES.create({"name": "lru", "size": 1})


@pytest.mark.parametrize("path", ["not_there:Mine", "not_there.deeper:Mine"])
def test_an_import_path_to_no_module_says_so(user_folder, path):
    with pytest.raises(UnknownName, match=f"there is no module '{path.partition(':')[0]}' to import"):
        POLICIES.load(path)


def test_a_module_without_the_class_says_so(user_folder):
    (user_folder / "own_policy.py").write_text(OWN_POLICY)
    with pytest.raises(UnknownName, match="module 'own_policy' has no 'Yours'"):
        POLICIES.load("own_policy:Yours")


@pytest.mark.parametrize("path", ["own_policy:", ":Mine", ".own_policy:Mine", "own policy:Mine"])
def test_what_is_no_import_path_is_an_unknown_name(path):
    with pytest.raises(UnknownName, match="unknown policy"):
        POLICIES.check(path)


def test_a_module_of_the_users_that_lacks_a_module_itself_keeps_its_own_error(user_folder):
    (user_folder / "own_policy.py").write_text("import something_not_installed\n")
    with pytest.raises(ModuleNotFoundError, match="something_not_installed"):
        POLICIES.load("own_policy:Mine")


def test_a_module_of_the_users_that_breaks_as_it_is_imported_keeps_its_own_error(user_folder):
    (user_folder / "own_policy.py").write_text("import math\nmath.tau_times_two\n")
    with pytest.raises(AttributeError, match="tau_times_two"):
        POLICIES.load("own_policy:Mine")


def test_a_registry_does_not_share_its_table_with_whoever_made_it():
    table = {"one": "page_policies:LRU"}
    registry = Registry("thing", table)
    table["two"] = "page_policies:MRU"
    assert list(registry) == ["one"]
