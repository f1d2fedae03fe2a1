"""Some of many, so that they stand for all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import TypeVar

Value = TypeVar("Value")


def evenly(values: Sequence[Value], most: int) -> list[Value]:
    """At most so many of them, evenly spread."""
    stride = max(1.0, len(values) / most)
    return [values[int(index * stride)] for index in range(min(most, len(values)))]


def label_by_label(order: Sequence[int], labels: Sequence[Hashable]) -> list[int]:
    """These places, one of each label before a second one of any, and else in their order."""
    seen: Counter[Hashable] = Counter()
    rounds: dict[int, int] = {}
    for at in order:
        rounds[at] = seen[labels[at]]
        seen[labels[at]] += 1
    return sorted(order, key=rounds.__getitem__)
