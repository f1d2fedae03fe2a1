"""A folder that appears whole or not at all: written under a hidden name beside its place, fsynced, renamed once."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from adapters.durable import sync, write_file
from adapters.errors import AlreadyRunning, HotshoeError, OutputExists, StorageFull

SUFFIX = ".hotshoe-partial"
INPUTS = ".inputs"  # in a work folder: the digest of what its files are made of


@contextmanager
def staging(out: Path) -> Iterator[Path]:
    """A fresh hidden folder beside `out`, locked while this process lives; gone afterwards unless it was published."""
    out.parent.mkdir(parents=True, exist_ok=True)
    sweep_partial(out.parent)
    folder = out.parent / f".{out.name[:100]}.{secrets.token_hex(6)}{SUFFIX}"
    with _locked(out.parent):  # no sweep may see the folder before its own lock is there
        folder.mkdir()
        handle = _open_folder(folder)
        fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


@contextmanager
def work_folder(work: Path, inputs: str, kept: Collection[str]) -> Iterator[Path]:
    """The caller's own folder to stage in, on the same disk as the output; what a killed process wrote there stays.

    Of an earlier run the files named in `kept` are left, if `inputs` (a digest) are the same as then; all else goes. An
    error of ours or of the disk removes the folder, a kill or an exit leaves it. Raises AlreadyRunning.
    """
    refusal = f"Another process exports in {work}. Wait for it, or name another folder."
    with own_folder(work, refusal), _gone_after_an_error(work):
        note = work / INPUTS
        is_same = note.is_file() and note.read_text() == inputs
        for path in list(work.iterdir()):
            if not (is_same and path.name in {INPUTS, *kept}):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        if not is_same:
            write_file(note, inputs.encode())
        yield work


@contextmanager
def own_folder(folder: Path, refusal: str) -> Iterator[None]:
    """The folder, made where there is none, is this process's alone while the block runs.

    Raises AlreadyRunning with `refusal` where it is another's. The lock ends with its process, even a killed one.
    """
    try:
        handle = _owned(folder)
    except BlockingIOError as error:
        raise AlreadyRunning(refusal) from error
    try:
        yield
    finally:
        os.close(handle)


def _owned(folder: Path) -> int:
    """A locked handle of the folder that has the name now; raises BlockingIOError."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError), ExitStack() as undone:  # whoever had it may remove or rename it meanwhile
            handle = _open_folder(folder)
            undone.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(handle), folder.stat()):
                undone.pop_all()
                return handle


@contextmanager
def _gone_after_an_error(folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def sweep_partial(parent: Path) -> list[Path]:
    """Remove what killed exports left in `parent`, and return it. A live export holds a lock on its folder."""
    removed = []
    with _locked(parent):
        for folder in sorted(parent.glob(f".*{SUFFIX}")):
            with suppress(OSError):
                handle = _open_folder(folder)
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder)
                    removed.append(folder)
                finally:
                    os.close(handle)
    return removed


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    handle = _open_folder(folder)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _open_folder(folder: Path) -> int:
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def publish(folder: Path, out: Path) -> None:
    """Give a staged folder its place; raises OutputExists. Its files are fsynced already."""
    if os.path.lexists(out):
        raise OutputExists(f"{out} appeared while the export ran; it was left as it is.", param="out")
    (folder / INPUTS).unlink(missing_ok=True)
    sync(folder)
    folder.rename(out)
    sync(out.parent)


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def explained(error: OSError) -> HotshoeError:
    """What an OSError during an export means to a person."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageFull(
            f"The disk filled up during the export ({error}). Nothing of it was kept: free space, run it again."
        )
    if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
        return OutputExists(f"The output folder appeared while the export ran: {error}.", param="out")
    return HotshoeError(f"The export failed in the file system: {error}. Nothing of it was kept.")


def json_bytes(value: Any) -> bytes:
    """Indented UTF-8 JSON; the same value gives the same bytes."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
