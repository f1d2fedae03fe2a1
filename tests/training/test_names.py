"""Names, where a recogniser is there: a small one of the tests' own, and the real ones where they are installed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from adapters.errors import ConfigInvalid
from tests.training.conftest import chat, write_jsonl
from training.cleaning.run import CleanAsked, clean
from training.gate.check import read
from training.gate.names import Recogniser, installed, named, names_in, spans
from training.gate.privacy import Match
from training.gate.report import Report


def listed(language: str, **words: str) -> Recogniser:
    """Finds the words that it is told of."""

    def find(text: str) -> list[Match]:
        return [
            Match(code, f"told ({language})", *found.span())
            for code, word in words.items()
            for found in re.finditer(re.escape(word), text)
        ]

    return Recogniser(language, "a list", find)


ENGLISH = listed("en", person_name="Ann Lee", place_name="Baker Street")
VIETNAMESE = listed("vi", person_name="Nguyễn Văn An")


def test_names_are_found_by_the_recogniser_of_the_texts_language(tmp_path: Path) -> None:
    rows = [chat("Ann Lee of Baker Street", "ok"), chat("gặp Nguyễn Văn An", "ok"), chat("gặp Ann Lee ở đây", "ok")]
    subject = read(write_jsonl(tmp_path / "data.jsonl", rows), ())
    figures, findings = named(subject, [ENGLISH, VIETNAMESE])
    counts = {finding.code: finding.count for finding in findings}
    assert counts == {"person_name": 2, "place_name": 1, "names_unchecked": 0}
    assert figures == {"recognisers": {"en": "a list", "vi": "a list"}, "sampled_rows": 3}
    shown = json.dumps(Report.made({}, figures, findings, {}).as_dict(), ensure_ascii=False)
    assert "Ann Lee" not in shown and "An… (7 letters)" in shown


def test_without_a_recogniser_it_is_said_that_nobody_looked(tmp_path: Path) -> None:
    subject = read(write_jsonl(tmp_path / "data.jsonl", [chat("Ann Lee", "ok")]), ())
    figures, (finding,) = named(subject, [])
    assert finding.code == "names_unchecked" and "no recogniser is installed" in finding.detail
    assert figures == {"recognisers": {}, "sampled_rows": 0}


def test_places_with_a_comma_between_them_are_one_address() -> None:
    text = "ở số 12 Lê Lợi, quận 1, gặp Nguyễn Văn An"
    tokens = [("ở", "O"), ("số", "B-LOC"), ("12", "I-LOC"), ("Lê Lợi", "B-LOC"), (",", "O"), ("quận", "B-LOC")]
    tokens += [("1", "I-LOC"), (",", "O"), ("gặp", "O"), ("Nguyễn Văn An", "B-PER")]
    place = Recogniser("vi", "tags", lambda said: list(spans(said, tokens)))
    found = names_in(text, [place])
    assert [(match.code, text[match.start : match.end]) for match in found] == [
        ("place_name", "số 12 Lê Lợi, quận 1"),
        ("person_name", "Nguyễn Văn An"),
    ]


def test_names_are_masked_where_a_recogniser_is_there_and_refused_where_none_is(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", [chat("Ann Lee asks", "Yes, Ann Lee: ann@corp.io")])
    mask = ("person_name", "email_address")
    clean(CleanAsked(data, tmp_path / "out.jsonl", mask, recognisers=(ENGLISH,)))
    text = (tmp_path / "out.jsonl").read_text("utf-8")
    assert len(re.findall(r"<person_name-[0-9a-f]{10}>", text)) == 2 and "Ann" not in text
    with pytest.raises(ConfigInvalid, match="none is installed"):
        clean(CleanAsked(data, tmp_path / "two.jsonl", mask, recognisers=()))


@pytest.mark.parametrize(
    ("language", "text", "name"),
    [
        ("en", "my name is Jonathan Miller and I live in London", "Jonathan Miller"),
        ("vi", "Tôi là Nguyễn Văn An, nhà ở số 12 đường Lê Lợi", "Nguyễn Văn An"),
    ],
)
def test_an_installed_recogniser_finds_a_name(language: str, text: str, name: str) -> None:
    there = [one for one in installed() if one.language == language]
    if not there:
        pytest.skip(f"no recogniser for {language} is installed")
    found = [text[match.start : match.end] for match in names_in(text, there) if match.code == "person_name"]
    assert found == [name]
