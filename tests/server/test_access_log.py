"""The line of each request: what is in it, what never is, and that nobody waits for it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.bases import BaseModel
from adapters.errors import ConfigInvalid
from bench.served import free_port
from server.access_log import FIELDS, AccessLog
from server.lines import LineWriter, OpenFile
from tests.fixtures.processes import HOTSHOE, Served, environment
from tests.fixtures.service import Server, eventually

KEY = "a-key-of-the-log"
CANARY = "kanarienvogel-51c2"


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def line_of(path: Path, answer: httpx.Response) -> dict[str, Any]:
    """The line of one request, once it is there."""
    wanted = answer.headers["x-request-id"]
    eventually(lambda: wanted in path.read_text())
    (line,) = [line for line in lines(path) if line["request_id"] == wanted]
    return line


def test_a_line_says_who_what_and_how_long(make_server: Callable[..., Server], tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    server = make_server(api_key=KEY, access_log=str(path), trusted_proxies=("127.0.0.1",), max_running=1)
    server.pushed("router")
    made = server.http.post("/v1/keys", json={"tenant": "default", "scopes": ["infer"]}).json()
    headers = {"authorization": f"Bearer {made['key']}", "x-forwarded-for": "6.6.6.6, 203.0.113.9"}
    body = {"model": "router", "messages": [{"role": "user", "content": "hello"}], "stream": True}
    with httpx.Client(base_url=server.url, headers=headers) as http:
        answer = http.post("/v1/chat/completions?page=1", json=body)
    line = line_of(path, answer)
    assert set(line) == {"event", "timestamp", *FIELDS}
    assert line["timestamp"].endswith("Z")
    assert (line["client"], line["tenant"], line["key"]) == ("203.0.113.9", "default", made["id"])
    assert (line["method"], line["route"], line["status"]) == ("POST", "/v1/chat/completions", 200)
    assert (line["model"], line["outcome"]) == ("router@1", "completed")
    assert line["prompt_tokens"] > 0 and line["completion_tokens"] > 0
    assert 0 <= line["queue_seconds"] <= line["first_token_seconds"] <= line["seconds"]
    assert (line["request_bytes"], line["response_bytes"]) == (len(answer.request.content), len(answer.content))


def test_a_request_that_nobody_answers_for_has_no_tenant(make_server: Callable[..., Server], tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    server = make_server(api_key=KEY, access_log=str(path))
    line = line_of(path, httpx.get(f"{server.url}/v1/models"))
    assert (line["status"], line["outcome"]) == (401, None)
    assert (line["tenant"], line["key"], line["route"], line["model"]) == (None, None, "none", None)


def test_none_is_no_line_at_all(make_server: Callable[..., Server], capfd: pytest.CaptureFixture[str]) -> None:
    make_server(access_log="none").http.get("/v1/models")
    assert "/v1/models" not in "".join(capfd.readouterr())


def test_s4_what_is_sent_is_in_no_line_wherever_it_stands(make_server: Callable[..., Server], tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    server = make_server(access_log=str(path))
    evil = f"{CANARY}\r\n\x1b[31m"
    http = server.http
    server.say("tiny", evil)
    server.say(CANARY)
    server.say("tiny", user=evil, stop=[evil])
    http.post("/v1/chat/completions", content=f'{{"{CANARY}": 1'.encode())
    http.get(f"/v1/models/{CANARY}", params={CANARY: CANARY})
    http.get(f"/{CANARY}")
    http.get("/v1/models", headers={"authorization": f"Bearer {CANARY}", "x-api-key": CANARY, "cookie": CANARY})
    http.get("/v1/models", headers={"user-agent": CANARY, "referer": CANARY, "x-request-id": CANARY, "origin": CANARY})
    http.get("/v1/models", headers={"x-forwarded-for": CANARY, "host": CANARY})
    http.post("/v1/files", files={"file": (f"{CANARY}.jsonl", CANARY.encode())}, data={"purpose": "evals"})
    http.post("/v1/adapters", data={"name": CANARY}, files={"config": ("c", b"{}"), "weights": ("w", CANARY.encode())})
    http.put(f"/v1/adapters/{CANARY}/aliases/{CANARY}", json={"version": 1}, headers={"idempotency-key": CANARY})
    server.raw(f"{CANARY} / HTTP/1.1\r\nHost: x\r\n\r\n")
    server.raw(f"GET /{CANARY}%0d%0a%1b[31m HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    server.stop()
    raw = path.read_bytes()
    assert raw.count(b"\n") >= 14
    assert CANARY.encode() not in raw and b"\x1b" not in raw and b"\r" not in raw
    assert all(line["event"] == "request" for line in lines(path))


def test_no_value_can_start_a_line_or_move_a_terminal(tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    one = AccessLog(str(path), lambda: None)
    one.write({"model": 'a\r\n{"event": "request", "status": 200}\x1b[2J\x00\u2028\udcff\x85'})
    one.close()
    (line,) = path.read_bytes().splitlines()
    assert line.isascii() and json.loads(line)["model"].startswith("a\r\n") and b"\x1b" not in line


def test_a_file_that_was_moved_is_opened_anew(tmp_path: Path) -> None:
    path, moved = tmp_path / "access.log", tmp_path / "access.log.1"
    lost: list[int] = []
    one = AccessLog(str(path), lambda: lost.append(1))
    one.write({"n": 1})
    eventually(lambda: len(lines(path)) == 1)
    path.rename(moved)
    one.write({"n": 2})
    eventually(lambda: path.exists() and len(lines(path)) == 1)
    path.unlink()
    one.write({"n": 3})
    one.close()
    assert [row["n"] for row in lines(path)] == [3] and [row["n"] for row in lines(moved)] == [1] and not lost


@pytest.mark.parametrize("where", ["nowhere/access.log", ".", "pipe"])
def test_a_place_that_cannot_be_written_is_named_at_the_start(tmp_path: Path, where: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigInvalid, match=r"access_log .* cannot be written"):
        AccessLog(str(tmp_path / where), lambda: None)


def test_a_full_disk_loses_lines_and_counts_them_and_serving_goes_on(make_server: Callable[..., Server]) -> None:
    server = make_server(access_log="/dev/full")
    for _ in range(20):
        assert server.say("tiny").status_code == 200
    eventually(lambda: server.metric("hotshoe_lost_log_lines_total") >= 20)


def test_a_pipe_that_nobody_reads_loses_lines_and_serving_goes_on(
    make_server: Callable[..., Server], tmp_path: Path
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        server = make_server(access_log=str(pipe))
        log = AccessLog(str(pipe), server.services.metrics.lost_lines.inc)
        for _ in range(20_000):  # more than the pipe and the queue hold
            log.write({"padding": "x" * 64})
        assert server.metric("hotshoe_lost_log_lines_total") > 0
        for _ in range(5):
            assert server.say("tiny").status_code == 200
            assert server.http.get("/health").status_code == 200
        began = time.monotonic()
        log.close()
        server.stop()
        assert time.monotonic() - began < 20, "the end waits for a log at most a moment"
    finally:
        os.close(reader)


def test_a_line_that_was_cut_does_not_spoil_the_next(tmp_path: Path) -> None:
    """A pipe without room takes part of a line, and refuses the rest."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    file = OpenFile(pipe)
    os.set_blocking(file(), False)
    lost: list[int] = []
    one = LineWriter(file, lambda: lost.append(1))
    try:
        one.write("x" * 200_000)
        eventually(lambda: len(lost) == 1)
        before = os.read(reader, 1 << 20)
        one.write("whole")
        one.close(5)
        assert before.strip(b"x") == b"" and os.read(reader, 100) == b"\nwhole\n"
    finally:
        os.close(reader)
        file.close()


