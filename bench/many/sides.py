"""The sides that are compared: each is started by the bench on the same base and adapter files, and asked in turn.

hotshoe       `hotshoe serve` over HTTP, with all that it does beside
stock         vLLM's own server with --enable-lora --lora-modules, none of our plugins in it
bare          vLLM's own server without LoRA, so compiled: what the base can do
llama.cpp     its server (the wheel xllamacpp), the base as an F32 GGUF, all adapters loaded at its start
peft          transformers + peft: the loop that a person would write, one batch of one adapter at a time
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from adapters.bases import PROJECTIONS, BaseModel
from bench.client import Target
from bench.many.drive import Asker, Flight, Window, measure
from bench.many.plan import BASE, Load, Shot
from bench.many.processes import READY_SECONDS, is_up, lasting, process
from bench.many.stats import Seen
from bench.served import free_port, publish, serve

SIDES = ("hotshoe", "stock", "bare", "llama.cpp", "peft")
CONTEXT_TOKENS = 2048
KV_CACHE_BYTES = 1 << 30
RANK, ALPHA = 16, 32
SETTLE_SECONDS = 1.0  # vLLM's workers spin for as long after their last step


@dataclass(frozen=True)
class Setup:
    """What every side is started with."""

    name: str
    adapters: int
    slots: int
    staged: int  # adapters that may be kept in the engine's memory
    dtype: str = "BF16"  # of the adapters' files


@dataclass(frozen=True)
class Files:
    """The base and the adapters of a setup on disk, and a folder for what a side makes of them."""

    base: BaseModel
    adapters: tuple[Path, ...]
    scratch: Path

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(folder.name for folder in self.adapters)


class Side(Protocol):
    """A running side."""

    @property
    def name(self) -> str: ...

    @property
    def start_seconds(self) -> float: ...

    def measure(self, load: Load, seed: int, window: Window) -> list[Seen]: ...


@dataclass(frozen=True)
class HttpSide:
    name: str
    start_seconds: float
    asker: Asker

    def measure(self, load: Load, seed: int, window: Window) -> list[Seen]:
        """One window of the load; then wait until the side is idle again."""
        found = asyncio.run(measure(self.asker, load, seed, window))
        asyncio.run(self._settle())
        return found

    async def _settle(self) -> None:
        """An answer to a short question for the base says that what was cut off is out of the way."""
        async with self.asker.session() as session, asyncio.timeout(READY_SECONDS):
            shot = Shot(0.0, BASE, 4, 1, 0)
            one = await self.asker.ask(session, Flight(shot, 0.0), time.perf_counter)
        if one.problem:
            raise RuntimeError(f"{self.name} does not answer any more: {one.problem}")
        await asyncio.sleep(SETTLE_SECONDS)


def write_files(base: BaseModel, setup: Setup, folder: Path) -> Files:
    """Adapters of random weights in PEFT's layout, one seed each."""
    from tests.fixtures.adapters import write_adapter

    made = []
    for seed in range(setup.adapters):
        path = folder / "adapters" / f"bench-{seed:03d}"
        if not path.exists():
            write_adapter(path, base, rank=RANK, alpha=ALPHA, seed=seed, dtype=setup.dtype)
        made.append(path)
    return Files(base, tuple(made), folder)


def started(name: str, setup: Setup, files: Files) -> contextlib.AbstractContextManager[Side]:
    """The side of this name, ready with all adapters."""
    makers = {"hotshoe": _hotshoe, "stock": _stock, "bare": _bare, "llama.cpp": _llama, "peft": _peft}
    return makers[name](setup, files)


@contextlib.contextmanager
def _hotshoe(setup: Setup, files: Files) -> Iterator[Side]:
    settings = {
        "STAGED_LIMIT": setup.staged,
        "MAX_RANK": RANK,
        "CONTEXT_LENGTH_TOKENS": CONTEXT_TOKENS,
        "KV_CACHE_BYTES": KV_CACHE_BYTES,
        "PROBE_ANSWER_TOKENS": 0,
        "ACCESS_LOG": "none",
    }
    environment = {f"HOTSHOE_{name}": str(value) for name, value in settings.items()}
    flags = ("--slots", str(setup.slots), "--base", str(files.base.folder))
    with serve(*flags, environment=environment, timeout_seconds=READY_SECONDS) as served:
        for folder in files.adapters:
            files_of = {"config": folder / "adapter_config.json", "weights": folder / "adapter_model.safetensors"}
            publish(served.gateway.url, folder.name, files_of)
        names = (served.base_id(), files.names)
        yield HttpSide("hotshoe", served.ready_seconds, Asker(served.gateway, lambda shot: _named(shot, *names)))


