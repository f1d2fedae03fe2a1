"""Training jobs as rows: a durable queue that many workers may take from, and what each job said and saved.

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
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, and_, func, insert, or_, select, update

from adapters import schema
from adapters.database import Database
from adapters.errors import Conflict, InvalidRequest, LeaseLost, NotFound
from adapters.file_rows import new_id
from adapters.journal import add_event, ensure_tenant
from adapters.tenants import check_job_quota, check_quota, running_jobs_limit

LEASE_SECONDS = 30.0
EVENT = "ftevent-"


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
    deaths: int = 0
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
class JobEvent:
    """Something that a job said."""

    id: int
    tenant: str
    job_id: str
    at: float
    level: str  # info, warn or error
    message: str
    data: Mapping[str, Any] | None = None  # figures, where it has some


@dataclass(frozen=True, slots=True)
class JobCheckpoint:
    """A checkpoint that is whole on the disk."""

    id: str
    tenant: str
    job_id: str
    step: int
    metrics: Mapping[str, Any]
    created_at: float


@dataclass(frozen=True, slots=True)
class Page:
    """Which part of a list is asked for: what comes behind `after`, at most `limit`."""

    after: str | None = None
    limit: int = 20


FIRST_PAGE = Page()


@dataclass(frozen=True, slots=True)
class JobChange:
    """What a worker writes into its job; what is None stays as it is."""

    phase: Phase | None = None
    settings: Mapping[str, Any] | None = None
    progress: Mapping[str, Any] | None = None

    def values(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None}


class JobRows:
    """The part of the registry that keeps training jobs."""

    database: Database

    def add_job(self, new: JobRow) -> JobRow:
        """A queued job; raises QuotaExceeded when the tenant has as many jobs or versions as it may, PayloadTooLarge
        when it stores as much, Conflict where the adapter's name differs only in case from another's.
        """
        job = {**asdict(new), "id": new.id or new_id("ftjob-"), "created_at": time.time()}
        with self.database.writing() as connection:
            ensure_tenant(connection, new.tenant, job["created_at"])
            check_job_quota(connection, new.tenant)
            check_quota(connection, new.tenant, 0)
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
                where.append(_older_than(connection, tenant, page.after))
            query = select(schema.jobs).where(*where).order_by(jobs.created_at.desc(), jobs.id.desc())
            rows = (_to_job(row._mapping) for row in connection.execute(query))
            wanted = (job for job in rows if job.has_metadata(metadata or {}))
            return list(itertools.islice(wanted, page.limit))

    def open_jobs(self) -> list[JobRow]:
        """Jobs of all tenants that have not ended, oldest first."""
        query = select(schema.jobs).where(schema.jobs.c.status.in_([s for s in JobStatus if not s.is_final]))
        with self.database.reading() as connection:
            return [_to_job(row._mapping) for row in connection.execute(query.order_by(schema.jobs.c.created_at))]

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
        """The job whose turn it is, leased; None where nothing waits.

        Tenants take turns: first come those with the fewest jobs running, of these the one that has waited longest
        since a job of its was begun; of a tenant's own jobs the oldest. A job whose lease ran out waits like a queued
        one.
        """
        now = time.time()
        with self.database.writing() as connection:
            waiting = [_to_job(row._mapping) for row in connection.execute(_free(now))]
            turns = {tenant: _turn_of(connection, tenant, now) for tenant in {job.tenant for job in waiting}}
            chosen = choose(waiting, turns)
            if chosen is None:
                return None
            if chosen.status is JobStatus.RUNNING:
                say(connection, chosen.tenant, chosen.id, "warn", "The worker of this job is gone; another goes on")
            values = {
                "status": JobStatus.RUNNING,
                "fence": chosen.fence + 1,
                "attempts": chosen.attempts + 1,
                "leased_until": now + lease_seconds,
                "started_at": now,
            }
            _update(connection, chosen.id, values)
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

    def note_job(
        self, job: JobRow, change: JobChange | None = None, *, says: str = "", level: str = "info", data: Any = None
    ) -> None:
        """Write down how far the job is, and what it says; raises LeaseLost."""
        with self.holding_job(job) as connection:
            if change is not None:
                _update(connection, job.id, change.values())
            if says:
                say(connection, job.tenant, job.id, level, says, data)

    def note_checkpoint(self, job: JobRow, step: int, metrics: Mapping[str, Any]) -> None:
        """A checkpoint that is whole, whoever has the job by now; the same step again changes nothing."""
        checkpoints = schema.job_checkpoints
        with self.database.writing() as connection:
            known = select(checkpoints.c.id).where(checkpoints.c.job_id == job.id, checkpoints.c.step == step)
            if connection.execute(known).first() is None:
                row = JobCheckpoint(new_id("ftckpt_"), job.tenant, job.id, step, dict(metrics), time.time())
                connection.execute(insert(checkpoints).values(asdict(row)))
                say(connection, job.tenant, job.id, "info", f"Checkpoint created at step {step}")

    def requeue_job(self, job: JobRow, reason: str, *, died: bool = False) -> None:
        """Back into the queue: the worker has to stop, or its process died and is tried again. Raises LeaseLost."""
        self._end(job, JobStatus.QUEUED, {"deaths": job.deaths + died}, reason, "warn")

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

    def fail_job(self, job: JobRow, error: Mapping[str, Any]) -> None:
        """It ended badly, for the reason in OpenAI's form (code, message, param). Raises LeaseLost."""
        self._end(job, JobStatus.FAILED, {"error": dict(error)}, str(error.get("message")), "error")

    def _end(self, job: JobRow, to: JobStatus, values: dict[str, Any], says: str, level: str) -> None:
        with self.holding_job(job) as connection:
            _leave(connection, job, to, **values)
            say(connection, job.tenant, job.id, level, says)

    # What a job said and saved.

    def job_events(self, tenant: str, job_id: str, page: Page = FIRST_PAGE) -> list[JobEvent]:
        """What the job said, newest first; raises NotFound, InvalidRequest for `after`."""
        events = schema.job_events
        with self.database.reading() as connection:
            _job(connection, job_id, tenant)
            where = [events.c.job_id == job_id]
            if page.after is not None:
                where.append(events.c.id < event_number(page.after))
            query = select(events).where(*where).order_by(events.c.id.desc()).limit(page.limit)
            return [JobEvent(**row._mapping) for row in connection.execute(query)]

    def job_events_since(self, tenant: str, job_id: str, last: int) -> list[JobEvent]:
        """What the job said after the event of this number, oldest first; raises NotFound."""
        events = schema.job_events
        with self.database.reading() as connection:
            _job(connection, job_id, tenant)
            query = select(events).where(events.c.job_id == job_id, events.c.id > last).order_by(events.c.id)
            return [JobEvent(**row._mapping) for row in connection.execute(query)]

    def job_checkpoints(self, tenant: str, job_id: str, page: Page = FIRST_PAGE) -> list[JobCheckpoint]:
        """The job's checkpoints, newest first; raises NotFound, InvalidRequest for `after`."""
        checkpoints = schema.job_checkpoints
        with self.database.reading() as connection:
            _job(connection, job_id, tenant)
            where = [checkpoints.c.job_id == job_id]
            if page.after is not None:
                step = select(checkpoints.c.step).where(*where, checkpoints.c.id == page.after)
                last = connection.execute(step).scalar()
                if last is None:
                    raise _unknown_after(page.after)
                where.append(checkpoints.c.step < last)
            query = select(checkpoints).where(*where).order_by(checkpoints.c.step.desc()).limit(page.limit)
            return [JobCheckpoint(**row._mapping) for row in connection.execute(query)]


