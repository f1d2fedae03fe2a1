"""F17: the machine's clock is an hour behind, ten years ahead, or stands still. Nothing is lost, and nothing hangs.

The server is a process of its own whose `time.time` is the test's; what is measured in durations has another clock.
"""

from __future__ import annotations

import itertools
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.bases import BaseModel
from adapters.database import FILE
from adapters.doctor import run_doctor
from adapters.registry import Registry
from adapters.types import DEFAULT_TENANT
from tests.fixtures.adapters import write_adapter
from tests.fixtures.processes import Served
from tests.fixtures.service import error_of, eventually

HOUR, DAY, YEAR = 3600, 86400, 365 * 86400
SEEDS = itertools.count(1)
CLOCK = """
import os, time
real = time.time
def told():
    word = open(os.environ["TEST_CLOCK"]).read()
    return float(word[1:]) if word.startswith("=") else real() + float(word)
time.time = told
from server.cli.main import run
run()
"""


class Clocked(Served):
    """A server whose wall clock is what the test says, also while it runs."""

    def __init__(self, home: Path, base: BaseModel, clock: str = "+0") -> None:
        self.clock = home.parent / "clock"
        self.base = base
        self.http: Any = None
        self.set(clock)
        super().__init__(home, "--engine", "scripted", "--base", str(base.folder), TEST_CLOCK=str(self.clock))

    def start(self, seconds: float = 60) -> None:
        self.words[:3] = [sys.executable, "-c", CLOCK]
        super().start(seconds)
        if self.http is not None:
            self.http.close()
        self.http = httpx.Client(base_url=self.url, timeout=30)

    def set(self, clock: str) -> None:
        """Seconds that the clock is off, `+3600`; or where it stands, `=1700000000`."""
        staged = self.clock.with_suffix(".new")
        staged.write_text(clock)
        staged.replace(self.clock)

    def end(self) -> None:
        super().end()
        self.http.close()

    def restart(self) -> None:
        assert self.stop() == 0
        self.start()

    def say(self, model: str = "router", key: str | None = None) -> httpx.Response:
        body = {"model": model, "messages": [{"role": "user", "content": "hello"}]}
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return self.http.post("/v1/chat/completions", json=body, headers=headers)

    def push(self, **headers: str) -> dict[str, Any]:
        seed = next(SEEDS)
        folder = write_adapter(self.home.parent / f"adapter{seed}", self.base, seed=seed)
        parts = {
            part: (file, (folder / file).read_bytes())
            for part, file in (("config", "adapter_config.json"), ("weights", "adapter_model.safetensors"))
        }
        options: dict[str, Any] = {"data": {"name": "router"}, "files": parts, "params": {"wait": 20}}
        row: dict[str, Any] = self.http.post("/v1/adapters", headers=headers, **options).json()
        assert row["status"] == "ready", row
        return row

    def key(self, **fields: Any) -> str:
        answer = self.http.post("/v1/keys", json={"scopes": ["infer"], **fields})
        assert answer.status_code == 201, answer.text
        return str(answer.json()["key"])

    def send(self, **fields: str) -> str:
        answer = self.http.post("/v1/files", data={"purpose": "evals", **fields}, files={"file": ("rows", b"{}\n")})
        assert answer.status_code == 200, answer.text
        return str(answer.json()["id"])

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        with closing(sqlite3.connect(self.home / FILE)) as connection:
            return connection.execute(query).fetchall()


@pytest.fixture
def server(tmp_path: Path, tiny_base: BaseModel) -> Iterator[Clocked]:
    one = Clocked(tmp_path / "home", tiny_base)
    try:
        yield one
    finally:
        one.end()


def kept(server: Clocked) -> list[list[tuple[Any, ...]]]:
    """What no clock may take away."""
    return [
        server.rows("SELECT number, status, digest FROM versions ORDER BY number"),
        server.rows("SELECT alias, number FROM aliases"),
        server.rows("SELECT id FROM api_keys WHERE revoked_at IS NULL ORDER BY id"),
        server.rows("SELECT id FROM files WHERE expires_at IS NULL"),
    ]


def test_f17_ten_years_ahead_takes_only_what_has_expired_and_back_again_all_is_as_it_was(server: Clocked) -> None:
    server.push()
    server.push()
    for_ever = server.send()
    a_month = server.send(**{"expires_after[anchor]": "created_at", "expires_after[seconds]": str(30 * DAY)})
    admin = server.key(scopes=["admin"])
    server.http.headers["authorization"] = f"Bearer {admin}"
    short = server.key(expires_in_seconds=90 * DAY)
    before = kept(server)

    server.set(f"+{10 * YEAR}")
    assert server.say().status_code == 200
    assert server.say(key=short).status_code == 401
    assert server.http.get(f"/v1/files/{a_month}").status_code == 404
    assert server.http.get(f"/v1/files/{for_ever}").status_code == 200
    assert server.http.put("/v1/adapters/router/aliases/stable", json={"version": 2}).status_code == 200
    assert server.http.post("/v1/adapters/router/rollback").status_code == 200
    server.set("+0")
    assert server.say(key=short).status_code == 200
    assert server.http.get(f"/v1/files/{a_month}").status_code == 200  # nobody had swept meanwhile
    assert kept(server) == before

    server.set(f"+{10 * YEAR}")
    server.restart()  # and now somebody does
    server.http.headers["authorization"] = f"Bearer {admin}"
    assert kept(server) == before
    assert server.say().json()["model"] == "router@1"
    assert server.push()["version"] == 3
    server.set("+0")
    server.restart()
    server.http.headers["authorization"] = f"Bearer {admin}"
    assert server.say(key=short).status_code == 200
    assert server.http.get(f"/v1/files/{for_ever}/content").content == b"{}\n"
    assert server.http.get(f"/v1/files/{a_month}").status_code == 404  # past its time once, it is gone
    assert server.say("router@3").status_code == 200
    assert server.stop() == 0
    assert run_doctor(server.home).is_clean


