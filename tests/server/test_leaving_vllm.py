"""F18 on the real engine: a client that leaves has its sequence aborted there, and its place and adapter are free."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from tests.conftest import CONTEXT_TOKENS, SLOTS, STAGED_LIMIT
from tests.fixtures.borrowed import BorrowedEngine
from tests.fixtures.engines import EngineRig
from tests.fixtures.service import Server, eventually, running

pytestmark = pytest.mark.model
BACK_SECONDS = 30.0  # of an engine that may be in the middle of a step on a busy machine


@pytest.fixture(scope="module")
def server(vllm_engine: EngineRig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    scratch = tmp_path_factory.mktemp("leaving")
    limits: dict[str, Any] = {"slots": SLOTS, "staged_limit": STAGED_LIMIT, "context_length_tokens": CONTEXT_TOKENS}
    with running(vllm_engine.base, scratch, on=BorrowedEngine(vllm_engine, scratch / "run"), **limits) as one:
        one.pushed("left", targets=("q_proj", "v_proj"))
        yield one


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("model", ["base", "left"])
def test_f18_the_engine_stops_for_a_client_that_left(server: Server, model: str, stream: bool) -> None:
    name = server.base.id if model == "base" else model
    label = server.base.id if model == "base" else "left@1"
    before = server.metric("hotshoe_requests_total", model=label, outcome="aborted")
    body = {"model": name, "stream": stream, "max_tokens": 1500, "ignore_eos": True}
    raw = json.dumps({**body, "messages": [{"role": "user", "content": "Tell me a story."}]}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(raw)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as one:
        one.sendall(head.encode() + raw)
        eventually(lambda: server.call(server.services.engine.usage()).running == 1, 60)
    eventually(lambda: server.call(server.services.engine.usage()).running == 0, BACK_SECONDS)
    eventually(lambda: server.services.door.admission.running == 0, BACK_SECONDS)
    assert sum(row.references for row in server.services.residents.rows()) == 0
    assert server.metric("hotshoe_requests_total", model=label, outcome="aborted") == before + 1
    assert server.say(name, max_tokens=1).status_code == 200
