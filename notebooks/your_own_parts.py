# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---


# %% [markdown]
# # Parts of your own
#
# Which page makes room, which pages attention reads, which are copied ahead: each of these is a class of some twenty
# lines behind a few verbs. In this lesson you write one of each, check it against something obviously right, run it
# beside the built-in ones, and read the result for what it is.
#
# It runs in half a minute on two CPU cores, because the model is tiny and its weights are random. Such a model
# shows that a part works and how its figures are read. What the part is *worth* only a real model says: set
# `KV_MODEL=smollm2-135m` before starting this notebook (some minutes), or any model of yours.

# %%
# %matplotlib inline
import os
import random
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import pandas as pd
import torch
import yaml
from IPython.display import display
from matplotlib.figure import Figure

PROJECT = Path("..").resolve()
sys.path.insert(0, str(PROJECT))  # the project's modules stand one folder up
os.chdir(tempfile.mkdtemp(prefix="your-own-parts-"))  # what this lesson writes goes here
sys.path.insert(0, os.getcwd())

import reporting

warnings.filterwarnings("ignore", message="IProgress not found")

# %% [markdown]
# ## A model to practise on
#
# Random weights as they are initialised give attention that hardly prefers any page. Multiplied by six they prefer
# some, so that there is something to choose.

# %%
MODEL = os.environ.get("KV_MODEL")
if MODEL is None:
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "vocab_size": 512}
    tiny = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2))
    with torch.no_grad():
        for parameter in tiny.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6.0)
    tiny.save_pretrained("tiny")
    MODEL = "./tiny"
print(MODEL)

# %% [markdown]
# ## How a part is found: `"module:Class"`
#
# Wherever a list names a part (`policy: lru`) it can name a class of yours by import path: `policy:
# "my_policy:LRU2"` is the class `LRU2` of the file `my_policy.py` in the current folder, or of any module that Python
# can import.
#
# So the class has to be in a *file*. One that is defined in a notebook's cell is in the module `__main__`, and in the
# process that makes the runs `__main__` is another. `%%writefile` is the way out: the cell below is the file. Run the
# cell again after a change; the runs below are made by a new process, which reads it anew.

# %% [markdown]
# ## 1. A replacement policy
#
# A policy has four verbs: `insert` and `remove` when a page comes and goes, `touch` when a resident page is asked for,
# and `victim`, which names the page to evict. It sees page numbers and nothing else.
#
# This one is **LRU-2** (O'Neil et al. 1993): judge a page by its last request *but one*. A page that was asked for
# once, and may never be again, goes before one that was asked for twice.

# %%
# %%writefile my_policy.py
from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from page_policies import NothingToEvict


@dataclass(frozen=True)
class LRU2:
    """LRU-2: evict the page whose last request but one is longest ago.

    Pages asked for only once go first, the least recent of them before the others. O'Neil et al. 1993,
    https://doi.org/10.1145/170035.170081
    """

    _requests: dict[int, tuple[int, int]] = field(default_factory=dict, init=False, repr=False)
    _clock: Iterator[int] = field(default_factory=itertools.count, init=False, repr=False)

    def insert(self, page: int) -> None:
        self._requests[page] = (-1, next(self._clock))  # the last request but one, the last one

    def touch(self, page: int) -> None:
        self._requests[page] = (self._requests[page][1], next(self._clock))

    def victim(self, pinned: Collection[int]) -> int:
        candidates = [page for page in self._requests if page not in pinned]
        if not candidates:
            raise NothingToEvict("every resident page is pinned")
        return min(candidates, key=self._requests.__getitem__)

    def remove(self, page: int) -> None:
        del self._requests[page]


# %% [markdown]
# Check it before you measure it: keep the whole history of requests in a list, and look the answer up in it.

# %%
from my_policy import LRU2

