"""A3: what a client library would never send. Nothing of it is answered with 2xx unless the key is there."""

from __future__ import annotations

import contextlib
import itertools
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from adapters.bases import BaseModel
from tests.fixtures.service import Server, running
from tests.surface.conftest import KEY

PAGE = "https://chat.example.org"
PATHS = (
    "/v1/models",
    "//v1/models",
    "/v1//models",
    "/v1/./models",
    "/v1/../v1/models",
    "/health/../v1/models",
    "/health/..%2fv1%2fmodels",
    "/health%2f..%2fv1/models",
    "/v1%2Fmodels",
    "/%76%31/models",
    "/V1/MODELS",
    "/v1/models/",
    "/v1/models?/health",
    "/v1/models#/health",
    "/health;/v1/models",
    "/v1/models%00",
    "/v1/models%0d%0aX:%20y",
    "http://127.0.0.1/v1/models",
    "http://evil.example/v1/models",
    "http://user:pass@127.0.0.1/v1/models",
    "/metrics",
    "/openapi.json",
    "/docs",
    "/v1/load_lora_adapter",
    "/invocations",
    "*",
)
METHODS = ("GET", "HEAD", "OPTIONS", "POST", "PUT", "DELETE", "PATCH", "TRACE", "get", "CONNECT")
HOSTS = ("127.0.0.1", "a/?x=", "localhost/health", "evil.example", "127.0.0.1:99999", "[::1", "a@127.0.0.1")
FRAMINGS = (
    "Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    "Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}",
    "Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    "Content-Length: +2\r\n\r\n{}",
    "Content-Length: -1\r\n\r\n{}",
    "Content-Length: 0x2\r\n\r\n{}",
    "Content-Length: 2, 2\r\n\r\n{}",
    "Content-Length: 99999999999999999999999\r\n\r\n{}",
    "Transfer-Encoding: chunked, identity\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    "Transfer-Encoding: xchunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    "Transfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n{}\r\n0\r\n\r\n",
    "Transfer-Encoding: chunked\r\n\r\n-2\r\n{}\r\n0\r\n\r\n",
)


def statuses(server: Server, text: str, seconds: float = 5.0) -> list[int]:
    """The status of every response that comes back on one connection; empty when it is closed without one."""
    answer = b""
    with socket.create_connection(("127.0.0.1", server.port), timeout=seconds) as connection:
        connection.sendall(text.encode("latin-1"))
        with contextlib.suppress(ConnectionResetError, TimeoutError):
            while piece := connection.recv(65536):
                answer += piece
    return [int(line.split(b" ")[1]) for line in answer.split(b"\r\n") if line.startswith(b"HTTP/1.")]


@pytest.mark.parametrize("method", METHODS)
def test_a3_no_path_and_no_host_gets_past_a_missing_key(keyed: Server, method: str) -> None:
    for path, host in itertools.product(PATHS, HOSTS):
        text = f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        assert not [one for one in statuses(keyed, text) if one < 400 or one >= 500], (path, host)


