"""Data files of every format, alone and in a folder, good, broken and hostile."""

from __future__ import annotations

import csv
import json
import os
import random
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from adapters.errors import DataInvalid
from tests.training.conftest import chat, write_jsonl
from training.data import formats, jsonfiles
from training.data.dataset import hold_out
from training.data.formats import DataFile, read_data

PAIRS = [(f"Question {i}?", f'Answer {i},\nwith "quotes" and ưở 😀') for i in range(5)]


def pairs(file: DataFile) -> list[tuple[str, str]]:
    return [(row.messages[-2]["content"], row.messages[-1]["content"]) for row in file.rows]


def write_csv(path: Path, rows: list[list[str]], *, encoding: str = "utf-8", **dialect: Any) -> Path:
    with path.open("w", encoding=encoding, newline="") as file:
        csv.writer(file, **dialect).writerows(rows)
    return path


def write_parquet(path: Path, columns: dict[str, Any]) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def refused(path: Path) -> dict[str, tuple[str, str]]:
    """The problems of data that is refused: place to code and message."""
    with pytest.raises(DataInvalid) as caught:
        read_data(path)
    return {problem.path: (problem.code, problem.message) for problem in caught.value.problems}


def test_every_format_gives_the_same_rows_and_says_what_it_is(tmp_path: Path) -> None:
    table = [{"prompt": prompt, "completion": completion} for prompt, completion in PAIRS]
    lists = {"prompt": [prompt for prompt, _ in PAIRS], "completion": [completion for _, completion in PAIRS]}
    cells = [["Prompt", " Completion "], *map(list, PAIRS)]
    (tmp_path / "list.json").write_text(json.dumps(table))
    (tmp_path / "object.json").write_text(json.dumps({"version": {"a": [1]}, "data": table}, indent=1))
    (tmp_path / "lines.json").write_text("\n".join(map(json.dumps, table)))
    (tmp_path / "lines").write_text("\n".join(map(json.dumps, table)))
    written = {
        write_jsonl(tmp_path / "a.jsonl", table): "JSON Lines",
        tmp_path / "list.json": "JSON",
        tmp_path / "object.json": "JSON",
        tmp_path / "lines.json": "JSON Lines",
        tmp_path / "lines": "JSON Lines",
        write_csv(tmp_path / "a.csv", cells): "CSV",
        write_csv(tmp_path / "mark.csv", cells, encoding="utf-8-sig"): "CSV",
        write_csv(tmp_path / "a.tsv", cells, delimiter="\t"): "CSV",
        write_csv(tmp_path / "semicolon.csv", cells, delimiter=";"): "CSV",
        write_parquet(tmp_path / "a.parquet", lists): "Parquet",
    }
    for path, name in written.items():
        file = read_data(path)
        assert pairs(file) == PAIRS, path
        assert file.description == f"{name}, prompt/completion", path
        assert (file.sources[0].rows, file.sources[0].forms) == (5, {"prompt_completion": 5})


def test_a_row_is_found_by_its_line_and_number(tmp_path: Path) -> None:
    table = [{"prompt": "q", "completion": "a\nb"}] * 3
    (tmp_path / "a.json").write_text(json.dumps(table, indent=1))
    places = {
        write_csv(tmp_path / "a.csv", [["prompt", "completion"], *[["q", "a\nb"]] * 3]): [2, 4, 6],
        tmp_path / "a.json": [2, 6, 10],
        write_parquet(tmp_path / "a.parquet", {"prompt": ["q"] * 3, "completion": ["a"] * 3}): [1, 2, 3],
    }
    for path, lines in places.items():
        assert [(row.place.line, row.place.number) for row in read_data(path).rows] == list(
            zip(lines, (1, 2, 3), strict=True)
        )