rng, policy, history = random.Random(0), LRU2(), {}
for moment in range(2000):
    page = rng.randrange(8)
    if page in history:
        policy.touch(page)
    else:
        policy.insert(page)
    history.setdefault(page, []).append(moment)
    if len(history) > 5:
        by_hand = min(
            history, key=lambda page: (history[page][-2] if len(history[page]) > 1 else -1, history[page][-1])
        )
        assert policy.victim(pinned=()) == by_hand
        policy.remove(by_hand)
        del history[by_hand]
print("2,000 requests, every victim as looked up")

# %% [markdown]
# ## 2. A selector
#
# Of each full page a selector keeps a small *digest* on the device, and holds the query against it: `score` says how
# much each query head wants each page. Shapes: `n` pages, `K` key/value heads, `G` query heads of each, `P` positions
# of a page, `D` the head size.
#
# `quest` draws a box around a page's keys. This one draws a **ball**: the mean key and the largest distance from it. No
# key in the ball gives a larger logit than `q · centre + |q| radius`, by Cauchy and Schwarz. Its digest is half of the
# box's: D + 1 numbers instead of 2 D.

# %%
# %%writefile my_selector.py
from __future__ import annotations

from dataclasses import dataclass

import torch

from page_selectors import Selector


@dataclass(frozen=True)
class Ball(Selector):
    """The largest logit that any key could give in a ball around the mean key, as wide as the farthest key."""

    def digest(self, keys: torch.Tensor) -> torch.Tensor:
        exact = keys.float()  # [n, K, P, D]
        centre = exact.mean(2)
        radius = (exact - centre.unsqueeze(2)).norm(dim=-1).amax(2, keepdim=True)
        return torch.cat([centre, radius], dim=-1).to(keys.dtype)  # [n, K, D + 1]

    def score(self, query: torch.Tensor, digests: torch.Tensor) -> torch.Tensor:
        query, digests = query.float(), digests.float()  # [K, G, D], [n, K, D + 1]
        centre, radius = digests[..., :-1], digests[..., -1:]
        return torch.einsum("kgd,nkd->nkg", query, centre) + query.norm(dim=-1) * radius


# %% [markdown]
# A bound can be checked by brute force: no logit of any key may lie above it, and for a page of one key it *is* the
# logit.

# %%
from my_selector import Ball

torch.manual_seed(0)
query, keys = torch.randn(2, 3, 16), torch.randn(50, 2, 8, 16)
logits = torch.einsum("kgd,nkpd->nkgp", query, keys)
scores = Ball().score(query, Ball().digest(keys))
assert (scores >= logits.amax(-1) - 1e-5).all()
torch.testing.assert_close(Ball().score(query, Ball().digest(keys[:, :, :1])), logits[..., 0])
print(f"above the largest logit by {(scores - logits.amax(-1)).mean():.1f} on average")

# %% [markdown]
# ## 3. A predictor
#
# A predictor is told what a layer asks for (`want`), and names what it will ask for next, with a confidence
# (`predict`). Confidence counts: a guess whose copy is unlikely to pay is declined.
#
# This one guesses the **neighbours** of what the layer read last, as what a text says goes on on the next page. How
# sure it is it has counted: the share of its guesses that came true, starting from one in two.

# %%
# %%writefile my_predictor.py
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from fading import Guesses
from page_predictors import QuietPredictor


@dataclass
class Neighbours(QuietPredictor):
    """The pages next to those that this layer asked for in the last step.

    Args:
        reach: how many pages to each side.
    """

    needs_mass: ClassVar[bool] = False

    reach: int = 1
    _asked: dict[int, set[int]] = field(default_factory=dict, init=False, repr=False)
    _guessed: dict[int, set[int]] = field(default_factory=dict, init=False, repr=False)
    _made: int = field(default=2, init=False, repr=False)
    _true: int = field(default=1, init=False, repr=False)

    def want(self, layer: int, step: int, pages: Sequence[int]) -> None:
        guessed = self._guessed.pop(layer, set())
        self._made += len(guessed)
        self._true += len(guessed & set(pages))
        self._asked[layer] = set(pages)

    def predict(self, layer: int, step: int) -> Guesses:
        asked = self._asked.get(layer, set())
        near = {page + offset for page in asked for offset in range(-self.reach, self.reach + 1)} - asked
        self._guessed[layer] = {page for page in near if page >= 0}
        return [(page, self._true / self._made) for page in sorted(self._guessed[layer])]