@pytest.fixture(scope="module")
def edged(tiny_base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Behind a prefix and a named proxy, with an origin listed."""
    edge: dict[str, Any] = {"root_path": "/llm", "trusted_proxies": ("127.0.0.1",), "cors_origins": (PAGE,)}
    with running(tiny_base, tmp_path_factory.mktemp("edged"), api_key=KEY, **edge) as one:
        yield one


@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "DELETE"])
def test_a3_no_prefix_no_origin_and_no_proxys_word_stands_for_a_key(edged: Server, method: str) -> None:
    asked = "Access-Control-Request-Method: POST\r\n"
    heads = (
        "",
        f"Origin: https://evil.example\r\n{asked}",
        f"Origin: {PAGE}.evil.example\r\n{asked}",
        f"Origin: {PAGE}\r\n",
        "X-Forwarded-For: 127.0.0.1\r\nX-Forwarded-Host: localhost\r\nX-Forwarded-Proto: https\r\n",
        "X-Forwarded-For: ::1, 127.0.0.1\r\nForwarded: for=127.0.0.1\r\nVia: 1.1 x\r\nX-Original-URL: /health\r\n",
    )
    tricks = (
        "/llm",
        "/llm/",
        "/llmx/v1/models",
        "/llm/llm/v1/models",
        "//llm/v1/models",
        "/llm%2Fv1%2Fmodels",
        "/llm/health/..",
    )
    paths = [*(f"/llm{path}" for path in PATHS if path.startswith("/")), *tricks]
    for path, head in itertools.product(paths, heads):
        text = f"{method} {path} HTTP/1.1\r\nHost: x\r\n{head}Content-Length: 0\r\nConnection: close\r\n\r\n"
        assert not [one for one in statuses(edged, text) if one < 400 or one >= 500], (path, head)
    preflight = f"OPTIONS /llm/v1/models HTTP/1.1\r\nHost: x\r\nOrigin: {PAGE}\r\n{asked}Connection: close\r\n\r\n"
    assert statuses(edged, preflight) == [200], "a listed page's preflight alone needs none"


@pytest.mark.parametrize("framing", FRAMINGS)
def test_a3_a_body_with_two_lengths_smuggles_nothing(keyed: Server, framing: str) -> None:
    smuggled = "GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    for path in ("/v1/chat/completions", "/v1/adapters", "/health"):
        for version in ("1.1", "1.0"):
            found = statuses(keyed, f"POST {path} HTTP/{version}\r\nHost: 127.0.0.1\r\n{framing}{smuggled}", 0.5)
            assert not [one for one in found if one < 400 or one >= 500], (path, found)


@pytest.mark.parametrize(
    "header",
    [
        "Authorization: Bearer",
        "Authorization: Bearer ",
        f"Authorization: Basic {KEY}",
        f"Authorization: {KEY}",
        f"Authorization: Bearer {KEY} {KEY}",
        f"Authorization: Bearer {KEY}\r\nAuthorization: Bearer {KEY}",
        f"Authorization : Bearer {KEY}",
        f"X-Api-Key: {KEY}",
        f"Proxy-Authorization: Bearer {KEY}",
        f"Cookie: authorization=Bearer {KEY}",
        "Authorization: Bearer " + "x" * 40_000,
        "Authorization: Bearer \x00\xff",
    ],
)
def test_a2_nothing_but_one_right_key_is_one(keyed: Server, header: str) -> None:
    found = statuses(keyed, f"GET /v1/models HTTP/1.1\r\nHost: x\r\n{header}\r\nConnection: close\r\n\r\n")
    assert not [one for one in found if one < 400 or one >= 500], found


def test_a3_the_same_requests_with_the_key_are_answered(keyed: Server) -> None:
    """What the tests above show is the key's doing, not a server that answers nothing."""
    head = f"Host: 127.0.0.1\r\nAuthorization: Bearer {KEY}\r\nConnection: close\r\n\r\n"
    assert statuses(keyed, f"GET /v1/models HTTP/1.1\r\n{head}") == [200]
    assert statuses(keyed, f"GET /health HTTP/1.1\r\n{head}") == [200]


def test_a11_nothing_that_a_client_sends_starts_a_header_line(server: Server) -> None:
    crlf = "%0d%0aSet-Cookie:%20a=b"
    for path in (f"/v1/models/{crlf}", f"/v1/adapters/{crlf}", f"/{crlf}", f"/v1/exports/{crlf}?x={crlf}"):
        answer = server.http.get(path)
        assert answer.status_code in (400, 404) and "set-cookie" not in answer.headers, path
        assert b"\r\n" not in answer.content
    for field in ({"model": "a\r\nSet-Cookie: a=b"}, {"model": "tiny", "x\r\nSet-Cookie: a=b": 1}):
        answer = server.http.post("/v1/chat/completions", json={"messages": [], **field})
        assert answer.status_code in (400, 404) and "set-cookie" not in answer.headers
    for header in ("x-request-id", "idempotency-key", "if-match"):
        answer = server.http.put("/v1/adapters/x/aliases/y", headers={header: "a\tb"}, json={"version": 1})
        assert "a\tb" not in str(answer.headers)
