"""One hot adapter: a server of the merged version beside one that has it in a slot, asked in turn over HTTP."""

from __future__ import annotations

import asyncio
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path

from bench.client import closed_loop
from bench.gateway import bodies, first, rate
from bench.report import Report
from bench.restarts import embedded_shapes, write_adapter
from bench.served import Served, publish, serve

NAME, REF = "hot", "hot@1"
CONCURRENCY = (1, 4, 16)
TOKENS = 64


def run(rounds: int) -> list[Report]:
    """Both servers run at the same time; a ratio is taken within one round."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, ExitStack() as stack:
        files = write_adapter(Path(folder) / NAME, embedded_shapes(), seed=1)
        homes = [Path(folder) / form for form in ("slot", "merged")]
        for home in homes:  # a version that is ready costs no start of vLLM
            with serve("--engine", "scripted", home=home) as served:
                publish(served.gateway.url, NAME, files)
        slot = stack.enter_context(serve(home=homes[0]))
        merged = stack.enter_context(serve("--merged", REF, home=homes[1], timeout_seconds=900))
        base = slot.base_id()
        sides = [("merged", merged, NAME), ("in a slot", slot, NAME), ("its base", slot, base)]
        return [asyncio.run(compare(sides, rounds))]


async def compare(sides: list[tuple[str, Served, str]], rounds: int) -> Report:
    title = f"Decode with one hot adapter, tokens/s over HTTP, {TOKENS} a request (medians of {rounds} rounds)"
    report = Report(title)
    for concurrency in CONCURRENCY:
        speeds: dict[str, list[float]] = {name: [] for name, _, _ in sides}
        firsts: dict[str, list[float]] = {name: [] for name, _, _ in sides}
        for turn in range(rounds + 1):  # the first is for warming up
            for name, served, model in sides if turn % 2 else reversed(sides):
                asked = bodies(model, 2 * concurrency, TOKENS)
                seconds, timings = await closed_loop(served.gateway, asked, concurrency)
                if turn:
                    speeds[name].append(rate(seconds, timings))
                    firsts[name].append(first(timings))
        row: dict[str, object] = {"concurrency": concurrency}
        row |= {name: statistics.median(values) for name, values in speeds.items()}
        for other in ("in a slot", "its base"):
            pairs = zip(speeds["merged"], speeds[other], strict=True)
            row[f"merged / {other}"] = statistics.median(ours / theirs for ours, theirs in pairs)
        row["first token, merged / in a slot"] = statistics.median(
            ours / theirs for ours, theirs in zip(firsts["merged"], firsts["in a slot"], strict=True)
        )
        report.rows.append(row)
    return report
