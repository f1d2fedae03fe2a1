"""Some of many, so that they stand for all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

Value = TypeVar("Value")


def evenly(values: Sequence[Value], most: int) -> list[Value]:
    """At most so many of them, evenly spread."""
    stride = max(1.0, len(values) / most)
    return [values[int(index * stride)] for index in range(min(most, len(values)))]
