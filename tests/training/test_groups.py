"""Which rows belong together: templates, conversations, labels, files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adapters.errors import ConfigInvalid
from tests.training.conftest import chat, write_jsonl
from training.data.formats import read_data
from training.data.rows import Row
from training.groups import WAYS, clusters_of


def rows_of(tmp_path: Path, *turns: tuple[str, ...]) -> list[Row]:
    roles = ("user", "assistant")
    said = [{"messages": [{"role": roles[at % 2], "content": text} for at, text in enumerate(row)]} for row in turns]
    return read_data(write_jsonl(tmp_path / "rows.jsonl", said)).rows


def parts(keys: list[str]) -> list[int]:
    """The clusters numbered as they come."""
    seen: dict[str, int] = {}
    return [seen.setdefault(key, len(seen)) for key in keys]


def test_rows_of_one_template_are_one_cluster_and_so_are_near_ones(tmp_path: Path) -> None:
    def answer(room: str) -> str:
        return json.dumps({"name": "turn_on", "area": room})

    rows = rows_of(
        tmp_path,
        ("please switch on the big lamp that stands in the kitchen", answer("kitchen")),
        ("please switch on the big lamp that stands in the cellar", answer("cellar")),
        ("what is the weather like", "It rains."),
        ("dim to 10 percent", "ok"),
        ("Dim to 20 percent!", "ok"),
        ("please switch on the big lamps that stands in the attic", answer("attic")),
        ("what is the  Weather like?", "It is dry."),
    )
    assert parts(clusters_of(rows)) == [0, 0, 1, 2, 2, 0, 1]


def test_two_rows_are_joined_through_a_third(tmp_path: Path) -> None:
    words = [chr(97 + index % 26) * 3 + chr(97 + index // 3) for index in range(40)]
    texts = [" ".join(words[at : at + 36]) for at in (0, 2, 4)]
    rows = rows_of(tmp_path, *[(text, "yes") for text in texts])
    assert parts(clusters_of([rows[0], rows[2]])) == [0, 1]
    assert parts(clusters_of(rows)) == [0, 0, 0]


def test_a_cluster_has_the_same_key_among_other_rows(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, ("open the door", "yes"), ("dim to 10 percent", "ok"), ("why is it dark", "no"))
    assert clusters_of(rows)[1:] == clusters_of(rows[1:])


def test_rows_cut_from_one_conversation_are_one_cluster(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, ("hello there", "hi"), ("Hello there", "hi", "is it warm?", "yes"), ("is it warm?", "yes"))
    assert parts(clusters_of(rows, "conversation")) == [0, 0, 1]


def test_labels_name_their_clusters_and_free_answers_are_compared(tmp_path: Path) -> None:
    labelled = rows_of(tmp_path, *[(f"question {n}", ("on", "off")[n % 2]) for n in range(20)])
    assert clusters_of(labelled, "label") == ["on", "off"] * 10
    free = rows_of(tmp_path, ("one", "Yes, it is."), ("two", "yes, it is"), ("three", "No."))
    assert parts(clusters_of(free, "label")) == [0, 0, 1]


def test_files_of_a_folder_are_clusters(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_jsonl(tmp_path / f"{name}.jsonl", [chat("one", "two")])
    assert clusters_of(read_data(tmp_path).rows, "file") == ["a.jsonl", "b.jsonl"]


def test_another_way_to_group_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigInvalid, match=r"one of template, conversation, label, file, not by 'colour'"):
        clusters_of([], "colour")
    assert all(clusters_of([], way) == [] for way in WAYS)
