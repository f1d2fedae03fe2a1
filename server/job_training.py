"""One job's process from its start to its end: what it tells is written down, and one hand alone ends it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import structlog

from adapters.errors import HotshoeError, LeaseLost, PayloadTooLarge, QuotaExceeded
from adapters.job_rows import LEASE_SECONDS, JobRow, JobStatus
from server.child import Child, Program
from server.job_folders import folder_bytes
from server.job_memory import MemoryLimit
from server.job_told import Telling
from server.room import size
from server.tasks import at_most, end_tasks, insist
from training.jobs import EXIT_INTERRUPTED, NO_MEMORY

if TYPE_CHECKING:
    from adapters.registry import Registry
    from training.jobs import Order

log = structlog.get_logger("hotshoe.jobs")
RENEW_SECONDS = LEASE_SECONDS / 6
LOOK_SECONDS = 0.5  # at the memory of a job, and at one that was paused, which may be cancelled while it saves
SAVE_SECONDS = 120.0  # for a paused run to finish its step and save it
MOST_DEATHS = 2  # of one job's process; then the job has failed


class RunFailed(Exception):
    """What the process said was wrong, in OpenAI's form."""

    def __init__(self, code: str, message: str, **more: Any) -> None:
        super().__init__(message)
        self.error = {"param": None, "problems": [], **more, "code": code, "message": message}


