"""A9: after each hostile request of the families A1 to A8 the real engine answers, and is the process that it was."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from schemathesis import GenerationMode

from server.fields import FIELDS
from tests.fixtures.service import Server
from tests.surface import test_extremes as extremes
from tests.surface import test_raw_sockets as raw
from tests.surface.fuzz import Fuzzer

pytestmark = pytest.mark.model
CHAT, COMPLETIONS, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
SHORT = {CHAT: "max_tokens", COMPLETIONS: "max_tokens", MESSAGES: "max_tokens", RESPONSES: "max_output_tokens"}
Send = Callable[[Server], int]  # one hostile request; returns its status
BIG = 1 << 20


def post(path: str, body: bytes | dict[str, Any]) -> Send:
    def send(server: Server) -> int:
        given = {"content": body} if isinstance(body, bytes) else {"json": {"model": server.base.id, **body}}
        return server.http.post(path, **given, headers={"content-type": "application/json"}).status_code

    return send


def bytes_on_a_socket(head: str) -> Send:
    def send(server: Server) -> int:
        return next(iter(raw.statuses(server, head, 0.3)), 400)

    return send


def chat(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1, **fields}


def bad_keys() -> Iterable[Send]:
    for header in ("Bearer", "Bearer x y", "Basic x", "Bearer " + "x" * 30_000, "Bearer \x00\xff"):
        yield bytes_on_a_socket(f"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: {header}\r\n\r\n")


def bad_paths() -> Iterable[Send]:
    for path in raw.PATHS:
        yield bytes_on_a_socket(
            f"POST {path} HTTP/1.1\r\nHost: a/?x=\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        )
    for framing in raw.FRAMINGS:
        yield bytes_on_a_socket(f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\n{framing}")


def vllms_other_routes() -> Iterable[Send]:
    from tests.surface.test_engine_routes import HIDDEN, OURS, concrete

    for method, path in (*HIDDEN, *OURS):
        yield lambda server, method=method, path=path: server.http.request(method, concrete(path)).status_code  # type: ignore[misc]


def extreme_values() -> Iterable[Send]:
    for field in extremes.EXTREMES:
        yield post(CHAT, json.dumps({**extremes.CHAT, "model": "smollm2-135m-instruct", **field}).encode())


def not_for_clients() -> Iterable[Send]:
    for path, fields in FIELDS.items():
        yield from (post(path, {name: 1}) for name in sorted(fields.refused))


def not_plain() -> Iterable[Send]:
    yield from (post(path, body) for body in extremes.NOT_PLAIN for path in (CHAT, RESPONSES))
    yield post(CHAT, b" " * (64 << 20))
    yield from (
        post(CHAT, {**chat(), "model": model}) for model in ("/etc/passwd", "other/router", "../x", "x" * 10**5)
    )


def hostile_schemas() -> Iterable[Send]:
    asked = {CHAT: chat(), RESPONSES: {"input": "hi", "max_output_tokens": 1}, MESSAGES: chat()}
    for schema in extremes.HOSTILE_SCHEMAS:
        yield from (post(path, {**asked[path], **field}) for path, field in extremes.places(schema))


REFUSED: dict[str, Callable[[], Iterable[Send]]] = {
    "A2 keys": bad_keys,
    "A3 paths and framings": bad_paths,
    "A4 routes of the engine": vllms_other_routes,
    "A5 extremes": extreme_values,
    "A6 fields": not_for_clients,
    "A7 bodies": not_plain,
    "A8 schemas": hostile_schemas,
}


class Alive:
    """The engine as it was, asked again after each request."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.engine: Any = server.services.engine
        self.before = self.state()

    def state(self) -> tuple[int, int]:
        return self.engine.rig.engine.pid, self.engine.rig.engine.restarts

    def check(self, after: object) -> None:
        answer = self.server.http.post(COMPLETIONS, json={"model": self.server.base.id, "prompt": "a", "max_tokens": 1})
        assert answer.status_code == 200, (after, answer.text)
        assert answer.json()["usage"]["completion_tokens"] == 1
        assert self.state() == self.before, after


@pytest.mark.parametrize("family", REFUSED)
def test_a9_after_each_refused_request_a_one_token_call_works_on_the_same_process(on_vllm: Server, family: str) -> None:
    alive, count = Alive(on_vllm), 0
    for send in REFUSED[family]():
        status = send(on_vllm)
        assert 400 <= status < 500, (family, count, status)
        alive.check((family, count))
        count += 1
    assert count >= 5


def test_a9_after_broken_requests_of_the_openapi_document_it_works_too(on_vllm: Server) -> None:
    """A1: what schemathesis makes of the inference operations, their answers kept short."""
    alive, fuzzer = Alive(on_vllm), Fuzzer(on_vllm)
    send = fuzzer.send

    def short(operation: Any, case: Any) -> None:
        if isinstance(case.body, dict) and operation.path in SHORT:
            case.body[SHORT[operation.path]] = 1
        send(operation, case)
        alive.check(operation.path)

    fuzzer.send = short  # type: ignore[method-assign]
    for found in fuzzer.schema.get_all_operations():
        operation: Any = found.ok()
        if operation.path in FIELDS:
            fuzzer.ask(operation, GenerationMode.NEGATIVE, 5, seed=1)
    assert fuzzer.report.failures == [] and fuzzer.report.requests > 20


