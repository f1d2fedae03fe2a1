"""What a tenant adds to an inference request: its limits, its bill, and other tenants' names for adapters."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

from starlette.types import Message, Send

from server.limits import Limiter, Share
from server.proxy import Forwarded
from server.services import Caller, Services


@dataclass(frozen=True, slots=True)
class Allowance:
    """The accounts that one request counts against: its key's and its tenant's, where they are limited."""

    limiter: Limiter
    shares: tuple[Share, ...] = ()

    def place(self) -> AbstractContextManager[None]:
        """Counted as running while the block runs; raises RateLimited."""
        return self.limiter.place(self.shares)

    def spend(self, tokens: int) -> None:
        self.limiter.spend(self.shares, tokens)

    def headers(self) -> list[tuple[bytes, bytes]]:
        """OpenAI's `x-ratelimit-*` as of now."""
        return self.limiter.headers(self.shares)


async def allowance_of(services: Services, caller: Caller) -> Allowance:
    """What this caller's request counts against, by the limits as they are now."""
    shares = []
    if caller.key is not None and caller.key.limits.is_on_requests:
        shares.append(Share(f"key {caller.key.id}", "This key", caller.key.limits))
    limits = await services.keyring.limits_of(caller.tenant)
    if limits.is_on_requests:
        shares.append(Share(f"tenant {caller.tenant}", "The tenant of this key", limits))
    return Allowance(services.limiter, tuple(shares))


def bill(
    services: Services, tenant: str, allowance: Allowance | None, model: str | None, result: Forwarded | None
) -> None:
    """Count what one request used: its `usage` when it was answered to the end, else what was delivered of it."""
    if model is None or result is None or result.status >= 400:
        return
    usage = result.usage
    if result.is_complete and usage is not None:
        services.usage.completed(tenant, model, usage.prompt_tokens, usage.completion_tokens)
    else:
        services.usage.partial(tenant, model, usage.completion_tokens if usage else result.events)
    if allowance is not None:
        allowance.spend(usage.prompt_tokens + usage.completion_tokens if usage else result.events)


def renaming(send: Send, given: str, wanted: str) -> Send:
    """The same send, where the answer's `model` is `wanted` for the engine's `given`.

    The engine calls an adapter NAME@N, which is another one in the tenant that it is shared with. In JSON an unescaped
    `"model":"NAME@N"` cannot be inside a string, and every piece of a stream is whole events.
    """
    pairs = [(f'"model":{gap}"{given}"'.encode(), f'"model":{gap}"{wanted}"'.encode()) for gap in ("", " ")]
    held: list[Message] = []

    async def renamed(message: Message) -> None:
        if message["type"] == "http.response.start":
            held.append(message)
            return
        body = message.get("body", b"")
        size = len(body)
        for old, new in pairs:
            body = body.replace(old, new)
        if held:
            await send(with_length_changed(held.pop(), len(body) - size))
        await send({**message, "body": body})

    return renamed


def with_length_changed(start: Message, by: int) -> Message:
    """The start of a response whose one body became this much longer; a stream has no length."""
    headers = [
        (name, str(int(value) + by).encode() if name == b"content-length" else value)
        for name, value in start["headers"]
    ]
    return {**start, "headers": headers}
