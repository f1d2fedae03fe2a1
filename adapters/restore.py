"""A new state folder from a backup: every byte checked against its digest, the registry last.

While it is made the folder holds a marker, so that one that was cut off is never taken for a state: no registry is made
in it, and the same restore begins again.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from adapters.backup import BLOBS, FILES, Backup, read_manifest
from adapters.canonical import CANONICAL_FILES, digest_folder
from adapters.database import FILE
from adapters.doctor import Report, run_doctor
from adapters.durable import sync, write_file
from adapters.errors import InvalidRequest, OutputExists, StorageDamaged
from adapters.file_store import FileStore, digest_of
from adapters.keys import PEPPER_FILE
from adapters.registry import RESTORING
from adapters.store import BlobStore, disk_errors

LOCK = "lock"  # whoever holds the folder has it there
PARTIAL = f".{FILE}.partial"
OURS = {RESTORING, BLOBS, FILES, PEPPER_FILE, PARTIAL, FILE}


@dataclass(frozen=True, slots=True)
class Restored:
    """What was put back, and how the doctor finds it."""

    backup: Backup
    report: Report


def restore(source: Path, home: Path) -> Restored:
    """Make `home`, which must be empty or not there, the state that a backup holds. Its caller holds the folder's lock.

    Raises InvalidRequest for what is no backup, OutputExists, StateNewer, StorageDamaged with what is damaged,
    StorageFull; `home` is then empty.
    """
    with disk_errors(home):
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_empty(home)
    with _opened(source, home) as folder:
        backup = read_manifest(folder)
        try:
            with disk_errors(home):
                _fill(folder, backup, home)
        except BaseException:
            _empty(home)
            raise
    return Restored(backup, run_doctor(home))


def _fill(folder: Path, backup: Backup, home: Path) -> None:
    _empty(home)
    write_file(home / RESTORING, b"")
    sync(home)
    blobs, files = BlobStore(home / BLOBS), FileStore(home / FILES)
    damaged = [name for name in backup.blobs if not _put_blob(folder / BLOBS, name, blobs)]
    damaged += [name for name, digest in backup.files.items() if not _put_file(folder / FILES / name, digest, files)]
    if not _put_registry(folder / backup.registry, backup.registry_digest, home):
        damaged.append(backup.registry)
    if damaged:
        more = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
        raise StorageDamaged(
            f"The backup is damaged: {damaged[0]}{more} is missing, or is not what its digest says. "
            "Nothing was restored."
        )
    if backup.has_pepper:
        shutil.copyfile(folder / PEPPER_FILE, home / PEPPER_FILE)
        (home / PEPPER_FILE).chmod(0o600)
        sync(home / PEPPER_FILE)
    (home / PARTIAL).rename(home / FILE)
    sync(home)
    (home / RESTORING).unlink()
    sync(home)


def _put_blob(source: Path, digest: str, store: BlobStore) -> bool:
    staged = store.stage()
    try:
        for name in CANONICAL_FILES:
            path = source / digest.removeprefix("sha256:") / name
            if not path.is_file():
                return False
            shutil.copyfile(path, staged / name)
        if digest_folder(staged) != digest:
            return False
        store.publish(staged, digest)
        return True
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _put_file(source: Path, digest: str, store: FileStore) -> bool:
    folder = store.stage()
    try:
        staged = folder / source.name
        if not source.is_file():
            return False
        shutil.copyfile(source, staged)
        if digest_of(staged) != digest:
            return False
        store.seal(staged)
        store.keep(staged, store.path(source.name))
        return True
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _put_registry(source: Path, digest: str, home: Path) -> bool:
    if not source.is_file():
        return False
    shutil.copyfile(source, home / PARTIAL)
    (home / PARTIAL).chmod(0o600)
    sync(home / PARTIAL)
    return digest_of(home / PARTIAL) == digest


def _check_empty(home: Path) -> None:
    """Raises OutputExists unless the folder is empty, or holds only what a restore that was cut off left there."""
    found = {path.name for path in home.iterdir()} - {LOCK}
    if found and not (RESTORING in found and found <= OURS):
        raise OutputExists(
            f"{home} holds {sorted(found)[0]}: a backup is restored into an empty folder only. Choose another --home.",
            param="home",
        )


def _empty(home: Path) -> None:
    """Take away what a restore has made so far; the marker last, so that it can be begun again."""
    for name in sorted(OURS - {RESTORING}):
        path = home / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    (home / RESTORING).unlink(missing_ok=True)


@contextmanager
def _opened(source: Path, home: Path) -> Iterator[Path]:
    """The backup as a folder; a tar is unpacked beside the new state, which has the room for it anyway."""
    import tarfile

    if source.is_dir():
        yield source
        return
    if not source.is_file():
        raise InvalidRequest(f"{source} is no backup: there is nothing at that place.", param="from")
    with tempfile.TemporaryDirectory(prefix=".hotshoe-restore-", dir=home.absolute().parent) as scratch:
        try:
            with tarfile.open(source, "r:") as archive, disk_errors(Path(scratch)):
                archive.extractall(scratch, filter="data")
        except tarfile.TarError as error:
            raise InvalidRequest(
                f"{source} is no backup: it cannot be read as a tar ({error}).", param="from"
            ) from error
        yield Path(scratch)
