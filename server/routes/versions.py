"""What moves: promote an alias, try a candidate on a share of its requests, roll back, preload, retire."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from adapters.alias_rows import check_share
from adapters.errors import EngineUnavailable, InvalidRequest
from adapters.job_rows import JobRow
from adapters.types import STABLE, AdapterVersion, Candidate, check_name
from server.gate import pass_gate
from server.idempotency import idempotent
from server.resolve import own_name
from server.routes.adapters import own_version, shown
from server.services import Caller, Services, caller_of
from server.tasks import at_most
from server.wire import MAX_NUMBER, VersionNumber, alias_row

LOAD_BEFORE_MOVE_SECONDS = 60.0


class AliasBody(BaseModel):
    """The version that the alias shall name, or the candidate that gets a share of its requests (null: none does)."""

    model_config = ConfigDict(extra="forbid", strict=True)
    version: int | None = Field(None, ge=1, le=MAX_NUMBER)
    candidate: int | None = Field(None, ge=1, le=MAX_NUMBER)
    share: float | None = Field(None, json_schema_extra={"exclusiveMinimum": 0, "exclusiveMaximum": 1})

    def change(self) -> int | Candidate | None:
        """The version to promote, the candidate to try, or None to try none; raises InvalidRequest."""
        given = {name for name in self.model_fields_set if getattr(self, name) is not None}
        if given == {"version"} and self.version is not None:
            return self.version
        if self.candidate is not None and self.share is not None and self.version is None:
            return Candidate(self.candidate, check_share(self.share))
        if "candidate" in self.model_fields_set and not given:
            return None
        raise InvalidRequest(
            "Send one of: version, to promote it; candidate and share, to try it on a part of the requests; "
            "candidate null, to try none.",
            param="version",
        )


class RollbackBody(BaseModel):
    """Which alias goes back; `stable` when it is not said."""

    model_config = ConfigDict(extra="forbid", strict=True)
    alias: str = STABLE


def router(services: Services) -> APIRouter:
    routes = APIRouter(prefix="/v1/adapters/{name}", tags=["versions"])

    @routes.put("/aliases/{alias}", summary="Promote: the alias names this version from now on; or try a candidate")
    async def change_alias(request: Request, name: str, alias: str, body: AliasBody) -> JSONResponse:
        caller = caller_of(request)
        change, expected = body.change(), generation_of(request)

        async def act() -> tuple[int, dict[str, Any]]:
            where = (own_name(caller, name), check_name(alias, "alias"))
            if isinstance(change, int):
                return 200, await move(services, caller, where, change, expected)
            return 200, await try_candidate(services, caller, where, change, expected)

        return tagged(*await idempotent(services, request, f"{expected} {change}", act))

    @routes.post("/rollback", summary="The alias names again what it named before, and has no candidate")
    async def roll_back(request: Request, name: str, body: RollbackBody | None = None) -> JSONResponse:
        caller = caller_of(request)
        alias = check_name((body or RollbackBody()).alias, "alias")

        async def act() -> tuple[int, dict[str, Any]]:
            moved = await asyncio.to_thread(
                lambda: services.registry.rollback(caller.tenant, own_name(caller, name), alias, actor=caller.actor)
            )
            return 200, alias_row(moved)

        return tagged(*await idempotent(services, request, alias, act))

    @routes.post("/versions/{number}/warm", summary="Load the version into the engine and keep it wanted there")
    async def warm(request: Request, name: str, number: VersionNumber) -> dict[str, Any]:
        version = await own_version(services, request, name, number)
        services.servable.check(version, is_tried_again=True)
        resident = await services.residents.warm(version)
        row = await shown(services, await refreshed(services, version))
        return {**row, "load_seconds": resident.load_seconds}

    @routes.delete(
        "/versions/{number}", summary="Retire the version: it answers no more, and leaves the engine once it is idle"
    )
    async def retire(request: Request, name: str, number: VersionNumber) -> JSONResponse:
        caller = caller_of(request)

        async def act() -> tuple[int, dict[str, Any]]:
            return 200, await retire_version(services, caller, own_name(caller, name), number)

        status, body = await idempotent(services, request, str(number), act)
        return JSONResponse(body, status_code=status)

    return routes


def generation_of(request: Request) -> int | None:
    """The generation in If-Match: `"3"`, `"0"` for an alias that does not exist yet; None without the header."""
    text = request.headers.get("if-match")
    if text is None or text.strip() == "*":
        return None
    digits = text.strip().removeprefix("W/").strip('"')
    if not (digits.isascii() and digits.isdigit() and len(digits) < 10):
        raise InvalidRequest('If-Match must be the alias\'s generation, as in "3".', param="if-match")
    return int(digits)


def tagged(status: int, body: dict[str, Any]) -> JSONResponse:
    """An alias with its generation as ETag."""
    return JSONResponse(body, status_code=status, headers={"etag": f'"{body["generation"]}"'})


async def move(
    services: Services,
    caller: Caller,
    alias: tuple[str, str],
    number: int,
    expected: int | None,
    job: JobRow | None = None,
) -> dict[str, Any]:
    """Load first, then move: no request of the alias's waits for the load. The move itself is one compare-and-swap.

    For a fine-tuning `job` it is only made while the job is its worker's; raises LeaseLost.
    """
    name, label = alias
    await load_first(services, caller, name, number)
    shown_at_gate = await pass_gate(services, caller, name, label, number)
    moved = await asyncio.to_thread(
        lambda: services.registry.move_alias(
            caller.tenant, name, label, number, expected_generation=expected, actor=caller.actor, job=job
        )
    )
    return alias_row(moved) | ({"gate": shown_at_gate} if shown_at_gate else {})


async def try_candidate(
    services: Services, caller: Caller, alias: tuple[str, str], candidate: Candidate | None, expected: int | None
) -> dict[str, Any]:
    """Load first, then give it its share; None ends the share."""
    name, label = alias
    if candidate is not None:
        await load_first(services, caller, name, candidate.number)
    changed = await asyncio.to_thread(
        lambda: services.registry.set_candidate(
            caller.tenant, name, label, candidate, expected_generation=expected, actor=caller.actor
        )
    )
    return alias_row(changed)


async def load_first(services: Services, caller: Caller, name: str, number: int) -> None:
    """Have a version in the engine that requests will soon be given; raises NotServable where they may not be."""
    version = await asyncio.to_thread(services.registry.get, caller.tenant, name, number)
    services.servable.check(version)
    with contextlib.suppress(EngineUnavailable):  # the first request loads it then
        await at_most(LOAD_BEFORE_MOVE_SECONDS, services.residents.warm(version))


async def retire_version(
    services: Services, caller: Caller, name: str, number: int, *, with_aliases: bool = False
) -> dict[str, Any]:
    """The row is retired now; requests that run on it end, then it leaves the engine."""
    version = await asyncio.to_thread(
        lambda: services.registry.retire(caller.tenant, name, number, actor=caller.actor, with_aliases=with_aliases)
    )
    services.lifecycle.spawn(services.residents.drop(version))
    return await shown(services, version)


async def refreshed(services: Services, version: AdapterVersion) -> AdapterVersion:
    return await asyncio.to_thread(services.registry.get, version.tenant, version.name, version.number)
