"""A folder of files as a tar stream: sizes known beforehand, no times, so that the same folder gives the same bytes."""

from __future__ import annotations

import tarfile
from collections.abc import Generator
from pathlib import Path

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

CHUNK_BYTES = 1 << 20


def tar_size(folder: Path) -> int:
    """How many bytes `tar_stream` yields."""
    return sum(tarfile.BLOCKSIZE + _padded(path.stat().st_size) for path in folder.iterdir()) + 2 * tarfile.BLOCKSIZE


def tar_stream(folder: Path) -> Generator[bytes, None, None]:
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


class TarResponse(StreamingResponse):
    """A folder as a tar stream. The file that is being read is closed also when the client leaves in the middle."""

    def __init__(self, folder: Path, headers: dict[str, str]) -> None:
        self._stream = tar_stream(folder)
        sized = {"content-length": str(tar_size(folder)), **headers}
        super().__init__(self._stream, media_type="application/x-tar", headers=sized)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._stream.close()


def _padded(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
