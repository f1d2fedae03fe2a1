"""Looks at every source now and then and pulls what is new there. One adapter that is wrong never stops a look.

What was refused or pulled is left alone until it changes; what failed for another reason is tried again with growing
pauses. Everything waits until the server is ready, so that no pull delays a start.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

import structlog

from adapters.errors import HotshoeError, SourceChanged
from adapters.sources.found import Found
from adapters.sources.pulls import last_pulls
from server.services import Caller, Services
from server.sources import Pull, Seen, WatchedSource, detached, pull, state_after
from server.tasks import end_tasks

log = structlog.get_logger("hotshoe.sources")
READY_POLL_SECONDS = 0.2
LONGEST_RETRY_SECONDS = 3600.0
UNEXPECTED = HotshoeError("Something failed inside the server; its log says what.")


@dataclass
class SourceSync:
    """The worker of all sources that are looked at by themselves."""

    services: Services
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)

    async def start(self) -> None:
        watched = [one for one in self.services.sources if one.settings.every_seconds is not None]
        self._tasks = [asyncio.create_task(self._watch(one)) for one in watched]

    async def stop(self) -> None:
        """A pull that is under way is given up; nothing of it stays."""
        await end_tasks(*self._tasks)
        self._tasks = []

    async def _watch(self, watched: WatchedSource) -> None:
        while True:
            is_ready = self.services.lifecycle.is_ready(self.services)
            if is_ready:
                await look_at(self.services, watched)
            await asyncio.sleep(watched.settings.every_seconds or 0 if is_ready else READY_POLL_SECONDS)


async def look_at(services: Services, watched: WatchedSource) -> None:
    """One look, and a pull of whatever is new and written to its end. Raises nothing but cancellation."""
    error: HotshoeError | None = None
    try:
        await _look_at(services, watched)
    except HotshoeError as failure:
        error = failure
    except Exception:
        log.exception("looking at a source failed", source=watched.settings.name)
        error = UNEXPECTED
    watched.looked_at, watched.error = time.time(), error
    watched.failures = watched.failures + 1 if error else 0
    services.metrics.source_looks.labels(watched.settings.name, "failed" if error else "done").inc()
    if error is not None:
        log.warning("source failed", source=watched.settings.name, code=error.code, reason=error.message)


async def _look_at(services: Services, watched: WatchedSource) -> None:
    await _remember(services, watched)
    found = await detached(watched.source.look)
    there = {one.location for one in found}
    watched.seen = {place: seen for place, seen in watched.seen.items() if place in there}
    changed = [one for one in found if not _is_done(watched, one)]
    if changed and watched.source.settle_seconds:
        await asyncio.sleep(watched.source.settle_seconds)
        again = {one.location: one.fingerprint for one in await detached(watched.source.look)}
    else:
        again = {one.location: one.fingerprint for one in changed}
    for one in changed:
        if again.get(one.location) == one.fingerprint:
            await _take(services, watched, one)
        else:
            changing = SourceChanged(f"{one.location} is being written: it is looked at again.")
            watched.seen[one.location] = _seen(one, "waiting", changing)


async def _remember(services: Services, watched: WatchedSource) -> None:
    """Read, once, what earlier runs made of this source."""
    if watched.before is None:
        name, tenant = watched.settings.name, watched.settings.tenant
        watched.before = await asyncio.to_thread(last_pulls, services.registry, tenant, name, services.base.digest)


def _is_done(watched: WatchedSource, found: Found) -> bool:
    seen = watched.seen.get(found.location)
    if seen is None:
        before = (watched.before or {}).get((found.location, found.name))
        if before is None:
            return False
        state, version = ("refused", None) if before.is_rejected else ("taken", f"{before.name}@{before.number}")
        seen = Seen(found.name, found.location, before.fingerprint, state, version, at=before.at)
        watched.seen[found.location] = seen
    return seen.is_done(found)


async def _take(services: Services, watched: WatchedSource, found: Found) -> None:
    """Make what was found a version, or note why it is none."""
    owner = Caller(watched.settings.tenant, f"source:{watched.settings.name}")
    earlier = watched.seen.get(found.location)
    try:
        version = await pull(services, Pull(watched, found, found.name, owner))
    except HotshoeError as error:
        seen = _seen(found, state_after(error), error)
        log.warning("adapter not taken", source=watched.settings.name, state=seen.state, code=seen.code)
    except Exception:
        log.exception("a pull failed", source=watched.settings.name)
        seen = _seen(found, "failed", UNEXPECTED)
    else:
        seen = Seen(found.name, found.location, found.fingerprint, "taken", version.ref)
    if seen.state == "failed":
        seen.attempts = (earlier.attempts if earlier and earlier.state == "failed" else 0) + 1
        pause = (watched.settings.every_seconds or 0) * 2.0 ** min(seen.attempts, 12)
        seen.retry_at = time.monotonic() + min(pause, LONGEST_RETRY_SECONDS)
    watched.seen[found.location] = seen


def _seen(found: Found, state: str, error: HotshoeError) -> Seen:
    return Seen(found.name, found.location, found.fingerprint, state, code=error.wire_code, message=error.message)
