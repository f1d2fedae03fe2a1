"""What a running fine-tuning job costs those who are served: the same requests while a job trains and while it rests.

Both in one run on one server, in turn: the job is resumed and paused, so that nothing else differs.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import openai

from bench.client import Timing, closed_loop
from bench.gateway import bodies
from bench.many.stats import quantile
from bench.report import Report
from bench.served import Served, serve
from examples.agent_routing.data import ENGLISH, make

REQUESTS, TOKENS, CONCURRENCY = 24, 48, 4
READY_SECONDS = 300.0
EPOCHS = 200  # more than the bench lasts


def run(rounds: int) -> Iterator[Report]:
    """Time between tokens and to the first one, p50 and p95 over requests; medians over the rounds."""
    found: dict[str, list[dict[str, float]]] = {"the job rests": [], "the job trains": []}
    with serve() as served:
        client = openai.OpenAI(base_url=f"{served.gateway.url}/v1", api_key="unused")
        job = started(client, served.base_id())
        for turn in range(rounds):
            for name in found if turn % 2 == 0 else reversed(found):
                settle(client, job, trains=name == "the job trains")
                found[name].append(measured(served))
        client.fine_tuning.jobs.cancel(job)
    report = Report(f"Serving beside a fine-tuning job: {CONCURRENCY} streams of {TOKENS} tokens")
    for name, seen in found.items():
        report.rows.append({"": name, **{key: statistics.median(one[key] for one in seen) for key in seen[0]}})
    quiet, busy = (row["p95 ms a token"] for row in report.rows)
    report.notes.append(
        f"p95 time a token beside a job that trains: {busy / quiet:.2f} times; {rounds} rounds in turn."
    )
    yield report


def started(client: openai.OpenAI, base: str) -> str:
    """The id of a job on the demo's rows, which will not end by itself."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.jsonl"
        path.write_text("".join(json.dumps(row.as_chat()) + "\n" for row in make(ENGLISH).splits["train"]), "utf-8")
        file = client.files.create(file=path, purpose="fine-tune")
    settings: Any = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": EPOCHS}}}
    return client.fine_tuning.jobs.create(model=base, training_file=file.id, method=settings, seed=1).id


def settle(client: openai.OpenAI, job: str, *, trains: bool) -> None:
    """Have the job train, and wait for its first step; or rest, and wait until its process has gone."""
    state = ours(client, job)
    if trains and state["status"] == "paused":
        client.fine_tuning.jobs.resume(job)
    if not trains and state["status"] != "paused":
        client.fine_tuning.jobs.pause(job)
    before, deadline = state["progress"], time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        state = ours(client, job)
        has_stepped = state["phase"] == "training" and state["progress"] != before
        if state["is_working"] is trains and (has_stepped or not trains):
            return
        time.sleep(0.5)
    raise RuntimeError(f"the job did not settle: {state}")


def ours(client: openai.OpenAI, job: str) -> dict[str, Any]:
    found: dict[str, Any] = client.fine_tuning.jobs.retrieve(job).model_dump()["hotshoe"]
    return found


def measured(served: Served) -> dict[str, float]:
    """One round of requests."""
    asked = bodies(served.base_id(), REQUESTS, TOKENS)
    seconds, timings = asyncio.run(closed_loop(served.gateway, asked, CONCURRENCY))
    between = [(one.total_seconds - one.first_seconds) / max(1, one.events - 1) * 1e3 for one in timings]
    first = [one.first_seconds * 1e3 for one in timings]
    return {
        "p50 ms a token": statistics.median(between),
        "p95 ms a token": quantile(between, 0.95),
        "p50 ms to the first": statistics.median(first),
        "p95 ms to the first": quantile(first, 0.95),
        "tokens/s": tokens(timings) / seconds,
    }


def tokens(timings: Sequence[Timing]) -> int:
    return sum(one.events for one in timings)
