"""The supervisor of stock vLLM: a child on a private Unix socket, brought back when it dies, ended cleanly."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Mapping

import structlog

from adapters.errors import EngineUnavailable
from server.engine.base import EngineCapacity, EngineOptions, EngineUsage, LoadedAdapter, RestartCallback
from server.engine.client import SpokenTo
from server.engine.rundir import check_socket_path, prepare_run_dir
from server.engine.vitals import Processes, Watch
from server.engine.vllm_flags import build_command, build_env
from server.engine.vllm_log import StartLog
from server.tasks import at_most

POLL_SECONDS = 0.1
HEALTH_SECONDS = 0.5
HEALTH_TIMEOUT_SECONDS = 1.4  # with the pause a look takes less than two seconds, whatever hangs
CORE_SECONDS = 30.0  # between two calls that the core must answer; after each, an idle worker of vLLM spins for 1 s
TERMINATE_SECONDS = 15.0
FIRST_BACKOFF_SECONDS, LONGEST_BACKOFF_SECONDS = 0.5, 30.0
STABLE_SECONDS = 60.0  # after so long a life, counted from ready, the next restart is quick again

log = structlog.get_logger("hotshoe.engine")


class Backoff:
    """How long to wait before the next start: longer each time, until one has lived for a while."""

    def __init__(self) -> None:
        self._next = FIRST_BACKOFF_SECONDS

    def after(self, lived_seconds: float) -> float:
        """The pause, in seconds, after an engine that was ready for so long; 0 for one that never was."""
        pause = FIRST_BACKOFF_SECONDS if lived_seconds > STABLE_SECONDS else self._next
        self._next = min(pause * 2, LONGEST_BACKOFF_SECONDS)
        return pause


class VllmEngine(SpokenTo):
    """An Engine that is vLLM. `command` is what it is started with, `phases` where the last start's seconds went."""

    def __init__(self, options: EngineOptions) -> None:
        self.options = options
        super().__init__(check_socket_path(options.run_dir))
        self.command = build_command(options, self.socket_path)
        self.env = build_env(options, os.environ)
        self.log_path = options.log_path or options.run_dir / "engine.log"
        self.phases: Mapping[str, float] = {}
        self.restarts = 0
        self._callbacks: list[RestartCallback] = []
        self._process: asyncio.subprocess.Process | None = None
        self._supervising: asyncio.Task[None] | None = None
        self._is_ready = False

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    @property
    def flags(self) -> list[str]:
        """vLLM's own flags, without the interpreter, the module and the count of ours: what a start prints."""
        return self.command[4:]

    async def start(self) -> None:
        await self._start_once()
        self._supervising = asyncio.create_task(self._supervise(), name="engine supervisor")

    async def stop(self, grace_seconds: float) -> None:
        await self._drain(grace_seconds)
        self._is_ready = False
        if self._supervising is not None:
            self._supervising.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervising
            self._supervising = None
        await self._end_process(TERMINATE_SECONDS)
        await self._client.close()
        self.socket_path.unlink(missing_ok=True)

    def is_ready(self) -> bool:
        return self._is_ready and self._process is not None and self._process.returncode is None

    def on_restart(self, callback: RestartCallback) -> None:
        self._callbacks.append(callback)

    async def loaded(self) -> list[LoadedAdapter]:
        self._check_ready()
        return await super().loaded()

    async def usage(self) -> EngineUsage:
        self._check_ready()
        return await super().usage()

    async def capacity(self) -> EngineCapacity:
        self._check_ready()
        return await super().capacity()

    def _check_ready(self) -> None:
        """Nothing is asked of an engine that is stopped: nobody would see the server's state meanwhile."""
        if not self.is_ready():
            raise EngineUnavailable("The engine is starting, or its process is stopped or gone; try again shortly.")

    async def _start_once(self) -> None:
        """Start a process and wait until it answers; leaves none behind when it does not."""
        prepare_run_dir(self.options.run_dir)
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        self.log_path.touch(mode=0o600)
        started_at = time.monotonic()
        start_log = StartLog(self.log_path, started_at)
        self._process = await self._spawn()
        try:
            await self._wait_until_answering(self._process, start_log, started_at)
            await self._check_plugins()
        except BaseException:
            await self._end_process(1.0)
            await self._client.close()
            raise
        start_log.finish(time.monotonic())
        self.phases = start_log.phases
        self._is_ready = True
        log.info("engine ready", pid=self.pid, seconds=round(time.monotonic() - started_at, 1), phases=self.phases)

    async def _spawn(self) -> asyncio.subprocess.Process:
        launcher = [sys.executable, "-m", "server.engine.lifeline", str(os.getpid())]
        with self.log_path.open("ab") as file:
            return await asyncio.create_subprocess_exec(
                *launcher,
                *self.command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=self.env,
                start_new_session=True,
            )

    async def _wait_until_answering(
        self, process: asyncio.subprocess.Process, start_log: StartLog, started_at: float
    ) -> None:
        while await self._client.health(HEALTH_TIMEOUT_SECONDS) != 200:
            start_log.read(time.monotonic())
            if process.returncode is not None:
                raise EngineUnavailable(
                    f"The engine ended at its start (exit status {process.returncode}): {start_log.reason()} "
                    f"The whole log is {self.log_path}."
                )
            if time.monotonic() - started_at > self.options.start_timeout_seconds:
                raise EngineUnavailable(
                    f"The engine was not ready after {self.options.start_timeout_seconds:g} s; its last line: "
                    f"{start_log.reason()} The whole log is {self.log_path}."
                )
            await asyncio.sleep(POLL_SECONDS)
        start_log.read(time.monotonic())

    async def _check_plugins(self) -> None:
        """The control routes must be there: without our plugins vLLM would start and serve wrong answers."""
        try:
            capacity = await self._client.capacity()
        except EngineUnavailable as error:
            raise EngineUnavailable(
                f"vLLM runs, but without our plugins: {error.message} Install this project into its environment "
                "(pip install --no-deps -e .), so that its entry points exist."
            ) from error
        if capacity.base_id != self.options.base_id:
            raise EngineUnavailable(f"The engine serves {capacity.base_id}, not {self.options.base_id}.")

    async def _supervise(self) -> None:
        """Watch the process for ever; bring it back when it dies or hangs."""
        backoff = Backoff()
        while True:
            ready_at = time.monotonic()
            process = self._process
            reason = "it is gone" if process is None else await self._until_dead(process)
            self._is_ready = False
            pause = backoff.after(time.monotonic() - ready_at)
            log.error("engine died", reason=reason, restart_in_seconds=pause)
            await self._end_process(0.0)
            await self._client.close()
            await self._bring_back(backoff, pause)

    async def _bring_back(self, backoff: Backoff, pause: float) -> None:
        """Start until one start succeeds, then tell the callbacks."""
        while True:
            await asyncio.sleep(pause)
            try:
                await self._start_once()
            except (EngineUnavailable, OSError) as error:  # a full disk or no memory for a process may pass, too
                pause = backoff.after(0.0)
                log.error("engine did not come back", reason=str(error), retry_in_seconds=pause)
                continue
            self.restarts += 1
            await self._tell_callbacks()
            return

    async def _tell_callbacks(self) -> None:
        for callback in self._callbacks:
            try:
                await callback()
            except Exception as error:  # noqa: BLE001 - whatever a callback raises must not end the supervision
                log.error("restart callback failed", error=str(error), kind=type(error).__name__)

    async def _until_dead(self, process: asyncio.subprocess.Process) -> str:
        """Keep `is_ready` true to what two looks a second show; returns why the process has to be replaced."""
        watch = Watch(time.monotonic())
        processes = await asyncio.to_thread(Processes, process.pid)
        asking = asyncio.create_task(self._ask_core(watch))
        try:
            while True:
                await at_most(HEALTH_SECONDS, asyncio.shield(process.wait()))
                if process.returncode is not None:
                    return f"exit status {process.returncode}"
                vitals = processes.look()
                self._is_ready = self._is_ready and not vitals.stopped
                status = None if vitals.gone else await self._client.health(HEALTH_TIMEOUT_SECONDS)
                reason = watch.look(time.monotonic(), vitals, status)
                self._is_ready = watch.is_ready
                if reason is not None:
                    return reason
        finally:
            asking.cancel()

    async def _ask_core(self, watch: Watch) -> None:
        """Have the core itself answer something now and then; one question at a time, for as long as it takes."""
        while True:
            if await self._client.core_answers():
                watch.core_answered()
            await asyncio.sleep(CORE_SECONDS)

    async def _drain(self, grace_seconds: float) -> None:
        deadline = time.monotonic() + grace_seconds
        while self.is_ready() and time.monotonic() < deadline:
            try:
                usage = await self._client.usage()
            except EngineUnavailable:
                return
            if usage.running + usage.waiting == 0:
                return
            await asyncio.sleep(POLL_SECONDS)

    async def _end_process(self, grace_seconds: float) -> None:
        """End the whole process group: politely for the grace, then by SIGKILL."""
        process = self._process
        if process is None:
            return
        if process.returncode is None and grace_seconds > 0:
            process.terminate()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGCONT)  # one that was stopped would not hear of it
            await at_most(grace_seconds, process.wait())
        # The group may outlive its leader: its engine core and workers are in it.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
        self._process = None
