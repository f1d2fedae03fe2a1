"""How much each version is asked for just now: requests, of which half are forgotten after each half-life."""

from __future__ import annotations

from server.restoring import Key

MOST_KEYS = 10_000  # then the least popular half is forgotten


class Popularity:
    """Scores of versions. A request adds 1; times are seconds of one clock."""

    def __init__(self, half_life_seconds: float) -> None:
        self._half_life = half_life_seconds
        self._scores: dict[Key, tuple[float, float]] = {}  # and the time that the score is of

    def note(self, key: Key, now: float) -> None:
        """One request for it."""
        self._scores[key] = (self.score(key, now) + 1.0, now)
        if len(self._scores) > MOST_KEYS:
            kept = self.ranking(now)[: MOST_KEYS // 2]
            self._scores = {one: self._scores[one] for one in kept}

    def score(self, key: Key, now: float) -> float:
        score, at = self._scores.get(key, (0.0, now))
        return float(score * 0.5 ** ((now - at) / self._half_life))

    def ranking(self, now: float, least: float = 0.0) -> list[Key]:
        """Those of at least this score, the most popular first."""
        scores = {key: self.score(key, now) for key in self._scores}
        found = [key for key, score in scores.items() if score >= least]
        return sorted(found, key=lambda key: -scores[key])

    def forget(self, key: Key) -> None:
        self._scores.pop(key, None)
