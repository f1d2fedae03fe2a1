"""What takes room and can be made again, or is over: found by our own marks, never by a guess.

Only what we made is looked at: a base with our provenance in it, exports and copies by the names that we give, what an
interruption left in our folders. No link is followed, neither to find nor to remove.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from adapters.backup import STATUSES_WITH_FILES
from adapters.bases import base_digest
from adapters.database import FILE
from adapters.database_errors import BUSY_SECONDS, sqlite_errors
from adapters.embedded import EMBEDDED, EMBEDDED_ID, MADE_BY, MAKER
from adapters.errors import HotshoeError
from adapters.merged_cache import FOLDER as MERGED
from adapters.staging import SUFFIX
from adapters.store import STAGING, TRASH
from adapters.upgrade import FOLDER as COPIES
from adapters.upgrade import copies_in

MERGE = re.compile(r"[0-9a-f]{32}", re.ASCII)
EXPORT = re.compile(r"export-[0-9a-f]{24}", re.ASCII)
ROTATED = re.compile(r"engine\.log[.-]\d{1,14}(\.gz)?", re.ASCII)
STAGED = re.compile(r"[0-9a-f]{32}|[0-9a-f]{64}-[0-9a-f]{8}", re.ASCII)  # of a publish, of a removal
FINAL = ("succeeded", "failed", "cancelled")


@dataclass(frozen=True, slots=True)
class Item:
    """One thing that may go, and why."""

    kind: str
    path: Path
    size_bytes: int
    reason: str

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path)}


@dataclass(frozen=True)
class Scope:
    """Where to look, and what counts as old. `now` is the wall clock's."""

    home: Path
    cache: Path
    now: float
    older_than_seconds: float
    bases: tuple[str, ...] = (EMBEDDED,)  # that are configured here, as `--base` names them
    is_alone: bool = False  # no server runs on `home`, and none can start: its left-overs are nobody's

    def is_old(self, at: float) -> bool:
        return self.now - at >= self.older_than_seconds


@dataclass
class Needed:
    """What the registry says: digests of bases that versions need, and for each folder of an export when the last of
    the orders that have it ended (None: not yet).
    """

    bases: set[str] = field(default_factory=set)
    exports: dict[str, float | None] = field(default_factory=dict)


def find(scope: Scope) -> list[Item]:
    """Everything that may go. Raises RegistryBusy or StorageDamaged where the registry cannot be read."""
    needed = _needed(scope.home)
    return [
        *_bases(scope, needed),
        *_merged(scope),
        *_exports(scope, needed),
        *_copies(scope),
        *_logs(scope),
        *(_left_overs(scope) if scope.is_alone else ()),
    ]


