"""Starting and stopping: engine, warm set, proofs, exports, in that order and back."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import shutil
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from adapters.errors import AlreadyRunning, EngineUnavailable, HotshoeError
from server.tasks import end_tasks

if TYPE_CHECKING:
    from server.engine.base import EngineCapacity
    from server.services import Services

log = structlog.get_logger("hotshoe.lifecycle")
RESTORE_PAUSE_SECONDS = 0.5
THREADS = 64  # as many as the registry has connections


@contextmanager
def state_lock(home: Path) -> Iterator[None]:
    """Hold the state folder for this process alone; raises AlreadyRunning. The lock ends with the process."""
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (home / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip()
            raise AlreadyRunning(
                f"{home} is in use by another server{f' (process {holder})' if holder.isdigit() else ''}: "
                "stop it, or give this one a state folder of its own with HOTSHOE_HOME."
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


@dataclass
class Lifecycle:
    """One server's way up and down. `failure` is why the engine never came up; the callbacks hear how it went."""

    failure: HotshoeError | None = None
    on_failure: Callable[[], None] = lambda: None
    on_ready: Callable[[], None] = lambda: None
    is_stopping: bool = False
    is_leaving: Callable[[], bool] = lambda: False  # a signal has come; who streams ends, and others may finish
    _tasks: set[asyncio.Task[Any]] = field(default_factory=set)
    _restoring: asyncio.Task[Any] | None = None
    _locks: dict[str, tuple[asyncio.Lock, int]] = field(default_factory=dict)
    _capacity: EngineCapacity | None = None

    async def start(self, services: Services) -> None:
        """Begin to start the engine; returns at once, so that /health and /ready answer meanwhile."""
        # asyncio's own pool has six threads on two cores: as many writes that wait for a lock would keep every read out
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(THREADS, "hotshoe"))
        services.engine.on_restart(lambda: self._restarted(services))
        for worker in services.workers:
            await worker.start()
        self.spawn(self._bring_up(services))

    async def stop(self, services: Services) -> None:
        """End everything that was started. May be called twice."""
        if self.is_stopping:
            return
        self.is_stopping = services.residents.is_closed = True
        await end_tasks(*self._tasks)
        await services.prover.stop()
        await asyncio.gather(*(worker.stop() for worker in services.workers))
        await services.proxy.close()
        await services.engine.stop(grace_seconds=0.0)
        await asyncio.to_thread(services.registry.close)
        shutil.rmtree(services.engine.socket_path.parent, ignore_errors=True)

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Have work done in the background, ended with the server; what goes wrong in it is logged."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    @asynccontextmanager
    async def one_at_a_time(self, key: str) -> AsyncIterator[None]:
        """Blocks with the same key run one after the other."""
        lock, users = self._locks.get(key, (asyncio.Lock(), 0))
        self._locks[key] = (lock, users + 1)
        try:
            async with lock:
                yield
        finally:
            lock, users = self._locks.pop(key)
            if users > 1:
                self._locks[key] = (lock, users - 1)

    def why_not(self, services: Services) -> str:
        """What a server that is not ready waits for."""
        if self.is_stopping:
            return "The server is stopping."
        if not services.engine.is_ready():
            return "The engine is starting or restarting."
        return "The adapters that were loaded before are being loaded again."

    async def context_length_tokens(self, services: Services) -> int:
        """The engine's limit for prompt and answer together; the base's own while the engine is not there."""
        capacity = await self.capacity(services)
        return capacity.context_length_tokens if capacity else services.base.context_length_tokens

    async def capacity(self, services: Services) -> EngineCapacity | None:
        """What the engine holds, asked once; None before it is there."""
        if self._capacity is None and services.engine.is_ready():
            with contextlib.suppress(EngineUnavailable):
                self._capacity = await services.engine.capacity()
        return self._capacity

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("background work failed", error=type(error).__name__, reason=str(error)[:500])

    def is_ready(self, services: Services) -> bool:
        """Requests for the base and the warm set can be answered now."""
        return not self.is_stopping and services.engine.is_ready() and services.residents.is_restored

    async def _bring_up(self, services: Services) -> None:
        try:
            await services.engine.start()
        except (HotshoeError, OSError) as error:
            ours = (
                error if isinstance(error, HotshoeError) else EngineUnavailable(f"The engine was not started: {error}.")
            )
            self.failure = ours
            log.error("the engine did not start", code=ours.code, reason=ours.message)
            self.on_failure()
            return
        self._restoring = self.spawn(self._restore(services))
        await services.prover.start()

    async def _restarted(self, services: Services) -> None:
        """Returns at once: the engine's supervisor waits for it, and may have to start the engine again meanwhile."""
        services.metrics.engine_restarts.inc()
        services.residents.forget_all()
        if self._restoring is not None:
            self._restoring.cancel()
        self._restoring = self.spawn(self._restore(services))

    async def _restore(self, services: Services) -> None:
        """Until it is done: an engine that is gone comes back, and so does a registry that is locked."""
        said = ""
        while not self.is_stopping:
            try:
                await services.residents.restore()
            except Exception as error:  # noqa: BLE001 - a server that gave up here would never be ready
                if not isinstance(error, EngineUnavailable) and said != str(error):
                    said = str(error)
                    log.error("the warm set is not back", error=type(error).__name__, reason=said[:500])
                await asyncio.sleep(RESTORE_PAUSE_SECONDS)
                continue
            log.info("ready", warm=len(services.residents.rows()), left_out=len(services.residents.left_out()))
            self.on_ready()
            return
