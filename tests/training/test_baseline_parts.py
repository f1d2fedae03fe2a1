"""The parts of a baseline without a model: sets kept apart, prompts, simple rivals, the ledger, the verdict's rule."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapters.errors import ConfigInvalid, DataInvalid
from tests.training.conftest import chat, write_jsonl
from training.baseline.ground import task_for
from training.baseline.ledger import Ledger
from training.baseline.nearest import Nearest
from training.baseline.prompts import Kitchen, Recipe, as_turns, listing
from training.baseline.rivals import LINEAR, MAJORITY, simple_rivals, why_none
from training.baseline.sets import Part, Sets, content_digest, read_sets
from training.baseline.verdict import CANNOT_TELL, NOT_WORTH_IT, WORTH_IT, Paired, enough, judge
from training.evaluate import Prompt, load_examples
from training.evaluation.figures import Grouping, difference
from training.metrics.labels import Labelled
from training.metrics.measure import Measure

MARGIN = 0.02


def words(seed: int, count: int) -> list[str]:
    """Made-up names, all different and unlike."""
    generator = random.Random(seed)
    letters = "bcdfghjklmnpqrstvwxz"
    return ["".join(generator.choice(letters) + generator.choice("aeiou") for _ in range(5)) for _ in range(count)]


def routed(seed: int, count: int, system: str | None = "Route.") -> list[dict[str, Any]]:
    verbs = ("open", "close", "dim")
    return [
        chat(f"please {verbs[at % 3]} the {name}", json.dumps({"intent": verbs[at % 3].title()}), system)
        for at, name in enumerate(words(seed, count))
    ]


def part_of(folder: Path, rows: Sequence[Any], name: str = "training") -> Part:
    path = write_jsonl(folder / f"{name}.jsonl", list(rows))
    examples = load_examples(path)
    return Part(name, path, examples, content_digest(example.row for example in examples), of=len(examples))


def sets_of(folder: Path, training: Sequence[Any], validation: Sequence[Any]) -> Sets:
    return Sets(part_of(folder, training), part_of(folder, validation, "validation"))


# Three sets with three jobs


def files(folder: Path, **rows: Sequence[Any]) -> dict[str, Path]:
    return {name: write_jsonl(folder / f"{name}.jsonl", list(value)) for name, value in rows.items()}


def test_the_training_file_is_no_validation_set_in_any_order_of_its_rows(tmp_path: Path) -> None:
    rows = routed(1, 30)
    found = files(tmp_path, training=rows, validation=rows[::-1])
    for validation in (found["training"], found["validation"]):
        with pytest.raises(DataInvalid, match=r"30 of 30 rows of the validation set .* training set") as raised:
            read_sets(found["training"], validation)
        assert raised.value.param == "validation"


def test_the_validation_rows_are_no_test_set(tmp_path: Path) -> None:
    found = files(tmp_path, training=routed(1, 30), validation=routed(2, 10), test=[*routed(2, 10), *routed(3, 4)])
    with pytest.raises(DataInvalid, match="10 of 14 rows of the test set") as raised:
        read_sets(found["training"], found["validation"], found["test"])
    assert raised.value.param == "test"


def test_single_questions_that_stand_in_an_earlier_set_are_left_out_and_named(tmp_path: Path) -> None:
    training, validation, test = routed(1, 30), routed(2, 20), routed(3, 20)
    validation[4] = chat(training[0]["messages"][1]["content"].upper() + " !", '{"intent": "Dim"}')
    test[7], test[9] = training[1], chat(validation[0]["messages"][1]["content"], '{"intent": "Dim"}', system=None)
    found = files(tmp_path, training=training, validation=validation, test=test)
    sets = read_sets(found["training"], found["validation"], found["test"])
    assert sets.validation.left_out == ("validation.jsonl:5",)
    assert sets.test is not None
    assert sets.test.left_out == ("test.jsonl:8", "test.jsonl:10")
    assert (len(sets.test.examples), sets.test.as_dict()["left_out"], sets.test.of) == (18, 2, 20)


def test_a_row_that_validation_was_left_without_is_none_for_the_test_either(tmp_path: Path) -> None:
    training, validation = routed(1, 30), routed(2, 20)
    validation[0] = training[0]
    found = files(tmp_path, training=training, validation=validation, test=[*routed(3, 20), validation[0]])
    sets = read_sets(found["training"], found["validation"], found["test"])
    assert sets.test is not None and sets.test.left_out == ("test.jsonl:21",)


def test_equal_questions_under_system_prompts_that_bring_other_sources_are_other_rows(tmp_path: Path) -> None:
    def asked(names: Sequence[str]) -> list[Any]:
        return [chat("What is it called?", name, system=f"The text says: it is called {name}.") for name in names]

    found = files(tmp_path, training=asked(words(1, 20)), validation=asked(words(2, 10)))
    assert len(read_sets(found["training"], found["validation"]).validation.examples) == 10


def test_an_empty_file_is_no_set(tmp_path: Path) -> None:
    training = write_jsonl(tmp_path / "training.jsonl", routed(1, 30))
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(DataInvalid, match="no rows"):
        read_sets(training, empty)


def test_a_digest_is_of_what_rows_say_and_of_no_form_or_order(tmp_path: Path) -> None:
    rows = routed(1, 12)
    pairs = [
        {"system": "Route.", "prompt": r["messages"][1]["content"], "completion": r["messages"][2]["content"]}
        for r in rows
    ]
    digests = {
        content_digest(example.row for example in load_examples(write_jsonl(tmp_path / f"{at}.jsonl", made)))
        for at, made in enumerate((rows, rows[::-1], pairs))
    }
    assert len(digests) == 1
    assert content_digest(part_of(tmp_path, rows[1:]).rows) not in digests


def test_only_some_rows_are_spread_evenly(tmp_path: Path) -> None:
    part = part_of(tmp_path, routed(1, 30))
    assert [example.row.place.line for example in part.first(3).examples] == [1, 11, 21]
    assert part.first(None) is part.first(99) is part


# Prompts


def kitchen_of(folder: Path, rows: Sequence[Any]) -> tuple[Kitchen, Part]:
    sets = sets_of(folder, rows, routed(9, 6))
    return Kitchen(sets.training, task_for(sets, None)), sets.validation


def test_examples_stand_between_the_system_prompt_and_the_question(tmp_path: Path) -> None:
    kitchen, validation = kitchen_of(tmp_path, routed(1, 30))
    prompt = kitchen.prompt(Recipe(examples=2), validation.examples[0], [0, 1])
    assert [message["role"] for message in prompt.messages] == ["system", *("user", "assistant") * 2, "user"]
    assert prompt.messages[0]["content"] == "Route."
    assert prompt.messages[2]["content"] == '{"intent": "Open"}'
    assert prompt.messages[-1] == validation.examples[0].messages[-1]


def test_the_same_examples_of_different_labels_are_shown_for_a_seed_and_other_ones_for_another(tmp_path: Path) -> None:
    training = sets_of(tmp_path, routed(1, 60), routed(9, 6))
    task = task_for(training, None)
    shown = [Kitchen(training.training, task, seed)._seeded[:3] for seed in (0, 0, 1)]
    assert shown[0] == shown[1] != shown[2]
    assert {training.training.expected[at] for at in shown[0]} == {
        f'{{"intent": "{x}"}}' for x in ("Open", "Close", "Dim")
    }


def test_the_examples_most_like_the_question_come_with_the_nearest_last(tmp_path: Path) -> None:
    rows = [*routed(1, 30), chat("please open the old garden gate", '{"intent": "Open"}')]
    kitchen, _ = kitchen_of(tmp_path, rows)
    asked = part_of(tmp_path, [chat("open the garden gate", '{"intent": "Open"}')], "asked")
    written = kitchen.write(Recipe(examples=4, pick="similar"), asked, lambda prompt: 1, 100)
    assert written.prompts[0].messages[-3]["content"] == "please open the old garden gate"
    assert len(written.prompts[0].messages) == 1 + 8 + 1


def test_texts_that_repeat_are_shown_once() -> None:
    found = Nearest(["open it", "open it", "open that", "close it"]).of(["open it"], 3)
    assert found[0][-1] == 0 and sorted(found[0]) == [0, 2, 3]


def test_labels_and_fields_of_the_training_rows_are_listed_in_the_system_prompt(tmp_path: Path) -> None:
    rows = [chat(f"{name} on", json.dumps({"intent": "On", "name": name})) for name in words(1, 8)]
    rows += [chat(f"{name} off", json.dumps({"intent": "Off", "floor": 1})) for name in words(2, 4)]
    kitchen, validation = kitchen_of(tmp_path, rows)
    prompt = kitchen.prompt(Recipe(lists_labels=True), validation.examples[0], [])
    assert prompt.messages[0]["content"] == (
        'Route.\n\nAnswer with one JSON object and nothing else. Its "intent" is one of: On, Off. Its other fields, '
        "where they apply, are: name, floor."
    )


def test_a_row_without_a_system_prompt_gets_one_only_where_there_is_something_to_say(tmp_path: Path) -> None:
    rows = [chat(f"is {name} good?", "yes" if at % 2 else "no", None) for at, name in enumerate(words(1, 20))]
    sets = sets_of(tmp_path, rows, [chat(f"is {name} good?", "yes", None) for name in words(2, 4)])
    kitchen = Kitchen(sets.training, task_for(sets, None))
    plain = kitchen.prompt(Recipe(), sets.validation.examples[0], [])
    listed = kitchen.prompt(Recipe(lists_labels=True), sets.validation.examples[0], [])
    assert [message["role"] for message in plain.messages] == ["user"]
    assert listed.messages[0] == {
        "role": "system",
        "content": "Answer with exactly one of these labels and nothing else: yes; no.",
    } or listed.messages[0]["content"].endswith("no; yes.")


def test_tools_that_are_called_are_listed_and_shown_as_calls(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}

    def called(city: str) -> dict[str, Any]:
        call = {"type": "function", "function": {"name": "weather", "arguments": json.dumps({"city": city})}}
        turns = [{"role": "user", "content": f"Weather in {city}?"}, {"role": "assistant", "tool_calls": [call]}]
        return {"messages": turns, "tools": [tool]}

    sets = sets_of(tmp_path, [called(city) for city in words(1, 10)], [called(city) for city in words(2, 4)])
    task = task_for(sets, None)
    assert (task.kind, task.label) == ("objects", "name")
    assert listing(sets.training.expected, task) == (
        "Answer with a tool call. The tools are: weather. Their arguments, where they apply, are: city."
    )
    prompt = Kitchen(sets.training, task).prompt(Recipe(examples=1), sets.validation.examples[0], [0])
    assert prompt.messages[1]["tool_calls"][0]["function"]["arguments"] == {"city": words(1, 1)[0]}
    assert prompt.tools is not None
    assert simple_rivals(sets, task)[0].name == MAJORITY


def test_examples_leave_out_reasoning_and_system_prompts_and_keep_the_turns_before(tmp_path: Path) -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello", "weight": 0},
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "<think>\nfour\n</think>\n\n4", "reasoning_content": "four"},
    ]
    row = part_of(tmp_path, [{"messages": turns}]).rows[0]
    assert as_turns(row) == [
        turns[1],
        {"role": "assistant", "content": "Hello"},
        turns[3],
        {"role": "assistant", "content": "4"},
    ]


def test_examples_go_the_least_alike_first_where_the_prompt_is_full_and_rows_are_counted(tmp_path: Path) -> None:
    kitchen, validation = kitchen_of(tmp_path, routed(1, 30))

    def tokens(prompt: Prompt) -> int:
        return len(prompt.messages)

    whole = kitchen.write(Recipe(examples=4, pick="similar"), validation, tokens, 10)
    cut = kitchen.write(Recipe(examples=4, pick="similar"), validation, tokens, 7)
    none = kitchen.write(Recipe(examples=4), validation, tokens, 1)
    assert (whole.left_out, cut.left_out, none.left_out) == (0, 6, 6)
    assert set(cut.tokens) == {6}
    assert cut.prompts[0].messages[1:] == whole.prompts[0].messages[5:]
    assert set(none.tokens) == {2}


def test_every_way_to_ask_is_tried_and_named_apart(tmp_path: Path) -> None:
    kitchen, _ = kitchen_of(tmp_path, routed(1, 30))
    recipes = kitchen.recipes((0, 4, 8), ("You route.",))
    assert len({recipe.name for recipe in recipes}) == len(recipes) == 2 + 2 * 2 * 2 + 1 + 2 * 2
    assert [Recipe.from_dict(recipe.as_dict()) for recipe in recipes] == recipes
    prose = sets_of(
        tmp_path, [chat(a, f"Once {b}.") for a, b in zip(words(1, 20), words(2, 20), strict=True)], routed(9, 3)
    )
    assert [recipe.name for recipe in Kitchen(prose.training, task_for(prose, None)).recipes()] == [
        "as the rows are",
        "8 examples by seed",
        "8 examples most like the question",
    ]


# Simple rivals


def right(answers: Sequence[str], part: Part) -> float:
    return float(np.mean([json.loads(a) == json.loads(b) for a, b in zip(answers, part.expected, strict=True)]))


def test_words_are_enough_where_a_word_decides_and_the_majority_is_a_third(tmp_path: Path) -> None:
    sets = sets_of(tmp_path, routed(1, 90), routed(2, 30))
    task = task_for(sets, None)
    rivals = {rival.name: right(rival.answers(sets.validation), sets.validation) for rival in simple_rivals(sets, task)}
    assert rivals == {MAJORITY: pytest.approx(1 / 3), LINEAR: 1.0}


def test_letters_decide_where_no_word_repeats(tmp_path: Path) -> None:
    def inflected(seed: int, count: int) -> list[Any]:
        return [
            chat(f"{w}{'ation' if at % 2 else 'edly'}", "noun" if at % 2 else "adverb")
            for at, w in enumerate(words(seed, count))
        ]

    sets = sets_of(tmp_path, inflected(1, 80), inflected(2, 20))
    linear = simple_rivals(sets, task_for(sets, None))[1]
    assert linear.answers(sets.validation) == sets.validation.expected


def test_one_label_leaves_the_majority_alone(tmp_path: Path) -> None:
    sets = sets_of(tmp_path, [chat(w, "yes") for w in words(1, 20)], [chat(w, "yes") for w in words(2, 8)])
    task = task_for(sets, None)
    assert task.kind == "labels"
    assert [rival.name for rival in simple_rivals(sets, task)] == [MAJORITY]
    assert simple_rivals(sets, task)[0].answers(sets.validation) == ["yes"] * 8


def test_free_text_has_no_simple_rival_and_it_is_said_why(tmp_path: Path) -> None:
    rows = [chat(a, f"Once {b} went out.") for a, b in zip(words(1, 20), words(2, 20), strict=True)]
    sets = sets_of(tmp_path, rows, rows[:3])
    task = task_for(sets, None)
    assert simple_rivals(sets, task) == []
    assert "free text" in str(why_none(sets, task))
    numbered = sets_of(
        tmp_path, [chat(w, json.dumps({"id": at})) for at, w in enumerate(words(1, 20))], [chat("x", '{"id": 99}')]
    )
    assert "--label" in str(why_none(numbered, task_for(numbered, None)))


# The ledger


def test_each_reading_is_counted_and_other_versions_comparisons_are_given_back(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "new" / "readings.jsonl")
    first = ledger.begin("test-a", "v1", "accuracy")
    assert (first.number, first.others) == (1, ())
    ledger.end(first, "test-a", 0.03)
    second = ledger.begin("test-a", "v2", "accuracy")
    assert [(look.subject, look.p) for look in second.others] == [("v1", 0.03)]
    again = Ledger(ledger.path).begin("test-a", "v1", "accuracy")
    assert again.number == 3
    assert [(look.subject, look.p) for look in again.others] == [("v2", 1.0)]
    assert ledger.begin("test-b", "v1", "accuracy").number == 1
    assert ledger.begin("test-a", "v1", "accuracy").number == 3 + 1


def test_a_reading_that_was_cut_off_counts_and_takes_back_no_earlier_find(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "readings.jsonl")
    ledger.end(ledger.begin("test", "v1", "accuracy"), "test", 0.01)
    ledger.begin("test", "v1", "accuracy")
    found = ledger.begin("test", "v2", "accuracy")
    assert found.number == 3
    assert [(look.subject, look.p) for look in found.others] == [("v1", 0.01)]


def test_a_line_torn_at_any_byte_costs_that_line_alone(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "readings.jsonl")
    ledger.end(ledger.begin("test", "v1", "accuracy"), "test", 0.01)
    whole = ledger.path.read_bytes()
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    for cut in (last, last + 1, last + 20, len(whole) - 2):
        ledger.path.write_bytes(whole[:cut])
        reading = ledger.begin("test", "v2", "accuracy")
        assert (reading.number, reading.torn_lines) == (2, int(cut > last))
        assert [look.p for look in reading.others] == [1.0]
        assert ledger.begin("test", "v3", "accuracy").number == 3


def test_processes_that_read_together_are_all_counted(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from training.baseline.ledger import Ledger\n"
        "for _ in range(5): print(Ledger(Path(sys.argv[1])).begin('test', 'v1', 'accuracy').number)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "readings.jsonl")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    numbers = [int(line) for process in running for line in process.communicate()[0].split()]
    assert sorted(numbers) == list(range(1, 16))


def test_a_reading_that_cannot_be_written_down_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigInvalid, match="--ledger"):
        Ledger(tmp_path / "file" / "readings.jsonl").begin("test", "v1", "accuracy")


# The verdict


def paired(differences: Sequence[float], clusters: Sequence[Any] | None = None) -> Paired:
    """Right or wrong answers with these differences."""
    row = np.asarray(differences, dtype=np.float64)
    ours, theirs = Measure("accuracy", (row > 0).astype(float)), Measure("accuracy", (row < 0).astype(float))
    return Paired(ours, theirs, list(range(len(row))) if clusters is None else clusters)


def compared(differences: Sequence[float], clusters: Sequence[Any] | None = None) -> dict[str, Any]:
    """The difference of the same answers as a report has it."""
    both = paired(differences, clusters)
    return difference(both.ours, both.theirs, Grouping(both.clusters))


def outcomes(wins: int, losses: int, rows: int) -> list[float]:
    return [1.0] * wins + [-1.0] * losses + [0.0] * (rows - wins - losses)


@pytest.mark.parametrize(
    ("wins", "losses", "word"),
    [(60, 10, WORTH_IT), (0, 60, NOT_WORTH_IT), (2, 6, NOT_WORTH_IT), (14, 8, CANNOT_TELL)],
)
def test_the_whole_interval_has_to_lie_on_one_side_of_the_margin(wins: int, losses: int, word: str) -> None:
    judged = judge(paired(outcomes(wins, losses, 200)), MARGIN)
    assert judged.verdict == word, judged
    assert judged.difference == pytest.approx((wins - losses) / 200)
    assert (judged.rows_needed is None) == (word != CANNOT_TELL)


def test_rows_without_any_difference_are_no_certainty_where_they_are_few() -> None:
    assert judge(paired(outcomes(0, 0, 60)), MARGIN).verdict == CANNOT_TELL
    assert judge(paired(outcomes(0, 0, 1000)), MARGIN).verdict == NOT_WORTH_IT


def test_the_rows_needed_are_those_of_the_discordance_the_gap_and_the_design_effect() -> None:
    alone = judge(paired(outcomes(16, 4, 200)), MARGIN)
    assert alone.discordance == pytest.approx(0.1)
    assert alone.rows_needed == pytest.approx(7.849 * (0.1 - 0.06**2) / 0.04**2, abs=1)
    fives = judge(paired(np.repeat(outcomes(16, 4, 200), 5), np.repeat(np.arange(200), 5)), MARGIN)
    assert fives.design_effect == pytest.approx(5)
    assert fives.rows_needed == pytest.approx(5 * alone.rows_needed, abs=5)
    assert fives.clusters_needed == pytest.approx(alone.rows_needed, abs=2)


def test_a_difference_on_the_margin_is_told_by_no_number_of_rows() -> None:
    judged = judge(paired(outcomes(10, 6, 200)), MARGIN)
    assert (judged.verdict, judged.rows_needed) == (CANNOT_TELL, None)
    assert "no number of rows" in judged.why


@pytest.mark.parametrize(("clusters", "word"), [(19, CANNOT_TELL), (20, WORTH_IT)])
def test_under_twenty_clusters_nothing_is_told_however_clear_it_looks(clusters: int, word: str) -> None:
    judged = judge(paired([1.0] * 400, np.arange(400) % clusters), MARGIN)
    assert judged.verdict == word
    assert judged.clusters == clusters
    if word == CANNOT_TELL:
        assert judged.clusters_needed is not None and judged.clusters_needed >= 20
        assert "under 20" in judged.why


def test_each_further_version_on_the_same_rows_asks_for_more() -> None:
    close = paired(outcomes(27, 9, 200))
    alone, fifth = judge(close, MARGIN), judge(close, MARGIN, [1.0, 0.6, 0.9, 0.8])
    assert (alone.verdict, fifth.verdict) == (WORTH_IT, CANNOT_TELL)
    assert fifth.p_corrected == pytest.approx(5 * alone.p)
    assert fifth.level == pytest.approx(1 - 0.05 / 5)
    assert fifth.low < alone.low
    assert judge(close, MARGIN, [1e-6] * 4).level == pytest.approx(0.95)


def test_a_true_difference_on_the_margin_is_told_wrongly_as_seldom_as_it_says() -> None:
    """Two and a half percent to each side; 300 runs have a standard error of 0.9%."""
    generator, told = np.random.default_rng(1), {WORTH_IT: 0, NOT_WORTH_IT: 0, CANNOT_TELL: 0}
    for _ in range(300):
        clusters = np.repeat(np.arange(40), 4)
        shift = generator.normal(0.0, 0.15, 40)[clusters]
        draws = generator.random(160)
        up = 0.16 + MARGIN / 2 + shift / 2
        differences = np.where(draws < up, 1.0, np.where(draws > 1 - (0.16 - MARGIN / 2 - shift / 2), -1.0, 0.0))
        told[judge(paired(differences, clusters), MARGIN).verdict] += 1
    assert told[WORTH_IT] <= 15 and told[NOT_WORTH_IT] <= 15, told


def test_macro_f1_is_judged_by_draws_of_clusters_with_each_labels_share_kept() -> None:
    names = [str(at % 5) for at in range(200)]
    wrong = [name if at % 3 else "0" for at, name in enumerate(names)]
    good, bad = (
        next(m for m in Labelled.of(names, given).measures() if m.name == "macro_f1") for given in (names, wrong)
    )
    judged = judge(Paired(good, bad, list(range(200)), names), MARGIN)
    assert judged.verdict == WORTH_IT
    assert judged.difference == pytest.approx(1 - bad.value)
    assert judge(Paired(good, good, list(range(200)), names), MARGIN).difference == 0.0


def test_the_simpler_one_is_enough_where_the_other_is_not_better_by_the_margin() -> None:
    assert enough(compared(outcomes(0, 3, 1000)), MARGIN) is True
    assert enough(compared(outcomes(300, 3, 1000)), MARGIN) is False
    assert enough(compared(outcomes(3, 1, 100)), MARGIN) is None
    assert enough(compared(outcomes(0, 0, 1000), np.arange(1000) % 19), MARGIN) is None
