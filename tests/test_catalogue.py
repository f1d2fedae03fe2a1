"""The catalogue of bad input and faults, held against the tests: every row has one that is named after it."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent
ROW = re.compile(r"^\| ([UAISFP]\d+b?) \|", re.MULTILINE)
NAMED = re.compile(r"def test_((?:[uaisfp]\d+b?_)+)")


def rows() -> list[str]:
    return ROW.findall((ROOT.parent / "docs" / "hostile.md").read_text())


def named_in_tests() -> set[str]:
    texts = (path.read_text() for path in ROOT.rglob("test_*.py"))
    return {name for text in texts for names in NAMED.findall(text) for name in names.strip("_").split("_")}


def test_every_row_has_a_test_of_its_name_and_every_name_a_row() -> None:
    assert {row.lower() for row in rows()} == named_in_tests()


def test_no_row_is_there_twice() -> None:
    assert len(rows()) == len(set(rows())) > 60
