"""Selectors: which pages of the context a decode step attends to.

`all` attends to every page, so its output is exact attention. A selector that leaves pages out is an approximation, and
says so by `exact = False`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class All:
    """Every page: exact attention."""

    exact: ClassVar[bool] = True

    def select(self, n_pages: int) -> list[int]:
        """The pages to attend to, ascending, of a context of `n_pages` pages."""
        return list(range(n_pages))