def test_all_bad_rows_of_a_table_are_reported_by_line_and_row(tmp_path: Path) -> None:
    rows = [["prompt", "completion"], ["q", "a\nb"], ["q", ""], ["q"], ["\0", "a"]]
    assert refused(write_csv(tmp_path / "a.csv", rows)) == {
        f"{tmp_path / 'a.csv'}:4": ("empty_turn", "row 2: `completion` is empty."),
        f"{tmp_path / 'a.csv'}:5": ("csv_invalid", "row 3: 1 fields; the header has 2."),
        f"{tmp_path / 'a.csv'}:6": ("text_invalid", "row 4: its text holds a NUL character."),
    }
    path = write_parquet(tmp_path / "a.parquet", {"prompt": ["q", None], "completion": ["a", "b"]})
    assert refused(path) == {f"{path}:2": ("empty_turn", "row 2 (index 1): `prompt` is empty.")}
    path = tmp_path / "a.json"
    path.write_text('[{"prompt": "q",\n "completion": "a"},\n {"prompt": "q", "prompt": "r"},\n 5]')
    assert {place: code for place, (code, _) in refused(path).items()} == {
        f"{path}:3": "duplicate_key",
        f"{path}:4": "row_invalid",
    }


def test_columns_of_two_forms_are_one_error_for_the_table_that_names_both(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", [["prompt", "completion", "instruction"], *[["q", "a", "i"]] * 9])
    ((code, message),) = refused(path).values()
    assert code == "form_ambiguous" and "`prompt`, `completion`" in message and "`instruction`" in message
    path = write_parquet(tmp_path / "a.parquet", {"conversations": ["[]"] * 9, "messages": ["[]"] * 9})
    ((code, message),) = refused(path).values()
    assert code == "form_ambiguous" and "`conversations`" in message and "`messages`" in message


def test_conversations_are_json_text_in_csv_and_structs_in_parquet(tmp_path: Path) -> None:
    messages = chat("q", "a")["messages"]
    tools = [{"type": "function", "function": {"name": "lamp", "parameters": {"type": "object"}}}]
    said = json.dumps(messages)
    text = write_csv(tmp_path / "a.csv", [["messages", "tools"], [said, json.dumps(tools)], [said, ""]])
    calls = [{"id": "1", "function": {"name": "lamp", "arguments": "{}"}}]
    called = [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": calls}]
    structs = write_parquet(tmp_path / "a.parquet", {"messages": [messages, called]})
    assert [row.tools is None for row in read_data(text).rows] == [False, True]
    assert read_data(text).rows[0].messages == tuple(messages)
    first, second = read_data(structs).rows
    assert first.messages == tuple(messages)  # Parquet fills in the keys of other rows with nulls
    assert second.messages[1]["tool_calls"][0]["function"] == {"name": "lamp", "arguments": {}}


def test_other_columns_are_counted_and_not_read(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"prompt": ["q", "q"], "completion": ["a", "a"], "id": [1, 2]})
    assert read_data(path).ignored_keys == {"id": 2}
    path = write_csv(tmp_path / "a.csv", [["prompt", "completion", "id"], ["q", "a", "1"]])
    assert read_data(path).ignored_keys == {"id": 1}


def test_one_bad_text_in_parquet_spares_the_other_rows(tmp_path: Path) -> None:
    column = pyarrow.array([b"q", b"\xff"], pyarrow.binary()).cast(pyarrow.string(), safe=False)
    path = write_parquet(tmp_path / "a.parquet", {"prompt": column, "completion": ["a", "a"]})
    assert refused(path) == {f"{path}:2": ("not_utf8", "row 2 (index 1): its text is not UTF-8.")}
    path = write_parquet(tmp_path / "b.parquet", {"prompt": [b"q"], "completion": ["a"]})
    assert [code for code, _ in refused(path).values()] == ["content_invalid"]


def test_a_folder_is_read_in_order_of_names_and_mixed_forms_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (folder / "more").mkdir(parents=True)
    write_csv(folder / "b.csv", [["instruction", "output"], ["b", "b"]])
    write_jsonl(folder / "a.jsonl", [chat("a", "a"), {"prompt": "a2", "completion": "a2"}])
    write_parquet(folder / "more" / "c.parquet", {"prompt": ["c"], "completion": ["c"]})
    (folder / "README.md").write_text("about")
    (folder / ".hidden.jsonl").write_text("{")
    (folder / "loop").symlink_to(folder)
    file = read_data(folder)
    assert [prompt for prompt, _ in pairs(file)] == ["a", "a2", "b", "c"]
    assert [str(row.place) for row in file.rows] == ["a.jsonl:1", "a.jsonl:2", "b.csv:2", "more/c.parquet:1"]
    assert file.where(file.rows[3]) == f"{folder}/more/c.parquet:1"
    assert file.description == (
        "a.jsonl: JSON Lines, mixed: 1 chat messages, 1 prompt/completion; b.csv: CSV, Alpaca; "
        "more/c.parquet: Parquet, prompt/completion"
    )
    assert file.left_aside == ("README.md", "loop")
    before = file.digest
    (folder / "b.csv").rename(folder / "z.csv")
    assert read_data(folder).digest != before


def test_rows_of_several_files_with_equal_lines_are_held_out_one_by_one(tmp_path: Path) -> None:
    for name in "ab":
        write_jsonl(tmp_path / f"{name}.jsonl", [chat(f"{name}{i}", "x") for i in range(50)])
    rows = read_data(tmp_path).rows
    kept, held = hold_out(rows, 10, seed=3)
    assert (len(kept), len(held)) == (90, 10)
    assert {str(row.place) for row in kept}.isdisjoint(str(row.place) for row in held)


def test_problems_of_all_files_of_a_folder_are_reported_at_once(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["{", chat("a", "b")])
    (tmp_path / "b.json").write_text('[{"prompt": "q", "completion": "a"}, {"prompt"')
    (tmp_path / "c.csv").write_text('prompt,completion\nq,a\n"q,a\n')
    (tmp_path / "d.jsonl").write_text("")
    (tmp_path / "e.jsonl.gz").write_bytes(b"\x1f\x8b\x08")
    (tmp_path / "f.parquet").write_bytes(b"PAR1" + b"\0" * 40)
    found = {Path(place).name: code for place, (code, _) in refused(tmp_path).items()}
    assert found == {
        "a.jsonl:1": "json_invalid",
        "b.json:1": "json_invalid",
        "c.csv:3": "csv_invalid",
        "d.jsonl:1": "no_rows",
        "e.jsonl.gz:1": "format_invalid",
        "f.parquet:1": "format_invalid",
    }


@pytest.mark.parametrize(
    ("name", "content", "code", "words"),
    [
        ("a.jsonl", b"\x1f\x8b\x08", "format_invalid", "gzip"),
        ("a.csv", b"PK\x03\x04", "format_invalid", "Excel"),
        ("a.parquet", b"prompt,completion", "format_invalid", "PAR1"),
        ("a.parquet", b"PAR1", "format_invalid", "not Parquet"),
        ("a", b"prompt,completion\nq,a", "format_invalid", "neither its name"),
        ("a.jsonl", '{"prompt": "q"}'.encode("utf-16"), "not_utf8", "UTF-16"),
        ("a.csv", "prompt,completion".encode("utf-16-le"), "not_utf8", "NUL"),
        ("a.csv", "prompt,completion\nq,é\nq,ü\n".encode("latin-1"), "not_utf8", "line 2 and 1 more lines"),
        ("a.json", '["é"]'.encode("latin-1"), "not_utf8", "line 1 is not UTF-8"),
        ("a.json", b"5", "json_invalid", "neither a JSON list nor an object"),
        ("a.json", b'{"a": [1], "b": [2]}', "row_invalid", "one list of rows; it holds a, b"),
        ("a.json", b'{"a": 1', "json_invalid", "expected '}' in line 1"),
        ("a.json", b"[" * 100_000, "json_invalid", "nested too deeply"),
        ("a.json", b'[{"prompt": "q", "completion": "a"} 5]', "json_invalid", "expected ',' or ']'"),
        ("a.jsonl", b'{"messages": [], "tools": ' + b"9" * 5000 + b"}", "json_invalid", "5,000 digits"),
        ("a.jsonl", b'{"prompt": "q", "completion": NaN}', "json_invalid", "NaN is not JSON"),
        ("a.jsonl", b'{"prompt": "q", "completion": 1e999}', "json_invalid", "too large"),
        ("a.jsonl", b'{"prompt": "q\\ud83d", "completion": "a"}', "text_invalid", "\\ud83d"),
        ("a.jsonl", b'{"prompt": "q\\u0000", "completion": "a"}', "text_invalid", "NUL"),
        ("a.csv", b"prompt,prompt\nq,a\n", "duplicate_key", "'prompt' occurs twice"),
        ("a.csv", b"question,answer\nq,a\n", "row_invalid", "it has `question`, `answer`"),
        ("a.csv", b'prompt,completion\nq,"a"b\n', "csv_invalid", "broken quoting"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_what_it_should_be_is_one_clear_error(
    tmp_path: Path, name: str, content: bytes, code: str, words: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    ((found, message),) = {(code, message) for code, message in refused(path).values()}
    assert (found, words in message) == (code, True), message


def test_one_row_is_data_and_none_is_not(tmp_path: Path) -> None:
    assert len(read_data(write_jsonl(tmp_path / "a.jsonl", [chat("q", "a")])).rows) == 1
    (tmp_path / "one.json").write_text(json.dumps(chat("q", "a"), indent=2))
    assert len(read_data(tmp_path / "one.json").rows) == 1
    for name, content in (("b.json", "[]"), ("c.csv", "prompt,completion\n"), ("d.csv", ""), ("e.jsonl", "\n")):
        (tmp_path / name).write_text(content)
        with pytest.raises(DataInvalid, match="has no rows"):
            read_data(tmp_path / name)


def test_a_quotation_mark_that_never_closes_does_not_swallow_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.data.tables.LONGEST_LINE_BYTES", 1000)
    path = tmp_path / "a.csv"
    path.write_text('prompt,completion\nq,"' + "a\n" * 5000)
    (((code, message),),) = (refused(path).values(),)
    assert code == "csv_invalid" and "larger than field limit" in message


def test_a_line_beyond_the_limit_is_one_bad_row_and_the_next_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jsonfiles, "LONGEST_LINE_BYTES", 1000)
    path = write_jsonl(tmp_path / "a.jsonl", [chat("a", "b"), chat("a", "b" * 5000), "{", chat("c", "d")])
    assert {place: code for place, (code, _) in refused(path).items()} == {
        f"{path}:2": "row_too_long",
        f"{path}:3": "json_invalid",
    }


def test_pipes_and_links_that_lead_nowhere_are_refused_and_do_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(DataInvalid, match="neither a file nor a folder"):
        read_data(tmp_path / "a.jsonl")
    with pytest.raises(DataInvalid, match="no regular file"):
        read_data(tmp_path)
    (tmp_path / "a.jsonl").unlink()
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "b.jsonl")
    with pytest.raises(DataInvalid, match="symbolic links"):
        read_data(tmp_path)
    with pytest.raises(DataInvalid, match="symbolic links"):
        read_data(tmp_path / "b.jsonl")


def test_beyond_a_limit_bad_rows_are_counted_and_no_longer_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "MOST_PROBLEMS", 3)
    with pytest.raises(DataInvalid) as caught:
        read_data(write_jsonl(tmp_path / "a.jsonl", ["{"] * 7 + [chat("a", "b")]))
    assert caught.value.message.startswith("7 of 8 rows") and "The first 3 are listed" in caught.value.message
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_damaged_files_are_read_or_refused_with_a_data_error_and_nothing_else(tmp_path: Path, name: str) -> None:
    """400 seeded mutations of a good file; any other exception fails."""
    table = [{"prompt": prompt, "completion": completion} for prompt, completion in PAIRS]
    path = tmp_path / name
    if name == "a.parquet":
        write_parquet(path, {"messages": [chat(*pair)["messages"] for pair in PAIRS]})
    elif name == "a.csv":
        write_csv(path, [["prompt", "completion"], *map(list, PAIRS)])
    elif name == "a.json":
        path.write_text(json.dumps({"data": table}))
    else:
        write_jsonl(path, table)
    good, chance, refusals = path.read_bytes(), random.Random(name), 0
    for _ in range(400):
        damaged = bytearray(good)
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(len(damaged))
            damaged[at : at + chance.choice((0, 1, 1, 9))] = chance.randbytes(chance.choice((0, 1, 1, 3)))
        path.write_bytes(damaged)
        try:
            read_data(path)
        except DataInvalid:
            refusals += 1
    assert 50 < refusals <= 400
