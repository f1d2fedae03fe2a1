"""What a load costs those who are being answered: the longest pause between two tokens of live streams while it lasts.

Streams run without an end while, one after the other and each for itself: nothing happens; a short request comes for
the adapter that they use; an adapter is loaded; a loaded adapter that has no slot is used. Each such event has a
window, and its stall is the longest gap that touches the window, less the median gap of the quiet time right before
it, since a machine's speed may drift. The events that are nothing last as long as loads do, and tell what this machine
does by itself.

Forms, each an engine of its own in turn, asked on its own socket: ours; ours with staging off (HOTSHOE_LORA_STAGE=0);
vLLM without our plugins, loading through its own route. Choices: `python -m bench.load_stall --help`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from adapters.bases import PROJECTIONS
from bench.client import JSON, Target
from bench.many.processes import is_up, process
from bench.report import Report, machine, write

STREAMS, TOKENS = 4, 1000
RANK, SLOTS, STAGED = 16, 3, 64
CONTEXT_TOKENS, KV_CACHE_BYTES = 4096, 512 << 20
PAUSE_SECONDS, AFTER_SECONDS, QUIET_SECONDS = (
    0.4,
    0.05,
    0.3,
)  # between events; of a window after one; of quiet before one
FORMS = ("ours", "ours, staging off", "vLLM")
LIVE = "live"
LOAD, FIRST, BASE, NOTHING = "a load", "a first use", "a request", "nothing"


@dataclass
class Recorder:
    """Times between tokens of all streams, and the windows of events, in seconds of one clock."""

    gaps: list[tuple[float, float]] = field(default_factory=list)  # begin and end
    windows: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    quiet: dict[str, list[tuple[float, float]]] = field(default_factory=dict)  # before each of these
    seconds: dict[str, list[float]] = field(default_factory=dict)  # that an event itself took

    async def event(self, kind: str, work: Awaitable[object]) -> None:
        quiet = time.perf_counter()
        await asyncio.sleep(QUIET_SECONDS)
        begin = time.perf_counter()
        await work
        end = time.perf_counter()
        await asyncio.sleep(PAUSE_SECONDS)
        self.quiet.setdefault(kind, []).append((quiet, begin))
        self.windows.setdefault(kind, []).append((begin, end + AFTER_SECONDS))
        self.seconds.setdefault(kind, []).append(end - begin)

    def within(self, windows: Sequence[tuple[float, float]]) -> list[list[float]]:
        """For each window the gaps that touch it."""
        return [[end - begin for begin, end in self.gaps if begin < last and end > first] for first, last in windows]


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def rows_of(form: str, seen: Recorder) -> Iterator[dict[str, object]]:
    for kind in (NOTHING, BASE, LOAD, FIRST):
        found, quiet = seen.within(seen.windows[kind]), seen.within(seen.quiet[kind])
        pairs = [(gaps, before) for gaps, before in zip(found, quiet, strict=True) if gaps and before]
        every = [gap for gaps, _ in pairs for gap in gaps]
        stalls = [max(gaps) - statistics.median(before) for gaps, before in pairs]
        yield {
            "engine": form,
            "while there is": kind,
            "events": len(pairs),
            "gap p50 ms": 1000 * percentile(every, 0.5),
            "gap p99 ms": 1000 * percentile(every, 0.99),
            "gap max ms": 1000 * max(every),
            "stall p50 ms": 1000 * percentile(stalls, 0.5),
            "stall p99 ms": 1000 * percentile(stalls, 0.99),
            "event p50 ms": 1000 * statistics.median(seen.seconds[kind]),
        }


async def stream(target: Target, model: str, number: int, seen: Recorder) -> None:
    """One client that streams answer after answer; ends by being cancelled."""
    async with target.session() as session:
        while True:
            body = {"model": model, "prompt": f"Story {number}. Once upon a time", "max_tokens": TOKENS}
            body |= {"stream": True, "ignore_eos": True, "temperature": 0}
            async with session.post(f"{target.url}/v1/completions", data=json.dumps(body), headers=JSON) as answer:
                if answer.status != 200:
                    raise RuntimeError(f"a stream was answered {answer.status}: {await answer.text()}")
                last: float | None = None
                async for _ in answer.content.iter_any():
                    now = time.perf_counter()
                    if last is not None:
                        seen.gaps.append((last, now))
                    last = now


async def ask(session: aiohttp.ClientSession, target: Target, path: str, body: dict[str, object]) -> None:
    async with session.post(f"{target.url}{path}", data=json.dumps(body), headers=JSON) as answer:
        if answer.status != 200:
            raise RuntimeError(f"{path} answered {answer.status}: {await answer.text()}")


@dataclass(frozen=True)
class Engine:
    """One running engine, and how it is told of an adapter."""

    target: Target
    load_path: str
    load_body: Callable[[str, Path, int], dict[str, object]]

    async def load(self, session: aiohttp.ClientSession, folder: Path, number: int) -> None:
        await ask(session, self.target, self.load_path, self.load_body(folder.name, folder, number))

    async def use(self, session: aiohttp.ClientSession, model: str) -> None:
        body: dict[str, object] = {"model": model, "prompt": "Hello", "max_tokens": 1, "temperature": 0}
        await ask(session, self.target, "/v1/completions", body)


async def measure(engine: Engine, folders: Sequence[Path]) -> Recorder:
    """The first folder is the streams' adapter; each other one is loaded, and used when all are."""
    seen = Recorder()
    async with engine.target.session() as session, asyncio.TaskGroup() as group:
        await engine.load(session, folders[0], 1)
        streams = [group.create_task(stream(engine.target, LIVE, number, seen)) for number in range(STREAMS)]
        await asyncio.sleep(5.0)
        for number, folder in enumerate(folders[1:], start=2):
            await seen.event(BASE, engine.use(session, LIVE))
            await seen.event(LOAD, engine.load(session, folder, number))
            await seen.event(NOTHING, asyncio.sleep(seen.seconds[LOAD][-1]))
        for folder in folders[1:]:
            await seen.event(FIRST, engine.use(session, folder.name))
        for task in streams:
            task.cancel()
    return seen


