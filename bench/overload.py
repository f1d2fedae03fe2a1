"""`python -m bench overload`: more than the engine can do, on the real engine, with keys and tenants.

Peak is what 32 clients in a closed loop have answered. Open loads are Poisson arrivals at multiples of it; each request
says that its client waits WAIT_SECONDS (`x-hotshoe-timeout`), and counts as good where its whole answer came within
that time. Times count from when a request was meant to be sent, but for a refusal's, which counts from when it was: the
client has the engine's cores. The flood is another tenant's, at five times the peak.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import secrets
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import httpx

from bench.client import JSON, Target
from bench.many.stats import quantile
from bench.report import Report
from bench.restarts import embedded_shapes, write_adapter
from bench.served import Served, publish, serve

ADAPTERS = 4  # of each tenant
PROMPT, TOKENS = 32, 24
CLIENTS = 32  # at the peak
WAIT_SECONDS = 10.0
FACTORS = (0.5, 1.0, 2.0, 5.0, 10.0)
SECONDS, WARM_SECONDS = 20.0, 5.0
CALM, FLOOD = 0.2, 5.0  # of the peak
LEAVERS, POLL_SECONDS = 16, 0.02


@dataclass(frozen=True)
class Tenant:
    name: str
    key: str
    models: tuple[str, ...]  # its adapters


@dataclass(frozen=True)
class Told:
    """What came of one request; seconds from when it was meant to be sent, and for its refusal from when it was."""

    status: int  # 0: the connection failed
    intended: float
    whole_seconds: float
    answered_in: float

    @property
    def is_good(self) -> bool:
        return self.status == 200 and self.whole_seconds <= WAIT_SECONDS


def run(rounds: int) -> Iterator[Report]:
    """Rates in turn, then a flood, then clients that leave; medians over the rounds."""
    key = secrets.token_hex(16)
    with tempfile.TemporaryDirectory() as folder, serve("--api-key", key) as served:
        calm, flood = (_tenant(served, key, name, Path(folder)) for name in ("calm", "flood"))
        peaks = [asyncio.run(_peak(served.gateway, calm, turn)) for turn in range(rounds)]
        peak = statistics.median(peaks)
        yield _rates(served, calm, peaks, peak, rounds)
        yield _flooded(served, calm, flood, peak, rounds)
        yield _left(served, key, calm, rounds)


def _rates(served: Served, tenant: Tenant, peaks: Sequence[float], peak: float, rounds: int) -> Report:
    report = Report(f"Open loads beside the peak of {CLIENTS} clients ({rounds} rounds)")
    report.rows.append(_rate_row("closed", [{"offered/s": one, "good/s": one} for one in peaks], peak))
    for factor in FACTORS:
        found = []
        for turn in range(rounds):
            told = asyncio.run(_open(served.gateway, tenant, factor * peak, turn))
            refusals = [one.answered_in * 1e3 for one in told if one.status == 503]
            found.append(
                {
                    "offered/s": len(told) / SECONDS,
                    "good/s": sum(one.is_good for one in told) / SECONDS,
                    "refused": len(refusals) / len(told),
                    "refusal p50, ms": quantile(refusals, 0.5) if refusals else 0.0,
                    "refusal p99, ms": quantile(refusals, 0.99) if refusals else 0.0,
                    "late": sum(one.status == 200 and not one.is_good for one in told) / len(told),
                    "other": float(sum(one.status not in (200, 503) for one in told)),
                }
            )
        report.rows.append(_rate_row(f"{factor:g} x", found, peak))
    report.notes.append(
        f"Good: whole within {WAIT_SECONDS:g} s, which each request says that its client waits. Refused and late are "
        "shares of what was offered, other is a number."
    )
    return report


def _rate_row(load: str, found: Sequence[dict[str, float]], peak: float) -> dict[str, object]:
    names = ("offered/s", "good/s", "refused", "refusal p50, ms", "refusal p99, ms", "late", "other")
    medians = {name: statistics.median(one.get(name, 0.0) for one in found) for name in names}
    return {"load": load, "rounds": len(found), **medians, "good, of the peak": medians["good/s"] / peak}


def _flooded(served: Served, calm: Tenant, flood: Tenant, peak: float, rounds: int) -> Report:
    """A tenant's answers alone and beside a flood of another one, in turn."""
    alone, beside = [], []
    for turn in range(rounds):
        alone.append(_p95(asyncio.run(_open(served.gateway, calm, CALM * peak, turn))))
        beside.append(_p95(asyncio.run(_beside(served.gateway, calm, flood, peak, turn))))
    report = Report(f"A tenant beside another's flood of {FLOOD:g} times the peak ({rounds} rounds)")
    report.rows.append({"": "alone", "whole answer p95, s": statistics.median(alone)})
    report.rows.append({"": "beside the flood", "whole answer p95, s": statistics.median(beside)})
    ratios = [with_flood / without for with_flood, without in zip(beside, alone, strict=True)]
    report.notes.append(f"Beside the flood {statistics.median(ratios):.2f} times its own ({min(ratios):.2f} to "
                        f"{max(ratios):.2f}); it offers {CALM:g} of the peak.")  # fmt: skip
    return report


def _left(served: Served, key: str, tenant: Tenant, rounds: int) -> Report:
    """Streams that are cut off by their clients: when the gateway, and the engine, run nothing any more."""
    found = [asyncio.run(_leave(served, key, tenant)) for _ in range(rounds)]
    report = Report(f"{LEAVERS} clients leave their streams ({rounds} rounds)")
    for place, values in zip(("gateway", "engine"), zip(*found, strict=True), strict=True):
        report.rows.append({"": place, "free after, s": statistics.median(values), "longest, s": max(values)})
    return report


