"""The four inference routes of an engine's socket beside each other: answers, streams, usage and forced tools."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.fixtures.engines import EngineRig
from tests.fixtures.forms import FORMS, Event, parsed


def words(text: str) -> set[str]:
    return set(text.split())


def stream(rig: EngineRig, path: str, model: str, **fields: Any) -> list[Event]:
    with rig.http.stream("POST", path, json=FORMS[path].body(model, stream=True, **fields)) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        return parsed(response.iter_lines())


@pytest.mark.parametrize("path", FORMS)
def test_on_each_route_an_adapter_answers_streams_and_counts(rig: EngineRig, path: str) -> None:
    form, engine_name = FORMS[path], rig.load("acme/router@3").engine_name
    answer = rig.http.post(path, json=form.body(engine_name))
    assert answer.status_code == 200, answer.text
    whole = answer.json()
    asks = {"stream_options": {"include_usage": True}} if form.last is None else {}
    found = stream(rig, path, engine_name, **asks)
    assert form.is_whole(found), found[-2:]
    assert form.streamed_text(found) == form.text_of(whole) != ""
    assert form.streamed_usage(found) == form.usage_of(whole)
    assert form.usage_of(whole)[1] == 4
    named = [data.get("message") or data.get("response") or data for _, data in found if isinstance(data, dict)]
    assert whole["model"] == "router@3" and {one["model"] for one in named if "model" in one} == {"router@3"}


def keys_of(value: Any, at: str = "") -> set[str]:
    """Where a JSON document has something that is not null: its keys, with those of the first entry of each list."""
    if isinstance(value, dict):
        return {at + name for name in value}.union(*(keys_of(inner, f"{at}{name}.") for name, inner in value.items()))
    return keys_of(value[0], f"{at}[].") if isinstance(value, list) and value else set()


# What clients read of an answer and of each event; a test of the double alone would not see it leave vLLM's shape.
SHAPES: dict[str, dict[str, set[str]]] = {
    "/v1/responses": {
        "": words(
            "id object created_at model status output usage output.[].type output.[].id output.[].role "
            "output.[].content output.[].content.[].type output.[].content.[].text usage.input_tokens "
            "usage.output_tokens usage.total_tokens usage.input_tokens_details.cached_tokens incomplete_details "
            "parallel_tool_calls tool_choice tools top_p temperature"
        ),
        "response.created": {"response.id", "response.status", "sequence_number"},
        "response.in_progress": {"response.id", "response.status", "sequence_number"},
        "response.output_item.added": {"output_index", "item.id", "item.type", "item.status"},
        "response.content_part.added": {"item_id", "content_index", "part.type"},
        "response.output_text.delta": {"delta", "item_id", "output_index", "content_index", "logprobs"},
        "response.output_text.done": {"text", "item_id"},
        "response.content_part.done": {"part.text"},
        "response.output_item.done": {"item.content.[].text"},
        "response.completed": {"response.usage.input_tokens", "response.output.[].content.[].text"},
    },
    "/v1/messages": {
        "": words("id type role content content.[].type content.[].text model stop_reason usage.input_tokens"),
        "message_start": {"message.id", "message.role", "message.usage.input_tokens", "message.content"},
        "content_block_start": {"index", "content_block.type", "content_block.text"},
        "content_block_delta": {"index", "delta.type", "delta.text"},
        "content_block_stop": {"index"},
        "message_delta": {"delta.stop_reason", "delta.stop_sequence", "usage.input_tokens", "usage.output_tokens"},
        "message_stop": {"type"},
    },
}


@pytest.mark.parametrize("path", SHAPES)
def test_answers_and_events_have_the_shape_that_clients_read(rig: EngineRig, path: str) -> None:
    shapes = SHAPES[path]
    whole = rig.http.post(path, json=FORMS[path].body(rig.base.id)).json()
    assert shapes[""] <= keys_of(whole)
    found = stream(rig, path, rig.base.id)
    order = list(dict.fromkeys(str(name) for name, _ in found))
    assert order == [name for name in shapes if name]
    for name, data in found:
        assert shapes[str(name)] <= keys_of(data), name
    if path == "/v1/responses":
        assert [data["sequence_number"] for _, data in found] == list(range(len(found)))


PARAMETERS = {
    "type": "object",
    "properties": {"on": {"type": "boolean"}},
    "required": ["on"],
    "additionalProperties": False,
}
# Without `strict` vLLM 0.32 forces the call but not its arguments: a small model then writes what it likes.
TOOL_REQUESTS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "tools": [{"type": "function", "function": {"name": "switch", "strict": True, "parameters": PARAMETERS}}],
        "tool_choice": {"type": "function", "function": {"name": "switch"}},
    },
    "/v1/responses": {
        "tools": [{"type": "function", "name": "switch", "strict": True, "parameters": PARAMETERS}],
        "tool_choice": {"type": "function", "name": "switch"},
    },
    "/v1/messages": {
        "tools": [{"name": "switch", "strict": True, "input_schema": PARAMETERS}],
        "tool_choice": {"type": "tool", "name": "switch"},
    },
}


def call_in(path: str, answer: dict[str, Any]) -> tuple[str, Any]:
    """The name and the arguments of an answer's one tool call."""
    if path == "/v1/messages":
        return answer["content"][0]["name"], answer["content"][0]["input"]
    if path == "/v1/responses":
        return answer["output"][0]["name"], json.loads(answer["output"][0]["arguments"])
    function = answer["choices"][0]["message"]["tool_calls"][0]["function"]
    return function["name"], json.loads(function["arguments"])


def streamed_call(path: str, found: list[Event]) -> tuple[str, Any]:
    """The same out of a stream."""
    events = [data for _, data in found if isinstance(data, dict)]
    if path == "/v1/messages":
        name = next(data["content_block"]["name"] for data in events if data["type"] == "content_block_start")
        pieces = [data["delta"]["partial_json"] for data in events if data["type"] == "content_block_delta"]
    elif path == "/v1/responses":
        name = next(data["item"]["name"] for data in events if data["type"] == "response.output_item.added")
        pieces = [data["delta"] for data in events if data["type"] == "response.function_call_arguments.delta"]
    else:
        calls = [call for data in events for call in data["choices"][0]["delta"].get("tool_calls") or ()]
        name = next(call["function"]["name"] for call in calls if call["function"].get("name"))
        pieces = [call["function"].get("arguments") or "" for call in calls]
    return name, json.loads("".join(pieces))


@pytest.mark.parametrize("path", TOOL_REQUESTS)
def test_a_forced_strict_tool_is_called_with_arguments_of_its_schema(rig: EngineRig, path: str) -> None:
    body = FORMS[path].body(rig.base.id, "Switch the lamp on.", 64, **TOOL_REQUESTS[path])
    answer = rig.http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    name, arguments = call_in(path, answer.json())
    assert name == "switch" and isinstance(arguments["on"], bool)
    with rig.http.stream("POST", path, json={**body, "stream": True}) as response:
        found = parsed(response.iter_lines())
    assert FORMS[path].is_whole(found)
    assert streamed_call(path, found) == (name, arguments)
