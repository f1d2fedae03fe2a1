"""Checkpoints that nobody goes on from: of finished runs all, of others all but those that `--resume` needs.

A run's folder is known by what is in it: its name `.OUT.partial`, `run.json`, and `checkpoints`. Whatever else lies
beside runs, checkpoints of other trainers too, is not looked at, and no link is followed.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adapters.errors import AlreadyRunning, ConfigInvalid
from adapters.prune import Item, is_real, size_of
from training.checkpoints import checkpoint_folders, last_sound
from training.staging import Staging, lock_run

PARTIAL = ".partial"


def find_checkpoints(runs: Path, now: float, older_than_seconds: float) -> Iterator[Item]:
    """What may go under `runs`: remove each as it comes, while its run is held.

    A run that goes on just now is passed over; raises ConfigInvalid for no folder.
    """
    root = runs.resolve()
    if not root.is_dir():
        raise ConfigInvalid(f"{runs} is no folder: name the one that runs were written into.", param="runs")
    for here, folders, _ in os.walk(root):
        for name in sorted(folders):
            staging = Staging(Path(here) / name)
            if _is_run(staging):
                folders.remove(name)
                with _held(staging) as is_ours:
                    for item in _of_run(staging) if is_ours else ():
                        if now - _changed_at(item.path) >= older_than_seconds:
                            yield item


def _is_run(staging: Staging) -> bool:
    name = staging.root.name
    return (
        name.startswith(".")
        and name.endswith(PARTIAL)
        and is_real(staging.root, stat.S_ISDIR)
        and is_real(staging.identity, stat.S_ISREG)
        and is_real(staging.checkpoints, stat.S_ISDIR)
    )


def _changed_at(folder: Path) -> float:
    """When something was last made or removed in the folder, or right below it."""
    return max(path.lstat().st_mtime for path in (folder, *folder.iterdir()))


def _of_run(staging: Staging) -> Iterator[Item]:
    out, folders = out_of(staging), checkpoint_folders(staging.checkpoints)
    if any(folder.is_symlink() for _, folder in folders):
        return  # somebody's own arrangement, or worse
    if out.is_dir() and any(out.iterdir()):
        yield Item("run", staging.root, size_of(staging.root), f"the run is finished: {out.name} is whole")
        return
    last = last_sound(staging.checkpoints)
    if last is None:
        yield Item("run", staging.root, size_of(staging.root), "cut off before its first checkpoint: nothing to resume")
        return
    needed = {last.step, last.state.get("best_global_step")}
    for step, folder in folders:
        if step not in needed:
            reason = f"--resume goes on from step {last.step}"
            yield Item("checkpoint", folder, size_of(folder), reason)


def out_of(staging: Staging) -> Path:
    """The folder that the run was to make."""
    return staging.root.with_name(staging.root.name.removeprefix(".").removesuffix(PARTIAL))


@contextmanager
def _held(staging: Staging) -> Iterator[bool]:
    """Whether nobody writes the run; nobody begins to while the block runs."""
    try:
        with lock_run(out_of(staging)):
            yield True
    except (AlreadyRunning, ConfigInvalid):
        yield False
