"""The inference routes on an engine's socket: what the gateway counts on, whatever the engine."""

from __future__ import annotations

import httpx
import pytest

from tests.conftest import CONTEXT_TOKENS
from tests.fixtures.engines import EngineRig, events, eventually
from tests.fixtures.forms import FORMS


def test_the_engine_is_healthy_and_lists_the_base(rig: EngineRig) -> None:
    assert rig.http.get("/health").status_code == 200
    assert rig.base.id in [row["id"] for row in rig.http.get("/v1/models").json()["data"]]
    assert "vllm:num_requests_running" in rig.http.get("/metrics").text


def test_the_base_answers_with_its_name_and_counts_tokens(rig: EngineRig) -> None:
    body = rig.chat(rig.base.id, max_tokens=5, ignore_eos=True).json()
    assert (body["object"], body["model"]) == ("chat.completion", rig.base.id)
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["choices"][0]["message"]["role"] == "assistant"
    usage = body["usage"]
    assert usage["completion_tokens"] == 5
    assert usage["total_tokens"] == usage["prompt_tokens"] + 5


@pytest.mark.parametrize("engine_name", ["router@3", "acme/router@3"])
def test_a_response_calls_an_adapter_by_its_name_without_the_tenant(rig: EngineRig, engine_name: str) -> None:
    rig.load(engine_name)
    assert rig.chat(engine_name).json()["model"] == "router@3"
    assert rig.complete(engine_name).json()["model"] == "router@3"
    for path in ("/v1/chat/completions", "/v1/completions"):
        with rig.streaming(engine_name, path, max_tokens=4) as response:
            assert {event["model"] for event in events(response)} == {"router@3"}


@pytest.mark.parametrize("path", FORMS)
def test_a_model_that_is_not_loaded_is_404(rig: EngineRig, path: str) -> None:
    answer = rig.http.post(path, json=FORMS[path].body("ghost@1"))
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert error["type"] == "NotFoundError" and error.get("code", 404) == 404
    assert "ghost@1" in error["message"]


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": -1},
        {"messages": None},
        {"messages": "hello"},
        {"max_tokens": CONTEXT_TOKENS + 1},
        {"messages": [{"role": "user", "content": "word " * (CONTEXT_TOKENS + 10)}]},
    ],
    ids=["negative limit", "no messages", "no list", "too many tokens", "too long a prompt"],
)
def test_a_request_that_cannot_be_right_is_400_with_a_message(rig: EngineRig, fields: dict[str, object]) -> None:
    answer = rig.chat(rig.base.id, **fields)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"]


def test_a_body_that_is_not_json_is_400(rig: EngineRig) -> None:
    headers = {"content-type": "application/json"}
    assert rig.http.post("/v1/chat/completions", content=b"{", headers=headers).status_code == 400


def test_a_chat_stream_says_its_role_first_and_its_finish_last(rig: EngineRig) -> None:
    with rig.streaming(rig.base.id, max_tokens=6, ignore_eos=True) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        chunks = events(response)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons[-1] == "length"
    assert set(reasons[:-1]) == {None}


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_stream_ends_with_the_usage_chunk_where_it_was_asked_for(rig: EngineRig, path: str) -> None:
    with rig.streaming(rig.base.id, path, max_tokens=6, ignore_eos=True) as response:
        assert not any(chunk.get("usage") for chunk in events(response))
    options = {"include_usage": True}
    with rig.streaming(rig.base.id, path, max_tokens=6, ignore_eos=True, stream_options=options) as response:
        last = events(response)[-1]
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 6


def test_streamed_text_is_the_text(rig: EngineRig) -> None:
    adapter = rig.load().engine_name
    whole = rig.complete(adapter, "Once upon", max_tokens=6, ignore_eos=True).json()["choices"][0]["text"]
    with rig.streaming(adapter, "/v1/completions", max_tokens=6, ignore_eos=True) as response:
        assert "".join(chunk["choices"][0]["text"] for chunk in events(response)) == whole


def token_logprobs(rig: EngineRig, model: str) -> list[float]:
    body = rig.complete(model, logprobs=1, max_tokens=4, ignore_eos=True).json()
    values: list[float] = body["choices"][0]["logprobs"]["token_logprobs"]
    assert len(values) == 4
    return values


def test_an_adapter_moves_log_probabilities_and_one_without_effect_does_not(rig: EngineRig) -> None:
    base = token_logprobs(rig, rig.base.id)
    moved = token_logprobs(rig, rig.load(scale=0.05).engine_name)
    assert max(abs(a - b) for a, b in zip(base, moved, strict=True)) > 1e-2
    idle = token_logprobs(rig, rig.load(fill=(1.0, 0.0)).engine_name)
    assert idle == pytest.approx(base, abs=1e-4)


def test_chat_log_probabilities_have_alternatives(rig: EngineRig) -> None:
    body = rig.chat(rig.base.id, logprobs=True, top_logprobs=3, max_tokens=2, ignore_eos=True).json()
    tokens = body["choices"][0]["logprobs"]["content"]
    assert [len(token["top_logprobs"]) for token in tokens] == [3, 3]


def test_a_client_that_leaves_frees_its_place(rig: EngineRig) -> None:
    with rig.streaming(rig.base.id, max_tokens=1500, ignore_eos=True) as response:
        lines = response.iter_lines()  # kept: httpx closes the stream with its iterator
        next(lines)
        eventually(lambda: rig.call(rig.engine.usage()).running == 1, 15)
    eventually(lambda: rig.call(rig.engine.usage()).running == 0, 15)


def test_two_streams_run_at_once(rig: EngineRig) -> None:
    adapter = rig.load().engine_name
    with (
        rig.streaming(rig.base.id, max_tokens=1500, ignore_eos=True) as long,
        httpx.Client(transport=httpx.HTTPTransport(uds=str(rig.engine.socket_path)), timeout=60) as other,
    ):
        lines = long.iter_lines()
        next(lines)
        body = {"model": adapter, "prompt": "hi", "max_tokens": 3}
        assert other.post("http://engine/v1/completions", json=body).status_code == 200
        eventually(lambda: rig.call(rig.engine.usage()).running == 1, 15)
