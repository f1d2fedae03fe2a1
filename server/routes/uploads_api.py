"""Uploads, as OpenAI's client calls them: a file in parts, in any order and at the same time, that a cut does not undo.

Beside OpenAI's routes two that read, so that a sender who was cut off finds its upload and what of it is here.
"""

from __future__ import annotations

import asyncio
import shutil
from typing import Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from adapters.errors import NotFound, PayloadTooLarge
from adapters.file_rows import MAX_PARTS, FileRow, Owner, UploadRow
from adapters.files import NewFile, NewUpload
from server.file_wire import (
    FilePart,
    FileUpload,
    FileUploadList,
    FileUploadWithParts,
    owner_of,
    part_of,
    upload_of,
)
from server.idempotency import idempotent
from server.multipart import FormReader, FormSpec, fill
from server.receiving import pieces_of
from server.routes.files import HEX_DIGEST, STAGED, content_of
from server.services import Services, caller_of
from server.uploads import MAX_PART_BYTES

PART = FormSpec({}, {"data": (MAX_PART_BYTES, STAGED)}, ("data",))


class ExpiresAfter(BaseModel):
    """How long the file is kept."""

    model_config = ConfigDict(extra="forbid", strict=True)
    anchor: Literal["created_at"]
    seconds: int


class UploadBody(BaseModel):
    """What is to come; `sha256` of the whole is checked at the end, and is what the upload can be found by."""

    model_config = ConfigDict(extra="forbid", strict=True)
    filename: str
    purpose: str
    size_bytes: int = Field(alias="bytes", ge=0, le=2**53 - 1)
    mime_type: str
    expires_after: ExpiresAfter | None = None
    sha256: str | None = Field(None, pattern=HEX_DIGEST)

    def as_new(self) -> NewUpload:
        seconds = self.expires_after.seconds if self.expires_after else None
        digest = f"sha256:{self.sha256}" if self.sha256 else None
        return NewUpload(NewFile(self.purpose, self.filename, seconds), self.mime_type, self.size_bytes, digest)


class CompleteBody(BaseModel):
    """The parts in their order."""

    model_config = ConfigDict(extra="forbid", strict=True)
    part_ids: list[str] = Field(max_length=MAX_PARTS)
    md5: str | None = Field(None, pattern="^[0-9a-fA-F]{32}$")


def router(services: Services) -> APIRouter:
    routes = APIRouter(prefix="/v1/uploads", tags=["uploads"])
    files, registry = services.files, services.registry

    @routes.post("", summary="Begin to send a file in parts", response_model=FileUpload)
    async def create(request: Request, body: UploadBody) -> JSONResponse:
        owner, most = owner_of(caller_of(request)), services.settings.max_file_bytes
        if body.size_bytes > most:
            raise PayloadTooLarge(f"The file has {body.size_bytes} bytes; at most {most} are taken.", param="bytes")

        async def act() -> tuple[int, dict[str, Any]]:
            row = await asyncio.to_thread(files.begin, owner, body.as_new())
            return 200, upload_of(row, None).model_dump(mode="json")

        status, answer = await idempotent(services, request, body.model_dump_json(), act)
        return JSONResponse(answer, status_code=status)

    @routes.get("", summary="The uploads, newest first; ?sha256= finds one by the digest it was begun with")
    async def list_uploads(
        request: Request,
        sha256: str | None = Query(None, pattern=HEX_DIGEST),
        limit: int = Query(100, ge=1, le=1000),
    ) -> FileUploadList:
        owner = owner_of(caller_of(request))
        digest = None if sha256 is None else f"sha256:{sha256}"
        rows = await asyncio.to_thread(lambda: registry.uploads(owner, digest=digest, limit=limit))
        found = await asyncio.to_thread(lambda: [(row, file_behind(services, owner, row)) for row in rows])
        return FileUploadList(data=[upload_of(row, file) for row, file in found])

    @routes.get("/{upload_id}", summary="One upload, with the parts that are here")
    async def read(request: Request, upload_id: str) -> FileUploadWithParts:
        owner = owner_of(caller_of(request))
        row = await asyncio.to_thread(registry.get_upload, owner, upload_id)
        upload = upload_of(row, await asyncio.to_thread(file_behind, services, owner, row))
        parts = [part_of(part) for part in await asyncio.to_thread(registry.parts, row.id)]
        return FileUploadWithParts(**dict(upload), parts=parts)

    @routes.post(
        "/{upload_id}/parts", summary="Send a part: multipart part data, at most 64 MB", response_model=FilePart
    )
    async def add_part(request: Request, upload_id: str) -> JSONResponse:
        owner = owner_of(caller_of(request))
        await asyncio.to_thread(registry.check_part, owner, upload_id)
        folder = await asyncio.to_thread(files.store.stage)
        try:
            reader = FormReader(request.headers.get("content-type", ""), folder, PART)
            await fill(reader, pieces_of(request, services.settings.body_seconds))
            reader.check_whole()
            part = await asyncio.to_thread(files.add_part, owner, upload_id, content_of(reader, "data"))
        finally:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
        return JSONResponse(part_of(part).model_dump(mode="json"))

    @routes.post("/{upload_id}/complete", summary="Join the named parts in their order into a file")
    async def complete(request: Request, upload_id: str, body: CompleteBody) -> FileUpload:
        owner = owner_of(caller_of(request))
        async with services.lifecycle.one_at_a_time(f"upload {upload_id}"), services.bulk:
            row = await asyncio.to_thread(files.complete, owner, upload_id, body.part_ids, body.md5)
        return upload_of(row, await asyncio.to_thread(file_behind, services, owner, row))

    @routes.post("/{upload_id}/cancel", summary="End an upload without a file; its parts go")
    async def cancel(request: Request, upload_id: str) -> FileUpload:
        owner = owner_of(caller_of(request))
        async with services.lifecycle.one_at_a_time(f"upload {upload_id}"):
            row = await asyncio.to_thread(files.cancel, owner, upload_id)
        return upload_of(row, None)

    return routes


def file_behind(services: Services, owner: Owner, upload: UploadRow) -> FileRow | None:
    """The file that the upload became; None before, and once it is deleted."""
    if upload.file_id is None:
        return None
    try:
        return services.registry.get_file(owner, upload.file_id)
    except NotFound:
        return None
