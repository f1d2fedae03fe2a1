"""The front: every request passes here, in pure ASGI, before any of our routes or the engine sees it.

Request id, headers, route, key -> tenant, scope, body limit; then our own routes get the request. Inference goes on:
model -> version (pinned for the request), version in the engine, place at the engine, bytes to and fro, and one count.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from functools import partial

import structlog
from starlette.types import ASGIApp, Receive, Scope, Send

from adapters.errors import EngineBusy, EngineUnavailable, HotshoeError, PayloadTooLarge
from adapters.journal import coming_from
from adapters.types import AdapterVersion
from server.access import Access, Kind, Route, check_headers, check_scope, find_route
from server.access_log import AccessLog
from server.allowance import allowance_of, bill, renaming
from server.client_timeout import timeout_of
from server.cors import Cors
from server.door import Asked
from server.edge_settings import check_proxies
from server.engine.base import engine_name
from server.errors import EncodingNotAllowed, to_wire, unexpected
from server.exchange import Exchange
from server.inference import InferenceRequest, read_request
from server.proxy import Forwarded, send_error
from server.receiving import ClientGone, read_body, replaying, while_there
from server.resolve import resolve_model
from server.restoring import key_of
from server.root_path import at_root, under_root
from server.services import CALLER_KEY, Services
from server.serving import served_as
from server.session import session_of
from server.uploads import body_limit

log = structlog.get_logger("hotshoe.gateway")
PARSE_IN_THREAD_BYTES = 256 * 1024
PREFIX_FREE_PATHS = ("/tokenize", "/detokenize")
READING = "GET"


class Gateway:
    """The ASGI app that the server runs; `app` holds our own routes."""

    def __init__(self, app: ASGIApp, services: Services, access_log: AccessLog) -> None:
        settings = services.settings
        self.app = app
        self.services = services
        self.access_log = access_log
        self.cors = Cors(settings.cors_origins)
        self.access = Access(services.keyring, self.cors.is_listed)
        self.proxies = check_proxies(settings.trusted_proxies)
        self.root_path = settings.root_path or ""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await self._answer(at_root(self.proxies.see_through(scope), self.root_path), receive, send)
        else:
            await receive()
            await send({"type": "websocket.close", "code": 1008})

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange.of(scope)
        receive, tracked = exchange.counting(receive), exchange.tracking(self.cors.sending(scope, send))
        try:
            if not await self.cors.answer_preflight(scope, receive, tracked):
                route = await self._let_in(scope, exchange)
                if route.kind is Kind.PROXIED:
                    await self._infer(scope, receive, tracked, exchange)
                else:
                    with coming_from(exchange.origin):
                        await self._serve(exchange, scope, receive, tracked)
        except HotshoeError as error:
            await self._fail(exchange, tracked, error)
        except ClientGone:
            exchange.outcome = exchange.outcome or "aborted"
        except Exception:
            log.exception("unexpected error", request_id=exchange.request_id, route=exchange.shown_route)
            if exchange.status is None:
                await send_error(tracked, exchange.path, unexpected())
        finally:
            self._log(exchange)

    async def _let_in(self, scope: Scope, exchange: Exchange) -> Route:
        headers = scope["headers"]
        check_headers(headers)
        exchange.caller = await self.access.caller(headers, scope["path"])
        exchange.is_known = True
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
        """Our own routes. They find the caller in the scope, and a body that was already read within its limit.

        What only reads ends with its client: a long wait, or the file that nobody receives. What changes something goes
        on to its end.
        """
        scope = {**under_root(scope, self.root_path), CALLER_KEY: exchange.caller}
        route = exchange.route
        if route is None or route.kind is not Kind.PLAIN:
            await self.app(scope, receive, send)
            return
        body = b"" if route.method == READING else await self._read_body(receive)
        work = self.app(scope, replaying(body, receive), send)
        await (while_there(work, receive) if route.method == READING else work)

    async def _read_body(self, receive: Receive) -> bytes:
        settings = self.services.settings
        return await read_body(receive, settings.max_body_bytes, settings.body_seconds)

    async def _infer(self, scope: Scope, receive: Receive, send: Send, exchange: Exchange) -> None:
        """One inference request, ended early when its client goes away; counted exactly once."""
        try:
            exchange.allowance = await allowance_of(self.services, exchange.caller)
            exchange.session = session_of(scope["headers"])
            exchange.timeout_seconds = timeout_of(scope["headers"])
            with exchange.allowance.place():
                await self._run(receive, send, exchange)
        except ClientGone:  # who has the last event may leave before the engine closes its side
            exchange.outcome = outcome_when_gone(exchange.result)
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
        await while_there(self._forward(raw, send, exchange), receive)

    async def _forward(self, raw: bytes, send: Send, exchange: Exchange) -> None:
        services = self.services
        request = await self._parse(exchange.path, raw)
        target = await resolve_model(services, exchange.caller, request.model, exchange.session or request.user)
        exchange.model = target.label
        if target.version is None and exchange.path not in PREFIX_FREE_PATHS:
            services.servable.check_base()
        if exchange.path not in PREFIX_FREE_PATHS:
            exchange.billed_as = target.ref
            caller = exchange.caller
            weight = services.door.admission.weight(caller.tenant, caller.priority)
            request = replace(request, cache_salt=services.keyring.cache_salt(caller.tenant), weight=weight)
        if target.version is not None:
            allowed = services.settings.allow_chat_templates
            request = replace(request, body=served_as(exchange.path, request.body, target.version, is_allowed=allowed))
        if target.version is not None and target.ref != target.version.ref:
            send = renaming(send, target.version.ref, target.ref)
        if not services.engine.is_ready():
            raise EngineUnavailable("The engine is starting or restarting; try again shortly.")
        version = None if exchange.path in PREFIX_FREE_PATHS else target.version
        adapter = None if version is None else engine_name(*key_of(version))
        async with contextlib.AsyncExitStack() as stack:
            place = services.door.place(adapter, self._asked(exchange, version, is_whole=not request.is_stream))
            exchange.queue_seconds = await stack.enter_async_context(place)
            if version is not None:
                services.warm_ahead.note(version)
                patience = services.settings.load_wait_seconds
                await stack.enter_async_context(services.residents.holding(version, patience))
            await self._exchange_with_engine(request, adapter or services.engine_base, send, exchange)

    def _asked(self, exchange: Exchange, version: AdapterVersion | None, *, is_whole: bool) -> Asked:
        caller, waited = exchange.caller, exchange.seconds
        bring = None if version is None else partial(self.services.residents.bring, version)
        left = None if exchange.timeout_seconds is None else max(0.0, exchange.timeout_seconds - waited)
        return Asked(caller.tenant, caller.priority, left, bring, is_whole)

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
        bill(self.services, exchange.caller.tenant, exchange.allowance, exchange.billed_as, exchange.result)
        self.services.metrics.record(exchange.sample())

    def _log(self, exchange: Exchange) -> None:
        self.services.metrics.http.labels(exchange.shown_route, str(exchange.status or 0)).inc()
        self.access_log.write(exchange.record())


def outcome_when_gone(result: Forwarded | None) -> str:
    """Which outcome a request counts as whose client has left."""
    if result is None or not (result.is_complete or result.is_ended):
        return "aborted"
    return "completed" if result.is_complete else "failed"


def outcome_of(error: HotshoeError) -> str:
    """Which outcome an error counts as."""
    if isinstance(error, EngineBusy):
        return "overloaded"
    status = to_wire(error).status
    if isinstance(error, EngineUnavailable):
        return "unavailable" if status == 503 else "failed"
    return "refused" if status < 500 else "failed"
