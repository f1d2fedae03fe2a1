"""A request's body as it comes, for routes that stream it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from fastapi import Request

from adapters.errors import PayloadTooLarge
from server.errors import PayloadTimeout
from server.gateway import ClientGone


async def pieces_of(request: Request, pause_seconds: float) -> AsyncIterator[bytes]:
    """The body as it comes; raises PayloadTimeout when it stops, ClientGone when the client does."""
    while True:
        try:
            message = await asyncio.wait_for(request.receive(), pause_seconds)
        except TimeoutError:
            raise PayloadTimeout(f"No piece of the upload came for {pause_seconds:g} seconds.") from None
        if message["type"] == "http.disconnect":
            raise ClientGone
        yield message.get("body", b"")
        if not message.get("more_body"):
            return


async def whole(pieces: AsyncIterator[bytes], limit: int) -> bytes:
    """All pieces together; raises PayloadTooLarge."""
    body = bytearray()
    async for piece in pieces:
        body += piece
        if len(body) > limit:
            raise PayloadTooLarge(f"The body is larger than {limit} bytes, which is the limit here.")
    return bytes(body)