def remove(item: Item) -> str:
    """Remove it; returns what went wrong, empty where nothing did. A link that has taken its place stays."""
    try:
        if item.path.is_symlink():
            return "is a link now"
        if item.path.is_dir():
            shutil.rmtree(item.path)
        else:
            item.path.unlink(missing_ok=True)
    except OSError as error:
        return error.strerror or str(error)
    return ""


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a folder; links count for themselves."""
    if path.is_symlink() or not path.is_dir():
        return path.lstat().st_size
    return sum(size_of(one) for one in path.iterdir())


def folders_in(folder: Path) -> list[Path]:
    """The real folders in a real folder; nothing where that is a link or not there."""
    return [path for path in entries_in(folder) if is_real(path, stat.S_ISDIR)]


def entries_in(folder: Path) -> list[Path]:
    """What is in a real folder, by name; nothing where that is a link or not there."""
    return sorted(folder.iterdir()) if is_real(folder, stat.S_ISDIR) else []


def is_real(path: Path, kind: Any) -> bool:
    """It is there, of this kind, and no link."""
    try:
        return bool(kind(path.lstat().st_mode))
    except OSError:
        return False


def _needed(home: Path) -> Needed:
    """Read without opening the registry as its own: nothing is migrated, whatever schema it has."""
    found = Needed()
    path = home / FILE
    if not path.is_file():
        return found
    statuses = ", ".join(f"'{status}'" for status in STATUSES_WITH_FILES)
    with sqlite_errors(path):
        uri = f"{path.absolute().as_uri()}?mode=rw"  # a journal that a killed process left has to be played back first
        with closing(sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS)) as connection:
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            query = f"SELECT DISTINCT base_digest FROM versions WHERE status IN ({statuses})"  # noqa: S608 - our words
            found.bases |= {digest for (digest,) in connection.execute(query) if digest}
            if "bases" in tables:
                served = connection.execute("SELECT digest FROM bases WHERE is_served")
                found.bases |= {digest for (digest,) in served}
            columns = {column for _, column, *_ in connection.execute("PRAGMA table_info(exports)")}
            folder = "COALESCE(NULLIF(result, ''), id)" if "result" in columns else "id"
            query = f"SELECT {folder}, status, COALESCE(finished_at, created_at) FROM exports"  # noqa: S608 - our words
            for export, status, ended in connection.execute(query):
                others = found.exports.get(export, 0.0)
                is_over = status in FINAL and others is not None
                found.exports[export] = max(ended, others or 0.0) if is_over else None
    return found


def _bases(scope: Scope, needed: Needed) -> Iterator[Item]:
    """Bases that were made in the cache and that nothing here needs, and what an interrupted making left."""
    configured = {
        scope.cache / "bases" / EMBEDDED_ID if name == EMBEDDED else Path(name).absolute() for name in scope.bases
    }
    configured = {path.resolve() for path in configured}
    for folder in folders_in(scope.cache / "bases"):
        if folder.name.startswith(f".{EMBEDDED_ID}-"):
            if scope.is_old(folder.lstat().st_mtime) and not _is_locked(folder.parent / f".{EMBEDDED_ID}.lock"):
                yield Item("left-over", folder, size_of(folder), "a base that was not made to its end")
            continue
        mark = folder / MADE_BY
        if not _is_made_by_us(mark) or folder.resolve() in configured or not scope.is_old(mark.lstat().st_mtime):
            continue
        try:
            is_needed = base_digest(folder) in needed.bases
        except (HotshoeError, OSError, ValueError, KeyError):
            is_needed = False  # it is broken, and made anew when it is asked for
        if not is_needed:
            reason = "not the configured base, needed by no version, and not used for long; made again when asked for"
            yield Item("base", folder, size_of(folder), reason)


def _merged(scope: Scope) -> Iterator[Item]:
    """Bases with a version merged into them; a server that runs on one holds a lock on its folder."""
    for folder in folders_in(scope.cache / MERGED):
        if not scope.is_old(folder.lstat().st_mtime) or _is_locked(folder):
            continue
        if folder.name.startswith(".") and folder.name.endswith(SUFFIX):
            yield Item("left-over", folder, size_of(folder), "a merge that was cut off")
        elif MERGE.fullmatch(folder.name):
            yield Item("merged base", folder, size_of(folder), "not used for long; merged again when asked for")


def _is_made_by_us(mark: Path) -> bool:
    if not is_real(mark, stat.S_ISREG):
        return False
    try:
        return bool(json.loads(mark.read_bytes())["made_by"] == MAKER)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _exports(scope: Scope, needed: Needed) -> Iterator[Item]:
    root = scope.home / "exports"
    for folder in folders_in(root):
        if folder.name.startswith(".") and folder.name.endswith(SUFFIX):
            if scope.is_old(folder.lstat().st_mtime) and not _is_locked(folder):
                yield Item("left-over", folder, size_of(folder), "an export that was cut off")
        elif EXPORT.fullmatch(folder.name):
            ended = needed.exports.get(folder.name, folder.lstat().st_mtime)
            if ended is not None and scope.is_old(ended):
                yield Item("export", folder, size_of(folder), "ended long ago; the version can be exported again")


def _copies(scope: Scope) -> Iterator[Item]:
    """Copies of older schemas, but for the newest."""
    folder = scope.home / COPIES
    if not is_real(folder, stat.S_ISDIR):
        return
    found = [path for path in copies_in(folder) if is_real(path, stat.S_ISREG)]
    newest = max(found, key=lambda path: (path.lstat().st_mtime, path.name), default=None)
    for path in found:
        if path != newest and scope.is_old(path.lstat().st_mtime):
            yield Item("registry copy", path, size_of(path), "of before an upgrade, and a newer copy is there")


def _logs(scope: Scope) -> Iterator[Item]:
    for path in entries_in(scope.home):
        is_log = ROTATED.fullmatch(path.name) and is_real(path, stat.S_ISREG)
        if is_log and scope.is_old(path.lstat().st_mtime):
            yield Item("log", path, size_of(path), "the engine's, rotated")


def _left_overs(scope: Scope) -> Iterator[Item]:
    """What publishes, removals and uploads that were cut off left; the next start would sweep it too."""
    for folder in (scope.home / "blobs" / STAGING, scope.home / "blobs" / TRASH, scope.home / "files" / STAGING):
        for path in folders_in(folder):
            if STAGED.fullmatch(path.name) and scope.is_old(path.lstat().st_mtime):
                yield Item("left-over", path, size_of(path), "an upload or a removal that was cut off")


def _is_locked(path: Path) -> bool:
    """Somebody holds a lock on it now."""
    try:
        with _opened(path) as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield handle
    finally:
        os.close(handle)
