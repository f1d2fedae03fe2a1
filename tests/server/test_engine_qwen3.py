"""Qwen3 is no afterthought: a tiny one with the real tokenizer and template is served as peft computes it."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from adapters.bases import load_base
from server.engine.base import EngineOptions
from server.engine.vllm import VllmEngine
from tests.fixtures.bases import TEMPLATES, tiny_qwen3
from tests.fixtures.borrowed import BorrowedEngine
from tests.fixtures.engines import EngineRig, eventually
from tests.fixtures.reference import prompt_logprobs, served_prompt_logprobs
from tests.fixtures.service import Server, running
from tests.fixtures.tools import CHOICES, TOOLS, check_structured, second_turn, streamed_call, whole_call
from training.data.forms import parse_row
from training.data.rows import Place
from training.data.template import load_template

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineRig]:
    scratch = tmp_path_factory.mktemp("qwen3")
    # 32 is the smallest head that vLLM's CPU attention has a kernel for.
    base = load_base(tiny_qwen3(scratch / "tiny-qwen3", head_dim=32))
    sizes = {"slots": 2, "max_rank": 16, "context_length_tokens": 1024, "kv_cache_bytes": 64 << 20}
    options = EngineOptions(base.folder, base.id, scratch / "run", takes_templates=True, **sizes)
    rig = EngineRig(VllmEngine(options), base, scratch)
    try:
        rig.call(rig.engine.start())
        yield rig
    finally:
        rig.close()


def test_an_adapter_on_qwen3_computes_what_peft_computes(qwen3: EngineRig) -> None:
    adapter = qwen3.load(rank=8, alpha=16, scale=0.2)
    ids = [151644, 872, 198, 9707, 11, 1879, 0, 151645, 198, 151644, 77091, 198]
    for model, folder in ((qwen3.base.id, None), (adapter.engine_name, adapter.path)):
        body = qwen3.complete(model, ids, max_tokens=1, prompt_logprobs=0).json()
        expected = prompt_logprobs(qwen3.base.folder, folder, ids)
        assert served_prompt_logprobs(body, ids) == pytest.approx(expected, abs=1e-4)


def test_thinking_is_switched_in_the_prompt_that_the_template_makes(qwen3: EngineRig) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    rendered = {}
    for is_thinking in (True, False):
        kwargs = {"enable_thinking": is_thinking}
        body = {"model": qwen3.base.id, "messages": messages, "chat_template_kwargs": kwargs}
        tokens = qwen3.http.post("/tokenize", json=body).json()["tokens"]
        text = qwen3.http.post("/detokenize", json={"model": qwen3.base.id, "tokens": tokens}).json()["prompt"]
        rendered[is_thinking] = text
        answer = qwen3.chat(qwen3.base.id, "Hello", chat_template_kwargs=kwargs, max_tokens=2)
        assert answer.json()["usage"]["prompt_tokens"] == len(tokens)
    assert rendered[True].endswith("<|im_start|>assistant\n")
    assert rendered[False] == rendered[True] + "<think>\n\n</think>\n\n"


def test_a_version_is_rendered_with_its_own_template_and_thinks_as_its_card_says(
    qwen3: EngineRig, tmp_path: Path
) -> None:
    """What the engine makes of the prompts of the base, of a version with a template, and of one without thinking."""
    template = (
        "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% if enable_thinking is defined %} {{ enable_thinking }}{% endif %}"
        "{% endif %}"
    )
    card = json.dumps({"template": {"enable_thinking": False}})
    body = {"messages": [{"role": "user", "content": "Hello"}]}
    with running(
        qwen3.base, tmp_path, on=BorrowedEngine(qwen3, tmp_path / "engine"), allow_chat_templates=True
    ) as server:
        for name, more in (("own", {"chat_template": template}), ("plain", {"card": card})):
            folder = server.adapter(rank=8, alpha=16, scale=0.2)
            files = {"config": folder / "adapter_config.json", "weights": folder / "adapter_model.safetensors"}
            parts = {part: path.read_bytes() for part, path in files.items()} | {k: v.encode() for k, v in more.items()}
            pushed = server.push(name, files=parts, wait=60)
            assert (pushed.status_code, pushed.json()["status"]) == (201, "ready"), pushed.text
        prompts = {}
        for model in (qwen3.base.id, "own", "plain"):
            tokens = server.http.post("/tokenize", json={"model": model, **body}).json()["tokens"]
            prompts[model] = server.http.post("/detokenize", json={"model": model, "tokens": tokens}).json()["prompt"]
            answer = server.http.post("/v1/chat/completions", json={"model": model, "max_tokens": 1, **body})
            assert answer.json()["usage"]["prompt_tokens"] == len(tokens), model
        thinking = {"model": "own", "chat_template_kwargs": {"enable_thinking": True}, **body}
        tokens = server.http.post("/tokenize", json=thinking).json()["tokens"]
        said = server.http.post("/detokenize", json={"model": "own", "tokens": tokens}).json()["prompt"]
        gate = {"rows": [{**body, "expected": "x"}] * 2, "margin": 0.0, "max_tokens": 2}
        assert server.http.put("/v1/adapters/own/gate", json=gate).status_code == 200
        assert server.pushed("own", rank=8, alpha=16, scale=0.2)["version"] == 2
        figures = server.promote("own", 2).json()["gate"]
        proof = server.http.get("/v1/adapters/own/versions/2").json()["proof"]["gate"]
    assert (figures["score"], figures["stable_score"], proof["unanswered"]) == (0.0, 0.0, 0)
    assert prompts["own"] == "[user] Hello\n[assistant]" and said == "[user] Hello\n[assistant] True"
    assert prompts["plain"] == prompts[qwen3.base.id] + "<think>\n\n</think>\n\n"


@pytest.fixture(scope="module")
def served(qwen3: EngineRig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server on this engine with a version `older` that brings Qwen2.5's own template; the base's is Qwen3's."""
    scratch = tmp_path_factory.mktemp("tools")
    with running(
        qwen3.base,
        scratch,
        on=BorrowedEngine(qwen3, scratch / "engine"),
        slots=2,
        max_rank=16,
        allow_chat_templates=True,
    ) as server:
        folder = server.adapter(rank=8, alpha=16, scale=0.2)
        files = {"config": folder / "adapter_config.json", "weights": folder / "adapter_model.safetensors"}
        parts = {part: path.read_bytes() for part, path in files.items()}
        parts["chat_template"] = (TEMPLATES / "qwen2_5.jinja").read_bytes()
        pushed = server.push("older", files=parts, wait=60)
        assert (pushed.status_code, pushed.json()["status"]) == (201, "ready"), pushed.text
        yield server


