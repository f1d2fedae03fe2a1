"""What the gateway costs over the bare engine: the same requests in turn to the gateway and to the engine's socket.

Two engines: vLLM on the embedded base, where the cost is seen as users see it; and the scripted one, which answers at
once, so that the cost of each streamed event can be seen at all.
"""

from __future__ import annotations

import asyncio
import statistics

from bench.client import Target, Timing, closed_loop
from bench.report import Report
from bench.served import Served, serve

WORDS = ("light", "kitchen", "lamp", "door", "window", "heating", "bedroom", "blinds", "music", "garage", "garden")


def bodies(model: str, count: int, max_tokens: int) -> list[dict[str, object]]:
    """Streamed requests that differ in their first words, so that no prefix cache answers for the engine."""
    return [
        {
            "model": model,
            "stream": True,
            "temperature": 0,
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "messages": [{"role": "user", "content": f"{i} {WORDS[i % len(WORDS)]}: tell me about your day."}],
        }
        for i in range(count)
    ]


def rate(seconds: float, timings: list[Timing]) -> float:
    """Streamed events a second over all connections."""
    return sum(timing.events for timing in timings) / seconds


def first(timings: list[Timing]) -> float:
    return statistics.median(timing.first_seconds for timing in timings)


def per_event(timings: list[Timing]) -> float:
    """Median seconds between the events of one stream, after its first."""
    return statistics.median((t.total_seconds - t.first_seconds) / max(1, t.events - 1) for t in timings)


async def compare(served: Served, concurrency: int, rounds: int, requests: int, max_tokens: int) -> dict[str, object]:
    """Alternate rounds of the same requests through the gateway and past it; medians over rounds of their ratios."""
    model = served.base_id()
    throughput, ttft, events, extra = [], [], [], []
    for turn in range(rounds):
        order: tuple[Target, ...] = (served.gateway, served.engine)
        seen: dict[str, tuple[float, list[Timing]]] = {}
        for target in order if turn % 2 == 0 else reversed(order):
            seen[target.name] = await closed_loop(target, bodies(model, requests, max_tokens), concurrency)
        ours, bare = seen["gateway"], seen["engine"]
        throughput.append(rate(*ours) / rate(*bare))
        ttft.append((first(ours[1]) - first(bare[1])) * 1e3)
        events.append(per_event(ours[1]) / per_event(bare[1]))
        extra.append((per_event(ours[1]) - per_event(bare[1])) * 1e6)
    return {
        "concurrency": concurrency,
        "throughput, of the engine's": statistics.median(throughput),
        "TTFT, added ms": statistics.median(ttft),
        "time per event, of the engine's": statistics.median(events),
        "per event, added us": statistics.median(extra),
        "min..max of throughput": f"{min(throughput):.3f}..{max(throughput):.3f}",
    }


def on_vllm(rounds: int) -> Report:
    report = Report(f"Gateway over the bare engine, vLLM on the embedded base ({rounds} rounds, 16 tokens an answer)")
    with serve() as served:
        for concurrency in (1, 4, 16):
            report.rows.append(asyncio.run(compare(served, concurrency, rounds, max(4, concurrency), 16)))
    report.notes.append("Client, gateway and engine share the machine's cores; so a busy gateway slows the engine too.")
    return report


def on_scripted(rounds: int) -> Report:
    report = Report(f"Gateway over the bare engine, scripted answers ({rounds} rounds, 400 events an answer)")
    with serve("--engine", "scripted") as served:
        for concurrency in (1, 4, 16):
            report.rows.append(asyncio.run(compare(served, concurrency, rounds, concurrency * 4, 400)))
    return report


def run(rounds: int) -> list[Report]:
    return [on_vllm(rounds), on_scripted(rounds)]
