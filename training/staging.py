"""An output folder that appears whole or not at all: made beside its place under a lock, then renamed into it.

Beside the result lie the run's checkpoints, which outlive a run that was cut off, so that `--resume` goes on from them.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from adapters.durable import sync
from adapters.errors import AlreadyRunning, ConfigInvalid, OutputExists, TrainingStopped
from training.checkpoints import last_complete


@dataclass(frozen=True)
class Staging:
    """Where a run works meanwhile: always the same place for one output, so that it is found again."""

    root: Path

    @property
    def result(self) -> Path:
        """What becomes the output folder."""
        return self.root / "result"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def identity(self) -> Path:
        """The file that says which run this is."""
        return self.root / "run.json"


def staging_folder(out: Path) -> Path:
    """The folder in which the run that writes `out` works."""
    return out.parent / f".{out.name}.partial"


@contextmanager
def staged(out: Path, *, resume: bool = False) -> Iterator[Staging]:
    """A folder whose `result` becomes `out` when the block ends. With `resume` an earlier run's checkpoints are there.

    When the block raises, what can be gone on with stays: a folder with a complete checkpoint, unless the run diverged
    (TrainingStopped). Everything else goes.

    Raises OutputExists when there is something at `out` or a run to go on with, AlreadyRunning when another run is
    writing it, ConfigInvalid when there is nothing to resume.
    """
    out = out.absolute()
    staging = Staging(staging_folder(out))
    _check_place(out, resume)
    with lock_run(out):
        _check_left(staging, out, resume)
        if not resume:
            shutil.rmtree(staging.root, ignore_errors=True)
        staging.checkpoints.mkdir(parents=True, exist_ok=True)
        staging.result.mkdir(exist_ok=True)
        try:
            yield staging
            _settle(staging.result, out)
        except BaseException as error:
            if isinstance(error, TrainingStopped) or last_complete(staging.checkpoints) is None:
                shutil.rmtree(staging.root, ignore_errors=True)
            raise
        else:
            shutil.rmtree(staging.root, ignore_errors=True)


@contextmanager
def lock_run(out: Path) -> Iterator[None]:
    """Hold the run that writes `out`; raises AlreadyRunning when somebody else does, ConfigInvalid for no place."""
    path = staging_folder(out).with_suffix(".lock")
    lock = _locked(path, out)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(lock)


def _check_place(out: Path, resume: bool) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if resume:
            raise OutputExists(f"{out} is there and whole: there is nothing to resume.", param="out")
        raise OutputExists(f"{out} exists: choose another --out, or remove it.", param="out")


def _check_left(staging: Staging, out: Path, resume: bool) -> None:
    """What an earlier run left must fit what is asked for."""
    last = last_complete(staging.checkpoints)
    if resume and not staging.root.exists():
        raise ConfigInvalid(f"There is nothing to resume: no run into {out} was cut off.", param="resume")
    if resume and last is None:
        raise ConfigInvalid(
            f"There is nothing to resume: the run into {out} was cut off before its first checkpoint was whole. "
            "Start it again without --resume.",
            param="resume",
        )
    if not resume and last is not None:
        raise OutputExists(
            f"A run into {out} was cut off after step {last.step}: go on with it by --resume, or remove {staging.root} "
            "to begin again.",
            param="out",
        )


def _locked(path: Path, out: Path) -> int:
    """An exclusive lock on the file at `path`. A run that ends unlinks it, so it must be the file that is there now."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigInvalid(f"{out.parent} cannot be written to: {error.strerror}.", param="out") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_there = path.exists() and os.path.samestat(path.stat(), os.fstat(lock))
    except OSError:
        is_there = False
    if not is_there:
        os.close(lock)
        raise AlreadyRunning(f"Another run is writing {out}: wait for it, or choose another --out.")
    return lock


def _settle(result: Path, out: Path) -> None:
    for path in result.rglob("*"):
        if path.is_file():
            sync(path)
    if out.is_dir():
        out.rmdir()
    result.rename(out)
    sync(out.parent)
