"""The front: every request passes here, in pure ASGI, before any of our routes or the engine sees it.

Request id, headers, route, key -> tenant, scope, body limit; then our own routes get the request. Inference goes on:
model -> version (pinned for the request), version in the engine, place at the engine, bytes to and fro, and one count.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from dataclasses import dataclass, field, replace
from typing import Any

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adapters.errors import EngineBusy, EngineUnavailable, HotshoeError, PayloadTooLarge
from server.access import Access, Kind, Route, check_headers, check_scope, find_route
from server.allowance import Allowance, allowance_of, bill, renaming
from server.dialect import request_id_headers
from server.errors import EncodingNotAllowed, PayloadTimeout, to_wire, unexpected
from server.inference import InferenceRequest, read_request
from server.metrics import NO_MODEL, Sample
from server.proxy import Forwarded, send_error
from server.resolve import resolve_model
from server.services import CALLER_KEY, Caller, Services
from server.serving import served_as
from server.session import session_of
from server.uploads import body_limit

log = structlog.get_logger("hotshoe.access")
PARSE_IN_THREAD_BYTES = 256 * 1024
PREFIX_FREE_PATHS = ("/tokenize", "/detokenize")


@dataclass
class Exchange:
    """One request and its answer, as they are logged and counted. No content."""

    method: str
    path: str
    request_id: str = field(default_factory=lambda: f"req_{secrets.token_hex(12)}")
    started_at: float = field(default_factory=time.monotonic)
    route: Route | None = None
    caller: Caller = field(default_factory=Caller)
    status: int | None = None
    model: str = NO_MODEL
    outcome: str | None = None
    queue_seconds: float | None = None
    result: Forwarded | None = None
    allowance: Allowance | None = None
    billed_as: str | None = None
    session: str | None = None  # keeps a conversation on one version; in no log

    def tracking(self, send: Send) -> Send:
        """The same send, with the request id on the response and its status noted."""

        async def tracked(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.status = message["status"]
                added = [
                    *request_id_headers(self.path, self.request_id),
                    *(self.allowance.headers() if self.allowance else ()),
                ]
                message["headers"] = [*message.get("headers", ()), *added]
            await send(message)

        return tracked


class ClientGone(Exception):
    """The client closed its connection before the answer was whole."""


class Gateway:
    """The ASGI app that the server runs; `app` holds our own routes."""

    def __init__(self, app: ASGIApp, services: Services) -> None:
        self.app = app
        self.services = services
        self.access = Access(services.keyring)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await self._answer(scope, receive, send)
        else:
            await receive()
            await send({"type": "websocket.close", "code": 1008})

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(scope["method"], scope["path"])
        tracked = exchange.tracking(send)
        try:
            route = await self._let_in(scope, exchange)
            if route.kind is Kind.PROXIED:
                await self._infer(scope, receive, tracked, exchange)
            else:
                await self._serve(exchange, scope, receive, tracked)
        except HotshoeError as error:
            await self._fail(exchange, tracked, error)
        except ClientGone:
            pass
        except Exception:
            log.exception("unexpected error", request_id=exchange.request_id, path=self._shown(exchange))
            if exchange.status is None:
                await send_error(tracked, exchange.path, unexpected())
        finally:
            self._log(exchange)

    async def _let_in(self, scope: Scope, exchange: Exchange) -> Route:
        headers = scope["headers"]
        check_headers(headers)
        exchange.caller = await self.access.caller(headers, scope["path"])
        exchange.route = find_route(scope["method"], scope["path"])
        check_scope(exchange.caller, exchange.route)
        encodings = {value.strip().lower() for name, value in headers if name == b"content-encoding"}
        if encodings - {b"identity", b""}:
            raise EncodingNotAllowed("Compressed request bodies are not taken: send it without Content-Encoding.")
        limit = self._limit_of(exchange.route)
        for name, value in headers:
            if name == b"content-length" and (not value.isdigit() or int(value) > limit):
                raise PayloadTooLarge(
                    f"The body has {value.decode('latin-1')[:20]} bytes; at most {limit} are taken here."
                )
        return exchange.route

    def _limit_of(self, route: Route) -> int:
        settings = self.services.settings
        if route.kind is Kind.UPLOAD:
            return body_limit(route.path, settings)
        return settings.max_body_bytes

    async def _serve(self, exchange: Exchange, scope: Scope, receive: Receive, send: Send) -> None:
        """Our own routes. They find the caller in the scope, and a body that was already read within its limit."""
        scope[CALLER_KEY] = exchange.caller
        route = exchange.route
        if route is not None and route.kind is Kind.PLAIN and route.method not in ("GET", "HEAD"):
            receive = replaying(await self._read_body(receive), receive)
        await self.app(scope, receive, send)

    async def _read_body(self, receive: Receive) -> bytes:
        settings = self.services.settings
        return await read_body(receive, settings.max_body_bytes, settings.body_seconds)

    async def _infer(self, scope: Scope, receive: Receive, send: Send, exchange: Exchange) -> None:
        """One inference request, ended early when its client goes away; counted exactly once."""
        try:
            exchange.allowance = await allowance_of(self.services, exchange.caller)
            exchange.session = session_of(scope["headers"])
            with exchange.allowance.place():
                await self._run(receive, send, exchange)
        except ClientGone:
            exchange.outcome = "aborted"
            raise
        except HotshoeError as error:
            exchange.outcome = outcome_of(error)
            raise
        except BaseException:
            exchange.outcome = "failed"
            raise
        finally:
            self._count(exchange)

    async def _run(self, receive: Receive, send: Send, exchange: Exchange) -> None:
        """Forward while the client is there; raises ClientGone."""
        raw = await self._read_body(receive)
        work = asyncio.ensure_future(self._forward(raw, send, exchange))
        gone = asyncio.ensure_future(until_gone(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise ClientGone
            work.result()
        finally:
            for task in (work, gone):
                task.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)

    async def _forward(self, raw: bytes, send: Send, exchange: Exchange) -> None:
        services = self.services
        request = await self._parse(exchange.path, raw)
        target = await resolve_model(services, exchange.caller, request.model, exchange.session or request.user)
        exchange.model = target.label
        if exchange.path not in PREFIX_FREE_PATHS:
            exchange.billed_as = target.ref
            request = replace(request, cache_salt=services.keyring.cache_salt(exchange.caller.tenant))
        if target.version is not None:
            allowed = services.settings.allow_chat_templates
            request = replace(request, body=served_as(exchange.path, request.body, target.version, is_allowed=allowed))
        if target.version is not None and target.ref != target.version.ref:
            send = renaming(send, target.version.ref, target.ref)
        services.door.check_room(exchange.caller.tenant)
        async with contextlib.AsyncExitStack() as stack:
            model, adapter = services.base.id, None
            if target.version is not None and exchange.path not in PREFIX_FREE_PATHS:
                resident = await stack.enter_async_context(services.residents.holding(target.version))
                model = adapter = resident.engine_name
            elif not services.engine.is_ready():
                raise EngineUnavailable("The engine is starting or restarting; try again shortly.")
            exchange.queue_seconds = await stack.enter_async_context(
                services.door.place(adapter, exchange.caller.tenant)
            )
            await self._exchange_with_engine(request, model, send, exchange)

    async def _exchange_with_engine(
        self, request: InferenceRequest, model: str, send: Send, exchange: Exchange
    ) -> None:
        exchange.result = Forwarded()
        result = await self.services.proxy.forward(request, model, exchange.request_id, send, exchange.result)
        if result.is_complete:
            exchange.outcome = "completed"
        else:
            exchange.outcome = "refused" if 400 <= result.status < 500 else "failed"

    async def _parse(self, path: str, raw: bytes) -> InferenceRequest:
        base_id = self.services.base.id
        if len(raw) > PARSE_IN_THREAD_BYTES:
            return await asyncio.to_thread(read_request, path, raw, base_id)
        return read_request(path, raw, base_id)

    async def _fail(self, exchange: Exchange, send: Send, error: HotshoeError) -> None:
        if exchange.status is None:
            await send_error(send, exchange.path, to_wire(error))
        else:
            log.error("error after the response began", request_id=exchange.request_id, code=error.code)

    def _count(self, exchange: Exchange) -> None:
        result, now = exchange.result, time.monotonic()
        sample: dict[str, Any] = {}
        if result is not None:
            is_estimated = result.usage is None
            sample["is_estimated"] = is_estimated and result.events > 0
            sample["prompt_tokens"] = result.usage.prompt_tokens if result.usage else 0
            sample["completion_tokens"] = result.usage.completion_tokens if result.usage else result.events
            if result.first_at is not None and result.last_at is not None:
                sample["first_token_seconds"] = result.first_at - exchange.started_at
                if sample["completion_tokens"] > 1:
                    sample["token_seconds"] = (result.last_at - result.first_at) / (sample["completion_tokens"] - 1)
        outcome = exchange.outcome or "failed"
        bill(self.services, exchange.caller.tenant, exchange.allowance, exchange.billed_as, result)
        seconds = now - exchange.started_at
        self.services.metrics.record(Sample(exchange.model, outcome, seconds, exchange.queue_seconds, **sample))

    def _log(self, exchange: Exchange) -> None:
        shown = self._shown(exchange)
        self.services.metrics.http.labels(shown, str(exchange.status or 0)).inc()
        log.info(
            "request",
            request_id=exchange.request_id,
            method=exchange.method[:20],
            route=shown,
            status=exchange.status,
            tenant=exchange.caller.tenant,
            model=None if exchange.model == NO_MODEL else exchange.model,
            outcome=exchange.outcome,
            seconds=round(time.monotonic() - exchange.started_at, 4),
        )

    @staticmethod
    def _shown(exchange: Exchange) -> str:
        """The route's template: what a client wrote into a path is in no log."""
        return "none" if exchange.route is None else exchange.route.path


