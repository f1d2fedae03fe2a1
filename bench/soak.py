"""`python -m bench.soak [--minutes 60] [--adapters 24]`: adapters swapped for an hour on the real engine.

More adapters than the stage holds are asked for at random by a few clients, so that nearly every request loads one and
evicts another. What the server's and the engine's processes hold is sampled all the while, and its slope is taken by
least squares over the second half, when caches are full. Before and after, each of three adapters is asked alone and
without anything beside it: the same tokens must come, with the same log-probabilities to 1e-4.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import numpy as np
import psutil

from bench.client import JSON
from bench.report import Report, machine, write
from bench.restarts import embedded_shapes, write_adapter
from bench.served import Served, publish, serve
from server.machine import process_tree

STAGED, SLOTS, CLIENTS = 4, 4, 3
SAMPLE_SECONDS = 2.0
ASKED_ALONE, ALONE_TOKENS, TOLERANCE = 3, 12, 1e-4
MEGABYTE = 1e6


@dataclass
class Samples:
    """Resident bytes of each process, and descriptors of all, at seconds from the start."""

    seconds: list[float] = field(default_factory=list)
    rss: dict[str, list[float]] = field(default_factory=dict)
    descriptors: list[float] = field(default_factory=list)

    def take(self, at: float, processes: Mapping[str, psutil.Process]) -> None:
        self.seconds.append(at)
        for name, process in processes.items():
            self.rss.setdefault(name, []).append(float(process.memory_info().rss))
        self.descriptors.append(float(sum(process.num_fds() for process in processes.values())))

    def slope(self, values: Sequence[float]) -> float:
        """A second, by least squares over the second half."""
        half = len(values) // 2
        return float(np.polyfit(self.seconds[half:], values[half:], 1)[0])


@dataclass
class Asked:
    """What the clients saw."""

    seconds: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--adapters", type=int, default=24)
    parser.add_argument("--out", type=Path, default=Path("build/soak.json"))
    given = parser.parse_args(arguments)
    print(json.dumps(machine(), indent=2))
    report = run(given.minutes, given.adapters)
    report.print()
    write([report], given.out)


def run(minutes: float, adapters: int) -> Report:
    settings = {"HOTSHOE_STAGED_LIMIT": str(STAGED), "HOTSHOE_ACCESS_LOG": "none", "HOTSHOE_PROBE_ANSWER_TOKENS": "0"}
    with tempfile.TemporaryDirectory() as folder, serve("--slots", str(SLOTS), environment=settings) as served:
        names = [f"soak-{number:03d}" for number in range(adapters)]
        for number, name in enumerate(names):
            publish(served.gateway.url, name, write_adapter(Path(folder) / name, embedded_shapes(), seed=number))
        before = [_alone(served, name) for name in names[:ASKED_ALONE]]
        loads = _loads(served)
        samples, asked = asyncio.run(_swap(served, names, 60 * minutes))
        loads = _loads(served) - loads
        after = [_alone(served, name) for name in names[:ASKED_ALONE]]
    report = Report(f"{adapters} adapters swapped on {STAGED} places for {minutes:g} minutes")
    for name, values in samples.rss.items():
        report.rows.append(_row(name, samples, values, MEGABYTE, "MB"))
    whole = [sum(each) for each in zip(*samples.rss.values(), strict=True)]
    report.rows.append(_row("all", samples, whole, MEGABYTE, "MB"))
    report.rows.append(_row("descriptors", samples, samples.descriptors, 1.0, ""))
    report.notes.append(
        f"{len(asked.seconds)} requests answered, {statistics.median(asked.seconds):.2f} s each in the middle, {loads} "
        f"loads; failed: {len(asked.problems)}{' such as ' + asked.problems[0] if asked.problems else ''}. "
        f"{ASKED_ALONE} adapters asked alone before and after: {_compared(before, after)}."
    )
    return report


def _row(name: str, samples: Samples, values: Sequence[float], unit: float, word: str) -> dict[str, Any]:
    half = len(values) // 2
    return {
        "": f"{name}{', ' + word if word else ''}",
        "at the start": values[0] / unit,
        "half-way": values[half] / unit,
        "at the end": values[-1] / unit,
        "an hour, by the second half": 3600 * samples.slope(values) / unit,
    }


async def _swap(served: Served, names: Sequence[str], seconds: float) -> tuple[Samples, Asked]:
    samples, asked, begin = Samples(), Asked(), time.monotonic()
    processes = {_called(process, n): process for n, process in enumerate(process_tree(served.pid))}

    async def client(number: int) -> None:
        chance = random.Random(number)
        while time.monotonic() < begin + seconds:
            sent = time.monotonic()
            body = _body(chance.choice(names), chance.randrange(1 << 30), chance.randrange(4, 24))
            async with session.post(f"{served.gateway.url}/v1/completions", data=body, headers=JSON) as answer:
                text = await answer.text()
            if answer.status == 200:
                asked.seconds.append(time.monotonic() - sent)
            else:
                asked.problems.append(f"{answer.status} {text[:200]}")
                await asyncio.sleep(0.5)

    async def watch() -> None:
        while (at := time.monotonic() - begin) < seconds:
            samples.take(at, processes)
            await asyncio.sleep(SAMPLE_SECONDS)

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120)) as session:
        await asyncio.gather(watch(), *(client(number) for number in range(CLIENTS)))
    return samples, asked


def _called(process: psutil.Process, place: int) -> str:
    """The server is the first of its tree; of vLLM's the core has a title of its own."""
    words = " ".join(process.cmdline())
    if place == 0:
        return "server"
    return "engine core" if "EngineCore" in words else "API server" if "vllm_plugin.entry" in words else f"no. {place}"


def _body(model: str, seed: int, tokens: int) -> str:
    chance = random.Random(seed)
    prompt = [chance.randrange(100, 40_000) for _ in range(24)]
    return json.dumps({"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True})


def _alone(served: Served, name: str) -> list[tuple[str, float]]:
    """Greedy tokens with their log-probabilities."""
    body = {**json.loads(_body(name, 7, ALONE_TOKENS)), "logprobs": 1}
    answer = httpx.post(f"{served.gateway.url}/v1/completions", json=body, timeout=120)
    answer.raise_for_status()
    told = answer.json()["choices"][0]["logprobs"]
    return list(zip(told["tokens"], told["token_logprobs"], strict=True))


def _compared(before: Sequence[Sequence[tuple[str, float]]], after: Sequence[Sequence[tuple[str, float]]]) -> str:
    pairs = [pair for one, two in zip(before, after, strict=True) for pair in zip(one, two, strict=True)]
    if any(one[0] != two[0] for one, two in pairs):
        return "other tokens, which is an error"
    furthest = max(abs(one[1] - two[1]) for one, two in pairs)
    return (
        f"the same tokens, log-probabilities at most {furthest:.1e} apart{'' if furthest <= TOLERANCE else ': too far'}"
    )


def _loads(served: Served) -> int:
    text = httpx.get(f"{served.gateway.url}/metrics", timeout=10).text
    rows = (line for line in text.splitlines() if line.startswith('hotshoe_adapter_loads_total{outcome="loaded"}'))
    return round(sum(float(line.rpartition(" ")[2]) for line in rows))


if __name__ == "__main__":
    main()
