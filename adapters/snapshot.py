"""A consistent copy of a SQLite file that others may be writing, on the disk when the call returns."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path

from adapters.database_errors import BUSY_SECONDS, sqlite_errors
from adapters.durable import sync
from adapters.store import disk_errors


def copy_database(source: Path, target: Path) -> None:
    """Copy by SQLite's own backup call, which holds writers off for its duration; `target` must not exist.

    It is private (0600), and its folder is not synced: who gives it its name does that. Raises RegistryBusy,
    StorageFull or StorageDamaged, and leaves nothing then.
    """
    with sqlite_errors(source), disk_errors(target):
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        try:
            with (
                closing(
                    sqlite3.connect(f"{source.absolute().as_uri()}?mode=rw", uri=True, timeout=BUSY_SECONDS)
                ) as one,
                closing(sqlite3.connect(target, isolation_level=None)) as other,
            ):
                other.execute("PRAGMA journal_mode=OFF")  # what is cut off is thrown away, not repaired
                other.execute("PRAGMA synchronous=OFF")
                one.backup(other)
            sync(target)
        except BaseException:
            target.unlink(missing_ok=True)
            raise
