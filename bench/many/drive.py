"""Sends a load over HTTP and notes when each token came. It asks `/v1/completions` for streams, with token ids.

Open loads are sent when the plan says, whatever has been answered, and their times count from the plan's (so nothing is
omitted while a server or this client stalls). Closed loads have no such times: a slow answer delays the next question,
which is why they measure throughput only.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from bench.client import JSON, Target
from bench.many.plan import Load, Shot
from bench.many.stats import Seen

PATH = "/v1/completions"
LEAD_SECONDS = 0.2  # from the making of the tasks to the first of them
REFUSED_PAUSE_SECONDS = 0.5  # of a closed client
Body = Callable[[Shot], Mapping[str, Any]]


@dataclass(frozen=True)
class Window:
    """How long a load is sent before it counts, how long it counts, and how long answers are then waited for.

    A closed load may end earlier, when `requests` have been sent (0: no such end).
    """

    warm_seconds: float
    seconds: float
    drain_seconds: float = 0.0
    requests: int = 0

    @property
    def total_seconds(self) -> float:
        return self.warm_seconds + self.seconds + self.drain_seconds


@dataclass
class Flight:
    """One request on its way; times are seconds from the start of what counts."""

    shot: Shot
    intended: float
    sent: float = 0.0
    times: list[float] = field(default_factory=list)  # of each event with a piece of the answer
    tokens: int | None = None  # as the server counts them, at the end
    problem: str = ""

    def seen(self, window: Window) -> Seen:
        """What counts of it; an event stands for as many tokens as the server's count says."""
        is_whole = self.tokens is not None and not self.problem
        each = self.tokens / len(self.times) if is_whole and self.tokens and self.times else 1.0
        inside = sum(0 <= one < window.seconds for one in self.times)
        return Seen(
            model=self.shot.model,
            tenant=self.shot.tenant,
            intended=self.intended,
            sent=self.sent,
            first=self.times[0] if self.times else None,
            last=self.times[-1] if is_whole and self.times else None,
            asked_tokens=self.shot.output_tokens,
            got_tokens=round(each * len(self.times)),
            window_tokens=round(each * inside),
            problem=self.problem,
        )


@dataclass(frozen=True)
class Asker:
    """A side that speaks HTTP: where it is, and what a request for a shot says to it beside what all are told."""

    target: Target
    body: Body
    headers: Mapping[str, str] = field(default_factory=dict)

    def session(self) -> aiohttp.ClientSession:
        """Each request has a connection of its own: llama.cpp's server closes one after a stream, unannounced."""
        return self.target.session(total_seconds=None, force_close=True)

    async def ask(self, session: aiohttp.ClientSession, flight: Flight, clock: Callable[[], float]) -> Flight:
        """Send it and take the answer in; whatever goes wrong is its `problem`."""
        shot = flight.shot
        body = {
            "prompt": shot.prompt(),
            "max_tokens": shot.output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.body(shot),
        }
        data = json.dumps(body)
        flight.sent = clock()
        try:
            url = f"{self.target.url}{PATH}"
            async with session.post(url, data=data, headers={**JSON, **self.headers}) as answer:
                if answer.status != 200:
                    flight.problem = f"{answer.status} {(await answer.text())[:200]}"
                else:
                    await _read(answer, flight, clock)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            flight.problem = f"{type(error).__name__} {error}"[:200]
        return flight


async def _read(answer: aiohttp.ClientResponse, flight: Flight, clock: Callable[[], float]) -> None:
    async for line in answer.content:
        data = line.removeprefix(b"data:").strip()
        if not line.startswith(b"data:") or data == b"[DONE]":
            continue
        event = json.loads(data)
        if event.get("error"):
            flight.problem = str(event["error"])[:200]
        if event.get("usage"):
            flight.tokens = int(event["usage"]["completion_tokens"])
        if event.get("choices"):
            flight.times.append(clock())
    if flight.tokens != flight.shot.output_tokens and not flight.problem:
        flight.problem = f"{flight.tokens} tokens came of {flight.shot.output_tokens}"


async def measure(asker: Asker, load: Load, seed: int, window: Window) -> list[Seen]:
    """Send the load for one window; what is still on its way at the end is cut off, and counts as it stands.

    An open load's requests count where they are meant to be sent within the window; a closed one's, where any part of
    them lies in it.
    """
    async with asker.session() as session:
        if load.rate is not None:
            flights = await _open(asker, session, load.arrivals(seed, window.warm_seconds + window.seconds), window)
            return [one.seen(window) for one in flights if one.intended >= 0]
        flights = await _closed(asker, session, load, seed, window)
        return [one.seen(window) for one in flights if not one.times or one.tokens is None or one.times[-1] >= 0]


async def _open(asker: Asker, session: aiohttp.ClientSession, shots: list[Shot], window: Window) -> list[Flight]:
    start = time.perf_counter() + LEAD_SECONDS + window.warm_seconds

    def clock() -> float:
        return time.perf_counter() - start

    flights = [Flight(shot, shot.at_seconds - window.warm_seconds) for shot in shots]

    async def one(flight: Flight) -> None:
        await asyncio.sleep(flight.intended - clock())
        await asker.ask(session, flight, clock)

    await _until(window.seconds + window.drain_seconds, clock, [asyncio.ensure_future(one(each)) for each in flights])
    return flights


async def _closed(asker: Asker, session: aiohttp.ClientSession, load: Load, seed: int, window: Window) -> list[Flight]:
    start = time.perf_counter() + window.warm_seconds
    flights: list[Flight] = []
    shots: Iterator[Shot] = load.shots(seed)  # one row of questions, of which each client takes the next

    def clock() -> float:
        return time.perf_counter() - start

    async def client() -> None:
        while not window.requests or len(flights) < window.requests:
            flight = Flight(next(shots), clock())
            flights.append(flight)
            await asker.ask(session, flight, clock)
            if flight.problem:
                await asyncio.sleep(REFUSED_PAUSE_SECONDS)

    await _until(window.seconds, clock, [asyncio.ensure_future(client()) for _ in range(load.clients)])
    return flights


async def _until(end: float, clock: Callable[[], float], tasks: list[asyncio.Future[None]]) -> None:
    """Let the tasks run until the clock says `end` or all are done, then cut them off; raises what one of them did."""
    if not tasks:
        return
    await asyncio.wait(tasks, timeout=max(0.0, end - clock()))
    for task in tasks:
        task.cancel()
    for outcome in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(outcome, Exception):
            raise outcome
