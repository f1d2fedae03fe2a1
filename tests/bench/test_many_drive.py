"""The driver of the bench of many adapters: against a real server on the scripted engine, and one that stalls."""

from __future__ import annotations

import asyncio
import contextlib
import json
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientConnectionResetError, web

from adapters.bases import BaseModel
from bench.client import Target
from bench.many import stalls
from bench.many.drive import Asker, Flight, Window, measure
from bench.many.plan import BASE, Lengths, Load, Popularity, Shot
from bench.many.stats import Seen, Slo, goodput, quantile, waits
from tests.fixtures.service import Server, running

STALL_SECONDS = 2.0


def asker(server: Server, *names: str) -> Asker:
    models = {BASE: server.base.id, **dict(enumerate(names))}
    return Asker(Target("gateway", server.url), lambda shot: {"model": models[shot.model]}, server.headers)


def sent(to: Asker, load: Load, window: Window, seed: int = 1) -> list[Seen]:
    return asyncio.run(measure(to, load, seed, window))


def test_an_open_load_is_sent_as_planned_and_each_answer_is_whole(tiny_base: BaseModel, tmp_path: Path) -> None:
    load = Load("open", Popularity(2, 1.0, 0.2), Lengths(12, 0.3, 8, 16), Lengths(6, 0.3, 2, 8), rate=40.0)
    window = Window(0.5, 1.0, 5.0)
    with running(tiny_base, tmp_path) as server:
        server.script.seconds_per_token = 0.01
        server.pushed("light")
        server.pushed("dark")
        seen = sent(asker(server, "light", "dark"), load, window)
    planned = [shot for shot in load.arrivals(1, 1.5) if shot.at_seconds >= 0.5]
    assert [(one.model, one.asked_tokens) for one in seen] == [(shot.model, shot.output_tokens) for shot in planned]
    assert all(one.is_whole and one.got_tokens == one.asked_tokens for one in seen), [one.problem for one in seen]
    paces = [one.tpot_seconds for one in seen if one.tpot_seconds is not None]
    assert min(paces) > 0.005 and statistics.median(paces) < 0.1, "a token in 10 ms; a few may wait for a busy machine"
    assert {one.model for one in seen} == {BASE, 0, 1}
    assert sum(one.window_tokens for one in seen) <= sum(one.got_tokens for one in seen)


def test_a_closed_load_keeps_its_clients_busy_and_is_cut_off_at_its_end(tiny_base: BaseModel, tmp_path: Path) -> None:
    load = Load("closed", Popularity(2), Lengths(24), Lengths(20), clients=4)
    with running(tiny_base, tmp_path) as server:
        server.script.seconds_per_token = 0.02
        server.pushed("light")
        server.pushed("dark")
        began = time.monotonic()
        seen = sent(asker(server, "light", "dark"), load, Window(0.5, 1.5))
        assert time.monotonic() - began < 4.0
        answers = server.http.get("/ready").status_code
    assert answers == 200 and not any(one.problem for one in seen)
    cut = [one for one in seen if one.last is None]
    assert len(cut) == 4 and all(one.got_tokens < 20 for one in cut)
    counts = Counter(one.model for one in seen)
    assert abs(counts[0] - counts[1]) <= 1
    # four streams of a token in 20 ms for a second and a half, less what questions take
    assert 60 < sum(one.window_tokens for one in seen) <= 4 * 75 + 4


def test_a_closed_load_may_end_with_so_many_requests(tiny_base: BaseModel, tmp_path: Path) -> None:
    load = Load("first", Popularity(0), Lengths(30), Lengths(2), clients=1)
    with running(tiny_base, tmp_path) as server:
        began = time.monotonic()
        seen = sent(asker(server), load, Window(0.0, 60.0, requests=3))
    assert len(seen) == 3 and all(one.is_whole for one in seen) and time.monotonic() - began < 20


def test_a_refusal_is_counted_with_its_reason_and_never_as_an_answer(tiny_base: BaseModel, tmp_path: Path) -> None:
    load = Load("absent", Popularity(1), Lengths(8), Lengths(4), rate=10.0)
    with running(tiny_base, tmp_path) as server:
        seen = sent(asker(server, "nobody"), load, Window(0.0, 1.0, 5.0))
    assert seen and all(one.problem.startswith("404") and not one.is_whole for one in seen)
    assert goodput(seen, Slo(10.0, 10.0), 1.0) == 0.0
    assert quantile(waits(seen, 1.0), 0.0) == float("inf")


