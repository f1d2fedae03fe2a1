"""The adapters of a run's newest checkpoints, kept aside from what the run itself goes on from."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from training.saving import CONFIG_FILE, WEIGHTS_FILE

MOST_KEPT = 3  # checkpoints, the newest
UNFINISHED, LEAVING = "unfinished", "leaving"


def keep(checkpoint: Path, folder: Path, step: int) -> None:
    """Link a checkpoint's adapter aside, whole or not at all; the oldest of more than a few go."""
    unfinished = folder / UNFINISHED
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        os.link(checkpoint / name, unfinished / name)
    drop(folder, step)
    unfinished.rename(folder / str(step))
    for old in sorted(kept_steps(folder))[:-MOST_KEPT]:
        drop(folder, old)


def drop(folder: Path, step: int) -> None:
    """Remove the adapter of a step, whole or not at all."""
    leaving = folder / f"{LEAVING}-{os.getpid()}"  # the server and a run may both remove
    shutil.rmtree(leaving, ignore_errors=True)
    with suppress(FileNotFoundError):
        (folder / str(step)).rename(leaving)
    shutil.rmtree(leaving, ignore_errors=True)


def kept_steps(folder: Path) -> list[int]:
    """The steps whose adapters are in the folder."""
    return [int(path.name) for path in folder.glob("*") if path.name.isdigit()]
