"""Paired differences, tested by turning the signs of whole clusters: what chance alone would have made of them."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from training.statistics.clusters import Clusters, Floats, finite, grouped

EXACT_CLUSTERS = 14  # all 2^14 signs are tried up to here
FLIPS = 10_000
CELLS = 4_000_000  # signs that are held at a time
ROUNDING = 1e-9


def flip_p(differences: ArrayLike, clusters: Clusters | None = None, seed: int = 0) -> float:
    """The two-sided p of the mean being zero: exact where few clusters differ, else by 10,000 random flips."""
    row = finite(differences)
    sums = grouped(len(row), clusters).sums(row)
    sums = sums[sums != 0]
    if not len(sums):
        return 1.0
    # Sums of floats in another order are not the same bits, and ties must count.
    reached = abs(float(sums.sum())) - ROUNDING * float(np.abs(sums).sum())
    if len(sums) <= EXACT_CLUSTERS:
        signs = (np.arange(2 ** len(sums))[:, None] >> np.arange(len(sums)) & 1) * 2.0 - 1
        return float((np.abs(signs @ sums) >= reached).mean())
    return (1 + _reaching(sums, reached, seed)) / (1 + FLIPS)


def _reaching(sums: Floats, reached: float, seed: int) -> int:
    generator = np.random.default_rng(seed)
    size = max(1, CELLS // len(sums))
    count = 0
    for start in range(0, FLIPS, size):
        kept = generator.integers(0, 2, (min(size, FLIPS - start), len(sums)), dtype=np.int8).astype(np.float64)
        count += int((np.abs(2 * (kept @ sums) - sums.sum()) >= reached).sum())
    return count
