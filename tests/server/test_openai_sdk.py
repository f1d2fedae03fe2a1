"""The official client library against the server, as users call it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import openai
import pytest

from adapters.bases import BaseModel
from tests.fixtures.service import Server, running


@pytest.fixture(scope="module")
def sdk(server: Server) -> openai.OpenAI:
    server.pushed("router")
    return server.openai


def test_a13_chat_completions_answer_for_base_and_adapter(sdk: openai.OpenAI) -> None:
    for model, concrete in (("tiny", "tiny"), ("router", "router@1"), ("router@1", "router@1")):
        answer = sdk.chat.completions.create(model=model, messages=[{"role": "user", "content": "hi"}])
        assert answer.model == concrete
        assert answer.choices[0].message.content == f"{concrete} heard: hi"
        assert answer.usage is not None and answer.usage.completion_tokens == 3


def test_a13_a_stream_can_be_read_and_asked_for_usage(sdk: openai.OpenAI) -> None:
    stream = sdk.chat.completions.create(
        model="router",
        messages=[{"role": "user", "content": "one two three"}],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "router@1 heard: one two three"
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 5


def test_a13_completions_with_logprobs(sdk: openai.OpenAI) -> None:
    answer = sdk.completions.create(model="router", prompt="a b", logprobs=2, max_tokens=2)
    assert answer.model == "router@1"
    assert answer.choices[0].logprobs is not None


def test_a13_models_can_be_listed_read_and_deleted(server: Server, sdk: openai.OpenAI) -> None:
    server.pushed("passing")
    server.pushed("passing")
    assert next(model.id for model in sdk.models.list()) == "tiny"
    assert sdk.models.retrieve("passing@2").id == "passing@2"
    assert sdk.models.delete("passing@2").deleted
    with pytest.raises(openai.ConflictError):
        sdk.models.delete("passing")


@pytest.mark.parametrize(
    ("call", "kind", "code"),
    [
        (lambda c: c.chat.completions.create(model="nobody", messages=[]), openai.NotFoundError, "model_not_found"),
        (lambda c: c.chat.completions.create(model="tiny", messages=[]), openai.BadRequestError, "invalid_request"),
        (
            lambda c: c.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": "x"}], max_tokens=99_999
            ),
            openai.BadRequestError,
            "context_length_exceeded",
        ),
        (lambda c: c.responses.create(model="tiny", input="x", store=True), openai.BadRequestError, "invalid_request"),
        (lambda c: c.models.retrieve("nobody@1"), openai.NotFoundError, "model_not_found"),
        (lambda c: c.embeddings.create(model="tiny", input="x"), openai.NotFoundError, "route_not_found"),
    ],
)
def test_a13_each_refusal_becomes_the_librarys_own_exception(
    sdk: openai.OpenAI, call: Callable[[openai.OpenAI], object], kind: type[openai.APIStatusError], code: str
) -> None:
    with pytest.raises(kind) as caught:
        call(sdk)
    assert caught.value.code == code


@pytest.fixture(scope="module")
def keyed(tiny_base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tiny_base, tmp_path_factory.mktemp("keyed"), api_key="the-right-key") as one:
        yield one


def test_a13_a_wrong_key_is_an_authentication_error(keyed: Server) -> None:
    assert keyed.openai.models.list().data[0].id == "tiny"
    with (
        openai.OpenAI(base_url=f"{keyed.url}/v1", api_key="the-wrong-key", max_retries=0) as wrong,
        pytest.raises(openai.AuthenticationError) as caught,
    ):
        wrong.models.list()
    assert caught.value.code == "invalid_api_key"


def test_a13_an_error_in_the_middle_of_a_stream_is_raised(server: Server, sdk: openai.OpenAI) -> None:
    server.script.error_after_tokens = 1
    try:
        with pytest.raises(openai.APIError, match="EngineCore"):
            list(
                sdk.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "a b c"}], stream=True)
            )
    finally:
        server.script.error_after_tokens = None


def test_a13_an_engine_that_is_away_is_an_error_to_retry(server: Server, sdk: openai.OpenAI) -> None:
    server.call(server.engine.crash(down_seconds=1.0))
    with pytest.raises(openai.InternalServerError) as caught:
        sdk.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x"}])
    assert caught.value.code == "engine_unavailable"
    assert int(caught.value.response.headers["retry-after"]) >= 1
    patient = sdk.with_options(max_retries=4)
    assert patient.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x"}]).model == "tiny"
