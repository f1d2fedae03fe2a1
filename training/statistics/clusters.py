"""Items by the cluster that they belong to."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

FEWEST_CLUSTERS = 20  # below, intervals from clusters miss the truth too often to be told from
Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Clusters = Sequence[Hashable] | NDArray[np.generic]


@dataclass(frozen=True)
class Grouped:
    """Items in clusters: `codes` (items,) numbers each item's cluster from 0, `sizes` (clusters,) counts them."""

    codes: Integers
    sizes: Floats

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def effective(self) -> float:
        """How many clusters of one size would tell as much (Kish): (sum n_c)^2 / sum n_c^2."""
        return effective(self.sizes)

    def sums(self, values: Floats) -> Floats:
        """(clusters,): the sum of the values in each."""
        return np.bincount(self.codes, weights=values, minlength=len(self)).astype(np.float64)

    def members(self) -> list[Integers]:
        """The indices of the items in each cluster."""
        order = np.argsort(self.codes, kind="stable")
        return np.split(order, np.cumsum(self.sizes[:-1]).astype(np.int64))


def grouped(count: int, clusters: Clusters | None) -> Grouped:
    """`count` items by the names of their clusters, in the order of their first items; None makes each its own.

    Raises ValueError where the two do not go together, or there is no item.
    """
    if count < 1:
        raise ValueError("there is no item to compute from")
    if clusters is None:
        return Grouped(np.arange(count), np.ones(count))
    if len(clusters) != count:
        raise ValueError(f"{len(clusters)} names of clusters for {count} items")
    seen: dict[Hashable, int] = {}
    codes = np.array([seen.setdefault(name, len(seen)) for name in clusters], dtype=np.int64)
    return Grouped(codes, np.bincount(codes).astype(np.float64))


def effective(sizes: Floats) -> float:
    """How many clusters of one size tell as much of a mean as clusters of these sizes."""
    return float(sizes.sum() ** 2 / (sizes**2).sum())


def finite(values: ArrayLike) -> Floats:
    """The values as one row of floats; raises ValueError where one is no number."""
    row = np.asarray(values, dtype=np.float64).reshape(-1)
    if not np.isfinite(row).all():
        raise ValueError(f"{int((~np.isfinite(row)).sum())} of {len(row)} values are not finite")
    return row
