"""Takes fine-tuning jobs from the queue, one at a time, and carries each to its end: trained, published, proven, named.

Every step can be done again: a job that is taken up after a crash goes on from its last checkpoint, a finished run is
published without training, a published version is proven without publishing. What a job does to the registry names its
fence (`adapters/job_rows.py`), so that of two workers with one job only the later one gets anything done.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from adapters.canonical import CONFIG_FILE, WEIGHTS_FILE
from adapters.errors import AdapterRefused, HotshoeError, LeaseLost, NotFound, Problem
from adapters.file_rows import Owner
from adapters.inspect import CARD_FILE
from adapters.job_rows import LEASE_SECONDS, JobChange, JobRow, JobStatus, Phase
from adapters.publish import PublishContext, publish
from adapters.types import AdapterRef, AdapterVersion, VersionStatus
from server.exports import insist
from server.job_child import JobChild
from server.job_order import settings_of
from server.job_results import keep_results
from server.job_told import Telling
from server.tasks import end_tasks

if TYPE_CHECKING:
    from adapters.bases import BaseModel
    from adapters.files import Files
    from adapters.registry import Registry
    from adapters.store import BlobStore
    from server.proving import Prover

log = structlog.get_logger("hotshoe.jobs")
NICE = 15
POLL_SECONDS = 5.0  # between two looks at an empty queue that nobody poked
RENEW_SECONDS = LEASE_SECONDS / 6
SAVE_SECONDS = 120.0  # for a paused or stopped run to finish its step and save it
PROOF_SECONDS = 5.0  # between two looks at a version that is being proven
MOST_PROBLEMS = 100  # of a job's error that are kept
MOST_DEATHS = 2  # of one job's process; then the job has failed
FILE_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


@dataclass(frozen=True, slots=True)
class JobPlace:
    """What jobs are carried out with: their rows, files and base, and where their versions go."""

    registry: Registry
    files: Files
    store: BlobStore
    base: BaseModel  # in 16 or 32 bits, to be trained on
    home: Path
    prover: Prover
    context_for: Callable[[str, str], Awaitable[PublishContext]]  # of a tenant and who acts


class JobWorker:
    """One worker of the queue. `poke` it when the queue or a job of it has changed."""

    def __init__(self, where: JobPlace) -> None:
        self.where = where
        self.registry = where.registry
        self.root = where.home / "jobs"
        self._poked = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin; what ran when the server ended is free at once, since this state folder has one server at a time."""
        await insist(self.registry.free_leases)
        await insist(self._sweep)
        self._task = asyncio.create_task(self._work())

    async def stop(self) -> None:
        """Have the running job save its step; it goes on at the next start."""
        await end_tasks(self._task)
        self._task = None

    def _sweep(self) -> None:
        """Remove the folders of jobs that have ended."""
        there = {job.id for job in self.registry.open_jobs()}
        for folder in self.root.glob("*"):
            if folder.name not in there:
                shutil.rmtree(folder, ignore_errors=True)

    def poke(self) -> None:
        """Something changed: look at once."""
        self._poked.set()

    async def _work(self) -> None:
        while True:
            job = await insist(self.registry.claim_job)
            if job is not None:
                await self._run(job)
                continue
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._poked.wait(), POLL_SECONDS)
            self._poked.clear()

    async def _run(self, job: JobRow) -> None:
        """Carry out one job; whatever is wrong with it, the next one gets its turn."""
        try:
            await self._carry_out(job)
        except LeaseLost:
            log.info("job left", job=job.id)
        except asyncio.CancelledError:
            with contextlib.suppress(HotshoeError):
                self.registry.requeue_job(job, "The server stops; the job goes on when it is back")
            raise
        except HotshoeError as error:
            await self._fail(job, error)
        except Exception as error:
            log.exception("job failed", job=job.id)
            await self._fail(job, HotshoeError(f"The job failed: {type(error).__name__}. The server's log says more."))

    async def _fail(self, job: JobRow, error: HotshoeError) -> None:
        log.warning("job failed", job=job.id, code=error.code, reason=error.message)
        with contextlib.suppress(LeaseLost):
            await insist(lambda: self.registry.fail_job(job, as_openai(error)))
        await asyncio.to_thread(shutil.rmtree, self._folder(job), ignore_errors=True)

    async def _carry_out(self, job: JobRow) -> None:
        folder, out = self._folder(job), self._folder(job) / "out"
        await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True)
        if job.number is None:
            if not (out / CARD_FILE).is_file():
                await self._train(job, folder)
            version = await self._publish(job, out)
        else:
            version = await asyncio.to_thread(self.registry.get, job.tenant, job.adapter, job.number)
        version = await self._proven(job, version)
        await self._name(job, version)
        result_file = await asyncio.to_thread(keep_results, self.where.files, job, version)
        says = f"The job has successfully completed; the fine-tuned model is {version.ref}"
        tokens = ((version.card or {}).get("cost") or {}).get("tokens")
        await insist(lambda: self.registry.succeed_job(job, says, result_file=result_file, trained_tokens=tokens))
        log.info("job succeeded", job=job.id, model=version.ref)
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)

    async def _train(self, job: JobRow, folder: Path) -> None:
        """Have the process train; raises LeaseLost, or what is wrong with the job."""
        spec = await asyncio.to_thread(self._spec, job, folder)
        child = await JobChild.start(spec, folder, _names(job, spec, folder))
        telling = Telling(self.registry, job)
        try:
            async with self._kept(job, child):
                async for message in child.messages():
                    await telling.take(message)
                code = await child.process.wait()
        finally:
            await asyncio.shield(child.end(grace_seconds=SAVE_SECONDS))
        await insist(lambda: self.registry.renew_lease(job))
        if telling.error is not None:
            raise RunFailed(telling.error)
        if not telling.is_done:
            await self._died(job, code, child)

    async def _died(self, job: JobRow, code: int, child: JobChild) -> None:
        """The process ended without a word: once more, or the end of the job. Always raises."""
        log.error("job process ended without a word", job=job.id, exit_code=code, stderr=child.last_words())
        if job.attempts < MOST_DEATHS:
            says = "The training process was killed; it is tried again from its last checkpoint"
            await insist(lambda: self.registry.requeue_job(job, says))
            raise LeaseLost(f"{job.id} is queued again.")
        raise TrainingKilled(
            f"The training process ended twice without a word (status {code}), most likely because memory ran out: "
            "give fewer tokens a row, a smaller batch, or method qlora; `hotshoe plan` says what fits."
        )

    @asynccontextmanager
    async def _kept(self, job: JobRow, child: JobChild) -> AsyncIterator[None]:
        """The job's lease, renewed for as long as the block runs; when it is lost, the process is ended."""
        renewing = asyncio.create_task(self._renew(job, child))
        try:
            yield
        finally:
            await end_tasks(renewing)

    async def _renew(self, job: JobRow, child: JobChild) -> None:
        while True:
            try:
                await insist(lambda: self.registry.renew_lease(job))
            except LeaseLost:
                found = await insist(lambda: self.registry.get_job(job.tenant, job.id))
                await child.end(grace_seconds=SAVE_SECONDS if found.status is JobStatus.PAUSED else 0.0)
                return
            self._poked.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._poked.wait(), RENEW_SECONDS)

    async def _publish(self, job: JobRow, out: Path) -> AdapterVersion:
        """The run's adapter as a version, which the job names in the same transaction."""
        await insist(lambda: self.registry.note_job(job, JobChange(phase=Phase.PUBLISHING), says="Publishing"))
        context = await self.where.context_for(job.tenant, job.actor)
        staged = await asyncio.to_thread(self.where.store.stage)
        try:
            for name in (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE):
                await asyncio.to_thread(shutil.copyfile, out / name, staged / name)
            return await asyncio.to_thread(lambda: publish(staged, job.adapter, context=replace(context, job=job)))
        finally:
            await asyncio.to_thread(shutil.rmtree, staged, ignore_errors=True)

    async def _proven(self, job: JobRow, version: AdapterVersion) -> AdapterVersion:
        """The version once it is settled; raises AdapterRefused where it cannot be served."""
        if version.status is VersionStatus.QUARANTINED:
            await self.where.prover.take(version)
        while version.status is VersionStatus.QUARANTINED:
            await insist(lambda: self.registry.renew_lease(job))
            version = await self.where.prover.wait(version, PROOF_SECONDS)
            if version.status is VersionStatus.QUARANTINED and not self.where.prover.is_pending(version):
                break
        if version.status is not VersionStatus.READY:
            reasons = tuple(Problem(**reason) for reason in version.reasons)
            raise AdapterRefused(f"{version.ref} is {version.status} and cannot be served.", problems=reasons)
        return version

    async def _name(self, job: JobRow, version: AdapterVersion) -> None:
        """Move the alias that was asked for."""
        alias = job.request.get("hotshoe", {}).get("alias")
        if alias is None:
            return
        moved = (version.tenant, version.name, alias, version.number)
        await insist(lambda: self.registry.move_alias(*moved, expected_generation=None, actor=job.actor))
        await insist(lambda: self.registry.note_job(job, says=f"The alias {alias} names {version.ref} now"))

    def _spec(self, job: JobRow, folder: Path) -> dict[str, Any]:
        """What the process is told. The job's files are linked into its folder: deleting one does no harm."""
        owner = Owner(job.tenant, job.actor)
        spec = {
            **settings_of(job),
            "base": str(self.where.base.folder),
            "data": str(self._linked(owner, job.training_file, folder, "training")),
            "out": str(folder / "out"),
            "report_to": [*(["wandb"] if job.request.get("integrations") else []), "tensorboard"],
            "nice": NICE,
        }
        if job.validation_file is not None:
            spec["validation"] = str(self._linked(owner, job.validation_file, folder, "validation"))
        if (parent := self._parent(job)) is not None:
            spec |= {"initial_adapter": str(self.where.store.folder(parent.digest or "")), "parent": parent.ref}
        return spec

    def _parent(self, job: JobRow) -> AdapterVersion | None:
        """The version that the job goes on from, None where it begins with the base."""
        named = job.request.get("from")
        return self.registry.resolve(AdapterRef.parse(named, job.tenant)) if named else None

    def _linked(self, owner: Owner, file_id: str, folder: Path, name: str) -> Path:
        known = [path for suffix in FILE_SUFFIXES if (path := folder / f"{name}{suffix}").exists()]
        if known:
            return known[0]
        try:
            file, source = self.where.files.open(owner, file_id)
        except NotFound as error:
            raise NotFound(f"The {name} file {file_id} is not there any more.", param=f"{name}_file") from error
        suffix = next((one for one in FILE_SUFFIXES if file.filename.lower().endswith(one)), FILE_SUFFIXES[0])
        os.link(source, folder / f"{name}{suffix}")
        return folder / f"{name}{suffix}"

    def _folder(self, job: JobRow) -> Path:
        return self.root / job.id


def _names(job: JobRow, spec: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """What the client calls the paths of its job; where they lie is nobody's business."""
    files = {spec["data"]: job.training_file, spec.get("validation"): job.validation_file}
    return {str(path): str(name) for path, name in files.items() if path and name} | {str(folder): job.id}


class TrainingKilled(HotshoeError):
    """The process of a job was killed, and again when it was tried once more."""

    code = "training_killed"


class RunFailed(HotshoeError):
    """What the process of a job said was wrong."""

    def __init__(self, error: dict[str, Any]) -> None:
        problems = tuple(Problem(**problem) for problem in error.get("problems", ()))
        super().__init__(error["message"], param=error.get("param"), problems=problems)
        self.code = error["code"]  # type: ignore[misc]  # the process's own


def as_openai(error: HotshoeError) -> dict[str, Any]:
    """A job's error: what is wrong with the data is wrong with its file."""
    param = {"data": "training_file", "validation": "validation_file"}.get(error.param or "", error.param)
    problems = [problem.as_dict() for problem in error.problems[:MOST_PROBLEMS]]
    return {"code": error.code, "message": error.message, "param": param, "problems": problems}