def test_f17_an_hour_behind_nothing_is_refused_and_a_kept_answer_is_still_kept(server: Clocked) -> None:
    folder = {"idempotency-key": "k"}
    first = server.http.post("/v1/keys", json={"scopes": ["admin"]}, headers=folder).json()
    server.http.headers["authorization"] = f"Bearer {first['key']}"
    server.push()
    upload = {"purpose": "evals", "filename": "f", "bytes": 4, "mime_type": "m"}
    upload_id = server.http.post("/v1/uploads", json=upload).json()["id"]
    promoted = server.http.put(
        "/v1/adapters/router/aliases/canary", json={"version": 1}, headers={"idempotency-key": "promote"}
    ).json()

    server.set(f"-{HOUR}")
    assert server.say().status_code == 200
    again = server.http.put(
        "/v1/adapters/router/aliases/canary", json={"version": 1}, headers={"idempotency-key": "promote"}
    )
    assert again.json() == promoted
    part = server.http.post(f"/v1/uploads/{upload_id}/parts", files={"data": ("d", b"four")}).json()["id"]
    done = server.http.post(f"/v1/uploads/{upload_id}/complete", json={"part_ids": [part]})
    assert done.json()["status"] == "completed", done.text
    assert server.push()["version"] == 2
    server.restart()
    server.http.headers["authorization"] = f"Bearer {first['key']}"
    assert server.say().json()["model"] == "router@1"
    events = server.http.get("/v1/adapters/router/events").json()["data"]
    assert [event["id"] for event in events] == sorted((event["id"] for event in events), reverse=True)
    assert server.stop() == 0
    assert run_doctor(server.home).is_clean


def test_f17_an_answer_kept_by_a_clock_far_ahead_does_not_last_for_years(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry, real = Registry.open(tmp_path), time.time()
    for ahead, is_kept in ((0, True), (HOUR, True), (-HOUR, True), (10 * YEAR, False)):
        monkeypatch.setattr(time, "time", lambda ahead=ahead: real + ahead)
        registry.remember(DEFAULT_TENANT, f"key{ahead}", "hash", {"status": 200})
        monkeypatch.setattr(time, "time", lambda: real)
        assert (registry.recall(DEFAULT_TENANT, f"key{ahead}", "hash") is not None) == is_kept
    registry.remember(DEFAULT_TENANT, f"key{10 * YEAR}", "another request", {"status": 201})
    assert registry.recall(DEFAULT_TENANT, f"key{10 * YEAR}", "another request") == {"status": 201}
    registry.close()


def test_f17_a_clock_that_stands_still_holds_up_nothing(tmp_path: Path, tiny_base: BaseModel) -> None:
    server = Clocked(tmp_path / "home", tiny_base, f"={time.time():.0f}")
    try:
        server.push()
        server.push()
        assert server.http.put("/v1/adapters/router/aliases/stable", json={"version": 2}).status_code == 200
        assert server.say().json()["model"] == "router@2"
        server.http.headers["authorization"] = f"Bearer {server.key(scopes=['admin'])}"
        key = server.key(limits={"requests_per_minute": 60})
        for _ in range(60):
            assert server.say(key=key).status_code == 200
        refused = server.say(key=key)
        while refused.status_code == 200:  # a slow machine has its bucket filled meanwhile
            refused = server.say(key=key)
        assert error_of(refused)["code"] == "rate_limit_exceeded"
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        eventually(lambda: server.say(key=key).status_code == 200)  # the minute goes on all the same
        eventually(lambda: bool(server.http.get("/v1/usage").json()["data"]), 20)  # what is written now and then, too
        server.restart()
        assert server.say(key=key).json()["model"] == "router@2"
    finally:
        server.end()
    assert run_doctor(server.home).is_clean


def test_the_process_really_has_the_clock_of_the_test(tmp_path: Path) -> None:
    (tmp_path / "clock").write_text("=86400")
    code = CLOCK.split("from server")[0] + "print(time.time())"
    env = {**os.environ, "TEST_CLOCK": str(tmp_path / "clock")}
    assert subprocess.check_output([sys.executable, "-c", code], env=env, text=True).strip() == "86400.0"
