"""What the engine refuses becomes the code that clients branch on, and leaves the engine as it was."""

from __future__ import annotations

from typing import Any

import pytest

from server.errors import from_engine
from tests.conftest import CONTEXT_TOKENS
from tests.fixtures.engines import EngineRig

LONG = "word " * (CONTEXT_TOKENS + 10)
MESSAGES = [{"role": "user", "content": LONG}]


def check(rig: EngineRig, path: str, body: dict[str, Any], code: str) -> None:
    answer = rig.http.post(path, json={"model": rig.base.id, **body})
    error = from_engine(answer.status_code, answer.content)
    assert (error.status, error.error["code"]) == (400, code), answer.text[:500]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": MESSAGES}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": CONTEXT_TOKENS + 1}),
        ("/v1/completions", {"prompt": LONG}),
        ("/v1/completions", {"prompt": "hi", "max_tokens": CONTEXT_TOKENS + 1}),
        ("/v1/responses", {"input": LONG}),
        ("/v1/messages", {"messages": MESSAGES, "max_tokens": 8}),
    ],
)
def test_what_does_not_fit_is_context_length_exceeded(rig: EngineRig, path: str, body: dict[str, Any]) -> None:
    check(rig, path, body, "context_length_exceeded")


@pytest.mark.model
def test_a9_patterns_that_the_grammar_compiler_cannot_take_end_their_request_alone(vllm_engine: EngineRig) -> None:
    phases = dict(vllm_engine.engine.phases)
    for pattern in ("[a-z]{1,300}", "(?=a)b", "(a+)+$"):
        schema = {"type": "string", "pattern": pattern}
        format_ = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        assert vllm_engine.chat(vllm_engine.base.id, response_format=format_).status_code in (200, 400, 500), pattern
    assert vllm_engine.chat(vllm_engine.base.id, max_tokens=1).status_code == 200
    assert dict(vllm_engine.engine.phases) == phases  # it was never started again
