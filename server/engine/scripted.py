"""The engine's double: a small deterministic ASGI app on a real Unix socket, for tests and for trials without vLLM."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import uvicorn
from starlette.applications import Starlette

from adapters.errors import EngineUnavailable
from server.engine.base import (
    EngineAdapter,
    EngineCapacity,
    EngineOptions,
    EngineUsage,
    RestartCallback,
)
from server.engine.client import SpokenTo
from server.engine.control import Control
from server.engine.rundir import check_socket_path, prepare_run_dir
from server.engine.scripted_app import build_app
from server.engine.scripted_models import Script, ScriptedModels

RESTART_SECONDS = 0.05
DEFAULT_CONTEXT_TOKENS = 4096


class ScriptedWorker:
    """Takes adapters as vLLM does: reads the files, refuses what does not load, keeps an LRU of slots."""

    def __init__(self, options: EngineOptions, models: ScriptedModels) -> None:
        self.options = options
        self.models = models
        self.slots: list[int] = []  # least recently used first

    async def add(self, adapter: EngineAdapter) -> None:
        await asyncio.sleep(self.models.script.seconds_to_load)
        effect = await asyncio.to_thread(read_effect, adapter.path, self.options.max_rank)
        self.models.add(adapter.engine_name, effect)
        self.use(adapter.engine_id)

    async def remove(self, adapter: EngineAdapter) -> None:
        self.models.remove(adapter.engine_name)
        if adapter.engine_id in self.slots:
            self.slots.remove(adapter.engine_id)

    def use(self, engine_id: int) -> None:
        if engine_id in self.slots:
            self.slots.remove(engine_id)
        self.slots = [*self.slots, engine_id][-(self.options.slots + 1) :]

    async def in_slots(self) -> set[int]:
        return set(self.slots)

    async def usage(self) -> EngineUsage:
        rss = psutil.Process().memory_info().rss
        return EngineUsage(rss, self.options.kv_cache_bytes, 0.0, 0, self.models.running, 0)

    def capacity(self) -> EngineCapacity:
        options = self.options
        return EngineCapacity(
            slots=options.slots,
            staged_limit=options.staged_limit if options.slots else 0,
            max_rank=options.max_rank if options.slots else 0,
            dtype="float32" if options.dtype == "auto" else options.dtype,
            context_length_tokens=options.context_length_tokens or DEFAULT_CONTEXT_TOKENS,
            base_id=options.base_id,
            engine_version=self.models.script.engine_version,
        )


def read_effect(folder: Path, max_rank: int) -> int:
    """A number that stands for what the weights do, 0 when every lora_B is zero; raises for files that do not load."""
    rank = json.loads((folder / "adapter_config.json").read_bytes())["r"]
    if rank > max_rank:
        raise ValueError(f"LoRA rank {rank} is greater than max_lora_rank {max_rank}.")
    data = (folder / "adapter_model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    effect = 0
    for name, tensor in header.items():
        start, end = tensor["data_offsets"]
        if 8 + length + end > len(data):
            raise ValueError(f"{name} lies beyond the end of the file.")
        values = data[8 + length + start : 8 + length + end]
        if ".lora_B." in name and any(values):
            effect = (effect * 31 + zlib.crc32(values)) % (1 << 31) or 1
    return effect


def make_app(options: EngineOptions, script: Script) -> Starlette:
    """The whole double as an ASGI app, with no adapter in it; `app.state.models` is what it has and was asked."""
    models = ScriptedModels(options.base_id, options.context_length_tokens or DEFAULT_CONTEXT_TOKENS, script)
    app = build_app(models, Control(ScriptedWorker(options, models)))
    app.state.models = models
    return app


class ScriptedEngine(SpokenTo):
    """An Engine whose answers are arithmetic. `crash` is its way to die; it comes back as a supervised engine does."""

    def __init__(self, options: EngineOptions, script: Script | None = None) -> None:
        self.options = options
        self.script = script or Script()
        super().__init__(check_socket_path(options.run_dir))
        self.phases: Mapping[str, float] = {}
        self.app: Starlette | None = None  # of the present life
        self._callbacks: list[RestartCallback] = []
        self._is_up = False
        self._server: _Server | None = None
        self._serving: asyncio.Task[None] | None = None
        self._restarting: asyncio.Task[None] | None = None

    async def start(self) -> None:
        if not (self.options.base_folder / "config.json").is_file():
            raise EngineUnavailable(f"{self.options.base_folder} has no config.json: not a base.")
        await self._serve()

    async def stop(self, grace_seconds: float) -> None:
        if self._restarting is not None:
            self._restarting.cancel()
        if self._server is not None and self._serving is not None:
            self._server.config.timeout_graceful_shutdown = max(1, round(grace_seconds))
            self._server.should_exit = True
            await self._serving
        self._server = self._serving = None
        self._is_up = False
        await self._client.close()
        self.socket_path.unlink(missing_ok=True)

    def is_ready(self) -> bool:
        return self._is_up

    def on_restart(self, callback: RestartCallback) -> None:
        self._callbacks.append(callback)

    async def crash(self, down_seconds: float = RESTART_SECONDS) -> None:
        """Die as a killed process does: connections are cut, the socket is gone; back, empty, after `down_seconds`."""
        server, serving = self._server, self._serving
        if server is None or serving is None:
            raise EngineUnavailable("The scripted engine is not running.")
        self._server = self._serving = None
        self._is_up = False
        self.socket_path.unlink(missing_ok=True)
        server.cut_connections()
        server.should_exit = server.force_exit = True
        await serving
        self._restarting = asyncio.create_task(self._restart(down_seconds))

    async def _restart(self, down_seconds: float) -> None:
        await asyncio.sleep(down_seconds)
        await self._client.close()
        await self._serve()
        for callback in self._callbacks:
            await callback()

    async def _serve(self) -> None:
        prepare_run_dir(self.options.run_dir)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(self.socket_path))
        self.app = make_app(self.options, self.script)
        config = uvicorn.Config(self.app, log_config=None, lifespan="off")
        self._server = _Server(config)
        self._serving = asyncio.create_task(self._server.serve(sockets=[listener]))
        while not self._server.started:  # noqa: ASYNC110 - uvicorn tells it by a flag only
            await asyncio.sleep(0.005)
        self._is_up = True  # and not a moment earlier: who is told of a restart hears of it before anybody asks


class _Server(uvicorn.Server):
    """A uvicorn server that leaves the process's signals alone and can drop its connections at once."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def cut_connections(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()
