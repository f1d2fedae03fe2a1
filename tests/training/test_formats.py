"""Reading chat files: every bad row at once, with its line; what is not obeyed is counted."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import DataInvalid
from tests.training.conftest import chat, write_jsonl
from training.data.formats import read_data
from training.data.forms import parse_row
from training.data.jsontext import RowInvalid
from training.data.rows import Place

HERE = Place("x.jsonl", 1, 1)
CALL = {"id": "c1", "type": "function", "function": {"name": "lamp", "arguments": '{"on": true}'}}


def conversation(*messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": list(messages), **more}


def said(role: str, content: Any = "x", **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def test_every_bad_row_is_reported_at_once_with_file_line_and_reason(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "bad.jsonl",
        [
            chat("a", "b"),
            "{not json",
            {"question": "a", "answer": "b"},
            "",
            conversation(said("user"), said("robot")),
            conversation(said("user")),
            '{"messages": [], "messages": []}',
            chat("c", "d"),
        ],
    )
    with pytest.raises(DataInvalid) as caught:
        read_data(path)
    assert "5 of 7 rows" in caught.value.message
    found = {problem.path: problem.code for problem in caught.value.problems}
    assert found == {
        f"{path}:2": "json_invalid",
        f"{path}:3": "row_invalid",
        f"{path}:5": "role_invalid",
        f"{path}:6": "no_answer",
        f"{path}:7": "duplicate_key",
    }
    assert "`question`" in next(p.message for p in caught.value.problems if p.path.endswith(":3"))


@pytest.mark.parametrize(
    ("row", "code"),
    [
        (["not an object"], "row_invalid"),
        ({"messages": "text"}, "json_invalid"),
        ({"messages": 5}, "row_invalid"),
        (conversation("text"), "row_invalid"),  # type: ignore[arg-type]
        (conversation(said("user", None), said("assistant")), "content_invalid"),
        (conversation(said("user", 5), said("assistant")), "content_invalid"),
        (conversation(said("user", [{"type": "image_url"}]), said("assistant")), "content_invalid"),
        (conversation(said("user"), said("assistant", " ")), "empty_turn"),
        (conversation(said("user"), said("assistant", weight=2)), "weight_invalid"),
        (conversation(said("user"), said("assistant", weight=True)), "weight_invalid"),
        (conversation(said("user", weight=1), said("assistant")), "weight_invalid"),
        (conversation(said("user"), said("assistant", weight=0)), "nothing_supervised"),
        (conversation(said("user"), said("assistant"), tools=[{"function": "lamp"}]), "tools_invalid"),
        (conversation(said("user", function_call=CALL["function"]), said("assistant")), "tool_calls_invalid"),
        (conversation(said("user"), said("assistant", function_call={"arguments": "{}"})), "tool_calls_invalid"),
        (
            conversation(
                said("user"), said("assistant", None, tool_calls=[{"function": {"name": "a", "arguments": "{"}}])
            ),
            "tool_calls_invalid",
        ),
    ],
)
def test_a_wrong_row_has_its_code(row: Any, code: str) -> None:
    with pytest.raises(RowInvalid) as caught:
        parse_row(row, HERE, Counter())
    assert caught.value.code == code


def test_tool_arguments_given_as_text_become_objects_and_null_content_becomes_empty() -> None:
    row = parse_row(conversation(said("user"), said("assistant", None, tool_calls=[CALL])), HERE, Counter())
    answer = row.messages[1]
    assert answer["content"] == ""
    assert answer["tool_calls"][0]["function"]["arguments"] == {"on": True}


def test_text_parts_are_joined_as_the_engine_joins_them() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    row = parse_row(conversation(said("user", parts), said("assistant")), HERE, Counter())
    assert row.messages[0]["content"] == "a\nb"


def test_keys_without_a_meaning_are_counted_by_name(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "more.jsonl", [{**chat("a", "b"), "id": 1}, {**chat("c", "d"), "id": 2}])
    assert read_data(path).ignored_keys == {"id": 2}


def test_the_same_bytes_have_the_same_digest_and_others_another(tmp_path: Path) -> None:
    one, two = (write_jsonl(tmp_path / f"{name}.jsonl", [chat("a", name)]) for name in "ab")
    assert read_data(one).digest == read_data(one).digest != read_data(two).digest


def test_not_utf8_no_rows_a_folder_and_no_file_are_clear_errors(tmp_path: Path) -> None:
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes('{"messages": "é"}'.encode("latin-1"))
    with pytest.raises(DataInvalid) as caught:
        read_data(latin)
    assert caught.value.problems[0].code == "not_utf8"
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "nothing").mkdir()
    absent = ((tmp_path / "empty.jsonl", "no rows"), (tmp_path / "nothing", "folder"), (tmp_path / "none", "not exist"))
    for path, words in absent:
        with pytest.raises(DataInvalid, match=words):
            read_data(path)


def test_deep_nesting_is_a_bad_row_and_no_crash(tmp_path: Path) -> None:
    path = tmp_path / "deep.jsonl"
    path.write_text("[" * 200_000 + "\n")
    with pytest.raises(DataInvalid) as caught:
        read_data(path)
    assert caught.value.problems[0].code == "json_invalid"
