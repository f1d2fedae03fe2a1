"""The adapters of a run's newest checkpoints, kept aside from what the run itself goes on from."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from training.saving import CONFIG_FILE, WEIGHTS_FILE

MOST_KEPT = 3  # checkpoints, the newest


def keep(checkpoint: Path, folder: Path, step: int) -> None:
    """Link a checkpoint's adapter aside, whole or not at all; the oldest of more than a few go."""
    unfinished = folder / "unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        os.link(checkpoint / name, unfinished / name)
    shutil.rmtree(folder / str(step), ignore_errors=True)
    unfinished.rename(folder / str(step))
    for old in sorted(kept_steps(folder))[:-MOST_KEPT]:
        shutil.rmtree(folder / str(old), ignore_errors=True)


def kept_steps(folder: Path) -> list[int]:
    """The steps whose adapters are in the folder."""
    return [int(path.name) for path in folder.glob("*") if path.name.isdigit()]