# Within every bound of ours, and as hard on the engine as a request can be: it answers or refuses, and goes on.
AT_THE_LIMITS: list[tuple[str, dict[str, Any]]] = [
    (CHAT, chat(n=128)),
    (CHAT, chat(logprobs=True, top_logprobs=100)),
    (CHAT, chat(logprobs=True, top_logprobs=20, prompt_logprobs=20)),
    (CHAT, chat(seed=2**63 - 1)),
    (CHAT, chat(seed=-(2**63))),
    (CHAT, chat(temperature=100, top_p=0, min_p=1, top_k=10_000_000)),
    (CHAT, chat(repetition_penalty=0)),
    (CHAT, chat(repetition_penalty=100, frequency_penalty=-2, presence_penalty=2)),
    (CHAT, chat(use_beam_search=True, n=8, length_penalty=-100, temperature=0)),
    (CHAT, chat(stop=["x" * 1024] * 64)),
    (CHAT, chat(bad_words=["x" * 1024] * 128)),
    (CHAT, chat(logit_bias={str(i): -100 for i in range(1024)})),
    (CHAT, chat(logit_bias={"999999999": 100})),
    (CHAT, chat(allowed_token_ids=list(range(49_000)))),
    (CHAT, chat(allowed_token_ids=[999_999_999, -1])),
    (CHAT, chat(stop_token_ids=[2**40, -5])),
    (CHAT, chat(logprobs=True, logprob_token_ids=[999_999_999])),
    (CHAT, chat(min_tokens=1_000_000)),
    (CHAT, chat(min_tokens=1, stop_token_ids=[0])),
    (CHAT, chat(truncate_prompt_tokens=10_000_000)),
    (CHAT, chat(truncate_prompt_tokens=1)),
    (CHAT, chat(thinking_token_budget=1_000_000)),
    (CHAT, chat(stream=True, stream_interval=1_000_000)),
    (CHAT, chat(messages=[{"role": "user", "content": "w " * (BIG // 2)}])),
    (CHAT, chat(messages=[{"role": "user", "content": ""}] * 5000)),
    (CHAT, chat(messages=[{"role": "\u202e" * 100, "content": "\x00\ufffd\U0010ffff"}])),
    (CHAT, chat(chat_template_kwargs={"enable_thinking": "x" * 4000, "messages": [], "add_generation_prompt": 7})),
    (CHAT, chat(structured_outputs={"choice": [f"a{i}" for i in range(1000)]})),
    (CHAT, chat(structured_outputs={"json": {"type": "string", "pattern": "(a|b|c){1,100}"}})),
    (CHAT, chat(response_format={"type": "json_object"}, ignore_eos=True)),
    (COMPLETIONS, {"prompt": [999_999_999], "max_tokens": 1}),
    (COMPLETIONS, {"prompt": [-1], "max_tokens": 1}),
    (COMPLETIONS, {"prompt": [2**63], "max_tokens": 1}),
    (COMPLETIONS, {"prompt": [[1, 2], [3]] * 128, "max_tokens": 1}),
    (COMPLETIONS, {"prompt": ["a"] * 256, "max_tokens": 1}),
    (COMPLETIONS, {"prompt": "a", "suffix": "b", "max_tokens": 1}),
    (COMPLETIONS, {"prompt": "a", "echo": True, "logprobs": 100, "max_tokens": 0}),
    (COMPLETIONS, {"prompt": "\ud7ff\x00" * 100, "max_tokens": 1}),
    ("/tokenize", {"prompt": "w " * (BIG // 2)}),
    ("/detokenize", {"tokens": [999_999_999]}),
    ("/detokenize", {"tokens": [-1]}),
    ("/detokenize", {"tokens": [2**63]}),
    (RESPONSES, {"input": [{"type": "function_call_output", "call_id": "x", "output": "y"}], "max_output_tokens": 1}),
    (RESPONSES, {"input": [{"role": "user", "content": []}], "max_output_tokens": 1}),
    (MESSAGES, chat(thinking={"type": "enabled", "budget_tokens": 1024})),
    (MESSAGES, chat(messages=[{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x"}]}])),
]


@pytest.mark.parametrize(("path", "body"), AT_THE_LIMITS, ids=lambda one: str(one)[:60])
def test_a9_a_request_at_the_limits_is_answered_or_refused_and_harms_nothing(
    on_vllm: Server, path: str, body: dict[str, Any]
) -> None:
    alive = Alive(on_vllm)
    status = post(path, body)(on_vllm)
    assert status in (200, 400, 422), status
    alive.check((path, body))
