"""Rendering with the real Qwen2.5 and Qwen3 templates, and the label mask, token by token."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import BaseInvalid
from tests.fixtures.bases import qwen_tokenizer
from tests.training.conftest import write_jsonl
from training.data.forms import parse_row
from training.data.jsontext import RowInvalid
from training.data.rows import Place, Row
from training.data.template import IGNORED, ChatTemplate, Rendered
from training.evaluate import load_examples

SYSTEM, USER = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Is the lamp on?"}
TOOL = {"type": "function", "function": {"name": "lamp", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "lamp", "arguments": '{"room": "hall"}'}}


def template(tokenizer: Any, thinking: bool | None = None) -> ChatTemplate:
    return ChatTemplate(tokenizer, frozenset({tokenizer.eos_token_id}), thinking)


def row(*messages: dict[str, Any], **more: Any) -> Row:
    return parse_row({"messages": list(messages), **more}, Place("x.jsonl", 1, 1), Counter())


def says(content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def pieces(tokenizer: Any, sequence: Rendered) -> list[tuple[bool, str]]:
    """The sequence as runs of text, each learned or not."""
    runs: list[tuple[bool, list[int]]] = []
    for token, label in zip(sequence.input_ids, sequence.labels, strict=True):
        assert label in (IGNORED, token)
        if not runs or runs[-1][0] != (label != IGNORED):
            runs.append((label != IGNORED, []))
        runs[-1][1].append(token)
    return [(is_learned, tokenizer.decode(tokens)) for is_learned, tokens in runs]


def test_the_answer_and_its_end_of_turn_are_learned_and_nothing_else_token_by_token(qwen2_5_tokenizer: Any) -> None:
    (sequence,) = template(qwen2_5_tokenizer).render(row(SYSTEM, USER, says("No.")))
    shown = [
        (qwen2_5_tokenizer.decode([token]), label != IGNORED)
        for token, label in zip(sequence.input_ids, sequence.labels, strict=True)
    ]
    prompt = ["<|im_start|>", "system", "\n", "Be", " brief", ".", "<|im_end|>", "\n"]
    prompt += ["<|im_start|>", "user", "\n", "Is", " the", " lamp", " on", "?", "<|im_end|>", "\n"]
    prompt += ["<|im_start|>", "assistant", "\n"]
    assert shown == [(text, False) for text in prompt] + [("No", True), (".", True), ("<|im_end|>", True)]


@pytest.mark.parametrize("family", ["qwen2_5", "qwen3"])
@pytest.mark.parametrize("thinking", [None, True, False])
def test_what_comes_before_the_labels_is_the_engines_prompt_id_for_id(family: Any, thinking: bool | None) -> None:
    tokenizer = qwen_tokenizer(family, "bytes")
    chosen = template(tokenizer, thinking)
    (sequence,) = chosen.render(row(SYSTEM, USER, says("No.")))
    switch = {} if family == "qwen2_5" else {"enable_thinking": bool(thinking)}
    prompt = tokenizer.apply_chat_template(
        [SYSTEM, USER], add_generation_prompt=True, tokenize=True, return_dict=False, **switch
    )
    first = next(i for i, label in enumerate(sequence.labels) if label != IGNORED)
    assert list(sequence.input_ids[:first]) == list(prompt)


def test_without_thinking_the_empty_block_that_serving_injects_is_not_learned(qwen3_tokenizer: Any) -> None:
    (sequence,) = template(qwen3_tokenizer).render(row(USER, says("No.")))
    assert pieces(qwen3_tokenizer, sequence) == [
        (False, "<|im_start|>user\nIs the lamp on?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"),
        (True, "No.<|im_end|>"),
    ]


@pytest.mark.parametrize(
    "answer", [says("No.", reasoning_content="It is dark."), says("<think>\nIt is dark.\n</think>\n\nNo.")]
)
def test_reasoning_is_learned_with_its_think_block(qwen3_tokenizer: Any, answer: dict[str, Any]) -> None:
    (sequence,) = template(qwen3_tokenizer).render(row(USER, answer))
    assert pieces(qwen3_tokenizer, sequence) == [
        (False, "<|im_start|>user\nIs the lamp on?<|im_end|>\n<|im_start|>assistant\n"),
        (True, "<think>\nIt is dark.\n</think>\n\nNo.<|im_end|>"),
    ]


@pytest.mark.parametrize("answer", [says("<think>\n\n</think>\n\nNo."), says("No.", reasoning_content="\n")])
def test_an_empty_block_in_the_data_is_an_answer_without_thinking(qwen3_tokenizer: Any, answer: dict[str, Any]) -> None:
    (sequence,) = template(qwen3_tokenizer).render(row(USER, answer))
    assert pieces(qwen3_tokenizer, sequence)[-1] == (True, "No.<|im_end|>")
    assert pieces(qwen3_tokenizer, sequence)[0][1].endswith("<think>\n\n</think>\n\n")


def test_with_thinking_forced_on_the_empty_block_is_learned_because_serving_injects_none(qwen3_tokenizer: Any) -> None:
    (sequence,) = template(qwen3_tokenizer, thinking=True).render(row(USER, says("No.")))
    assert pieces(qwen3_tokenizer, sequence)[-1] == (True, "<think>\n\n</think>\n\nNo.<|im_end|>")


def test_turns_share_one_rendering_where_history_renders_the_same(qwen2_5_tokenizer: Any) -> None:
    sequences = template(qwen2_5_tokenizer).render(row(SYSTEM, USER, says("No."), USER, says("Yes.")))
    assert [sequence.turns for sequence in sequences] == [(2, 4)]
    learned = [text for is_learned, text in pieces(qwen2_5_tokenizer, sequences[0]) if is_learned]
    assert learned == ["No.<|im_end|>", "Yes.<|im_end|>"]


def test_a_turn_whose_history_drops_thinking_gets_a_rendering_of_its_own(qwen3_tokenizer: Any) -> None:
    first, second = says("No.", reasoning_content="It is dark."), says("Yes.", reasoning_content="It is bright.")
    sequences = template(qwen3_tokenizer).render(row(USER, first, USER, second))
    assert [sequence.turns for sequence in sequences] == [(1,), (3,)]
    assert "dark" in qwen3_tokenizer.decode(sequences[0].input_ids)
    later = pieces(qwen3_tokenizer, sequences[1])
    assert later[-1] == (True, "<think>\nIt is bright.\n</think>\n\nYes.<|im_end|>")
    assert "dark" not in later[0][1] and "No.<|im_end|>" in later[0][1]


def test_tools_and_calls_render_as_the_template_writes_them_and_only_the_models_part_is_learned(
    qwen2_5_tokenizer: Any, qwen3_tokenizer: Any
) -> None:
    result = {"role": "tool", "content": '{"on": false}', "tool_call_id": "c1"}
    called = row(USER, says(None, tool_calls=[CALL]), result, says("No."), tools=[TOOL])
    for tokenizer in (qwen2_5_tokenizer, qwen3_tokenizer):
        learned, context = [], ""
        for sequence in template(tokenizer).render(called):
            learned += [text for is_learned, text in pieces(tokenizer, sequence) if is_learned]
            context += tokenizer.decode(sequence.input_ids)
        call = '<tool_call>\n{"name": "lamp", "arguments": {"room": "hall"}}\n</tool_call><|im_end|>'
        assert [text.strip() for text in learned] == [call, "No.<|im_end|>"]
        assert '{"name": "lamp", "description": null, "parameters"' in context  # as the engine declares the tool
        assert "<tool_response>" in context


def test_what_an_evaluation_asks_and_expects_is_the_row_as_it_is_trained(
    tmp_path: Path, qwen2_5_tokenizer: Any, qwen3_tokenizer: Any
) -> None:
    result = {"role": "tool", "content": '{"on": false}', "tool_call_id": "c1"}
    rows = [
        {"messages": [SYSTEM, USER, says(None, tool_calls=[CALL])], "tools": [TOOL]},
        {"messages": [USER, says("I look.", tool_calls=[CALL]), result, says("No.")], "tools": [TOOL]},
        {"messages": [USER, says("<think>\nIt is dark.\n</think>\n\nNo.")]},
        {"messages": [USER, says("No.")]},
    ]
    for tokenizer in (qwen2_5_tokenizer, qwen3_tokenizer):
        rendering = template(tokenizer)
        for example in load_examples(write_jsonl(tmp_path / "rows.jsonl", rows)):
            asked = rendering.prompt_ids(example.prompt.messages, example.prompt.tools, example.prompt.thinking)
            trained = rendering.render(example.row)[-1].input_ids
            assert list(trained[: len(asked)]) == asked
            assert tokenizer.decode(trained[len(asked) :]) == example.expected + "<|im_end|>"


def test_a_turn_of_weight_0_is_context_only(qwen2_5_tokenizer: Any) -> None:
    (sequence,) = template(qwen2_5_tokenizer).render(row(USER, says("Nope.", weight=0), USER, says("Yes.")))
    assert [text for is_learned, text in pieces(qwen2_5_tokenizer, sequence) if is_learned] == ["Yes.<|im_end|>"]
    assert "Nope." in qwen2_5_tokenizer.decode(sequence.input_ids)


def test_only_the_last_turn_is_learned_when_asked(qwen2_5_tokenizer: Any) -> None:
    (sequence,) = template(qwen2_5_tokenizer).render(row(USER, says("No."), USER, says("Yes.")), "last")
    assert [text for is_learned, text in pieces(qwen2_5_tokenizer, sequence) if is_learned] == ["Yes.<|im_end|>"]


def test_the_end_of_turn_is_learned_even_where_the_base_pads_with_it() -> None:
    tokenizer = qwen_tokenizer("qwen2_5", "bytes")
    tokenizer.pad_token = "<|im_end|>"
    (sequence,) = template(tokenizer).render(row(USER, says("No.")))
    assert sequence.labels[-1] == tokenizer.eos_token_id == tokenizer.pad_token_id


def test_a_tokenizer_without_a_template_is_refused_with_what_to_do() -> None:
    tokenizer = qwen_tokenizer("qwen2_5", "bytes")
    tokenizer.chat_template = None
    with pytest.raises(BaseInvalid, match="no chat template"):
        template(tokenizer)


def test_a_template_whose_end_of_turn_does_not_stop_the_base_is_refused() -> None:
    tokenizer = qwen_tokenizer("qwen2_5", "bytes")
    base_model = ChatTemplate(tokenizer, frozenset({tokenizer.convert_tokens_to_ids("<|endoftext|>")}))
    with pytest.raises(BaseInvalid, match="would never stop"):
        base_model.render(row(USER, says("No.")))


def test_a_template_that_ends_a_turn_with_no_special_token_is_refused() -> None:
    tokenizer = qwen_tokenizer("qwen2_5", "bytes")
    turns = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    tokenizer.chat_template = turns + "{% if add_generation_prompt %}assistant: {% endif %}"
    with pytest.raises(BaseInvalid, match="special token"):
        template(tokenizer).render(row(USER, says("No.")))


def test_a_row_on_which_the_template_fails_is_a_bad_row() -> None:
    tokenizer = qwen_tokenizer("qwen2_5", "bytes")
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(RowInvalid, match="roles must alternate"):
        template(tokenizer).render(row(USER, says("No.")))


@pytest.mark.parametrize("family", ["qwen2_5", "qwen3"])
def test_rows_rendered_together_are_each_as_it_is_alone(family: str) -> None:
    made = template(qwen_tokenizer(family))
    thought = says("<think>It is.</think>Yes.")
    rows = [
        row(SYSTEM, USER, says("Yes.")),
        row(USER, thought, USER, says("Ja, đèn đang bật.")),
        row(USER, says(None, tool_calls=[CALL]), tools=[TOOL]),
        row(USER, says(f"It ends {made.tokenizer.eos_token} here.")),
        row(USER, says("Yes."), USER, says("No.")),
    ] * 120
    together = list(made.render_all(rows))
    assert len(together) == len(rows)
    for one, sequences in zip(rows[:5], together[-5:], strict=True):
        if isinstance(sequences, RowInvalid):
            with pytest.raises(RowInvalid) as raised:
                made.render(one)
            assert (raised.value.code, raised.value.message) == (sequences.code, sequences.message)
        else:
            assert sequences == made.render(one)
    assert [isinstance(sequences, RowInvalid) for sequences in together[:5]] == [False, False, False, True, False]


def test_the_digest_changes_with_the_template() -> None:
    one, other = qwen_tokenizer("qwen2_5", "bytes"), qwen_tokenizer("qwen3", "bytes")
    assert template(one).digest.startswith("sha256:")
    assert template(one).digest != template(other).digest
