"""Requests for an adapter that is not in the engine: how long they wait for its load, and when else to come again.

Loads go one at a time, so what a request has to wait is what is left of the load that is going on, and one load for
each that is before its own and for its own. A load is taken to last as long as the longest of the last few: an estimate
that is too long costs a client a little patience, one that is too short a second refusal.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

import structlog

from adapters.errors import AdapterLoading
from server.metrics import Metrics

log = structlog.get_logger("hotshoe.cold_start")
T = TypeVar("T")
REMEMBERED = 8  # loads
FIRST_SECONDS = 5.0  # what a load is taken to last before any was measured
OVERDUE = 1.5  # one that lasts longer than all before is taken to need half of its time once more


class LoadTimes:
    """How long loads lasted, and since when one is going on; times are seconds of one clock."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=REMEMBERED)
        self._began_at: float | None = None

    def begin(self, now: float) -> None:
        self._began_at = now

    def end(self, now: float, *, is_loaded: bool) -> None:
        """A load that failed says nothing of the others' time."""
        if is_loaded and self._began_at is not None:
            self._seconds.append(now - self._began_at)
        self._began_at = None

    def wait_seconds(self, before: int, now: float) -> float:
        """Until a load ends that has so many others before it, the one that is going on among them."""
        each = max(self._seconds, default=FIRST_SECONDS)
        if self._began_at is None:
            return (before + 1) * each
        lasted = now - self._began_at
        return max(each, OVERDUE * lasted) - lasted + before * each


class ColdStarts:
    """The waits of one server's requests for loads."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._times = LoadTimes()

    @asynccontextmanager
    async def loading(self) -> AsyncIterator[None]:
        """Around one load, from when it is its turn."""
        self._times.begin(time.monotonic())
        is_loaded = False
        try:
            yield
            is_loaded = True
        finally:
            self._times.end(time.monotonic(), is_loaded=is_loaded)

    async def wait(self, model: str, load: asyncio.Task[T], patience_seconds: float, before: Callable[[], int]) -> T:
        """What the load comes to. Raises AdapterLoading at once when it is not expected in time, or when it does not
        come in time; the load goes on either way. `before` counts the loads that come before this one."""
        came_at = time.monotonic()
        expected = self._times.wait_seconds(before(), came_at)
        log.info("request waits for a load", model=model, expected_seconds=round(expected, 2), loads_before=before())
        if expected <= patience_seconds:
            await asyncio.wait({load}, timeout=patience_seconds)
        now = time.monotonic()
        if load.done():
            self._metrics.cold_requests.labels("waited").inc()
            self._metrics.cold_wait_seconds.observe(now - came_at)
            return load.result()
        self._metrics.cold_requests.labels("refused").inc()
        left = self._times.wait_seconds(before(), now)
        log.info("request does not wait for a load", model=model, waited_seconds=round(now - came_at, 2), left=left)
        raise AdapterLoading(
            f"{model} is being loaded, which takes about {left:.1f} s more, and a request waits at most "
            f"{patience_seconds:g} s (HOTSHOE_LOAD_WAIT_SECONDS): try again after Retry-After.",
            param="model",
            retry_after=left,
        )
