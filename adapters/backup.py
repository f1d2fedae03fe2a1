"""A copy of a state folder, taken while a server may be writing it, from which `adapters/restore.py` makes a new one.

First the registry is copied, as it is at one moment; then every file that a row of the copy needs. Blobs and files
never change, but they go when their last row does. So when one that is needed has gone meanwhile, the registry is
copied again: the new copy no longer needs it. A backup is whole once its manifest is there, which is written last.

Left out are exports (they can be made again), parts of uploads that are not complete (their rows say so), and logs.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from adapters.canonical import CANONICAL_FILES, digest_folder
from adapters.database import FILE, HEAD
from adapters.database_errors import sqlite_errors
from adapters.durable import sync
from adapters.errors import AlreadyRunning, Conflict, InvalidRequest, OutputExists, StorageDamaged
from adapters.file_store import CHUNK_BYTES, FileStore, digest_of
from adapters.keys import PEPPER_FILE
from adapters.snapshot import copy_database
from adapters.staging import json_bytes, staging
from adapters.store import BlobStore, disk_errors
from adapters.upgrade import check_schema

MANIFEST, MADE_BY, FORMAT = "backup.json", "hotshoe backup", 1
BLOBS, FILES, ATTEMPTS = "blobs", "files", 50
STATUSES_WITH_FILES = ("quarantined", "ready", "export_only")
NEW_REGISTRY = ".registry.partial"


@dataclass(frozen=True, slots=True)
class Needs:
    """What the rows of one copy of a registry refer to: digests of blobs, and the digest of each file by its id."""

    schema: str
    blobs: frozenset[str]
    files: dict[str, str]


@dataclass
class Backup:
    """What a backup holds: the manifest, read or about to be written."""

    schema: str
    at: float  # seconds since the epoch
    registry: str  # name of its file, which has its digest in it
    registry_digest: str
    blobs: list[str]
    files: dict[str, str]
    has_pepper: bool
    damaged: list[str] = field(default_factory=list)  # what was damaged or missing when it was made

    def as_json(self) -> bytes:
        return json_bytes({"made_by": MADE_BY, "format": FORMAT, **asdict(self)})


@dataclass(frozen=True, slots=True)
class Made:
    """One backup that was made: where, what it holds, and how much of it had to be copied now."""

    path: Path
    backup: Backup
    copied: int
    copied_bytes: int

    def as_dict(self) -> dict[str, Any]:
        backup = asdict(self.backup) | {"blobs": len(self.backup.blobs), "files": len(self.backup.files)}
        return {"path": str(self.path), **backup, "copied": self.copied, "copied_bytes": self.copied_bytes}


def back_up(home: Path, out: Path, *, with_pepper: bool = True) -> Made:
    """Copy the state in `home` to the folder `out`, or to one file when it is called `*.tar`.

    A folder may hold an earlier backup: what it has is not copied again, and what is no longer needed goes. Raises
    InvalidRequest, OutputExists, AlreadyRunning, StateNewer, RegistryBusy, StorageFull, StorageDamaged.
    """
    home, out = home.absolute(), out.absolute()
    if not (home / FILE).is_file():
        raise InvalidRequest(f"{home} holds no state: there is no {FILE} in it. Check HOTSHOE_HOME.", param="home")
    if home.resolve() == out.resolve() or home.resolve() in out.resolve().parents:
        raise InvalidRequest(f"{out} lies in the state folder itself: choose a place outside of it.", param="out")
    if out.suffix == ".tar":
        return _as_tar(home, out, with_pepper)
    _check_place(out)
    with disk_errors(out):
        out.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _alone(out):
        return _Copying(home, out).run(with_pepper)


def read_manifest(folder: Path) -> Backup:
    """The manifest of a backup; raises InvalidRequest for what is none, StateNewer for a newer release's."""
    try:
        found = json.loads((folder / MANIFEST).read_bytes())
        made_by, form = found.pop("made_by"), found.pop("format")
        backup = Backup(**found)
        names = [backup.registry, *backup.files, *(digest.removeprefix("sha256:") for digest in backup.blobs)]
        if made_by != MADE_BY or any(Path(name).name != name or name.startswith(".") for name in names):
            raise ValueError(made_by)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidRequest(f"{folder} is no backup, or one that was cut off: it has no whole {MANIFEST}.") from error
    if form != FORMAT:
        raise InvalidRequest(f"{folder} is a backup of format {form}; this release reads format {FORMAT}.")
    check_schema(backup.schema, HEAD, folder / backup.registry)
    return backup


