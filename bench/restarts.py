"""What an engine's sudden end costs those who use it: a whole server under load whose engine is killed again and again.

`hotshoe serve` on the embedded base with several adapters warm. Clients stream and do not stream, one request after the
other, on base and adapters in turn. In the middle of a stream the engine is killed with SIGKILL: all of its processes,
its core only (which is what running out of memory looks like), or its API process only, in turn.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil

from bench.load import Load, Outcome, Request, verdict
from bench.report import Report, spread
from bench.served import Served, publish, serve

ADAPTERS = ("light", "kitchen", "music", "garage")
PROMPTS = ("Turn the light on.", "What is the weather like today?", "Write a line about the sea.")
STREAMING, WHOLE = 4, 2  # clients
MAX_TOKENS = 24
LIFE_SECONDS = (3.0, 8.0)  # of load between ready and the next kill, at random
READY_SECONDS = 600.0
POLL_SECONDS, READY_POLL_SECONDS = 0.02, 0.2
KINDS = ("all processes", "core only", "API process only")
RANK, ALPHA, B_SCALE = 8, 16, 0.2
SEED = 12


@dataclass
class Kill:
    """One kill, and what it came to. Seconds are from the kill."""

    kind: str
    at: float
    running_streams: int
    not_ready_seconds: float = 0.0
    ready_seconds: float = 0.0
    adapters_back: int = 0
    pause_seconds: float = 0.0  # that the supervisor waited before the start
    requests: list[Request] = field(default_factory=list)  # that ended until the next kill

    def count(self, outcome: Outcome, *, is_stream: bool | None = None) -> int:
        return sum(request.outcome is outcome and is_stream in (None, request.is_stream) for request in self.requests)


def run(kills: int) -> list[Report]:
    with serve(timeout_seconds=READY_SECONDS) as served:
        return asyncio.run(_run(served, kills))


async def _run(served: Served, kills: int) -> list[Report]:
    base = served.base_id()
    await asyncio.to_thread(push_adapters, served)
    models = {base: base, **{name: f"{name}@1" for name in ADAPTERS}}
    load = Load(served.gateway, models, PROMPTS, MAX_TOKENS)
    known = await answers_alone(load)
    load.requests.clear()
    clients = asyncio.create_task(load.run(STREAMING, WHOLE))
    done = [await one_kill(served, load, KINDS[turn % len(KINDS)], turn) for turn in range(kills)]
    await asyncio.sleep(LIFE_SECONDS[1])
    load.is_over = True
    await clients
    for kill, pause in zip(done, pauses(served.log), strict=True):
        kill.pause_seconds = pause
    share_out(done, load.requests)
    return reports(done, load, known)


def push_adapters(served: Served) -> None:
    """Several adapters of random weights, published and so warm."""
    shapes = embedded_shapes()
    with tempfile.TemporaryDirectory() as folder:
        for seed, name in enumerate(ADAPTERS):
            publish(served.gateway.url, name, write_adapter(Path(folder) / name, shapes, seed))


def embedded_shapes() -> dict[str, tuple[int, int]]:
    """(in, out) of every projection of the embedded base."""
    from adapters.bases import load_base
    from adapters.embedded import default_base

    return {name: (shape.in_features, shape.out_features) for name, shape in load_base(default_base()).shapes.items()}


def write_adapter(folder: Path, shapes: dict[str, tuple[int, int]], seed: int) -> dict[str, Path]:
    """A LoRA of random weights, in PEFT's layout; returns the parts of an upload."""
    from safetensors.numpy import save_file

    chance = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    for name, (inputs, outputs) in shapes.items():
        a = chance.standard_normal((RANK, inputs), dtype=np.float32) / np.float32(inputs**0.5)
        b = chance.standard_normal((outputs, RANK), dtype=np.float32) * np.float32(B_SCALE)
        tensors |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
    folder.mkdir()
    modules = sorted({name.rpartition(".")[2] for name in shapes})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA, "target_modules": modules}
    paths = {"config": folder / "adapter_config.json", "weights": folder / "adapter_model.safetensors"}
    paths["config"].write_text(json.dumps(config))
    save_file(tensors, paths["weights"])
    return paths


async def answers_alone(load: Load) -> dict[tuple[str, str], str]:
    """What each model says to each prompt when nobody else asks: no two of them may begin alike."""
    known: dict[tuple[str, str], str] = {}
    async with load.target.session() as session:
        for model in load.models:
            for prompt in load.prompts:
                one = await load.ask(session, Request(model, prompt, is_stream=True))
                if one.outcome is not Outcome.WHOLE:
                    raise RuntimeError(f"{model} does not answer: {one.outcome} {one.detail}")
                known[model, prompt] = one.text
    for prompt in load.prompts:
        found = [
            verdict(Request(m, prompt, True, 1, known[m, prompt], v), load.models, known)
            for m, v in load.models.items()
        ]
        starts = {known[model, prompt][:16] for model in load.models}
        if set(found) != {"right"} or len(starts) != len(load.models):
            raise RuntimeError(f"the models cannot be told apart by their answers to {prompt!r}: {starts}")
    return known


async def one_kill(served: Served, load: Load, kind: str, turn: int) -> Kill:
    """Kill the engine in the middle of a stream, and watch /ready until it is back."""
    await asyncio.sleep(random.Random(f"{SEED} {turn}").uniform(*LIFE_SECONDS))
    leader, core = await asyncio.to_thread(processes, served)
    async with asyncio.timeout(READY_SECONDS):
        running = await streams_running(load)
    kill = Kill(kind, time.monotonic(), running)
    if kind == KINDS[0]:
        os.killpg(leader, signal.SIGKILL)
    else:
        os.kill(core if kind == KINDS[1] else leader, signal.SIGKILL)
    async with served.gateway.session() as session:
        kill.not_ready_seconds = await until(session, served, False, kill.at)
        kill.ready_seconds = await until(session, served, True, kill.at)
        kill.adapters_back = await adapters_there(session, served)
    shown = f"kill {turn + 1} ({kind}): not ready {kill.not_ready_seconds:.2f} s, ready {kill.ready_seconds:.1f} s"
    print(shown, flush=True)
    return kill


