"""Files, as OpenAI's client calls them: send one, list, read, fetch, delete."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse, JSONResponse
from openai.types import FileDeleted

from adapters.errors import InvalidRequest
from adapters.file_rows import PURPOSES, RESULTS, FileQuery
from adapters.files import Content, NewFile, check_file
from adapters.limits import within
from server.file_wire import File, FileList, file_of, owner_of
from server.idempotency import idempotent
from server.multipart import FormReader, FormSpec, fill
from server.receiving import pieces_of
from server.services import Services, caller_of

ANCHOR, SECONDS = "expires_after[anchor]", "expires_after[seconds]"
TEXTS = {"purpose": 64, ANCHOR: 64, SECONDS: 64}
REQUIRED = ("file", "purpose")
STAGED = "content"
MAX_LISTED = 10_000
HEX_DIGEST = "^[0-9a-f]{64}$"


def router(services: Services) -> APIRouter:
    routes = APIRouter(prefix="/v1/files", tags=["files"])
    files, registry = services.files, services.registry

    @routes.post("", summary="Send a file: multipart parts file and purpose", response_model=File)
    async def create(request: Request) -> JSONResponse:
        owner = owner_of(caller_of(request))
        folder = await asyncio.to_thread(files.store.stage)
        try:
            reader = await received(services, request, folder)
            new, content = new_file(reader), content_of(reader, "file")
            check_file(new)

            async def act() -> tuple[int, dict[str, Any]]:
                row = await asyncio.to_thread(files.add, owner, new, content)
                return 200, file_of(row).model_dump(mode="json")

            status, body = await idempotent(services, request, f"{reader.fingerprint()} {new.filename}", act)
        finally:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
        return JSONResponse(body, status_code=status)

    @routes.get("", summary="The files, newest first; go on with ?after=ID")
    async def list_files(
        request: Request,
        purpose: str | None = Query(None),
        after: str | None = Query(None, max_length=64),
        limit: int = Query(MAX_LISTED, ge=1, le=MAX_LISTED),
        order: Literal["asc", "desc"] = Query("desc"),
        sha256: str | None = Query(None, pattern=HEX_DIGEST),
    ) -> FileList:
        known = (*PURPOSES, RESULTS)
        if purpose is not None and purpose not in known:
            raise InvalidRequest(f"purpose must be one of {', '.join(known)}.", param="purpose")
        digest = None if sha256 is None else f"sha256:{sha256}"
        query = FileQuery(purpose, digest, after, limit + 1, order == "asc")
        found = await asyncio.to_thread(registry.files, owner_of(caller_of(request)), query)
        data = [file_of(file) for file in found[:limit]]
        first, last = (data[0].id, data[-1].id) if data else (None, None)
        return FileList(data=data, first_id=first, last_id=last, has_more=len(found) > limit)

    @routes.get("/{file_id}", summary="One file, without its content")
    async def read(request: Request, file_id: str) -> File:
        owner = owner_of(caller_of(request))
        return file_of(await asyncio.to_thread(registry.get_file, owner, file_id))

    @routes.get("/{file_id}/content", summary="The content of a file")
    async def content(request: Request, file_id: str) -> FileResponse:
        file, path = await asyncio.to_thread(files.open, owner_of(caller_of(request)), file_id)
        headers = {"etag": f'"{file.digest}"'}
        return FileResponse(path, media_type="application/octet-stream", filename=file.filename, headers=headers)

    @routes.delete("/{file_id}", summary="Delete a file, for good")
    async def delete(request: Request, file_id: str) -> FileDeleted:
        file = await asyncio.to_thread(files.remove, owner_of(caller_of(request)), file_id)
        return FileDeleted(id=file.id, deleted=True, object="file")

    return routes


async def received(services: Services, request: Request, folder: Path) -> FormReader:
    """The form of a file, its content in the folder."""
    settings = services.settings
    tenant = caller_of(request).tenant
    most = within(settings.max_file_bytes, (await services.keyring.limits_of(tenant)).most_file_bytes)
    spec = FormSpec(TEXTS, {"file": (most, STAGED)}, REQUIRED)
    reader = FormReader(request.headers.get("content-type", ""), folder, spec)
    await fill(reader, pieces_of(request, settings.body_seconds))
    reader.check_whole()
    return reader


def new_file(reader: FormReader) -> NewFile:
    """What a form says of its file; raises InvalidRequest."""
    anchor, seconds = reader.text(ANCHOR), reader.text(SECONDS)
    if (anchor or seconds) and (anchor != "created_at" or not (seconds.isascii() and seconds.isdigit())):
        raise InvalidRequest("expires_after must have the anchor created_at and whole seconds.", param="expires_after")
    return NewFile(reader.text("purpose"), reader.parts["file"].filename, int(seconds) if seconds else None)


def content_of(reader: FormReader, name: str) -> Content:
    """The bytes of a form's file part, as they were received."""
    part = reader.parts[name]
    return Content(reader.folder / STAGED, part.size, part.digest)
