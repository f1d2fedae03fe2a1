"""How far two runs over the same positions are apart: logits, or log-probabilities over the whole vocabulary."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from adapters.readback import Floats, six_digits


@dataclass(frozen=True, slots=True)
class LogitComparison:
    """How far `other` is from `reference` over all positions. KL is KL(reference || other) in nats."""

    positions: int
    max_abs: float
    mean_abs: float
    max_kl: float
    mean_kl: float
    top1_agreement: float
    top1_disagreements_beyond_margin: int  # where the reference's top two differ by more than MARGIN
    largest_logit: float

    def as_dict(self) -> dict[str, Any]:
        return {key: six_digits(value) if isinstance(value, float) else value for key, value in asdict(self).items()}


MARGIN = 1e-3


def compare_logits(reference: Sequence[npt.ArrayLike], other: Sequence[npt.ArrayLike]) -> LogitComparison:
    """Compare two runs over the same positions: each a sequence of (num_positions, vocab_size) or (vocab_size,) arrays.

    The caller fetched them, from wherever; log-probabilities over the whole vocabulary compare as well as logits do.
    Raises ValueError where the shapes differ.
    """
    rows = [_compare_rows(one, two) for one, two in _row_pairs(reference, other)]
    if not rows:
        raise ValueError("nothing to compare: no positions")
    table = np.concatenate(rows)
    beyond = (table[:, 3] == 0) & (table[:, 4] > MARGIN)
    return LogitComparison(
        positions=len(table),
        max_abs=float(table[:, 0].max()),
        mean_abs=float(table[:, 1].mean()),
        max_kl=float(table[:, 2].max()),
        mean_kl=float(table[:, 2].mean()),
        top1_agreement=float(table[:, 3].mean()),
        top1_disagreements_beyond_margin=int(beyond.sum()),
        largest_logit=float(table[:, 5].max()),
    )


def _row_pairs(reference: Sequence[npt.ArrayLike], other: Sequence[npt.ArrayLike]) -> Iterator[tuple[Floats, Floats]]:
    for one, two in zip(reference, other, strict=True):
        left, right = (np.atleast_2d(np.asarray(side, dtype=np.float64)) for side in (one, two))
        if left.shape != right.shape:
            raise ValueError(f"cannot compare logits of shapes {left.shape} and {right.shape}")
        for first in range(0, len(left), 8):  # a few positions at a time: a vocabulary is 152k wide
            yield left[first : first + 8], right[first : first + 8]


def _compare_rows(one: Floats, two: Floats) -> Floats:
    """(rows, 6): largest and mean difference, KL, same top-1, top-2 margin of the reference, its largest logit."""
    difference = np.abs(one - two)
    log_p, log_q = _log_softmax(one), _log_softmax(two)
    kl = np.maximum((np.exp(log_p) * (log_p - log_q)).sum(axis=1), 0.0)
    top = np.partition(one, -2, axis=1)[:, -2:]
    same = one.argmax(axis=1) == two.argmax(axis=1)
    columns = (
        difference.max(axis=1),
        difference.mean(axis=1),
        kl,
        same,
        top[:, 1] - top[:, 0],
        np.abs(one).max(axis=1),
    )
    return np.stack(columns, axis=1).astype(np.float64)


def _log_softmax(logits: Floats) -> Floats:
    shifted = logits - logits.max(axis=1, keepdims=True)
    result: Floats = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result
