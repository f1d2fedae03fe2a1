"""What a load costs those whose answers are on their way: the largest gap between tokens of live streams meanwhile.

Some streams run all the time. Now and then one more request is sent: for an adapter that is in a slot, or for one that
lies on disk only. Both need a prefill between the streams' tokens, so that what the second costs more is the load's.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from itertools import pairwise

from bench.many.drive import Asker, Flight
from bench.many.plan import BASE, Shot
from bench.many.stats import largest_gap, quantile

LIVE = (BASE, BASE, 0, 1)  # whom the live streams ask
PROMPT_TOKENS, LIVE_TOKENS = 16, 1000
EVENT_TOKENS = 2
PAUSE_SECONDS = 1.0  # between the end of an event and the next one
AFTER_SECONDS = 0.1  # a stall ends with the token after it
FIRST_ABSENT = 4  # adapters from here on are asked for one after the other


@dataclass
class Stalls:
    """Seconds: every gap between tokens while nothing else ran, and the largest of any stream at each event."""

    normal: list[float] = field(default_factory=list)
    resident: list[float] = field(default_factory=list)
    absent: list[float] = field(default_factory=list)
    absent_ttft: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


async def measure(asker: Asker, adapters: int, seed: int, events: int, pause_seconds: float = PAUSE_SECONDS) -> Stalls:
    """So many events of each kind in turn; `adapters` must be more than are staged, so that each is absent again."""
    begin = time.perf_counter()

    def clock() -> float:
        return time.perf_counter() - begin

    found = Stalls()
    spans: list[tuple[float, float, bool]] = []
    async with asker.session() as session:
        live = [
            Flight(Shot(0.0, model, PROMPT_TOKENS, LIVE_TOKENS, seed * 100 + n), 0.0) for n, model in enumerate(LIVE)
        ]
        tasks = [asyncio.ensure_future(asker.ask(session, flight, clock)) for flight in live]
        try:
            while not all(flight.times for flight in live):
                _check(live)
                await asyncio.sleep(0.02)
            for event in range(2 * events):
                await asyncio.sleep(pause_seconds)
                is_absent = event % 2 == 1
                turn = seed * events + event // 2
                model = FIRST_ABSENT + turn % (adapters - FIRST_ABSENT) if is_absent else event // 2 % 2
                shot = Shot(0.0, model, PROMPT_TOKENS, EVENT_TOKENS, seed * 1000 + 100 + event)
                flight = await asker.ask(session, Flight(shot, clock()), clock)
                if flight.problem:
                    found.problems.append(flight.problem)
                    continue
                spans.append((flight.intended, flight.times[0], is_absent))
                if is_absent:
                    found.absent_ttft.append(flight.times[0] - flight.intended)
            await asyncio.sleep(pause_seconds)
            _check(live)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    for start, end, is_absent in spans:
        gap = max(largest_gap(flight.times, start, end + AFTER_SECONDS) for flight in live)
        (found.absent if is_absent else found.resident).append(gap)
    found.normal = normal_gaps([flight.times for flight in live], [(start, end) for start, end, _ in spans])
    return found


def _check(live: list[Flight]) -> None:
    for flight in live:
        if flight.problem or flight.tokens is not None:
            raise RuntimeError(f"a live stream ended before the measurement: {flight.problem or 'all tokens came'}")


def normal_gaps(streams: list[list[float]], spans: list[tuple[float, float]]) -> list[float]:
    """The gaps between tokens that touch no event, from the first event's start on."""
    first = min((start for start, _ in spans), default=0.0)
    return [
        late - early
        for times in streams
        for early, late in pairwise(times)
        if early >= first and not any(early < end + AFTER_SECONDS and late > start for start, end in spans)
    ]


def summary(found: Stalls) -> dict[str, float]:
    """Milliseconds. `of the load` is what an absent adapter's event takes more than a resident's, by medians."""
    resident, absent = quantile(found.resident, 0.5), quantile(found.absent, 0.5)
    return {
        "normal gap, p50": 1e3 * quantile(found.normal, 0.5),
        "normal gap, p99": 1e3 * quantile(found.normal, 0.99),
        "gap, resident adapter asked": 1e3 * resident,
        "gap, absent adapter asked": 1e3 * absent,
        "largest, absent": 1e3 * max(found.absent),
        "of the load": 1e3 * (absent - resident),
        "TTFT of the absent": 1e3 * quantile(found.absent_ttft, 0.5),
    }
