"""Selectors: which pages of the context a decode step attends to.

`all` attends to every page, so its output is exact attention. A selector that leaves pages out is an approximation.
Prefill always reads every page. A selector has one verb:

    select(query, n_pages) -> pages    the pages to attend to, each once, of a context of `n_pages` pages;
                                       `query` is [H, 1, D], the query of one sequence in this layer and step
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class All:
    """Every page: exact attention."""

    def select(self, query: Any, n_pages: int) -> list[int]:
        return list(range(n_pages))
