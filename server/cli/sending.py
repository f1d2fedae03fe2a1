"""Large files on their way to a server: in parts, found again by digest, so that only what is missing is sent again.

Two sends of one file meet in the same upload: it is begun with the file's sha256, and a part that is there is not sent
again. What nobody uses is deleted by the server after a day.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.errors import EngineUnavailable

if TYPE_CHECKING:
    from server.cli.client import Client

LARGE_BYTES = 64 << 20  # from here on an adapter goes in parts
PART_BYTES = 32 << 20  # the most that a cut costs
READ_BYTES = 1 << 20
KEPT_SECONDS = 24 * 3600
TRIES = 6
FIRST_PAUSE_SECONDS = 1.0
TEXTS = ("serving", "chat_template")  # parts that stand in the order itself
KIND = "application/octet-stream"


@dataclass(frozen=True, slots=True)
class Piece:
    """One part of a file."""

    at: int
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Cut:
    """A file as it is sent: its digest, and its parts in their order."""

    path: Path
    sha256: str
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        return sum(piece.size for piece in self.pieces)


class Progress:
    """One line on standard error that counts up, or without a terminal its first and last state."""

    def __init__(self, label: str, total: int) -> None:
        self.label, self.total = label, total
        self.is_live = sys.stderr.isatty()

    def say(self, done: int, note: str = "") -> None:
        """How many bytes are there now."""
        share = 100 * done // self.total if self.total else 100
        line = f"{self.label}  {done >> 20:,} of {self.total >> 20:,} MB ({share}%){note}"
        if self.is_live:
            sys.stderr.write(f"\r{line}\x1b[K" + ("\n" if done == self.total else ""))
        elif note or done == self.total:
            sys.stderr.write(f"{line}\n")
        sys.stderr.flush()


def is_large(parts: Mapping[str, tuple[Path, str]]) -> bool:
    """Some file is worth the parts."""
    return any(path.stat().st_size > LARGE_BYTES for path, _ in parts.values())


def send_adapter(
    client: Client, parts: Mapping[str, tuple[Path, str]], data: Mapping[str, str], params: Mapping[str, str]
) -> dict[str, Any]:
    """Send an adapter's files, then order the adapter from them; the answer is the one that a form would get.

    The files go again once the version is there, and stay for a day where it is not: a second try finds them.
    """
    from server.cli.client import ServerRefused

    order = {**send_files(client, parts), **data}
    try:
        row: dict[str, Any] = client.post("/v1/adapters", json=order, params=params)
    except ServerRefused as refusal:
        if refusal.param != "file_id":
            raise
        order = {**send_files(client, parts), **data}  # another push of the same file ended, and took it along
        row = client.post("/v1/adapters", json=order, params=params)
    for part in parts if "dry_run" not in params else ():
        if part not in TEXTS:
            with suppress(ServerRefused):
                client.call("DELETE", f"/v1/files/{order[part]}")
    return row


def send_files(client: Client, parts: Mapping[str, tuple[Path, str]]) -> dict[str, str]:
    """Part -> the id of its file on the server, or its text where that stands in the order itself; largest first."""
    order = {}
    for part, (path, _) in sorted(parts.items(), key=lambda item: -item[1][0].stat().st_size):
        if part in TEXTS:
            order[part] = path.read_text("utf-8")
        elif path.stat().st_size > LARGE_BYTES:
            order[part] = send_file(client, path)
        else:
            with path.open("rb") as file:
                data = {"purpose": "adapter", "expires_after[anchor]": "created_at"}
                data["expires_after[seconds]"] = str(KEPT_SECONDS)
                row = client.post("/v1/files", data=data, files={"file": (path.name, file, KIND)})
            order[part] = str(row["id"])
    return order


def send_file(client: Client, path: Path, *, part_bytes: int = PART_BYTES) -> str:
    """The id of the file on the server; what is there of it already is not sent again."""
    cut = cut_file(path, part_bytes)
    upload = find_upload(client, cut) or begin_upload(client, cut)
    if upload.get("file"):
        return str(upload["file"]["id"])
    here = {row["sha256"]: str(row["id"]) for row in upload.get("parts", ())}
    done = sum(piece.size for piece in cut.pieces if piece.sha256 in here)
    progress = Progress(path.name, cut.size)
    progress.say(done, " are there already" if done else "")
    with path.open("rb") as file:
        for piece in cut.pieces:
            if piece.sha256 not in here:
                file.seek(piece.at)
                here[piece.sha256] = send_part(client, upload["id"], file.read(piece.size))
                done += sum(one.size for one in cut.pieces if one.sha256 == piece.sha256)
                progress.say(done)
    order = {"part_ids": [here[piece.sha256] for piece in cut.pieces]}
    return str(client.post(f"/v1/uploads/{upload['id']}/complete", json=order)["file"]["id"])


def find_upload(client: Client, cut: Cut) -> dict[str, Any] | None:
    """The upload of this file that was begun before: with its file, or open and cut in the same way."""
    for row in client.get("/v1/uploads", params={"sha256": cut.sha256})["data"]:
        if row["status"] == "completed" and row["file"] and row["file"]["purpose"] == "adapter":
            return dict(row)
        if row["status"] == "pending" and row["purpose"] == "adapter" and row["bytes"] == cut.size:
            upload: dict[str, Any] = client.get(f"/v1/uploads/{row['id']}")
            if {part["sha256"] for part in upload["parts"]} <= {piece.sha256 for piece in cut.pieces}:
                return upload
    return None


def begin_upload(client: Client, cut: Cut) -> dict[str, Any]:
    order = {
        "filename": cut.path.name,
        "purpose": "adapter",
        "bytes": cut.size,
        "mime_type": KIND,
        "sha256": cut.sha256,
        "expires_after": {"anchor": "created_at", "seconds": KEPT_SECONDS},
    }
    row: dict[str, Any] = client.post("/v1/uploads", json=order)
    return row


def send_part(client: Client, upload_id: str, data: bytes) -> str:
    """Its id; tried again while nobody answers or the server is busy, for half a minute in all."""
    pause = FIRST_PAUSE_SECONDS
    for left in reversed(range(TRIES)):
        try:
            return str(client.post(f"/v1/uploads/{upload_id}/parts", files={"data": ("part", data, KIND)})["id"])
        except EngineUnavailable:
            if not left:
                raise
        time.sleep(pause)
        pause *= 2
    raise AssertionError("the last try returns or raises")


def cut_file(path: Path, part_bytes: int) -> Cut:
    """Read a file once, for its digest and those of its parts."""
    whole = hashlib.sha256()
    pieces = []
    with path.open("rb") as file:
        size = path.stat().st_size
        for at in range(0, size, part_bytes):
            one = hashlib.sha256()
            for chunk in _chunks(file, min(part_bytes, size - at)):
                whole.update(chunk)
                one.update(chunk)
            pieces.append(Piece(at, min(part_bytes, size - at), one.hexdigest()))
    return Cut(path, whole.hexdigest(), tuple(pieces))


def _chunks(file: Any, size: int) -> Iterator[bytes]:
    while size:
        chunk = file.read(min(size, READ_BYTES))
        if not chunk:
            return
        size -= len(chunk)
        yield chunk
