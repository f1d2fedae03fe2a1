"""A form as multipart/form-data, written to disk as it comes: running limits, running digests, an allow-list of parts.

File names that a client sends are kept as text; no path is made of them.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from adapters.errors import AdapterRefused, InvalidRequest, LengthMismatch, PayloadTooLarge, Problem
from adapters.store import disk_errors

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

MAX_PROBLEMS = 16
BATCH_BYTES = 1024 * 1024
FRAMING_BYTES = 64 * 1024
MAX_HEADER_BYTES = 16 * 1024  # a line of a part's head: a long file name passes and is not looked at
MAX_SHOWN = 60


@dataclass(frozen=True, slots=True)
class FormSpec:
    """What a form may hold: text parts with the bytes each may have, file parts with theirs and with our names."""

    texts: Mapping[str, int]
    files: Mapping[str, tuple[int, str]]
    required: tuple[str, ...]

    def limit_of(self, part: str) -> int:
        return self.texts[part] if part in self.texts else self.files[part][0]

    @property
    def names(self) -> str:
        return ", ".join((*self.texts, *self.files))


@dataclass
class FormPart:
    """One part that was taken. `filename` is the client's claim."""

    name: str
    filename: str = ""
    path: Path | None = None
    text: bytearray = field(default_factory=bytearray)
    size: int = 0
    sha256: hashlib._Hash = field(default_factory=hashlib.sha256)

    @property
    def digest(self) -> str:
        return f"sha256:{self.sha256.hexdigest()}"


class FormReader:
    """Feeds on the body's bytes and fills a folder. Not for the event loop: `write` does file I/O."""

    def __init__(self, content_type: str, folder: Path, spec: FormSpec) -> None:
        kind, options = parse_options_header(content_type)
        boundary = options.get(b"boundary")
        if kind != b"multipart/form-data" or not boundary:
            raise InvalidRequest("Send it as multipart/form-data with a boundary.", param="content-type")
        self.folder = folder
        self.spec = spec
        self.parts: dict[str, FormPart] = {}
        self.problems: list[Problem] = []
        self.is_ended = False
        self._part: FormPart | None = None
        self._sink: BinaryIO | None = None
        self._header = b""
        self._value = b""
        self._disposition = b""
        try:
            self._parser = MultipartParser(boundary, self._callbacks(), max_header_size=MAX_HEADER_BYTES)
        except FormParserError as error:
            raise InvalidRequest(f"The multipart boundary cannot be used: {error}", param="content-type") from None

    def write(self, data: bytes) -> None:
        """Take the next bytes; raises PayloadTooLarge, InvalidRequest, StorageFull."""
        try:
            with disk_errors(self.folder):
                self._parser.write(data)
        except FormParserError as error:
            raise InvalidRequest(f"The multipart body cannot be read: {str(error)[:200]}") from None

    def close(self) -> None:
        """Close the file that is being written, whatever happened."""
        if self._sink is not None:
            self._sink.close()
            self._sink = None

    def check_whole(self) -> None:
        """Raises LengthMismatch for a body cut short, InvalidRequest without a part, AdapterRefused for others."""
        if not self.is_ended:
            raise LengthMismatch("The multipart body ends before its last boundary.")
        missing = [name for name in self.spec.required if name not in self.parts]
        if missing:
            raise InvalidRequest(f"The form lacks the part {', '.join(missing)}.", param=missing[0])
        if self.problems:
            raise AdapterRefused("The form holds what is not taken.", problems=tuple(self.problems))

    def text(self, name: str) -> str:
        """A text part; empty without one. Raises InvalidRequest."""
        if name not in self.parts:
            return ""
        try:
            return self.parts[name].text.decode("utf-8")
        except UnicodeDecodeError:
            raise InvalidRequest(f"The part {name} is not UTF-8.", param=name) from None

    def raw(self, name: str) -> bytes | None:
        """The bytes of a text part; None without one."""
        return bytes(self.parts[name].text) if name in self.parts else None

    def fingerprint(self) -> str:
        """The same for the same parts, however they were framed."""
        return fingerprint((part.name, part.size, part.digest) for part in self.parts.values())

    def _callbacks(self) -> MultipartCallbacks:
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._on_header_field,
            "on_header_value": self._on_header_value,
            "on_header_end": self._on_header_end,
            "on_headers_finished": self._open_part,
            "on_part_data": self._on_data,
            "on_part_end": self._end_part,
            "on_end": self._end,
        }

    def _begin(self) -> None:
        self._disposition = b""

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value
        self._header = self._value = b""

    def _open_part(self) -> None:
        _, options = parse_options_header(self._disposition)
        name = options.get(b"name", b"").decode("utf-8", "replace")
        filename = options.get(b"filename", b"").decode("utf-8", "replace")
        if name in self.parts:
            raise InvalidRequest(f"The part {name} is there twice.", param=name)
        if name in self.spec.texts:
            self._part = FormPart(name)
        elif name in self.spec.files:
            path = self.folder / self.spec.files[name][1]
            self._part = FormPart(name, filename, path)
            self._sink = path.open("wb", buffering=0)
        else:
            shown = name[:MAX_SHOWN] if name.isprintable() else "(unprintable)"
            self._refuse("file_not_allowed", shown, "This part is not taken.", f"The parts are: {self.spec.names}.")
            self._part = None
            return
        self.parts[name] = self._part

    def _on_data(self, data: bytes, start: int, end: int) -> None:
        part = self._part
        if part is None:
            return
        piece = memoryview(data)[start:end]
        part.size += len(piece)
        limit = self.spec.limit_of(part.name)
        if part.size > limit:
            raise PayloadTooLarge(
                f"The part {part.name} is larger than {limit} bytes, which is the limit.", param=part.name
            )
        part.sha256.update(piece)
        if self._sink is None:
            part.text += piece
            return
        while piece:
            piece = piece[self._sink.write(piece) :]

    def _end_part(self) -> None:
        self.close()
        self._part = None

    def _end(self) -> None:
        self.is_ended = True

    def _refuse(self, code: str, path: str, message: str, advice: str) -> None:
        if len(self.problems) >= MAX_PROBLEMS:
            raise AdapterRefused("The form holds too much that is not taken.", problems=tuple(self.problems))
        if not any(problem.code == code and problem.path == path for problem in self.problems):
            self.problems.append(Problem(code, path, message, advice))


async def fill(reader: FormReader, pieces: AsyncIterator[bytes]) -> None:
    """Give the reader all pieces, off the event loop and a batch at a time; its files are closed when this ends."""
    try:
        batch = bytearray()
        async for piece in pieces:
            batch += piece
            if len(batch) >= BATCH_BYTES:
                await asyncio.to_thread(reader.write, bytes(batch))
                batch.clear()
        if batch:
            await asyncio.to_thread(reader.write, bytes(batch))
    finally:
        await asyncio.to_thread(reader.close)


def fingerprint(parts: Iterable[tuple[str, int, str]]) -> str:
    """One value for the name, size and digest of every part."""
    lines = sorted(f"{name} {size} {digest.removeprefix('sha256:')}" for name, size, digest in parts)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
