"""`hotshoe data show` for every form, and `hotshoe train` from a CSV and a Parquet file, end to end."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import typer
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from adapters.errors import ConfigInvalid, DataInvalid
from server.cli.main import build_app
from server.cli.output import fail
from tests.training.conftest import chat, write_jsonl


def hotshoe(*arguments: object, color: bool = False) -> Result:
    """The command in this process; its HotshoeErrors are raised, as the console script then prints them."""
    arguments_ = [str(argument) for argument in arguments]
    return CliRunner().invoke(build_app(), arguments_, catch_exceptions=False, color=color)


def table(path: Path, columns: list[str], rows: list[list[Any]]) -> Path:
    if path.suffix == ".parquet":
        data = {name: [row[index] for row in rows] for index, name in enumerate(columns)}
        pyarrow.parquet.write_table(pyarrow.table(data), path)
    else:
        with path.open("w", encoding="utf-8-sig", newline="") as file:
            csv.writer(file).writerows([columns, *rows])
    return path


@pytest.mark.parametrize(
    ("name", "columns", "row", "form"),
    [
        ("a.csv", ["prompt", "completion"], ["Is it\ndark?", "Rất tối."], "prompt_completion"),
        ("a.csv", ["instruction", "input", "output"], ["Is it", "dark?", "Rất tối."], "alpaca"),
        (
            "a.parquet",
            ["conversations"],
            [[{"from": "human", "value": "Is it\ndark?"}, {"from": "gpt", "value": "Rất tối."}]],
            "sharegpt",
        ),
        ("a.parquet", ["messages"], [chat("Is it\ndark?", "Rất tối.", system=None)["messages"]], "chat"),
    ],
)
def test_data_show_of_every_form_shows_the_same_tokens(
    qwen2_base: Path, tmp_path: Path, name: str, columns: list[str], row: list[Any], form: str
) -> None:
    path = table(tmp_path / name, columns, [row, row])
    shown = json.loads(hotshoe("data", "show", path, "--row", 2, "--base", qwen2_base, "--json").stdout)
    assert (shown["form"], shown["format"], shown["file"], shown["row"]) == (form, path.suffix[1:], name, 2)
    expected = write_jsonl(tmp_path / "same.jsonl", [chat("Is it\ndark?", "Rất tối.", system=None)])
    same = json.loads(hotshoe("data", "show", expected, "--base", qwen2_base, "--json").stdout)
    assert shown["sequences"] == same["sequences"]
    learned = [token["text"] for token in shown["sequences"][0] if token["is_learned"]]
    assert learned[-1] == "<|im_end|>" and len(learned) == len("Rất tối.".encode()) + 1


def test_data_show_names_the_form_and_colours_what_is_learned(qwen2_base: Path, tmp_path: Path) -> None:
    path = table(tmp_path / "a.csv", ["prompt", "completion"], [["a\nb", "c"], ["q", "Yes."]])
    plain = hotshoe("data", "show", path, "--row", 2, "--base", qwen2_base).stdout
    assert plain.startswith(f"{path}:4 (CSV, prompt/completion), messages 1: 5 of ")
    coloured = hotshoe("data", "show", path, "--row", 2, "--base", qwen2_base, color=True).stdout
    assert "\x1b[32m\x1b[1mYes.<|im_end|>\x1b[0m" in coloured
    with pytest.raises(DataInvalid, match="2 rows"):
        hotshoe("data", "show", path, "--row", 3, "--base", qwen2_base)
    with pytest.raises(ConfigInvalid, match="all or last"):
        hotshoe("data", "show", path, "--base", qwen2_base, "--supervise", "first")


@pytest.mark.parametrize("name", ["a.csv", "a.parquet"])
def test_train_from_a_table_announces_its_form_and_writes_it_into_the_card(
    qwen2_base: Path, tmp_path: Path, name: str
) -> None:
    rows = [[f"Colour number {i}?", f"It is {'red' if i % 2 else 'green'}.", str(i)] for i in range(12)]
    path = table(tmp_path / name, ["prompt", "completion", "id"], rows)
    out = tmp_path / "out"
    options = ("--epochs", "1", "--rank", "4", "--dtype", "float32")
    done = hotshoe("train", path, "--name", "n", "--base", qwen2_base, "--out", out, *options)
    kind = "CSV" if name == "a.csv" else "Parquet"
    assert f"{path} ({kind}, prompt/completion): 12 rows" in done.stderr
    assert "keys without a meaning here: id (12)" in done.stderr
    training = json.loads((out / "card.json").read_text())["data"]["training"]
    (source,) = training["sources"]
    assert source["digest"] == training["digest"]
    assert (source["format"], source["forms"], source["rows"]) == (path.suffix[1:], {"prompt_completion": 12}, 12)
    assert any(
        value.abs().max() > 0 for key, value in load_file(out / "adapter_model.safetensors").items() if "B" in key
    )


def test_train_refuses_rows_that_are_all_too_long_and_names_them(qwen2_base: Path, tmp_path: Path) -> None:
    path = table(tmp_path / "a.csv", ["prompt", "completion"], [["q" * 200, "a"]] * 3)
    command = ("train", path, "--name", "n", "--base", qwen2_base, "--out", tmp_path / "out", "--max-length", 50)
    for choice in ("cut", "drop"):
        with pytest.raises(DataInvalid, match="no supervised token left") as caught:
            hotshoe(*command, "--over-long", choice)
        assert [problem.path for problem in caught.value.problems] == ["a.csv:2", "a.csv:3", "a.csv:4"]
    with pytest.raises(DataInvalid) as caught:
        hotshoe(*command)
    assert [problem.path for problem in caught.value.problems] == [f"{path}:{line}" for line in (2, 3, 4)]


def test_of_many_bad_rows_fifty_are_printed_and_json_has_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = table(tmp_path / "a.csv", ["prompt", "completion"], [["q", ""]] * 60)
    with pytest.raises(DataInvalid) as caught:
        hotshoe("data", "show", path)
    with pytest.raises(typer.Exit) as left:
        fail(caught.value, as_json=False)
    printed = capsys.readouterr().err.splitlines()
    assert left.value.exit_code == 3
    assert printed[0].endswith(f"60 of 60 rows of {path} cannot be used (60 empty_turn).")
    assert printed[1].startswith(f"  {path}:2: row 1: `completion` is empty.  -> ")
    assert (len(printed), printed[-1]) == (52, "  … and 10 more; --json lists them")
    with pytest.raises(typer.Exit):
        fail(caught.value, as_json=True)
    assert len(json.loads(capsys.readouterr().out)["error"]["problems"]) == 60


def test_rows_cut_and_dropped_are_counted_and_named_whatever_their_form(qwen2_base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    long = "a" * 300
    table(folder / "a.csv", ["instruction", "output"], [["q", "a"], ["q", long], [long, "a"]])
    table(folder / "b.parquet", ["prompt", "completion"], [["q", long], ["q", "b"]])
    command = ("train", folder, "--validation", folder, "--name", "n", "--base", qwen2_base, "--max-length", 200)
    for choice, kept, cut, dropped in (
        ("cut", 4, ["a.csv:3", "b.parquet:1"], ["a.csv:4"]),
        ("drop", 2, [], ["a.csv:3", "a.csv:4", "b.parquet:1"]),
    ):
        out = tmp_path / choice
        done = hotshoe(*command, "--over-long", choice, "--out", out, "--epochs", 1, "--rank", 4, "--dtype", "float32")
        training = json.loads((out / "card.json").read_text())["data"]["training"]
        assert (training["rows"], training["sequences"]) == (5, kept)
        assert (training["cut"], training["dropped"]) == (cut, dropped)
        assert f"{len(dropped)} rows above 200 tokens dropped: {', '.join(dropped)}" in done.stderr
        assert f"{len(dropped)} validation rows above 200 tokens dropped: {', '.join(dropped)}" in done.stderr
        assert "a.csv: CSV, Alpaca; b.parquet: Parquet, prompt/completion" in done.stderr
