"""Training jobs as rows: a durable queue that many workers may take from.

    queued ──claim──► running ──► succeeded | failed
      ▲  ▲              │ │ └────► cancelled   (cancel; also of a queued or paused job)
      │  └──requeue─────┘ └──────► paused      (pause; also of a queued job)
      └────────resume───────────────┘

A worker that claims a job gets its fence, a number that grows with every claim and every pause or cancel. Whatever the
worker writes after that names the fence, in the same transaction: when the job is somebody else's by then, nothing is
written and LeaseLost is raised. A lease that is not renewed in time makes the job free for the next claim.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, and_, func, insert, or_, select, update

from adapters import schema
from adapters.database import Database
from adapters.errors import Conflict, LeaseLost
from adapters.file_rows import new_id
from adapters.job_history import JobHistory, no_job, say
from adapters.journal import add_event, ensure_tenant
from adapters.paging import FIRST_PAGE, Page, beyond
from adapters.tenants import check_job_bytes, check_job_quota, check_job_seconds, check_quota, running_jobs_limit
from adapters.turn_rows import Queue, begin_turn, last_turns
from adapters.turns import Turn, choose

LEASE_SECONDS = 30.0
MOST_LOSSES = 5  # of a job's worker, each with its server; then it is most likely the job that ends servers


class JobStatus(StrEnum):
    """Where a job stands."""

    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        return not NEXT[self]


NEXT: Mapping[JobStatus, tuple[JobStatus, ...]] = {
    JobStatus.QUEUED: (JobStatus.RUNNING, JobStatus.PAUSED, JobStatus.CANCELLED),
    JobStatus.RUNNING: (
        JobStatus.QUEUED,
        JobStatus.PAUSED,
        JobStatus.SUCCEEDED,
        JobStatus.FAILED,
        JobStatus.CANCELLED,
    ),
    JobStatus.PAUSED: (JobStatus.QUEUED, JobStatus.CANCELLED),
    JobStatus.SUCCEEDED: (),
    JobStatus.FAILED: (),
    JobStatus.CANCELLED: (),
}


class Phase(StrEnum):
    """What a running job does; it is kept when the job stops running."""

    NEW = "new"
    VALIDATING = "validating"
    TRAINING = "training"
    PUBLISHING = "publishing"


@dataclass(frozen=True, slots=True)
class JobRow:
    """One job. `model` is what the client named, `request` what it asked for, `settings` what that became."""

    id: str
    tenant: str
    actor: str
    adapter: str  # the name that its version gets
    model: str
    training_file: str
    validation_file: str | None = None
    seed: int = 0
    request: Mapping[str, Any] = field(default_factory=dict)
    status: JobStatus = JobStatus.QUEUED
    phase: Phase = Phase.NEW
    settings: Mapping[str, Any] | None = None
    progress: Mapping[str, Any] | None = None
    error: Mapping[str, Any] | None = None
    number: int | None = None  # of the version that was made of it
    trained_tokens: int | None = None
    result_file: str | None = None
    attempts: int = 0
    deaths: int = 0  # of its process
    losses: int = 0  # of its worker, with the server
    run_seconds: float = 0.0  # of its processes
    stored_bytes: int = 0  # of its folder
    fence: int = 0
    leased_until: float | None = None
    created_at: float = 0.0
    started_at: float | None = None
    finished_at: float | None = None

    def has_metadata(self, wanted: Mapping[str, str]) -> bool:
        """Each of these is in the job's metadata."""
        found = self.request.get("metadata") or {}
        return all(found.get(key) == value for key, value in wanted.items())


@dataclass(frozen=True, slots=True)
class JobChange:
    """What a worker writes into its job; what is None stays as it is."""

    phase: Phase | None = None
    settings: Mapping[str, Any] | None = None
    progress: Mapping[str, Any] | None = None

    def values(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None}


