"""P2: slow heads, slow bodies, slow readers, too many connections, by raw sockets. /health answers all the while."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.bases import BaseModel
from server.connections import CUTS, REFUSALS
from server.receiving import LEAST_BYTES_PER_SECOND
from tests.fixtures.service import Server, error_of, eventually, running

BOUNDS: dict[str, Any] = {"header_seconds": 0.5, "body_seconds": 0.5, "write_seconds": 0.5}
HEAD = "Host: localhost\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def server(tiny_base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tiny_base, tmp_path_factory.mktemp("slow"), **BOUNDS) as one:
        yield one


@pytest.fixture(autouse=True)
def counted(server: Server) -> Iterator[None]:
    """`cut` counts from the beginning of each test."""
    server.cuts_before = {reason: total(server, reason) for reason in CUTS}  # type: ignore[attr-defined]
    yield
    server.script.seconds_to_first_token = 0.0


@contextlib.contextmanager
def connection(server: Server, receive_bytes: int | None = None) -> Iterator[socket.socket]:
    with socket.socket() as one:
        if receive_bytes is not None:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        one.settimeout(20)
        one.connect(("127.0.0.1", server.port))
        yield one


def rest_of(one: socket.socket) -> bytes:
    """All that comes until the server closes the connection."""
    found = b""
    with contextlib.suppress(ConnectionError):
        while piece := one.recv(65536):
            found += piece
    return found


def until(one: socket.socket, ending: bytes) -> bytes:
    """What comes, up to and with this."""
    found = b""
    while not found.endswith(ending):
        piece = one.recv(65536)
        assert piece, found
        found += piece
    return found


def trickle(one: socket.socket, text: bytes, pause: float = 0.1) -> bytes:
    """Send byte for byte until the server has enough of it; what it answered."""
    with contextlib.suppress(ConnectionError):
        for byte in text:
            one.sendall(bytes([byte]))
            time.sleep(pause)
            one.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                if one.recv(1, socket.MSG_PEEK):
                    break
            one.settimeout(20)
    one.settimeout(20)
    return rest_of(one)


def total(server: Server, reason: str) -> float:
    return server.metric("hotshoe_connections_cut_total", reason=reason)


def cut(server: Server, reason: str) -> float:
    """How many connections were cut for this since the test began."""
    before: dict[str, float] = getattr(server, "cuts_before", {})
    return total(server, reason) - (before[reason] if before else 0)


def aborted(server: Server) -> float:
    return server.metric("hotshoe_requests_total", model="tiny", outcome="aborted")


def check_health(server: Server) -> None:
    """On a connection of its own, and long before any bound of the slow ones' would be reached for it."""
    answer = httpx.get(f"{server.url}/health", timeout=10)
    assert answer.status_code == 200


@pytest.mark.parametrize(
    "start",
    [
        b"",
        b"GET",
        b"\r\n\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nX: ",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /health HT",  # the next head of a kept connection
    ],
)
def test_p2_a_head_that_does_not_come_ends_the_connection(server: Server, start: bytes) -> None:
    with connection(server) as one:
        one.sendall(start)
        check_health(server)
        answer = rest_of(one)
    assert answer.endswith(REFUSALS[408])
    assert cut(server, "slow_head") == 1


