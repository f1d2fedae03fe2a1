"""The engine's side of the control calls: routes under /hotshoe/* over an object that does the work.

The plugin inside vLLM and the double both attach these, so that the wire form exists once.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from adapters.errors import (
    Conflict,
    EngineBusy,
    EngineFailed,
    EngineUnavailable,
    HotshoeError,
    InvalidRequest,
    ModelNotFound,
)
from server.engine.base import EngineAdapter, EngineCapacity, EngineUsage
from server.engine.ledger import Ledger, parse_load, parse_unload

STATUS: dict[type[HotshoeError], int] = {
    InvalidRequest: 400,
    ModelNotFound: 404,
    Conflict: 409,
    EngineFailed: 500,
    EngineBusy: 503,
    EngineUnavailable: 503,
}


class Worker(Protocol):
    """What differs between engines. Loads and unloads come one at a time; an exception is a failed one, unless it is
    EngineUnavailable: then the engine is gone."""

    async def add(self, adapter: EngineAdapter) -> None: ...
    async def remove(self, adapter: EngineAdapter) -> None: ...
    async def in_slots(self) -> set[int]: ...
    async def usage(self) -> EngineUsage: ...
    def capacity(self) -> EngineCapacity: ...


class Control:
    """Loads and unloads in order, keeps the ledger, answers the five calls."""

    def __init__(self, worker: Worker) -> None:
        capacity = worker.capacity()
        self.worker = worker
        self.ledger = Ledger(capacity.base_id, capacity.staged_limit)
        self._lock = asyncio.Lock()

    async def load(self, body: dict[str, Any]) -> dict[str, Any]:
        adapter = parse_load(body)
        async with self._lock:
            if self.ledger.is_loaded(adapter):
                return {"is_new": False}
            try:
                await self.worker.add(adapter)
            except EngineUnavailable:
                raise  # the engine is gone: that says nothing about the adapter
            except Exception as error:
                self.ledger.burn(adapter)
                raise EngineFailed(f"{adapter.engine_name} did not load from {adapter.path}: {error}") from error
            self.ledger.record(adapter)
        return {"is_new": True}

    async def unload(self, body: dict[str, Any]) -> dict[str, Any]:
        name = parse_unload(body)
        async with self._lock:
            adapter = self.ledger.forget(name)
            try:
                await self.worker.remove(adapter)
            except EngineUnavailable:
                raise
            except Exception as error:
                self.ledger.burn(adapter)
                raise EngineFailed(f"{name} is forgotten, but its weights did not leave: {error}") from error
        return {}

    async def loaded(self, _: dict[str, Any]) -> dict[str, Any]:
        in_slots = await self.worker.in_slots()
        rows = (
            {"engine_name": name, "engine_id": adapter.engine_id, "is_in_slot": adapter.engine_id in in_slots}
            for name, adapter in self.ledger.loaded.items()
        )
        return {"adapters": list(rows)}

    async def usage(self, _: dict[str, Any]) -> dict[str, Any]:
        return asdict(await self.worker.usage())

    async def capacity(self, _: dict[str, Any]) -> dict[str, Any]:
        return asdict(self.worker.capacity())


def attach(app: Starlette, find: Callable[[Request], Control]) -> None:
    """Add the control routes; `find` gives the Control of the app's state, which is made after its routes."""
    for method, name in (
        ("POST", "load"),
        ("POST", "unload"),
        ("GET", "loaded"),
        ("GET", "usage"),
        ("GET", "capacity"),
    ):
        app.router.routes.append(Route(f"/hotshoe/{name}", _endpoint(find, name), methods=[method]))


def _endpoint(find: Callable[[Request], Control], name: str) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        try:
            body = await _body(request)
            return JSONResponse(await getattr(find(request), name)(body))
        except HotshoeError as error:
            return _error(error)

    return answer


async def _body(request: Request) -> dict[str, Any]:
    if request.method == "GET":
        return {}
    try:
        body = json.loads(await request.body())
    except ValueError as error:
        raise InvalidRequest(f"The body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise InvalidRequest("The body must be a JSON object.")
    return body


def _error(error: HotshoeError) -> JSONResponse:
    status = next((STATUS[kind] for kind in type(error).__mro__ if kind in STATUS), 500)
    body = {"message": error.message, "type": "control_error", "param": error.param, "code": error.code}
    return JSONResponse({"error": body}, status_code=status)
