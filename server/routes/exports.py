"""Exports: merge on demand. Order one, watch it, fetch it, cancel it."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from pydantic import BaseModel, ConfigDict

from adapters.errors import NotFound
from adapters.export import MANIFEST
from adapters.export_rows import ExportRow, no_export
from adapters.staging import sha256
from server.exports import ExportOrder
from server.idempotency import idempotent
from server.resolve import own_name
from server.services import Caller, Services, caller_of
from server.tar import TarResponse
from server.wire import listing


class ExportBody(BaseModel):
    """What to export: `model` is NAME, NAME@N or NAME@ALIAS."""

    model_config = ConfigDict(extra="forbid", strict=True)
    model: str
    format: str = "hf"
    dtype: str | None = None
    parity: bool = True


def router(services: Services) -> APIRouter:
    routes = APIRouter(prefix="/v1/exports", tags=["exports"])
    exports, registry = services.exports, services.registry

    @routes.post("", summary="Merge a version into its base, as a job", status_code=202)
    async def order(request: Request, body: ExportBody) -> JSONResponse:
        caller = caller_of(request)

        async def act() -> tuple[int, dict[str, Any]]:
            own_name(caller, body.model.partition("@")[0])
            wanted = ExportOrder(body.model, body.format, body.dtype, body.parity)
            row = await exports.submit(caller.tenant, wanted, caller.actor)
            return 202, export_row(row, await services.keyring.is_open())

        status, answer = await idempotent(services, request, body.model_dump_json(), act)
        return JSONResponse(answer, status_code=status)

    @routes.get("", summary="All exports, newest first")
    async def list_exports(request: Request) -> dict[str, Any]:
        caller = caller_of(request)
        rows = await asyncio.to_thread(registry.exports, caller.tenant)
        is_open = await services.keyring.is_open()
        return listing([export_row(row, is_open) for row in reversed(rows) if caller.may_touch(name_of(row))])

    @routes.get("/{export_id}", summary="How far it is; its files and parity report once it has ended")
    async def read(request: Request, export_id: str) -> dict[str, Any]:
        row = await own_export(services, caller_of(request), export_id)
        return export_row(row, await services.keyring.is_open())

    @routes.get("/{export_id}/content", summary="The folder as a tar stream, or one file of it with ?file=NAME")
    async def content(request: Request, export_id: str, file: str | None = Query(None)) -> Response:
        row = await own_export(services, caller_of(request), export_id)
        folder = exports.folder(row)
        if not folder.is_dir():
            raise NotFound(f"The files of {row.id} are no longer there: export {row.ref} again.", param="id")
        names = sorted(path.name for path in folder.iterdir())
        if file is not None:
            if file not in names:
                raise NotFound(f"{row.id} has no such file; it has {', '.join(names)}.", param="file")
            return FileResponse(folder / file, filename=file, media_type="application/octet-stream")
        headers = {
            "content-disposition": f'attachment; filename="{row.ref.replace("@", "-")}.tar"',
            "etag": f'"{await asyncio.to_thread(sha256, folder / MANIFEST)}"',
        }
        return TarResponse(folder, headers)

    @routes.post("/{export_id}/cancel", summary="End it; one that ended already stays as it is")
    async def cancel(request: Request, export_id: str) -> dict[str, Any]:
        row = await own_export(services, caller_of(request), export_id)
        return export_row(await exports.cancel(row.tenant, row.id), await services.keyring.is_open())

    return routes


async def own_export(services: Services, caller: Caller, export_id: str) -> ExportRow:
    """One export of the caller's tenant, of an adapter that its key may touch; raises NotFound."""
    row = await asyncio.to_thread(services.registry.get_export, caller.tenant, export_id)
    if not caller.may_touch(name_of(row)):
        raise no_export(export_id)
    return row


def name_of(row: ExportRow) -> str:
    return row.ref.partition("@")[0]


def export_row(row: ExportRow, is_open: bool) -> dict[str, Any]:
    """One export on the wire. Its folder is told only without keys: every caller is on this machine then."""
    report = dict(row.report or {})
    return {
        "id": row.id,
        "object": "export",
        "model": row.ref,
        "format": row.format,
        "dtype": row.options.get("dtype"),
        "status": str(row.status),
        "progress": row.progress,
        "created_at": int(row.created_at),
        "finished_at": int(row.finished_at) if row.finished_at else None,
        "path": row.path if is_open else None,
        "size_bytes": report.get("size_bytes"),
        "files": report.get("files"),
        "lacking": report.get("lacking"),
        "parity": report.get("parity"),
        "error": row.error,
    }