def outcome_of(error: HotshoeError) -> str:
    """Which outcome an error counts as."""
    if isinstance(error, EngineBusy):
        return "overloaded"
    status = to_wire(error).status
    if isinstance(error, EngineUnavailable):
        return "unavailable" if status == 503 else "failed"
    return "refused" if status < 500 else "failed"


async def read_body(receive: Receive, limit: int, pause_seconds: float) -> bytes:
    """The whole body; raises PayloadTooLarge, PayloadTimeout, or ClientGone."""
    pieces: list[bytes] = []
    size = 0
    while True:
        try:
            message = await asyncio.wait_for(receive(), pause_seconds)
        except TimeoutError:
            raise PayloadTimeout(f"No piece of the body came for {pause_seconds:g} seconds.") from None
        if message["type"] == "http.disconnect":
            raise ClientGone
        piece = message.get("body", b"")
        size += len(piece)
        if size > limit:
            raise PayloadTooLarge(f"The body is larger than {limit} bytes, which is the limit here.")
        pieces.append(piece)
        if not message.get("more_body"):
            return b"".join(pieces)


def replaying(body: bytes, receive: Receive) -> Receive:
    """A receive that gives the body that was read, then whatever comes after it."""
    is_given = False

    async def replay() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


async def until_gone(receive: Receive) -> None:
    """Returns when the client has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
