"""The rank of each planted canary under a model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from training.canaries import CANDIDATES, Canary, row_of, unused_codes
from training.data.template import ChatTemplate, Rendered
from training.verdict.evidence import Canaries
from training.verdict.measure import measure

ROWS_AT_A_TIME = 128
MOST_SECONDS = 30.0


def ranked(
    model: Any,
    template: ChatTemplate,
    canaries: Sequence[Canary],
    seed: int,
    supervise: str = "all",
    most_seconds: float = MOST_SECONDS,
) -> Canaries:
    """The rank of each canary under the model as it is now; where the time is over, of the first ones."""
    deadline = time.monotonic() + most_seconds
    ranks: list[int] = []
    for index, canary in enumerate(canaries):
        if ranks and time.monotonic() > deadline:
            break
        codes = [canary.code, *unused_codes(canary, f"{seed} {index}")]
        rendered: list[Rendered] = [template.render(row_of(canary, code), supervise)[0] for code in codes]
        own, *others = measure(model, rendered, ROWS_AT_A_TIME).losses
        ranks.append(1 + sum(loss < own for loss in others))
    return Canaries(len(canaries), ranks, CANDIDATES)
