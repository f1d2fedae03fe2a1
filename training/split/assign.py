"""Which unit of rows goes to which split: whole units, labels in their shares, the same for the same seed."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

ALL = ("all",)  # counted like a label, so that the splits' sizes come out right, too


def assign(units: Sequence[str], labels: Sequence[str | None], shares: Mapping[str, float], seed: int) -> list[str]:
    """Of each row its split. Rows of equal units stay together; `shares` gives each split's share of the rows.

    Units are taken from the largest to the smallest, those of one size in a seeded order, each to the split where the
    sum over its labels of (rows - wanted rows)² / wanted rows grows least. A label of one unit only has no shares.
    """
    counts = _counts(units, labels)
    totals = sum(counts.values(), Counter[object]())
    wanted = {split: {label: share * totals[label] for label in totals} for split, share in shares.items() if share > 0}
    has: dict[str, Counter[object]] = {split: Counter() for split in wanted}
    chosen: dict[str, str] = {}
    for unit in _order(counts, seed):
        rows = counts[unit]
        chosen[unit] = min(wanted, key=lambda split: _cost(rows, has[split], wanted[split]))
        has[chosen[unit]] += rows
    return [chosen[unit] for unit in units]


def _counts(units: Sequence[str], labels: Sequence[str | None]) -> dict[str, Counter[object]]:
    counts: dict[str, Counter[object]] = defaultdict(Counter)
    for unit, label in zip(units, labels, strict=True):
        counts[unit][label] += 1
        counts[unit][ALL] += 1
    spread = Counter(label for rows in counts.values() for label in rows)
    return {
        unit: Counter({label: rows[label] for label in rows if label == ALL or spread[label] > 1})
        for unit, rows in counts.items()
    }


def _order(counts: Mapping[str, Counter[object]], seed: int) -> list[str]:
    units = sorted(counts)
    random.Random(seed).shuffle(units)  # noqa: S311 - a reproducible choice, no secret
    return sorted(units, key=lambda unit: -counts[unit][ALL])


def _cost(rows: Counter[object], has: Counter[object], wanted: Mapping[object, float]) -> float:
    return sum(count * (2 * (has[label] - wanted[label]) + count) / wanted[label] for label, count in rows.items())
