"""Bases with one version merged into them, in the cache: made once, proven, found again by what they are made of.

A folder's name is the digest of its inputs (`ExportRequest.inputs`). It appears whole, by one rename at the end of an
export in a process of its own, whose read-back has held every weight to `W + scaling * B @ A`. Whoever finds it again
holds every file to the digests of its manifest. A lock on the folder keeps it while a server runs on it; of those that
nobody runs on, the KEPT that were used last stay.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adapters import errors
from adapters.child import child_environment
from adapters.durable import sync
from adapters.errors import HotshoeError, MergeFailed, StorageDamaged
from adapters.export_files import MANIFEST
from adapters.export_request import ExportRequest, spec_of
from adapters.staging import SUFFIX, explained, sha256

FOLDER = "merged"  # below the cache folder
KEPT = 2
KEY_DIGITS = 32
Tell = Callable[[Mapping[str, Any]], None]


@dataclass
class MergedFolder:
    """A merged base that stays in the cache until it is released, or this process ends."""

    path: Path
    _handle: int

    def release(self) -> None:
        """Let the folder go when room is needed. May be called twice."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


def find_or_make(cache: Path, request: ExportRequest, tell: Tell = lambda _: None) -> MergedFolder:
    """The merged base of a request, whose `out` is not looked at; one that is there is checked and not made again.

    `tell` gets the export's progress. Raises what the export raises, StorageFull for a disk that is full, and
    HotshoeError for a cache that cannot be written.
    """
    root = cache / FOLDER
    path = root / request.inputs[:KEY_DIGITS]
    found = _take(path)
    if found is not None:
        return found
    try:
        root.mkdir(parents=True, exist_ok=True)
        with (root / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another server may be making the very folder
            found = _take(path)
            if found is None:
                _set_aside(path)
                _export(replace(request, out=path), tell)
                found = _take(path)
            if found is None:
                raise StorageDamaged(f"{path} was made and does not read back as it was written: look at its disk.")
            _make_room(root)
            return found
    except OSError as error:
        raise explained(error) from error


def _take(path: Path) -> MergedFolder | None:
    """Hold the folder and check every file of it; None where it is not there, on its way out, or damaged."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None
    folder = MergedFolder(path, handle)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        if path.stat().st_ino == os.fstat(handle).st_ino and _is_whole(path):
            with suppress(OSError):  # a cache that may only be read
                os.utime(path)  # when it was last used
            return folder
    except OSError:  # another process removes it
        pass
    folder.release()
    return None


def _is_whole(path: Path) -> bool:
    """Every file has the digest that its manifest gives, and no file is missing."""
    try:
        files = json.loads((path / MANIFEST).read_bytes())["files"]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            found = list(pool.map(lambda name: sha256(path / name), files))
        return bool(files) and found == [entry["sha256"] for entry in files.values()]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _set_aside(path: Path) -> None:
    """Free the place of a damaged folder. Its new name is one that the next export beside it sweeps."""
    with suppress(FileNotFoundError):
        path.rename(path.with_name(f".{path.name}.{secrets.token_hex(6)}{SUFFIX}"))
        sync(path.parent)


def _make_room(root: Path) -> None:
    """Remove the folders that nobody holds, but for the KEPT that were used last."""
    folders = sorted((path for path in root.iterdir() if path.name[0] != "."), key=lambda path: -path.stat().st_mtime)
    for path in [path for path in folders if not _is_held(path)][KEPT:]:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with suppress(BlockingIOError):  # somebody has just taken it
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(handle)


def _is_held(path: Path) -> bool:
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def _export(request: ExportRequest, tell: Tell) -> None:
    """The export in a process of its own, which torch is loaded in; it ends with this one."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as order, tempfile.TemporaryFile() as complaints:
        json.dump(spec_of(request), order)
        order.flush()
        with subprocess.Popen(
            [sys.executable, "-m", "adapters.export", order.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            text=True,
            env=child_environment(),
            start_new_session=True,  # closing its stdin, as leaving this block does, ends it with its group
        ) as child:
            last = _follow(child, tell)
        if "result" not in last:
            complaints.seek(0)
            raise _failure(last, child.returncode, complaints.read().decode(errors="replace"))


def _follow(child: subprocess.Popen[str], tell: Tell) -> dict[str, Any]:
    """What the process said last."""
    last: dict[str, Any] = {}
    for line in child.stdout or ():
        last = json.loads(line)
        if last["stage"] in ("result", "error"):
            return last
        tell(last)
    return last


def _failure(last: Mapping[str, Any], code: int | None, complaints: str) -> HotshoeError:
    if "error" not in last:
        said = (complaints.strip().splitlines() or ["it said nothing"])[-1]
        return MergeFailed(f"The merge's process ended with status {code}: {said}")
    error = last["error"]
    kinds = {
        kind.code: kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, HotshoeError)
    }
    return kinds.get(error["code"], MergeFailed)(error["message"], param=error["param"])
