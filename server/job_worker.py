"""Takes fine-tuning jobs from the queue, one at a time, and carries each to its end: trained, published, proven, named.

Every step can be done again: a job that is taken up after a crash goes on from its last checkpoint, a finished run is
published without training, a published version is proven without publishing. What a job does to the registry names its
fence (`adapters/job_rows.py`), so that of two workers with one job only the later one gets anything done.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import structlog

from adapters.canonical import CONFIG_FILE, WEIGHTS_FILE
from adapters.errors import (
    AdapterRefused,
    BaseMismatch,
    EngineUnavailable,
    HotshoeError,
    LeaseLost,
    NotFound,
    Problem,
    RegistryBusy,
    StorageDamaged,
)
from adapters.file_rows import Owner
from adapters.inspect import CARD_FILE
from adapters.job_rows import JobChange, JobRow, Phase
from adapters.publish import PublishContext, publish
from adapters.staging import sha256
from adapters.store import disk_errors
from adapters.types import AdapterVersion, VersionStatus
from server.child import renamed
from server.job_folders import JobFolders
from server.job_memory import default_limit_bytes, limit_memory, sweep_groups
from server.job_order import asked_of, parent_of, settings_of, wandb_of
from server.job_results import keep_gate, keep_results
from server.job_training import RunFailed, Training
from server.tasks import at_most, end_tasks, insist
from training.jobs import GATE_FILE, Order

if TYPE_CHECKING:
    from adapters.bases import BaseModel
    from adapters.files import Files
    from adapters.registry import Registry
    from adapters.store import BlobStore
    from server.proving import Prover

T = TypeVar("T")
log = structlog.get_logger("hotshoe.jobs")
NICE = 15
POLL_SECONDS = 5.0  # between two looks at an empty queue that nobody poked
PUT_OFF_SECONDS = 5.0  # after a step that may go better later
PROOF_SECONDS = 60.0  # for a version to be proven; then other jobs get their turn first
LOOK_SECONDS = 5.0  # at a version that is being proven, and between two renewals meanwhile
MOST_PROBLEMS = 100  # of a job's error that are kept
STOP_SECONDS = 5.0  # for the registry to take a job back when the server stops
LATER = ("already_running", "registry_busy", "engine_unavailable", "engine_busy")  # codes of what may go better later
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
    promote: Callable[[JobRow, AdapterVersion, str], Awaitable[Any]]  # while the job is ours: a version, the alias
    stop_seconds: float  # for a run to save its step when the server stops
    memory_bytes: int | None = None  # that a job's processes may hold; None: most of what is free when it starts
    gpu_memory_bytes: int | None = None  # on a GPU that serving is on, too
    checkpoint_seconds: float = 7 * 86_400.0  # that checkpoints of a job stay when it has ended
    wandb: Mapping[str, str] = field(default_factory=dict)  # variables of a job that reports there


class JobWorker:
    """One worker of the queue. `poke` it when the queue or a job of it has changed."""

    def __init__(self, where: JobPlace) -> None:
        self.where = where
        self.registry = where.registry
        self.folders = JobFolders(where.home / "jobs", where.registry, where.checkpoint_seconds)
        self.working_on: str | None = None  # the id of the job whose process is there
        self._poked = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin; what ran when the server ended is free at once, since a state folder has one server at a time."""
        await asyncio.to_thread(sweep_groups)
        try:
            await insist(self.registry.free_leases)
        except HotshoeError as error:  # they run out by themselves
            log.warning("leases not freed", code=error.code, reason=error.message)
        self._task = asyncio.create_task(self._work())

    async def stop(self) -> None:
        """Have the running job save its step; it goes on at the next start."""
        await end_tasks(self._task)
        self._task = None

    def poke(self) -> None:
        """Something changed: look at once."""
        self._poked.set()

    async def _work(self) -> None:
        while True:
            try:
                if await insist(self.registry.has_free_job):
                    job = await insist(self.registry.claim_job)
                    if job is not None:  # its tenant may have no more of them running
                        await self._run(job)
                        self._poked.set()  # there may be more
                await asyncio.to_thread(self.folders.sweep)
            except Exception as error:  # noqa: BLE001 - a full disk, say: later jobs must find a worker all the same
                log.error("the queue of jobs waits", error=type(error).__name__, reason=str(error)[:500])
                await asyncio.sleep(PUT_OFF_SECONDS)
            await at_most(POLL_SECONDS, self._poked.wait())
            self._poked.clear()

    async def _run(self, job: JobRow) -> None:
        """Carry out one job; whatever is wrong with it, the next one gets its turn."""
        try:
            await self._carry_out(job)
        except LeaseLost:
            log.info("job left", job=job.id)
        except asyncio.CancelledError:
            says = "The server stops; the job goes on when it is back"
            with contextlib.suppress(HotshoeError):
                await at_most(STOP_SECONDS, insist(lambda: self.registry.requeue_job(job, says)))
            raise
        except RunFailed as failed:
            await self._failed(job, failed.error)
        except HotshoeError as error:
            await self._failed(job, self._as_openai(job, error))
        except Exception as error:
            log.exception("job failed", job=job.id)
            message = f"The job failed: {type(error).__name__}. The server's log says more."
            await self._failed(job, {"code": "internal_error", "message": message, "param": None, "problems": []})

    async def _failed(self, job: JobRow, error: dict[str, Any]) -> None:
        """The end of the job, or another try where it may go better later."""
        log.warning("job failed", job=job.id, code=error["code"], reason=error["message"])
        with contextlib.suppress(LeaseLost):
            if error["code"] in LATER:
                await insist(lambda: self.registry.requeue_job(job, f"Put off: {error['message']}"))
                await asyncio.sleep(PUT_OFF_SECONDS)
            else:
                report = await self._gate_report(job)
                await insist(lambda: self.registry.fail_job(job, error, result_file=report))

    async def _gate_report(self, job: JobRow) -> str | None:
        """The id of the file with what the data check found, where it blocked the job."""
        path = self.folders.of(job.id) / GATE_FILE
        try:
            return await asyncio.to_thread(keep_gate, self.where.files, job, path) if path.exists() else None
        except (HotshoeError, OSError) as error:
            log.warning("report of the data check not kept", job=job.id, reason=str(error))
            return None

    async def _carry_out(self, job: JobRow) -> None:
        check_base(job, self.where.base)
        folder = self.folders.of(job.id)
        await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True)
        if job.number is None:
            if not (folder / "out" / CARD_FILE).is_file():
                await self._train(job, folder)
            await asyncio.to_thread(_check_score, job, folder / "out")
            async with self._keeping(job):
                version = await unbroken(self._publish(job, folder / "out"))
        else:
            version = await asyncio.to_thread(self.registry.get, job.tenant, job.adapter, job.number)
        version = await self._proven(job, version)
        await self._promote(job, version)
        result_file = await self._results(job, version)
        tokens = ((version.card or {}).get("cost") or {}).get("tokens")
        says = f"The job has successfully completed; the fine-tuned model is {version.ref}"
        await insist(lambda: self.registry.succeed_job(job, says, result_file=result_file, trained_tokens=tokens))
        log.info("job succeeded", job=job.id, model=version.ref)

    async def _train(self, job: JobRow, folder: Path) -> None:
        """Have the process train; raises LeaseLost, or what is wrong with the job."""
        order = await asyncio.to_thread(self._order, job, folder)
        memory = await asyncio.to_thread(limit_memory, order.memory_bytes or 0, f"{job.id}-{job.fence}")
        training = Training(self.registry, job, memory, self._poked, self.where.stop_seconds)
        self.working_on = job.id
        try:
            await training.run(order, self._names(job), wandb_of(job, self.where.wandb, folder))
        finally:
            self.working_on = None
            await asyncio.to_thread(memory.close)

    @contextlib.asynccontextmanager
    async def _keeping(self, job: JobRow) -> AsyncIterator[None]:
        """The lease is renewed for as long as the block takes."""

        async def renew() -> None:
            while True:
                await insist(lambda: self.registry.renew_lease(job))
                await asyncio.sleep(LOOK_SECONDS)

        renewing = asyncio.create_task(renew())
        try:
            yield
        finally:
            await end_tasks(renewing)

    async def _publish(self, job: JobRow, out: Path) -> AdapterVersion:
        """The run's adapter as a version, which the job names in the same transaction."""
        await insist(lambda: self.registry.note_job(job, JobChange(phase=Phase.PUBLISHING), says="Publishing"))
        context = await self.where.context_for(job.tenant, job.actor)
        staged = await asyncio.to_thread(self.where.store.stage)
        try:
            with disk_errors(staged):
                for name in (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE):
                    await asyncio.to_thread(shutil.copyfile, out / name, staged / name)
            return await asyncio.to_thread(lambda: publish(staged, job.adapter, context=replace(context, job=job)))
        finally:
            await asyncio.to_thread(shutil.rmtree, staged, ignore_errors=True)

    async def _proven(self, job: JobRow, version: AdapterVersion) -> AdapterVersion:
        """The version once it is settled; raises AdapterRefused where it cannot be served, EngineUnavailable."""
        prover, deadline = self.where.prover, time.monotonic() + PROOF_SECONDS
        if version.status is VersionStatus.QUARANTINED:
            await prover.take(version)
        while version.status is VersionStatus.QUARANTINED and prover.is_pending(version):
            if time.monotonic() > deadline:
                raise EngineUnavailable(f"{version.ref} waits for its proof.")
            await insist(lambda: self.registry.renew_lease(job))
            version = await prover.wait(version, LOOK_SECONDS)
        version = await asyncio.to_thread(self.registry.get, version.tenant, version.name, version.number)
        if version.status is not VersionStatus.READY:
            reasons = tuple(Problem(**reason) for reason in version.reasons)
            raise AdapterRefused(f"{version.ref} is {version.status} and cannot be served.", problems=reasons)
        return version

    async def _promote(self, job: JobRow, version: AdapterVersion) -> None:
        """Move the alias that was asked for; where that is refused, its gate say, the version is there all the same."""
        alias = job.request.get("hotshoe", {}).get("alias")
        if alias is None:
            return
        says, level = f"The alias {alias} names {version.ref} now", "info"
        try:
            async with self._keeping(job):
                await self.where.promote(job, version, alias)
        except (RegistryBusy, LeaseLost):
            raise
        except HotshoeError as error:
            says, level = f"The alias {alias} was not moved to {version.ref}: {error.message}", "warn"
        await insist(lambda: self.registry.note_job(job, says=says, level=level))

    async def _results(self, job: JobRow, version: AdapterVersion) -> str | None:
        """The id of the file with the metrics; None where the tenant has no room for one."""
        try:
            return await asyncio.to_thread(keep_results, self.where.files, job, version)
        except RegistryBusy:
            raise
        except (HotshoeError, OSError) as error:
            says = f"The metrics were not kept: {error.message if isinstance(error, HotshoeError) else error.strerror}"
            await insist(lambda: self.registry.note_job(job, says=says, level="warn"))
            return None

    def _order(self, job: JobRow, folder: Path) -> Order:
        """What the process is told. The job's files are linked into its folder: deleting one does no harm."""
        base, asked = self.where.base, asked_of(job)
        config = {
            **settings_of(job),
            "base": str(base.folder),
            "data": str(self._linked(job, job.training_file, folder / "training")),
            "out": str(folder / "out"),
        }
        if job.validation_file is not None:
            config["validation"] = str(self._linked(job, job.validation_file, folder / "validation"))
        if (parent := parent_of(job)) is not None:
            version = self.registry.get(*parent)
            if version.digest is None or not self.where.store.has(version.digest):
                raise NotFound(f"{version.ref} has no files any more to go on from.", param="model")
            config |= {"initial_adapter": str(self.where.store.folder(version.digest)), "parent": version.ref}
        return Order(
            config,
            str(folder),
            nice=NICE,
            memory_bytes=self.where.memory_bytes or default_limit_bytes(),
            gpu_memory_bytes=self.where.gpu_memory_bytes,
            baseline=None if asked.get("baseline") == "off" else asked.get("baseline", "quick"),
            has_network=bool(job.request.get("integrations")),
            needs_score="minimum_score" in asked,
        )

    def _linked(self, job: JobRow, file_id: str, place: Path) -> Path:
        """The file of a job under a name that tells its form."""
        known = [path for suffix in FILE_SUFFIXES if (path := place.with_suffix(suffix)).exists()]
        if known:
            return known[0]
        try:
            file, source = self.where.files.open(Owner(job.tenant, job.actor), file_id)
        except NotFound as error:
            raise NotFound(f"The file {file_id} is not there any more.", param=f"{place.name}_file") from error
        suffix = next((one for one in FILE_SUFFIXES if file.filename.lower().endswith(one)), FILE_SUFFIXES[0])
        if f"sha256:{sha256(source)}" != file.digest:
            raise StorageDamaged(
                f"{file_id} is not on the disk as it was sent: send it again.", param=f"{place.name}_file"
            )
        os.link(source, place.with_suffix(suffix))
        return place.with_suffix(suffix)

    def _names(self, job: JobRow) -> dict[str, str]:
        """What the client may know our paths by."""
        folder = self.folders.of(job.id)
        files = {"training": job.training_file, "validation": job.validation_file or ""}
        names = {folder / f"{name}{suffix}": file for name, file in files.items() for suffix in FILE_SUFFIXES}
        names |= {folder: job.id, self.where.base.folder: self.where.base.id, self.where.home: "state"}
        return {form: name for path, name in names.items() for form in (str(path), str(path.absolute()))}

    def _as_openai(self, job: JobRow, error: HotshoeError) -> dict[str, Any]:
        names = self._names(job)
        problems = [problem.as_dict() for problem in error.problems[:MOST_PROBLEMS]]
        problems = [{key: renamed(text, names) for key, text in problem.items()} for problem in problems]
        message = renamed(error.message, names)
        return {"code": error.code, "message": message, "param": error.param, "problems": problems}


def check_base(job: JobRow, base: BaseModel) -> None:
    """Raises BaseMismatch where the job was made for another base than this."""
    if job.request["base_digest"] != base.digest:
        raise BaseMismatch(f"{job.id} was made for another base than {base.id}, which is served now.", param="model")


def _check_score(job: JobRow, out: Path) -> None:
    """Raises ScoreTooLow where a score was asked for that the run has not reached."""
    from training.job_gates import check_score

    minimum = asked_of(job).get("minimum_score")
    if minimum is not None:
        check_score(json.loads((out / CARD_FILE).read_bytes()), minimum)


async def unbroken(work: Awaitable[T]) -> T:
    """What the work gives; when the caller is cancelled, it is done to its end first."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.gather(task, return_exceptions=True)
        raise
