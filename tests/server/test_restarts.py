"""F15, F19, and residency as desired state, with real processes: what a kill of engine, server or both leaves whole."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from adapters.bases import BaseModel
from tests.fixtures.service import error_of, eventually
from tests.fixtures.standing import Standing, is_alive

NAMES = ("one", "two", "three")
LONG = "w " * 200
PAUSE = "0.02"  # seconds between two tokens: a long answer takes some four seconds


@pytest.fixture(scope="module")
def standing(tiny_base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Standing]:
    """A server over the stand-in's process, with three versions warm. Each test leaves it so."""
    one = Standing(tiny_base.folder, tmp_path_factory.mktemp("restarts") / "home", STAND_IN_PAUSE=PAUSE)
    try:
        for seed, name in enumerate(NAMES):
            assert one.push(name, seed).json()["status"] == "ready"
        yield one
    finally:
        one.end()


@contextmanager
def streaming(server: Standing, model: str) -> Iterator[Iterator[str]]:
    """The data of the events of a long stream, as they come."""
    body = {"model": model, "stream": True, "messages": [{"role": "user", "content": LONG}]}
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=60) as response:
        assert response.status_code == 200
        yield (line[6:] for line in response.iter_lines() if line.startswith("data: "))


def is_ready(server: Standing) -> bool:
    return server.ready().status_code == 200


def running(server: Standing) -> int:
    found: int = httpx.get(f"{server.url}/v1/system", timeout=30).json()["requests"]["running"]
    return found


def check_all_back(server: Standing, before: list[tuple[str, str, int]]) -> None:
    """Asked the moment that /ready says yes."""
    assert {row["residency"] for row in server.places().values()} == {"resident"}
    assert server.triples() == before and len(before) == len(NAMES)


@pytest.mark.parametrize("killed", ["all", "core", "API process"])
def test_f15_a_kill_while_streaming_ends_the_stream_with_an_error_and_loses_nothing(
    standing: Standing, killed: str
) -> None:
    before = standing.triples()
    leader, core = standing.engine
    with ThreadPoolExecutor() as pool, streaming(standing, "one") as events:
        assert json.loads(next(events))["model"] == "one@1"
        whole = pool.submit(standing.ask, "two", LONG)
        eventually(lambda: running(standing) == 2)
        if killed == "all":
            os.killpg(leader, signal.SIGKILL)
        else:
            os.kill(core if killed == "core" else leader, signal.SIGKILL)
        eventually(lambda: not is_ready(standing), 2)
        refused = [standing.ask("one"), standing.ask("tiny")]
        *_, error, done = events
        refused.append(whole.result(30))
    assert json.loads(error)["error"]["code"] == "engine_unavailable" and done == "[DONE]"
    for answer in (one for one in refused[:-1] if one.status_code != 503):
        assert answer.status_code == 200, "it came back meanwhile"
    for answer in (one for one in refused if one.status_code != 200):
        assert (answer.status_code, error_of(answer)["code"]) == (503, "engine_unavailable")
        assert int(answer.headers["retry-after"]) >= 1
    assert refused[-1].status_code == 503, "its engine died before it answered"
    eventually(lambda: is_ready(standing), 30)
    check_all_back(standing, before)
    assert standing.engine != (leader, core)
    assert [standing.ask(name).json()["model"] for name in NAMES] == ["one@1", "two@1", "three@1"]


@pytest.mark.parametrize("which", [0, 1], ids=["API process", "core"])
def test_f15_a_stopped_process_makes_it_unready_and_a_stream_goes_on_with_it(standing: Standing, which: int) -> None:
    before, started = standing.engine, len(standing.loads())
    with streaming(standing, "two") as events:
        next(events)
        os.kill(before[which], signal.SIGSTOP)
        try:
            eventually(lambda: not is_ready(standing), 2)
            refused = standing.ask("two")
            assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
            system = httpx.get(f"{standing.url}/v1/system", timeout=10).json()
            assert (system["status"], system["engine"]["is_ready"]) == ("not_ready", False)
        finally:
            os.kill(before[which], signal.SIGCONT)
        rest = list(events)
    assert rest[-1] == "[DONE]" and not any('"error"' in event for event in rest)
    eventually(lambda: is_ready(standing), 5)
    assert standing.engine == before and len(standing.loads()) == started, "nothing was started or loaded anew"


