"""Intervals by the bootstrap over clusters: of a mean, and of any statistic of the items.

A mean is drawn by the Bayesian bootstrap (Rubin 1981): with e_c ~ Exp(1) for each cluster c of size n_c and sum s_c,

    one draw = (sum_c e_c s_c + sum_b g_b n b) / (sum_c e_c n_c + sum_b g_b n),   g_b ~ Gamma(1/2)

where b are the two ends that a value can have, where they are known, and n is the mean size. The ends stand for what
so few clusters did not show: for rows of 0 and 1 that is Jeffreys' interval of a share, so twenty right answers of
twenty are no certainty. Other statistics are drawn by the plain bootstrap of clusters, within strata. In both the
quantiles are pushed out as far as Student's t is wider than the normal curve (Hesterberg 2015, arXiv 1411.5279), with
as many degrees of freedom as clusters of one size would leave: of n clusters in h strata a bootstrap shows (n - h) / n
of the variance, which is half of it where each label has two templates.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import norm, t

from training.statistics.clusters import (
    FEWEST_CLUSTERS,
    Clusters,
    Floats,
    Grouped,
    Integers,
    effective,
    finite,
    grouped,
)

Bounds = tuple[float, float]
CELLS = 4_000_000  # weights that are held at a time
ENDS = 0.5  # of a cluster's weight, on average, for each end that a value can have


@dataclass(frozen=True)
class Interval:
    """A figure, and between what it may well lie, from `items` in `clusters`."""

    estimate: float
    low: float
    high: float
    items: int
    clusters: int

    @property
    def is_telling(self) -> bool:
        """Whether it rests on clusters enough to be told from."""
        return self.clusters >= FEWEST_CLUSTERS

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def interval(
    values: ArrayLike,
    clusters: Clusters | None = None,
    seed: int = 0,
    draws: int = 2000,
    level: float = 0.95,
    bounds: Bounds | None = None,
) -> Interval:
    """Of the mean of the values. Give `bounds` where a value has ends: (0, 1) for a score, (-1, 1) for a difference."""
    row = finite(values)
    groups = grouped(len(row), clusters)
    found = mean_draws(row, groups, seed, draws, bounds)
    return _ends(float(row.mean()), found, groups, pushed_out((1 - level) / 2, groups.effective), len(row))


def statistic_interval(
    count: int,
    statistic: Callable[[Integers], float],
    clusters: Clusters | None = None,
    strata: Sequence[Hashable] | None = None,
    seed: int = 0,
    draws: int = 1000,
    level: float = 0.95,
    bounds: Bounds | None = None,
) -> Interval:
    """Of a statistic that takes the indices of items, each as often as it was drawn.

    `strata` names each item's (its label, for macro-F1): so many clusters are drawn of each as there are; a cluster
    belongs to that of most of its items. With `bounds` the interval reaches at least as far as clusters that were
    never seen could take it.
    """
    groups = grouped(count, clusters)
    layers = layers_of(groups, strata)
    estimate = float(statistic(np.arange(count)))
    found = statistic_draws(statistic, groups, layers, seed, draws)
    tail = pushed_out((1 - level) / 2, _effective_in(groups, layers), len(layers))
    made = _ends(estimate, found, groups, tail, count)
    if bounds is None:
        return made
    unseen = 1 - ((1 - level) / 2) ** (1 / len(groups))
    low = min(made.low, estimate - unseen * (estimate - bounds[0]))
    high = max(made.high, estimate + unseen * (bounds[1] - estimate))
    return Interval(estimate, low, high, made.items, made.clusters)


def statistic_beyond(
    count: int,
    statistic: Callable[[Integers], float],
    limits: Sequence[float],
    clusters: Clusters | None = None,
    strata: Sequence[Hashable] | None = None,
    seed: int = 0,
    draws: int = 2000,
) -> list[float]:
    """Of each limit the p of a statistic lying on it, two-sided: the least 1 - level at which the interval leaves it
    out."""
    groups = grouped(count, clusters)
    layers = layers_of(groups, strata)
    found = statistic_draws(statistic, groups, layers, seed, draws)
    return [share_p(found, limit, _effective_in(groups, layers), len(layers)) for limit in limits]


def share_p(found: Floats, limit: float, clusters: float, strata: int = 1) -> float:
    """The two-sided p of a limit among draws, with the quantiles pushed in as those of an interval are pushed out."""
    below = float((found < limit).mean() + (found == limit).mean() / 2)
    tail = max(min(below, 1 - below), 1 / (len(found) + 1))
    if clusters <= strata:
        return 1.0
    return float(2 * t.sf(norm.isf(tail) / np.sqrt(clusters / (clusters - strata)), clusters - strata))


def mean_draws(row: Floats, groups: Grouped, seed: int, draws: int, bounds: Bounds | None) -> Floats:
    """(draws,): means as the Bayesian bootstrap over clusters draws them."""
    if bounds is not None and not bounds[0] <= row.min() <= row.max() <= bounds[1]:
        raise ValueError(f"values from {row.min():g} to {row.max():g} lie outside {bounds[0]:g} to {bounds[1]:g}")
    generator = np.random.default_rng(seed)
    sums, clusters = groups.sums(row), len(groups)
    parts: list[Floats] = []
    for size in _portions(draws, clusters):
        weights = generator.standard_exponential((size, clusters))
        total, weight = weights @ sums, weights @ groups.sizes
        for end in bounds or ():
            extra = generator.standard_gamma(ENDS, size) * groups.sizes.mean()
            total, weight = total + extra * end, weight + extra
        parts.append(total / weight)
    return np.concatenate(parts)


def statistic_draws(
    statistic: Callable[[Integers], float], groups: Grouped, layers: Sequence[Integers], seed: int, draws: int
) -> Floats:
    """(draws,): the statistic as the plain bootstrap over clusters draws it."""
    return finite([statistic(indices) for indices in resamples(groups, layers, seed, draws)])


def _effective_in(groups: Grouped, layers: Sequence[Integers]) -> float:
    return sum(effective(groups.sizes[layer]) for layer in layers)


def resamples(groups: Grouped, layers: Sequence[Integers], seed: int, draws: int) -> Iterator[Integers]:
    """The items of each draw: clusters with replacement, as many of each layer as it has."""
    generator = np.random.default_rng(seed)
    members = groups.members()
    for _ in range(draws):
        chosen = np.concatenate([layer[generator.integers(0, len(layer), len(layer))] for layer in layers])
        if len(members) == len(groups.codes):
            yield chosen
        else:
            yield np.concatenate([members[cluster] for cluster in chosen])


def layers_of(groups: Grouped, strata: Sequence[Hashable] | None) -> list[Integers]:
    """The clusters of each stratum. Strata of one cluster, which could never vary, are one layer together."""
    if strata is None:
        return [np.arange(len(groups))]
    kinds = grouped(len(groups.codes), strata)
    table = np.zeros((len(groups), len(kinds)))
    np.add.at(table, (groups.codes, kinds.codes), 1)
    most = table.argmax(axis=1)
    layers = sorted((np.flatnonzero(most == kind) for kind in np.unique(most)), key=len)
    alone = sum(len(layer) == 1 for layer in layers)
    together = alone if alone != 1 else 2
    return [np.concatenate(layers[:together]), *layers[together:]] if together else layers


def _ends(estimate: float, found: Floats, groups: Grouped, tail: float, items: int) -> Interval:
    low, high = np.quantile(found, [tail, 1 - tail])
    return Interval(estimate, min(float(low), estimate), max(float(high), estimate), items, len(groups))


def pushed_out(tail: float, clusters: float, strata: int = 1) -> float:
    """The quantile that a bootstrap of so few clusters takes for `tail`."""
    if clusters <= strata:
        return 0.0
    return float(norm.cdf(-np.sqrt(clusters / (clusters - strata)) * t.isf(tail, clusters - strata)))


def _portions(draws: int, clusters: int) -> Iterator[int]:
    size = max(1, CELLS // clusters)
    for start in range(0, draws, size):
        yield min(size, draws - start)