class _Copying:
    def __init__(self, home: Path, out: Path) -> None:
        self.home, self.out = home, out
        self.blobs, self.files = BlobStore(out / BLOBS), FileStore(out / FILES)
        self.source_blobs, self.source_files = home / BLOBS, home / FILES
        self.copied = self.copied_bytes = 0
        self.damaged: dict[str, str] = {}

    def run(self, with_pepper: bool) -> Made:
        missing: set[str] | None = None
        for _ in range(ATTEMPTS):
            needs = self._snapshot()
            self.damaged = {}
            gone = self._copy(needs)
            if not gone or gone == missing:  # the newest rows still need it: it is not coming back
                break
            missing = gone
        else:
            raise Conflict(f"Files went faster than they could be copied, {ATTEMPTS} times: try again.")
        self.damaged |= dict.fromkeys(gone, "is not there")
        return self._finish(needs, with_pepper)

    def _snapshot(self) -> Needs:
        staged = self.out / NEW_REGISTRY
        staged.unlink(missing_ok=True)
        copy_database(self.home / FILE, staged)
        with sqlite_errors(staged), closing(sqlite3.connect(staged)) as connection:
            return _prepared(connection, staged)

    def _copy(self, needs: Needs) -> set[str]:
        """Copy what is not here yet; what is not there is returned, what is damaged is noted."""
        gone: set[str] = set()
        for digest in sorted(needs.blobs):
            with self._noting(digest, gone):
                self._copy_blob(digest)
        for file_id, digest in sorted(needs.files.items()):
            with self._noting(file_id, gone):
                self._copy_file(file_id, digest)
        return gone

    @contextmanager
    def _noting(self, name: str, gone: set[str]) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            gone.add(name)
        except StorageDamaged as error:
            self.damaged[name] = error.message

    def _copy_blob(self, digest: str) -> None:
        if self.blobs.has(digest):
            return
        staged = self.blobs.stage()
        try:
            for name in CANONICAL_FILES:
                self._copy_bytes(self.source_blobs / digest.removeprefix("sha256:") / name, staged / name)
            found = digest_folder(staged)
            if found != digest:
                raise StorageDamaged(f"blob {digest} has changed on the disk: its bytes are {found}.")
            self.blobs.publish(staged, digest)
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    def _copy_file(self, file_id: str, digest: str) -> None:
        if self.files.path(file_id).is_file():
            return
        folder = self.files.stage()
        try:
            staged = folder / file_id
            self._copy_bytes(self.source_files / file_id, staged)
            self.files.verify(staged, digest)
            self.files.seal(staged)
            self.files.keep(staged, self.files.path(file_id))
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _copy_bytes(self, source: Path, target: Path) -> None:
        """Raises FileNotFoundError when the source is not there; one that goes while it is read is read to its end."""
        with source.open("rb") as reader, disk_errors(target), target.open("xb") as writer:
            shutil.copyfileobj(reader, writer, CHUNK_BYTES)
        self.copied += 1
        self.copied_bytes += target.stat().st_size

    def _finish(self, needs: Needs, with_pepper: bool) -> Made:
        """Give the registry its name, write the manifest, let go what only an earlier backup needs."""
        staged = self.out / NEW_REGISTRY
        digest = digest_of(staged)
        name = f"registry-{digest.removeprefix('sha256:')[:16]}.sqlite3"
        pepper, kept = self.home / PEPPER_FILE, self.out / PEPPER_FILE
        backup = Backup(
            schema=needs.schema,
            at=time.time(),
            registry=name,
            registry_digest=digest,
            blobs=sorted(needs.blobs - set(self.damaged)),
            files={key: value for key, value in sorted(needs.files.items()) if key not in self.damaged},
            has_pepper=with_pepper and pepper.is_file(),
            damaged=sorted(f"{name}: {why}" for name, why in self.damaged.items()),
        )
        with disk_errors(self.out):
            sync(staged)
            staged.rename(self.out / name)
            if backup.has_pepper:
                _place(self.out, PEPPER_FILE, pepper.read_bytes())
            _place(self.out, MANIFEST, backup.as_json())
            if not backup.has_pepper:
                kept.unlink(missing_ok=True)
            for old in self.out.glob("registry-*.sqlite3"):
                if old.name != name:
                    old.unlink()
            self.blobs.sweep(needs.blobs)
            self.files.sweep(needs.files, ())
        return Made(self.out, backup, self.copied, self.copied_bytes)


