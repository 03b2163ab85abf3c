"""When, on what and with which model and versions results were made, as their files say, in words for a page.

Results of one sweep come from one machine, but a folder may hold those of several. So each question has as many answers
as there are different ones, and what no run could find out is not known rather than absent.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from typing import Any

from html_text import Html, element, joined
from result_frame import BYTES_PER_MIB, Result, dig, number_at, text_at
from text_tables import DASH

UNKNOWN = "not known"


def dates(results: Iterable[Result]) -> Html | str:
    """The day and time of the first run, and of the last where that is another day."""
    moments = sorted(moment for result in results if (moment := _moment(result)) is not None)
    if not moments:
        return DASH
    first, last = moments[0], moments[-1]
    shown = [element("time", f"{first:%Y-%m-%d %H:%M} {first.tzname() or ''}".strip(), datetime=first.isoformat())]
    if last.date() != first.date():
        shown += [" to ", element("time", f"{last:%Y-%m-%d}", datetime=last.isoformat())]
    return joined(shown)


def _moment(result: Result) -> datetime | None:
    try:
        moment = datetime.fromisoformat(text_at(result, "started_at") or "")
    except ValueError:
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def commit(result: Result) -> str:
    full = text_at(result, "environment.git_commit")
    changed = " with changes" if dig(result, "environment.git_dirty") else ""
    return f"{full[:12]}{changed}" if full else UNKNOWN


def models(results: Iterable[Result]) -> list[dict[str, str]]:
    """Each model as it was loaded."""
    seen: dict[str, dict[str, str]] = {}
    for result in results:
        if isinstance(block := result.get("model"), Mapping):
            name = text_at(result, "spec.model_name") or UNKNOWN
            seen.setdefault(f"{name} {block}", {"Model": name, **_model_facts(block)})
    return list(seen.values())


def _model_facts(block: Mapping[str, Any]) -> dict[str, str]:
    parameters, weight_bytes, per_token, positions = (
        number_at(block, key) for key in ("n_parameters", "weight_bytes", "kv_bytes_per_token", "max_positions")
    )
    facts = {
        "Source": text_at(block, "source"),
        "Weights": "random" if block.get("random_weights") is True else None,
        "Parameters": None if parameters is None else f"{parameters:,.0f}",
        "Size of weights": None if weight_bytes is None else f"{weight_bytes / BYTES_PER_MIB:,.1f} MiB",
        "Number format": text_at(block, "dtype"),
        "Device": text_at(block, "device"),
        "Attention": text_at(block, "attention"),
        "KV cache of a token": None if per_token is None else f"{per_token:,.0f} bytes",
        "Positions": None if positions is None else f"{positions:,.0f}",
    }
    return {name: fact for name, fact in facts.items() if fact is not None}


def environments(results: Iterable[Result]) -> list[dict[str, str]]:
    """Each machine with its versions, as runs found it."""
    seen: dict[str, dict[str, str]] = {}
    for result in results:
        if isinstance(block := result.get("environment"), Mapping):
            facts = _environment_facts(block)
            seen.setdefault(str(facts), facts)
    return list(seen.values())


def _environment_facts(block: Mapping[str, Any]) -> dict[str, str]:
    gpus, packages = block.get("gpus"), block.get("packages")
    facts = {
        "CPU": text_at(block, "cpu"),
        "Logical processors": text_at(block, "cpu_count"),
        "Threads of torch": text_at(block, "torch_threads"),
        "GPUs": None if not isinstance(gpus, list) else ", ".join(map(str, gpus)) or "none",
        "CUDA": text_at(block, "cuda") or "none",
        "GPU driver": text_at(block, "gpu_driver") or "none",
        "System": text_at(block, "system"),
        "Python": text_at(block, "python"),
        "Packages": ", ".join(f"{name} {version or UNKNOWN}" for name, version in packages.items())
        if isinstance(packages, Mapping)
        else None,
        "Program, git commit": text_at(block, "git_commit"),
        "Tracked files": {True: "differ from the commit", False: "as in the commit"}.get(block.get("git_dirty")),
    }
    return {name: UNKNOWN if fact is None else fact for name, fact in facts.items()}
