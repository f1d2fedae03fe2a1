"""The gate of an adapter: what a promote of its `stable` has to show."""

from __future__ import annotations

import asyncio
import json
from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from adapters.errors import NotFound
from server.gate import CHAT, MAX_ROWS, Gate, check_gate
from server.inference import read_request
from server.resolve import own_name
from server.services import Services, caller_of

MAX_ANSWER_TOKENS = 4096


class GateRow(BaseModel):
    """One question with the answer that is right."""

    model_config = ConfigDict(extra="forbid", strict=True)
    messages: list[dict[str, Any]] = Field(min_length=1)
    expected: str
    tools: list[dict[str, Any]] | None = None


class GateBody(BaseModel):
    """Rows, how answers are compared, and what is wanted: a minimum, a margin below the present stable, or both."""

    model_config = ConfigDict(extra="forbid", strict=True)
    metric: Literal["exact_match", "json_valid", "label_accuracy", "field_f1"] = "exact_match"
    minimum: float | None = Field(None, ge=0, le=1)
    margin: float | None = Field(None, ge=0, le=1)
    max_tokens: int = Field(256, ge=1, le=MAX_ANSWER_TOKENS)
    rows: list[GateRow] = Field(min_length=1, max_length=MAX_ROWS)

    def gate(self, base_id: str) -> Gate:
        """Raises InvalidRequest for a row that no request could hold, and for a gate that decides nothing."""
        rows = tuple(row.model_dump(exclude_none=True) for row in self.rows)
        for row in rows:
            question = {name: value for name, value in row.items() if name != "expected"}
            read_request(CHAT, json.dumps({"model": base_id, **question}).encode(), base_id)
        return check_gate(Gate(self.metric, self.minimum, self.margin, self.max_tokens, rows))


def router(services: Services) -> APIRouter:
    routes = APIRouter(prefix="/v1/adapters/{name}/gate", tags=["versions"])

    @routes.get("", summary="What a promote of stable has to show")
    async def read_gate(request: Request, name: str) -> dict[str, Any]:
        caller = caller_of(request)
        row = await asyncio.to_thread(services.registry.gate, caller.tenant, own_name(caller, name))
        if row is None:
            raise NotFound(f"{name} has no gate: every ready version can be promoted.", param="name")
        return gate_row(name, Gate.from_row(row))

    @routes.put("", summary="From now on a promote of stable has to show this")
    async def set_gate(request: Request, name: str, body: GateBody) -> dict[str, Any]:
        caller = caller_of(request)
        own_name(caller, name)
        gate = await asyncio.to_thread(body.gate, services.base.id)
        await asyncio.to_thread(
            lambda: services.registry.set_gate(
                caller.tenant, name, gate.as_row(), about=gate.about(), actor=caller.actor
            )
        )
        return gate_row(name, gate)

    @routes.delete("", summary="A promote has to show nothing any more")
    async def remove_gate(request: Request, name: str) -> dict[str, Any]:
        caller = caller_of(request)
        own_name(caller, name)
        await asyncio.to_thread(
            lambda: services.registry.set_gate(caller.tenant, name, None, about={}, actor=caller.actor)
        )
        return {"object": "adapter.gate", "name": name, "deleted": True}

    return routes


def gate_row(name: str, gate: Gate) -> dict[str, Any]:
    """The gate without its rows' texts."""
    return {"object": "adapter.gate", "name": name, **gate.about()}
