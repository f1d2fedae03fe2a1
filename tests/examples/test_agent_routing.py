"""The demo's data: sampled from real templates, split by template, the same for the same seed."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from examples.agent_routing.data import ENGLISH, ENGLISH_MORE, VIETNAMESE, Recipe, Row, make, split_templates
from examples.agent_routing.templates import Language, Template, function_call


@pytest.fixture(scope="module")
def english() -> Language:
    return Language.load("en")


def test_english_has_sixteen_labels_and_vietnamese_seven(english: Language) -> None:
    assert len(english.labels(ENGLISH.least_templates)) == 16
    assert len(Language.load("vi").labels(VIETNAMESE.least_templates)) == 7


@pytest.mark.parametrize("recipe", [ENGLISH, VIETNAMESE, ENGLISH_MORE], ids=["en", "vi", "en-more"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_template_and_no_sentence_is_in_two_splits_and_every_row_is_accounted_for(recipe: Recipe, seed: int) -> None:
    data = make(recipe, seed)
    assert data.leaks() == []
    for split, counts in data.counts().items():
        assert {label: data.short.get(f"{split}/{label}", 0) + counts[label] for label in data.labels} == dict.fromkeys(
            data.labels, recipe.rows[split]
        )
    assert {key.partition("/")[0] for key in data.short} <= {"validation"}


def test_a_leak_is_named() -> None:
    data = make(VIETNAMESE)
    row = data.splits["train"][0]
    data.splits["test"].append(Row("another sentence", row.answer, row.intent, row.template))
    assert data.leaks() == [f"train and test share the template {row.template}"]


def test_the_same_seed_gives_the_same_files_and_another_seed_another_split(tmp_path: Path) -> None:
    first = make(VIETNAMESE, 1).write(tmp_path / "a")
    again = make(VIETNAMESE, 1).write(tmp_path / "b")
    other = make(VIETNAMESE, 2).write(tmp_path / "c")
    assert {split: path.read_bytes() for split, path in first.items()} == {
        split: path.read_bytes() for split, path in again.items()
    }
    assert first["test"].read_bytes() != other["test"].read_bytes()


def test_other_rows_of_the_same_split_stay_on_their_side_of_it() -> None:
    version_1, version_2 = make(ENGLISH, 0), make(ENGLISH_MORE, 0, row_seed=1)
    trained = {row.template for data in (version_1, version_2) for row in data.splits["train"]}
    assert trained.isdisjoint(row.template for row in version_2.splits["test"])
    assert set(version_2.labels) - set(version_1.labels) == set(ENGLISH_MORE.more_labels)


def test_a_list_gives_its_slot_the_meaning_of_what_was_said(english: Language) -> None:
    cases = {
        "turn on {name} in {area}": lambda slots: set(slots) == {"name", "area"},
        "brightness {brightness_level:brightness}": lambda slots: slots["brightness"] in (1, 100),
        "down by {volume_step_down:volume_step} percent": lambda slots: -100 <= slots["volume_step"] <= 0,
        "is it {lock_states:state}": lambda slots: slots["state"] in ("locked", "unlocked"),
    }
    for text, holds in cases.items():
        for seed in range(20):
            sentence, slots = english.sample(Template("X", text, ("light",)), random.Random(seed))
            assert holds(slots), (sentence, slots)


def test_a_permutation_says_every_part_once(english: Language) -> None:
    said = {english.sample(Template("X", "(one;two)", ()), random.Random(seed))[0] for seed in range(20)}
    assert said == {"one two", "two one"}


def test_a_function_call_is_json_with_the_intent_first() -> None:
    text = function_call("HassTurnOn", {"name": "đèn bàn", "area": "phòng bếp"})
    assert text == '{"intent": "HassTurnOn", "area": "phòng bếp", "name": "đèn bàn"}'
    assert list(json.loads(text)) == ["intent", "area", "name"]


@pytest.mark.parametrize("seed", range(5))
def test_every_slot_that_test_asks_for_was_named_in_training_for_that_label(seed: int) -> None:
    data = make(ENGLISH, seed)
    named = {(row.intent, slot) for row in data.splits["train"] for slot in json.loads(row.answer)}
    for split in ("validation", "test"):
        assert {(row.intent, slot) for row in data.splits[split] for slot in json.loads(row.answer)} <= named


def test_each_template_of_a_label_is_in_exactly_one_part(english: Language) -> None:
    templates = english.templates["HassMediaSearchAndPlay"]
    parts = split_templates(english, templates, 3)
    assert sorted(t.text for part in parts.values() for t in part) == sorted(t.text for t in templates)
    assert all(parts.values())
