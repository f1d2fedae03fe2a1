"""The losses of rows under a model as it is now: of each row, and how sure the model is of another answer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from training.data.template import Rendered
from training.loss import supervised_losses
from training.packed import collate

SURE = 0.5  # nats: a probability of 0.6
MOST_SEEN, FEWEST_SEEN = 192, 128
SEEN_SHARE = 0.02  # of the run's own computing that measuring a sample of its rows may take


@dataclass(frozen=True)
class Measurement:
    """`losses` of each row, summed over its learned tokens; `doubts` as `training.verdict.evidence.Seen` has them."""

    losses: list[float]
    doubts: list[float]


def measure(
    model: Any, sequences: Sequence[Rendered], pass_size: int, most_seconds: float | None = None
) -> Measurement:
    """Of each row in its order; where the time is over, of the first ones. The model's mode is the caller's."""
    deadline = time.monotonic() + most_seconds if most_seconds is not None else None
    made = Measurement([], [])
    for start in range(0, len(sequences), pass_size):
        rows = sequences[start : start + pass_size]
        batch = collate(rows)
        batch = {key: value.to(model.device) if torch.is_tensor(value) else value for key, value in batch.items()}
        losses, least = (values.tolist() for values in supervised_losses(model, batch))
        place = 0
        for row in rows:
            end = place + row.supervised_tokens
            own, likeliest = losses[place:end], least[place:end]
            made.losses.append(sum(own))
            made.doubts.append(max((a - b for a, b in zip(own, likeliest, strict=True) if b <= SURE), default=0.0))
            place = end
        if deadline is not None and time.monotonic() > deadline:
            break
    return made


def sample_size(rows: int, epochs: float) -> int:
    """How many rows trained on are measured, twice: 2% of the run, whose steps cost three times a measurement."""
    wanted = round(SEEN_SHARE * 3 * rows * epochs / 2)
    return min(rows, MOST_SEEN, max(FEWEST_SEEN, wanted))
