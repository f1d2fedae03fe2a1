"""The way to the engine's Unix socket: bytes go through as they are, streams at event boundaries."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from starlette.types import Send

from adapters.errors import EngineUnavailable
from server.dialect import error_bytes
from server.errors import WireError, from_engine, to_wire
from server.inference import InferenceRequest
from server.stream import EventReader, Usage, ends_with_done

CONNECT_SECONDS = 5.0
PROBE_SECONDS = 120.0
FAREWELL_SECONDS = 0.5
READ_BUFFER_BYTES = 1024 * 1024
WHOLE_BYTES = 64 * 1024
CORE_DEAD = b"EngineCore encountered an issue. See stack trace (above)"  # vLLM's words for a core that is no more
FAILURES = (aiohttp.ClientError, TimeoutError, OSError, ValueError)


@dataclass(slots=True)
class Forwarded:
    """What one forwarded request came to, so far."""

    status: int = 200
    is_complete: bool = False
    is_ended: bool = False  # a stream's last event was sent, also one that told of an error
    usage: Usage | None = None
    events: int = 0  # of a stream, as delivered
    first_at: float | None = None  # monotonic seconds of a stream's first event
    last_at: float | None = None


class EngineProxy:
    """One connection pool to the engine's inference routes."""

    def __init__(self, socket_path: Path) -> None:
        self.socket_path = socket_path
        self._session: aiohttp.ClientSession | None = None

    async def complete(self, body: dict[str, Any]) -> tuple[int, bytes]:
        """One completion, for the probe; raises EngineUnavailable."""
        return await self.ask("/v1/completions", body)

    async def ask(self, path: str, body: dict[str, Any]) -> tuple[int, bytes]:
        """One whole answer to a request of the server's own; raises EngineUnavailable."""
        timeout = aiohttp.ClientTimeout(total=PROBE_SECONDS)
        try:
            async with self._open().post(f"http://engine{path}", json=body, timeout=timeout) as response:
                return response.status, await response.read()
        except FAILURES as error:
            raise EngineUnavailable(f"The engine did not answer the probe: {type(error).__name__}.") from error

    async def metrics(self) -> bytes:
        """The engine's own metrics in Prometheus' text form; empty while it does not answer."""
        try:
            async with self._open().get("http://engine/metrics", timeout=aiohttp.ClientTimeout(total=5)) as response:
                return await response.read() if response.status == 200 else b""
        except FAILURES:
            return b""

    async def forward(
        self, request: InferenceRequest, model: str, request_id: str, send: Send, result: Forwarded
    ) -> Forwarded:
        """Answer the client with what the engine answers; raises EngineUnavailable while nothing was sent yet.

        `result` is filled in as the answer passes, so that an answer that is cut short is still counted.
        """
        body: Any = request.for_engine(model)
        if len(body) > WHOLE_BYTES:
            body = io.BytesIO(body)  # sent in pieces: aiohttp writes bytes at once, and the event loop waits for it
        headers = {"content-type": "application/json", "x-request-id": request_id}
        try:
            async with self._open().post(f"http://engine{request.path}", data=body, headers=headers) as response:
                if response.status >= 400:
                    return await _send_error(response, request.path, send, result)
                if response.content_type == "text/event-stream":
                    return await _send_stream(response, request, send, result)
                raw = await response.read()
        except FAILURES as error:
            raise EngineUnavailable("The engine stopped before it answered; it is being restarted.") from error
        await send_whole(send, response.status, raw, {"content-type": response.headers["content-type"]})
        result.status, result.is_complete, result.usage = response.status, True, _usage_of(raw)
        return result

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.UnixConnector(path=str(self.socket_path), limit=0),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS),
                read_bufsize=READ_BUFFER_BYTES,
                auto_decompress=False,
            )
        return self._session


async def send_whole(send: Send, status: int, body: bytes, headers: dict[str, str]) -> None:
    """One whole response."""
    fields = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    fields.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": fields})
    await send({"type": "http.response.body", "body": body})


async def send_error(send: Send, path: str, error: WireError) -> None:
    """One whole error response, in the body that the path's clients read."""
    headers = {"content-type": "application/json", **error.headers}
    await send_whole(send, error.status, error_bytes(path, error), headers)


async def _send_error(response: aiohttp.ClientResponse, path: str, send: Send, result: Forwarded) -> Forwarded:
    raw = await response.read()
    if response.status == 404 and b"does not exist" in raw:
        raise EngineUnavailable("The engine lost the adapter: it was restarted and is being filled again.")
    if response.status >= 500 and CORE_DEAD in raw:
        raise EngineUnavailable("The engine stopped before it answered; it is being restarted.")
    error = from_engine(response.status, raw)
    await send_error(send, path, error)
    result.status = error.status
    return result


async def _send_stream(
    response: aiohttp.ClientResponse, request: InferenceRequest, send: Send, result: Forwarded
) -> Forwarded:
    reader = EventReader(request.path, request.has_usage or not ends_with_done(request.path))
    result.status = response.status
    headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
    await send({"type": "http.response.start", "status": response.status, "headers": headers})
    try:
        async for chunk in response.content.iter_any():
            data = reader.feed(chunk)
            result.last_at = time.monotonic()
            result.first_at = result.first_at or result.last_at
            result.events, result.usage = reader.events, reader.usage
            if data:
                await send({"type": "http.response.body", "body": data, "more_body": True})
                result.is_ended = reader.is_ended
                result.is_complete = reader.is_ended and reader.error is None
    except (
        asyncio.CancelledError
    ):  # the grace of a stopping server is over, or the client is gone and nobody reads this
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(_end(send, reader, "The server is stopping."), FAREWELL_SECONDS)
        raise
    except FAILURES:
        reader.is_ended = False
    result.usage, result.events = reader.usage, reader.events
    result.is_complete = reader.is_ended and reader.error is None
    await _end(send, reader, "The engine stopped in the middle of this answer; it is being restarted.")
    return result


async def _end(send: Send, reader: EventReader, reason: str) -> None:
    """The last bytes of a stream; an error event with the reason when the engine has not ended it."""
    body = reader.closing(to_wire(EngineUnavailable(reason)))
    await send({"type": "http.response.body", "body": body, "more_body": False})


def _usage_of(raw: bytes) -> Usage | None:
    try:
        found = json.loads(raw)
    except ValueError:
        return None
    return Usage.read(found.get("usage")) if isinstance(found, dict) else None
