"""What an adapter upload holds, sent as multipart/form-data.

Parts: `name` and `base_is` (text), `config` (adapter_config.json), `weights` (adapter_model.safetensors); optional are
`card` (card.json), `initial_adapter` (safetensors), `serving` (JSON) and `chat_template`. File names that a client
sends are not looked at.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adapters.chat_template import MAX_TEMPLATE_BYTES
from adapters.errors import InvalidRequest
from adapters.inspect import CARD_FILE, CONFIG_FILE, INITIAL_ADAPTER_FILE, WEIGHTS_FILE
from server.multipart import FRAMING_BYTES, FormReader, FormSpec, fill
from server.serving import MAX_SERVING_BYTES

if TYPE_CHECKING:
    from server.settings import Settings

TEXT_PARTS = {"name": 1024, "base_is": 1024, "serving": MAX_SERVING_BYTES, "chat_template": MAX_TEMPLATE_BYTES}
FILE_PARTS = {
    "config": CONFIG_FILE,
    "weights": WEIGHTS_FILE,
    "card": CARD_FILE,
    "initial_adapter": INITIAL_ADAPTER_FILE,
}
REQUIRED = ("name", "config", "weights")
MAX_PART_BYTES = 64 << 20  # of an upload in parts; OpenAI's


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
    serving: bytes | None = None
    chat_template: bytes | None = None


class UploadReader(FormReader):
    """Feeds on the body's bytes and fills a folder with an adapter's files, under the names that we give them."""

    def __init__(self, content_type: str, folder: Path, limits: UploadLimits) -> None:
        super().__init__(content_type, folder, upload_spec(limits))

    def finish(self) -> Upload:
        """What was uploaded; raises AdapterRefused with every problem, LengthMismatch for a body cut short."""
        self.check_whole()
        return Upload(
            self.text("name"),
            is_served(self.text("base_is")),
            "card" in self.parts,
            self.fingerprint(),
            self.raw("serving"),
            self.raw("chat_template"),
        )


def upload_spec(limits: UploadLimits) -> FormSpec:
    """The form of an adapter."""
    files = {part: (limits.of(part), file) for part, file in FILE_PARTS.items()}
    return FormSpec(TEXT_PARTS, files, REQUIRED)


def is_served(base_is: str) -> bool:
    """What `base_is` says; raises InvalidRequest."""
    if base_is not in ("", "served"):
        raise InvalidRequest("base_is can only be `served`.", param="base_is")
    return base_is == "served"


async def receive_upload(pieces: AsyncIterator[bytes], content_type: str, folder: Path, limits: UploadLimits) -> Upload:
    """Fill the folder with the upload's files; the folder is the caller's to remove when this raises."""
    reader = UploadReader(content_type, folder, limits)
    await fill(reader, pieces)
    return reader.finish()


def body_limit(path: str, settings: Settings) -> int:
    """The largest body that a route takes which streams it."""
    if path == "/v1/files":
        return settings.max_file_bytes + FRAMING_BYTES
    if path.startswith("/v1/uploads/"):
        return MAX_PART_BYTES + FRAMING_BYTES
    return UploadLimits(settings.max_weights_bytes, settings.max_config_bytes).body_bytes
