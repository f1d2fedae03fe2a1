"""A request's body as it comes, with an end to waiting for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable
from typing import TypeVar

from fastapi import Request
from starlette.types import Message, Receive

from adapters.errors import PayloadTooLarge
from server.errors import PayloadTimeout

T = TypeVar("T")
LEAST_BYTES_PER_SECOND = 1024


class ClientGone(Exception):
    """The client closed its connection before the answer was whole."""


async def pieces_of(request: Request, pause_seconds: float) -> AsyncIterator[bytes]:
    """The body as it comes; raises PayloadTimeout when it stops or trickles, ClientGone when the client goes."""
    async for piece in pieces(request.receive, pause_seconds):
        yield piece


async def pieces(receive: Receive, pause_seconds: float) -> AsyncIterator[bytes]:
    """The same, of a bare `receive`.

    No piece may be `pause_seconds` late; and as single bytes would then keep a connection for ever, all of them
    together may take that long and a second for every LEAST_BYTES_PER_SECOND that came.
    """
    began, size, has_more = time.monotonic(), 0, True
    while has_more:
        allowed = began + pause_seconds + size / LEAST_BYTES_PER_SECOND - time.monotonic()
        message = await _next(receive, min(pause_seconds, allowed), pause_seconds)
        if message["type"] == "http.disconnect":
            raise ClientGone
        piece: bytes = message.get("body", b"")
        size += len(piece)
        has_more = bool(message.get("more_body"))
        yield piece


async def _next(receive: Receive, seconds: float, pause_seconds: float) -> Message:
    try:
        return await asyncio.wait_for(receive(), seconds)
    except TimeoutError:
        raise PayloadTimeout(
            f"The body stopped coming: at most {pause_seconds:g} seconds may pass between two pieces of it, and on "
            f"average {LEAST_BYTES_PER_SECOND} bytes a second have to come. Send it again on a better line."
        ) from None


async def read_body(receive: Receive, limit: int, pause_seconds: float) -> bytes:
    """The whole body; raises PayloadTooLarge, PayloadTimeout, or ClientGone."""
    return await whole(pieces(receive, pause_seconds), limit)


async def whole(pieces: AsyncIterator[bytes], limit: int) -> bytes:
    """All pieces together; raises PayloadTooLarge."""
    body = bytearray()
    async for piece in pieces:
        body += piece
        if len(body) > limit:
            raise PayloadTooLarge(f"The body is larger than {limit} bytes, which is the limit here.")
    return bytes(body)


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


async def while_there(work: Awaitable[T], receive: Receive) -> T:
    """What the work comes to; it is ended early when the client closes its connection. Raises ClientGone then."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(until_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def until_gone(receive: Receive) -> None:
    """Returns when the client has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
