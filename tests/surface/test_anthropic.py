"""/v1/messages as Anthropic's clients know it: their key header, their error body, their library's exceptions."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import anthropic
import httpx
import pytest

from adapters.errors import EngineUnavailable
from server.dialect import ANTHROPIC_TYPES, error_body
from server.errors import STATUS, WireError, to_wire
from server.stream import EventReader
from tests.fixtures.service import Server
from tests.surface.conftest import KEY

HELLO: list[Any] = [{"role": "user", "content": "hi"}]
Ask = Callable[[anthropic.Anthropic], object]


@pytest.fixture(scope="module")
def sdk(keyed: Server) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=keyed.url, api_key=KEY, max_retries=0) as client:
        yield client


def ask(client: anthropic.Anthropic, **fields: Any) -> object:
    return client.messages.create(**{"model": "tiny", "max_tokens": 8, "messages": HELLO, **fields})


def test_a13_messages_are_answered_streamed_and_counted(keyed: Server, sdk: anthropic.Anthropic) -> None:
    keyed.pushed("router")
    answer = sdk.messages.create(model="router", max_tokens=8, messages=HELLO, system="Be short.")
    (block,) = answer.content
    assert block.type == "text" and block.text == "router@1 heard: hi"
    assert (answer.model, answer.stop_reason) == ("router@1", "end_turn")
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (1, 3)
    with sdk.messages.stream(model="router", max_tokens=2, messages=HELLO) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == "router@1 heard:" and (final.stop_reason, final.usage.output_tokens) == ("max_tokens", 2)


def test_a13_a_forced_tool_is_a_tool_use_block(sdk: anthropic.Anthropic) -> None:
    schema = {"type": "object", "properties": {"place": {"type": "string"}}}
    asked: Any = {
        "model": "tiny",
        "max_tokens": 8,
        "messages": HELLO,
        "tools": [{"name": "weather", "input_schema": schema}],
        "tool_choice": {"type": "tool", "name": "weather"},
    }
    with sdk.messages.stream(**asked) as stream:
        for answer in (sdk.messages.create(**asked), stream.get_final_message()):
            (block,) = answer.content
            assert block.type == "tool_use" and (block.name, block.input) == ("weather", {"place": "hi"})
            assert answer.stop_reason == "tool_use"


@pytest.mark.parametrize(
    ("call", "kind", "said"),
    [
        (lambda c: ask(c, model="nobody"), anthropic.NotFoundError, "not_found_error"),
        (lambda c: ask(c, extra_body={"temperature": 10**12}), anthropic.BadRequestError, "invalid_request_error"),
        (lambda c: ask(c, extra_body={"cache_salt": "x"}), anthropic.BadRequestError, "invalid_request_error"),
        (lambda c: ask(c, extra_body={"temprature": 1}), anthropic.BadRequestError, "invalid_request_error"),
        (lambda c: ask(c, system="x" * (9 << 20)), anthropic.RequestTooLargeError, "request_too_large"),
        (lambda c: ask(c.with_options(api_key="wrong")), anthropic.AuthenticationError, "authentication_error"),
        (
            lambda c: ask(c, extra_headers={"content-encoding": "gzip"}),
            anthropic.APIStatusError,
            "invalid_request_error",
        ),
        (
            lambda c: c.messages.count_tokens(model="tiny", messages=HELLO),
            anthropic.NotFoundError,
            "not_found_error",
        ),
    ],
)
def test_each_refusal_is_the_librarys_own_exception_with_its_type_and_request_id(
    sdk: anthropic.Anthropic, call: Ask, kind: type[anthropic.APIStatusError], said: str
) -> None:
    with pytest.raises(kind) as caught:
        call(sdk)
    body = caught.value.body
    assert isinstance(body, dict) and set(body) == {"type", "error"} and body["type"] == "error"
    assert set(body["error"]) == {"type", "message"} and body["error"]["type"] == said
    assert caught.value.request_id is not None and re.fullmatch(r"req_[0-9a-f]{24}", caught.value.request_id)


def test_an_engine_that_is_away_is_an_overload_to_come_again_after(keyed: Server, sdk: anthropic.Anthropic) -> None:
    keyed.call(keyed.engine.crash(down_seconds=1.0))
    with pytest.raises(anthropic.APIStatusError) as caught:
        ask(sdk)
    assert caught.value.status_code == 503 and int(caught.value.response.headers["retry-after"]) >= 1
    assert isinstance(caught.value.body, dict) and caught.value.body["error"]["type"] == "overloaded_error"


def test_the_key_comes_in_anthropics_header_there_and_nowhere_else(keyed: Server) -> None:
    def status(path: str) -> int:
        return httpx.post(f"{keyed.url}{path}", headers={"x-api-key": KEY}, json={}).status_code

    assert (status("/v1/messages"), status("/v1/chat/completions"), status("/v1/completions")) == (400, 401, 401)


def test_every_error_of_ours_has_an_anthropic_type_by_its_status() -> None:
    for kind in STATUS:
        wire = to_wire(kind("what happened"))
        body = error_body("/v1/messages", wire)
        expected = ANTHROPIC_TYPES.get(wire.status, "invalid_request_error" if wire.status < 500 else "api_error")
        assert body == {"type": "error", "error": {"type": expected, "message": "what happened"}}
        assert error_body("/v1/chat/completions", wire) == wire.body


def test_a14_an_error_in_the_middle_of_a_stream_is_anthropics_error_event() -> None:
    failure: WireError = to_wire(EngineUnavailable("gone"))
    closing = EventReader("/v1/messages", keeps_usage=True).closing(failure)
    assert closing.startswith(b"event: error\ndata: ") and closing.endswith(b"\n\n") and b"[DONE]" not in closing
    assert json.loads(closing.split(b"data: ")[1]) == {
        "type": "error",
        "error": {"type": "overloaded_error", "message": "gone"},
    }
    reader = EventReader("/v1/messages", keeps_usage=True)
    passed = reader.feed(b'event: error\ndata: {"type": "error", "error": {"type": "x", "message": "boom"}}\n\n')
    assert json.loads(passed.split(b"data: ")[1])["error"] == {"type": "api_error", "message": "boom"}
    assert reader.closing(failure) == b""
