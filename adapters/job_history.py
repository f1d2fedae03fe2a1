"""What fine-tuning jobs said, and the checkpoints that they saved, as rows beside the queue of `job_rows.py`."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Connection, insert, select, update

from adapters import schema
from adapters.database import Database
from adapters.errors import NotFound
from adapters.file_rows import new_id
from adapters.paging import FIRST_PAGE, Page, unknown_after

EVENT = "ftevent-"


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
    """A checkpoint that was whole on the disk; `is_kept` while its adapter's files are there to be published."""

    id: str
    tenant: str
    job_id: str
    step: int
    metrics: Mapping[str, Any]
    created_at: float
    is_kept: bool = False
    number: int | None = None  # of the version that was made of it


class JobHistory:
    """The part of the registry that keeps what jobs said and saved."""

    database: Database

    def job_events(self, tenant: str, job_id: str, page: Page = FIRST_PAGE) -> list[JobEvent]:
        """What the job said, newest first; raises NotFound, InvalidRequest for `after`."""
        events = schema.job_events
        with self.database.reading() as connection:
            _check_job(connection, tenant, job_id)
            where = [events.c.job_id == job_id]
            if page.after is not None:
                where.append(events.c.id < event_number(page.after))
            query = select(events).where(*where).order_by(events.c.id.desc()).limit(page.limit)
            return [JobEvent(**row._mapping) for row in connection.execute(query)]

    def job_events_since(self, tenant: str, job_id: str, last: int) -> list[JobEvent]:
        """What the job said after the event of this number, oldest first; raises NotFound."""
        events = schema.job_events
        with self.database.reading() as connection:
            _check_job(connection, tenant, job_id)
            query = select(events).where(events.c.job_id == job_id, events.c.id > last).order_by(events.c.id)
            return [JobEvent(**row._mapping) for row in connection.execute(query)]

    def job_checkpoints(self, tenant: str, job_id: str, page: Page = FIRST_PAGE) -> list[JobCheckpoint]:
        """The job's checkpoints, newest first; raises NotFound, InvalidRequest for `after`."""
        checkpoints = schema.job_checkpoints
        with self.database.reading() as connection:
            _check_job(connection, tenant, job_id)
            where = [checkpoints.c.job_id == job_id]
            if page.after is not None:
                step = select(checkpoints.c.step).where(*where, checkpoints.c.id == page.after)
                last = connection.execute(step).scalar()
                if last is None:
                    raise unknown_after(page.after)
                where.append(checkpoints.c.step < last)
            query = select(checkpoints).where(*where).order_by(checkpoints.c.step.desc()).limit(page.limit)
            return [JobCheckpoint(**row._mapping) for row in connection.execute(query)]

    def get_checkpoint(self, tenant: str, job_id: str, checkpoint_id: str) -> JobCheckpoint:
        """One checkpoint of a job; raises NotFound."""
        checkpoints = schema.job_checkpoints
        with self.database.reading() as connection:
            _check_job(connection, tenant, job_id)
            where = (checkpoints.c.job_id == job_id, checkpoints.c.id == checkpoint_id)
            row = connection.execute(select(checkpoints).where(*where)).first()
        if row is None:
            raise NotFound(f"{job_id} has no checkpoint {checkpoint_id[:80]!r}.", param="checkpoint_id")
        return JobCheckpoint(**row._mapping)

    def note_checkpoint(
        self, tenant: str, job_id: str, step: int, metrics: Mapping[str, Any], kept: Collection[int]
    ) -> None:
        """A checkpoint that is whole, whoever has the job by now; the same step again changes nothing.

        A job that gets further with each worker it loses is not given up. `kept` are the steps whose files are there.
        """
        checkpoints = schema.job_checkpoints
        with self.database.writing() as connection:
            known = select(checkpoints.c.id).where(checkpoints.c.job_id == job_id, checkpoints.c.step == step)
            if connection.execute(known).first() is None:
                row = JobCheckpoint(new_id("ftckpt_"), tenant, job_id, step, dict(metrics), time.time())
                connection.execute(insert(checkpoints).values(asdict(row)))
                say(connection, tenant, job_id, "info", f"Checkpoint created at step {step}")
                connection.execute(update(schema.jobs).where(schema.jobs.c.id == job_id).values(losses=0))
            _keep(connection, job_id, kept)

    def note_kept(self, job_id: str, kept: Collection[int], stored_bytes: int) -> None:
        """Only the checkpoints of these steps have files, and the job's folder has so many bytes."""
        jobs = schema.jobs
        with self.database.writing() as connection:
            _keep(connection, job_id, kept)
            connection.execute(update(jobs).where(jobs.c.id == job_id).values(stored_bytes=stored_bytes))

    def name_checkpoint(self, checkpoint: JobCheckpoint, number: int) -> JobCheckpoint:
        """The checkpoint, whose version has this number now."""
        checkpoints = schema.job_checkpoints
        with self.database.writing() as connection:
            connection.execute(update(checkpoints).where(checkpoints.c.id == checkpoint.id).values(number=number))
        return self.get_checkpoint(checkpoint.tenant, checkpoint.job_id, checkpoint.id)


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
        raise unknown_after(event)
    return int(digits)


def no_job(job_id: str) -> NotFound:
    return NotFound(f"There is no fine-tuning job {job_id[:80]!r}.", param="fine_tuning_job_id")


def _check_job(connection: Connection, tenant: str, job_id: str) -> None:
    jobs = schema.jobs.c
    if connection.execute(select(jobs.id).where(jobs.id == job_id, jobs.tenant == tenant)).first() is None:
        raise no_job(job_id)


def _keep(connection: Connection, job_id: str, steps: Collection[int]) -> None:
    checkpoints = schema.job_checkpoints
    kept = checkpoints.c.step.in_(list(steps))
    connection.execute(update(checkpoints).where(checkpoints.c.job_id == job_id).values(is_kept=kept))
