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
# Every run of `python main.py` leaves one JSON file. This notebook reads a folder of them and shows what they
# say: the sample that comes with the project, or the folder named by the environment variable `KV_RESULTS`.

# %%
# %matplotlib inline
import os
import sys
from pathlib import Path

from IPython.display import Markdown, display

sys.path.insert(0, str(Path("..").resolve()))  # the modules stand one folder up

import plots
import reporting
import run_plots

folder = Path(os.environ.get("KV_RESULTS", "../logs/sample"))
results, problems = reporting.load_results(folder)
frame = reporting.to_frame(results)
if frame.empty:
    raise FileNotFoundError(f"{folder.resolve()} holds no results; run `python main.py` or set KV_RESULTS")
print(f"{len(frame)} runs, {frame['status'].eq('ok').sum()} of them successful")
print(*problems, sep="\n")

# %% [markdown]
# ## The tables
#
# A strategy is compared with the baseline only where both ran the same model at the same context length. A
# figure that was not measured is an em dash, and never a zero.

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
# ## One run, token by token
#
# An average hides its outliers: each line is the time of every token of one run, at the strategy's longest
# context. A spike is a stall, or the machine doing something else.

# %%
run_plots.latency_trace_figure(results)

# %% [markdown]
# ## Hit rate by layer
#
# How often a layer had a page without waiting for it to come. With exact attention every layer wants every
# page, so reactive paging draws a flat line at budget / pages; what is above it, prefetching brought in time.

# %%
run_plots.layer_figure(results)

# %% [markdown]
# ## Prefetching, step by step
#
# Each column is all pages wanted in one decode step, by where they were found; the lines count the pages
# copied ahead of need, and those of them dropped unused. Red is what prefetching did not foresee.

# %%
for name, run in run_plots.longest_runs(results).items():
    if run["prefetch"]:
        display(run_plots.step_figure(name, run))

# %% [markdown]
# ## Your own question
#
# `frame` is a plain pandas table with one row per run, so any other question is a line away. This one asks
# how far each strategy is from the floor that compute and the link set (1 is the floor itself).

# %%
frame.groupby(["strategy", "context_tokens"], sort=False)["tpot_over_floor"].agg(["count", "mean", "std"])