def _prepared(connection: sqlite3.Connection, path: Path) -> Needs:
    """Make the copy stand on its own, whatever schema it has, and say what its rows need."""
    connection.execute("PRAGMA journal_mode=MEMORY")  # a journal left beside it would be played into the next copy
    row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    schema = str(row[0]) if row else ""
    check_schema(schema, HEAD, path)
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    statuses = ", ".join(f"'{status}'" for status in STATUSES_WITH_FILES)
    query = f"SELECT digest FROM versions WHERE digest IS NOT NULL AND status IN ({statuses})"  # noqa: S608 - our words
    blobs = frozenset(digest for (digest,) in connection.execute(query))
    files = dict(connection.execute("SELECT id, digest FROM files").fetchall()) if "files" in tables else {}
    if "upload_parts" in tables:
        connection.execute("DELETE FROM upload_parts")
        connection.execute("UPDATE uploads SET status = 'expired' WHERE status = 'pending'")
        connection.commit()
    return Needs(schema, blobs, files)


def _check_place(out: Path) -> None:
    """Raises OutputExists for a folder that holds anything but a backup, whole or cut off."""
    known = {MANIFEST, PEPPER_FILE, BLOBS, FILES, NEW_REGISTRY}
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise OutputExists(f"{out} is there and is no folder: choose another place, or a name that ends in .tar.")
    for path in out.iterdir() if out.is_dir() else ():
        is_ours = path.name in known or path.name.startswith(("registry-", f".{MANIFEST}.", f".{PEPPER_FILE}."))
        if not is_ours or path.is_symlink():
            raise OutputExists(f"{out} holds {path.name}, which is of no backup: choose an empty folder.", param="out")


def _as_tar(home: Path, out: Path, with_pepper: bool) -> Made:
    import tarfile

    if out.exists() or out.is_symlink():
        raise OutputExists(f"{out} exists: choose another name, or a folder, which can be brought up to date.")
    with staging(out) as folder:
        made = _Copying(home, folder / "backup").run(with_pepper)
        whole = folder / "whole.tar"
        with disk_errors(out):
            with tarfile.open(whole, "x", format=tarfile.PAX_FORMAT) as archive:
                for path in sorted((folder / "backup").rglob("*")):
                    if path.is_file():
                        archive.add(path, str(path.relative_to(folder / "backup")), recursive=False)
            whole.chmod(0o600)
            sync(whole)
            out.hardlink_to(whole)  # never over what appeared there meanwhile
            sync(out.parent)
    return Made(out, made.backup, made.copied, made.copied_bytes)


def _place(folder: Path, name: str, content: bytes) -> None:
    """Write a private file durably, in one step."""
    staged = folder / f".{name}.partial"
    staged.unlink(missing_ok=True)
    staged.touch(mode=0o600)
    staged.write_bytes(content)
    sync(staged)
    staged.rename(folder / name)
    sync(folder)


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    handle = os.open(out, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise AlreadyRunning(
            f"Another backup is being written to {out}: wait for it, or choose another place."
        ) from None
    finally:
        os.close(handle)
