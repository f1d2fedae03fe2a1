"""A5, A7, A8: values and bodies that no request can need are 400 before the engine hears of them."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from adapters.errors import HotshoeError
from server.errors import to_wire
from server.inference import read_request
from tests.fixtures.service import Server, error_of

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
EXTREMES: list[dict[str, Any]] = [
    {"n": 1_000_000},
    {"n": 0},
    {"n": "1000000"},
    {"n": True},
    {"n": 10**400},
    {"n": [1]},
    {"best_of": -1},
    {"max_tokens": 10**12},
    {"max_tokens": -1},
    {"max_tokens": "9"},
    {"max_completion_tokens": 10**12},
    {"logprobs": 10**6},
    {"top_logprobs": 10**6},
    {"prompt_logprobs": 10**6},
    {"temperature": -1},
    {"temperature": float("nan")},
    {"temperature": float("inf")},
    {"temperature": "hot"},
    {"top_p": 1.5},
    {"frequency_penalty": 1e300},
    {"seed": 2**63},
    {"stop": ["x"] * 10_000},
    {"stop": "x" * 100_000},
    {"bad_words": ["x"] * 10_000},
    {"logit_bias": {str(i): 1 for i in range(100_000)}},
    {"logit_bias": {"x": 1}},
    {"logit_bias": {"1": 10**6}},
    {"allowed_token_ids": list(range(300_000))},
    {"tools": [{"type": "function", "function": {"name": "f"}}] * 1000},
    {"tools": [{"type": "mcp", "server_url": "http://127.0.0.1:1"}]},
    {"chat_template_kwargs": {"x": "y" * 10_000}},
    {"chat_template_kwargs": {"chat_template": "{{ x }}"}},
    {"stream": "yes"},
    {"documents": [{"text": "x"}] * 1000},
]


def refused(body: bytes) -> HotshoeError:
    with pytest.raises(HotshoeError) as caught:
        read_request("/v1/chat/completions", body, "tiny")
    assert to_wire(caught.value).status == 400, caught.value
    return caught.value


@pytest.mark.parametrize("field", EXTREMES, ids=lambda field: f"{next(iter(field))}={str(field)[:30]}")
def test_a5_an_extreme_costs_less_than_50_ms(field: dict[str, Any]) -> None:
    body = json.dumps({**CHAT, **field}).encode()
    refused(body)
    spent = []
    for _ in range(3):
        before = time.thread_time()
        refused(body)
        spent.append(time.thread_time() - before)
    assert min(spent) < 0.05 or len(body) > 1024 * 1024


def test_a5_extremes_never_reach_the_engine(server: Server) -> None:
    before = server.metric("hotshoe_queue_seconds_count", model="tiny")
    for field in EXTREMES:
        answer = server.http.post("/v1/chat/completions", content=json.dumps({**CHAT, **field}).encode())
        assert answer.status_code == 400, (field, answer.text)
    assert server.metric("hotshoe_queue_seconds_count", model="tiny") == before
    assert server.say("tiny").status_code == 200


NOT_PLAIN: list[bytes] = [
    b"",
    b"[]",
    b"null",
    b'"text"',
    b"not json",
    b"\xef\xbb\xbf{}",
    json.dumps(CHAT).encode("utf-16"),
    b'{"model": "tiny", "model": "tiny"}',
    b'{"model": "tiny", "messages": [{"role": "user", "role": "system", "content": "x"}]}',
    b'{"model": "tiny", "temperature": NaN, "messages": []}',
    b'{"model": "tiny", "temperature": -Infinity, "messages": []}',
    b'{"model": "tiny", "temperature": 1e999, "messages": []}',
    b'{"model": ' + b"[" * 100_000,
    b'{"model": "tiny", "messages": ' + b"[" * 500 + b"]" * 500 + b"}",
    b'{"model": "tiny", "messages": ' + b'{"a":' * 500 + b"1" + b"}" * 500 + b"}",
    b'{"model": "tiny", "n": ' + b"9" * 10_000 + b"}",
    b'{"model": "\xff"}',
    b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}',
    b'{"model": "tiny"} {}',
]


@pytest.mark.parametrize("body", NOT_PLAIN)
def test_a7_a_body_that_is_not_one_plain_json_object_is_refused(server: Server, body: bytes) -> None:
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize"):
        answer = server.http.post(path, content=body)
        assert answer.status_code == 400, answer.text
        assert error_of(answer)["code"] in ("json_invalid", "invalid_request")


def test_a7_64_mb_are_refused_by_their_length_alone(server: Server) -> None:
    answer = server.http.post("/v1/chat/completions", content=b" " * (64 << 20))
    assert (answer.status_code, error_of(answer)["code"]) == (413, "payload_too_large")
    assert server.say("tiny").status_code == 200


def test_a7_a_large_body_within_the_limit_goes_through_in_pieces(server: Server) -> None:
    answer = server.say("tiny", "w" * (7 << 20), max_tokens=2)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["prompt_tokens"] == 1


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


HOSTILE_SCHEMAS: list[dict[str, Any]] = [
    {"enum": list(range(100_000))},
    {"anyOf": [{"enum": list(range(900))}, {"enum": list(range(900))}]},
    {"$ref": "#"},
    {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    {"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"type": "string"}]}}, "$ref": "#/$defs/a"},
    {"$ref": "#/$defs/nothing"},
    {"$ref": "https://example.com/schema.json"},
    {"$ref": "file:///etc/passwd"},
    {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(10_000)}},
    {"type": "string", "pattern": "a" * 1000},
    {"type": "string", "pattern": "((a{1,100}){1,100}){1,100}"},
    {"type": "string", "pattern": "[a-z]{1,100000}"},
    {"type": "object", "patternProperties": {"(x{90}){90}": {}}},
    {"type": "string", "minLength": 10**9},
    {"type": "array", "minItems": -1},
    {"anyOf": [{"$ref": "#/$defs/a"}] * 500, "$defs": {"a": {"type": "string"}}},
    {"allOf": [{}] * 10_000},
    nested(40),
]
ORDINARY_SCHEMAS: list[dict[str, Any]] = [
    {"type": "object", "properties": {"name": {"type": "string", "maxLength": 1000}}, "required": ["name"]},
    {"$defs": {"node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}}}, "$ref": "#/$defs/node"},
    {"type": "object", "properties": {"children": {"type": "array", "items": {"$ref": "#"}}}},
    {"enum": [f"label-{i}" for i in range(1000)]},
    {"type": "string", "pattern": r"^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$"},
    {"type": "string", "pattern": r"(\d{1,3}\.){3}\d{1,3}"},
    {"type": "object", "properties": {"enum": {"type": "string"}, "$ref": {"type": "string"}, "pattern": {}}},
]


def places(schema: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    chat, responses, messages = "/v1/chat/completions", "/v1/responses", "/v1/messages"
    return [
        (chat, {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}),
        (chat, {"structured_outputs": {"json": schema}}),
        (chat, {"structured_outputs": {"json": json.dumps(schema)}}),
        (chat, {"tools": [{"type": "function", "function": {"name": "f", "parameters": schema}}]}),
        (responses, {"text": {"format": {"type": "json_schema", "name": "x", "schema": schema}}}),
        (responses, {"tools": [{"type": "function", "name": "f", "parameters": schema}]}),
        (messages, {"tools": [{"name": "f", "input_schema": schema}]}),
        (messages, {"output_config": {"format": {"type": "json_schema", "schema": schema}}}),
    ]


@pytest.mark.parametrize("schema", HOSTILE_SCHEMAS, ids=lambda schema: str(schema)[:50])
def test_a8_a_hostile_schema_is_refused_wherever_a_request_can_hold_one(schema: dict[str, Any]) -> None:
    for path, field in places(schema):
        with pytest.raises(HotshoeError) as caught:
            read_request(path, json.dumps({"model": "tiny", **field}).encode(), "tiny")
        assert to_wire(caught.value).status == 400, (path, field)


@pytest.mark.parametrize("schema", ORDINARY_SCHEMAS, ids=lambda schema: str(schema)[:50])
def test_a8_an_ordinary_schema_passes_recursive_ones_too(schema: dict[str, Any]) -> None:
    for path, field in places(schema):
        read_request(path, json.dumps({"model": "tiny", **field}).encode(), "tiny")


def test_a8_choices_are_counted(server: Server) -> None:
    assert server.say("tiny", structured_outputs={"choice": ["a", "b"]}).status_code == 200
    answer = server.say("tiny", structured_outputs={"choice": [str(i) for i in range(100_000)]})
    assert (answer.status_code, error_of(answer)["param"]) == (400, "structured_outputs.choice")


@pytest.mark.parametrize("number", ["0", "-1", "2147483648", "9" * 30, "1e3", "x"])
def test_a5_a_version_number_that_cannot_be_one_is_refused_wherever_it_stands(server: Server, number: str) -> None:
    for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/card"), ("POST", "/warm"), ("GET", "/files/x")):
        answer = server.http.request(method, f"/v1/adapters/router/versions/{number}{path}")
        assert answer.status_code == 422, (method, path, answer.text)
    for model in (f"router@{number}", f"router@{number}@1"):
        assert server.say(model).status_code == 404
        assert server.http.get(f"/v1/models/{model}").status_code == 404
