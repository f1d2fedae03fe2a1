"""One request and its answer, as they are logged and counted. No content."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from starlette.types import Message, Receive, Scope, Send

from adapters.journal import Origin
from server.access import Route
from server.allowance import Allowance
from server.dialect import request_id_headers
from server.metrics import NO_MODEL, Sample
from server.proxy import Forwarded
from server.services import Caller


@dataclass
class Exchange:
    """What is known of one request so far."""

    method: str
    path: str
    client: str | None = None
    request_id: str = field(default_factory=lambda: f"req_{secrets.token_hex(12)}")
    started_at: float = field(default_factory=time.monotonic)
    route: Route | None = None
    caller: Caller = field(default_factory=Caller)
    is_known: bool = False  # who asks was found out
    status: int | None = None
    model: str = NO_MODEL
    outcome: str | None = None
    queue_seconds: float | None = None
    result: Forwarded | None = None
    allowance: Allowance | None = None
    billed_as: str | None = None
    timeout_seconds: float | None = None  # that its client waits for the first byte
    session: str | None = None  # keeps a conversation on one version; in no log
    request_bytes: int = 0
    response_bytes: int = 0

    @classmethod
    def of(cls, scope: Scope) -> Exchange:
        client = scope.get("client")
        return cls(scope["method"], scope["path"], client[0] if client else None)

    def tracking(self, send: Send) -> Send:
        """The same send, with the request id on the response, its status noted and its bytes counted."""

        async def tracked(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.status = message["status"]
                added = [
                    *request_id_headers(self.path, self.request_id),
                    *(self.allowance.headers() if self.allowance else ()),
                ]
                message["headers"] = [*message.get("headers", ()), *added]
            else:
                self.response_bytes += len(message.get("body", b""))
            await send(message)

        return tracked

    def counting(self, receive: Receive) -> Receive:
        """The same receive, with the body's bytes counted."""

        async def counted() -> Message:
            message = await receive()
            self.request_bytes += len(message.get("body", b""))
            return message

        return counted

    @property
    def origin(self) -> Origin | None:
        """What the events of a change that it makes say of it."""
        return Origin(self.caller.actor, self.client) if self.client is not None else None

    @property
    def shown_route(self) -> str:
        """The route's template: what a client wrote into a path is in no log."""
        return "none" if self.route is None else self.route.path

    def sample(self) -> Sample:
        """What a finished inference request adds to the metrics."""
        result, found = self.result, dict[str, Any]()
        if result is not None:
            prompt, completion = self.tokens()
            found = {"prompt_tokens": prompt, "completion_tokens": completion}
            found["is_estimated"] = result.usage is None and result.events > 0
            found["first_token_seconds"] = self.first_token_seconds
            if result.first_at is not None and result.last_at is not None and completion > 1:
                found["token_seconds"] = (result.last_at - result.first_at) / (completion - 1)
        return Sample(self.model, self.outcome or "failed", self.seconds, self.queue_seconds, **found)

    def tokens(self) -> tuple[int, int]:
        """Of prompt and answer: its usage, or the events that were delivered of a stream that ended early."""
        if self.result is None:
            return 0, 0
        usage = self.result.usage
        return (usage.prompt_tokens, usage.completion_tokens) if usage else (0, self.result.events)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started_at

    @property
    def first_token_seconds(self) -> float | None:
        """From arrival to a stream's first event."""
        first_at = self.result.first_at if self.result else None
        return None if first_at is None else first_at - self.started_at

    def record(self) -> dict[str, Any]:
        """Its line in the access log; server/access_log.py lists the fields."""
        prompt, completion = self.tokens()
        return {
            "request_id": self.request_id,
            "client": self.client,
            "tenant": self.caller.tenant if self.is_known else None,
            "key": self.caller.actor if self.is_known else None,
            "method": self.method[:20],
            "route": self.shown_route,
            "status": self.status,
            "outcome": self.outcome,
            "model": None if self.model == NO_MODEL else self.model,
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "queue_seconds": _rounded(self.queue_seconds),
            "first_token_seconds": _rounded(self.first_token_seconds),
            "seconds": _rounded(self.seconds),
            "request_bytes": self.request_bytes,
            "response_bytes": self.response_bytes,
        }


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)
