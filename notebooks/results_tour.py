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
# # A tour of a results folder
#
# Every run of `python main.py` leaves one JSON file. This notebook reads a folder of them and goes from the whole to
# the single step: all runs, the strategies, what they cost in answers, one run, one decode step. It reads the sample
# that comes with the project, or the folder named by the environment variable `KV_RESULTS`:
#
#     KV_RESULTS=../logs jupyter lab results_tour.ipynb
#
# Nothing is run here and no model is loaded. What is said of figures below is said of the sample.

# %%
# %matplotlib inline
import os
import sys
from pathlib import Path

import pandas as pd
from IPython.display import Markdown, display
from matplotlib.figure import Figure

sys.path.insert(0, str(Path("..").resolve()))  # the modules stand one folder up

import paper_plots
import plots
import quality_frame
import quality_plots
import reporting
import run_plots
from result_frame import describe_link

folder = Path(os.environ.get("KV_RESULTS", "../logs/sample"))
results, problems = reporting.load_results(folder)
frame = reporting.to_frame(results)
if frame.empty:
    raise FileNotFoundError(f"{folder.resolve()} holds no results; run `python main.py` or set KV_RESULTS")
print(f"{len(frame)} runs, {frame['status'].eq('ok').sum()} of them successful")
print(*problems, sep="\n")

# %% [markdown]
# ## What there is: results, and a frame of them
#
# `results` are the files as they stand, `frame` is one row for each run with its figures in columns. What was not
# measured is missing, and never a zero: a baseline has no hit rate, and a CPU no GPU memory.

# %%
frame[["strategy", "context_tokens", "repetition", "tpot_ms", "hit_rate", "stall_ms", "kl_mean", "device_kv_mb"]]

# %% [markdown]
# ## The tables
#
# These are the tables that `main.py` prints. A strategy is compared with the baseline only where both ran the same
# model at the same context length.

# %%
display(Markdown(reporting.markdown_tables(frame, reporting.task_scores(results))))

# %% [markdown]
# ## The comparison
#
# One panel per question, one colour per strategy. Where the whiskers of two bars overlap, their
# difference may be noise.

# %%
plots.comparison_figure(frame)

# %% [markdown]
# ## Quality beside speed
#
# A cache that reads only a part of the pages is faster because it does less, so its speed means nothing without what
# it costs in answers. KL divergence is how far its next-token distribution is from the baseline's, on the same text:
# 0 for an exact cache, but for rounding. Down and to the left is better.

# %%
if quality_plots.quality_points(frame):
    display(quality_plots.pareto_figure(frame))
else:
    print("no run of this folder had its quality measured; a `quality:` block in the list asks for it")

# %% [markdown]
# ## Tasks
#
# A mean divergence can look good while the one sentence that a question is about is lost. A task asks for that
# sentence. Each score stands beside the baseline's on the same items, with its 95 % interval: with a handful of items
# the interval is wide, and two scores whose intervals overlap are not known to differ.

# %%
scores = reporting.task_scores(results)
if scores.empty:
    print("no tasks were asked of these runs")
display(scores)

# %%
items = quality_plots.placed_items(quality_frame.task_items(results))
for task in items["task"].unique():
    display(quality_plots.task_figure(frame, items, task))

# %% [markdown]
# ## One run, token by token
#
# An average hides its outliers: each line is the time of every token of one run, at the strategy's longest
# context. A spike is a stall, or the machine doing something else; the steps below tell which.

# %%
run_plots.latency_trace_figure(results)

# %% [markdown]
# ## One run, step by step
#
# A paged run counts the pages of each decode step: `steps` in its file. Each column is all pages wanted in one step,
# by where they were found; the lines count the pages copied ahead of need, and those of them dropped unused. Red is
# what had to be fetched on demand.

# %%
paged = {name: run for name, run in run_plots.longest_runs(results).items() if run["steps"]}
for name, run in paged.items():
    display(run_plots.step_figure(name, run))

# %% [markdown]
# The same records as a table, one row for each step. `must_move` is the least number of pages that any policy would
# have had to fetch in that step, given the budget; `lru_hits` the hits that plain LRU would have had too.


# %%
def decode_steps(run: dict) -> pd.DataFrame:
    """A row for each decode step of a run, and its hit rate."""
    records = [step for step in run["steps"] if step["phase"] == "decode"]
    steps = pd.DataFrame.from_records(records).set_index("step")
    accesses = steps[["hits", "late", "misses"]].sum(axis=1)
    steps["hit_rate"] = steps["hits"] / accesses.where(accesses > 0)
    return steps


for name, run in paged.items():
    print(name)
    display(decode_steps(run).head(5))

# %% [markdown]
# Hits say what was there, stall says what it cost: the time that computing waited for pages, in each step. In the
# sample a seventeenth page begins at step 49, as 2,000 + 48 tokens fill 16 pages of 128: the budget stays, so from
# there on one more page of each layer has to travel.

# %%
styles = plots.strategy_styles(list(frame["strategy"].unique()))
figure = Figure(figsize=(9, 5.5), layout="constrained", dpi=110)
rates, stalls = figure.subplots(2, 1, sharex=True)
for name, run in paged.items():
    steps, colour = decode_steps(run), styles[name]["color"]
    label = f"{name}, {run['context']['tokens']:,} tokens, link: {describe_link(run)}"
    rates.plot(steps.index, 100 * steps["hit_rate"], color=colour, label=label)
    stalls.plot(steps.index, steps["stall_ms"], color=colour)
rates.set(ylabel="hit rate, %", ylim=(0, 105))
stalls.set(ylabel="stall, ms", xlabel="decode step")
figure.legend(loc="outside lower center", frameon=False)
display(figure)

# %% [markdown]
# ## Hit rate by layer
#
# How often a layer had a page without waiting for it to come. With exact attention every layer wants every
# page, so reactive paging draws a flat line at budget / pages; what is above it, prefetching brought in time.

# %%
paper_plots.layer_rate_figure(frame, results)

# %% [markdown]
# ## Your own question
#
# `frame` is a plain pandas table with one row per run, so any other question is a line away. This one asks
# how far each strategy is from the floor that compute and the link set (1 is the floor itself).

# %%
frame.groupby(["strategy", "context_tokens"], sort=False)["tpot_over_floor"].agg(["count", "mean", "std"])
