"""What an error of the database means to a caller, said in one place for SQLAlchemy's calls and for SQLite's own."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy.exc import DatabaseError, DBAPIError, OperationalError

from adapters.errors import HotshoeError, RegistryBusy, StorageDamaged, StorageFull

BUSY_SECONDS = 4  # so that whoever waits for the lock is told within five
RETRY_SECONDS = 1


@contextmanager
def database_errors(path: Path) -> Iterator[None]:
    """Translate the driver's errors in one place; our own pass through."""
    try:
        yield
    except DBAPIError as error:
        raise _translated(error, str(error.orig), path) from error


@contextmanager
def sqlite_errors(path: Path) -> Iterator[None]:
    """The same around SQLite's own calls."""
    try:
        yield
    except sqlite3.Error as error:
        raise _translated(error, str(error), path) from error


def _is_full(path: Path) -> bool:
    """SQLite says only that it could not open or sync its journal; the file system says whether it has room."""
    try:
        left = os.statvfs(path.parent)
    except OSError:
        return False
    return left.f_bavail == 0 or (left.f_files > 0 and left.f_favail == 0)


def _translated(error: DBAPIError | sqlite3.Error, message: str, path: Path) -> HotshoeError:
    is_operational = isinstance(error, OperationalError | sqlite3.OperationalError)
    if is_operational and ("locked" in message or "busy" in message):
        return RegistryBusy(
            "The registry is locked by another program, and was not free in time: try again.", retry_after=RETRY_SECONDS
        )
    is_vague = "unable to open" in message or "disk I/O error" in message
    if "full" in message or (is_vague and _is_full(path)):
        return StorageFull(f"No space is left for {path}: free some and retry.", retry_after=30)
    if isinstance(error, DatabaseError | sqlite3.DatabaseError):
        return StorageDamaged(f"The registry {path} cannot be used: {message}. Run `hotshoe doctor`.")
    raise error