def no_white_space(base: Path) -> dict[str, int]:
    """A bias against tokens of nothing else: where a grammar allows them, weights that mean nothing write no others."""
    vocabulary = json.loads((base / "tokenizer.json").read_bytes())["model"]["vocab"]
    return {str(number): -100 for word, number in vocabulary.items() if set(word) <= set("ĠĊčĉ")}


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("family", ["qwen3", "qwen2.5"])
def test_tools_and_schemas_hold_with_the_templates_of_qwen(served: Server, family: str, thinking: bool) -> None:
    """Forced by name, required, and by a schema, whole and streamed; and the tool's result is in the next prompt."""
    model = served.base.id if family == "qwen3" else "older"
    more: dict[str, Any] = {"extra_body": {"chat_template_kwargs": {"enable_thinking": thinking}}}
    more["logit_bias"] = no_white_space(served.base.folder)
    one: dict[str, Any] = {"parallel_tool_calls": False}  # they would call one after the other until they are cut off
    for choice in CHOICES.values():
        whole = whole_call(served.openai, model, choice, **more, **one)
        streamed_call(served.openai, model, choice, **more, **one)
    check_structured(served.openai, model, **more)
    asked = {"model": model, "messages": second_turn(whole), "tools": TOOLS, **more["extra_body"]}
    tokens = served.http.post("/tokenize", json=asked).json()["tokens"]
    prompt = served.http.post("/detokenize", json={"model": model, "tokens": tokens}).json()["prompt"]
    assert '<tools>\n{"type": "function", "function": {"name": "lamp"' in prompt
    assert f'<tool_call>\n{{"name": "{whole.function.name}", "arguments": ' in prompt
    assert '<tool_response>\n{"is_on": true}\n</tool_response><|im_end|>\n<|im_start|>assistant\n' in prompt
    assert prompt.endswith("<think>\n\n</think>\n\n") is (family == "qwen3" and not thinking)
    answer = served.http.post("/v1/chat/completions", json={**asked, "max_tokens": 1})
    assert answer.json()["usage"]["prompt_tokens"] == len(tokens)


