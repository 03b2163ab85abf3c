"""Runs as scalars in TensorBoard, in OUTPUT/tensorboard: `tensorboard --logdir OUTPUT/tensorboard`.

Each run has a folder of its own, named as its result file. In it are

    run/tpot_ms, run/hit_rate ...        one figure each
    step/itl_ms, step/hit_rate ...       one for each decode step; those of pages only where there are pages
    quality/kl_mean, quality/task/...    once the sweep is over
    hparams                              the spec beside tpot_ms and hit_rate, for the HPARAMS tab

A run that is made again replaces what it wrote before, as it replaces its result file. Failed runs have no figures, and
are not there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trackers import figures_of, missing_extra, quality_of, settings_of, steps_of

if TYPE_CHECKING:
    from metrics import RunResult

FOLDER = "tensorboard"
COMPARED = ("tpot_ms", "ttft_ms", "hit_rate", "stall_percent", "device_kv_mb")
"""Figures that the HPARAMS tab sets beside the settings."""


class TensorBoard:
    """Scalars by run and by step, and the settings as hparams; see the module's docstring."""

    def __init__(self, folder: Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise missing_extra("tensorboard", error) from error
        self._writer_at: Any = SummaryWriter
        self.folder = folder / FOLDER

    def run(self, result: RunResult) -> None:
        if not result.ok:
            return
        figures = figures_of(result)
        folder = self._folder_of(result)
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        with self._writer_at(str(folder)) as writer:
            for name, value in figures.items():
                writer.add_scalar(f"run/{name}", value, 0)
            for place, step in enumerate(steps_of(result), 1):
                for name, value in step.items():
                    writer.add_scalar(f"step/{name}", value, place)
            compared = {f"compared/{name}": figures[name] for name in COMPARED if name in figures}
            writer.add_hparams(settings_of(result), compared, run_name=".")

    def finish(self, results: Sequence[RunResult], folder: Path) -> None:
        for result in results:
            figures = quality_of(result) if result.ok else {}
            if not figures:
                continue
            with self._writer_at(str(self._folder_of(result))) as writer:
                for name, value in figures.items():
                    writer.add_scalar(f"quality/{name}", value, 0)

    def _folder_of(self, result: RunResult) -> Path:
        spec = result.spec
        name = re.sub(r"[^A-Za-z0-9.-]+", "-", spec["name"]).strip("-.")[:40] or spec["mode"]
        return self.folder / f"{name}_ctx{spec['context_length']}_run{spec['repetition']}_{result.run_id}"
