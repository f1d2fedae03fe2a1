"""Scores, times and the two ways to ask: by arithmetic, over real HTTP, and against the embedded base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from adapters.errors import ConfigInvalid, DataInvalid, EngineUnavailable, InvalidRequest
from server.cli.main import build_app
from training.evaluate import Answer, generate_http, latency, load_examples, local_folders, parse_object, score

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


def test_every_bad_line_of_a_data_file_is_named(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": RIGHT}]}
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    data.write_text(f'{json.dumps(row)}\n\n{{"messages": []}}\nno json\n')
    with pytest.raises(DataInvalid) as raised:
        load_examples(data)
    assert [problem.path for problem in raised.value.problems] == [f"{data}:3", f"{data}:4"]
    data.write_text(f"{json.dumps(row)}\n{json.dumps({**row, 'tools': [tool]})}\n")
    with pytest.raises(DataInvalid, match="1 of 2 rows"):
        load_examples(data)
    data.write_text(json.dumps(row))
    assert [(example.messages, example.expected) for example in load_examples(data)] == [
        ([{"role": "user", "content": "a"}], RIGHT)
    ]


def test_no_server_is_said_plainly_and_ends_with_its_exit_code(tmp_path: Path) -> None:
    with pytest.raises(EngineUnavailable, match="hotshoe serve"):
        generate_http("http://127.0.0.1:9", "m", [[{"role": "user", "content": "a"}]])


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid, match="neither"):
        local_folders(tmp_path, None)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigInvalid, match="--base"):
        local_folders(tmp_path, None)


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
