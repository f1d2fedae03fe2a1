"""How well one figure parts two kinds."""

from __future__ import annotations

from numpy.typing import ArrayLike
from scipy.stats import rankdata

from training.statistics.clusters import finite


def auc(positives: ArrayLike, negatives: ArrayLike) -> float:
    """The chance that a positive lies above a negative, ties counting half (Mann-Whitney); 0.5 tells nothing."""
    above, below = finite(positives), finite(negatives)
    if not len(above) or not len(below):
        raise ValueError("both kinds are needed")
    ranks = rankdata([*above, *below])[: len(above)]
    return float((ranks.sum() - len(above) * (len(above) + 1) / 2) / (len(above) * len(below)))