@pytest.mark.parametrize("start", [b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nX: ", b"\r\n"])
def test_p2_a_head_that_trickles_in_ends_the_connection(server: Server, start: bytes) -> None:
    with connection(server) as one:
        one.sendall(start)
        answer = trickle(one, b"\r\n" * 100 if start == b"\r\n" else b"y" * 200)
    assert answer == REFUSALS[408] and cut(server, "slow_head") == 1


def test_p2_a_head_without_an_end_ends_at_a_size(server: Server) -> None:
    with connection(server) as one, contextlib.suppress(ConnectionError):
        one.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nX: ")
        for _ in range(400):
            one.sendall(b"y" * 1024)
        assert rest_of(one) == REFUSALS[431]
    assert cut(server, "large_head") == 1
    check_health(server)


def test_p2_a_whole_head_that_is_too_large_is_answered_in_the_one_body(server: Server) -> None:
    for headers in ({"x": "y" * 70_000}, {f"x-{number}": "y" * 30 for number in range(2000)}):
        answer = server.http.get("/v1/models", headers=headers)
        assert answer.status_code == 431
        if answer.headers.get("x-request-id"):
            assert error_of(answer)["code"] == "headers_too_large"
    assert server.http.get("/v1/models", headers={"x": "y" * 60_000}).status_code == 200


def test_a_kept_connection_may_rest_between_requests(server: Server) -> None:
    with connection(server) as one:
        for _ in range(2):
            one.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert until(one, b'{"status":"ok"}').startswith(b"HTTP/1.1 200")
            time.sleep(2 * BOUNDS["header_seconds"])
    assert cut(server, "slow_head") == 0


def test_a_head_behind_a_running_answer_does_not_cut_it(server: Server) -> None:
    server.script.seconds_to_first_token = 1.5
    body = b'{"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}'
    with connection(server) as one:
        one.sendall(f"POST /v1/chat/completions HTTP/1.1\r\n{HEAD}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        one.sendall(b"GET /hea")
        answer = rest_of(one)
    assert answer.startswith(b"HTTP/1.1 200") and b"tiny heard: hello" in answer and answer.endswith(REFUSALS[408])


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/keys", "/v1/files", "/v1/adapters"])
@pytest.mark.parametrize("is_trickling", [False, True])
def test_p2_a_body_that_stops_or_trickles_is_ended(server: Server, path: str, is_trickling: bool) -> None:
    kind = "multipart/form-data; boundary=x" if path in ("/v1/files", "/v1/adapters") else "application/json"
    with connection(server) as one:
        one.sendall(f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\n".encode())
        one.sendall(b"Content-Length: 100000\r\n\r\n")
        check_health(server)
        answer = trickle(one, b" " * 200) if is_trickling else rest_of(one)
    assert answer.startswith(b"HTTP/1.1 408") and b"payload_timeout" in answer
    assert server.services.door.admission.running == 0


def test_a_body_at_an_honest_pace_may_take_longer_than_the_pause(server: Server) -> None:
    text = "x" * (3 * LEAST_BYTES_PER_SECOND)
    body = f'{{"model": "tiny", "messages": [{{"role": "user", "content": "{text}"}}]}}'.encode()
    with connection(server) as one:
        one.sendall(f"POST /v1/chat/completions HTTP/1.1\r\n{HEAD}Content-Length: {len(body)}\r\n".encode())
        one.sendall(b"Connection: close\r\n\r\n")
        for start in range(0, len(body), 512):
            one.sendall(body[start : start + 512])
            time.sleep(0.15)
        assert rest_of(one).startswith(b"HTTP/1.1 200")


def test_trailers_without_an_end_are_not_kept(server: Server) -> None:
    with connection(server) as one, contextlib.suppress(ConnectionError):
        one.sendall(f"POST /v1/chat/completions HTTP/1.1\r\n{HEAD}Transfer-Encoding: chunked\r\n\r\n0\r\n".encode())
        for number in range(2000):
            one.sendall(f"x-{number}: {'y' * 400}\r\n".encode())
        own = one.getsockname()
        still_open = [each for each in server._server.server_state.connections if each.client == own]  # or cut by now
        eventually(lambda: all(each.transport.is_closing() or len(each.headers or ()) < 10 for each in still_open), 5)  # type: ignore[union-attr]
    check_health(server)


def test_p2_a_stream_that_nobody_reads_is_aborted_and_gives_its_place_back(server: Server) -> None:
    body = b'{"model": "tiny", "stream": true, "messages": [{"role": "user", "content": "%s"}]}' % (
        (b"w" * 8000 + b" ") * 900
    )
    before = aborted(server)
    with connection(server, receive_bytes=4096) as one:
        one.sendall(f"POST /v1/chat/completions HTTP/1.1\r\n{HEAD}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        eventually(lambda: server.services.door.admission.running == 1)
        check_health(server)
        eventually(lambda: aborted(server) == before + 1, 20)
        assert server.services.door.admission.running == 0
    assert cut(server, "slow_reader") == 1
    assert server.say("tiny").status_code == 200


def test_p2_a_whole_answer_that_nobody_reads_keeps_no_connection(server: Server, tmp_path: Path) -> None:
    file = server.http.post(
        "/v1/files", files={"file": ("big.jsonl", b"x" * (16 << 20))}, data={"purpose": "evals"}
    ).json()["id"]
    for ending in ("", "Connection: close\r\n"):
        before = len(server._server.server_state.connections)
        with connection(server, receive_bytes=4096) as one:
            one.sendall(f"GET /v1/files/{file}/content HTTP/1.1\r\nHost: localhost\r\n{ending}\r\n".encode())
            eventually(lambda before=before: len(server._server.server_state.connections) > before)  # type: ignore[misc]
            check_health(server)
            eventually(lambda before=before: len(server._server.server_state.connections) <= before, 20)  # type: ignore[misc]
    assert cut(server, "slow_reader") == 2


def test_a_reader_that_is_slow_but_reads_gets_it_all(server: Server) -> None:
    size = 8 << 20
    file = server.http.post("/v1/files", files={"file": ("big.jsonl", b"x" * size)}, data={"purpose": "evals"}).json()[
        "id"
    ]
    with connection(server, receive_bytes=65536) as one:
        one.sendall(f"GET /v1/files/{file}/content HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        found, began = 0, time.monotonic()
        while piece := one.recv(262_144):
            found += len(piece)
            time.sleep(0.02)
    assert found > size and time.monotonic() - began > BOUNDS["write_seconds"]
    assert cut(server, "slow_reader") == 0


def test_p1_idle_connections_make_room_for_new_ones_oldest_first(make_server: Callable[..., Server]) -> None:
    server = make_server(max_connections=32)
    with contextlib.ExitStack() as stack:
        crowd = [stack.enter_context(connection(server)) for _ in range(64)]
        for one in crowd[:8]:
            with contextlib.suppress(ConnectionResetError):
                assert one.recv(1) == b""
        check_health(server)
        assert len(server._server.server_state.connections) <= 33
        crowd[-1].sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert until(crowd[-1], b'{"status":"ok"}'), "the newest is still there"
    assert cut(server, "made_room") >= 32 and cut(server, "no_room") == 0


def test_when_all_connections_are_busy_a_new_one_is_told_so(make_server: Callable[..., Server]) -> None:
    server = make_server(max_connections=16)
    server.script.seconds_to_first_token = 30
    body = b'{"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}'
    server.http.close()
    with contextlib.ExitStack() as stack:
        for _ in range(16):
            one = stack.enter_context(connection(server))
            one.sendall(
                f"POST /v1/chat/completions HTTP/1.1\r\n{HEAD}Content-Length: {len(body)}\r\n\r\n".encode() + body
            )
        eventually(lambda: server.services.door.admission.running == 16)
        late = stack.enter_context(connection(server))
        assert rest_of(late) == REFUSALS[503]
    eventually(lambda: server.services.door.admission.running == 0)
    assert cut(server, "no_room") == 1


def test_no_answer_on_a_kept_connection_waits_for_an_acknowledgement(server: Server) -> None:
    with connection(server) as one:
        one.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert one.recv(65536)
        own = [each for each in server._server.server_state.connections if each.client == one.getsockname()]
        (found,) = (each.transport.get_extra_info("socket") for each in own)  # type: ignore[union-attr]
        assert found.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
