"""F14: another process holds the registry's lock. Writes are 503 with Retry-After, everything that is known goes on."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import httpx
import pytest

from adapters.database import FILE
from adapters.database_errors import BUSY_SECONDS
from tests.fixtures.service import Server, error_of, eventually

SLACK_SECONDS = 4.0  # of a loaded machine; the wait itself is BUSY_SECONDS, below the five that are promised


@contextmanager
def locked(home: Path, kind: str) -> Iterator[None]:
    """Hold the lock as another program would: IMMEDIATE lets readers in, EXCLUSIVE does not."""
    with closing(sqlite3.connect(home / FILE, isolation_level=None, timeout=30)) as other:
        other.execute(f"BEGIN {kind}")
        yield
        other.execute("ROLLBACK")


@pytest.fixture
def server(make_server: Callable[..., Server]) -> Server:
    made = make_server()
    made.pushed("router")
    made.pushed("router")
    assert made.say("router").status_code == 200
    return made


def writes(server: Server) -> list[Callable[[], httpx.Response]]:
    """One of each that changes the registry, several times, so that they are more than a small pool of threads."""
    folder = server.adapter()
    once = [
        lambda: server.push("router", folder, wait=0),
        lambda: server.promote("router", 2),
        lambda: server.http.post("/v1/keys", json={"scopes": ["infer"]}),
        lambda: server.http.delete("/v1/adapters/router/versions/2"),
        lambda: server.http.post("/v1/files", data={"purpose": "evals"}, files={"file": ("rows", b"{}")}),
        lambda: server.http.post("/v1/exports", json={"model": "router@1"}),
        lambda: server.http.put("/v1/tenants/vision", json={"limits": {}}),
    ]
    return once * 3


def timed(call: Callable[[], httpx.Response]) -> tuple[httpx.Response, float]:
    begun = time.monotonic()
    return call(), time.monotonic() - begun


@pytest.mark.parametrize("kind", ["IMMEDIATE", "EXCLUSIVE"])
def test_f14_writes_are_told_to_retry_within_five_seconds_and_answers_go_on(server: Server, kind: str) -> None:
    home = server.services.settings.home
    assert server.services.registry.database.path == home / FILE
    assert BUSY_SECONDS < 5
    with ThreadPoolExecutor(32) as pool, locked(home, kind):
        waiting = [pool.submit(timed, call) for call in writes(server)]
        asked = 0
        while not all(one.done() for one in waiting):
            answer, seconds = timed(lambda: server.say("router"))
            assert (answer.status_code, answer.json()["model"]) == (200, "router@1")
            assert seconds < BUSY_SECONDS
            if kind == "IMMEDIATE":
                assert server.http.get("/v1/adapters/router").status_code == 200
            assert server.http.get("/health").status_code == 200
            asked += 1
        for one in waiting:
            answer, seconds = one.result()
            assert (answer.status_code, error_of(answer)["code"]) == (503, "registry_busy"), answer.text
            assert int(answer.headers["retry-after"]) >= 1
            assert seconds < BUSY_SECONDS + SLACK_SECONDS
        assert asked > 5
        assert server.say("router").status_code == 200  # also after the writes that failed
    assert server.pushed("router")["version"] == 3  # nothing of the refused ones is left, and all goes on
    assert server.promote("router", 2).status_code == 200
    assert len(server.http.get("/v1/adapters/router").json()["versions"]) == 3


def test_f14_a_proof_that_meets_the_lock_is_made_when_it_is_gone(server: Server) -> None:
    server.script.seconds_to_load = 0.5
    server.push("late", wait=0)
    with locked(server.services.settings.home, "IMMEDIATE"):
        time.sleep(BUSY_SECONDS + 1.5)  # the proof is over, and could not be written down
        assert server.http.get("/v1/adapters/late/versions/1").json()["status"] == "quarantined"
    eventually(lambda: server.http.get("/v1/adapters/late/versions/1").json()["status"] == "ready", 20)


def test_f14_usage_that_could_not_be_written_is_written_later(server: Server) -> None:
    before = usage(server)
    with locked(server.services.settings.home, "IMMEDIATE"):
        for _ in range(3):
            server.say("router")
        time.sleep(1)
    eventually(lambda: usage(server) == before + 3, 20)


def usage(server: Server) -> int:
    rows = server.http.get("/v1/usage").json()["data"]
    return sum(row["requests"] for row in rows)