async def streams_running(load: Load) -> int:
    """How many streams have begun and not ended, as soon as there is one."""
    while True:
        running = sum(request.is_stream and request.is_running for request in load.requests)
        if running:
            return running
        await asyncio.sleep(POLL_SECONDS)


def processes(served: Served) -> tuple[int, int]:
    """Process ids of the engine's API process and of its core."""
    server = psutil.Process(int(str(served.system()["pid"])))
    leader = next(child for child in server.children() if "vllm_plugin" in " ".join(child.cmdline()))
    core = next(child for child in leader.children() if "EngineCore" in " ".join(child.cmdline()))
    return leader.pid, core.pid


async def until(session: aiohttp.ClientSession, served: Served, is_ready: bool, since: float) -> float:
    """Seconds from `since` until /ready says so."""
    while time.monotonic() - since < READY_SECONDS:
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            async with session.get(f"{served.gateway.url}/ready", timeout=aiohttp.ClientTimeout(total=5)) as answer:
                if (answer.status == 200) is is_ready:
                    return time.monotonic() - since
        await asyncio.sleep(READY_POLL_SECONDS if is_ready else POLL_SECONDS)
    raise RuntimeError(f"/ready did not become {is_ready} in {READY_SECONDS:g} s")


async def adapters_there(session: aiohttp.ClientSession, served: Served) -> int:
    async with session.get(f"{served.gateway.url}/v1/system") as answer:
        rows = (await answer.json())["adapters"]
    return sum(row["place"] != "absent" for row in rows)


def pauses(log: Path) -> list[float]:
    """The supervisor's pause before each restart, from the server's log."""
    lines = (json.loads(line) for line in log.read_text().splitlines() if line.startswith("{"))
    return [float(line["restart_in_seconds"]) for line in lines if line.get("event") == "engine died"]


def share_out(kills: Sequence[Kill], requests: Sequence[Request]) -> None:
    """Give each request to the last kill before its end; those that ended before the first go to none."""
    for request in requests:
        before = [kill for kill in kills if kill.at <= request.ended_at]
        if before:
            before[-1].requests.append(request)


def reports(kills: list[Kill], load: Load, known: dict[tuple[str, str], str]) -> list[Report]:
    times = Report(f"SIGKILL to ready, seconds ({len(kills)} kills under load, {len(ADAPTERS)} adapters warm)")
    times.rows = [time_row(kind, [kill for kill in kills if kind in (kill.kind, "all")]) for kind in (*KINDS, "all")]
    times.notes.append("The pause is the supervisor's, which grows where one death follows another within a minute.")
    verdicts = Counter(verdict(request, load.models, known) for request in load.requests)
    outcomes = Report(f"What became of the requests ({STREAMING} clients streaming, {WHOLE} not)")
    outcomes.rows = [outcome_row(kind, [k for k in kills if kind in (k.kind, "all")]) for kind in (*KINDS, "all")]
    whole = sum(request.outcome is Outcome.WHOLE for request in load.requests)
    outcomes.notes.append(
        f"{len(load.requests)} requests, {whole} answered whole. Answers of another version: {verdicts['wrong']}; "
        f"whose first words are no version's: {verdicts['unknown']}."
    )
    odd = (Outcome.LOST, Outcome.SILENT, Outcome.FAILED)
    outcomes.notes += [f"{r.outcome}: {r.model} {r.detail}" for r in load.requests if r.outcome in odd][:20]
    each = Report("Each kill")
    each.rows = [each_row(number, kill) for number, kill in enumerate(kills, 1)]
    return [times, outcomes, each]


def time_row(kind: str, kills: Sequence[Kill]) -> dict[str, Any]:
    row: dict[str, Any] = {"killed": kind, "kills": len(kills)}
    columns = {
        "not ready": [kill.not_ready_seconds for kill in kills],
        "ready again": [kill.ready_seconds for kill in kills],
        "ready, less the pause": [kill.ready_seconds - kill.pause_seconds for kill in kills],
    }
    for name, values in columns.items():
        found = spread(values) if values else {"median": float("nan"), "max": float("nan")}
        row |= {f"{name}, median": found["median"], f"{name}, max": found["max"]}
    return row


def outcome_row(kind: str, kills: Sequence[Kill]) -> dict[str, Any]:
    def total(outcome: Outcome, **which: bool) -> int:
        return sum(kill.count(outcome, **which) for kill in kills)

    return {
        "killed": kind,
        "streams running at the kill": sum(kill.running_streams for kill in kills),
        "ended with an error event": total(Outcome.ERROR_EVENT),
        "ended silently": total(Outcome.SILENT),
        "503 with Retry-After": total(Outcome.REFUSED),
        "other answers": total(Outcome.FAILED),
        "lost": total(Outcome.LOST),
        "adapters back at ready": f"{sum(k.adapters_back for k in kills)} of {len(kills) * len(ADAPTERS)}",
    }


def each_row(number: int, kill: Kill) -> dict[str, Any]:
    times = {"not ready": kill.not_ready_seconds, "ready": kill.ready_seconds, "pause": kill.pause_seconds}
    counts = {"streams": kill.running_streams, "error events": kill.count(Outcome.ERROR_EVENT)}
    return {"kill": number, "killed": kill.kind, **times, **counts, "503": kill.count(Outcome.REFUSED)}
