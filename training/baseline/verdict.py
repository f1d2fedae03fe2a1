"""The verdict: whether an adapter beats what it is compared with by more than a margin, from paired answers.

worth it         the whole interval of the difference lies above the margin
not worth it     the whole interval lies below it
cannot tell      anything else, with the rows that would be needed; always so under 20 clusters

Where the same test data was read for other comparisons, the interval's level and the p are corrected by Holm.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from training.evaluation.figures import sides
from training.metrics.measure import Measure
from training.statistics import (
    FEWEST_CLUSTERS,
    Interval,
    design_effect,
    flip_p,
    holm,
    interval,
    rows_needed,
    statistic_beyond,
    statistic_interval,
)

WORTH_IT, NOT_WORTH_IT, CANNOT_TELL = "worth_it", "not_worth_it", "cannot_tell"
LEVEL = 0.95
DRAWS = 2000
MOST_ROWS_SAID = 10_000_000
SMALLEST_GAP = 1e-4  # between the difference and the margin, or no number of rows tells them apart


@dataclass(frozen=True)
class Paired:
    """Two measures of the same rows, and which rows belong together."""

    ours: Measure
    theirs: Measure
    clusters: Sequence[Hashable]
    strata: Sequence[Hashable] | None = None

    @property
    def differences(self) -> Any:
        return self.ours.scores - self.theirs.scores

    def statistic(self, rows: Any) -> float:
        return self.ours.of(rows) - self.theirs.of(rows)

    def interval(self, level: float) -> Interval:
        """Of the difference: of a mean over clusters of rows, of another figure drawn anew with each label's share."""
        if self.ours.is_mean:
            return interval(self.differences, self.clusters, level=level, bounds=(-1, 1))
        return statistic_interval(
            len(self.clusters), self.statistic, self.clusters, self.strata, draws=DRAWS, level=level, bounds=(-1, 1)
        )

    def ps(self, *limits: float) -> list[float]:
        """Of the difference lying on each limit: by sign flips of clusters where it is a mean of rows."""
        if self.ours.is_mean:
            return [flip_p(self.differences - limit, self.clusters) for limit in limits]
        return statistic_beyond(len(self.clusters), self.statistic, limits, self.clusters, self.strata, draws=DRAWS)


@dataclass(frozen=True)
class Verdict:
    """The word, what it rests on, and what would be needed where it is cannot_tell."""

    verdict: str
    difference: float
    low: float
    high: float
    level: float
    margin: float
    p: float  # of the difference lying on the margin
    p_corrected: float
    p_of_none: float  # of no difference at all
    comparisons: int  # on these test rows, this one too
    items: int
    clusters: int
    design_effect: float
    discordance: float  # mean squared difference of a row
    rows_needed: int | None
    clusters_needed: int | None
    why: str

    def as_dict(self) -> dict[str, Any]:
        return {key: round(value, 6) if isinstance(value, float) else value for key, value in asdict(self).items()}


def judge(paired: Paired, margin: float, others: Sequence[float] = ()) -> Verdict:
    """Judge a difference against a margin; `others` are the p of the other comparisons on the same rows."""
    p, p_of_none = paired.ps(margin, 0.0)
    corrected = holm([p, *others])[0]
    level = 1 - (1 - LEVEL) / (1 + sum(other >= p for other in others))
    found = paired.interval(level)
    word = _word(found, margin, corrected)
    differences = paired.differences
    effect, discordance = design_effect(differences, paired.clusters), float((differences**2).mean())
    needed = _needed(found, margin, effect, discordance, level) if word == CANNOT_TELL else None
    clusters_needed = math.ceil(needed * found.clusters / found.items) if needed is not None else None
    return Verdict(
        word,
        found.estimate,
        found.low,
        found.high,
        level,
        margin,
        p,
        corrected,
        p_of_none,
        1 + len(others),
        found.items,
        found.clusters,
        effect,
        discordance,
        needed,
        clusters_needed,
        _why(word, found, margin, needed, clusters_needed),
    )


def _word(found: Interval, margin: float, corrected: float) -> str:
    if not found.is_telling or corrected > 1 - LEVEL:
        return CANNOT_TELL
    if found.low > margin:
        return WORTH_IT
    return NOT_WORTH_IT if found.high < margin else CANNOT_TELL


def _needed(found: Interval, margin: float, effect: float, discordance: float, level: float) -> int | None:
    """Rows that would tell eight times out of ten; None where hardly any number would."""
    gap = abs(found.estimate - margin)
    if gap < SMALLEST_GAP:
        return None
    spread = max(discordance, 1 / found.items)  # rows that never differ here may elsewhere
    rows = rows_needed(spread, gap, effect, found.estimate, level=level)
    fewest = math.ceil(FEWEST_CLUSTERS * found.items / found.clusters)
    rows = max(rows, fewest, 0 if not found.is_telling else found.items + 1)
    return rows if rows <= MOST_ROWS_SAID else None


def _why(word: str, found: Interval, margin: float, needed: int | None, clusters: int | None) -> str:
    figures = f"{points(found.estimate)} points ({points(found.low)} to {points(found.high)})"
    if word == WORTH_IT:
        return f"The difference is {figures}: all of it above the margin of {points(margin, signed=False)}."
    if word == NOT_WORTH_IT:
        return f"The difference is {figures}: all of it below the margin of {points(margin, signed=False)}."
    need = (
        f"about {needed:,} rows in {clusters:,} groups are needed" if needed else "no number of rows is likely to tell"
    )
    if not found.is_telling:
        return (
            f"The difference is {figures}, from {found.clusters} groups of rows that belong together; "
            f"under {FEWEST_CLUSTERS} nothing is told: {need}."
        )
    return f"The difference is {figures}, and the margin of {points(margin, signed=False)} lies within: {need}."


def points(share: float, *, signed: bool = True) -> str:
    """A share of 1 as points of 100."""
    return f"{100 * share:+.1f}" if signed else f"{100 * share:g}"


def enough(difference: dict[str, Any], margin: float) -> bool | None:
    """Whether the simpler one of two is enough: the other is surely not better by the margin. None: cannot tell."""
    return {"above": False, "below": True}.get(sides(difference, margin))


def mean_of(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else 0.0
