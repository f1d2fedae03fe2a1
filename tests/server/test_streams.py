from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable

import httpx

from server.errors import unexpected
from server.stream import DONE, EventReader, Usage
from tests.fixtures.service import Server, chunks_of, eventually

CHAT = "/v1/chat/completions"


def event(value: object) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def test_events_pass_as_they_are_whatever_pieces_they_come_in() -> None:
    whole = event({"choices": [{"delta": {"content": 'says "usage" and "error"'}}]}) + DONE
    for size in (1, 7, 1000):
        reader = EventReader(CHAT, keeps_usage=True)
        pieces = [reader.feed(whole[i : i + size]) for i in range(0, len(whole), size)]
        assert b"".join(pieces) == whole
        assert reader.is_ended and reader.closing(unexpected()) == b""


def test_the_usage_chunk_is_counted_and_only_passed_on_to_those_who_asked() -> None:
    last = event({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 4}})
    asked, silent = EventReader(CHAT, keeps_usage=True), EventReader(CHAT, keeps_usage=False)
    assert (asked.feed(last), silent.feed(last)) == (last, b"")
    assert asked.usage == silent.usage == Usage(3, 4)


def test_a_stream_that_stops_gets_an_error_event_and_one_done() -> None:
    reader = EventReader(CHAT, keeps_usage=False)
    reader.feed(event({"choices": [{"delta": {"content": "x"}}]}) + b'data: {"cho')
    closing = reader.closing(unexpected())
    assert closing.startswith(b'data: {"error"') and closing.endswith(DONE)


def test_anthropics_and_responses_streams_end_with_their_own_events() -> None:
    messages = EventReader("/v1/messages", keeps_usage=True)
    messages.feed(b'event: message_start\ndata: {"message": {"usage": {"input_tokens": 5, "output_tokens": 0}}}\n\n')
    messages.feed(b'event: message_delta\ndata: {"usage": {"output_tokens": 7}}\n\n')
    messages.feed(b'event: message_stop\ndata: {"type": "message_stop"}\n\n')
    assert messages.is_ended and messages.usage == Usage(5, 7)
    responses = EventReader("/v1/responses", keeps_usage=True)
    body = {"response": {"error": None, "usage": {"input_tokens": 2, "output_tokens": 3}}}
    responses.feed(b"event: response.completed\ndata: " + json.dumps(body).encode() + b"\n\n")
    assert responses.is_ended and responses.usage == Usage(2, 3) and responses.error is None
    assert EventReader("/v1/messages", keeps_usage=True).closing(unexpected()).startswith(b"event: error\n")


def test_an_engine_error_in_a_stream_is_normalised() -> None:
    reader = EventReader(CHAT, keeps_usage=False)
    passed = reader.feed(event({"error": {"message": "boom", "type": "InternalServerError", "code": 500}}) + DONE)
    error = json.loads(passed.split(b"\n")[0][6:])["error"]
    assert (error["code"], error["type"]) == ("engine_failed", "server_error")
    assert reader.closing(unexpected()) == b""


def test_a_streams_answer_is_whole_and_its_usage_counted(server: Server) -> None:
    server.pushed("counted")
    chunks = chunks_of(server.events("counted", "one two"))
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    assert text == "counted@1 heard: one two"
    assert {chunk["model"] for chunk in chunks} == {"counted@1"}
    eventually(
        lambda: (
            server.metric("hotshoe_completion_tokens_total", model="counted@1", counted="usage") == 4
            and server.metric("hotshoe_requests_total", model="counted@1", outcome="completed") == 1
        )
    )
    assert server.metric("hotshoe_time_to_first_token_seconds_count", model="counted@1") == 1


def test_a_client_that_asks_for_usage_gets_its_chunk(server: Server) -> None:
    chunks = chunks_of(server.events(server.base.id, stream_options={"include_usage": True}))
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] > 0
    assert not any("usage" in chunk for chunk in chunks[:-1])


def test_an_error_of_the_engine_in_a_stream_is_an_error_event(server: Server) -> None:
    before = server.metric("hotshoe_requests_total", model="tiny", outcome="failed")
    server.script.error_after_tokens = 1
    try:
        chunks = chunks_of(server.events(server.base.id, "a b c"))
    finally:
        server.script.error_after_tokens = None
    assert chunks[-1]["error"]["code"] == "engine_failed"
    eventually(lambda: server.metric("hotshoe_requests_total", model="tiny", outcome="failed") == before + 1)


def test_a_client_that_goes_away_aborts_its_request_and_is_counted_once(server: Server) -> None:
    server.pushed("left")
    server.script.seconds_per_token = 0.05
    try:
        body = {"model": "left", "stream": True, "messages": [{"role": "user", "content": "w " * 400}]}
        with server.http.stream("POST", CHAT, json=body) as response:
            next(response.iter_lines())
        eventually(lambda: server.services.door.admission.running == 0, 3)
    finally:
        server.script.seconds_per_token = 0.0
    assert server.metric("hotshoe_requests_total", model="left@1", outcome="aborted") == 1
    assert server.metric("hotshoe_completion_tokens_total", model="left@1", counted="events") >= 1
    assert [row.references for row in server.services.residents.rows() if row.version.name == "left"] == [0]


def test_a_client_that_goes_away_while_it_waits_gives_its_place_up(server: Server) -> None:
    server.script.seconds_to_first_token = 5.0
    try:
        for _ in range(3):
            with contextlib.suppress(httpx.TimeoutException):
                httpx.post(f"{server.url}{CHAT}", json=chat(server.base.id), timeout=0.2)
        eventually(lambda: server.services.door.admission.running == 0, 3)
    finally:
        server.script.seconds_to_first_token = 0.0


def test_when_the_engine_dies_streams_end_with_an_error_and_adapters_come_back(server: Server) -> None:
    server.pushed("survivor")
    server.script.seconds_per_token = 0.05
    found: list[list[str]] = []
    thread = threading.Thread(target=lambda: found.append(server.events("survivor", "w " * 200)))
    try:
        thread.start()
        eventually(lambda: server.services.door.admission.running == 1)
        time.sleep(0.2)
        server.call(server.engine.crash(down_seconds=0.5))
        thread.join(5)
        assert server.http.get("/ready").status_code == 503
        refused = server.say("survivor")
        assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
    finally:
        server.script.seconds_per_token = 0.0
    assert chunks_of(found[0])[-1]["error"]["code"] == "engine_unavailable"
    eventually(lambda: server.http.get("/ready").status_code == 200)
    assert "survivor@1" in {row.engine_name for row in server.call(server.engine.loaded())}
    assert server.say("survivor").json()["model"] == "survivor@1"


def test_an_answer_that_outlasts_the_grace_of_a_stop_ends_with_an_error_event(
    make_server: Callable[..., Server],
) -> None:
    server = make_server(grace_seconds=1)
    server.script.seconds_per_token = 0.05
    found: list[list[str]] = []
    thread = threading.Thread(target=lambda: found.append(server.events(server.base.id, "w " * 300)))
    thread.start()
    eventually(lambda: server.services.door.admission.running == 1)
    server.stop()
    thread.join(5)
    assert chunks_of(found[0])[-1]["error"]["message"] == "The server is stopping."


def chat(model: str) -> dict[str, object]:
    return {"model": model, "messages": [{"role": "user", "content": "hello"}]}
