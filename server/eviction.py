"""Which version leaves the engine's memory when another one needs room: the one whose return would cost least.

The cost of taking one out is what its next load takes times how often that is to be expected. Loads that were never
measured are estimated from the size of the files. How often is a count of uses that halves every `HALF_LIFE_SECONDS`:
a version that was popular an hour ago is not.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

HALF_LIFE_SECONDS = 300.0
LOAD_BYTES_PER_SECOND = 100e6  # of a load that was never measured


@dataclass(frozen=True, slots=True)
class Candidate:
    """One version that nothing holds: what it is called, and what its return would cost."""

    name: str
    size_bytes: int
    load_seconds: float | None
    popularity: float
    last_used: float

    @property
    def cost(self) -> float:
        seconds = self.size_bytes / LOAD_BYTES_PER_SECOND if self.load_seconds is None else self.load_seconds
        return seconds * self.popularity


def choose_victim(candidates: Iterable[Candidate], pinned: Iterable[str], near: Iterable[str]) -> str | None:
    """The name of the cheapest that is not pinned, sooner one whose turn is not near; of equals the longest unused.

    None where all are pinned, or there is none.
    """
    kept, soon = frozenset(pinned), frozenset(near)
    free = [one for one in candidates if one.name not in kept]
    return min(free, key=lambda one: (one.name in soon, one.cost, one.last_used)).name if free else None
