"""U30: multipart bodies made to hurt are refused, and the event loop stays free meanwhile."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterator

import pytest

from tests.fixtures.service import Server, error_of

EDGE = "xxEDGExx"
PART = f'--{EDGE}\r\nContent-Disposition: form-data; name="%s"\r\n\r\nx\r\n'


def many_parts() -> Iterator[bytes]:
    for i in range(100_000):
        yield (PART % f"p{i}").encode()


def same_part_twice() -> Iterator[bytes]:
    yield (PART % "name").encode() * 2


def long_headers() -> Iterator[bytes]:
    yield f"--{EDGE}\r\n".encode()
    yield b"X-Long: " + b"y" * 64 * 1024 + b"\r\n" * 2


def header_without_end() -> Iterator[bytes]:
    yield f"--{EDGE}\r\nContent-Disposition: ".encode()
    yield from itertools.repeat(b"y" * 65536, 64)


def no_last_boundary() -> Iterator[bytes]:
    yield (PART % "name").encode()


def preamble() -> Iterator[bytes]:
    yield from itertools.repeat(b"z" * 65536, 1600)


def nearly_boundaries() -> Iterator[bytes]:
    yield (PART % "weights").encode()[:-3]
    yield from itertools.repeat(f"\r\n--{EDGE[:-1]}".encode() * 4096, 64)


async def longest_stall(seconds: float) -> float:
    """How long the loop did not turn, at most, within so many seconds."""
    ends_at, worst = time.monotonic() + seconds, 0.0
    while (now := time.monotonic()) < ends_at:
        await asyncio.sleep(0.005)
        worst = max(worst, time.monotonic() - now)
    return worst


@pytest.mark.parametrize(
    "body",
    [many_parts, same_part_twice, long_headers, header_without_end, no_last_boundary, preamble, nearly_boundaries],
    ids=lambda body: body.__name__,
)
def test_u30_a_multipart_body_that_is_made_to_hurt_is_refused_at_once(server: Server, body: object) -> None:
    assert callable(body)
    stalls = []
    for _ in range(3):  # the least of three: another process may hold the core for as long
        watch = asyncio.run_coroutine_threadsafe(longest_stall(1.0), server.loop)
        headers = {"content-type": f"multipart/form-data; boundary={EDGE}"}
        answer = server.http.post("/v1/adapters", content=body(), headers=headers)
        assert answer.status_code in (400, 413, 422), answer.text
        assert error_of(answer)["message"]
        stalls.append(watch.result(10))
        if stalls[-1] < 0.1:
            break
    assert min(stalls) < 0.1, "the event loop did not turn"
    assert server.http.get("/health").status_code == 200
