"""Tools and structured output on the embedded base and an adapter, by the real engine, through OpenAI's own client."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.conftest import CONTEXT_TOKENS, SLOTS, STAGED_LIMIT
from tests.fixtures.borrowed import BorrowedEngine
from tests.fixtures.engines import EngineRig
from tests.fixtures.service import Server, running
from tests.fixtures.tools import ASKED, CHOICES, TOOLS, check_structured, second_turn, streamed_call, whole_call

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def server(vllm_engine: EngineRig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    scratch = tmp_path_factory.mktemp("tools")
    limits: dict[str, Any] = {"slots": SLOTS, "staged_limit": STAGED_LIMIT, "context_length_tokens": CONTEXT_TOKENS}
    with running(vllm_engine.base, scratch, on=BorrowedEngine(vllm_engine, scratch / "run"), **limits) as one:
        yield one


@pytest.fixture(scope="module", params=["base", "adapter"])
def model(request: pytest.FixtureRequest, server: Server) -> str:
    if request.param == "base":
        return server.base.id
    return str(server.pushed("tooled", targets=("q_proj", "v_proj"))["id"])


@pytest.mark.parametrize("choice", CHOICES)
def test_a_forced_tool_is_called_whole_and_in_pieces_with_arguments_that_meet_its_schema(
    server: Server, model: str, choice: str
) -> None:
    whole = whole_call(server.openai, model, CHOICES[choice])
    streamed = streamed_call(server.openai, model, CHOICES[choice])
    assert whole.function.name == streamed.function.name
    if choice == "named":
        assert whole.function.name == "lamp"


def test_an_answer_in_the_form_of_a_schema_meets_it_whole_and_in_pieces(server: Server, model: str) -> None:
    check_structured(server.openai, model)


def test_a_second_turn_with_the_tools_result_is_answered_and_streamed(server: Server, model: str) -> None:
    messages: Any = second_turn(whole_call(server.openai, model, CHOICES["named"]))
    asked: Any = {**ASKED, "model": model, "messages": messages, "tools": TOOLS, "max_completion_tokens": 4}
    first = server.openai.chat.completions.create(**{**asked, "messages": ASKED["messages"]})
    answer = server.openai.chat.completions.create(**asked)
    assert answer.usage is not None and first.usage is not None
    assert answer.usage.prompt_tokens > first.usage.prompt_tokens
    chunks = list(server.openai.chat.completions.create(**asked, stream=True))
    assert chunks[-1].choices[0].finish_reason in ("stop", "length", "tool_calls")


def test_no_tool_is_called_where_none_may_be(server: Server, model: str) -> None:
    answer = server.openai.chat.completions.create(model=model, tools=TOOLS, tool_choice="none", **ASKED)
    assert not answer.choices[0].message.tool_calls and answer.choices[0].message.content


def test_a_tool_that_is_not_there_is_the_clients_error(server: Server, model: str) -> None:
    for choice in ({"type": "function", "function": {"name": "oven"}}, "sometimes"):
        with pytest.raises(openai.BadRequestError):
            server.openai.chat.completions.create(model=model, tools=TOOLS, tool_choice=choice, **ASKED)  # type: ignore[call-overload]
