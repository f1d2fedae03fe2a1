"""Which web pages may read our answers: Starlette's CORS rules, asked from inside the gateway.

Inside, because the gateway's own answers (401, 403, 404, streams that end with an error) need the headers too, and a
preflight shall have its request id, its log line and our error body.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Message, Receive, Scope, Send

from adapters.errors import InvalidRequest
from server.edge_settings import ANY_ORIGIN

METHODS = ("GET", "POST", "PUT", "DELETE")
# What our routes read, and what clients send from a browser. Those that are made with Stainless (OpenAI's, Anthropic's)
# add a header now and then, and one that is not allowed stops every request of theirs: hence the families.
REQUEST_HEADERS = [
    "Authorization",
    "Idempotency-Key",
    "If-Match",
    "If-None-Match",
    "If-Range",
    "Range",
    "User-Agent",
    "X-Api-Key",
    "X-Requested-With",
]
FAMILIES = re.compile(r"(?:x-stainless|x-hotshoe|openai|anthropic)-[a-z0-9-]{1,64}")
EXPOSED_HEADERS = [
    "X-Request-Id",
    "Request-Id",
    "ETag",
    "Retry-After",
    "Content-Disposition",
    "Content-Range",
    "Accept-Ranges",
    "X-RateLimit-Limit-Requests",
    "X-RateLimit-Remaining-Requests",
    "X-RateLimit-Reset-Requests",
    "X-RateLimit-Limit-Tokens",
    "X-RateLimit-Remaining-Tokens",
    "X-RateLimit-Reset-Tokens",
]
ASKED_METHOD, ASKED_HEADERS = "access-control-request-method", "access-control-request-headers"


class Cors:
    """The rules for the listed origins; with none every page of another origin is left to its browser."""

    def __init__(self, origins: Sequence[str]) -> None:
        self.origins = frozenset(origins)
        self._rules = CORSMiddleware(
            _nothing,
            allow_origins=tuple(origins),
            allow_methods=METHODS,
            allow_headers=REQUEST_HEADERS,
            expose_headers=EXPOSED_HEADERS,
            allow_private_network=ANY_ORIGIN not in self.origins,  # a page of the internet asks a server in the house
        )

    def is_listed(self, origin: str) -> bool:
        """The operator named this very origin."""
        return origin in self.origins

    def sending(self, scope: Scope, send: Send) -> Send:
        """The same send, with the headers on the response by which a browser lets a listed origin read it."""
        if not self.origins:
            return send
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        if origin is not None and not self._rules.is_allowed_origin(origin):
            return functools.partial(_varying, send=send)
        return functools.partial(self._rules.send, send=send, request_headers=headers)

    async def answer_preflight(self, scope: Scope, receive: Receive, send: Send) -> bool:
        """Answer a listed origin's preflight; False when it is none. Raises InvalidRequest for what is not offered."""
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        is_one = scope["method"] == "OPTIONS" and origin is not None and ASKED_METHOD in headers
        if not is_one or not self._rules.is_allowed_origin(origin or ""):
            return False
        wanted = [word.strip().lower() for word in headers.get(ASKED_HEADERS, "").split(",")]
        families = sorted({word for word in wanted if FAMILIES.fullmatch(word)})
        rest = ", ".join(word for word in wanted if word and word not in families)
        response = self._rules.preflight_response(Headers({**headers, ASKED_HEADERS: rest} if rest else _less(headers)))
        if response.status_code != 200:
            raise InvalidRequest(
                f"A page may use {', '.join(METHODS)} and the headers that docs/http.md lists; it asked for others.",
                param=ASKED_METHOD,
            )
        listed = [response.headers["access-control-allow-headers"], *families]
        response.headers["access-control-allow-headers"] = ", ".join(listed)
        await response(scope, receive, send)
        return True


def _less(headers: Headers) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name != ASKED_HEADERS}


async def _varying(message: Message, send: Send) -> None:
    """A cache must not give one origin's answer to another."""
    if message["type"] == "http.response.start":
        message["headers"] = [*message.get("headers", ()), (b"vary", b"Origin")]
    await send(message)


async def _nothing(_scope: Scope, _receive: Receive, _send: Send) -> None:
    """The rules are asked; they wrap no app."""