def _tenant(served: Served, key: str, name: str, folder: Path) -> Tenant:
    """A tenant with a key and adapters of its own."""
    answer = httpx.post(
        f"{served.gateway.url}/v1/keys", json={"scopes": ["infer", "upload"], "tenant": name}, headers=_bearer(key)
    )
    answer.raise_for_status()
    own, models = answer.json()["key"], []
    for number in range(ADAPTERS):
        model = f"{name}-{number}"
        files = write_adapter(folder / model, embedded_shapes(), seed=hash_of(model))
        publish(served.gateway.url, model, files, headers=_bearer(own))
        models.append(model)
    return Tenant(name, own, tuple(models))


def hash_of(text: str) -> int:
    """A seed that is the same in every process."""
    return random.Random(text).getrandbits(31)


def _bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def _body(tenant: Tenant, chance: random.Random, tokens: int = TOKENS) -> str:
    prompt = [chance.randrange(100, 40_000) for _ in range(PROMPT)]
    body = {"model": chance.choice(tenant.models), "prompt": prompt, "max_tokens": tokens, "ignore_eos": True}
    return json.dumps(body)


async def _ask(session: aiohttp.ClientSession, target: Target, tenant: Tenant, body: str, intended: float) -> Told:
    sent, status = time.perf_counter(), 0
    headers = {**JSON, **_bearer(tenant.key), "x-hotshoe-timeout": f"{WAIT_SECONDS:g}"}
    try:
        async with session.post(f"{target.url}/v1/completions", data=body, headers=headers) as answer:
            status = answer.status
            await answer.read()
    except (aiohttp.ClientError, TimeoutError, OSError):
        status = 0
    now = time.perf_counter()
    return Told(status, intended, now - intended, now - sent)


async def _peak(target: Target, tenant: Tenant, turn: int) -> float:
    """Whole answers a second of clients that ask one after the other."""
    begin = time.perf_counter() + WARM_SECONDS
    told: list[float] = []

    async def client(number: int) -> None:
        chance = random.Random(f"peak {turn} {number}")
        while time.perf_counter() < begin + SECONDS:
            one = await _ask(session, target, tenant, _body(tenant, chance), time.perf_counter())
            if one.status == 200:
                told.append(time.perf_counter())
            else:
                await asyncio.sleep(0.5)

    async with target.session() as session:
        await asyncio.gather(*(client(number) for number in range(CLIENTS)))
    return sum(begin <= at < begin + SECONDS for at in told) / SECONDS


async def _open(target: Target, tenant: Tenant, rate: float, turn: int) -> list[Told]:
    """Requests at this rate; those meant to be sent after the warm part count."""
    chance, begin = random.Random(f"open {tenant.name} {rate:.3f} {turn}"), time.perf_counter() + 0.2
    times, at = [], 0.0
    while (at := at + chance.expovariate(rate)) < WARM_SECONDS + SECONDS:
        times.append(at)
    bodies = [_body(tenant, chance) for _ in times]

    async def one(at: float, body: str) -> Told:
        await asyncio.sleep(begin + at - time.perf_counter())
        return await _ask(session, target, tenant, body, begin + at)

    async with target.session() as session:
        told = await asyncio.gather(*(one(at, body) for at, body in zip(times, bodies, strict=True)))
    return [each for each in told if each.intended >= begin + WARM_SECONDS]


async def _beside(target: Target, calm: Tenant, flood: Tenant, peak: float, turn: int) -> list[Told]:
    told, _ = await asyncio.gather(_open(target, calm, CALM * peak, turn), _open(target, flood, FLOOD * peak, turn))
    return told


def _p95(told: Sequence[Told]) -> float:
    """Of whole answers; one that failed or was refused counts as endless."""
    return quantile([one.whole_seconds if one.status == 200 else float("inf") for one in told], 0.95)


async def _leave(served: Served, key: str, tenant: Tenant) -> tuple[float, float]:
    chance = random.Random("leave")
    async with served.gateway.session() as session, served.engine.session() as engine:
        streams = [asyncio.ensure_future(_stream(session, served.gateway, tenant, chance)) for _ in range(LEAVERS)]
        while True:
            await asyncio.sleep(POLL_SECONDS)
            if await _gateway_runs(session, served.gateway, key) == LEAVERS and await _engine_runs(engine, served):
                break
        for stream in streams:
            stream.cancel()
        left = time.perf_counter()
        await asyncio.gather(*streams, return_exceptions=True)
        free = {"gateway": 0.0, "engine": 0.0}
        while not all(free.values()):
            if not free["gateway"] and not await _gateway_runs(session, served.gateway, key):
                free["gateway"] = time.perf_counter() - left
            if not free["engine"] and not await _engine_runs(engine, served):
                free["engine"] = time.perf_counter() - left
            await asyncio.sleep(POLL_SECONDS)
    return free["gateway"], free["engine"]


async def _stream(session: aiohttp.ClientSession, target: Target, tenant: Tenant, chance: random.Random) -> None:
    body = json.dumps({**json.loads(_body(tenant, chance, tokens=1000)), "stream": True})
    headers = {**JSON, **_bearer(tenant.key)}
    async with session.post(f"{target.url}/v1/completions", data=body, headers=headers) as answer:
        async for _ in answer.content:
            pass


async def _gateway_runs(session: aiohttp.ClientSession, target: Target, key: str) -> int:
    async with session.get(f"{target.url}/metrics", headers=_bearer(key)) as answer:
        found = re.search(r"^hotshoe_running_requests (\S+)", await answer.text(), re.MULTILINE)
    return int(float(found.group(1))) if found else 0


async def _engine_runs(session: aiohttp.ClientSession, served: Served) -> int:
    async with session.get(f"{served.engine.url}/hotshoe/usage") as answer:
        usage = await answer.json()
    return int(usage["running"])