class JobRows(JobHistory):
    """The part of the registry that keeps training jobs."""

    database: Database

    def add_job(self, new: JobRow) -> JobRow:
        """A queued job; raises QuotaExceeded when the tenant has as many jobs or versions as it may, PayloadTooLarge
        when it or its jobs store as much, Conflict where the adapter's name differs only in case from another's.
        """
        job = {**asdict(new), "id": new.id or new_id("ftjob-"), "created_at": time.time()}
        with self.database.writing() as connection:
            ensure_tenant(connection, new.tenant, job["created_at"])
            check_job_quota(connection, new.tenant)
            check_quota(connection, new.tenant, 0)
            check_job_bytes(connection, new.tenant)
            adapters = schema.adapters.c
            named = select(adapters.name).where(adapters.tenant == new.tenant, adapters.name_key == new.adapter.lower())
            twin = connection.execute(named).scalar()
            if twin is not None and twin != new.adapter:
                raise Conflict(f"{new.adapter!r} differs only in case from {twin!r}, which is taken.", param="suffix")
            connection.execute(insert(schema.jobs).values(job))
            say(connection, new.tenant, job["id"], "info", f"Created fine-tuning job: {job['id']}")
            add_event(connection, new.tenant, "job_added", new.actor, new.adapter, detail={"job": job["id"]})
            return _job(connection, job["id"], new.tenant)

    def get_job(self, tenant: str, job_id: str) -> JobRow:
        """One job; raises NotFound."""
        with self.database.reading() as connection:
            return _job(connection, job_id, tenant)

    def jobs(
        self,
        tenant: str,
        page: Page = FIRST_PAGE,
        metadata: Mapping[str, str] | None = None,
        adapters: Collection[str] | None = None,
    ) -> list[JobRow]:
        """The tenant's jobs, newest first; those with this metadata, of these adapters. Raises InvalidRequest for
        `after`.
        """
        jobs = schema.jobs.c
        where: list[ColumnElement[bool]] = [jobs.tenant == tenant]
        if adapters is not None:
            where.append(jobs.adapter.in_(sorted(adapters)))
        with self.database.reading() as connection:
            if page.after is not None:
                where.append(beyond(connection, schema.jobs, jobs.tenant == tenant, page.after))
            query = select(schema.jobs).where(*where).order_by(jobs.created_at.desc(), jobs.id.desc())
            rows = (_to_job(row._mapping) for row in connection.execute(query))
            wanted = (job for job in rows if job.has_metadata(metadata or {}))
            return list(itertools.islice(wanted, page.limit))

    def jobs_of(self, ids: Iterable[str]) -> list[JobRow]:
        """Those of these jobs that there are, of all tenants."""
        query = select(schema.jobs).where(schema.jobs.c.id.in_(sorted(ids)))
        with self.database.reading() as connection:
            return [_to_job(row._mapping) for row in connection.execute(query)]

    # What a user does.

    def pause_job(self, tenant: str, job_id: str, *, actor: str) -> JobRow:
        """Let it rest: at once in the queue, and a worker that runs it learns it at its next word."""
        return self._turn(tenant, job_id, JobStatus.PAUSED, actor, "The job has been paused")

    def resume_job(self, tenant: str, job_id: str, *, actor: str) -> JobRow:
        """Back into the queue, to go on from its last checkpoint."""
        return self._turn(tenant, job_id, JobStatus.QUEUED, actor, "The job has been resumed", of=JobStatus.PAUSED)

    def cancel_job(self, tenant: str, job_id: str, *, actor: str) -> JobRow:
        """End it for good; its checkpoints stay listed."""
        return self._turn(tenant, job_id, JobStatus.CANCELLED, actor, "Fine tuning job cancelled")

    def _turn(
        self, tenant: str, job_id: str, to: JobStatus, actor: str, message: str, of: JobStatus | None = None
    ) -> JobRow:
        with self.database.writing() as connection:
            job = _job(connection, job_id, tenant)
            if job.status is to:
                return job
            if to not in NEXT[job.status] or (of is not None and job.status is not of):
                raise Conflict(f"{job_id} is {job.status}: it cannot become {to}.", param="fine_tuning_job_id")
            _leave(connection, job, to)
            say(connection, tenant, job_id, "info", message)
            add_event(connection, tenant, f"job_{to}", actor, job.adapter, detail={"job": job_id})
            return _job(connection, job_id, tenant)

    # What a worker does.

    def has_free_job(self) -> bool:
        """Some job waits for a worker; its tenant may have as many running as it may."""
        with self.database.reading() as connection:
            return connection.execute(_free(time.time()).limit(1)).first() is not None

    def claim_job(self, *, lease_seconds: float = LEASE_SECONDS) -> JobRow | None:
        """The job whose turn it is (`adapters/turns.py`), leased; None where nothing waits.

        A job whose lease ran out waits like a queued one.
        """
        now = time.time()
        with self.database.writing() as connection:
            free = [_to_job(row._mapping) for row in connection.execute(_free(now))]
            waiting = [job for job in free if not _is_given_up(connection, job)]
            chosen = choose(waiting, _turns(connection, {job.tenant for job in waiting}, now))
            if chosen is None:
                return None
            is_lost = chosen.status is JobStatus.RUNNING
            if is_lost:
                say(connection, chosen.tenant, chosen.id, "warn", "The worker of this job is gone; another goes on")
            values = {
                "losses": chosen.losses + is_lost,
                "status": JobStatus.RUNNING,
                "fence": chosen.fence + 1,
                "attempts": chosen.attempts + 1,
                "leased_until": now + lease_seconds,
                "started_at": now,
            }
            _update(connection, chosen.id, values)
            begin_turn(connection, Queue.JOBS, chosen.tenant, now)
            return _job(connection, chosen.id, chosen.tenant)

    @contextmanager
    def holding_job(self, job: JobRow) -> Iterator[Connection]:
        """A transaction in which the job is still this worker's; raises LeaseLost where it is not."""
        with self.database.writing() as connection:
            check_held(connection, job)
            yield connection

    def renew_lease(self, job: JobRow, *, lease_seconds: float = LEASE_SECONDS) -> None:
        """Keep the job; raises LeaseLost where it is another's, paused or cancelled by now."""
        with self.holding_job(job) as connection:
            _update(connection, job.id, {"leased_until": time.time() + lease_seconds})

    def count_use(self, job: JobRow, ran_seconds: float, stored_bytes: int) -> None:
        """Write down that its process ran for so long since the last time, and what its folder has now, whoever has
        the job; raises QuotaExceeded or PayloadTooLarge where a job of its tenant may not run for so long, or its jobs
        not have so much.
        """
        jobs = schema.jobs.c
        with self.database.writing() as connection:
            values = {"run_seconds": jobs.run_seconds + ran_seconds, "stored_bytes": stored_bytes}
            connection.execute(update(schema.jobs).where(jobs.id == job.id).values(values))
        with self.database.reading() as connection:
            check_job_seconds(connection, _job(connection, job.id, job.tenant).run_seconds, job.tenant)
            check_job_bytes(connection, job.tenant, is_new=False)

    def note_job(
        self, job: JobRow, change: JobChange | None = None, *, says: str = "", level: str = "info", data: Any = None
    ) -> None:
        """Write down how far the job is, and what it says; raises LeaseLost."""
        with self.holding_job(job) as connection:
            if change is not None:
                _update(connection, job.id, change.values())
            if says:
                say(connection, job.tenant, job.id, level, says, data)

    def requeue_job(self, job: JobRow, reason: str, *, died: bool = False, pass_size: int | None = None) -> None:
        """Back into the queue: the worker has to stop, or its process died and is tried again, with so many rows at a
        time where that is given. Raises LeaseLost.
        """
        values: dict[str, Any] = {"deaths": job.deaths + died}
        if pass_size is not None:
            values["request"] = {**job.request, "pass_size": pass_size}
        self._end(job, JobStatus.QUEUED, values, reason, "warn")

    def succeed_job(
        self, job: JobRow, says: str, *, result_file: str | None = None, trained_tokens: int | None = None
    ) -> None:
        """It ended well: its version is there. Raises LeaseLost."""
        values = {"result_file": result_file, "trained_tokens": trained_tokens}
        self._end(job, JobStatus.SUCCEEDED, values, says, "info")

    def free_leases(self) -> None:
        """Every running job may be claimed at once; for a state folder whose one server has just begun."""
        running = schema.jobs.c.status == JobStatus.RUNNING
        with self.database.writing() as connection:
            connection.execute(update(schema.jobs).where(running).values(leased_until=0.0))

    def fail_job(self, job: JobRow, error: Mapping[str, Any], *, result_file: str | None = None) -> None:
        """It ended badly, for the reason in OpenAI's form (code, message, param). Raises LeaseLost."""
        values = {"error": dict(error), "result_file": result_file}
        self._end(job, JobStatus.FAILED, values, str(error.get("message")), "error")

    def _end(self, job: JobRow, to: JobStatus, values: dict[str, Any], says: str, level: str) -> None:
        with self.holding_job(job) as connection:
            _leave(connection, job, to, **values)
            say(connection, job.tenant, job.id, level, says)