@contextlib.asynccontextmanager
async def started(form: str, base: Path, folder: Path) -> AsyncIterator[Engine]:
    """One form of engine, stopped at the end whatever happens."""
    if form == "vLLM":
        async with stock(base, folder) as engine:
            yield engine
        return
    from server.engine.base import EngineOptions
    from server.engine.vllm import VllmEngine

    env = {} if form == "ours" else {"HOTSHOE_LORA_STAGE": "0"}
    options = EngineOptions(
        base,
        "base",
        folder,
        slots=SLOTS,
        staged_limit=STAGED,
        context_length_tokens=CONTEXT_TOKENS,
        kv_cache_bytes=KV_CACHE_BYTES,
        dtype="float32",
        env=env,
    )
    ours = VllmEngine(options)
    try:
        await ours.start()
        yield Engine(Target(form, "http://engine", ours.socket_path), "/hotshoe/load", our_body)
    finally:
        await ours.stop(0.0)


def our_body(name: str, folder: Path, number: int) -> dict[str, object]:
    return {"engine_name": name, "path": str(folder), "engine_id": number}


def stock_body(name: str, folder: Path, number: int) -> dict[str, object]:
    return {"lora_name": name, "lora_path": str(folder)}


@contextlib.asynccontextmanager
async def stock(base: Path, folder: Path) -> AsyncIterator[Engine]:
    """vLLM with the flags that ours has, without our plugins, and with its own route for loads opened."""
    folder.mkdir(mode=0o700)
    socket = folder / "engine.sock"
    flags = ["--uds", str(socket), "--model", str(base), "--served-model-name", "base", "--dtype", "float32"]
    flags += ["--enable-lora", "--max-loras", str(SLOTS + 1), "--max-cpu-loras", str(STAGED), "--max-lora-rank", "64"]
    flags += ["--lora-target-modules", *PROJECTIONS, "--max-model-len", str(CONTEXT_TOKENS)]
    flags += ["--kv-cache-memory-bytes", str(KV_CACHE_BYTES), "--disable-uvicorn-access-log"]
    variables = {"VLLM_PLUGINS": "", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_NO_USAGE_STATS": "1"}
    command = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry", *flags]
    target = Target("vLLM", "http://engine", socket)
    with process("vLLM", command, folder, variables) as running:
        await asyncio.to_thread(running.until, lambda: is_up(f"{target.url}/health", socket))
        yield Engine(target, "/v1/load_lora_adapter", stock_body)


async def one_form(form: str, base: Path, folders: Sequence[Path], run_dir: Path) -> Recorder:
    async with started(form, base, run_dir) as engine:
        return await measure(engine, folders)


def run(rounds: int, forms: Sequence[str] = FORMS) -> Iterator[Report]:
    """Four loads and four first uses for each round, on every form."""
    from adapters.bases import load_base
    from adapters.embedded import default_base
    from tests.fixtures.adapters import write_adapter

    base = load_base(default_base())
    report = Report(f"Stall of {STREAMS} live streams by a load and by a first use")
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        made = [
            write_adapter(Path(scratch) / name, base, rank=RANK, alpha=2 * RANK, seed=seed, dtype="BF16", scale=0.02)
            for seed, name in enumerate((LIVE, *(f"loaded-{number}" for number in range(4 * rounds))))
        ]
        size = (made[0] / "adapter_model.safetensors").stat().st_size
        for place, form in enumerate(forms):
            seen = asyncio.run(one_form(form, base.folder, made, Path(scratch) / f"run-{place}"))
            report.rows += rows_of(form, seen)
    report.notes.append(
        f"{STREAMS} streams of one adapter; {4 * rounds} adapters of {size / 1e6:.1f} MB (16-bit, r {RANK}, all "
        f"linear), {SLOTS} slots. A stall is the longest gap that touches an event, less the "
        "median gap of the quiet time before it; the events that are nothing last as long as loads."
    )
    yield report


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.load_stall", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="four loads each (default 5)")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS), help="engines (default all)")
    parser.add_argument("--out", type=Path, default=Path("build/load_stall.json"), help="where the figures go as JSON")
    given = parser.parse_args()
    print(json.dumps(machine(), indent=2))
    reports = list(run(given.rounds, given.forms))
    for report in reports:
        report.print()
    write(reports, given.out)


if __name__ == "__main__":
    main()
