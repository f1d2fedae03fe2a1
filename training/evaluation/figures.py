"""Figures with what they rest on: intervals over clusters of rows, paired differences, and the noise of batching.

A figure that is a mean of rows has the interval of a mean; another (macro-F1, corpus chrF) is drawn anew over clusters,
with each label's share kept. Rows that a metric could not measure (NaN) are left out and counted.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from training.metrics.measure import Floats, Integers, Measure
from training.statistics import Interval, flip_p, interval, statistic_interval

DRAWS = 1_000
NOISE_WIDTH = 1.96
DIGITS = 6


@dataclass(frozen=True)
class Grouping:
    """Of each row its cluster, and its stratum where the task has labels."""

    clusters: Sequence[Hashable]
    strata: Sequence[Hashable] | None = None

    def of(self, rows: Integers) -> Grouping:
        strata = None if self.strata is None else [self.strata[row] for row in rows]
        return Grouping([self.clusters[row] for row in rows], strata)


def figure(measure: Measure, grouping: Grouping, rows: Integers | None = None) -> dict[str, Any]:
    """The measure over these rows (all by default) with its interval; estimate None where nothing was measured."""
    chosen, left_out = _measured(rows, measure.scores)
    if not len(chosen):
        return {"estimate": None, "items": 0, "clusters": 0, "left_out": left_out}
    part = grouping.of(chosen)
    if measure.is_mean:
        found = interval(measure.scores[chosen], part.clusters, bounds=measure.bounds)
    else:
        found = statistic_interval(
            len(chosen),
            lambda drawn: measure.of(chosen[drawn]),
            part.clusters,
            part.strata,
            draws=DRAWS,
            bounds=measure.bounds,
        )
    return _said(found, left_out)


def difference(measure: Measure, rival: Measure, grouping: Grouping, rows: Integers | None = None) -> dict[str, Any]:
    """The measure less the rival's on the same rows, with the interval of the difference and its p by sign flips.

    The p is that of the scores of the rows, also where the figure is a corpus's.
    """
    chosen, left_out = _measured(rows, measure.scores, rival.scores)
    if not len(chosen):
        return {"estimate": None, "items": 0, "clusters": 0, "left_out": left_out}
    part = grouping.of(chosen)
    bounds = None if measure.bounds is None else (-1.0, 1.0)
    gaps = measure.scores[chosen] - rival.scores[chosen]
    if measure.is_mean:
        found = interval(gaps, part.clusters, bounds=bounds)
    else:
        found = statistic_interval(
            len(chosen),
            lambda drawn: measure.of(chosen[drawn]) - rival.of(chosen[drawn]),
            part.clusters,
            part.strata,
            draws=DRAWS,
            bounds=bounds,
        )
    p = flip_p(gaps, part.clusters)
    return {"rival": round(rival.of(chosen), DIGITS), **_said(found, left_out), "p": round(p, DIGITS)}


def noise(first: Measure, second: Measure, of_rows: int) -> dict[str, Any]:
    """How far the figure of `of_rows` rows moves by batching alone, from some rows that were asked in two orders.

    floor = 1.96 sqrt(mean(d_i^2) / rows), d_i the change of a row's score: as likely up as down.
    """
    chosen, _ = _measured(None, first.scores, second.scores)
    changes = second.scores[chosen] - first.scores[chosen]
    moved = second.of(chosen) - first.of(chosen) if len(chosen) else 0.0
    floor = NOISE_WIDTH * float(np.sqrt((changes**2).mean() / of_rows)) if len(chosen) else 0.0
    return {"rows": len(chosen), "moved": round(float(moved), DIGITS), "floor": round(floor, DIGITS)}


def sides(found: dict[str, Any], margin: float = 0.0) -> str:
    """Where an interval lies: `above` or `below` the margin, `unclear`, or `too few` clusters to tell."""
    if found.get("estimate") is None or not found["is_telling"]:
        return "too few"
    if found["low"] > margin:
        return "above"
    return "below" if found["high"] < margin else "unclear"


def _measured(rows: Integers | None, *scores: Floats) -> tuple[Integers, int]:
    """The rows that all scores measure, and how many of those asked for they do not."""
    chosen = np.arange(len(scores[0])) if rows is None else rows
    finite = np.all([np.isfinite(column[chosen]) for column in scores], axis=0)
    return chosen[finite], int((~finite).sum())


def _said(found: Interval, left_out: int) -> dict[str, Any]:
    made: dict[str, Any] = {
        "estimate": round(found.estimate, DIGITS),
        "low": round(found.low, DIGITS),
        "high": round(found.high, DIGITS),
        "items": found.items,
        "clusters": found.clusters,
        "is_telling": found.is_telling,
    }
    return {**made, "left_out": left_out} if left_out else made
