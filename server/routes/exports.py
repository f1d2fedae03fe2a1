"""Exports: merge on demand. Order one, watch it, fetch it, cancel it, delete it."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from adapters.export_rows import ExportRow, no_export
from adapters.paging import Page
from server.export_content import content_response
from server.export_order import ExportOrder, order_of
from server.idempotency import idempotent
from server.resolve import own_name
from server.services import Caller, Services, caller_of
from server.wire import After, Limit, listing

MAX_SHARD_BYTES = 1 << 50


class ExportBody(BaseModel):
    """What to export: `model` is NAME, NAME@N or NAME@ALIAS."""

    model_config = ConfigDict(extra="forbid", strict=True)
    model: str
    format: str = "hf"
    dtype: str | None = None
    parity: bool = True
    shard_bytes: int | None = Field(None, ge=1, le=MAX_SHARD_BYTES)
    merge_into: str | None = None

    def order(self) -> ExportOrder:
        return ExportOrder(self.model, self.format, self.dtype, self.parity, self.shard_bytes, self.merge_into)


def router(services: Services) -> APIRouter:
    routes = APIRouter(prefix="/v1/exports", tags=["exports"])
    exports, registry = services.exports, services.registry

    @routes.post("", summary="Merge a version into its base, as a job", status_code=202)
    async def order(request: Request, body: ExportBody) -> JSONResponse:
        caller = caller_of(request)

        async def act() -> tuple[int, dict[str, Any]]:
            own_name(caller, body.model.partition("@")[0])
            row = await exports.submit(caller.tenant, body.order(), caller.actor)
            return 202, export_row(row, await services.keyring.is_open())

        status, answer = await idempotent(services, request, body.model_dump_json(), act)
        return JSONResponse(answer, status_code=status)

    @routes.get("", summary="The exports, newest first; go on with ?after=ID")
    async def list_exports(request: Request, after: After = None, limit: Limit = 20) -> dict[str, Any]:
        caller = caller_of(request)
        adapters = caller.key.adapters if caller.key is not None else None
        found = await asyncio.to_thread(registry.exports, caller.tenant, Page(after, limit + 1), adapters)
        is_open = await services.keyring.is_open()
        shown = [export_row(row, is_open) for row in found[:limit]]
        return {**listing(shown), "has_more": len(found) > limit}

    @routes.get("/{export_id}", summary="How far it is; its files and parity report once it has ended")
    async def read(request: Request, export_id: str) -> dict[str, Any]:
        row = await own_export(services, caller_of(request), export_id)
        return export_row(row, await services.keyring.is_open())

    @routes.delete("/{export_id}", summary="Forget one that has ended, and its result")
    async def delete(request: Request, export_id: str) -> dict[str, Any]:
        caller = caller_of(request)
        row = await own_export(services, caller, export_id)
        await exports.delete(row.tenant, row.id, caller.actor)
        return {"id": row.id, "object": "export", "deleted": True}

    @routes.get("/{export_id}/content", summary="The folder as a tar, or one file of it with ?file=NAME; takes Range")
    async def content(request: Request, export_id: str, file: str | None = Query(None)) -> Response:
        row = await own_export(services, caller_of(request), export_id)
        exports.check_content(row)
        return content_response(exports.results, row, file)

    @routes.head("/{export_id}/content", summary="Length and ETag of the folder as a tar, or of one file of it")
    async def content_head(request: Request, export_id: str, file: str | None = Query(None)) -> Response:
        return await content(request, export_id, file)

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
    report, asked = dict(row.report or {}), order_of(row)
    return {
        "id": row.id,
        "object": "export",
        "model": row.ref,
        "format": row.format,
        "dtype": asked.dtype,
        "shard_bytes": asked.shard_bytes,
        "merge_into": asked.merge_into,
        "status": str(row.status),
        "progress": row.progress,
        "stage": row.stage,
        "bytes_done": row.bytes_done,
        "bytes_total": row.bytes_total,
        "attempts": row.attempts,
        "created_at": int(row.created_at),
        "finished_at": int(row.finished_at) if row.finished_at else None,
        "expires_at": int(row.expires_at) if row.expires_at else None,
        "has_content": row.has_result(time.time()),
        "path": row.path if is_open else None,
        "size_bytes": report.get("size_bytes"),
        "files": report.get("files"),
        "lacking": report.get("lacking"),
        "parity": report.get("parity"),
        "error": row.error,
    }
