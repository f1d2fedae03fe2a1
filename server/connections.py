"""Connections as uvicorn keeps them, and the three bounds that it leaves out: on a request's head, on an answer that
nobody reads, and on how many there are.

uvicorn stops its only timer with the first byte of a request: half a head then keeps a connection for ever, and so does
an answer whose reader has stopped. A connection that waits for a request is the first to go when there are too many.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from server.edge_settings import MAX_HEAD_BYTES

CUTS = (
    "slow_head",  # the head of a request took longer than header_seconds
    "large_head",  # it is over MAX_HEAD_BYTES and not at its end
    "slow_reader",  # the client left an answer unread for write_seconds
    "made_room",  # it was idle, and the server has max_connections
    "no_room",  # it was new, and all others were busy
)


@dataclass
class Connections:
    """The bounds of one server, and which of its connections wait for a request, oldest first."""

    header_seconds: float
    write_seconds: float
    limit: int
    on_cut: Callable[[str], object] = lambda _: None
    idle: dict[TimedProtocol, None] = field(default_factory=dict)

    def protocol(self) -> type[asyncio.Protocol]:
        """The protocol class that uvicorn is given."""
        return type("Connection", (TimedProtocol,), {"bounds": self})


class TimedProtocol(HttpToolsProtocol):
    """uvicorn's protocol, with an end to waiting."""

    bounds: Connections

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._heads = 0  # that have begun
        self._head_bytes = 0  # of the one that is coming, as far as whole reads are all its own
        self._is_in_head = True

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        _send_at_once(transport)
        if len(self.connections) > self.bounds.limit and not self._make_room():
            self._refuse("no_room", 503)
            return
        self.bounds.idle[self] = None
        self._start_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self.bounds.idle.pop(self, None)
        self._stop_head_timer()
        self._stop_write_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self._is_waiting():
            self._start_head_timer()  # also for line ends, which are no head yet
        before = self._heads if self._is_in_head and self._heads else 1
        super().data_received(data)
        if self._is_in_head and self._heads == before and not self.transport.is_closing():
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse("large_head", 431)

    def on_message_begin(self) -> None:
        self._is_in_head = True
        self._heads += 1
        self._head_bytes = 0
        self._start_head_timer()
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._is_in_head:  # after a chunked body come trailers, which nobody here reads
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        self._stop_head_timer()
        self.bounds.idle.pop(self, None)
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._cut_unless_read()
        elif self._is_waiting():
            self.bounds.idle[self] = None
            if (
                self._is_in_head or self.cycle.more_body
            ):  # half of the next head, or a body that was refused, still comes
                self._start_head_timer()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._cut_unless_read()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.transport.is_closing():
            self._stop_write_timer()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._cut_unless_read()

    def _is_waiting(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _start_head_timer(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self.bounds.header_seconds, self._head_is_late)

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self.transport.is_closing():
            return
        if self._is_waiting():
            self._refuse("slow_head", 408)
        else:  # the next request's head, while this one is still being answered
            self._start_head_timer()

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _cut_unless_read(self) -> None:
        """End the connection, and with it what is being sent on it, unless its client reads on in time."""
        if self._write_timer is None and self.transport.get_write_buffer_size():
            self._write_timer = self.loop.call_later(self.bounds.write_seconds, self._reader_is_late)

    def _reader_is_late(self) -> None:
        self.bounds.on_cut("slow_reader")
        self.transport.abort()

    def _make_room(self) -> bool:
        oldest = next(iter(self.bounds.idle), None)
        if oldest is None:
            return False
        del self.bounds.idle[oldest]
        self.bounds.on_cut("made_room")
        oldest.transport.abort()
        return True

    def _refuse(self, reason: str, status: int) -> None:
        """One last answer, which no request of ours stands behind, and the end of the connection."""
        self.bounds.idle.pop(self, None)
        self.bounds.on_cut(reason)
        self.transport.write(REFUSALS[status])
        self.transport.close()
        self._cut_unless_read()


def _send_at_once(transport: asyncio.Transport) -> None:
    """No waiting for the acknowledgement of a response's head before its body goes: 40 ms on a kept connection.

    asyncio only asks for it where a socket's protocol was spelled out, which that of a listener we hand over is not.
    """
    found = transport.get_extra_info("socket")
    if found is not None and found.family in (socket.AF_INET, socket.AF_INET6):
        found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _refusal(status: int, code: str, kind: str, message: str, more: bytes = b"") -> bytes:
    body = json.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}}).encode()
    head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n" % len(body)
    return STATUS_LINE[status] + head + more + b"\r\n" + body


REFUSALS = {
    408: _refusal(408, "payload_timeout", "invalid_request_error", "The head of the request did not come in time."),
    431: _refusal(
        431, "headers_too_large", "invalid_request_error", f"The request's head is over {MAX_HEAD_BYTES} bytes."
    ),
    503: _refusal(503, "engine_busy", "overloaded_error", "The server has no connection left.", b"retry-after: 1\r\n"),
}
