"""Blobs: canonical adapter folders on the local disk, each under its digest, published by one rename.

A blob is whole or absent. Files are fsynced before the rename and the parent after it, so that a power cut keeps that.
A failed fsync is never retried: what the disk then holds is unknown, and the upload has failed.
"""

from __future__ import annotations

import errno
import re
import shutil
import threading
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from adapters.canonical import CANONICAL_FILES, digest_folder
from adapters.durable import sync
from adapters.errors import DigestInvalid, HotshoeError, NotFound, StorageDamaged, StorageFull

DIGEST_PATTERN = re.compile(r"sha256:[0-9a-f]{64}", re.ASCII)
STAGING, TRASH = ".staging", ".trash"


class PrivateRoot:
    """A folder with a place for what is not whole yet. One process writes (the state folder's lock sees to it)."""

    def __init__(self, root: Path, *folders: str) -> None:
        self.root = root
        self._lock = threading.RLock()
        for folder in (root, root / STAGING, *(root / name for name in folders)):
            with disk_errors(folder):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Held while bytes and the row that refers to them are made or removed together, by one thread at a time."""
        with self._lock:
            yield

    def stage(self) -> Path:
        """A new private folder on the same file system, for what is not whole yet; the caller moves or removes it."""
        folder = self.root / STAGING / uuid.uuid4().hex
        with disk_errors(folder):
            folder.mkdir(mode=0o700)
        return folder


class BlobStore(PrivateRoot):
    """Content-addressed folders under `root`. `publish` moves a staged one, `sweep` removes what was left."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, TRASH)

    def publish(self, staged: Path, digest: str) -> Path:
        """Make the staged folder the blob of `digest`: fsync files and folder, one rename, fsync the parent.

        A blob that is there already stays, unless it is damaged: then it is replaced.
        """
        target = self.folder(digest)
        with self.exclusive(), disk_errors(target):
            if target.is_dir() and self._is_whole(digest):
                shutil.rmtree(staged)
                return target
            self.delete(digest)
            for path in sorted(staged.iterdir()):
                path.chmod(0o444)
                sync(path)
            sync(staged)
            staged.rename(target)
            sync(self.root)
        return target

    def folder(self, digest: str) -> Path:
        """Where the blob lies, or would lie; raises DigestInvalid."""
        return self.root / check_digest(digest).removeprefix("sha256:")

    def has(self, digest: str) -> bool:
        return self.folder(digest).is_dir()

    def verify(self, digest: str) -> None:
        """Read the blob whole; raises NotFound when it is absent, StorageDamaged when its bytes have changed."""
        folder = self.folder(digest)
        if not folder.is_dir():
            raise NotFound(f"Blob {digest} is not in {self.root}.")
        names = sorted(path.name for path in folder.iterdir())
        if names != sorted(CANONICAL_FILES):
            raise StorageDamaged(f"Blob {digest} holds {', '.join(names) or 'nothing'}; expected {CANONICAL_FILES}.")
        try:
            found = digest_folder(folder)
        except OSError as error:
            raise StorageDamaged(f"Blob {digest} cannot be read: {error.strerror}.") from error
        if found != digest:
            raise StorageDamaged(f"Blob {digest} has changed on the disk: its bytes are {found}.")

    def _is_whole(self, digest: str) -> bool:
        try:
            self.verify(digest)
        except StorageDamaged:
            return False
        return True

    def delete(self, digest: str) -> None:
        """Remove the blob in one step (a rename), then its bytes; nothing happens when it is absent."""
        folder = self.folder(digest)
        grave = self.root / TRASH / f"{folder.name}-{uuid.uuid4().hex[:8]}"
        with self.exclusive(), disk_errors(folder):
            if folder.is_dir():
                folder.rename(grave)
                sync(self.root)
                shutil.rmtree(grave)

    def digests(self) -> set[str]:
        """Of every blob that is here."""
        found = (f"sha256:{path.name}" for path in self.root.iterdir() if path.is_dir())
        return {digest for digest in found if DIGEST_PATTERN.fullmatch(digest)}

    def leftovers(self) -> list[Path]:
        """What an interrupted publish or delete left behind; nobody refers to it."""
        return sorted(path for name in (STAGING, TRASH) for path in (self.root / name).iterdir())

    def sweep(self, keep: Collection[str] | None = None) -> list[str]:
        """Remove left-overs, and blobs whose digest is not in `keep` when it is given; returns what was removed.

        Only while nobody else stages: at the start of a server or in `doctor`, under the state folder's lock.
        """
        removed = [str(path.relative_to(self.root)) for path in self.leftovers()]
        with self.exclusive():
            for path in self.leftovers():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            for digest in sorted(self.digests() - set(keep)) if keep is not None else ():
                self.delete(digest)
                removed.append(digest)
        return removed


def check_digest(digest: str) -> str:
    """The digest itself when it is well-formed; raises DigestInvalid."""
    if not DIGEST_PATTERN.fullmatch(digest):
        raise DigestInvalid(f"{digest[:80]!r} is not a digest: it must be sha256: and 64 lower-case hex digits.")
    return digest


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Errors of the disk under `path` become StorageFull or StorageDamaged."""
    try:
        yield
    except OSError as error:
        raise disk_error(error, path) from error


def disk_error(error: OSError, path: Path) -> HotshoeError:
    """No space, or over a quota or `ulimit -f`, is StorageFull; anything else is StorageDamaged and says what."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return StorageFull(f"No space is left for {path}: free some and retry.", retry_after=30)
    return StorageDamaged(f"Writing {path} failed: {error.strerror or error}.")
