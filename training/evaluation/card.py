"""What a run's card takes of an evaluation: figures with intervals, as plain values without texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from training.data.rows import Row
from training.evaluation.report import Answered, Asked, Choice, made
from training.evaluation.similarity import Nearness


def figures_of(
    rows: Sequence[Row],
    expected: Sequence[str],
    answers: Sequence[str],
    base_answers: Sequence[str],
    near: Nearness | None,
    label: str | None,
) -> dict[str, Any]:
    """Figures of answers to rows, paired against the base's, and by distance from the rows trained on.

    `label` is the field that is the label, "" where the whole answer is; None finds it in the expected answers.
    """
    asked = Asked.of(rows, expected)
    rivals = [Answered("base", base_answers)]
    answered = Answered("adapter", answers)
    return made({"grouped_by": "template"}, asked, answered, rivals, Choice(label), near).summary()