def test_a_killed_server_has_its_warm_set_back_before_it_is_ready(standing: Standing) -> None:
    before, engine = standing.triples(), standing.engine
    with streaming(standing, "one") as events:
        next(events)
        standing.stop(signal.SIGKILL)
        with pytest.raises(httpx.TransportError):
            list(events)
    eventually(lambda: not is_alive(engine[0]), 5)
    standing.start()
    check_all_back(standing, before)
    os.kill(engine[1], signal.SIGKILL)  # the stand-in's core does not ask to die with its parent


def test_a_machine_that_went_down_has_its_warm_set_back_too(standing: Standing) -> None:
    """Server and engine at once; the lock and the socket's folder stay behind, with another process's number in it."""
    before, engine = standing.triples(), standing.engine
    standing.process.send_signal(signal.SIGKILL)
    os.killpg(engine[0], signal.SIGKILL)
    standing.process.wait(10)
    assert (standing.home / "run" / "engine.sock").exists()
    (standing.home / "lock").write_text("1")
    standing.start()
    check_all_back(standing, before)


def test_f19_sigterm_cuts_neither_a_stream_nor_an_upload_within_the_grace(standing: Standing, tmp_path: Path) -> None:
    head, rest = half_an_upload(standing)
    with socket.create_connection(("127.0.0.1", standing.port), timeout=30) as upload:
        upload.sendall(head)
        with streaming(standing, "three") as events:
            next(events)
            standing.process.send_signal(signal.SIGTERM)
            eventually(lambda: not is_listening(standing))
            upload.sendall(rest)
            answer = b"".join(iter(lambda: upload.recv(65536), b""))
            streamed = list(events)
    assert streamed[-1] == "[DONE]" and not any('"error"' in event for event in streamed)
    status, _, body = answer.partition(b"\r\n\r\n")
    assert b" 201 " in status.splitlines()[0], answer[:300]
    assert json.loads(body)["id"] == "late@1"
    assert standing.process.wait(30) == 0
    assert json.loads(standing.run("doctor", "--json").stdout)["is_sound"]
    standing.start()
    eventually(lambda: standing.places()["late@1"]["status"] == "ready")
    assert standing.ask("late").json()["model"] == "late@1"


def half_an_upload(server: Standing) -> tuple[bytes, bytes]:
    """A whole multipart request, cut in its middle."""
    from adapters.bases import load_base
    from tests.fixtures.adapters import write_adapter

    folder = write_adapter(server.home.parent / "late", load_base(server.base), seed=99)
    files = {"config": folder / "adapter_config.json", "weights": folder / "adapter_model.safetensors"}
    parts = {part: (path.name, path.read_bytes()) for part, path in files.items()}
    request = httpx.Request("POST", f"{server.url}/v1/adapters", data={"name": "late"}, files=parts)
    body = request.read()
    fields = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
    text = f"POST /v1/adapters HTTP/1.1\r\n{fields}connection: close\r\n\r\n".encode() + body
    return text[: len(text) // 2], text[len(text) // 2 :]


def is_listening(server: Standing) -> bool:
    try:
        socket.create_connection(("127.0.0.1", server.port), timeout=5).close()
    except ConnectionRefusedError:
        return False
    return True


def test_f19_after_the_grace_a_stream_is_told_that_the_server_stops(tiny_base: BaseModel, tmp_path: Path) -> None:
    one = Standing(tiny_base.folder, tmp_path / "home", STAND_IN_PAUSE="0.2", HOTSHOE_GRACE_SECONDS="1")
    engine = one.engine
    with streaming(one, "tiny") as events:
        next(events)
        threading.Timer(0.1, lambda: one.process.send_signal(signal.SIGTERM)).start()
        *_, error, done = events
    assert "stopping" in json.loads(error)["error"]["message"] and done == "[DONE]"
    assert one.process.wait(30) == 0
    eventually(lambda: not any(map(is_alive, engine)))