def _named(shot: Shot, base: str, adapters: tuple[str, ...]) -> Mapping[str, Any]:
    return {"model": base if shot.model == BASE else adapters[shot.model]}


def vllm_command(setup: Setup, files: Files, port: int, *, with_lora: bool) -> list[str]:
    """Stock vLLM's server, with what hotshoe gives its own engine: dtype, context and KV cache."""
    flags = ["--host", "127.0.0.1", "--port", str(port), "--model", str(files.base.folder)]
    flags += ["--served-model-name", files.base.id, "--dtype", "float32", "--max-model-len", str(CONTEXT_TOKENS)]
    flags += ["--kv-cache-memory-bytes", str(KV_CACHE_BYTES), "--disable-uvicorn-access-log"]
    if with_lora:
        flags += ["--enable-lora", "--max-loras", str(setup.slots), "--max-cpu-loras", str(setup.staged)]
        flags += ["--max-lora-rank", str(RANK), "--lora-target-modules", *PROJECTIONS]
        flags += ["--lora-modules", *(f"{folder.name}={folder}" for folder in files.adapters)]
    return [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry", *flags]


@contextlib.contextmanager
def _stock(setup: Setup, files: Files) -> Iterator[Side]:
    with _vllm("stock", setup, files, with_lora=True) as side:
        yield side


@contextlib.contextmanager
def _bare(setup: Setup, files: Files) -> Iterator[Side]:
    with _vllm("bare", setup, files, with_lora=False) as side:
        yield side


@contextlib.contextmanager
def _vllm(name: str, setup: Setup, files: Files, *, with_lora: bool) -> Iterator[Side]:
    port = free_port()
    environment = {"VLLM_PLUGINS": "", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    with process(
        name,
        vllm_command(setup, files, port, with_lora=with_lora),
        files.scratch,
        {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "WARNING", **environment},
    ) as running:
        target = Target(name, f"http://127.0.0.1:{port}")
        seconds = running.until(lambda: is_up(f"{target.url}/health"))
        names = (files.base.id, files.names)
        yield HttpSide(name, seconds, Asker(target, lambda shot: _named(shot, *names)))


@contextlib.contextmanager
def _llama(setup: Setup, files: Files) -> Iterator[Side]:
    """The GGUF files are made by our own exports, before the clock of its start."""
    from bench.many.llama_side import gguf_files

    threads = int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))  # as many as the others get
    given = {**gguf_files(files, setup.dtype), "threads": threads, "port": free_port()}
    command = [sys.executable, "-m", "bench.many.llama_side", json.dumps(given)]
    with process("llama.cpp", command, files.scratch, {}) as running:
        target = Target("llama.cpp", f"http://127.0.0.1:{given['port']}")
        seconds = running.until(lambda: is_up(f"{target.url}/health"))

        def body(shot: Shot) -> Mapping[str, Any]:
            # An empty list would mean what the server started with, every adapter; those not in a list are off.
            one = {"id": max(0, shot.model), "scale": 0.0 if shot.model == BASE else 1.0}
            return {"lora": [one], "cache_prompt": False}

        yield HttpSide("llama.cpp", seconds, Asker(target, body))


class PeftSide:
    """bench.many.peft_side, asked over its standard input: one load a line, one row of requests a line."""

    name = "peft"

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.start_seconds = float(self._read()["start_seconds"])

    def measure(self, load: Load, seed: int, window: Window) -> list[Seen]:
        from bench.many.peft_side import asked

        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asked(load, seed, window)) + "\n")
        self._process.stdin.flush()
        return [Seen(**one) for one in self._read()["seen"]]

    def _read(self) -> Any:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"the process of peft ended with {self._process.wait()}")


@contextlib.contextmanager
def _peft(setup: Setup, files: Files) -> Iterator[Side]:
    folders = json.dumps([str(files.base.folder), *map(str, files.adapters)])
    log = (files.scratch / "peft.log").open("w")
    with (
        log,
        subprocess.Popen(
            lasting([sys.executable, "-m", "bench.many.peft_side", folders]),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        ) as child,
    ):
        try:
            yield PeftSide(child)
        finally:
            child.kill()
