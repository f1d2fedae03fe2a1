"""The gate of an adapter: what a promote of its `stable` has to show."""

from __future__ import annotations

import asyncio
import json
from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from adapters.errors import InvalidRequest, NotFound, PayloadTooLarge
from server.file_wire import owner_of
from server.gate import CHAT, MAX_GATE_BYTES, MAX_ROWS, Gate, check_gate
from server.gate_file import PURPOSE, read_rows
from server.inference import read_request
from server.resolve import own_name
from server.services import Caller, Services, caller_of

MAX_ANSWER_TOKENS = 4096
MAX_FILE_ID = 64


class GateRow(BaseModel):
    """One question with the answer that is right."""

    model_config = ConfigDict(extra="forbid", strict=True)
    messages: list[dict[str, Any]] = Field(min_length=1)
    expected: str
    tools: list[dict[str, Any]] | None = None


class GateBody(BaseModel):
    """Rows, or the id of a file with them; how answers are compared; and what is wanted: a minimum, a margin below
    the present stable, or both.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    metric: Literal["exact_match", "json_valid", "label_accuracy", "field_f1"] = "exact_match"
    minimum: float | None = Field(None, ge=0, le=1)
    margin: float | None = Field(None, ge=0, le=1)
    max_tokens: int = Field(256, ge=1, le=MAX_ANSWER_TOKENS)
    rows: list[GateRow] | None = Field(None, min_length=1, max_length=MAX_ROWS)
    file: str | None = Field(None, max_length=MAX_FILE_ID)

    def gate(self, base_id: str, from_file: list[dict[str, Any]] | None) -> Gate:
        """Raises InvalidRequest for a row that no request could hold, and for a gate that decides nothing."""
        rows = tuple(from_file or (row.model_dump(exclude_none=True) for row in self.rows or ()))
        if len(rows) > MAX_ROWS:
            raise InvalidRequest(f"The file has {len(rows)} rows; at most {MAX_ROWS} are kept.", param="file")
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
        if (body.rows is None) == (body.file is None):
            raise InvalidRequest("Send rows, or the id of a file with them.", param="rows")
        rows = None if body.file is None else await asyncio.to_thread(file_rows, services, caller, body.file)
        gate = await asyncio.to_thread(body.gate, services.base.id, rows)
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


def file_rows(services: Services, caller: Caller, file_id: str) -> list[dict[str, Any]]:
    """The rows of a file of the caller's; raises NotFound, InvalidRequest for one of another purpose, DataInvalid."""
    file, path = services.files.open(owner_of(caller), file_id, PURPOSE)
    if file.size_bytes > MAX_GATE_BYTES:
        raise PayloadTooLarge(
            f"The file has {file.size_bytes:,} bytes; at most {MAX_GATE_BYTES:,} are kept with a gate.", param="file"
        )
    return read_rows(path)


def gate_row(name: str, gate: Gate) -> dict[str, Any]:
    """The gate without its rows' texts."""
    return {"object": "adapter.gate", "name": name, **gate.about()}