# %%
from my_predictor import Neighbours

predictor = Neighbours()
assert predictor.predict(layer=0, step=1) == []
predictor.want(0, 1, [3, 7])
assert predictor.predict(0, 2) == [(2, 0.5), (4, 0.5), (6, 0.5), (8, 0.5)]
predictor.want(0, 2, [4, 9])  # one of the four came true: 2 of 6 with the start
assert predictor.predict(0, 3) == [(page, 2 / 6) for page in (3, 5, 8, 10)]
assert predictor.predict(1, 3) == []  # of another layer nothing is known

# %% [markdown]
# ## Beside the built-in ones
#
# A list of experiments that differ in one key each, as you would write it by hand, run by `main.py`. A fifth of the
# pages is read in each step, and a quarter of them fits. (Under exact attention every step wants every page, and no
# policy could do better than another.) Where nothing else is said it is LRU, `quest`, and no prediction.

# %%
SHARED = {
    "model_name": MODEL,
    "context_lengths": [1000],
    "max_new_tokens": 50,
    "num_runs": 1,
    "warmup_runs": 0,
    "page_size": 16,
    "max_gpu_pages": 16,
    "staging_pages": 8,
    "selector": "quest",
    "attention_fraction": 0.2,
}
POLICIES = {
    "plain": {},
    "lfu": {"policy": "lfu"},
    "s3fifo": {"policy": "s3fifo"},
    "LRU-2": {"policy": "my_policy:LRU2"},
}
SELECTORS = {
    "window": {"selector": "window"},
    "mean_key": {"selector": "mean_key"},
    "plain": {},
    "ball": {"selector": "my_selector:Ball"},
    "oracle": {"selector": "oracle"},
}
PREDICTORS = {
    "plain": {},
    "last_step": {"mode": "predictive", "predictor": "last_step"},
    "ranked": {"mode": "predictive", "predictor": "ranked"},
    "neighbours": {"mode": "predictive", "predictor": "my_predictor:Neighbours"},
    "neighbours, every guess": {
        "mode": "predictive",
        "predictor": {"name": "my_predictor:Neighbours", "reach": 1},  # parameters are the fields of the dataclass
        "min_confidence": 0.0,
    },
}

experiments = [{"mode": "reactive", "name": name, **keys} for name, keys in (POLICIES | SELECTORS | PREDICTORS).items()]
Path("lesson.yaml").write_text(yaml.safe_dump({"defaults": SHARED, "experiments": experiments}, sort_keys=False))
command = [
    sys.executable,
    str(PROJECT / "main.py"),
    "--config",
    "lesson.yaml",
    "--output",
    "results",
    "--no-plots",
    "-q",
]
done = subprocess.run(command, capture_output=True, text=True)
if done.returncode:
    raise RuntimeError(done.stderr or done.stdout)
results, problems = reporting.load_results("results")
runs = reporting.to_frame(results).set_index("strategy")
print(f"{len(runs)} runs in {Path('results').resolve()}", *problems)