def check_held(connection: Connection, job: JobRow) -> None:
    """Raises LeaseLost where the job is not this worker's any more. Call it in the transaction of the change."""
    found = connection.execute(select(schema.jobs.c.fence).where(schema.jobs.c.id == job.id)).scalar()
    if found != job.fence:
        raise LeaseLost(f"{job.id} is not this worker's any more.")


def note_version(connection: Connection, job: JobRow, number: int) -> None:
    """The version that was made of a job, in the transaction that makes it; raises LeaseLost."""
    check_held(connection, job)
    _update(connection, job.id, {"number": number})


def _leave(connection: Connection, job: JobRow, to: JobStatus, **values: Any) -> None:
    """Take a job out of its status; whoever held it holds it no more."""
    if to.is_final:
        values["finished_at"] = time.time()
    _update(connection, job.id, {"status": to, "leased_until": None, "fence": job.fence + 1, **values})


def _is_given_up(connection: Connection, job: JobRow) -> bool:
    """Whether servers were lost with this job too often; then it has failed."""
    if job.status is not JobStatus.RUNNING or job.losses + 1 < MOST_LOSSES:
        return False
    message = (
        f"The server ended {MOST_LOSSES} times while this job ran, most likely because memory ran out: give shorter "
        "rows, a smaller batch or method qlora, or ask the operator to set HOTSHOE_JOB_MEMORY_BYTES."
    )
    error: dict[str, Any] = {"code": "worker_lost", "message": message, "param": None, "problems": []}
    _leave(connection, job, JobStatus.FAILED, error=error)
    say(connection, job.tenant, job.id, "error", message)
    return True


