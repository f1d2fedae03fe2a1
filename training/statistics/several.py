"""Several looks at the same data: each further one is one more chance to be fooled."""

from __future__ import annotations

from collections.abc import Sequence


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's adjusted p of each (Scand. J. Statist. 6, 1979): below alpha together, all rejections hold at alpha."""
    order = sorted(range(len(ps)), key=lambda index: ps[index])
    made, largest = [0.0] * len(ps), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[index]))
        made[index] = largest
    return made
