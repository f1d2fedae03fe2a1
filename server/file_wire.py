"""Files, uploads and parts on the wire: OpenAI's own types, with what they lack here."""

from __future__ import annotations

from typing import Literal, cast

from openai.types import FileObject, Upload
from openai.types.uploads import UploadPart
from pydantic import BaseModel

from adapters.file_rows import FileRow, Owner, PartRow, UploadRow, UploadStatus
from server.services import Caller

Purpose = Literal["adapter", "evals", "fine-tune", "fine-tune-results", "user_data"]


class File(FileObject):
    """A file; `sha256` is of its content."""

    purpose: Purpose  # type: ignore[assignment]  # theirs knows no adapters
    sha256: str


class FileUpload(Upload):
    """A file that comes in parts. `sha256` is what was declared of the whole."""

    file: File | None = None
    sha256: str | None = None


class FilePart(UploadPart):
    """One part that is here, durably."""

    bytes: int
    sha256: str


class FileUploadWithParts(FileUpload):
    """An upload with the parts that are here, so that a sender can go on with the others."""

    parts: list[FilePart]


class FileList(BaseModel):
    """A page of files."""

    object: Literal["list"] = "list"
    data: list[File]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileUploadList(BaseModel):
    """Uploads, newest first."""

    object: Literal["list"] = "list"
    data: list[FileUpload]


def owner_of(caller: Caller) -> Owner:
    """Whose files a caller may see: its tenant's, or only its own where its key is limited to named adapters."""
    return Owner(caller.tenant, caller.actor, sees_all=caller.key is None or caller.key.adapters is None)


def file_of(file: FileRow) -> File:
    """One file on the wire."""
    return File(
        id=file.id,
        object="file",
        bytes=file.size_bytes,
        created_at=int(file.created_at),
        expires_at=int(file.expires_at) if file.expires_at is not None else None,
        filename=file.filename,
        purpose=cast("Purpose", file.purpose),
        status="processed",
        sha256=file.digest.removeprefix("sha256:"),
    )


def upload_of(upload: UploadRow, file: FileRow | None) -> FileUpload:
    """One upload on the wire, with its file when it is completed and the file is still there."""
    return FileUpload(
        id=upload.id,
        object="upload",
        bytes=upload.size_bytes,
        created_at=int(upload.created_at),
        expires_at=int(upload.expires_at),
        filename=upload.filename,
        purpose=upload.purpose,
        status=UploadStatus(upload.status).value,
        file=file_of(file) if file is not None else None,
        sha256=upload.digest.removeprefix("sha256:") if upload.digest is not None else None,
    )


def part_of(part: PartRow) -> FilePart:
    """One part on the wire."""
    return FilePart(
        id=part.id,
        object="upload.part",
        created_at=int(part.created_at),
        upload_id=part.upload_id,
        bytes=part.size_bytes,
        sha256=part.digest.removeprefix("sha256:"),
    )
