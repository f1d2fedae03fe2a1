"""A streaming client that adds as little of its own as it can: it times the arrival of each event, parses none."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass
from pathlib import Path

import aiohttp


@dataclass(frozen=True)
class Target:
    """Where requests go: an address over TCP, or a path on a Unix socket."""

    name: str
    url: str
    socket: Path | None = None

    def session(self, total_seconds: float | None = 300, *, force_close: bool = False) -> aiohttp.ClientSession:
        """Any number of connections, each for one request only where `force_close`; a request may take so long."""
        timeout = aiohttp.ClientTimeout(total=total_seconds)
        if self.socket:
            unix = aiohttp.UnixConnector(str(self.socket), limit=0, force_close=force_close)
            return aiohttp.ClientSession(connector=unix, timeout=timeout)
        return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=force_close), timeout=timeout)


@dataclass(frozen=True)
class Timing:
    """One answer: seconds to the first event and to the end, and the number of events."""

    first_seconds: float
    total_seconds: float
    events: int


async def stream_once(session: aiohttp.ClientSession, target: Target, body: dict[str, object]) -> Timing:
    """One streamed request; raises on any answer but 200."""
    started = time.perf_counter()
    first, events = 0.0, 0
    async with session.post(f"{target.url}/v1/chat/completions", data=json.dumps(body), headers=JSON) as answer:
        if answer.status != 200:
            raise RuntimeError(f"{target.name} answered {answer.status}: {await answer.text()}")
        async for chunk in answer.content.iter_any():
            if not events:
                first = time.perf_counter() - started
            events += chunk.count(b"data: ")
    return Timing(first, time.perf_counter() - started, events)


JSON = {"Content-Type": "application/json"}


async def closed_loop(target: Target, bodies: list[dict[str, object]], concurrency: int) -> tuple[float, list[Timing]]:
    """All bodies, at most `concurrency` at a time; answers with the wall seconds and each timing."""
    gate = asyncio.Semaphore(concurrency)
    async with target.session() as session:

        async def one(body: dict[str, object]) -> Timing:
            async with gate:
                return await stream_once(session, target, body)

        await stream_once(session, target, bodies[0])  # the connection, and any first-request work, is not measured
        started = time.perf_counter()
        timings = await asyncio.gather(*(one(body) for body in bodies))
        return time.perf_counter() - started, list(timings)
