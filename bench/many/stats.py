"""The statistics of the bench of many adapters: pure functions over plain numbers.

TTFT, TPOT and goodput are as in `vllm bench serve` and DistServe (arXiv:2401.09670): TPOT is the time from a request's
first token to its last, shared out over the tokens after the first; goodput counts the requests that kept both bounds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Slo:
    """What a user would call answered well, in seconds."""

    ttft_seconds: float
    tpot_seconds: float


@dataclass(frozen=True)
class Seen:
    """One request as its client saw it; times are seconds from the start of the measurement, None for what never came.

    `intended` is when the plan wanted it sent, which a busy client or server may have delayed to `sent`.
    """

    model: int  # -1 the base, else the adapter's rank in popularity from 0
    tenant: int
    intended: float
    sent: float
    first: float | None
    last: float | None  # of its last token, where all came
    asked_tokens: int
    got_tokens: int  # until the end of the measurement
    window_tokens: int = 0  # of these, within the seconds that count for throughput
    problem: str = ""  # why it was not answered whole; empty too for one that the end of the measurement cut off

    @property
    def is_whole(self) -> bool:
        return self.last is not None and not self.problem

    @property
    def ttft_seconds(self) -> float | None:
        """From when it was meant to be sent: a delay that the server caused to the client counts."""
        return None if self.first is None else self.first - self.intended

    @property
    def tpot_seconds(self) -> float | None:
        """None for one that was not answered whole, or has no second token."""
        if not self.is_whole or self.first is None or self.last is None or self.asked_tokens < 2:
            return None
        return (self.last - self.first) / (self.asked_tokens - 1)


def quantile(values: Sequence[float], share: float) -> float:
    """The value that a share of them does not exceed, between two neighbours by the distance; of at least one value.

    Infinite values (what never came) stay infinite, and nothing is interpolated towards them.
    """
    if not values or not 0 <= share <= 1:
        raise ValueError(f"A quantile of {len(values)} values at {share}: at least one value, and a share of 0 to 1.")
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    low, high = ordered[below], ordered[min(below + 1, len(ordered) - 1)]
    if low == high or place == below:
        return low
    return high if math.isinf(high) else min(high, low + (high - low) * (place - below))


def jain(values: Sequence[float]) -> float:
    """Jain's index (sum x)^2 / (n * sum x^2): 1 where all get the same, 1/n where one gets all; 1 where nobody does.

    Jain, Chiu, Hawe 1984, DEC-TR-301. Raises ValueError for a value below 0.
    """
    if not values or min(values) < 0:
        raise ValueError(f"Jain's index of {list(values)[:8]}: it takes at least one value, and none below 0.")
    largest = max(values)
    if largest == 0:
        return 1.0
    shares = [value / largest for value in values]  # so that squares of tiny numbers do not vanish
    return min(1.0, sum(shares) ** 2 / (len(shares) * sum(share * share for share in shares)))


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, least and greatest of at least one value."""
    return statistics.median(values), min(values), max(values)


def paired_ratios(ours: Mapping[int, float], theirs: Mapping[int, float]) -> list[float]:
    """ours / theirs in every round that both have, in order; a round where theirs is 0 is left out."""
    return [ours[turn] / theirs[turn] for turn in sorted(ours.keys() & theirs.keys()) if theirs[turn]]


def keeps(request: Seen, slo: Slo) -> bool:
    """The request was answered whole and within both bounds."""
    first, each = request.ttft_seconds, request.tpot_seconds
    if not request.is_whole or first is None or first > slo.ttft_seconds:
        return False
    return each is None or each <= slo.tpot_seconds


def goodput(requests: Sequence[Seen], slo: Slo, seconds: float) -> float:
    """Requests a second that kept the bounds."""
    return sum(keeps(request, slo) for request in requests) / seconds


def waits(requests: Sequence[Seen], until: float) -> list[float]:
    """Seconds to the first token; for one that still waits, as long as it has waited; infinite for one that failed."""
    found = []
    for one in requests:
        waited = until - one.intended if one.ttft_seconds is None else one.ttft_seconds
        found.append(math.inf if one.problem else waited)
    return found


def tpots(requests: Sequence[Seen]) -> list[float]:
    return [one.tpot_seconds for one in requests if one.tpot_seconds is not None]


def served_shares(requests: Sequence[Seen], key: str) -> list[float]:
    """For each adapter (`model`) or `tenant`, what it got of the tokens that it asked for; base requests left out."""
    asked: dict[int, int] = {}
    got: dict[int, int] = {}
    for one in requests:
        if one.model < 0:
            continue
        whose: int = getattr(one, key)
        asked[whose] = asked.get(whose, 0) + one.asked_tokens
        got[whose] = got.get(whose, 0) + one.got_tokens
    return [got[whose] / asked[whose] for whose in sorted(asked)]


def largest_gap(times: Sequence[float], begin: float, end: float) -> float:
    """The longest time without a token that touches begin..end, for a stream with tokens at these ascending times.

    0 for a stream that has no token on either side of it: it was not live then.
    """
    gaps = (late - early for early, late in pairwise(times) if early < end and late > begin)
    return max(gaps, default=0.0)
