"""Answers that are JSON objects or tool calls: whether they parse, and how many of their fields are right."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from training.metrics.measure import Integers, Measure
from training.scores import fields, is_equal, parse_answer

Field = tuple[str, str]


def exact_match(expected: Sequence[str], answers: Sequence[str]) -> Measure:
    """1 where the answer is the expected text, or the expected object whatever the order of its keys."""
    scores = [float(is_equal(right, answer)) for right, answer in zip(expected, answers, strict=True)]
    return Measure("exact_match", np.asarray(scores))


def json_valid(answers: Sequence[str]) -> Measure:
    """1 where the answer is one JSON object, or tool calls that parse."""
    return Measure("json_valid", np.asarray([float(parse_answer(answer) is not None) for answer in answers]))


def field_f1(expected: Sequence[str], answers: Sequence[str], label: str = "") -> Measure:
    """F1 over fields that are right by name, value and type, the label left out; of all rows it is micro-averaged.

    A row without fields on either side has no mistake.
    """
    counts = np.array(
        [
            _shared(fields(parse_answer(right), label), fields(parse_answer(answer), label))
            for right, answer in zip(expected, answers, strict=True)
        ],
        dtype=np.float64,
    )
    shared, both = counts[:, 0], counts[:, 1]
    scores = np.divide(2 * shared, both, out=np.ones_like(shared), where=both > 0)

    def corpus(indices: Integers) -> float:
        total = float(both[indices].sum())
        return float(2 * shared[indices].sum()) / total if total else 1.0

    return Measure("field_f1", scores, corpus)


def has_fields(expected: Sequence[str], label: str) -> bool:
    """Whether some expected object has a field beside its label."""
    return any(fields(parse_answer(text), label) for text in expected)


def _shared(right: set[Field], answer: set[Field]) -> tuple[int, int]:
    return len(right & answer), len(right) + len(answer)
