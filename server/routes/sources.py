"""Sources, as the operator sees them, and one adapter pulled when it is asked for."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from adapters.errors import HotshoeError
from server.idempotency import idempotent
from server.resolve import name_to_make
from server.routes.adapters import MAX_WAIT_SECONDS, shown
from server.services import Services, caller_of
from server.sources import Pull, Seen, WatchedSource, detached, locate, pull
from server.wire import listing

MAX_SHOWN = 1000
MAX_URL = 4096


class PullBody(BaseModel):
    """As which adapter, and from where: a URL or path inside an allowed source."""

    model_config = ConfigDict(extra="forbid", strict=True)
    name: str
    source: str = Field(min_length=1, max_length=MAX_URL)
    base_is: Literal["served"] | None = None


def router(services: Services) -> APIRouter:
    routes = APIRouter(prefix="/v1/sources", tags=["sources"])

    @routes.get("", summary="Every source, when it was looked at, and what became of what lies there")
    async def list_sources() -> dict[str, Any]:
        return listing([source_row(watched) for watched in services.sources])

    @routes.post("/pull", status_code=201, summary="Make one adapter of an allowed source a version, as an upload does")
    async def pull_one(
        request: Request, body: PullBody, wait: float = Query(0.0, ge=0, le=MAX_WAIT_SECONDS)
    ) -> JSONResponse:
        caller = caller_of(request)
        name = name_to_make(caller, body.name)

        async def act() -> tuple[int, dict[str, Any]]:
            watched, inner = locate(services, caller, body.source)
            found = await detached(lambda: watched.source.find(inner))
            version = await pull(services, Pull(watched, found, name, caller, body.base_is == "served"))
            return 201 if version.is_new else 200, await shown(services, version)

        status, row = await idempotent(services, request, f"{name} {body.source} {body.base_is}", act)
        if wait:
            version = await asyncio.to_thread(services.registry.get, caller.tenant, name, int(row["version"]))
            row = await shown(services, await services.prover.wait(version, wait))
        return JSONResponse(row, status_code=status)

    return routes


def source_row(watched: WatchedSource) -> dict[str, Any]:
    """One source on the wire; no credentials, and at most MAX_SHOWN of its adapters."""
    settings, seen = watched.settings, sorted(watched.seen.values(), key=lambda one: one.location)
    return {
        "id": settings.name,
        "object": "source",
        "url": settings.url,
        "tenant": settings.tenant,
        "every_seconds": settings.every_seconds,
        "looked_at": None if watched.looked_at is None else int(watched.looked_at),
        "failures": watched.failures,
        "error": error_row(watched.error),
        "adapters_total": len(seen),
        "adapters": [seen_row(one) for one in seen[:MAX_SHOWN]],
    }


def seen_row(seen: Seen) -> dict[str, Any]:
    reason = None if seen.code is None else {"code": seen.code, "message": seen.message}
    return {
        "name": seen.name,
        "location": seen.location,
        "state": seen.state,
        "version": seen.version,
        "reason": reason,
        "at": int(seen.at),
    }


def error_row(error: HotshoeError | None) -> dict[str, Any] | None:
    return None if error is None else {"code": error.wire_code, "message": error.message}
