"""The files that a component's command line is asked for: their places are tried before the run, and filled after it.

A run takes minutes, so that a folder is missing or a name is wrong should be known before. Hence each kind of picture
is one `Drawing`: the flag that asks for it, how its place is checked, the key of the experiment that has the run record
what it needs, and how it is drawn from the result.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from metrics import RunResult
from page_heatmap import draw_page_heatmap
from registry import choice_text

PAGED_MODES = ("reactive", "predictive")


# --- before the run ---------------------------------------------------------------------------------------------


def check_writable(output: Path | None, flag: str = "--output") -> None:
    """Find out before the run, rather than after it, that its results have no place to go.

    Raises:
        ValueError: `output` is a folder or must not be replaced, or lies under something that is no folder.
    """
    if output is None:
        return
    if output.is_dir():
        raise ValueError(f"{flag} {output} is a folder; name a file")
    if output.exists() and not os.access(output, os.W_OK):
        raise ValueError(f"{flag} {output}: there is such a file, and it cannot be written to")
    _check_folder_to_be(output.absolute().parent, f"{flag} {output}")


def check_folder(folder: Path, flag: str) -> None:
    """The same for a folder that files go to, which need not be there yet.

    Raises:
        ValueError: it is a file, or it cannot be written to or made.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{flag} {folder} is a file; name a folder")
    _check_folder_to_be(folder.absolute(), f"{flag} {folder}")


def _check_folder_to_be(folder: Path, named: str) -> None:
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        raise ValueError(f"{named}: cannot write to {existing}")


def check_png(path: Path, flag: str) -> None:
    """The same for a single picture, which is always a PNG.

    Raises:
        ValueError: it cannot be written, or is named like something else.
    """
    if path.suffix.lower() != ".png":
        raise ValueError(f"{flag} {path}: this picture is a PNG; name a file that ends in .png")
    check_writable(path, flag)


# --- after it ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawing:
    """One kind of picture of a run.

    Attributes:
        name: of the flag, as an attribute of the parsed arguments.
        metavar, help: of the flag.
        modes: that have it.
        needs: the key of an experiment that has its runs record what is drawn.
        check: raises ValueError where the place given by the flag cannot be written to.
        draw: from a result to that place; returns the files that were written.
    """

    name: str
    metavar: str
    help: str
    modes: tuple[str, ...]
    needs: str
    check: Callable[[Path, str], None]
    draw: Callable[[RunResult, Path], list[Path]]

    @property
    def flag(self) -> str:
        return f"--{self.name.replace('_', '-')}"


def drawings_of(mode: str) -> list[Drawing]:
    """Those that a mode has."""
    return [drawing for drawing in DRAWINGS if mode in drawing.modes]


def title_of(result: RunResult) -> str:
    """What was run, in one line."""
    paging, cache = result.spec["paging"], result.cache
    seen = f"{choice_text(paging['selector'])} attends to {cache['attended_pages']:,} of {cache['n_pages']:,} pages"
    kept = f"{choice_text(paging['policy'])} keeps {paging['max_gpu_pages']:,} on the device"
    context = f"{result.context['tokens']:,} tokens in pages of {paging['page_size']:,}"
    ahead = f", {choice_text(result.spec['prefetch']['predictor'])} copies ahead" if result.spec["prefetch"] else ""
    return f"{result.spec['model_name']}, {context}: {seen}, {kept}{ahead}"


def _draw_heat_map(result: RunResult, path: Path) -> list[Path]:
    return [draw_page_heatmap(result.cache["requests"], path, title_of(result))]


def _draw_plots(result: RunResult, folder: Path) -> list[Path]:
    from prefetch_plots import draw_prefetch_plots

    return draw_prefetch_plots(result.to_dict(), folder)


def _draw_trace(result: RunResult, path: Path) -> list[Path]:
    from timeline import write_chrome_trace

    write_chrome_trace(path, result.cache["timeline"], title_of(result))
    return [path]


DRAWINGS = (
    Drawing(
        name="heat_map",
        metavar="FILE.png",
        help="draw which pages were attended and resident",
        modes=PAGED_MODES,
        needs="record_pages",
        check=check_png,
        draw=_draw_heat_map,
    ),
    Drawing(
        name="trace",
        metavar="FILE.json",
        help="write when layers computed, waited and copied, for chrome://tracing or ui.perfetto.dev",
        modes=PAGED_MODES,
        needs="record_timeline",
        check=check_writable,
        draw=_draw_trace,
    ),
    Drawing(
        name="plots",
        metavar="DIR",
        help="draw how prediction and prefetch went, four plots",
        modes=("predictive",),
        needs="record_timeline",
        check=check_folder,
        draw=_draw_plots,
    ),
)
