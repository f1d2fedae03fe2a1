"""Swear words of the data's languages, and labels that go with one group's words."""

from __future__ import annotations

import json
import random
import unicodedata
from pathlib import Path

import pytest

from tests.training.conftest import chat, write_jsonl
from training.gate import bias, toxicity
from training.gate.bias import associations, groups_in
from training.gate.check import Asked, check
from training.gate.toxicity import LISTED, OWN_LIST, Profanity, own_words


@pytest.mark.parametrize(
    ("languages", "text", "words"),
    [
        (["en"], "What the FUCK is this", ["fuck"]),
        (["en"], "what a sh1t lamp", ["sh1t"]),
        (["en"], "assess the class in Scunthorpe, Middlesex, and pass the cockpit", []),
        (["en"], "room 10 at 3:45, mail a0@b1.io, v2.0", []),
        (["de"], "so eine Scheiße", ["scheisse"]),
        (["en"], "so eine Scheiße", []),
        (["vi"], "đồ chó má, im đi", ["chó má"]),
        (["vi"], "Địt mẹ cái đèn này", ["địt"]),
        (["vi"], "cho tôi một cái lồng và hạt óc chó, má ơi", []),
        (["ru"], "это хуй", ["хуй"]),
        (["zh"], "这是他妈的灯", ["他妈的"]),
    ],
)
def test_swear_words_are_found_in_their_language_as_whole_words(
    languages: list[str], text: str, words: list[str]
) -> None:
    assert Profanity(languages).of(text) == words


def test_letters_in_parts_are_the_same_letters() -> None:
    assert Profanity(["vi"]).of(unicodedata.normalize("NFD", "cái đèn như lồn")) == ["lồn"]


def test_the_library_has_a_list_for_every_language_that_is_claimed() -> None:
    from glin_profanity import Filter

    sizes = {code: len(Filter({"languages": [name]}).words) for code, name in LISTED.items()}
    assert len(sizes) == 24 and min(sizes.values()) > 10


def test_the_vietnamese_list_names_its_source_and_is_composed() -> None:
    text = (Path(toxicity.__file__).parent / OWN_LIST).read_text("utf-8")
    assert "MIT License" in text and "vn-badwords" in text
    assert unicodedata.is_normalized("NFC", text) and len(own_words()) == len(set(own_words())) == 35


def test_the_report_says_which_lists_were_used_and_which_languages_have_none(tmp_path: Path) -> None:
    sentences = ("Καλημέρα, πώς είσαι σήμερα στο σπίτι;", "Άναψε το φως στην κουζίνα σε παρακαλώ πολύ.")
    vietnamese = ("Hãy bật đèn trong phòng khách lên giúp tôi nhé.", "Hôm nay trời đẹp quá, chúng ta đi chơi thôi.")
    rows = [chat(f"{text} {n}", text, None) for n in range(10) for text in (*sentences, *vietnamese)]
    report = check(Asked(write_jsonl(tmp_path / "data.jsonl", rows)))
    assert report.figures["profanity"] == {"languages": ["en", "vi"], "without_list": ["el"]}
    note = next(row for row in report.findings if row["code"] == "toxicity_unchecked")
    assert note["level"] == "note" and note["detail"].endswith("in en, vi; no list for el")


def test_a_label_that_goes_with_one_group_is_listed_with_its_counts() -> None:
    questions = [f"the muslim said {n}" for n in range(20)] + [f"somebody said {n}" for n in range(80)]
    labels = ["toxic"] * 18 + ["fine"] * 2 + ["toxic"] * 10 + ["fine"] * 70
    (found,) = associations(questions, labels)
    assert (found.label, found.group, found.together, found.of_group, found.of_label) == (
        "toxic",
        "Muslims",
        18,
        20,
        28,
    )
    assert found.p < 1e-6 and found.log_odds > 3


def test_fishers_test_is_scipys() -> None:
    from scipy.stats import fisher_exact

    questions = [f"an old man said {n}" for n in range(12)] + [f"somebody said {n}" for n in range(88)]
    labels = ["a"] * 9 + ["b"] * 3 + ["a"] * 11 + ["b"] * 77
    found = {one.group: one for one in associations(questions, labels)}
    table = [[9, 3], [11, 77]]
    # Two tables were tested: old people with a; "old man" is no word for men alone.
    assert found["old people"].p == pytest.approx(fisher_exact(table, alternative="greater").pvalue)


def test_rows_of_one_template_count_once() -> None:
    questions = ["the muslim said <number>"] * 50 + [f"somebody said {n}" for n in range(80)]
    assert associations(questions, ["toxic"] * 50 + ["fine"] * 80) == []


def test_no_association_is_found_in_random_labels() -> None:
    rng = random.Random(3)
    words = json.loads((Path(bias.__file__).parent / bias.GROUP_WORDS).read_text("utf-8"))
    groups = [word for languages in words.values() for listed in languages.values() for word in listed]
    questions = [f"{rng.choice(groups)} {n}" for n in range(2000)]
    # Twenty draws, each wrong with a chance of 1% at most: four wrong ones come once in 30,000.
    wrong = sum(bool(associations(questions, [rng.choice("abcd") for _ in questions])) for _ in range(20))
    assert wrong < 4


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("a black cat and a white wall", set()),
        ("two black women", {"Black people"}),
        ("người hồi giáo và phụ nữ", {"Muslims", "women"}),
        ("die frauen und die muslime", {"Muslims", "women"}),
        ("las mujeres judías", {"women"}),
        ("the manager mentions a humane sheep", set()),
    ],
)
def test_group_words_are_whole_words_of_five_languages(text: str, groups: set[str]) -> None:
    assert groups_in(text) == groups
