"""The models a client can name: the base first, then one row per adapter that can answer."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

from fastapi import APIRouter, Request

from adapters.errors import Conflict
from adapters.types import STABLE, AdapterVersion, VersionStatus
from server.resolve import find_version
from server.routes.adapters import one_adapter
from server.routes.versions import retire_version
from server.services import Caller, Services, caller_of
from server.wire import listing, version_row


def router(services: Services) -> APIRouter:
    routes = APIRouter(prefix="/v1/models", tags=["models"])

    @routes.get("", summary="The base first, then every adapter; view=all adds aliases, versions and residency")
    async def list_models(request: Request, view: Literal["models", "all"] = "models") -> dict[str, Any]:
        caller = caller_of(request)
        names = await asyncio.to_thread(services.registry.adapters, caller.tenant)
        rows = [await base_row(services, is_full=view == "all")]
        for name in names:
            rows += await adapter_rows(services, caller, name, is_full=view == "all")
        return listing(rows)

    @routes.get("/{model}", summary="One model by any of its ids")
    async def read_model(request: Request, model: str) -> dict[str, Any]:
        if model == services.base.id:
            return await base_row(services, is_full=False)
        version = await find_version(services, caller_of(request), model)
        return {**version_row(services, version), **model_row(services, model, version)}

    @routes.delete("/{model}", summary="Retire a version, named NAME@N")
    async def delete_model(request: Request, model: str) -> dict[str, Any]:
        caller = caller_of(request)
        if model == services.base.id:
            raise Conflict("The base cannot be deleted.", param="model")
        version = await find_version(services, caller, model)
        if model != version.ref:
            raise Conflict(f"Name the version to retire: {version.ref} is what {model} is now.", param="model")
        await retire_version(services, caller, version.name, version.number)
        return {"id": model, "object": "model", "deleted": True}

    return routes


async def base_row(services: Services, *, is_full: bool) -> dict[str, Any]:
    config = services.base.folder / "config.json"
    created = int(config.stat().st_mtime) if config.is_file() else 0
    row: dict[str, Any] = {"id": services.base.id, "object": "model", "created": created, "owned_by": "hotshoe"}
    if is_full:
        row |= {"root": services.base.id, "parent": None, "base_digest": services.base.digest}
        row["max_model_len"] = await services.lifecycle.context_length_tokens(services)
    return row


async def adapter_rows(services: Services, caller: Caller, name: str, *, is_full: bool) -> list[dict[str, Any]]:
    """One row for the name when its `stable` can answer; with `view=all` for every adapter, with its versions."""
    versions = await asyncio.to_thread(services.registry.versions, caller.tenant, name)
    aliases = await asyncio.to_thread(services.registry.aliases, caller.tenant, name)
    number = next((alias.number for alias in aliases if alias.alias == STABLE), None)
    stable = next((version for version in versions if version.number == number), None)
    if not is_full:
        return [model_row(services, name, stable)] if is_answering(services, stable) and stable else []
    row = (
        model_row(services, name, stable)
        if stable
        else {"id": name, "object": "model", "created": 0, "owned_by": "hotshoe"}
    )
    full = await one_adapter(services, caller.tenant, name)
    context = await services.lifecycle.context_length_tokens(services)
    return [{**row, "aliases": full["aliases"], "versions": full["versions"], "max_model_len": context}]


def is_answering(services: Services, version: AdapterVersion | None) -> bool:
    return version is not None and version.status is VersionStatus.READY and version.base_digest == services.base.digest


def model_row(services: Services, model: str, version: AdapterVersion) -> dict[str, Any]:
    return {
        "id": model,
        "object": "model",
        "created": int(version.created_at),
        "owned_by": version.tenant,
        "root": version.ref,
        "parent": services.base.id,
    }