# %%
def bars(rows: pd.DataFrame, column: str, title: str, own: list[str]) -> Figure:
    """One bar for each strategy, in %, yours in colour."""
    figure = Figure(figsize=(7, 0.6 + 0.4 * len(rows)), layout="constrained", dpi=110)
    axis = figure.subplots()
    drawn = axis.barh(rows.index, 100 * rows[column], color=["C1" if name in own else "0.7" for name in rows.index])
    axis.bar_label(drawn, fmt="%.1f", padding=3)
    axis.invert_yaxis()
    axis.margins(x=0.1)
    axis.set_title(title, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    return figure


# %% [markdown]
# ### The policy
#
# Which page goes decides how often a page has to come back: the hit rate. It changes no token.

# %%
policies = runs.loc[list(POLICIES)]
display(policies[["hit_rate", "stall_ms", "tpot_ms"]])
display(bars(policies, "hit_rate", "Hit rate in decode, %", own=["LRU-2"]))

# %% [markdown]
# **Reading it.** On the tiny model LRU-2 is some five points above LRU: its random weights spread attention, pages are
# asked for at random, and two requests say more than one. It would be wrong to stop there. On `smollm2-135m` (1,000
# tokens, this very list, n = 1) it is the other way round: LRU 92.4 %, S3-FIFO 91.7, LRU-2 91.5, LFU 87.2. There
# attention returns to the same pages from token to token, and what was read last is what is read next. The times are
# those of one short run of a tiny model: from them nothing follows at all.

# %% [markdown]
# ### The selector
#
# A selector changes what attention reads, so its speed means nothing without its quality: how far the next-token
# distribution is from the baseline's (`kl_mean`, in nats), and of as many pages with the most attention as were read,
# which share was (`page_recall`). `oracle` looks at all keys and is the bound; `window` looks at none, and is to be
# beaten.

# %%
selectors = runs.loc[list(SELECTORS)]
display(selectors[["kl_mean", "top1_agreement", "page_recall", "digest_mb", "tpot_ms"]])
display(bars(selectors, "page_recall", "Pages with the most attention that were read, %", own=["ball"]))

# %% [markdown]
# **Reading it.** The ball is a bound, as the check above has shown, and yet a loose one: a single far key makes it
# large in every direction, where the box of `quest` grows in one. On the tiny model it finds about as many of the pages
# as `quest`, and its divergence may come out as small as the oracle's: so much are 32 tokens of a model worth that says
# nothing sensible. On `smollm2-135m` (this list) the matter is plain: of the pages with the most attention the oracle
# reads 90.9 %, `quest` 76.0, `mean_key` 71.8, `window` 67.9, and the ball 67.1. So it finds fewer than not looking at
# all, and its divergence (0.46 nats; `window` 0.48, `quest` 0.43, `mean_key` 0.17, `oracle` 0.03) is no argument for
# it either.
# A bound that holds is not yet a ranking that is good, and a recall that is higher not yet a smaller divergence.

# %% [markdown]
# ### The predictor
#
# Copying ahead changes no token either, only when bytes move. `hit_rate` says what it won, `accuracy` which share of
# its copies was used, and `coverage` which share of what LRU lacked it found.

# %%
predictors = runs.loc[list(PREDICTORS)]
display(predictors[["hit_rate", "prefetch_issued", "prefetch_declined", "accuracy", "coverage", "tpot_ms"]])
display(bars(predictors, "hit_rate", "Hit rate in decode, %", own=["neighbours", "neighbours, every guess"]))

# %% [markdown]
# **Reading it.** With `min_confidence: adaptive`, the default, the neighbours issue next to nothing: few of the first
# guesses came true, confidence fell with them, and guesses that are not worth a copy are declined
# (`prefetch_declined`). With every guess copied the hit rate rises, and most copies are for nothing; on a link that is
# busy they would be in the way of those that are needed. On `smollm2-135m` (this list): 92.4 % without prediction and
# with the neighbours, 93.6 % with every guess of theirs (7.9 % of the copies used), 99.0 with `ranked`, which
# scores the next layer's pages with the query it foresees. Knowing the question beats knowing the place.
# `last_step` issues nothing: what was read last is what LRU has kept.

# %% [markdown]
# ## What to do next
#
# - Measure on a real model, with `num_runs` of 3 or more, and look at the spread before you believe a difference.
# - Vary the budget (`max_gpu_pages`): a policy that wins at one size may lose at another.
# - Ask for tasks too (`quality: {fidelity_tokens: 64, tasks: [needle]}`): a mean divergence can hide a lost sentence.
# - To give a part to everybody, move it into `page_policies.py`, `page_selectors.py` or `page_predictors.py`, name it
#   in `registry.py`, and turn the checks above into tests. `CONTRIBUTING.md` says how.
