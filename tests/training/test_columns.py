"""Data whose columns have names of their owner's: every format, the command line, and what cannot be meant."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from typer.testing import CliRunner

from adapters.errors import ConfigInvalid, DataInvalid
from server.cli.main import build_app
from tests.training.conftest import write_jsonl
from training.config import TrainingConfig
from training.config_file import read_config
from training.data.columns import Columns
from training.data.formats import read_data
from training.material import gather

MAPPED = ("prompt=Customer question", "completion=Reply")
ROWS = [{"Customer question": f"Question {i}?", "Reply": f"Answer {i}.", "Ticket": str(i)} for i in range(3)]


def written(folder: Path) -> list[Path]:
    """The rows in every format."""
    table = folder / "tickets.csv"
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerows([[" customer QUESTION", "Reply ", "Ticket"], *(list(row.values()) for row in ROWS)])
    (folder / "tickets.json").write_text(json.dumps(ROWS))
    parquet = folder / "tickets.parquet"
    pyarrow.parquet.write_table(pyarrow.table({key: [row[key] for row in ROWS] for key in ROWS[0]}), parquet)
    return [write_jsonl(folder / "tickets.jsonl", ROWS), folder / "tickets.json", table, parquet]


def test_mapped_columns_are_read_in_every_format_and_the_others_counted(tmp_path: Path) -> None:
    for path in written(tmp_path):
        file = read_data(path, Columns(MAPPED))
        said = [(row.messages[0]["content"], row.messages[1]["content"]) for row in file.rows]
        assert said == [(f"Question {i}?", f"Answer {i}.") for i in range(3)], path
        assert [key.lower() for key in file.ignored_keys] == ["ticket"], path
        with pytest.raises(DataInvalid):
            read_data(path)


def test_a_mapped_name_that_another_column_has_is_a_bad_row(tmp_path: Path) -> None:
    rows = [{"prompt": "id 7", **ROWS[0]}, ROWS[1]]
    with pytest.raises(DataInvalid) as caught:
        read_data(write_jsonl(tmp_path / "both.jsonl", rows), Columns(MAPPED))
    (problem,) = caught.value.problems
    assert (problem.code, problem.path[-2:]) == ("duplicate_key", ":1")
    assert "'Customer question'" in problem.message


def test_a_mapped_column_that_is_nowhere_is_an_error(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "plain.jsonl", [{"prompt": "q", "completion": "a"}])
    with pytest.raises(DataInvalid, match="system=persona") as caught:
        read_data(path, Columns(["system=Persona"]))
    assert caught.value.param == "columns"


@pytest.mark.parametrize(
    "pairs", [["prompt"], ["prompt="], ["question=Q"], ["prompt=Q", "prompt=R"], ["input=Q", "prompt=q"]]
)
def test_a_mapping_that_cannot_be_meant_is_refused(pairs: list[str]) -> None:
    with pytest.raises(ConfigInvalid) as caught:
        Columns(pairs)
    assert caught.value.param == "columns"


def test_the_command_line_and_a_file_of_settings_take_the_mapping(tmp_path: Path, qwen2_base: Path) -> None:
    path = written(tmp_path)[2]
    words = ["data", "show", str(path), "--base", str(qwen2_base), "--json", "--columns", ",".join(MAPPED)]
    shown = CliRunner().invoke(build_app(), words)
    assert shown.exit_code == 0, shown.output
    learned = [token["text"] for token in json.loads(shown.stdout)["sequences"][0] if token["is_learned"]]
    assert "".join(learned).startswith("Answer 0.")
    settings = tmp_path / "run.yaml"
    settings.write_text(f"data: {path}\nname: support\nbase: {qwen2_base}\ncolumns: [{', '.join(MAPPED)}]\n")
    material = gather(TrainingConfig(**read_config(settings)))
    assert material.training.rows == 3
