"""`Idempotency-Key` on what changes things: the same request again gets the first one's answer, another one 409."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import Request

from adapters.errors import InvalidRequest
from server.services import Services, caller_of

MAX_KEY_LENGTH = 200
Answer = tuple[int, dict[str, Any]]


async def idempotent(
    services: Services, request: Request, fingerprint: str, act: Callable[[], Awaitable[Answer]]
) -> Answer:
    """Do it once per key; without the header just do it. A failure is not kept: it may be tried again.

    Two requests with one key at the same time: the second waits for the first.
    """
    key = request.headers.get("idempotency-key")
    if key is None:
        return await act()
    if not 0 < len(key) <= MAX_KEY_LENGTH or not key.isprintable():
        raise InvalidRequest(f"Idempotency-Key must have 1 to {MAX_KEY_LENGTH} characters.", param="Idempotency-Key")
    tenant = caller_of(request).tenant
    text = f"{request.method} {request.url.path}\n{fingerprint}"
    request_hash = hashlib.sha256(text.encode()).hexdigest()
    async with services.lifecycle.one_at_a_time(f"{tenant}/{key}"):
        kept = await asyncio.to_thread(services.registry.recall, tenant, key, request_hash)
        if kept is not None:
            return int(kept["status"]), dict(kept["body"])
        status, body = await act()
        response = {"status": status, "body": body}
        await asyncio.to_thread(services.registry.remember, tenant, key, request_hash, response)
        return status, body