def test_a_standard_error_that_nobody_reads_does_not_stop_the_server(tiny_base: BaseModel, tmp_path: Path) -> None:
    port = free_port()
    words = [*HOTSHOE, "serve", "--engine", "scripted", "--base", str(tiny_base.folder), "--port", str(port)]
    env = environment(HOTSHOE_HOME=str(tmp_path / "home"))
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=env)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as http:
            eventually(lambda: http.get("/ready").status_code == 200, 60)
            for _ in range(400):  # each some 400 bytes, and a pipe holds 65,536
                assert http.get("/health").status_code == 200
        process.terminate()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


def test_on_standard_error_requests_stand_among_the_servers_own_lines(tiny_base: BaseModel, tmp_path: Path) -> None:
    served = Served(tmp_path / "home", "--engine", "scripted", "--base", str(tiny_base.folder))
    try:
        httpx.get(f"{served.url}/v1/models")
    finally:
        assert served.stop() == 0
    found = [json.loads(line) for line in served.err.read_text().splitlines()]
    (line,) = [line for line in found if line["event"] == "request" and line["route"] == "/v1/models"]
    assert set(FIELDS) < set(line) and line["logger"] == "hotshoe.access" and line["client"] == "127.0.0.1"


def test_lines_of_many_threads_stay_whole(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    one = LineWriter(OpenFile(path))
    threads = [threading.Thread(target=lambda n=n: [one.write(f"{n} " * 500) for _ in range(50)]) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    one.close(10)
    found = path.read_text().splitlines()
    assert len(found) == 400 and all(len(set(line.split())) == 1 for line in found)


def test_the_socket_of_a_client_that_only_connects_is_no_request(
    make_server: Callable[..., Server], tmp_path: Path
) -> None:
    path = tmp_path / "access.log"
    server = make_server(access_log=str(path))
    with socket.create_connection(("127.0.0.1", server.port)):
        pass
    server.http.get("/health")
    server.stop()
    assert {line["route"] for line in lines(path)} == {"/ready", "/health"}
