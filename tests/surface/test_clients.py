"""LangChain's and LiteLLM's clients, as they come: what they are told, they understand, errors in their own classes.

Each call goes through the client's public interface with nothing but a base URL, a key and a model id.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import openai
import pytest
from langchain_core import exceptions as lc
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from langchain_openai.chat_models.base import OpenAIContextOverflowError

from tests.fixtures.service import Server
from tests.surface.conftest import KEY

# Both keep their connections open until they are collected, and have no way to be told to close them.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")
HELLO: list[Any] = [{"role": "user", "content": "one two three"}]
WEATHER: dict[str, Any] = {
    "name": "weather",
    "description": "The weather of a place.",
    "parameters": {
        "type": "object",
        "properties": {"place": {"type": "string", "maxLength": 20}},
        "required": ["place"],
        "additionalProperties": False,
    },
}
LONG = "w " * 9999


@pytest.fixture(scope="module", autouse=True)
def collected() -> Iterator[None]:
    """What they leave open is collected here, where its warning is expected, and not in another module's tests."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def litellm() -> ModuleType:
    """LiteLLM without its look at the network: the map of prices that it ships."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
        patch.setenv("LITELLM_MODE", "PRODUCTION")  # else it reads a .env of the current folder
        import litellm as found
    found.telemetry = False
    found.suppress_debug_info = True
    return found


@pytest.fixture(scope="module")
def served(keyed: Server) -> Server:
    keyed.pushed("router")
    return keyed


@pytest.fixture
def limited(served: Server) -> str:
    """A key that may ask once a minute, and did."""
    row = served.http.post("/v1/keys", json={"scopes": ["infer"], "limits": {"requests_per_minute": 1}}).json()
    spent = openai.OpenAI(base_url=f"{served.url}/v1", api_key=row["key"], max_retries=0)
    with spent as client:
        client.chat.completions.create(model="tiny", messages=HELLO)
    return str(row["key"])


@pytest.fixture
def chat(served: Server) -> Callable[..., ChatOpenAI]:
    def make(model: str = "router", **fields: Any) -> ChatOpenAI:
        values = {"base_url": f"{served.url}/v1", "api_key": KEY, "max_retries": 0, **fields}
        return ChatOpenAI(model=model, **values)

    return make


@pytest.mark.parametrize("use_responses_api", [False, True])
def test_langchain_invokes_streams_and_reads_the_usage(
    chat: Callable[..., ChatOpenAI], use_responses_api: bool
) -> None:
    model = chat(use_responses_api=use_responses_api, stream_usage=True)
    answer = model.invoke("one two three")
    assert isinstance(answer, AIMessage) and answer.text == "router@1 heard: one two three"
    counts = {"input_tokens": 3, "output_tokens": 5, "total_tokens": 8}
    assert answer.usage_metadata is not None and counts.items() <= answer.usage_metadata.items()
    assert answer.response_metadata["model_name"] == "router@1"
    whole = AIMessageChunk("")
    for chunk in model.stream("one two three"):
        assert isinstance(chunk, AIMessageChunk)
        whole += chunk  # type: ignore[assignment]
    assert whole.text == answer.text
    assert whole.usage_metadata is not None and counts.items() <= whole.usage_metadata.items()


@pytest.mark.parametrize("use_responses_api", [False, True])
def test_langchain_binds_a_tool_and_reads_its_call(chat: Callable[..., ChatOpenAI], use_responses_api: bool) -> None:
    model = chat(use_responses_api=use_responses_api).bind_tools([WEATHER], tool_choice="weather")
    answer = model.invoke("in Oslo")
    assert [(call["name"], call["args"]) for call in answer.tool_calls] == [("weather", {"place": "in Oslo"})]
    whole: Any = None
    for chunk in model.stream("in Oslo"):
        whole = chunk if whole is None else whole + chunk
    assert [(call["name"], call["args"]) for call in whole.tool_calls] == [("weather", {"place": "in Oslo"})]
    structured = chat().with_structured_output({**WEATHER, "title": "weather"}, method="function_calling")
    assert structured.invoke("in Oslo") == {"place": "in Oslo"}


@pytest.mark.parametrize(
    ("fields", "kind", "own"),
    [
        ({"model": "nobody"}, openai.NotFoundError, lc.ModelNotFoundError),
        ({"api_key": "wrong"}, openai.AuthenticationError, lc.ModelAuthenticationError),
        ({"max_tokens": -1}, openai.BadRequestError, lc.ModelInvalidRequestError),
        ({"extra_body": {"top_kk": 1}}, openai.BadRequestError, lc.ModelInvalidRequestError),
    ],
)
def test_a13_a_refusal_is_langchains_own_error_and_openais(
    chat: Callable[..., ChatOpenAI], fields: dict[str, Any], kind: type[Exception], own: type[Exception]
) -> None:
    with pytest.raises(kind) as caught:
        chat(**fields).invoke("hi")
    assert isinstance(caught.value, own)


def test_a13_langchain_knows_a_prompt_that_is_too_long_and_a_limit(
    chat: Callable[..., ChatOpenAI], limited: str
) -> None:
    with pytest.raises(OpenAIContextOverflowError) as too_long:
        chat().invoke(LONG)
    assert too_long.value.code == "context_length_exceeded"
    with pytest.raises(openai.RateLimitError) as over:
        chat(api_key=limited).invoke("hi")
    assert isinstance(over.value, lc.ModelRateLimitError) and over.value.code == "rate_limit_exceeded"


def test_langchains_embeddings_are_told_that_there_are_none(served: Server) -> None:
    embeddings = OpenAIEmbeddings(
        model="tiny", base_url=f"{served.url}/v1", api_key=KEY, max_retries=0, check_embedding_ctx_length=False
    )
    with pytest.raises(openai.NotFoundError) as caught:
        embeddings.embed_query("x")
    assert caught.value.code == "route_not_found"


Complete = Callable[..., Any]


@pytest.fixture
def complete(litellm: ModuleType, served: Server) -> Iterator[Complete]:
    def call(model: str = "router", **fields: Any) -> Any:
        values = {"api_base": f"{served.url}/v1", "api_key": KEY, "messages": HELLO, "num_retries": 0, **fields}
        return litellm.completion(model=f"openai/{model}", **values)

    yield call
    litellm.in_memory_llm_clients_cache.flush_cache()


def test_litellm_completes_streams_and_reads_the_usage(complete: Complete) -> None:
    answer = complete()
    assert answer.choices[0].message.content == "router@1 heard: one two three"
    assert answer.model == "router@1"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 5)
    chunks = list(complete(stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == "router@1 heard: one two three"
    assert next(chunk.usage.completion_tokens for chunk in chunks if getattr(chunk, "usage", None)) == 5


def test_litellm_reads_a_forced_tools_call(complete: Complete) -> None:
    choice = {"type": "function", "function": {"name": "weather"}}
    answer = complete(tools=[{"type": "function", "function": WEATHER}], tool_choice=choice)
    (call,) = answer.choices[0].message.tool_calls
    assert (call.function.name, call.function.arguments) == ("weather", '{"place": "one two three"}')


def test_litellm_speaks_anthropics_way_too(litellm: ModuleType, served: Server) -> None:
    answer = litellm.completion(
        model="anthropic/router", api_base=served.url, api_key=KEY, messages=HELLO, max_tokens=8, num_retries=0
    )
    assert answer.choices[0].message.content == "router@1 heard: one two three"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 5)


def test_litellm_lists_the_models(litellm: ModuleType, served: Server) -> None:
    found = litellm.get_valid_models(
        check_provider_endpoint=True, custom_llm_provider="openai", api_key=KEY, api_base=f"{served.url}/v1"
    )
    assert {"openai/tiny", "openai/router"} <= {name if "/" in name else f"openai/{name}" for name in found}


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"model": "nobody"}, "NotFoundError"),
        ({"api_key": "wrong"}, "AuthenticationError"),
        ({"messages": [{"role": "user", "content": LONG}]}, "ContextWindowExceededError"),
        ({"max_tokens": 99_999}, "ContextWindowExceededError"),
        ({"temperature": 1e9}, "BadRequestError"),
        ({"extra_body": {"top_kk": 1}}, "BadRequestError"),
    ],
)
def test_a13_a_refusal_is_litellms_own_error(
    litellm: ModuleType, complete: Complete, fields: dict[str, Any], kind: str
) -> None:
    with pytest.raises(getattr(litellm, kind)) as caught:
        complete(**fields)
    assert type(caught.value).__name__ == kind


def test_a13_a_key_over_its_limit_is_litellms_rate_limit_error(
    litellm: ModuleType, complete: Complete, limited: str
) -> None:
    with pytest.raises(litellm.RateLimitError):
        complete(api_key=limited)


def test_litellms_embeddings_are_told_that_there_are_none(litellm: ModuleType, served: Server) -> None:
    with pytest.raises(litellm.NotFoundError):
        litellm.embedding(model="openai/tiny", input=["x"], api_base=f"{served.url}/v1", api_key=KEY, num_retries=0)


@pytest.mark.model
def test_both_clients_on_the_real_engine(on_vllm: Server, litellm: ModuleType) -> None:
    base_url, model = f"{on_vllm.url}/v1", on_vllm.base.id
    values: dict[str, Any] = {"base_url": base_url, "api_key": KEY, "max_retries": 0, "temperature": 0}
    for use_responses_api in (False, True):
        one = ChatOpenAI(model=model, max_tokens=16, use_responses_api=use_responses_api, stream_usage=True, **values)
        answer = one.invoke("Say hello.")
        assert answer.text and answer.usage_metadata is not None
        streamed: Any = None
        for chunk in one.stream("Say hello."):
            streamed = chunk if streamed is None else streamed + chunk
        assert streamed.text == answer.text
        assert streamed.usage_metadata["output_tokens"] == answer.usage_metadata["output_tokens"]
    forced = ChatOpenAI(model=model, max_tokens=128, **values).bind_tools([WEATHER], tool_choice="weather", strict=True)
    (call,) = forced.invoke("What is the weather in Oslo?").tool_calls
    assert call["name"] == "weather" and isinstance(call["args"]["place"], str)
    shared: dict[str, Any] = {"api_key": KEY, "num_retries": 0, "max_tokens": 16, "temperature": 0}
    asked = {**shared, "messages": [{"role": "user", "content": "Say hello."}]}
    there = litellm.completion(model=f"openai/{model}", api_base=base_url, **asked)
    anthropic_way = litellm.completion(model=f"anthropic/{model}", api_base=on_vllm.url, **asked)
    assert there.choices[0].message.content == anthropic_way.choices[0].message.content != ""
    chunks = litellm.completion(model=f"openai/{model}", api_base=base_url, stream=True, **asked)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == there.choices[0].message.content
    with pytest.raises(litellm.ContextWindowExceededError):
        asked["messages"] = [{"role": "user", "content": LONG}]
        litellm.completion(model=f"openai/{model}", api_base=base_url, **asked)
