"""The four row forms: told apart by their columns, and the same conversation whichever way it is written."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

import pytest

from training.data.forms import parse_row
from training.data.jsontext import RowInvalid
from training.data.rows import Place, Row

HERE = Place("x.jsonl", 1, 1)
PARAMETERS = {"type": "object", "properties": {"room": {"type": "string"}}}
CALL = {"name": "lamp", "arguments": {"room": "hall"}}


def read(row: Any) -> Row:
    return parse_row(row, HERE, Counter())


def spoken(row: Row) -> list[tuple[str, str, int]]:
    pairs = zip(row.messages, row.weights, strict=True)
    return [(message["role"], message["content"], weight) for message, weight in pairs]


@pytest.mark.parametrize(
    ("row", "form"),
    [
        (
            {
                "messages": [
                    {"role": "system", "content": "s"},
                    {"role": "user", "content": "q\nr"},
                    {"role": "assistant", "content": "a"},
                ]
            },
            "chat",
        ),
        ({"prompt": "q\nr", "completion": "a", "system": "s"}, "prompt_completion"),
        ({"instruction": "q", "input": "r", "output": "a", "system": "s", "history": []}, "alpaca"),
        (
            {"system": "s", "conversations": [{"from": "human", "value": "q\nr"}, {"from": "gpt", "value": "a"}]},
            "sharegpt",
        ),
        (
            {
                "conversations": [
                    {"from": "system", "value": "s"},
                    {"role": "user", "content": "q\nr"},
                    {"role": "assistant", "content": "a"},
                ]
            },
            "sharegpt",
        ),
    ],
)
def test_one_conversation_is_the_same_however_it_is_written(row: dict[str, Any], form: str) -> None:
    made = read(row)
    assert made.form == form
    assert spoken(made) == [("system", "s", 0), ("user", "q\nr", 0), ("assistant", "a", 1)]


def test_alpaca_history_comes_first_and_its_answers_are_learned() -> None:
    row = read({"instruction": "q2", "input": "", "output": "a2", "history": [["q1", "a1"]]})
    assert spoken(row) == [("user", "q1", 0), ("assistant", "a1", 1), ("user", "q2", 0), ("assistant", "a2", 1)]


def test_alpaca_without_an_instruction_asks_its_input() -> None:
    assert spoken(read({"input": "q", "output": "a"})) == [("user", "q", 0), ("assistant", "a", 1)]


def test_of_prompt_and_completion_as_message_lists_only_the_completion_is_learned() -> None:
    prompt = [
        {"role": "user", "content": "q1"},
        {"role": "assistant", "content": "a1"},
        {"role": "user", "content": "q2"},
    ]
    completion = [{"role": "assistant", "content": "a2"}]
    assert [weight for *_, weight in spoken(read({"prompt": prompt, "completion": completion}))] == [0, 0, 0, 1]
    mixed = read({"prompt": prompt, "completion": "a2"})
    assert spoken(mixed)[-1] == ("assistant", "a2", 1)


def test_sharegpt_calls_and_observations_are_openai_tool_calls() -> None:
    turns = [
        ("human", "Is it on?"),
        ("function_call", json.dumps(CALL)),
        ("observation", "off"),
        ("function_call", "<think>\nAgain.\n</think>\n\n" + json.dumps([CALL, {**CALL, "arguments": "{}"}])),
        ("tool", "on"),
        ("gpt", "Yes."),
    ]
    function = {"name": "lamp", "parameters": PARAMETERS}
    row = read(
        {"conversations": [{"from": who, "value": text} for who, text in turns], "tools": json.dumps([function])}
    )
    assert [message["role"] for message in row.messages] == [
        "user",
        "assistant",
        "tool",
        "assistant",
        "tool",
        "assistant",
    ]
    assert row.weights == (0, 1, 0, 1, 0, 1)
    calls = row.messages[3]["tool_calls"]
    assert [call["function"]["arguments"] for call in calls] == [{"room": "hall"}, {}]
    assert row.messages[3]["content"].startswith("<think>")
    assert row.tools == ({"type": "function", "function": {**function, "description": None}},)


def test_the_older_function_call_is_a_tool_call_and_functions_are_tools() -> None:
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "function_call": {"name": "lamp", "arguments": '{"room": "hall"}'}},
        {"role": "function", "name": "lamp", "content": "off"},
        {"role": "assistant", "content": "No."},
    ]
    row = read({"messages": messages, "functions": [{"name": "lamp", "parameters": PARAMETERS}]})
    assert row.messages[1]["tool_calls"] == [{"type": "function", "function": CALL}]
    assert row.messages[2]["role"] == "tool"
    assert row.tools is not None and row.tools[0]["function"]["name"] == "lamp"


def test_settings_of_a_request_are_counted_and_not_obeyed() -> None:
    ignored: Counter[str] = Counter()
    answer = {"role": "assistant", "content": "a", "refusal": None}
    tool = {"type": "function", "function": {"name": "lamp", "parameters": PARAMETERS, "cost": 1}}
    row = {"messages": [{"role": "user", "content": "q"}, answer], "tools": [tool], "parallel_tool_calls": False}
    parse_row(row, HERE, ignored)
    assert ignored == {"parallel_tool_calls": 1, "messages[].refusal": 1, "tools[].function.cost": 1}


def test_a_null_weight_is_none_given() -> None:
    assert read(
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": None}]}
    ).weights == (0, 1)


SAID = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


@pytest.mark.parametrize(
    ("row", "code", "words"),
    [
        ({"prompt": "q", "completion": "a", "messages": []}, "form_ambiguous", "`messages` (chat messages) and `pro"),
        ({"prompt": "q", "output": "a"}, "form_ambiguous", "`prompt` (prompt/completion) and `output` (Alpaca)"),
        ({"text": "q"}, "row_invalid", "it has `text`"),
        ({}, "row_invalid", "it has none"),
        ({"prompt": "q"}, "empty_turn", "`completion` is missing"),
        ({"prompt": "", "completion": "a"}, "empty_turn", "`prompt` is empty"),
        ({"prompt": "q", "completion": 5}, "content_invalid", "`completion` is a JSON number"),
        ({"prompt": "q", "completion": []}, "row_invalid", "`completion` must be a list"),
        ({"instruction": "q", "output": " "}, "empty_turn", "`output` is empty"),
        ({"instruction": "", "input": "", "output": "a"}, "content_invalid", "both `instruction` and `input`"),
        ({"instruction": "q", "output": "a", "history": [["q"]]}, "row_invalid", "history[0]"),
        ({"instruction": "q", "output": "a", "history": 5}, "row_invalid", "`history` is a JSON number"),
        ({"conversations": []}, "row_invalid", "`conversations` must be a list"),
        ({"conversations": [{"from": "bot", "value": "q"}]}, "role_invalid", "conversations[0].from is 'bot'"),
        ({"conversations": [{"from": ["gpt"], "value": "q"}]}, "role_invalid", "conversations[0].from"),
        ({"conversations": [{"from": "gpt", "value": 5}]}, "content_invalid", "conversations[0].value"),
        ({"conversations": [{**SAID[0], "role": "user"}]}, "row_invalid", "from/value and role/content"),
        ({"conversations": [SAID[0]]}, "no_answer", "the user's"),
        ({"conversations": [SAID[0], {"from": "function_call", "value": "x()"}]}, "tool_calls_invalid", "is no call"),
        ({"conversations": [SAID[0], {"from": "function_call", "value": "[]"}]}, "tool_calls_invalid", "empty list"),
        ({"conversations": [{"from": "system", "value": "s"}, *SAID], "system": "s"}, "row_invalid", "both `system`"),
        ({"conversations": SAID, "tools": "{"}, "json_invalid", "not JSON"),
        ({"conversations": SAID, "tools": {"a": 1}}, "tools_invalid", "`tools` is a JSON object"),
        ({"prompt": "q", "completion": "a", "tools": [CALL], "functions": [CALL]}, "tools_invalid", "both"),
        ({"prompt": "q", "completion": "a", "tools": [{"name": "x", "parameters": ""}]}, "tools_invalid", "parameters"),
        ({"prompt": "half \ud83d", "completion": "a"}, "text_invalid", "surrogate"),
        ({"prompt": "q\0", "completion": "a"}, "text_invalid", "NUL"),
        ({"conversations": SAID, "tools": [{"name": "x", "parameters": {"y": math.nan}}]}, "row_invalid", "has not"),
    ],
)  # fmt: skip
def test_a_wrong_row_names_what_is_wrong_by_the_columns_that_were_written(row: Any, code: str, words: str) -> None:
    with pytest.raises(RowInvalid) as caught:
        read(row)
    assert (caught.value.code, words in caught.value.message) == (code, True), caught.value.message