def _free(now: float) -> Select[Any]:
    """Jobs that a worker may claim."""
    jobs = schema.jobs.c
    is_abandoned = and_(jobs.status == JobStatus.RUNNING, jobs.leased_until <= now)
    return select(schema.jobs).where(or_(jobs.status == JobStatus.QUEUED, is_abandoned))


def _turns(connection: Connection, tenants: Collection[str], now: float) -> dict[str, Turn]:
    begun = last_turns(connection, Queue.JOBS, tenants)
    return {
        tenant: Turn(_running(connection, tenant, now), running_jobs_limit(connection, tenant), begun[tenant])
        for tenant in tenants
    }


def _running(connection: Connection, tenant: str, now: float) -> int:
    jobs = schema.jobs.c
    is_held = and_(jobs.status == JobStatus.RUNNING, jobs.leased_until > now)
    return connection.execute(select(func.count()).where(jobs.tenant == tenant, is_held)).scalar() or 0


def _job(connection: Connection, job_id: str, tenant: str) -> JobRow:
    query = select(schema.jobs).where(schema.jobs.c.id == job_id, schema.jobs.c.tenant == tenant)
    row = connection.execute(query).first()
    if row is None:
        raise no_job(job_id)
    return _to_job(row._mapping)


def _update(connection: Connection, job_id: str, values: Mapping[str, Any]) -> None:
    connection.execute(update(schema.jobs).where(schema.jobs.c.id == job_id).values(dict(values)))


def _to_job(row: Mapping[Any, Any]) -> JobRow:
    return JobRow(**{**row, "status": JobStatus(row["status"]), "phase": Phase(row["phase"])})
