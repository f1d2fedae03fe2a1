"""A folder of files as a tar: sizes known beforehand, no times, so that the same folder gives the same bytes."""

from __future__ import annotations

import tarfile
from collections.abc import Mapping

from server.content import FilePart

LAYOUT = 1  # of the bytes between the files: raised where the same files give another tar than before


def tar_parts(sizes: Mapping[str, int]) -> tuple[bytes | FilePart, ...]:
    """GNU tar of files (name -> size in bytes), in the order of their names."""
    parts: list[bytes | FilePart] = []
    for name, size_bytes in sorted(sizes.items()):
        entry = tarfile.TarInfo(name)
        entry.size, entry.mode = size_bytes, 0o644
        padding = -size_bytes % tarfile.BLOCKSIZE
        parts += [entry.tobuf(tarfile.GNU_FORMAT), FilePart(name, size_bytes), b"\0" * padding]
    return (*parts, b"\0" * (2 * tarfile.BLOCKSIZE))
