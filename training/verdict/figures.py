"""The figures that the rules look at, each with the noise that it allows for.

    fall(before, after) = sum_i (before_i - after_i) / sum_i tokens_i        nats a learned token, over rows i

Rows are drawn again in clusters (training.statistics); the two states are of the same rows, so that hard and easy rows
cancel. Seeds of training are not drawn again: the verdict is on this run.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import combine_pvalues

from training.statistics import interval, statistic_interval
from training.verdict.evidence import Canaries, Evidence, General, HeldOut, Points, Seen
from training.verdict.rules import LEAST_ROWS

if TYPE_CHECKING:
    from training.statistics import Interval

FEWEST_POINTS = 6  # of a training curve
NOISE_OF_MEDIAN = 1.4826 / math.sqrt(2)  # from the median absolute change of one step to a standard deviation


def fall(before: Sequence[float], after: Sequence[float], rows: HeldOut | Seen) -> Interval:
    """How far the loss of a learned token fell from one state to the other."""
    fallen = np.subtract(before, after)
    tokens = np.asarray(rows.tokens, dtype=np.float64)

    def ratio(drawn: Any) -> float:
        return float(fallen[drawn].sum() / tokens[drawn].sum())

    return statistic_interval(len(fallen), ratio, clusters=rows.clusters)


def fall_of(chosen: Sequence[bool], rows: HeldOut) -> Interval | None:
    """How far the loss of some of the rows fell in the kept weights; None where they are too few to be told from."""
    kept = [index for index, is_chosen in enumerate(chosen) if is_chosen]
    if len({rows.clusters[index] for index in kept}) < LEAST_ROWS:
        return None
    parts = ("tokens", "clusters", "start", "best")
    picked = {name: [getattr(rows, name)[index] for index in kept] for name in parts}
    return fall(picked["start"], picked["best"], replace(rows, **picked))


def mean_loss(losses: Sequence[float], rows: HeldOut | Seen) -> float:
    """The loss of a learned token."""
    return float(np.sum(losses) / np.sum(rows.tokens))


def told_apart(held_out: HeldOut, seen: Seen) -> Interval:
    """The AUC of telling rows trained on from validation rows by how much their loss fell.

    Each row is drawn by itself: what is asked is whether a row was there, not whether its template was.
    """
    ours, others = (np.subtract(side.start, side.best) / np.asarray(side.tokens) for side in (seen, held_out))
    above = (ours[:, None] > others) + 0.5 * (ours[:, None] == others)  # (seen, held out): the AUC is its mean
    is_seen = np.arange(len(ours) + len(others)) < len(ours)

    def found(drawn: Any) -> float:
        return float(above[np.ix_(drawn[is_seen[drawn]], drawn[~is_seen[drawn]] - len(ours))].mean())

    return statistic_interval(len(is_seen), found, strata=[str(side) for side in is_seen])


def doubted_share(seen: Seen, least: float) -> Interval | None:
    """Of how many rows trained on the kept model is sure of another answer."""
    if seen.doubts is None:
        return None
    doubted = [float(doubt >= least) for doubt in seen.doubts]
    return interval(doubted, bounds=(0, 1))


def forgotten(general: General) -> Interval:
    """How far the loss of general text rose."""
    return interval(np.subtract(general.best, general.base))


def canaries_p(canaries: Canaries) -> float:
    """The chance of ranks whose product is so low, where every rank is equally likely: Fisher's method."""
    by_chance = [rank / (canaries.candidates + 1) for rank in canaries.ranks]
    return float(combine_pvalues(by_chance, method="fisher").pvalue)


def lost_again(training: Points) -> dict[str, float] | None:
    """How far the training loss ended above its lowest level, in medians over a tenth of the steps; None for few."""
    losses = [loss for _, loss in training]
    if len(losses) < FEWEST_POINTS:
        return None
    width = max(3, len(losses) // 10)
    levels = [statistics.median(losses[at : at + width]) for at in range(len(losses) - width + 1)]
    lowest = min(levels)
    return {"lost": levels[-1] - lowest, "fallen": losses[0] - lowest, "noise": noise_of(training)}


def noise_of(training: Points) -> float:
    """The standard deviation of one step's loss around its level, from the changes between steps."""
    changes = np.diff([loss for _, loss in training])
    return NOISE_OF_MEDIAN * float(np.median(np.abs(changes - np.median(changes)))) if len(changes) else 0.0


def fell(training: Points) -> bool:
    """Whether the training loss ended below its first value, by the mean of the last tenth."""
    losses = [loss for _, loss in training]
    return bool(losses) and statistics.fmean(losses[-max(3, len(losses) // 10) :]) < losses[0]


def rose(training: Points) -> float:
    """How far the training loss rose above its first value, by its highest median over a tenth of the steps."""
    losses = [loss for _, loss in training]
    if len(losses) < FEWEST_POINTS:
        return 0.0
    width = max(3, len(losses) // 10)
    return max(statistics.median(losses[at : at + width]) for at in range(len(losses) - width + 1)) - losses[0]


def fell_after(training: Points, step: int) -> bool:
    """Whether the training loss was lower at the end than around a step."""
    before = [loss for at, loss in training if at <= step][-5:]
    after = [loss for at, loss in training if at > step][-5:]
    return bool(before and after) and statistics.fmean(after) < statistics.fmean(before)


def rises_at_the_end(validation: Points) -> int:
    """How many validations in a row, up to the last, were each above the one before."""
    losses = [loss for _, loss in validation]
    count = 0
    while count + 1 < len(losses) and losses[-1 - count] > losses[-2 - count]:
        count += 1
    return count


def middle_step(validation: Points, learning_rate: Points) -> int | None:
    """The validation nearest to half of the learning, which is the sum of the learning rates; None without two."""
    if len(validation) < 2:
        return None
    rates = dict(learning_rate)
    passed, total = 0.0, sum(rates.values()) or 1.0
    shares: dict[int, float] = {}
    for step in range(1, max(validation)[0] + 1):
        passed += rates.get(step, 0.0)
        shares[step] = passed / total
    return min((step for step, _ in validation[:-1]), key=lambda step: abs(shares.get(step, 0.0) - 0.5))


def hopes(late: float, whole: float, last: float) -> float:
    """How far as many steps again would lower the loss, if each half falls by the same share of the half before.

    No further than to nothing: a loss is never below it.
    """
    early = whole - late
    ratio = min(1.0, late / early) if early > 0 else 1.0
    return min(last, max(0.0, late * (ratio + ratio**2)))


def weak_labels(evidence: Evidence) -> list[dict[str, Any]]:
    """Labels whose rows have surely more than twice the loss of the others, the worst first."""
    held_out = evidence.held_out
    if held_out is None or not held_out.labels or not held_out.best:
        return []
    labels, tokens = np.asarray(held_out.labels), np.asarray(held_out.tokens, dtype=np.float64)
    losses = np.asarray(held_out.best, dtype=np.float64)
    names = [name for name in sorted(set(held_out.labels)) if (labels == name).sum() >= 3]
    found = []
    for name in names if len(names) > 1 else ():
        one, others = losses[labels == name], losses[labels != name].sum() / tokens[labels != name].sum()
        excess = one / tokens[labels == name] - 2 * others
        made = interval(excess, level=1 - 0.05 / len(names))
        if made.low > 0 and made.estimate > 0.05:
            count = evidence.rows_of_label.get(name, 0)
            found.append({"label": name, "loss": float(one.sum() / tokens[labels == name].sum()), "rows": count})
    return sorted(found, key=lambda row: -row["loss"])
