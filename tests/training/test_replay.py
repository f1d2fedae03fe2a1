"""Replay: rows of another file among the training rows, by share and seed, counted, and out of validation."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapters.errors import ConfigInvalid, DataInvalid
from tests.training.conftest import chat, write_jsonl
from training.config import TrainingConfig, choose
from training.data.formats import read_data
from training.data.replay import replayed
from training.material import announcement, facts, gather


@pytest.fixture
def general(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "general.jsonl", [chat(f"General question {at}?", f"Reply {at}") for at in range(30)])


def test_so_many_rows_are_drawn_that_they_are_the_share_of_all(general: Path) -> None:
    file = read_data(general)
    drawn = replayed(file, 90, 0.1, seed=3)
    assert (len(drawn.rows), drawn.share) == (10, 0.1)
    assert drawn.as_dict() | {"digest": ""} == {
        "file": "general.jsonl",
        "digest": "",
        "rows": 10,
        "of_rows": 30,
        "share": 0.1,
    }
    places = [row.place.line for row in drawn.rows]
    assert places == sorted(set(places))
    assert places == [row.place.line for row in replayed(file, 90, 0.1, seed=3).rows]
    assert places != [row.place.line for row in replayed(file, 90, 0.1, seed=4).rows]
    assert len(replayed(file, 900, 0.5, seed=3).rows) == 30  # every row once, and no more
    assert len(replayed(file, 1, 0.01, seed=3).rows) == 1


def test_a_run_learns_the_drawn_rows_beside_its_own_and_validates_on_its_own_alone(
    colours: Path, general: Path, qwen2_base: Path
) -> None:
    asked = TrainingConfig(
        colours, "colours", base=str(qwen2_base), validation_share=0.25, replay=general, replay_share=0.25
    )
    material = gather(asked)
    sources = [row.place.source for row in material.training.owners]
    assert material.replay is not None and material.validation is not None
    assert sources.count("general.jsonl") == len(material.replay.rows) == 10
    assert {row.place.source for row in material.validation.owners} == {"colours.jsonl"}
    assert material.training.rows == sources.count("colours.jsonl") + 10
    assert gather(asked).training.sequences == material.training.sequences


def test_a_replayed_row_that_cannot_be_learned_is_named_where_it_stands(
    colours: Path, tmp_path: Path, qwen2_base: Path
) -> None:
    general = write_jsonl(tmp_path / "general.jsonl", [chat("long " * 400, "yes")])
    asked = TrainingConfig(colours, "colours", base=str(qwen2_base), replay=general, max_length=200)
    with pytest.raises(DataInvalid, match=rf"1 of \d+ rows of {colours} with {general} cannot be used") as refused:
        gather(asked)
    assert [problem.path for problem in refused.value.problems] == [f"{general}:1"]


def test_the_announcement_tells_a_files_own_rows_from_those_beside_them(
    colours: Path, general: Path, qwen2_base: Path
) -> None:
    asked = TrainingConfig(
        colours, "colours", base=str(qwen2_base), validation_share=0.25, replay=general, replay_share=0.25, canaries=3
    )
    material = gather(asked)
    own = material.training.rows - 13
    said = announcement(asked, material, choose(asked, facts(material)))
    assert f": {own:,} rows and 10 replayed rows and 3 canaries, {material.training.tokens:,} tokens" in said
    assert [row.place.source for row in material.training.owners][-3:] == ["canaries"] * 3


def test_a_share_of_none_or_all_and_a_file_that_cannot_be_read_are_refused(
    colours: Path, tmp_path: Path, qwen2_base: Path
) -> None:
    for share in (0.0, 1.0, -0.1):
        with pytest.raises(ConfigInvalid, match="replay_share"):
            TrainingConfig(colours, "colours", replay=colours, replay_share=share)
    with pytest.raises(DataInvalid, match="does not exist"):
        gather(TrainingConfig(colours, "colours", base=str(qwen2_base), replay=tmp_path / "missing.jsonl"))
