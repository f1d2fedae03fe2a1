"""One job's process from its start to its end: what it tells is written down, and one hand alone ends it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from adapters.errors import HotshoeError, LeaseLost
from adapters.job_rows import LEASE_SECONDS, JobRow, JobStatus
from server.job_child import JobChild
from server.job_told import Telling
from server.tasks import end_tasks, insist
from training.jobs import EXIT_INTERRUPTED

if TYPE_CHECKING:
    from adapters.registry import Registry

log = structlog.get_logger("hotshoe.jobs")
RENEW_SECONDS = LEASE_SECONDS / 6
LOOK_SECONDS = 0.5  # at a job that was paused, which may be cancelled while it saves
SAVE_SECONDS = 120.0  # for a paused run to finish its step and save it
MOST_DEATHS = 2  # of one job's process; then the job has failed


class RunFailed(Exception):
    """What the process said was wrong, in OpenAI's form."""

    def __init__(self, error: dict[str, Any]) -> None:
        super().__init__(error["message"])
        self.error = error


class Training:
    """Trains one job in a process. `poked` says that the job may have been paused or cancelled."""

    def __init__(self, registry: Registry, job: JobRow, poked: asyncio.Event, stop_seconds: float) -> None:
        self.registry = registry
        self.job = job
        self.poked = poked
        self.stop_seconds = stop_seconds

    async def run(self, spec: Mapping[str, Any], folder: Path, names: Mapping[str, str]) -> None:
        """To its end; raises RunFailed, or LeaseLost where the job was paused, cancelled or queued again."""
        child = await JobChild.start(spec, folder, names)
        telling = Telling(self.registry, self.job)
        watching = asyncio.create_task(self._watch(child))
        try:
            await self._follow(child, telling)
        except asyncio.CancelledError:
            child.terminate()  # the server stops: it may save its step
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._follow(child, telling), self.stop_seconds)
            raise
        finally:
            await end_tasks(watching)
            await child.kill()
        await insist(lambda: self.registry.renew_lease(self.job))
        if telling.error is not None:
            raise RunFailed(telling.error)
        if not telling.is_done:
            await self._ended_without_a_word(child)

    async def _follow(self, child: JobChild, telling: Telling) -> None:
        try:
            async for message in child.messages():
                await telling.take(message)
        except TimeoutError:
            log.error("job process hangs", job=self.job.id)

    async def _watch(self, child: JobChild) -> None:
        """Keep the lease for as long as the job is ours; then end the process."""
        while True:
            self.poked.clear()
            try:
                await insist(lambda: self.registry.renew_lease(self.job))
            except LeaseLost:
                break
            except HotshoeError as error:
                log.warning("lease not renewed", job=self.job.id, code=error.code, reason=error.message)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.poked.wait(), RENEW_SECONDS)
        if await self._status() is not JobStatus.CANCELLED:
            child.terminate()
            deadline = time.monotonic() + SAVE_SECONDS
            while child.is_there and time.monotonic() < deadline and await self._status() is not JobStatus.CANCELLED:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(child.process.wait(), LOOK_SECONDS)
        await child.kill()

    async def _status(self) -> JobStatus:
        return (await insist(lambda: self.registry.get_job(self.job.tenant, self.job.id))).status

    async def _ended_without_a_word(self, child: JobChild) -> None:
        """Once more, or the end of the job. Always raises."""
        code, job = child.process.returncode, self.job
        if code == EXIT_INTERRUPTED:
            await insist(lambda: self.registry.requeue_job(job, "The training process was stopped; it goes on"))
            raise LeaseLost(f"{job.id} is queued again.")
        words = await asyncio.to_thread(child.last_words)
        log.error("job process ended without a word", job=job.id, exit_code=code, stderr=words)
        if code is None or code > 0:  # it was not killed, and another try would end in the same way
            message = f"The training process ended with status {code}. The server's log says more."
            raise RunFailed({"code": "internal_error", "message": message, "param": None, "problems": []})
        if job.deaths + 1 < MOST_DEATHS:
            says = "The training process was killed; it is tried again from its last checkpoint"
            await insist(lambda: self.registry.requeue_job(job, says, died=True))
            raise LeaseLost(f"{job.id} is queued again.")
        message = (
            f"The training process was killed twice (signal {-code}), most likely because memory ran out: "
            "give fewer tokens a row, a smaller batch, or method qlora; `hotshoe plan` says what fits."
        )
        raise RunFailed({"code": "training_killed", "message": message, "param": None, "problems": []})
