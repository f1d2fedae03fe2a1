"""An adapter upload as multipart/form-data, written to disk as it comes: running limits, an allow-list of parts.

Parts: `name` and `base_is` (text), `config` (adapter_config.json), `weights` (adapter_model.safetensors); optional are
`card` (card.json) and `initial_adapter` (safetensors). File names that a client sends are not looked at.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from adapters.errors import AdapterRefused, InvalidRequest, LengthMismatch, PayloadTooLarge, Problem
from adapters.inspect import CARD_FILE, CONFIG_FILE, INITIAL_ADAPTER_FILE, WEIGHTS_FILE

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

TEXT_PARTS = {"name": 1024, "base_is": 1024}
FILE_PARTS = {
    "config": CONFIG_FILE,
    "weights": WEIGHTS_FILE,
    "card": CARD_FILE,
    "initial_adapter": INITIAL_ADAPTER_FILE,
}
REQUIRED = ("name", "config", "weights")
MAX_PROBLEMS = 16
BATCH_BYTES = 1024 * 1024
FRAMING_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class UploadLimits:
    weights_bytes: int
    config_bytes: int

    @property
    def body_bytes(self) -> int:
        """The largest body that can hold every part at its limit."""
        return sum(self.of(part) for part in (*TEXT_PARTS, *FILE_PARTS)) + FRAMING_BYTES

    def of(self, part: str) -> int:
        if part in TEXT_PARTS:
            return TEXT_PARTS[part]
        return self.weights_bytes if part in ("weights", "initial_adapter") else self.config_bytes


@dataclass(frozen=True, slots=True)
class Upload:
    """What one upload held. `fingerprint` is the same for the same parts, however they were framed."""

    name: str
    is_base_served: bool
    has_card: bool
    fingerprint: str


@dataclass
class _Part:
    name: str
    sink: BinaryIO | None
    text: bytearray = field(default_factory=bytearray)
    size: int = 0
    digest: hashlib._Hash = field(default_factory=hashlib.sha256)


class UploadReader:
    """Feeds on the body's bytes and fills a folder. Not for the event loop: `write` does file I/O."""

    def __init__(self, content_type: str, folder: Path, limits: UploadLimits) -> None:
        kind, options = parse_options_header(content_type)
        boundary = options.get(b"boundary")
        if kind != b"multipart/form-data" or not boundary:
            raise InvalidRequest("Send the adapter as multipart/form-data with a boundary.", param="content-type")
        self.folder = folder
        self.limits = limits
        self.parts: dict[str, _Part] = {}
        self.problems: list[Problem] = []
        self.is_ended = False
        self._part: _Part | None = None
        self._header = b""
        self._value = b""
        self._disposition = b""
        try:
            self._parser = MultipartParser(boundary, self._callbacks())
        except FormParserError as error:
            raise InvalidRequest(f"The multipart boundary cannot be used: {error}", param="content-type") from None

    def write(self, data: bytes) -> None:
        """Take the next bytes; raises PayloadTooLarge, InvalidRequest."""
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise InvalidRequest(f"The multipart body cannot be read: {str(error)[:200]}") from None

    def close(self) -> None:
        """Close files, whatever happened."""
        for part in self.parts.values():
            if part.sink is not None:
                part.sink.close()

    def finish(self) -> Upload:
        """What was uploaded; raises AdapterRefused with every problem, LengthMismatch for a body cut short."""
        if not self.is_ended:
            raise LengthMismatch("The multipart body ends before its last boundary.")
        missing = [name for name in REQUIRED if name not in self.parts]
        if missing:
            raise InvalidRequest(f"The upload lacks the part {', '.join(missing)}.", param=missing[0])
        base_is = self._text("base_is")
        if base_is not in ("", "served"):
            raise InvalidRequest("base_is can only be `served`.", param="base_is")
        if self.problems:
            raise AdapterRefused("The upload holds what is not taken.", problems=tuple(self.problems))
        lines = sorted(f"{part.name} {part.size} {part.digest.hexdigest()}" for part in self.parts.values())
        fingerprint = hashlib.sha256("\n".join(lines).encode()).hexdigest()
        return Upload(self._text("name"), base_is == "served", "card" in self.parts, fingerprint)

    def _text(self, name: str) -> str:
        if name not in self.parts:
            return ""
        try:
            return self.parts[name].text.decode("utf-8")
        except UnicodeDecodeError:
            raise InvalidRequest(f"The part {name} is not UTF-8.", param=name) from None

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
        if name in self.parts:
            raise InvalidRequest(f"The part {name} is there twice.", param=name)
        if name in TEXT_PARTS:
            self._part = _Part(name, None)
        elif name in FILE_PARTS:
            self._part = _Part(name, (self.folder / FILE_PARTS[name]).open("wb"))
        else:
            shown = name[:60] if name.isprintable() else "(unprintable)"
            allowed = ", ".join((*TEXT_PARTS, *FILE_PARTS))
            self._refuse("file_not_allowed", shown, "This part is not taken.", f"The parts are: {allowed}.")
            self._part = None
            return
        self.parts[name] = self._part

    def _on_data(self, data: bytes, start: int, end: int) -> None:
        part = self._part
        if part is None:
            return
        piece = data[start:end]
        part.size += len(piece)
        limit = self.limits.of(part.name)
        if part.size > limit:
            raise PayloadTooLarge(
                f"The part {part.name} is larger than {limit} bytes, which is the limit.", param=part.name
            )
        part.digest.update(piece)
        if part.sink is None:
            part.text += piece
        else:
            part.sink.write(piece)

    def _end_part(self) -> None:
        if self._part is not None and self._part.sink is not None:
            self._part.sink.close()
        self._part = None

    def _end(self) -> None:
        self.is_ended = True

    def _refuse(self, code: str, path: str, message: str, advice: str) -> None:
        if len(self.problems) >= MAX_PROBLEMS:
            raise AdapterRefused("The upload holds too much that is not taken.", problems=tuple(self.problems))
        if not any(problem.code == code and problem.path == path for problem in self.problems):
            self.problems.append(Problem(code, path, message, advice))


async def receive_upload(pieces: AsyncIterator[bytes], content_type: str, folder: Path, limits: UploadLimits) -> Upload:
    """Fill the folder with the upload's files; the folder is the caller's to remove when this raises."""
    reader = UploadReader(content_type, folder, limits)
    try:
        batch = bytearray()
        async for piece in pieces:
            batch += piece
            if len(batch) >= BATCH_BYTES:
                await asyncio.to_thread(reader.write, bytes(batch))
                batch.clear()
        if batch:
            await asyncio.to_thread(reader.write, bytes(batch))
        return reader.finish()
    finally:
        await asyncio.to_thread(reader.close)