class Training:
    """Trains one job in a process. `poked` says that the job may have been paused or cancelled."""

    def __init__(
        self, registry: Registry, job: JobRow, memory: MemoryLimit, poked: asyncio.Event, stop_seconds: float
    ) -> None:
        self.registry = registry
        self.job = job
        self.memory = memory
        self.poked = poked
        self.stop_seconds = stop_seconds
        self._counted_at = time.monotonic()

    async def run(self, order: Order, names: Mapping[str, str], variables: Mapping[str, str]) -> None:
        """To its end; raises RunFailed, or LeaseLost where the job was paused, cancelled or queued again.

        The order's folder gets the order and the log of what the process complains. `names` and `variables` are a
        Program's.
        """
        telling, folder = Telling(self.registry, self.job), Path(order.folder)
        spec, complaints = folder / "spec.json", folder / "worker.log"
        await asyncio.to_thread(spec.write_text, order.text(), "utf-8")
        child = await Child.start(Program("training.jobs", spec, complaints, "kind", names, variables))
        self._counted_at = time.monotonic()
        watching: asyncio.Task[None] | None = None
        try:
            await asyncio.to_thread(self.memory.take, child.process.pid)
            watching = asyncio.create_task(self._watch(child, folder))
            await self._follow(child, telling)
        except asyncio.CancelledError:
            child.terminate()  # the server stops: it may save its step
            await at_most(self.stop_seconds, self._follow(child, telling))
            raise
        finally:
            await end_tasks(watching)
            await child.gone()
            with contextlib.suppress(HotshoeError):
                await asyncio.to_thread(self._count, folder)
        await insist(lambda: self.registry.renew_lease(self.job))
        if telling.is_done:
            return
        if telling.error is None:
            await self._ended_without_a_word(child)
        if telling.error["code"] == NO_MEMORY:
            await self._out_of_memory(telling.error["message"])
        raise RunFailed(**telling.error)

    async def _follow(self, child: Child, telling: Telling) -> None:
        try:
            async for message in child.messages():
                await telling.take(message)
        except TimeoutError:
            log.error("job process hangs", job=self.job.id)

    async def _watch(self, child: Child, folder: Path) -> None:
        """Keep the lease for as long as the job is ours and within its limits; then end the process.

        However this ends, the process ends: nobody would look after it any more.
        """
        renewed_at = float("-inf")
        try:
            while not await asyncio.to_thread(self.memory.is_over):
                is_poked = self.poked.is_set()
                self.poked.clear()
                if is_poked or time.monotonic() - renewed_at >= RENEW_SECONDS:
                    renewed_at = time.monotonic()
                    if not await self._is_still_ours(folder):
                        await self._let_save(child)
                        return
                await at_most(LOOK_SECONDS, self.poked.wait())
        finally:
            child.end()

    async def _is_still_ours(self, folder: Path) -> bool:
        try:
            await insist(lambda: self.registry.renew_lease(self.job))
            await asyncio.to_thread(self._count, folder)
        except LeaseLost:
            return False
        except (QuotaExceeded, PayloadTooLarge) as error:
            over: dict[str, Any] = {"code": error.code, "message": error.message, "param": error.param, "problems": []}
            with contextlib.suppress(HotshoeError):
                await insist(lambda: self.registry.fail_job(self.job, over))
            return False
        except HotshoeError as error:  # a full disk, say: the lease runs out where it lasts
            log.warning("lease not renewed", job=self.job.id, code=error.code, reason=error.message)
        return True

    def _count(self, folder: Path) -> None:
        """What it used since it was last counted; raises QuotaExceeded or PayloadTooLarge."""
        now = time.monotonic()
        ran, self._counted_at = now - self._counted_at, now
        self.registry.count_use(self.job, ran, folder_bytes(folder))

    async def _let_save(self, child: Child) -> None:
        """A process whose job is not ours any more may save its step, unless the job was cancelled."""
        if await self._status() is JobStatus.CANCELLED:
            return
        child.terminate()
        deadline = time.monotonic() + SAVE_SECONDS
        while child.is_there and time.monotonic() < deadline and await self._status() is not JobStatus.CANCELLED:
            await at_most(LOOK_SECONDS, child.process.wait())

    async def _status(self) -> JobStatus:
        return (await self._job()).status

    async def _job(self) -> JobRow:
        """As it is now."""
        return await insist(lambda: self.registry.get_job(self.job.tenant, self.job.id))

    async def _ended_without_a_word(self, child: Child) -> NoReturn:
        """Once more, or the end of the job."""
        code, job = child.process.returncode, self.job
        if code == EXIT_INTERRUPTED:
            await insist(lambda: self.registry.requeue_job(job, "The training process was stopped; it goes on"))
            raise LeaseLost(f"{job.id} is queued again.")
        words = await asyncio.to_thread(child.last_words)
        log.error("job process ended without a word", job=job.id, exit_code=code, stderr=words)
        if await asyncio.to_thread(self.memory.is_over):
            held = size(self.memory.limit_bytes)
            await self._out_of_memory(f"The training process held more than the {held} of memory that a job may have.")
        if code is None or code > 0:  # it was not killed, and another try would end in the same way
            raise RunFailed(
                "internal_error", f"The training process ended with status {code}. The server's log says more."
            )
        if job.deaths + 1 < MOST_DEATHS:
            says = "The training process was killed; it is tried again from its last checkpoint"
            await insist(lambda: self.registry.requeue_job(job, says, died=True))
            raise LeaseLost(f"{job.id} is queued again.")
        raise RunFailed(
            "training_killed",
            f"The training process was killed twice (signal {-code}), most likely because the machine's memory ran "
            "out: give shorter rows, a smaller batch, or method qlora; `hotshoe plan` says what fits.",
        )

    async def _out_of_memory(self, reason: str) -> NoReturn:
        """Once more with fewer rows at a time, where that leaves the batch as it is; else the end of the job."""
        job = await self._job()
        fewer = smaller_pass(job)
        if fewer is not None:
            says = (
                f"{reason} It is tried again with {fewer} rows at a time instead of {(job.settings or {})['pass_size']}"
            )
            await insist(lambda: self.registry.requeue_job(self.job, says, pass_size=fewer))
            raise LeaseLost(f"{job.id} is queued again.")
        settings = job.settings or {}
        used = f" with {settings['pass_size']} rows at a time" if settings else ""
        advice = "method qlora, " if settings.get("method") == "lora" else ""
        raise RunFailed(
            NO_MEMORY,
            f"{reason} That was{used}: give shorter rows, {advice}fewer target_modules or a smaller rank, or have the "
            "operator raise HOTSHOE_JOB_MEMORY_BYTES; `hotshoe plan` says what fits.",
            param="hyperparameters",
        )


def smaller_pass(job: JobRow) -> int | None:
    """At most half as many rows at a time, by which the batch divides; None where that was tried, or cannot be."""
    settings = job.settings
    if settings is None or "pass_size" in job.request:
        return None
    most, batch = settings["pass_size"] // 2, settings["batch_size"]
    return next((count for count in range(most, 0, -1) if batch % count == 0), None)
