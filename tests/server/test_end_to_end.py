"""`hotshoe serve` as a user starts it: embedded base, stock vLLM, the official client and the command line."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from adapters.bases import BaseModel
from tests.fixtures.adapters import write_adapter
from tests.fixtures.processes import Served
from training.evaluate import load_examples
from training.evaluation.answering import Place, open_source

pytestmark = pytest.mark.model
FLAGS = ("--slots", "3")
ENV = {"HOTSHOE_KV_CACHE_BYTES": str(384 << 20), "HOTSHOE_CONTEXT_LENGTH_TOKENS": "2048", "HOTSHOE_STAGED_LIMIT": "6"}
START_SECONDS = 420.0
ANSWER_TOKENS = 8


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("real")


@pytest.fixture(scope="module")
def served(embedded_base: BaseModel, scratch: Path) -> Iterator[Served]:
    (scratch / "shared").mkdir()
    sources = [{"name": "shared", "url": f"file://{scratch}/shared", "every_seconds": None}]
    one = Served(scratch / "home", *FLAGS, seconds=START_SECONDS, HOTSHOE_SOURCES=json.dumps(sources), **ENV)
    yield one
    one.end()


@pytest.fixture(scope="module")
def sdk(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="unused", timeout=300, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def router(served: Served, embedded_base: BaseModel, scratch: Path) -> list[dict[str, Any]]:
    """Two versions of `router`, pushed with the command line; the first is stable."""
    rows = []
    for seed in (1, 2):
        folder = write_adapter(scratch / f"router{seed}", embedded_base, seed=seed, targets=("q_proj", "v_proj"))
        done = served.run("push", str(folder), "--name", "router", "--json")
        assert done.returncode == 0, done.stdout + done.stderr
        rows.append(json.loads(done.stdout))
    return rows


def ask(sdk: openai.OpenAI, model: str) -> Any:
    return sdk.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Say hello."}],
        max_tokens=ANSWER_TOKENS,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
    )


def test_alone_it_serves_the_embedded_base_and_lists_it_first(sdk: openai.OpenAI, embedded_base: BaseModel) -> None:
    assert next(iter(sdk.models.list())).id == embedded_base.id == "smollm2-135m-instruct"


def test_a_pushed_adapter_is_proven_on_the_engine_and_answers_under_its_version(
    sdk: openai.OpenAI, router: list[dict[str, Any]], embedded_base: BaseModel
) -> None:
    assert [row["status"] for row in router] == ["ready", "ready"]
    assert router[0]["proof"]["engine_version"].startswith("vllm")
    base, first, second = (ask(sdk, model) for model in (embedded_base.id, "router", "router@2"))
    assert (base.model, first.model, second.model) == (embedded_base.id, "router@1", "router@2")
    values = [one.choices[0].logprobs.content[0].logprob for one in (base, first, second)]
    assert len(set(values)) == 3


def test_an_adapter_that_changes_nothing_is_rejected_by_the_real_engine(
    served: Served, embedded_base: BaseModel, scratch: Path
) -> None:
    folder = write_adapter(scratch / "idle", embedded_base, fill=(0.01, 0.0), targets=("q_proj",))
    done = served.run("push", str(folder), "--name", "idle", "--json")
    assert done.returncode == 3
    assert json.loads(done.stdout)["error"]["problems"][0]["code"] == "no_effect"


def test_a_folder_that_vllms_own_call_loads_is_proven_and_answers_until_it_is_unloaded(
    sdk: openai.OpenAI, served: Served, embedded_base: BaseModel, scratch: Path
) -> None:
    folder = write_adapter(scratch / "shared" / "policy-v1", embedded_base, seed=7, targets=("q_proj", "v_proj"))
    body = {"lora_name": "policy-v1", "lora_path": str(folder), "load_inplace": False}
    answer = httpx.post(f"{served.url}/v1/load_lora_adapter", json=body, timeout=300)
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'policy-v1' added successfully.")
    assert "policy-v1" in [model.id for model in sdk.models.list()]
    base, policy = ask(sdk, embedded_base.id), ask(sdk, "policy-v1")
    assert policy.model == "policy-v1@1"
    assert policy.choices[0].logprobs.content[0].logprob != base.choices[0].logprobs.content[0].logprob
    answer = httpx.post(f"{served.url}/v1/unload_lora_adapter", json={"lora_name": "policy-v1"}, timeout=60)
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'policy-v1' removed successfully.")
    with pytest.raises(openai.NotFoundError):
        ask(sdk, "policy-v1")


def test_evaluating_over_http_and_without_a_server_gives_the_same_answers_up_to_a_near_tie(
    served: Served, router: list[dict[str, Any]], scratch: Path
) -> None:
    rows = [{"prompt": f"Name a colour that begins with {letter}.", "completion": "red"} for letter in "abcdef"]
    data = scratch / "asked.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    examples = load_examples(data)
    sources = [open_source(name, Place(served.url)) for name in ("router@1", str(scratch / "router1"))]
    over_http, here = (source.answers(examples, ANSWER_TOKENS).texts for source in sources)
    assert len(over_http) == len(here) == 6 and all(over_http)
    assert sum(one == other for one, other in zip(over_http, here, strict=True)) >= 5


@pytest.mark.parametrize("model", ["smollm2-135m-instruct", "router@1"])
def test_streams_completions_responses_and_messages_answer(
    sdk: openai.OpenAI, served: Served, router: list[dict[str, Any]], model: str
) -> None:
    messages: Any = [{"role": "user", "content": "Count to three."}]
    chunks = list(sdk.chat.completions.create(model=model, messages=messages, max_tokens=6, stream=True))
    assert {chunk.model for chunk in chunks} == {model}
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)
    completion = sdk.completions.create(model=model, prompt="One, two,", max_tokens=4, logprobs=2, echo=True)
    assert completion.model == model and completion.choices[0].logprobs is not None
    response = sdk.responses.create(model=model, input="Say hi.", max_output_tokens=16)
    assert response.model == model and response.output_text
    events = list(sdk.responses.create(model=model, input="Say hi.", max_output_tokens=4, stream=True))
    assert events[-1].type in ("response.completed", "response.incomplete")
    body = {"model": model, "messages": messages, "max_tokens": 4}
    answer = httpx.post(f"{served.url}/v1/messages", json=body, timeout=120).json()
    assert answer["model"] == model and answer["usage"]["output_tokens"] > 0
    tokens = httpx.post(f"{served.url}/tokenize", json={"model": model, "prompt": "hello"}, timeout=60).json()["tokens"]
    text = httpx.post(f"{served.url}/detokenize", json={"model": model, "tokens": tokens}, timeout=60).json()["prompt"]
    assert text == "hello"


def test_a_named_tool_is_called_and_a_json_schema_is_kept(sdk: openai.OpenAI, router: list[dict[str, Any]]) -> None:
    schema = {
        "type": "object",
        "properties": {"state": {"type": "string", "enum": ["on", "off"]}},
        "required": ["state"],
        "additionalProperties": False,
    }
    asked: Any = {
        "model": "router",
        "messages": [{"role": "user", "content": "Turn the lamp on."}],
        "max_tokens": 48,
        "temperature": 0,
    }
    answer = sdk.chat.completions.create(
        tools=[{"type": "function", "function": {"name": "turn", "parameters": schema}}],
        tool_choice={"type": "function", "function": {"name": "turn"}},
        **asked,
    )
    [call] = answer.choices[0].message.tool_calls
    assert call.function.name == "turn" and isinstance(json.loads(call.function.arguments), dict)
    form = {"type": "json_schema", "json_schema": {"name": "state", "schema": schema}}
    answer = sdk.chat.completions.create(response_format=form, **asked)
    assert json.loads(answer.choices[0].message.content)["state"] in ("on", "off")


def test_the_engines_refusals_become_the_librarys_own_exceptions(sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        sdk.completions.create(model="smollm2-135m-instruct", prompt="x " * 4000, max_tokens=1)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as caught:
        sdk.chat.completions.create(model="smollm2-135m-instruct", messages="a secret")  # type: ignore[call-overload]
    assert "secret" not in str(caught.value)


def test_a_promote_while_a_stream_runs_leaves_the_stream_on_its_version(
    sdk: openai.OpenAI, served: Served, router: list[dict[str, Any]]
) -> None:
    started, chunks = threading.Event(), []

    def read() -> None:
        stream = sdk.chat.completions.create(
            model="router",
            messages=[{"role": "user", "content": "Tell a long story."}],
            max_tokens=96,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        for chunk in stream:
            chunks.append(chunk)
            started.set()

    thread = threading.Thread(target=read)
    thread.start()
    assert started.wait(120)
    assert served.verb("promote", "router@2").returncode == 0
    assert thread.is_alive(), "the stream was over before the promote"
    assert ask(sdk, "router").model == "router@2"
    thread.join(300)
    assert {chunk.model for chunk in chunks} == {"router@1"}
    assert chunks[-1].choices[0].finish_reason == "length"
    loads, started = loads_of(served), time.monotonic()
    answer = httpx.post(f"{served.url}/v1/adapters/router/rollback", timeout=10)
    assert time.monotonic() - started < 1
    assert answer.json()["version"] == 1
    assert ask(sdk, "router").model == "router@1"
    assert loads_of(served) == loads, "what it returned to was still there"


def loads_of(served: Served) -> list[str]:
    """The lines of the metric that counts loads."""
    text = httpx.get(f"{served.url}/metrics", timeout=60).text
    return [line for line in text.splitlines() if line.startswith("hotshoe_adapter_loads_total")]


def test_a_candidate_answers_its_sessions_on_the_real_engine(
    sdk: openai.OpenAI, served: Served, router: list[dict[str, Any]]
) -> None:
    assert served.verb("promote", "router@2", "--share", "50%").returncode == 0
    loads = loads_of(served)
    answers = [
        sdk.completions.create(model="router", prompt="Hi", max_tokens=1, user=f"user {i}").model
        for i in [*range(16), *range(16)]
    ]
    assert answers[:16] == answers[16:], "each user stays on a version"
    assert set(answers) == {"router@1", "router@2"}, "one run in 30,000 has them all on one"
    assert loads_of(served) == loads
    assert served.verb("rollback", "router", "--candidate").returncode == 0


def test_after_a_restart_the_warm_set_is_back_before_ready_and_no_process_was_left(
    sdk: openai.OpenAI, served: Served, router: list[dict[str, Any]]
) -> None:
    before = ask(sdk, "router@2").choices[0]
    assert served.verb("promote", "router@2").returncode == 0
    assert served.verb("retire", "router@1").returncode == 0
    children = psutil.Process(served.process.pid).children(recursive=True)
    assert children
    assert served.stop(signal.SIGTERM) == 0
    assert psutil.wait_procs(children, timeout=10)[1] == []
    served.start(START_SECONDS)
    rows = {row["id"]: row for row in httpx.get(f"{served.url}/v1/system").json()["adapters"]}
    assert rows["router@2"]["residency"] == "resident"
    assert rows["router@1"]["residency"] == "absent"
    after = ask(sdk, "router")
    assert (after.model, after.choices[0].message.content) == ("router@2", before.message.content)
    changes = zip(before.logprobs.content, after.choices[0].logprobs.content, strict=True)
    assert max(abs(one.logprob - other.logprob) for one, other in changes) < 1e-3
    assert served.verb("doctor").returncode == 1  # the server holds the state
