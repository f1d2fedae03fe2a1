"""A6 and the allow-list: which fields a request may name, and at which values the idle ones are taken."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.errors import InvalidRequest, UnknownParameter
from server.access import ROUTES, Kind
from server.fields import FIELDS, MEMBERS, STRUCTURED_REFUSED
from server.inference import read_request
from tests.fixtures.service import Server, error_of

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}


def read(path: str = "/v1/chat/completions", **body: Any) -> Any:
    return read_request(path, json.dumps({**CHAT, **body} if path == "/v1/chat/completions" else body).encode(), "tiny")


def say(server: Server, field: dict[str, Any]) -> httpx.Response:
    return server.http.post("/v1/chat/completions", json={**CHAT, **field})


def test_every_route_that_is_forwarded_has_its_fields() -> None:
    assert {route.path for route in ROUTES if route.kind is Kind.PROXIED} == set(FIELDS)


@pytest.mark.model
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here")
def test_the_table_is_what_vllm_names_less_what_is_refused() -> None:
    script = Path(__file__).with_name("vllm_fields.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300, env=quiet())
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = {name: set(fields) for name, fields in json.loads(done.stdout.splitlines()[-1]).items()}
    for path, fields in FIELDS.items():
        assert fields.taken | fields.refused == theirs[path], path
        assert not fields.taken & fields.refused, path
    assert MEMBERS["structured_outputs"] | STRUCTURED_REFUSED == theirs["structured_outputs"]
    assert MEMBERS["stream_options"] - {"include_obfuscation"} == theirs["stream_options"]


def quiet() -> dict[str, str]:
    return {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1", "VLLM_PLUGINS": ""}


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("temprature", "Did you mean 'temperature'?"),
        ("maxtokens", "Did you mean 'max_tokens'?"),
        ("tool_choices", "Did you mean 'tool_choice'?"),
        ("guided_regex", None),
        ("zzz", None),
        ("", None),
    ],
)
def test_a_field_that_is_not_known_is_named_with_the_nearest_one(server: Server, name: str, advice: str | None) -> None:
    answer = say(server, {name: 1})
    error = error_of(answer)
    assert (answer.status_code, error["code"], error["param"]) == (400, "unknown_parameter", name)
    assert (advice in error["message"]) if advice else ("mean" not in error["message"])


@pytest.mark.parametrize("name", ["x" * 100_000, "a\r\nset-cookie: b", "\u202e", "\x00"])
def test_a11_a_name_that_cannot_be_shown_is_not_echoed(server: Server, name: str) -> None:
    answer = say(server, {name: 1})
    assert answer.status_code == 400 and len(answer.content) < 500
    assert error_of(answer)["param"] == "(not printable, or too long)"


@pytest.mark.parametrize(
    ("path", "name"), [(path, name) for path, fields in FIELDS.items() for name in sorted(fields.refused)]
)
def test_a6_what_vllm_names_and_clients_may_not_set_is_refused_and_null_is_nothing(path: str, name: str) -> None:
    with pytest.raises(UnknownParameter) as caught:
        read(path, **{"model": "tiny", name: 1})
    assert caught.value.param == name and "may not be set" in caught.value.message
    request = read(path, **{"model": "tiny", name: None})
    assert name not in json.loads(request.for_engine("x"))


@pytest.mark.parametrize("member", sorted(STRUCTURED_REFUSED | {"else"}))
def test_a6_a_grammar_of_the_clients_is_refused(member: str) -> None:
    with pytest.raises(UnknownParameter) as caught:
        read(structured_outputs={member: "(a+)+"})
    assert caught.value.param == f"structured_outputs.{member}"
    with pytest.raises(InvalidRequest):
        read(response_format={"type": "structural_tag", "structures": []})


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("/v1/chat/completions", {"user": "me"}),
        ("/v1/chat/completions", {"metadata": {"a": "b"}}),
        ("/v1/chat/completions", {"store": False}),
        ("/v1/chat/completions", {"store": None}),
        ("/v1/chat/completions", {"service_tier": "auto"}),
        ("/v1/chat/completions", {"parallel_tool_calls": True}),
        ("/v1/chat/completions", {"modalities": ["text"]}),
        ("/v1/chat/completions", {"prediction": None, "audio": None, "web_search_options": None}),
        ("/v1/completions", {"best_of": 1}),
        ("/v1/responses", {"store": False, "service_tier": "auto", "metadata": {}}),
        ("/v1/messages", {"metadata": {"user_id": "x"}, "service_tier": "auto"}),
        ("/v1/messages", {"cache_control": {"type": "ephemeral"}}),
    ],
)
def test_fields_without_effect_are_taken_at_the_values_that_ask_for_nothing(path: str, field: dict[str, Any]) -> None:
    sent = json.loads(read(path, **{"model": "tiny", **field}).for_engine("x"))
    assert set(sent) <= FIELDS[path].taken


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("/v1/chat/completions", {"store": True}),
        ("/v1/chat/completions", {"store": 0}),
        ("/v1/chat/completions", {"service_tier": "priority"}),
        ("/v1/chat/completions", {"user": "x" * 513}),
        ("/v1/chat/completions", {"user": 7}),
        ("/v1/chat/completions", {"metadata": {"a": 1}}),
        ("/v1/chat/completions", {"metadata": {str(i): "x" for i in range(17)}}),
        ("/v1/chat/completions", {"modalities": ["text", "audio"]}),
        ("/v1/chat/completions", {"prediction": {"type": "content", "content": "x"}}),
        ("/v1/chat/completions", {"web_search_options": {}}),
        ("/v1/completions", {"best_of": 2}),
        ("/v1/responses", {"background": True}),
        ("/v1/messages", {"service_tier": "priority"}),
    ],
)
def test_fields_without_effect_are_refused_at_values_that_ask_for_one(path: str, field: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read(path, **{"model": "tiny", **field})
    assert caught.value.param in field


@pytest.mark.parametrize(
    ("path", "name"),
    [("/v1/chat/completions", "messages"), ("/v1/responses", "input"), ("/v1/messages", "messages")],
)
def test_a_media_part_is_found_wherever_it_hides(path: str, name: str) -> None:
    image = {"type": "image", "source": {"type": "url", "url": "http://x"}}
    for content in ([image], [{"type": "tool_result", "content": [image]}], [{"type": "input_file", "file_id": "x"}]):
        with pytest.raises(InvalidRequest, match="text parts"):
            read(path, **{"model": "tiny", name: [{"role": "user", "content": content}]})
    read(path, **{"model": "tiny", name: [{"role": "assistant", "content": "x", "audio": None}]})
