"""How much each version is asked for just now: requests, of which half are forgotten after each half-life."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, log2

from server.restoring import Key

MOST_KEYS = 10_000  # then the least popular half is forgotten


@dataclass(slots=True)
class DecayingCount:
    """A count that halves in every half-life; times are seconds of one clock."""

    half_life_seconds: float
    count: float = 0.0
    counted_at: float = 0.0

    def at(self, now: float) -> float:
        return float(self.count * 2.0 ** ((self.counted_at - now) / self.half_life_seconds))

    def rank(self) -> float:
        """What two counts of one half-life can be compared by, whenever each was made."""
        return log2(self.count) + self.counted_at / self.half_life_seconds if self.count else -inf

    def add(self, now: float) -> None:
        self.count, self.counted_at = self.at(now) + 1.0, now


class Popularity:
    """Scores of versions. A request adds 1."""

    def __init__(self, half_life_seconds: float) -> None:
        self._half_life = half_life_seconds
        self._scores: dict[Key, DecayingCount] = {}

    def note(self, key: Key, now: float) -> None:
        """One request for it."""
        self._scores.setdefault(key, DecayingCount(self._half_life)).add(now)
        if len(self._scores) > MOST_KEYS:
            kept = self.ranking(now)[: MOST_KEYS // 2]
            self._scores = {one: self._scores[one] for one in kept}

    def score(self, key: Key, now: float) -> float:
        count = self._scores.get(key)
        return 0.0 if count is None else count.at(now)

    def ranking(self, now: float, least: float = 0.0) -> list[Key]:
        """Those of at least this score, the most popular first."""
        found = [key for key in self._scores if self.score(key, now) >= least]
        return sorted(found, key=lambda key: -self._scores[key].rank())

    def forget(self, key: Key) -> None:
        self._scores.pop(key, None)
