"""An output folder that appears whole or not at all: written beside its place under a lock, then renamed into it."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adapters.errors import AlreadyRunning, ConfigInvalid, OutputExists


def staging_folder(out: Path) -> Path:
    """Where the run that writes `out` keeps its files meanwhile: always the same place, so that it is found again."""
    return out.parent / f".{out.name}.partial"


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A fresh folder that becomes `out` when the block ends, and is removed when it raises.

    Raises OutputExists when there is something at `out`, AlreadyRunning when another run is writing it.
    """
    out = out.absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputExists(f"{out} exists: choose another --out, or remove it.", param="out")
    staging = staging_folder(out)
    lock_path = staging.with_suffix(".lock")
    lock = _locked(lock_path, out)
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        try:
            yield staging
            _settle(staging, out)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
            lock_path.unlink(missing_ok=True)
    finally:
        os.close(lock)


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


def _settle(staging: Path, out: Path) -> None:
    for path in staging.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    if out.is_dir():
        out.rmdir()
    staging.rename(out)
    parent = os.open(out.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)
