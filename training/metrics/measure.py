"""One metric on one set of answers: a score of each row, and the figure of any draw of rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Measure:
    """`scores` (rows,) are what single rows are ranked and paired by; the figure is their mean, or `corpus` makes it.

    That takes the indices of rows, each as often as it was drawn. `signature` says how a library computed it.
    """

    name: str
    scores: Floats
    corpus: Callable[[Integers], float] | None = field(default=None, compare=False)
    signature: str = ""
    less_is_better: bool = False
    bounds: tuple[float, float] | None = (0.0, 1.0)  # that a score can have; None where it has no ends

    @property
    def is_mean(self) -> bool:
        """Whether the figure is the mean of the scores."""
        return self.corpus is None

    @property
    def value(self) -> float:
        """The figure of all rows."""
        return self.of(np.arange(len(self.scores)))

    def of(self, indices: Integers) -> float:
        """The figure of these rows."""
        return float(self.scores[indices].mean()) if self.corpus is None else float(self.corpus(indices))
