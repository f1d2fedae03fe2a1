"""A split keeps together what belongs together, keeps the labels' shares, and appears whole or not at all."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from adapters.errors import ConfigInvalid, DataInvalid, HotshoeError, OutputExists
from server.cli.main import build_app
from tests.training.conftest import chat, write_jsonl
from training.data.formats import read_data
from training.gate import twins
from training.gate.subject import Subject
from training.groups import clusters_of
from training.split.assign import assign
from training.split.run import SPLITS, SplitAsked, split
from training.split.units import joined

ROOMS = ("kitchen", "garage", "attic", "cellar", "hallway", "bathroom", "nursery", "porch", "loft", "study")
WORDS = ("amber", "birch", "cobalt", "dune", "ember", "fjord", "grove", "heron", "iris", "jade", "kelp", "lotus")
PROGRAM = "from server.cli.main import run; run()"
LABELS = ("on", "off", "dim")


def answer(label: str, room: str) -> str:
    return json.dumps({"intent": label, "area": room})


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """360 rows of 36 templates and three labels: each template with ten rooms."""
    rows = [
        chat(f"{word} {label} please, {word[::-1]} in the {room} of {word}", answer(label, room))
        for label in LABELS
        for word in WORDS
        for room in ROOMS
    ]
    return write_jsonl(tmp_path / "data.jsonl", rows)


def written(out: Path) -> dict[str, list[Any]]:
    return {
        path.stem: [json.loads(line) for line in path.read_text("utf-8").splitlines()] for path in out.glob("*.jsonl")
    }


def test_no_template_is_in_two_splits_and_labels_keep_their_shares(data: Path, tmp_path: Path) -> None:
    report = split(SplitAsked(data, tmp_path / "out", test_share=0.25, validation_share=0.25))
    files = {name: read_data(tmp_path / "out" / f"{name}.jsonl") for name in SPLITS}
    keys = {name: set(clusters_of(file.rows)) for name, file in files.items()}
    assert not keys["train"] & keys["test"] | keys["train"] & keys["validation"] | keys["validation"] & keys["test"]
    for held in ("validation", "test"):
        assert not list(twins.across(Subject(files["train"]), Subject(files[held]), "test"))
        assert report["leaks"][held] == {"exact": 0, "template": 0, "near": 0}
    assert report["labels"] == {label: {"train": 60, "validation": 30, "test": 30} for label in LABELS}
    assert report["rows"] == {"train": 180, "validation": 90, "test": 90}
    assert json.loads((tmp_path / "out" / "split.json").read_text("utf-8")) == report


def test_every_row_is_written_once_as_it_was_with_columns_that_mean_nothing(tmp_path: Path) -> None:
    rows = [chat(f"{a} {b} {a[::-1]}", b[::-1]) | {"id": f"{a}/{b}"} for a in WORDS for b in ROOMS]
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    before = data.read_bytes()
    split(SplitAsked(data, tmp_path / "out"))
    found = [row for part in written(tmp_path / "out").values() for row in part]
    assert sorted(found, key=lambda row: row["id"]) == sorted(rows, key=lambda row: row["id"])
    assert data.read_bytes() == before


def test_the_same_seed_gives_the_same_bytes_and_another_gives_others(data: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        split(SplitAsked(data, tmp_path / name, seed=seed))
    texts = {name: (tmp_path / name / "test.jsonl").read_bytes() for name in "abc"}
    assert texts["a"] == texts["b"] != texts["c"]


def test_a_group_is_a_column_or_a_field_of_the_answer_and_stays_whole(tmp_path: Path) -> None:
    rows = [
        chat(f"{a} {b} {a[::-1]}", json.dumps({"intent": "x", "area": b})) | {"customer": a}
        for a in WORDS
        for b in ROOMS
    ]
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    for by, key in (
        ("group:customer", lambda row: row["customer"]),
        ("group:area", lambda row: json.loads(row["messages"][-1]["content"])["area"]),
    ):
        out = tmp_path / by.partition(":")[2]
        split(SplitAsked(data, out, by, 0.2, 0.2, twins="apart"))
        groups = {name: set(map(key, part)) for name, part in written(out).items()}
        assert groups["train"] and groups["test"] and not groups["train"] & groups["test"]


@pytest.mark.parametrize("depth", [900, 100_000])
def test_answers_that_nest_deeply_are_split_like_others(depth: int, data: Path, tmp_path: Path) -> None:
    nested = '{"intent":' + "[" * depth + '"on"' + "]" * depth + "}"
    with data.open("a", encoding="utf-8") as file:
        file.write(json.dumps(chat("and this one?", nested)) + "\n")
    assert sum(split(SplitAsked(data, tmp_path / "out"))["rows"].values()) == 361


def test_rows_without_a_group_are_named(data: Path, tmp_path: Path) -> None:
    with pytest.raises(DataInvalid, match=r"360 of 360 rows .* have no 'customer'") as raised:
        split(SplitAsked(data, tmp_path / "out", "group:customer"))
    assert raised.value.problems[0].code == "group_missing"
    assert raised.value.problems[0].path.endswith("data.jsonl:1")


def test_whole_labels_can_be_held_out(data: Path, tmp_path: Path) -> None:
    report = split(SplitAsked(data, tmp_path / "out", "label", 0.34, 0, twins="apart"))
    assert sorted(report["labels_missing"]["train"] + report["labels_missing"]["test"]) == sorted(LABELS)


def test_twins_stay_together_whatever_the_groups_are_and_apart_the_leaks_are_counted(tmp_path: Path) -> None:
    rows = [
        chat(f"{word} {word[::-1]} number {n}", "yes") | {"customer": str(n)} for word in WORDS for n in range(1, 9)
    ]
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    with pytest.raises(DataInvalid, match=r"96 of 96 rows belong together"):
        split(SplitAsked(data, tmp_path / "one", "group:customer"))
    report = split(SplitAsked(data, tmp_path / "two", "group:customer", twins="apart"))
    assert report["leaks"]["test"]["template"] == report["rows"]["test"]


def test_a_long_row_that_stands_in_pieces_in_training_goes_there(tmp_path: Path) -> None:
    def piece(number: int) -> str:
        return " ".join(f"{word}{chr(97 + number)}{at}" for at, word in enumerate(WORDS * 4))

    pieces = [piece(number) for number in range(3)]
    rows = [chat(text + " " + text[::-1], "yes", None) for text in pieces]
    rows += [chat(" ".join(text[: len(text) // 2] for text in pieces), "no", None)]
    rows += [chat(f"{a} {b} {a[::-1]} {b[::-1]}", "yes", None) for a in WORDS for b in ROOMS]
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    reports = [split(SplitAsked(data, tmp_path / str(seed), test_share=0.4, seed=seed)) for seed in range(8)]
    assert any(report["moved_rows"] for report in reports)
    assert all(not any(kinds.values()) for report in reports for kinds in report["leaks"].values())


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"by": "colour"}, "template, conversation, label, file or group:COLUMN"),
        ({"test_share": 1.0}, "from 0 to below 1"),
        ({"test_share": 0.0, "validation_share": 0.0}, "leave some on each side"),
        ({"test_share": 0.6, "validation_share": 0.5}, "leave some on each side"),
        ({"twins": "maybe"}, "together or apart"),
    ],
)
def test_what_makes_no_split_is_refused(asked: dict[str, Any], reason: str, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid, match=reason):
        split(replace(SplitAsked(data, tmp_path / "out"), **asked))
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_there_or_inside_of_the_data_is_refused(data: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(OutputExists):
        split(SplitAsked(data, tmp_path / "out"))
    with pytest.raises(ConfigInvalid, match="inside of the data"):
        split(SplitAsked(tmp_path, tmp_path / "new"))


def test_bad_rows_are_all_named_and_nothing_is_written(data: Path, tmp_path: Path) -> None:
    with data.open("a") as file:
        file.write('{"messages": []}\nnothing\n')
    with pytest.raises(DataInvalid, match="2 of 362 rows"):
        split(SplitAsked(data, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_nothing_behind(data: Path, tmp_path: Path) -> None:
    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))

    words = [sys.executable, "-c", PROGRAM, "data", "split", str(data), "--out", str(tmp_path / "out"), "--json"]
    ended = subprocess.run(words, capture_output=True, text=True, preexec_fn=small_files, check=False)
    assert (ended.returncode, json.loads(ended.stdout)["error"]["code"]) == (1, "storage_full")
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


def test_csv_with_own_columns_is_split_into_rows_that_are_read_without_them(tmp_path: Path) -> None:
    lines = [f"{a} {b} {a[::-1]},{b}" for a in WORDS for b in ROOMS]
    (tmp_path / "data.csv").write_text("Question,Reply\n" + "\n".join(lines) + "\n")
    columns = ("prompt=Question", "completion=Reply")
    report = split(SplitAsked(tmp_path / "data.csv", tmp_path / "out", columns=columns))
    assert sum(report["rows"].values()) == 120
    assert all(read_data(tmp_path / "out" / f"{name}.jsonl").rows for name in SPLITS)


def test_parquet_keeps_its_own_columns(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"prompt": f"{a} {b} {a[::-1]}", "completion": b, "customer": a} for a in WORDS for b in ROOMS]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "data.parquet")
    split(SplitAsked(tmp_path / "data.parquet", tmp_path / "out", "group:customer", 0.2, 0, twins="apart"))
    assert {row["customer"] for part in written(tmp_path / "out").values() for row in part} == set(WORDS)


def test_the_command_prints_counts_for_each_label_and_split(data: Path, tmp_path: Path) -> None:
    words = ["data", "split", str(data), "--out", str(tmp_path / "out"), "--validation-share", "0"]
    ran = CliRunner().invoke(build_app(), words)
    assert ran.exit_code == 0, ran.output
    lines = [line.split() for line in ran.output.splitlines()]
    assert ["train", "test"] in lines and ["rows", "330", "30"] in lines
    assert [line[0] for line in lines if line[0] in LABELS] == sorted(LABELS)
    assert "none" in lines[-1]
    with pytest.raises(HotshoeError):
        CliRunner().invoke(build_app(), words, catch_exceptions=False)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.integers(0, 12), st.sampled_from("abc")), min_size=1, max_size=80), st.integers(0, 9))
def test_units_are_never_torn(rows: list[tuple[int, str]], seed: int) -> None:
    units, labels = [str(unit) for unit, _ in rows], [label for _, label in rows]
    splits = assign(units, labels, {"train": 0.8, "test": 0.2}, seed)
    assert len(set(zip(units, splits, strict=True))) == len(set(units))


def test_single_rows_are_dealt_within_one_of_their_shares() -> None:
    labels = ["a"] * 500 + ["b"] * 50 + ["c"] * 10
    splits = assign([str(n) for n in range(560)], labels, {"train": 0.8, "validation": 0.1, "test": 0.1}, 3)
    counts = Counter(zip(labels, splits, strict=True))
    for label, rows in Counter(labels).items():
        assert abs(counts[label, "test"] - 0.1 * rows) <= 1 and abs(counts[label, "validation"] - 0.1 * rows) <= 1


def test_keys_that_are_equal_in_either_are_one() -> None:
    keys = joined(["a", "a", "b", "c", "d"], ["1", "2", "2", "3", "3"])
    assert keys[0] == keys[1] == keys[2] != keys[3] == keys[4]
