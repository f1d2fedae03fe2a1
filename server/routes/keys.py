"""Keys, for the operator: make one, list them, revoke one."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from adapters.keys import MAX_LIFE_SECONDS, ApiKey, NewKey
from adapters.limits import UseLimits
from adapters.types import DEFAULT_TENANT, Priority
from server.services import Services, caller_of
from server.wire import listing


class KeyBody(BaseModel):
    """What the key may do, for whom, how long and how much."""

    model_config = ConfigDict(extra="forbid", strict=True)
    tenant: str = DEFAULT_TENANT
    scopes: list[str]
    name: str | None = None
    adapters: list[str] | None = None
    limits: dict[str, int | None] = Field(default_factory=dict)
    priority: str = Priority.NORMAL
    expires_in_seconds: int | None = Field(None, ge=1, le=MAX_LIFE_SECONDS)


def router(services: Services) -> APIRouter:
    routes = APIRouter(prefix="/v1/keys", tags=["keys"])
    registry = services.registry

    @routes.post("", status_code=201, summary="Make a key; the answer is the only place where it can be read")
    async def create_key(request: Request, body: KeyBody) -> dict[str, Any]:
        new = new_key(body)
        actor = caller_of(request).actor
        row, secret = await asyncio.to_thread(lambda: registry.add_key(new, services.keyring.pepper, actor=actor))
        return {**key_row(row), "key": secret}

    @routes.get("", summary="Every key of every tenant, without the keys themselves")
    async def list_keys(tenant: str | None = None) -> dict[str, Any]:
        return listing([key_row(row) for row in await asyncio.to_thread(registry.keys, tenant)])

    @routes.delete("/{key_id}", summary="Revoke a key: it opens nothing from this answer on")
    async def revoke_key(request: Request, key_id: str) -> dict[str, Any]:
        actor = caller_of(request).actor
        return key_row(await asyncio.to_thread(lambda: registry.revoke_key(key_id, actor=actor)))

    return routes


def new_key(body: KeyBody) -> NewKey:
    """The body as what the registry takes; raises InvalidRequest or NameInvalid."""
    expires_at = None if body.expires_in_seconds is None else time.time() + body.expires_in_seconds
    limits = UseLimits.read(body.limits)
    return NewKey(body.tenant, body.scopes, body.name, body.adapters, limits, expires_at, body.priority)


def key_row(row: ApiKey) -> dict[str, Any]:
    """One key on the wire."""
    return {
        "id": row.id,
        "object": "api_key",
        "prefix": row.prefix,
        "tenant": row.tenant,
        "name": row.name,
        "scopes": list(row.scopes),
        "adapters": None if row.adapters is None else list(row.adapters),
        "limits": row.limits.as_dict(),
        "priority": row.priority,
        "created_at": int(row.created_at),
        "expires_at": None if row.expires_at is None else int(row.expires_at),
        "revoked_at": None if row.revoked_at is None else int(row.revoked_at),
        "is_valid": row.is_valid(time.time()),
    }
