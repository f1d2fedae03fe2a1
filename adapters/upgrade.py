"""Before an older registry is migrated, a copy of it is put aside; a newer one is refused as it is.

The copies lie in `backups/` beside the registry, named by the schema they hold and the time. A kill at any moment
leaves either the old registry, with or without its copy, or the new one with it: the migration is one transaction.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path

from adapters.durable import sync
from adapters.errors import StateNewer
from adapters.snapshot import copy_database
from adapters.store import disk_errors

FOLDER = "backups"
KEPT = 3
COPY = re.compile(r"\d{4}-\d{8}T\d{6}Z(-\d+)?\.db", re.ASCII)
PARTIAL = ".db.partial"
SCHEMA = re.compile(r"\d{4}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Upgrade:
    """What was done to an older registry, and where its copy is."""

    from_schema: str
    to_schema: str
    backup: Path


def check_schema(found: str, known: str, path: Path) -> None:
    """Raises StateNewer for a schema that this release does not know."""
    if not SCHEMA.fullmatch(found) or found > known:
        raise StateNewer(
            f"{path} has schema {found[:40]}, and this release knows schemas up to {known}: a newer release wrote it. "
            "Nothing was changed. Start that release or a newer one, or restore a backup of this release's time into "
            "another folder (`hotshoe restore`)."
        )


def put_aside(registry: Path, schema: str) -> Path:
    """Copy the registry into `backups/`, durably, and let the oldest copies go; returns the copy's path.

    Raises RegistryBusy, StorageFull or StorageDamaged; the registry is not touched.
    """
    folder = registry.parent / FOLDER
    with disk_errors(folder):
        folder.mkdir(mode=0o700, exist_ok=True)
        for left in folder.glob(f".*{PARTIAL}"):
            left.unlink()
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    name = f"{schema}-{stamp}.db"
    copies = 1
    while (folder / name).exists():
        copies += 1
        name = f"{schema}-{stamp}-{copies}.db"
    staged, target = folder / f".{name}{PARTIAL}", folder / name
    copy_database(registry, staged)
    with disk_errors(target):
        staged.rename(target)
        sync(folder)
        sync(registry.parent)
        for old in sorted((path for path in copies_in(folder) if path != target), reverse=True)[KEPT - 1 :]:
            old.unlink()
    return target


def copies_in(folder: Path) -> list[Path]:
    """The copies that were put aside here; nothing else that lies there."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if COPY.fullmatch(path.name) and path.is_file())