def test_an_answer_with_fewer_tokens_than_asked_is_a_problem() -> None:
    async def ask() -> Flight:
        async with serving(lambda body: 0.0, most_tokens=5) as to, to.session() as session:
            return await to.ask(session, Flight(Shot(0.0, BASE, 3, 50, 1), 0.0), time.perf_counter)

    assert asyncio.run(ask()).problem == "5 tokens came of 50"


Hold = Callable[[dict[str, Any]], float]  # for how long a request holds up everybody


@contextlib.asynccontextmanager
async def serving(hold: Hold, seconds_per_token: float = 0.0, most_tokens: int = 1000) -> AsyncIterator[Asker]:
    """A server in this very process: while a request holds it up, clients cannot do anything either."""

    async def answer(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        time.sleep(hold(body))  # noqa: ASYNC251 - that nobody can do anything meanwhile is the point
        stream = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await stream.prepare(request)
        tokens = min(body["max_tokens"], most_tokens)
        usage = json.dumps({"choices": [], "usage": {"completion_tokens": tokens}})
        with contextlib.suppress(ClientConnectionResetError):  # a client that was cut off
            for _ in range(tokens):
                await asyncio.sleep(seconds_per_token)
                await stream.write(b'data: {"choices": [{"text": "x"}]}\n\n')
            await stream.write(f"data: {usage}\n\ndata: [DONE]\n\n".encode())
        return stream

    app = web.Application()
    app.router.add_post("/v1/completions", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    try:
        yield Asker(Target("here", f"http://{host}:{port}"), lambda shot: {"model": shot.model})
    finally:
        await runner.cleanup()


def once(after: float, seconds: float) -> Hold:
    """The first request after so long."""
    at = [time.monotonic() + after]

    def hold(body: dict[str, Any]) -> float:
        if time.monotonic() < at[0]:
            return 0.0
        at[0] = float("inf")
        return seconds

    return hold


def test_a_stall_of_two_seconds_shows_in_p99_though_the_client_could_not_send_meanwhile() -> None:
    load = Load("open", Popularity(0), Lengths(4), Lengths(2), rate=20.0)

    async def seen() -> list[Seen]:
        async with serving(once(1.0, STALL_SECONDS)) as to:
            return await measure(to, load, 1, Window(0.0, 4.0, 5.0))

    found = asyncio.run(seen())
    times = waits(found, 9.0)
    assert all(one.is_whole for one in found)
    assert quantile(times, 0.99) > 0.75 * STALL_SECONDS and quantile(times, 0.5) < 1.0
    late = [one for one in found if one.ttft_seconds is not None and one.ttft_seconds > 0.2]
    assert 20 < len(late) < 60  # all that were meant to be sent within it: two seconds of twenty each
    by_sending = [one.first - one.sent for one in found if one.first is not None]
    assert quantile(by_sending, 0.95) < 0.5  # what a client sees that counts from when it could send


def test_a_load_shows_as_a_gap_between_the_tokens_of_live_streams_beyond_a_residents_prefill() -> None:
    def hold(body: dict[str, Any]) -> float:
        is_event = body["max_tokens"] == stalls.EVENT_TOKENS
        return (0.25 if body["model"] >= stalls.FIRST_ABSENT else 0.1) if is_event else 0.0

    async def seen() -> stalls.Stalls:
        async with serving(hold, seconds_per_token=0.01) as to:
            return await stalls.measure(to, adapters=8, seed=0, events=3, pause_seconds=0.2)

    found = asyncio.run(seen())
    row = stalls.summary(found)
    assert not found.problems and len(found.resident) == len(found.absent) == 3
    assert 9 < row["normal gap, p50"] < 60
    assert row["gap, resident adapter asked"] > 100 and row["largest, absent"] >= row["gap, absent adapter asked"] > 250
    assert row["of the load"] == pytest.approx(150, abs=60)


def test_live_streams_that_end_too_early_are_no_measurement(tiny_base: BaseModel, tmp_path: Path) -> None:
    async def seen(server: Server) -> stalls.Stalls:
        return await stalls.measure(asker(server, "nobody", "nobody"), 8, 0, 1)

    with running(tiny_base, tmp_path) as server, pytest.raises(RuntimeError, match="a live stream ended"):
        asyncio.run(seen(server))


def test_normal_gaps_are_those_that_touch_no_event() -> None:
    assert stalls.normal_gaps([[0.0, 1.0, 2.0, 5.0, 6.0, 7.0]], [(1.0, 1.5), (4.0, 5.5)]) == [1.0]
