"""Answers that are labels: F1 by label and over labels, what was taken for what, and answers that are no label at all.

For label l: precision = right / given, recall = right / wanted, F1 = 2 right / (given + wanted); 0 where it was neither
given nor wanted. Macro-F1 is the mean over the labels that are wanted, weighted-F1 the mean by how often they are,
micro-F1 is 2 right / (all labels given + all wanted). An answer that is no known label is wanted and not given: it
lowers recall, and is counted as invalid.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from training.metrics.measure import Floats, Integers, Measure
from training.scores import parse_answer, spoken

NO_LABEL = "(none)"  # of an object without the field
INVALID = -1
AVERAGES = ("macro_f1", "micro_f1", "weighted_f1")


@dataclass(frozen=True)
class Labelled:
    """`names` of all known labels, the most wanted first; `right` and `given` (rows,) number them, -1 is no label."""

    names: tuple[str, ...]
    right: Integers
    given: Integers

    @classmethod
    def of(
        cls, expected: Sequence[str], answers: Sequence[str], field: str = "", known: Collection[str] = ()
    ) -> Labelled:
        """The labels in texts: each whole text, or one field of its JSON. `known` are labels beside those expected."""
        wanted = [label_in(text, field) for text in expected]
        counts = Counter(label for label in wanted if label is not None)
        names = (*sorted(counts, key=lambda name: (-counts[name], name)), *sorted(set(known) - set(counts)))
        number = {name: index for index, name in enumerate(names)}
        given = [label_in(text, field) for text in answers]
        return cls(names, _numbered(wanted, number), _numbered(given, number))

    @property
    def is_right(self) -> Floats:
        """(rows,) 1.0 where the label is the wanted one."""
        return np.asarray((self.right == self.given) & (self.right >= 0), dtype=np.float64)

    @property
    def is_invalid(self) -> Floats:
        return (self.given < 0).astype(np.float64)

    def counts(self, indices: Integers | None = None) -> tuple[Floats, Floats, Floats]:
        """(labels,) each: how often right, given and wanted."""
        right, given = (self.right, self.given) if indices is None else (self.right[indices], self.given[indices])
        size = len(self.names)
        return _count(right[right == given], size), _count(given, size), _count(right, size)

    def f1(self, average: str, indices: Integers | None = None) -> float:
        """`macro_f1`, `micro_f1` or `weighted_f1`."""
        right, given, wanted = self.counts(indices)
        if average == "micro_f1":
            return _ratio(2 * right.sum(), given.sum() + wanted.sum())
        each = _each(2 * right, given + wanted)
        weights = (wanted > 0).astype(np.float64) if average == "macro_f1" else wanted
        return _ratio(float((each * weights).sum()), float(weights.sum()))

    def measures(self) -> list[Measure]:
        """Accuracy, the three averages of F1, and the share of invalid answers."""
        is_right = self.is_right
        averaged = [Measure(name, is_right, self._statistic(name)) for name in AVERAGES]
        return [
            Measure("accuracy", is_right),
            *averaged,
            Measure("invalid", self.is_invalid, less_is_better=True),
        ]

    def _statistic(self, average: str) -> Callable[[Integers], float]:
        return lambda indices: self.f1(average, indices)

    def table(self) -> list[dict[str, Any]]:
        """Of each label that is wanted or given: rows, precision, recall, F1; the most wanted first."""
        right, given, wanted = self.counts()
        precision, recall = _each(right, given), _each(right, wanted)
        f1 = _each(2 * right, given + wanted)
        return [
            {
                "label": name,
                "rows": int(wanted[at]),
                "given": int(given[at]),
                "precision": round(float(precision[at]), 6),
                "recall": round(float(recall[at]), 6),
                "f1": round(float(f1[at]), 6),
            }
            for at, name in enumerate(self.names)
            if wanted[at] or given[at]
        ]

    def confusion(self) -> list[dict[str, Any]]:
        """Each pair of labels that occurs, with its rows, the most frequent first; `given` is None for no label."""
        pairs = Counter(zip(self.right.tolist(), self.given.tolist(), strict=True))
        return [
            {"expected": self._name(right), "given": self._name(given), "rows": rows}
            for (right, given), rows in sorted(pairs.items(), key=lambda pair: (-pair[1], pair[0]))
        ]

    def _name(self, number: int) -> str | None:
        return self.names[number] if number >= 0 else None


def label_in(text: str, field: str) -> str | None:
    """The label that a text is, or that its object has in `field`; None where there is none to read."""
    if not field:
        return spoken(text) or None
    value = parse_answer(text)
    if value is None:
        return None
    label = value.get(field, NO_LABEL)
    return label if isinstance(label, str) else json.dumps(label, sort_keys=True)


def _numbered(labels: Sequence[str | None], number: Mapping[str, int]) -> Integers:
    found = [INVALID if label is None else number.get(label, INVALID) for label in labels]
    return np.asarray(found, dtype=np.int64)


def _count(numbers: Integers, size: int) -> Floats:
    return np.bincount(numbers[numbers >= 0], minlength=size).astype(np.float64)


def _each(above: Floats, below: Floats) -> Floats:
    return np.divide(above, below, out=np.zeros_like(above), where=below > 0)


def _ratio(above: float, below: float) -> float:
    return float(above / below) if below else 0.0
