"""What the caller's tenant used, by day and model."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Query, Request

from adapters.types import check_name
from server.errors import Forbidden
from server.services import Services, caller_of
from server.usage import FLUSH_SECONDS
from server.wire import listing

DAY = r"^\d{4}-\d{2}-\d{2}$"


def router(services: Services) -> APIRouter:
    routes = APIRouter(prefix="/v1/usage", tags=["usage"])

    @routes.get("", summary="Sums by tenant, day (UTC) and model; of days from start to end, both included")
    async def read_usage(
        request: Request,
        start: str | None = Query(None, pattern=DAY),
        end: str | None = Query(None, pattern=DAY),
        model: str | None = Query(None, max_length=200),
        tenant: str | None = Query(None, description="Another tenant, or `*` for all: with the scope admin."),
    ) -> dict[str, Any]:
        caller = caller_of(request)
        wanted: str | None = caller.tenant
        if tenant is not None:
            if "admin" not in caller.scopes:
                raise Forbidden("The usage of a named tenant needs the scope admin.", param="tenant")
            wanted = None if tenant == "*" else check_name(tenant, "tenant")
        await services.usage.flush()
        rows = await asyncio.to_thread(lambda: services.registry.usage(wanted, start=start, end=end, model=model))
        data = [{"object": "usage", **row.as_dict()} for row in rows if caller.may_touch(adapter_of(row.model))]
        return {**listing(data), "lost_at_most_seconds": FLUSH_SECONDS}

    return routes


def adapter_of(model: str) -> str:
    """The adapter's name, or the base's id, in the id of a concrete model."""
    return model.partition("@")[0]