@dataclass(frozen=True, slots=True)
class Turn:
    """What decides whether it is a tenant's turn: jobs that run, how many may, and when its last one was begun."""

    running: int = 0
    most: int | None = None
    last_begun: float = 0.0


def choose(waiting: Sequence[JobRow], turns: Mapping[str, Turn]) -> JobRow | None:
    """The job whose turn it is, of those whose tenant may have one more running."""
    may = [job for job in waiting if (turn := turns[job.tenant]).most is None or turn.running < turn.most]

    def order(job: JobRow) -> tuple[int, float, float, str]:
        turn = turns[job.tenant]
        return (turn.running, turn.last_begun, job.created_at, job.id)

    return min(may, key=order, default=None)


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


def say(
    connection: Connection, tenant: str, job_id: str, level: str, message: str, data: Mapping[str, Any] | None = None
) -> None:
    """Write down what a job says, in the transaction of what it tells of."""
    row = {"tenant": tenant, "job_id": job_id, "at": time.time(), "level": level, "message": message, "data": data}
    connection.execute(insert(schema.job_events).values(row))


def event_id(number: int) -> str:
    """An event's id on the wire."""
    return f"{EVENT}{number}"


def event_number(event: str) -> int:
    """The number in an event's id; raises InvalidRequest."""
    digits = event.removeprefix(EVENT)
    if event == digits or not (digits.isascii() and digits.isdigit()) or len(digits) > 18:
        raise _unknown_after(event)
    return int(digits)


def no_job(job_id: str) -> NotFound:
    return NotFound(f"There is no fine-tuning job {job_id[:80]!r}.", param="fine_tuning_job_id")


def _unknown_after(after: str) -> InvalidRequest:
    return InvalidRequest(f"after is {after[:80]!r}, which is nothing of this list.", param="after")


def _free(now: float) -> Select[Any]:
    """Jobs that a worker may claim."""
    jobs = schema.jobs.c
    is_abandoned = and_(jobs.status == JobStatus.RUNNING, jobs.leased_until <= now)
    return select(schema.jobs).where(or_(jobs.status == JobStatus.QUEUED, is_abandoned))


def _turn_of(connection: Connection, tenant: str, now: float) -> Turn:
    jobs = schema.jobs.c
    is_held = and_(jobs.status == JobStatus.RUNNING, jobs.leased_until > now)
    running = connection.execute(select(func.count()).where(jobs.tenant == tenant, is_held)).scalar()
    begun = connection.execute(select(func.max(jobs.started_at)).where(jobs.tenant == tenant)).scalar()
    return Turn(running or 0, running_jobs_limit(connection, tenant), begun or 0.0)


def _older_than(connection: Connection, tenant: str, after: str) -> ColumnElement[bool]:
    jobs = schema.jobs.c
    last = connection.execute(select(jobs.created_at, jobs.id).where(jobs.id == after, jobs.tenant == tenant)).first()
    if last is None:
        raise _unknown_after(after)
    return or_(jobs.created_at < last.created_at, and_(jobs.created_at == last.created_at, jobs.id < last.id))


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
