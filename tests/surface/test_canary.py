"""S4: what is sent as prompt, field, key or file, and what is answered, is in no log, metric, trace or error body."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import structlog

from adapters.bases import BaseModel
from server.errors import engine_error
from tests.fixtures.service import Server, running

CANARY = "kanarienvogel-7f3a"
KEY = "a-key-of-the-canary"
Post = Callable[[str, object], httpx.Response]


@pytest.fixture
def lines() -> list[str]:
    """Every line that is logged, with its exceptions written out."""
    return []


@pytest.fixture
def server(tiny_base: BaseModel, tmp_path: Path, lines: list[str], caplog: pytest.LogCaptureFixture) -> Server:
    def keep(_: object, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        lines.append(repr(event))
        raise structlog.DropEvent

    caplog.set_level(logging.DEBUG)
    before = structlog.get_config()
    structlog.configure(processors=[structlog.processors.format_exc_info, keep])
    try:
        with running(tiny_base, tmp_path, api_key=KEY) as one:
            yield one  # type: ignore[misc]
    finally:
        structlog.configure(**before)


def test_s4_a_canary_comes_back_only_in_the_answer_that_is_meant_to_hold_it(
    server: Server, lines: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    said = server.say("tiny", CANARY)
    assert said.status_code == 200 and CANARY in said.text
    assert any(CANARY in event for event in server.events("tiny", CANARY))
    bodies = [answer.text for answer in refusals(server)]
    assert len(bodies) > 20 and not [body for body in bodies if CANARY in body]
    assert CANARY not in server.http.get("/metrics").text + server.http.get("/v1/system").text
    assert CANARY not in server.http.get("/v1/usage").text
    assert len(lines) > 20 and not [line for line in lines if CANARY in line]
    assert not [
        record for record in caplog.records if CANARY in record.getMessage() and "HTTP Request" not in record.msg
    ]
    assert not [thread.name for thread in threading.enumerate() if CANARY in thread.name]


def refusals(server: Server) -> list[httpx.Response]:
    """Answers of 4xx and 5xx to requests that hold the canary as a value, a key or a file's content.

    Not as a model id or a setting of an adapter's config: there the answer names the value that it refuses.
    """
    http, found = server.http, []
    for path in (
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/v1/messages",
        "/tokenize",
        "/detokenize",
    ):
        for body in (
            {"model": "nobody", "messages": CANARY, "prompt": CANARY, "input": CANARY, "tokens": [CANARY]},
            {"model": "tiny", "messages": [{"role": CANARY, "content": CANARY}], "temperature": CANARY},
            {"model": "tiny", "prompt": CANARY, "messages": CANARY, "stop": CANARY * 100, "n": CANARY},
            {"model": "tiny", "metadata": CANARY, "user": {CANARY: CANARY}, "priority": CANARY},
            {"model": "tiny", "response_format": {"type": CANARY}, "tools": [{"type": CANARY}]},
            {"model": "tiny", "structured_outputs": {"json": CANARY, "regex": CANARY}},
        ):
            found.append(http.post(path, json=body))
        found.append(http.post(path, content=f'{{"model": "tiny", "prompt": "{CANARY}"'.encode()))
    found.append(http.post("/v1/exports", json={"model": 1, "format": CANARY, "dtype": {"x": CANARY}}))
    found.append(http.put("/v1/adapters/a/aliases/b", json={"version": CANARY}))
    found.append(http.get("/v1/models", headers={"authorization": f"Bearer {CANARY}"}))
    parts = {"config": ("c", CANARY.encode()), "weights": ("w", CANARY.encode() * 100)}
    found.append(http.post("/v1/adapters", data={"name": "x"}, files=parts))
    parts["config"] = ("c", f'{{"peft_type": "LORA", "r": 8, "revision": "{CANARY}"}}'.encode())
    found.append(http.post("/v1/adapters", data={"name": "x"}, files=parts))
    refused = [answer for answer in found if answer.status_code >= 400]
    assert len(refused) == len(found) or {answer.status_code for answer in found} <= {200, 400, 401, 404, 422}
    return refused


@pytest.mark.parametrize(
    "message",
    [
        f"1 validation error for Request: bad [type=literal_error, input_value='{CANARY}', input_type=str]",
        f"[{{'type': 'x', 'loc': ('body', 'prompt'), 'msg': 'bad', 'input': '{CANARY}'}}]",
        f'{{"msg": "bad", "input": "{CANARY}"}}',
    ],
)
def test_s4_what_the_engines_validators_quote_is_cut(message: str) -> None:
    assert CANARY not in engine_error(400, message).error["message"]
