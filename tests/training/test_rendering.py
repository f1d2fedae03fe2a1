"""The mask against a second construction that knows ChatML and no template, and what keeps an adapter from stopping."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters.bases import load_base
from adapters.errors import BaseInvalid
from tests.training.conftest import chat, write_jsonl
from training.config import TrainingConfig
from training.data.forms import parse_row
from training.data.jsontext import RowInvalid
from training.data.rows import Place, Row
from training.data.stopping import refuse_untrained_end
from training.data.template import IGNORED, ChatTemplate, Rendered, load_template
from training.material import gather

WORDS = ["Is it on?", "Không.", 'It\'s\n\n"dark" {x}', "  two  spaces", "😀 ưở", "\ttab", "<tool>", "12 345", "hall\n"]
PARAMETERS = {"type": "object", "properties": {"b": {}, "a": {}}}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "lamp", "parameters": PARAMETERS}},
    {"function": {"parameters": {"type": "object"}, "strict": True, "name": "clock", "description": 'Tells "time".'}},
]
DECLARED = (
    '{"type": "function", "function": {"name": "lamp", "description": null, '
    '"parameters": {"type": "object", "properties": {"b": {}, "a": {}}}}}\n'
    '{"type": "function", "function": {"name": "clock", "description": "Tells \\"time\\".", '
    '"parameters": {"type": "object"}, "strict": true}}'
)
TOOL_TEXT = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with function "
    f"signatures within <tools></tools> XML tags:\n<tools>\n{DECLARED}\n</tools>\n\nFor each function call, return a "
    "json object with function name and arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)
DEFAULT_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."


def some_row(chance: random.Random, thinks: bool) -> Row:
    """A conversation of one to four exchanges, some with a system prompt, tools, calls, weights and reasoning."""
    messages: list[dict[str, Any]] = []
    has_tools = chance.random() < 0.5
    if chance.random() < 0.5:
        messages.append({"role": "system", "content": chance.choice(WORDS)})
    for _ in range(chance.randint(1, 4)):
        messages.append({"role": "user", "content": chance.choice(WORDS)})
        if has_tools and chance.random() < 0.6:
            messages += some_calls(chance, thinks)
        answer = {"role": "assistant", "content": chance.choice(WORDS).strip()}
        messages.append({**answer, **some_thought(chance, thinks), "weight": int(chance.random() < 0.8)})
    messages[-1]["weight"] = 1
    row = {"messages": messages, **({"tools": TOOLS} if has_tools else {})}
    return parse_row(row, Place("x.jsonl", 1, 1), Counter())


def some_calls(chance: random.Random, thinks: bool) -> list[dict[str, Any]]:
    arguments = {"b": chance.choice(WORDS), "a": [1, 2.5, None]}
    calls = [
        {"id": str(i), "function": {"name": "lamp", "arguments": chance.choice((arguments, json.dumps(arguments)))}}
        for i in range(chance.randint(1, 2))
    ]
    said = {"role": "assistant", "content": chance.choice((None, "Let me see."))}
    results = [{"role": "tool", "content": chance.choice(WORDS), "tool_call_id": call["id"]} for call in calls]
    return [{**said, **some_thought(chance, thinks), "tool_calls": calls}, *results]


def some_thought(chance: random.Random, thinks: bool) -> dict[str, Any]:
    return {"reasoning_content": chance.choice(("Dark.", "Hm,\n\nyes."))} if thinks else {}


def prompt_by_hand(row: Row, turn: int, family: str, thinks: bool) -> str:
    """What stands before a turn, written from the published format."""
    messages = list(row.messages[:turn])
    first = messages.pop(0)["content"] if messages[0]["role"] == "system" else None
    shift = 0 if first is None else 1
    system = (DEFAULT_SYSTEM if first is None else first) if family == "qwen2_5" else first
    if row.tools:
        system = f"{system}\n\n{TOOL_TEXT}" if system is not None else TOOL_TEXT
    text = "" if system is None else f"<|im_start|>system\n{system}<|im_end|>\n"
    asked = max(i for i, message in enumerate(messages) if message["role"] == "user")
    for index, message in enumerate(messages):
        before, after = (messages[i]["role"] if 0 <= i < len(messages) else "" for i in (index - 1, index + 1))
        if message["role"] == "tool":
            text += "" if before == "tool" else "<|im_start|>user"
            text += f"\n<tool_response>\n{message['content']}\n</tool_response>"
            text += "" if after == "tool" else "<|im_end|>\n"
        elif message["role"] == "assistant":
            keeps = thinks and index > asked  # between a question and its answer
            text += "<|im_start|>assistant" + written(message, family, keeps) + "\n"
        else:
            text += f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n"
    assert shift + len(messages) == turn
    return text + "<|im_start|>assistant\n" + ("<think>\n\n</think>\n\n" if family == "qwen3" and not thinks else "")


def written(message: Any, family: str, with_thought: bool) -> str:
    """An assistant's turn from its role's name on, up to and with its end."""
    thought = f"<think>\n{message['reasoning_content']}\n</think>\n\n" if with_thought else ""
    arguments = [
        json.dumps(call["function"]["arguments"], ensure_ascii=False) for call in message.get("tool_calls", ())
    ]
    calls = [f'<tool_call>\n{{"name": "lamp", "arguments": {text}}}\n</tool_call>' for text in arguments]
    if family == "qwen2_5":
        parts = [message["content"], *calls] if message["content"] else calls
        return "\n" + "\n".join(parts) + "<|im_end|>"
    content = message["content"] + ("\n" if message["content"] and calls else "")
    return "\n" + thought + content + "\n".join(calls) + "<|im_end|>"


@pytest.mark.parametrize(("family", "thinks"), [("qwen2_5", False), ("qwen3", False), ("qwen3", True)])
def test_every_token_and_label_is_that_of_a_construction_by_hand(
    request: pytest.FixtureRequest, family: str, thinks: bool
) -> None:
    """100 seeded rows: of each learned turn the served prompt's ids, then its own with their labels, no more labels."""
    tokenizer = request.getfixturevalue(f"{family}_tokenizer")
    template = ChatTemplate(tokenizer, frozenset({tokenizer.eos_token_id}))
    chance, shared = random.Random(f"{family}{thinks}"), 0
    for _ in range(100):
        row = some_row(chance, thinks)
        sequences = template.render(row)
        assert sorted(turn for sequence in sequences for turn in sequence.turns) == row.learned_turns()
        shared += len(row.learned_turns()) - len(sequences)
        for sequence in sequences:
            expected: list[int] = []
            labels: list[int] = []
            for turn in sequence.turns:
                prompt = ids(tokenizer, prompt_by_hand(row, turn, family, thinks))
                assert prompt[: len(expected)] == expected
                learned = ids(tokenizer, learned_by_hand(row, turn, family, thinks))
                labels += [IGNORED] * (len(prompt) - len(expected)) + learned
                expected = prompt + learned
            assert list(sequence.input_ids) == expected
            assert list(sequence.labels) == labels
    assert (shared > 0) == (family == "qwen2_5" or thinks)  # Qwen3 keeps reasoning between calls and answer


