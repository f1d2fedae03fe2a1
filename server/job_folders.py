"""The folders of fine-tuning jobs: what they work in, and the adapters of their checkpoints, which stay for a while."""

from __future__ import annotations

import os
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adapters.errors import Conflict
from adapters.job_history import JobCheckpoint
from training.jobs import KEPT_FOLDER
from training.kept import drop, kept_steps

if TYPE_CHECKING:
    from adapters.job_rows import JobRow
    from adapters.registry import Registry


@dataclass(frozen=True)
class JobFolders:
    """One folder a job, below `root`. `checkpoint_seconds` is how long checkpoints stay when their job has ended."""

    root: Path
    registry: Registry
    checkpoint_seconds: float

    def of(self, job_id: str) -> Path:
        return self.root / job_id

    def checkpoint(self, checkpoint: JobCheckpoint) -> Path:
        """Where its adapter lies; raises Conflict where it is gone."""
        folder = self.of(checkpoint.job_id) / KEPT_FOLDER / str(checkpoint.step)
        if not checkpoint.is_kept or not folder.is_dir():
            raise self.gone(checkpoint)
        return folder

    def gone(self, checkpoint: JobCheckpoint) -> Conflict:
        return Conflict(
            f"The files of checkpoint {checkpoint.id} are gone: the newest of a job are kept, and "
            f"{self.checkpoint_seconds / 86_400:g} days after it has ended none.",
            param="checkpoint_id",
        )

    def drop(self, checkpoint: JobCheckpoint) -> None:
        """Remove a checkpoint's files."""
        drop(self.checkpoint(checkpoint).parent, checkpoint.step)
        self._note(checkpoint.job_id)

    def sweep(self) -> None:
        """Remove what no job needs any more."""
        folders = list(self.root.glob("*"))
        jobs = {job.id: job for job in self.registry.jobs_of(folder.name for folder in folders)} if folders else {}
        for folder in folders:
            job = jobs.get(folder.name)
            if job is None:
                shutil.rmtree(folder, ignore_errors=True)
            elif job.status.is_final:
                self._clear(folder, job)

    def _clear(self, folder: Path, job: JobRow) -> None:
        """Of an ended job only its checkpoints stay, while their time is not over."""
        kept = folder / KEPT_FOLDER
        is_over = time.time() - (job.finished_at or 0.0) > self.checkpoint_seconds
        if is_over or not kept_steps(kept):
            shutil.rmtree(folder, ignore_errors=True)
            self._note(job.id)
        elif left := [path for path in folder.iterdir() if path != kept]:
            for path in left:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
            self._note(job.id)

    def _note(self, job_id: str) -> None:
        folder = self.of(job_id)
        self.registry.note_kept(job_id, kept_steps(folder / KEPT_FOLDER), folder_bytes(folder))


def folder_bytes(folder: Path) -> int:
    """What a folder takes on the disk; a file with several names counts once."""
    found: dict[tuple[int, int], int] = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # it has just been removed
                status = (Path(parent) / name).lstat()
                found[status.st_dev, status.st_ino] = status.st_size
    return sum(found.values())
