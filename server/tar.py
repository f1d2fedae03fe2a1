"""A folder of files as a tar stream: sizes known beforehand, no times, so that the same folder gives the same bytes."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path

CHUNK_BYTES = 1 << 20


def tar_size(folder: Path) -> int:
    """How many bytes `tar_stream` yields."""
    return sum(tarfile.BLOCKSIZE + _padded(path.stat().st_size) for path in folder.iterdir()) + 2 * tarfile.BLOCKSIZE


def tar_stream(folder: Path) -> Iterator[bytes]:
    """GNU tar of the files in `folder`, in the order of their names; one chunk in memory at a time."""
    for path in sorted(folder.iterdir()):
        entry = tarfile.TarInfo(path.name)
        entry.size, entry.mode = path.stat().st_size, 0o644
        yield entry.tobuf(tarfile.GNU_FORMAT)
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk
        yield b"\0" * (_padded(entry.size) - entry.size)
    yield b"\0" * (2 * tarfile.BLOCKSIZE)


def _padded(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