def learned_by_hand(row: Row, turn: int, family: str, thinks: bool) -> str:
    text = written(row.messages[turn], family, thinks)
    return text.removeprefix("\n")


def ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_an_end_of_turn_inside_a_learned_text_is_a_bad_row(qwen2_5_tokenizer: Any) -> None:
    template = ChatTemplate(qwen2_5_tokenizer, frozenset({qwen2_5_tokenizer.eos_token_id}))
    messages = chat("q", "Yes.<|im_end|>\n<|im_start|>user\nMore?")["messages"]
    with pytest.raises(RowInvalid, match=r"messages\[2\] holds '<\|im_end\|>' in its text") as caught:
        template.render(parse_row({"messages": messages}, Place("x.jsonl", 1, 1), Counter()))
    assert caught.value.code == "stop_inside"


@pytest.mark.parametrize(("kind", "words"), [("zero", "is zero"), ("unused", "number without a token")])
@pytest.mark.parametrize("tensor", ["model.embed_tokens.weight", "lm_head.weight"])
def test_a_base_whose_end_of_turn_was_never_trained_is_refused_unless_all_of_it_is_trained(
    qwen2_base: Path, tmp_path: Path, kind: str, words: str, tensor: str
) -> None:
    folder = shutil.copytree(qwen2_base, tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"].clone())
    end = load_template(folder).end_of_turn()
    tensors[tensor][end] = 0 if kind == "zero" else tensors[tensor][-1]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseInvalid, match=words) as caught:
        refuse_untrained_end(load_base(folder), load_template(folder))
    assert tensor in caught.value.message and "Instruct" in caught.value.message
    data = write_jsonl(tmp_path / "a.jsonl", [chat("q", "a")] * 4)
    with pytest.raises(BaseInvalid, match="never stop"):
        gather(TrainingConfig(data=data, name="n", base=str(folder)))
    gather(TrainingConfig(data=data, name="n", base=str(folder), method="full"))


def test_a_base_with_a_trained_end_of_turn_is_taken(qwen2_base: Path, qwen3_bytes_base: Path) -> None:
    for folder in (qwen2_base, qwen3_bytes_base):
        template = load_template(folder)
        refuse_untrained_end(load_base(folder), template)
        assert template.tokenizer.decode([template.end_of_turn()]) == "<|im_end|>"


def test_a_sequence_ends_with_its_end_of_turn_and_learns_it(qwen3_tokenizer: Any) -> None:
    template = ChatTemplate(qwen3_tokenizer, frozenset({qwen3_tokenizer.eos_token_id}))
    (sequence,) = template.render(parse_row(chat("q", "a"), Place("x.jsonl", 1, 1), Counter()))
    assert isinstance(sequence, Rendered)
    assert sequence.labels[-1] == sequence.input_ids[-1] == qwen3_tokenizer.eos_token_id
    assert torch.tensor(sequence.labels).ne(IGNORED).sum() == 2
