"""The page's table of what goes wrong elsewhere: every row names a test, and that test is there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def rows() -> list[str]:
    text = (ROOT / "docs" / "training.md").read_text("utf-8")
    section = text.partition("## What goes wrong elsewhere")[2].partition("\n## ")[0]
    return [line for line in section.splitlines() if line.startswith("| ")][1:]


def test_every_trap_has_a_test_that_is_there() -> None:
    texts = [path.read_text("utf-8") for path in (ROOT / "tests").rglob("test_*.py")]
    there = {name for text in texts for name in re.findall(r"^def (test_\w+)\(", text, re.MULTILINE)}
    named = [re.findall(r"`(test_\w+)` \|$", row) for row in rows()]
    assert len(named) > 20
    assert all(len(names) == 1 and names[0] in there for names in named), named
