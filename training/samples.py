"""Right and wrong answers for a card: a few rows that a person can read, less those that hold something private."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from training.compare import Comparison, Measured
from training.data.rows import Row
from training.gate.privacy import matches
from training.gate.subject import question
from training.scores import score

LONGEST = 600  # letters of a question or an answer


def samples_of(comparison: Comparison, owners: Sequence[Row], adapter: Measured, most: int) -> dict[str, Any] | None:
    """At most so many right and so many wrong answers of the adapter; None where none were asked for or given."""
    if not most or not adapter.answers:
        return None
    made: dict[str, Any] = {"right": [], "wrong": [], "left_out_private": 0}
    for index, expected, answer in zip(comparison.asked, comparison.expected, adapter.answers, strict=False):
        kind = "right" if score([expected], [answer]).exact_match else "wrong"
        asked = question(owners[index])
        if any(matches(text) for text in (asked, expected, answer)):
            made["left_out_private"] += 1
        elif len(made[kind]) < most:
            made[kind].append({"question": _short(asked), "expected": _short(expected), "answer": _short(answer)})
    return made


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
