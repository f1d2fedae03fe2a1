"""Bytes of known length that a client may fetch in pieces: whole or from where it was cut off, by GET and HEAD."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from server.ranges import NOT_MODIFIED, PARTIAL, asked_part

CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class FilePart:
    """A file of the folder, by name, with its size."""

    name: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Content:
    """Parts behind each other: bytes, and files of a folder. `etag` is strong: other bytes have another one."""

    parts: tuple[bytes | FilePart, ...]
    etag: str  # in its quotes
    filename: str
    media_type: str = "application/octet-stream"

    @property
    def size_bytes(self) -> int:
        return sum(_size(part) for part in self.parts)

    def read(self, folder: int, start: int, end: int) -> Generator[bytes, None, None]:
        """The bytes from `start` up to `end`, one chunk in memory at a time; `folder` is an open handle."""
        at = 0
        for part in self.parts:
            first, last = max(start, at), min(end, at + _size(part))
            if first < last:
                if isinstance(part, bytes):
                    yield part[first - at : last - at]
                else:
                    yield from _read_file(folder, part.name, first - at, last - first)
            at += _size(part)


class ContentResponse(Response):
    """Answers with a content of a folder, or the part of it that the request asks for. The folder is open meanwhile."""

    def __init__(self, opened: AbstractContextManager[int], content: Callable[[int], Content]) -> None:
        """`opened` gives a handle of the folder; `content` says what of it is answered with. Both may raise."""
        super().__init__()
        self.opened = opened
        self.content = content

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self.opened as folder:
            content = await asyncio.to_thread(self.content, folder)
            size_bytes, is_get = content.size_bytes, scope["method"] == "GET"
            asked = asked_part(Headers(scope=scope), content.etag, size_bytes, is_get=is_get)
            headers = {
                "etag": content.etag,
                "accept-ranges": "bytes",
                "content-disposition": f'attachment; filename="{content.filename}"',
                "content-length": str(asked.end - asked.start),
            }
            if asked.status == NOT_MODIFIED:
                response = Response(status_code=NOT_MODIFIED, headers={"etag": content.etag})
                await response(scope, receive, send)
                return
            if asked.status == PARTIAL:
                headers["content-range"] = f"bytes {asked.start}-{asked.end - 1}/{size_bytes}"
            if not is_get:
                await Response(None, asked.status, headers, content.media_type)(scope, receive, send)
                return
            stream = content.read(folder, asked.start, asked.end)
            try:
                await StreamingResponse(stream, asked.status, headers, content.media_type)(scope, receive, send)
            finally:
                stream.close()


def _size(part: bytes | FilePart) -> int:
    return len(part) if isinstance(part, bytes) else part.size_bytes


def _read_file(folder: int, name: str, start: int, size_bytes: int) -> Generator[bytes, None, None]:
    """So many bytes of a file from `start` on; an error where it has fewer, so that nobody takes it for whole."""
    handle = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
    with os.fdopen(handle, "rb", buffering=0) as file:
        file.seek(start)
        while size_bytes:
            chunk = file.read(min(CHUNK_BYTES, size_bytes))
            if not chunk:
                raise OSError(f"{name} is shorter than it was: {size_bytes} bytes are lacking.")
            size_bytes -= len(chunk)
            yield chunk