def test_training_renders_the_prompts_that_serving_renders(qwen3: EngineRig) -> None:
    """Tools in any order of keys, arguments as text, parts of text, reasoning, thinking on and off: id for id."""
    tools = [
        {"function": {"parameters": {"type": "object", "properties": {"b": {}, "a": {}}}, "name": "lamp", "extra": 1}},
        {"type": "function", "function": {"name": "clock", "strict": True, "description": 'Tells "the time", ư.'}},
    ]
    calls = [
        {"id": "1", "type": "function", "function": {"name": "lamp", "arguments": '{"b": "ư", "a": [1, 2.50, null]}'}},
        {"id": "2", "type": "function", "function": {"name": "clock", "arguments": ""}},
    ]
    parts = [{"type": "text", "text": "Is it on?"}, {"type": "text", "text": "And when?"}]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": None, "reasoning_content": "Ask.", "tool_calls": calls},
        {"role": "tool", "content": "off", "tool_call_id": "1"},
        {"role": "tool", "content": "12:00", "tool_call_id": "2"},
        {"role": "assistant", "content": "Off.", "reasoning_content": "It says off."},
        {"role": "user", "content": "And\nnow?"},
        {"role": "assistant", "content": "On."},
    ]
    asked = [dict(message) for message in messages]
    for message in asked:  # how a request spells it
        if "reasoning_content" in message:
            message["reasoning"] = message.pop("reasoning_content")
    for thinking in (True, False):
        template = load_template(qwen3.base.folder, thinking)
        for declared in (tools, None):
            row = parse_row({"messages": messages, "tools": declared}, Place("x.jsonl", 1, 1), Counter())
            for turn in (2, 5, 7):
                body = {"messages": asked[:turn], "chat_template_kwargs": {"enable_thinking": thinking}}
                body |= {"model": qwen3.base.id, **({"tools": declared} if declared else {})}
                served = qwen3.http.post("/tokenize", json=body).json()["tokens"]
                assert template.prompt_ids(row.messages[:turn], row.tools, thinking) == served
                if thinking:  # without, a turn with reasoning is refused: serving has closed its block
                    sequence = next(made for made in template.render(row) if turn in made.turns)
                    assert list(sequence.input_ids[: len(served)]) == served


def test_an_engine_whose_core_is_killed_while_it_streams_is_soon_not_ready_and_comes_back(qwen3: EngineRig) -> None:
    """The last test of this module: it costs a second start."""
    engine = qwen3.engine
    assert isinstance(engine, VllmEngine)
    adapter = qwen3.load(rank=8, scale=0.2)
    before = qwen3.complete(adapter.engine_name).json()["choices"][0]["text"]
    core = next(p for p in psutil.Process(engine.pid).children() if "EngineCore" in "".join(p.cmdline()))
    with qwen3.streaming(adapter.engine_name, max_tokens=900, ignore_eos=True) as response:
        lines = response.iter_lines()
        next(lines)
        os.kill(core.pid, signal.SIGKILL)
        eventually(lambda: not engine.is_ready(), 2)
        try:
            last = list(lines)
        except httpx.TransportError:
            last = []
        assert "[DONE]" not in last or any('"error"' in line for line in last)
    eventually(engine.is_ready, 300)
    eventually(lambda: engine.restarts == 1, 5)  # counted a moment after the engine is ready
    assert qwen3.loaded_names() == set()
    qwen3.call(engine.load(adapter))
    assert qwen3.complete(adapter.engine_name).json()["choices"][0]["text"] == before
