"""Tenants, for the operator: their limits, what they store, and what they share."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict

from adapters.limits import UseLimits
from adapters.tenants import Grant, Tenant
from adapters.types import check_name
from server.services import Services, caller_of
from server.wire import listing


class TenantBody(BaseModel):
    """The tenant's limits, all of them: one that is left out is no limit."""

    model_config = ConfigDict(extra="forbid", strict=True)
    limits: dict[str, int | None] | None = None


def router(services: Services) -> APIRouter:
    routes = APIRouter(prefix="/v1/tenants", tags=["tenants"])
    registry = services.registry

    @routes.get("", summary="Every tenant with its limits and what it stores")
    async def list_tenants() -> dict[str, Any]:
        return listing([tenant_row(tenant) for tenant in await asyncio.to_thread(registry.tenants)])

    @routes.get("/{tenant}", summary="One tenant")
    async def read_tenant(tenant: str) -> dict[str, Any]:
        return tenant_row(await asyncio.to_thread(registry.get_tenant, check_name(tenant, "tenant")))

    @routes.put("/{tenant}", summary="Make a tenant, or set the limits of one")
    async def set_tenant(request: Request, tenant: str, body: TenantBody) -> dict[str, Any]:
        limits = None if body.limits is None else UseLimits.read(body.limits)
        actor = caller_of(request).actor
        return tenant_row(await asyncio.to_thread(lambda: registry.add_tenant(tenant, limits, actor=actor)))

    @routes.get("/{tenant}/grants", summary="The adapters that the tenant shares, and those that are shared with it")
    async def list_grants(tenant: str) -> dict[str, Any]:
        await asyncio.to_thread(registry.get_tenant, check_name(tenant, "tenant"))
        given = await asyncio.to_thread(lambda: registry.grants(tenant=tenant))
        taken = await asyncio.to_thread(lambda: registry.grants(grantee=tenant))
        return listing([grant_row(grant) for grant in given + taken])

    @routes.put("/{tenant}/grants/{name}/{grantee}", summary="Let another tenant ask the adapter for answers")
    async def share(request: Request, tenant: str, name: str, grantee: str) -> dict[str, Any]:
        wanted = (check_name(tenant, "tenant"), check_name(name), check_name(grantee, "grantee"))
        actor = caller_of(request).actor
        return grant_row(await asyncio.to_thread(lambda: registry.add_grant(*wanted, actor=actor)))

    @routes.delete("/{tenant}/grants/{name}/{grantee}", summary="Share no more, from the next request on")
    async def unshare(request: Request, tenant: str, name: str, grantee: str) -> dict[str, Any]:
        wanted = (check_name(tenant, "tenant"), check_name(name), check_name(grantee, "grantee"))
        actor = caller_of(request).actor
        await asyncio.to_thread(lambda: registry.remove_grant(*wanted, actor=actor))
        return removed_grant_row(*wanted)

    return routes


def tenant_row(tenant: Tenant) -> dict[str, Any]:
    """One tenant on the wire."""
    return {
        "id": tenant.id,
        "object": "tenant",
        "created_at": int(tenant.created_at),
        "limits": tenant.limits.as_dict(),
        "adapters": tenant.adapters,
        "versions": tenant.versions,
        "stored_bytes": tenant.stored_bytes,
        "files": tenant.files,
        "file_bytes": tenant.file_bytes,
        "upload_parts": tenant.upload_parts,
        "export_bytes": tenant.export_bytes,
    }


def removed_grant_row(tenant: str, name: str, grantee: str) -> dict[str, Any]:
    """A grant that is no more, on the wire."""
    return {"object": "grant", "model": f"{tenant}/{name}", "grantee": grantee, "deleted": True}


def grant_row(grant: Grant) -> dict[str, Any]:
    """One grant on the wire; `model` is how the grantee names the adapter."""
    return {
        "object": "grant",
        "model": f"{grant.tenant}/{grant.name}",
        "tenant": grant.tenant,
        "name": grant.name,
        "grantee": grant.grantee,
        "created_at": int(grant.created_at),
    }
