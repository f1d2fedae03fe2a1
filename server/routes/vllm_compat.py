"""`/v1/load_lora_adapter` and `/v1/unload_lora_adapter` with vLLM's bodies and texts, for programs that speak them.

Behind a load is a version: pulled from an allowed source, checked, proven, promoted to `stable`. Behind an unload the
alias goes, and the versions stay. vLLM 0.32: vllm/entrypoints/serve/lora, vllm/entrypoints/openai/models/serving.py.
"""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, ConfigDict, Field

from adapters.errors import (
    AdapterRefused,
    EngineUnavailable,
    InvalidRequest,
    ModelNotFound,
    NotServable,
    Problem,
    UnknownParameter,
)
from adapters.publish import preview
from adapters.registry import not_servable
from adapters.types import STABLE, AdapterRef, AdapterVersion, VersionStatus
from server.errors import Forbidden, RouteNotFound
from server.residency import Residency
from server.resolve import name_to_make, own_name
from server.routes.sources import MAX_URL
from server.routes.versions import move
from server.services import Caller, Services, caller_of
from server.sources import SETTING, Pull, detached, is_for_served_base, locate, pull, with_files

PROOF_SECONDS = 600.0
DRAIN_SECONDS = 60.0
POLL_SECONDS = 0.05


class LoadBody(BaseModel):
    """vLLM's fields, and `base_model_name`, which syncers send and vLLM does not read either."""

    model_config = ConfigDict(extra="forbid", strict=True)
    lora_name: str
    lora_path: str = Field(max_length=MAX_URL)
    load_inplace: bool = False
    is_3d_lora_weight: bool = False
    base_model_name: str | None = None


class UnloadBody(BaseModel):
    """vLLM's fields; it reads no `lora_int_id` either."""

    model_config = ConfigDict(extra="forbid", strict=True)
    lora_name: str
    lora_int_id: int | None = None


def router(services: Services) -> APIRouter:
    routes = APIRouter(prefix="/v1", tags=["vllm"])

    @routes.post(
        "/load_lora_adapter", response_class=PlainTextResponse, summary="As vLLM's: have lora_path answer as lora_name"
    )
    async def load(request: Request, body: LoadBody) -> PlainTextResponse:
        caller = caller_of(request)
        check_on(services, caller)
        if "upload" not in caller.scopes:
            raise Forbidden("This needs the scope upload beside promote, which the key does not have.")
        if not body.lora_name or not body.lora_path:
            raise InvalidRequest("Both 'lora_name' and 'lora_path' must be provided.", param="lora_name")
        if body.is_3d_lora_weight:
            raise UnknownParameter("is_3d_lora_weight can only be false here.", param="is_3d_lora_weight")
        name = name_to_make(caller, body.lora_name)
        async with services.lifecycle.one_at_a_time(f"load {caller.tenant}/{name}"):
            await load_adapter(services, caller, name, body)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    @routes.post(
        "/unload_lora_adapter", response_class=PlainTextResponse, summary="As vLLM's: lora_name answers no more"
    )
    async def unload(request: Request, body: UnloadBody) -> PlainTextResponse:
        caller = caller_of(request)
        check_on(services, caller)
        if not body.lora_name:
            raise InvalidRequest("'lora_name' needs to be provided to unload a LoRA adapter.", param="lora_name")
        name = own_name(caller, body.lora_name)
        async with services.lifecycle.one_at_a_time(f"load {caller.tenant}/{name}"):
            await unload_adapter(services, caller, name)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")

    return routes


def check_on(services: Services, caller: Caller) -> None:
    """vLLM has no such route either until it is told to; its clients read a 404 as that."""
    if not any(watched.settings.tenant == caller.tenant for watched in services.sources):
        raise RouteNotFound(
            f"Loading from paths is off: the operator allows no source for this tenant in {SETTING} (docs/sources.md)."
        )


async def load_adapter(services: Services, caller: Caller, name: str, body: LoadBody) -> None:
    """The adapter at the path becomes what the name means, once it is proven; raises what an upload would."""
    watched, inner = locate(services, caller, body.lora_path)
    found = await detached(lambda: watched.source.find(inner))
    wanted = Pull(watched, found, name, caller, is_base_served=True)
    stable = await stable_of(services, caller, name)
    if stable is not None and not body.load_inplace:
        if await digest_of(services, wanted) == stable.digest:
            return
        raise InvalidRequest(
            f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, set "
            "'load_inplace' to True.",
            param="lora_name",
        )
    version = await proven(services, await pull(services, wanted))
    await drained(services, version)
    await move(services, caller, (name, STABLE), version.number, None)


async def unload_adapter(services: Services, caller: Caller, name: str) -> None:
    """The name means nothing any more; its version leaves the engine unless another alias names it."""
    stable = await stable_of(services, caller, name)
    if stable is None:
        raise ModelNotFound(f"The lora adapter '{name}' cannot be found.", param="lora_name")
    registry = services.registry
    await asyncio.to_thread(lambda: registry.remove_alias(caller.tenant, name, STABLE, actor=caller.actor))
    others = await asyncio.to_thread(registry.aliases, caller.tenant, name)
    candidates = {alias.candidate.number for alias in others if alias.candidate}
    if stable.number not in candidates | {alias.number for alias in others}:
        await asyncio.to_thread(
            lambda: registry.set_warm(caller.tenant, name, stable.number, False, actor=caller.actor)
        )
        services.lifecycle.spawn(services.residents.drop(stable))


async def stable_of(services: Services, caller: Caller, name: str) -> AdapterVersion | None:
    """What the bare name means now."""
    with contextlib.suppress(ModelNotFound):
        return await asyncio.to_thread(services.registry.resolve, AdapterRef(name, alias=STABLE, tenant=caller.tenant))
    return None


async def digest_of(services: Services, wanted: Pull) -> str:
    """The digest that a version of these files would have; nothing is stored."""

    async def read(folder: Path) -> str:
        context = await services.publish_context(wanted.caller)
        is_served = is_for_served_base(wanted)
        found = await asyncio.to_thread(lambda: preview(folder, context=context, base_is_served=is_served))
        return str(found["digest"])

    return await with_files(services, wanted, read)


async def proven(services: Services, version: AdapterVersion) -> AdapterVersion:
    """The version once it is ready; raises AdapterRefused with the figures when it is rejected, NotServable."""
    version = await services.prover.wait(version, PROOF_SECONDS)
    if version.status is VersionStatus.REJECTED:
        problems = tuple(Problem(**reason) for reason in version.reasons)
        raise AdapterRefused(f"{version.ref} was rejected: {problems[0].message}", problems=problems)
    if version.status is VersionStatus.QUARANTINED and not version.reasons:
        raise EngineUnavailable(f"{version.ref} is not proven yet: the engine is not there. Ask again.")
    if version.status is not VersionStatus.READY:
        raise not_servable(version)
    return version


async def drained(services: Services, version: AdapterVersion) -> None:
    """Wait while the version leaves the engine, which an unload just before has begun."""
    for _ in range(round(DRAIN_SECONDS / POLL_SECONDS)):
        if services.residents.state_of(version) is not Residency.DRAINING:
            return
        await asyncio.sleep(POLL_SECONDS)
    raise NotServable(f"{version.ref} is still leaving the engine: running answers hold it.", param="lora_name")
