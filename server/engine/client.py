"""The control calls, spoken over an engine's Unix socket; foreign errors become ours here and nowhere else."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import aiohttp

from adapters.errors import (
    Conflict,
    EngineBusy,
    EngineFailed,
    EngineUnavailable,
    HotshoeError,
    InvalidRequest,
    ModelNotFound,
)
from server.engine.base import EngineAdapter, EngineCapacity, EngineUsage, LoadedAdapter

ERRORS: dict[str, type[HotshoeError]] = {
    error.code: error
    for error in (Conflict, EngineBusy, EngineFailed, EngineUnavailable, InvalidRequest, ModelNotFound)
}
CONTROL_TIMEOUT_SECONDS = 120.0


class EngineClient:
    """One connection pool to one engine. `close` it when the engine stops."""

    def __init__(self, socket_path: Path) -> None:
        self.socket_path = socket_path
        self._session: aiohttp.ClientSession | None = None

    async def load(self, adapter: EngineAdapter) -> None:
        await self._call("POST", "/hotshoe/load", {**asdict(adapter), "path": str(adapter.path)})

    async def unload(self, engine_name: str) -> None:
        await self._call("POST", "/hotshoe/unload", {"engine_name": engine_name})

    async def loaded(self) -> list[LoadedAdapter]:
        answer = await self._call("GET", "/hotshoe/loaded")
        return [LoadedAdapter(**row) for row in answer["adapters"]]

    async def usage(self) -> EngineUsage:
        return EngineUsage(**await self._call("GET", "/hotshoe/usage"))

    async def capacity(self) -> EngineCapacity:
        return EngineCapacity(**await self._call("GET", "/hotshoe/capacity"))

    async def health(self, timeout_seconds: float) -> int | None:
        """The status of the health route, None where nobody answers in time; never raises for that."""
        try:
            timeout = aiohttp.ClientTimeout(total=timeout_seconds)
            async with self._open().get("http://engine/health", timeout=timeout) as response:
                return response.status
        except (aiohttp.ClientError, TimeoutError, OSError):
            return None

    async def core_answers(self) -> bool:
        """Whether a question that goes through the engine core was answered. Waits without a limit; never raises."""
        try:
            timeout = aiohttp.ClientTimeout(total=None)
            async with self._open().get("http://engine/hotshoe/loaded", timeout=timeout) as response:
                return response.status == 200
        except (aiohttp.ClientError, TimeoutError, OSError):
            return False

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector = aiohttp.UnixConnector(path=str(self.socket_path))
            self._session = aiohttp.ClientSession(connector=connector)
        return self._session

    async def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        timeout = aiohttp.ClientTimeout(total=CONTROL_TIMEOUT_SECONDS)
        try:
            async with self._open().request(method, f"http://engine{path}", json=body, timeout=timeout) as response:
                answer = await response.json()
                status = response.status
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise EngineUnavailable(f"The engine does not answer {path}: {error or type(error).__name__}.") from error
        if status != 200:
            raise _as_error(answer, status, path)
        return dict(answer)


class SpokenTo:
    """The five control calls of an engine that listens on a socket: whoever starts the engine has the rest to do."""

    def __init__(self, socket_path: Path) -> None:
        self.socket_path = socket_path
        self._client = EngineClient(socket_path)

    async def load(self, adapter: EngineAdapter) -> None:
        await self._client.load(adapter)

    async def unload(self, engine_name: str) -> None:
        await self._client.unload(engine_name)

    async def loaded(self) -> list[LoadedAdapter]:
        return await self._client.loaded()

    async def usage(self) -> EngineUsage:
        return await self._client.usage()

    async def capacity(self) -> EngineCapacity:
        return await self._client.capacity()


def _as_error(answer: Any, status: int, path: str) -> HotshoeError:
    detail = answer.get("error", {}) if isinstance(answer, dict) else {}
    message = detail.get("message") or f"The engine answered {path} with status {status}."
    return ERRORS.get(str(detail.get("code")), EngineFailed)(message, param=detail.get("param"))
