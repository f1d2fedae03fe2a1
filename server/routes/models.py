"""The models a client can name: the base first, then one row per adapter that can answer."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter, Request

from adapters.errors import Conflict
from adapters.types import AdapterVersion
from server.catalogue import Adapter, all_adapters, shared_adapters
from server.resolve import find_version
from server.routes.versions import retire_version
from server.services import Services, caller_of
from server.wire import adapter_row, listing, version_row


def router(services: Services) -> APIRouter:
    routes = APIRouter(prefix="/v1/models", tags=["models"])

    @routes.get("", summary="The base first, then every adapter; view=all adds aliases, versions and residency")
    async def list_models(request: Request, view: Literal["models", "all"] = "models") -> dict[str, Any]:
        caller = caller_of(request)
        found = await all_adapters(services.registry, caller)
        is_full = view == "all"
        rows = [await base_row(services, is_full=is_full)] if is_full or services.merged is None else []
        named = await shared_adapters(services.registry, caller)
        if view == "all":
            context = await services.lifecycle.context_length_tokens(services)
            rows += [full_row(services, adapter, context) for adapter in found]
        else:
            named = [(adapter.name, adapter.stable) for adapter in found if adapter.stable] + named
        return listing(rows + [model_row(services, name, one) for name, one in named if can_answer(services, one)])

    @routes.get("/{model}", summary="One model by any of its ids")
    async def read_model(request: Request, model: str) -> dict[str, Any]:
        if model == services.base.id:
            return await base_row(services, is_full=False)
        version = await find_version(services, caller_of(request), model)
        return {**version_row(services, version), **model_row(services, model, version)}

    @routes.get("/{owner}/{model}", summary="One model that another tenant shares, OWNER/NAME")
    async def read_shared_model(request: Request, owner: str, model: str) -> dict[str, Any]:
        shown = f"{owner}/{model}"
        return model_row(services, shown, await find_version(services, caller_of(request), shown))

    @routes.delete("/{model}", summary="Retire a version, named NAME@N; the only one that is ready with its aliases")
    async def delete_model(request: Request, model: str) -> dict[str, Any]:
        caller = caller_of(request)
        if model == services.base.id:
            raise Conflict("The base cannot be deleted.", param="model")
        version = await find_version(services, caller, model)
        if model != version.ref:
            raise Conflict(f"Name the version to retire: {version.ref} is what {model} is now.", param="model")
        await retire_version(services, caller, version.name, version.number, with_aliases=True)
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


def full_row(services: Services, adapter: Adapter, context_length_tokens: int) -> dict[str, Any]:
    """All there is about one adapter, whether or not it can answer now."""
    if adapter.stable is not None:
        row = model_row(services, adapter.name, adapter.stable)
    else:
        row = {"id": adapter.name, "object": "model", "created": 0, "owned_by": adapter.versions[0].tenant}
    full = adapter_row(services, adapter)
    return {**row, "aliases": full["aliases"], "versions": full["versions"], "max_model_len": context_length_tokens}


def can_answer(services: Services, version: AdapterVersion) -> bool:
    return services.servable.may_answer(version)


def model_row(services: Services, model: str, version: AdapterVersion) -> dict[str, Any]:
    return {
        "id": model,
        "object": "model",
        "created": int(version.created_at),
        "owned_by": version.tenant,
        "root": f"{version.tenant}/{version.ref}" if "/" in model else version.ref,
        "parent": services.base.id,
    }
