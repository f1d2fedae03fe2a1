"""How many rows would be enough to tell a difference from a margin."""

from __future__ import annotations

import math

from numpy.typing import ArrayLike
from scipy.stats import norm

from training.statistics.clusters import Clusters, finite, grouped


def design_effect(values: ArrayLike, clusters: Clusters | None = None) -> float:
    """How many times larger the variance of the mean is than of rows without clusters; at least 1.

    var_clusters / var_rows = sum_c (s_c - n_c mean)^2 / sum_i (x_i - mean)^2
    """
    row = finite(values)
    groups = grouped(len(row), clusters)
    off = row - row.mean()
    alone = float((off**2).sum())
    return max(1.0, float((groups.sums(off) ** 2).sum()) / alone) if alone > 0 else 1.0


def rows_needed(
    discordance: float,
    gap: float,
    design_effect: float = 1.0,
    difference: float = 0.0,
    power: float = 0.8,
    level: float = 0.95,
) -> int:
    """Rows at which an interval of `level` leaves a margin out that lies `gap` from the true difference.

    n = design effect * (z_level + z_power)^2 * (discordance - difference^2) / gap^2

    `discordance` is the mean squared difference: for answers that are right or wrong the share of rows on which the two
    disagree. Connor, Biometrics 43 (1987). Raises ValueError where the gap is not above 0.
    """
    if not gap > 0:
        raise ValueError(f"no number of rows tells a difference from a margin that is {gap} away")
    reach = float(norm.isf((1 - level) / 2) + norm.isf(1 - power))
    variance = max(0.0, discordance - difference**2)
    return max(1, math.ceil(max(1.0, design_effect) * reach**2 * variance / gap**2))
