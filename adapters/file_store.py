"""Files of clients on the local disk, and the parts of those that are still coming; all names are the server's.

A file is whole or absent: staged, fsynced, renamed once, and its folder fsynced. Who calls `keep` and `delete` writes
the row that goes with it, inside `exclusive`; what is here without a row is litter, which `sweep` removes.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from adapters.durable import sync
from adapters.errors import NotFound, StorageDamaged
from adapters.store import STAGING, PrivateRoot, disk_errors

PARTS = ".parts"
CHUNK_BYTES = 1 << 20
ID_PATTERN = re.compile(r"(file-|upload_|part_)[0-9a-f]{24}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Joined:
    """What a file that was put together from parts is: its size, `sha256:...`, and its MD5 in hex where asked for."""

    size_bytes: int
    digest: str
    md5: str | None


class FileStore(PrivateRoot):
    """The files under `root`."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, PARTS)

    def path(self, file_id: str) -> Path:
        """Where the file lies, or would lie."""
        return self.root / _checked(file_id)

    def part_path(self, upload_id: str, part_id: str) -> Path:
        """Where the part of an upload lies, or would lie."""
        return self.root / PARTS / _checked(upload_id) / _checked(part_id)

    def seal(self, staged: Path) -> None:
        """Make a staged file read-only and durable. A failed fsync is not tried again."""
        with disk_errors(staged):
            staged.chmod(0o444)
            sync(staged)

    def keep(self, staged: Path, place: Path) -> None:
        """Give a sealed file its place, durably."""
        with disk_errors(place):
            if not place.parent.is_dir():
                place.parent.mkdir(mode=0o700)
                sync(place.parent.parent)
            staged.rename(place)
            sync(place.parent)

    def delete(self, file_id: str) -> None:
        """Remove a file; nothing happens when it is absent."""
        self._unlink(self.path(file_id))

    def delete_part(self, upload_id: str, part_id: str) -> None:
        """Remove one part; nothing happens when it is absent."""
        self._unlink(self.part_path(upload_id, part_id))

    def delete_parts(self, upload_id: str) -> None:
        """Remove every part of an upload; nothing happens when there are none."""
        folder = self.root / PARTS / _checked(upload_id)
        with disk_errors(folder):
            if folder.is_dir():
                shutil.rmtree(folder)

    def join(self, parts: Sequence[tuple[Path, str]], out: Path, *, with_md5: bool = False) -> Joined:
        """Write the parts behind each other into the new file `out`; memory is bounded by one chunk.

        Raises StorageDamaged when a part is gone or is not what its digest says.
        """
        whole, size = hashlib.sha256(), 0
        md5 = hashlib.md5(usedforsecurity=False) if with_md5 else None
        with disk_errors(out), out.open("xb", buffering=0) as file:
            for path, digest in parts:
                one = hashlib.sha256()
                for chunk in chunks_of(path):
                    for each in (whole, one, *([md5] if md5 else ())):
                        each.update(chunk)
                    size += _write(file.fileno(), chunk)
                _check_digest(path, f"sha256:{one.hexdigest()}", digest)
        return Joined(size, f"sha256:{whole.hexdigest()}", md5.hexdigest() if md5 else None)

    def verify(self, path: Path, digest: str) -> None:
        """Read a file whole; raises StorageDamaged when it is gone or its bytes have changed."""
        _check_digest(path, digest_of(path), digest)

    def link(self, path: Path, target: Path) -> None:
        """Let a file be at a second place too without copying it, where both are on one file system."""
        with disk_errors(target):
            try:
                target.hardlink_to(path)
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP):
                    raise
                shutil.copyfile(path, target)

    def files(self) -> set[str]:
        """Ids of every file that is here."""
        return {path.name for path in self.root.iterdir() if ID_PATTERN.fullmatch(path.name)}

    def parts(self) -> set[tuple[str, str]]:
        """Upload and id of every part that is here."""
        return {(path.parent.name, path.name) for path in (self.root / PARTS).glob("*/*")}

    def leftovers(self, files: Collection[str], parts: Collection[tuple[str, str]]) -> list[Path]:
        """What an interruption left behind: staged files, and files and parts that are not among those with a row."""
        uploads = {upload_id for upload_id, _ in parts}
        return sorted(
            [
                *(self.root / STAGING).iterdir(),
                *(self.root / name for name in self.files() - set(files)),
                *(path for path in (self.root / PARTS).iterdir() if path.name not in uploads),
                *(self.root / PARTS / one / part for one, part in self.parts() - set(parts) if one in uploads),
            ]
        )

    def sweep(self, files: Collection[str], parts: Collection[tuple[str, str]]) -> list[str]:
        """Remove the left-overs; returns what was removed. Only while nobody sends: at a start, or in `doctor`."""
        with self.exclusive():
            found = self.leftovers(files, parts)
            for path in found:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        return [str(path.relative_to(self.root)) for path in found]

    def _unlink(self, path: Path) -> None:
        with disk_errors(path):
            if path.exists():
                path.unlink()
                sync(path.parent)


def digest_of(path: Path) -> str:
    """`sha256:...` of a file; raises StorageDamaged when it cannot be read."""
    digest = hashlib.sha256()
    for chunk in chunks_of(path):
        digest.update(chunk)
    return f"sha256:{digest.hexdigest()}"


def _check_digest(path: Path, found: str, digest: str) -> None:
    if found != digest:
        raise StorageDamaged(f"{path.name} has changed on the disk: its bytes are {found}. Send it again.")


def chunks_of(path: Path) -> Iterator[bytes]:
    """A file of ours in pieces; raises StorageDamaged when it is gone."""
    try:
        with path.open("rb", buffering=0) as file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk
    except OSError as error:
        raise StorageDamaged(f"{path.name} cannot be read: {error.strerror}.") from error


def _write(handle: int, chunk: bytes) -> int:
    """All of the chunk: one call may take less than it is given."""
    view = memoryview(chunk)
    while view:
        view = view[os.write(handle, view) :]
    return len(chunk)


def _checked(name: str) -> str:
    """The id itself when it is one that we make: never a path of a client's. Raises NotFound."""
    if not ID_PATTERN.fullmatch(name):
        raise NotFound(f"There is no {name[:80]!r}.", param="id")
    return name
