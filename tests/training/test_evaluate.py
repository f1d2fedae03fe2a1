"""Scores, times and the two ways to ask: by arithmetic, over real HTTP, and against the embedded base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from adapters.errors import DataInvalid, EngineUnavailable, InvalidRequest
from server.cli.main import build_app
from training.evaluate import Answer, generate_http, latency, load_examples
from training.scores import label_of, parse_answer, parse_object, score, telling_scores, written

RIGHT = '{"intent": "TurnOn", "area": "kitchen", "level": 10}'


def test_the_right_answer_scores_one_everywhere_in_any_order_of_keys() -> None:
    assert score([RIGHT], ['{"level": 10, "intent": "TurnOn", "area": "kitchen"}']).as_dict() == {
        "n": 1,
        "exact_match": 1.0,
        "json_valid": 1.0,
        "label_accuracy": 1.0,
        "field_f1": 1.0,
    }


def test_fields_count_apart_from_the_label_and_by_value_and_type() -> None:
    answers = ['{"intent": "TurnOff", "area": "kitchen", "level": "10"}', "Sure! " + RIGHT]
    scores = score([RIGHT, RIGHT], answers)
    assert (scores.exact_match, scores.json_valid, scores.label_accuracy) == (0.0, 0.5, 0.0)
    assert scores.field_f1 == pytest.approx(2 * 1 / (4 + 2))  # one of two given fields is right; four were wanted


def test_a_label_that_is_missing_on_both_sides_and_no_fields_at_all_are_no_mistakes() -> None:
    assert score(['{"intent": "Pause"}'], ['{"intent": "Pause"}']).field_f1 == 1.0
    assert score(['{"intent": "Pause"}'], ["[]"]).label_accuracy == 0.0


def test_text_is_compared_as_text_without_reasoning_and_the_space_around_it() -> None:
    answers = ["<think>\nhm\n</think>\n\nIt is dark.", "It is  dark.", "It is dark.\n"]
    assert score(["It is dark."] * 3, answers).exact_match == pytest.approx(2 / 3)
    assert telling_scores(["It is dark."] * 3, answers) == {"rows": 3, "exact_match": pytest.approx(2 / 3)}


def test_the_label_is_the_first_text_field_that_rows_share_and_only_telling_scores_are_given() -> None:
    expected = [f'{{"id": {i}, "note": "n{i}", "intent": "{"on" if i % 2 else "off"}"}}' for i in range(8)]
    assert label_of(expected) == "intent"
    assert label_of([*expected, "no object"]) is None
    scores = telling_scores(expected, expected[:4] + ["{}"] * 4)
    assert scores == {
        "rows": 8,
        "exact_match": 0.5,
        "json_valid": 1.0,
        "label": "intent",
        "label_accuracy": 0.5,
        "field_f1": pytest.approx(2 * 8 / (16 + 8)),
    }
    assert telling_scores(['{"intent": "on"}'], ['{"intent": "on"}']).keys() == {
        *("rows", "exact_match", "json_valid", "label", "label_accuracy"),
    }


def test_a_tool_call_is_scored_by_its_name_and_its_arguments_however_it_came() -> None:
    call = {"function": {"name": "weather", "arguments": {"city": "Huế", "days": 2}}}
    streamed = {"function": {"name": "weather", "arguments": '{"days": 3, "city": "Huế"}'}}
    right, wrong = written("", [call]), written("Let me look.", [streamed])
    assert parse_answer(right) == {"name": "weather", "arguments.city": "Huế", "arguments.days": 2}
    assert parse_answer(written("", [call, call])) is not None
    assert parse_answer("<tool_call>{]</tool_call>") is None
    scores = telling_scores([right, right], [right, wrong])
    assert (scores["label"], scores["label_accuracy"], scores["exact_match"]) == ("name", 1.0, 0.5)
    assert scores["field_f1"] == pytest.approx(3 / 4)


def test_unequal_lengths_and_empty_lists_cannot_be_scored() -> None:
    for expected, answers in (([RIGHT], []), ([], [])):
        with pytest.raises(InvalidRequest):
            score(expected, answers)


@pytest.mark.parametrize("text", ["", "null", "[1]", "{", '{"a": 1} and more', "[" * 100_000])
def test_what_is_not_one_json_object_is_none(text: str) -> None:
    assert parse_object(text) is None


def test_latency_is_the_median_and_the_95th_percentile_and_single_tokens_have_no_tpot() -> None:
    answers = [Answer("x", "m", "stop", 5, second / 100, second / 1000) for second in range(1, 102)]
    answers.append(Answer("x", "m", "stop", 1, 0.51, None))
    times = latency(answers)
    assert times.ttft_p50_seconds == pytest.approx(0.51)
    assert times.tpot_p50_seconds == pytest.approx(0.051)
    assert times.tpot_p95_seconds == pytest.approx(0.096)


def test_the_last_learned_turn_is_expected_with_all_before_it_and_the_tools_given(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
    turns = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "weather", "arguments": "{}"}}]},
        {"role": "tool", "content": "rain"},
        {"role": "assistant", "content": "Rain.", "reasoning_content": "The tool says so."},
    ]
    data = tmp_path / "data.jsonl"
    rows = [{"messages": turns, "tools": [tool]}, {"messages": turns[:2], "tools": [tool]}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    answered, called = load_examples(data)
    assert ([message["role"] for message in answered.messages], answered.expected) == (
        ["user", "assistant", "tool"],
        "Rain.",
    )
    assert (answered.prompt.thinking, called.prompt.thinking) == (True, False)
    assert called.expected == '<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call>'
    assert answered.prompt.tools is not None


def test_a_row_with_an_empty_think_block_is_asked_without_thinking_as_it_was_trained(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    turns = ("<think>\n\n</think>\n\nyes", "<think>\nIt is.\n</think>\n\nyes", "yes")
    rows = [{"messages": [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": t}]} for t in turns]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [example.prompt.thinking for example in load_examples(data)] == [False, True, False]


def test_every_bad_line_of_a_data_file_is_named(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": RIGHT}]}
    data.write_text(f'{json.dumps(row)}\n\n{{"messages": []}}\nno json\n')
    with pytest.raises(DataInvalid) as raised:
        load_examples(data)
    assert [problem.path for problem in raised.value.problems] == [f"{data}:3", f"{data}:4"]


def test_no_server_is_said_plainly_and_ends_with_its_exit_code(tmp_path: Path) -> None:
    with pytest.raises(EngineUnavailable, match="hotshoe serve"):
        generate_http("http://127.0.0.1:9", "m", [[{"role": "user", "content": "a"}]])


def test_eval_of_a_file_that_is_not_there_says_so() -> None:
    result = CliRunner().invoke(build_app(), ["eval", "nothing.jsonl", "--model", "m"])
    assert isinstance(result.exception, DataInvalid)
    assert "does not exist" in result.exception.message


@pytest.mark.model
def test_batched_greedy_answers_are_those_of_one_prompt_at_a_time() -> None:
    from adapters.embedded import default_base
    from training.evaluate import generate_local

    prompts = [
        [{"role": "user", "content": text}] for text in ("Say hi.", "What is the capital of France? One word.", "1+1")
    ]
    base = default_base()
    together = generate_local(base, None, prompts, max_new_tokens=12)
    alone = [generate_local(base, None, [prompt], max_new_tokens=12)[0] for prompt in prompts]
    assert together == alone
    assert "Paris" in together[1]
