"""Tenants, their limits, and the adapters that one shares with another."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, Table, and_, delete, func, insert, or_, select, update

from adapters import schema
from adapters.database import Database
from adapters.errors import InvalidRequest, ModelNotFound, NotFound, PayloadTooLarge, QuotaExceeded
from adapters.journal import add_event, ensure_tenant
from adapters.limits import UseLimits
from adapters.types import VersionStatus, check_name

KEPT = tuple(str(status) for status in VersionStatus if status not in (VersionStatus.RETIRED, VersionStatus.REJECTED))


@dataclass(frozen=True, slots=True)
class Tenant:
    """One tenant with what it stores now."""

    id: str
    created_at: float
    limits: UseLimits
    adapters: int = 0
    versions: int = 0  # that have files
    stored_bytes: int = 0
    files: int = 0  # open uploads among them
    file_bytes: int = 0  # of files, and what open uploads declare
    upload_parts: int = 0  # of open uploads
    export_bytes: int = 0  # of results that are kept, and of those under way as they are estimated


@dataclass(frozen=True, slots=True)
class Grant:
    """`grantee` may ask `tenant`'s adapter `name` for answers, as `tenant/name`."""

    tenant: str
    name: str
    grantee: str
    created_at: float


class TenantRows:
    """The part of the registry that keeps tenants and grants."""

    database: Database

    def add_tenant(self, tenant: str, limits: UseLimits | None = None, *, actor: str) -> Tenant:
        """The tenant with these limits, made when it is new; without limits a tenant that is there keeps its own."""
        check_name(tenant, "tenant")
        now = time.time()
        with self.database.writing() as connection:
            names = select(schema.tenants.c.id).where(func.lower(schema.tenants.c.id) == tenant.lower())
            twin = connection.execute(names).scalar()
            if twin is not None and twin != tenant:
                raise InvalidRequest(f"The tenant {tenant!r} differs only in case from {twin!r}.", param="tenant")
            ensure_tenant(connection, tenant, now)
            if twin is None or limits is not None:
                kept = {name: value for name, value in (limits or UseLimits()).as_dict().items() if value is not None}
                connection.execute(update(schema.tenants).where(schema.tenants.c.id == tenant).values(limits=kept))
                add_event(connection, tenant, "tenant_set", actor, detail={"limits": kept})
            return _tenant(connection, tenant)

    def tenants(self) -> list[Tenant]:
        """All tenants, sorted."""
        with self.database.reading() as connection:
            names = list(connection.execute(select(schema.tenants.c.id).order_by(schema.tenants.c.id)).scalars())
            return [_tenant(connection, name) for name in names]

    def get_tenant(self, tenant: str) -> Tenant:
        """One tenant; raises NotFound."""
        with self.database.reading() as connection:
            return _tenant(connection, tenant)

    def limits_of(self, tenant: str) -> UseLimits:
        """The tenant's limits; none for a tenant that has no row yet."""
        with self.database.reading() as connection:
            found = connection.execute(select(schema.tenants.c.limits).where(schema.tenants.c.id == tenant)).first()
        return UseLimits.read(found.limits if found else None)

    def add_grant(self, tenant: str, name: str, grantee: str, *, actor: str) -> Grant:
        """Share the adapter; raises ModelNotFound, or NotFound for a tenant that is not there."""
        if tenant == grantee:
            raise InvalidRequest("An adapter's own tenant needs no grant.", param="grantee")
        now = time.time()
        with self.database.writing() as connection:
            adapter_id = _adapter_id(connection, tenant, name)
            _tenant(connection, grantee)
            found = _grants(connection, adapter_id, grantee)
            if found:
                return found[0]
            values = {"tenant": tenant, "adapter_id": adapter_id, "grantee": grantee, "created_at": now}
            connection.execute(insert(schema.grants).values(values))
            add_event(connection, tenant, "granted", actor, name, detail={"grantee": grantee})
        return Grant(tenant, name, grantee, now)

    def remove_grant(self, tenant: str, name: str, grantee: str, *, actor: str) -> None:
        """Share no more, from the next request on; raises NotFound when there was no such grant."""
        with self.database.writing() as connection:
            adapter_id = _adapter_id(connection, tenant, name)
            if not _grants(connection, adapter_id, grantee):
                raise NotFound(f"{tenant}/{name} is not shared with {grantee}.", param="grantee")
            where = (schema.grants.c.adapter_id == adapter_id, schema.grants.c.grantee == grantee)
            connection.execute(delete(schema.grants).where(*where))
            add_event(connection, tenant, "grant_removed", actor, name, detail={"grantee": grantee})

    def grants(self, *, tenant: str | None = None, grantee: str | None = None) -> list[Grant]:
        """Grants by one tenant, to one tenant, or all; sorted by owner and name."""
        query = _grant_query().order_by(schema.grants.c.tenant, schema.adapters.c.name_key, schema.grants.c.grantee)
        if tenant is not None:
            query = query.where(schema.grants.c.tenant == tenant)
        if grantee is not None:
            query = query.where(schema.grants.c.grantee == grantee)
        with self.database.reading() as connection:
            return [Grant(**row._mapping) for row in connection.execute(query)]

    def is_granted(self, tenant: str, name: str, grantee: str) -> bool:
        query = _grant_query().where(
            schema.grants.c.tenant == tenant, schema.adapters.c.name == name, schema.grants.c.grantee == grantee
        )
        with self.database.reading() as connection:
            return connection.execute(query).first() is not None


def check_quota(connection: Connection, tenant: str, size_bytes: int) -> None:
    """Room for one more version of this size; raises PayloadTooLarge or QuotaExceeded. Call it in the transaction."""
    found = _tenant(connection, tenant)
    limits = found.limits
    if limits.stored_bytes is not None and found.stored_bytes + size_bytes > limits.stored_bytes:
        raise PayloadTooLarge(
            f"{tenant} stores {found.stored_bytes} bytes of at most {limits.stored_bytes}, and this version has "
            f"{size_bytes}: retire versions that are no longer needed, or ask the operator for more.",
            param="stored_bytes",
        )
    if limits.versions is not None and found.versions >= limits.versions:
        raise QuotaExceeded(
            f"{tenant} has {found.versions} versions of at most {limits.versions}: retire one that is no longer "
            "needed, or ask the operator for more.",
            param="versions",
        )


def check_file_quota(connection: Connection, tenant: str, size_bytes: int) -> None:
    """Room for one more file, or upload of one; raises PayloadTooLarge or QuotaExceeded. Call it in the transaction."""
    found = _tenant(connection, tenant)
    limit = found.limits.most_file_bytes
    if limit is not None and found.file_bytes + size_bytes > limit:
        raise PayloadTooLarge(
            f"{tenant} has {found.file_bytes} bytes of files and open uploads of at most {limit}, and this one has "
            f"{size_bytes}: delete files, cancel uploads, or ask the operator for more.",
            param="file_bytes",
        )
    if found.limits.files is not None and found.files >= found.limits.files:
        raise QuotaExceeded(
            f"{tenant} has {found.files} files and open uploads of at most {found.limits.files}: delete a file, cancel "
            "an upload, or ask the operator for more.",
            param="files",
        )


def check_part_quota(connection: Connection, tenant: str) -> None:
    """Room for one more part of an open upload; raises QuotaExceeded. Call it in the transaction."""
    found = _tenant(connection, tenant)
    if found.limits.upload_parts is not None and found.upload_parts >= found.limits.upload_parts:
        raise QuotaExceeded(
            f"{tenant} has {found.upload_parts} parts in open uploads of at most {found.limits.upload_parts}: complete "
            "or cancel an upload, send larger parts, or ask the operator for more.",
            param="upload_parts",
        )


def check_job_quota(connection: Connection, tenant: str) -> None:
    """Room for one more fine-tuning job that has not ended; raises QuotaExceeded. Call it in the transaction."""
    limit = _limits(connection, tenant).jobs
    jobs = schema.jobs.c
    open_jobs = select(func.count()).where(jobs.tenant == tenant, jobs.status.in_(("queued", "running", "paused")))
    count = connection.execute(open_jobs).scalar() or 0
    if limit is not None and count >= limit:
        raise QuotaExceeded(
            f"{tenant} has {count} fine-tuning jobs that have not ended of at most {limit}: cancel one, wait for one, "
            "or ask the operator for more.",
            param="jobs",
        )


def check_job_seconds(connection: Connection, run_seconds: float, tenant: str) -> None:
    """Whether a fine-tuning job may go on that has trained for so long; raises QuotaExceeded."""
    limit = _limits(connection, tenant).job_seconds
    if limit is not None and run_seconds > limit:
        raise QuotaExceeded(
            f"The job has trained for {run_seconds:.0f} seconds of at most {limit}: give fewer rows or epochs, publish "
            "its last checkpoint and go on from that, or ask the operator for more.",
            param="job_seconds",
        )


def check_job_bytes(connection: Connection, tenant: str, *, is_new: bool = True) -> None:
    """Room on the disk for a fine-tuning job, a new one or one that runs; raises PayloadTooLarge."""
    limit = _limits(connection, tenant).job_bytes
    if limit is None:
        return
    jobs = schema.jobs.c
    stored = connection.execute(select(func.sum(jobs.stored_bytes)).where(jobs.tenant == tenant)).scalar() or 0
    if stored > limit or (is_new and stored == limit):
        raise PayloadTooLarge(
            f"Fine-tuning jobs of {tenant} have {stored} bytes on the disk of at most {limit}: delete checkpoints of "
            "jobs that have ended, cancel a paused job, or ask the operator for more.",
            param="job_bytes",
        )


def check_export_quota(connection: Connection, tenant: str, size_bytes: int, now: float) -> None:
    """Room for one more export, with a result of this size beside the others; raises QuotaExceeded. Call it in the
    transaction.
    """
    limits, exports = _limits(connection, tenant), schema.exports.c
    is_open = exports.status.in_(("queued", "running"))
    count = connection.execute(select(func.count()).where(exports.tenant == tenant, is_open)).scalar() or 0
    if limits.exports is not None and count >= limits.exports:
        raise QuotaExceeded(
            f"{tenant} has {count} exports that have not ended of at most {limits.exports}: cancel one, wait for one, "
            "or ask the operator for more.",
            param="exports",
        )
    stored = _export_bytes(connection, tenant, now)
    if limits.export_bytes is not None and size_bytes and stored + size_bytes > limits.export_bytes:
        raise QuotaExceeded(
            f"Exports of {tenant} have {stored} bytes of at most {limits.export_bytes}, and this one would have about "
            f"{size_bytes}: delete results that are no longer needed, or ask the operator for more.",
            param="export_bytes",
        )


def _export_bytes(connection: Connection, tenant: str, now: float) -> int:
    """Bytes of the tenant's results, each once however many orders have it, and of those under way."""
    exports = schema.exports.c
    is_kept = and_(exports.path.is_not(None), or_(exports.expires_at.is_(None), exports.expires_at > now))
    counted = and_(exports.tenant == tenant, or_(exports.status.in_(("queued", "running")), is_kept))
    sizes = select(func.max(exports.size_bytes).label("size")).where(counted).group_by(exports.result).subquery()
    return int(connection.execute(select(func.sum(sizes.c.size))).scalar() or 0)


def running_jobs_limit(connection: Connection, tenant: str) -> int | None:
    """How many fine-tuning jobs of the tenant may run at once; None for any number."""
    return _limits(connection, tenant).running_jobs


def _limits(connection: Connection, tenant: str) -> UseLimits:
    found = connection.execute(select(schema.tenants.c.limits).where(schema.tenants.c.id == tenant)).scalar()
    return UseLimits.read(found)


def _tenant(connection: Connection, tenant: str) -> Tenant:
    row = connection.execute(select(schema.tenants).where(schema.tenants.c.id == tenant)).first()
    if row is None:
        raise NotFound(f"There is no tenant {tenant[:80]!r}; `hotshoe tenants ls` lists them.", param="tenant")
    kept = (schema.versions.c.tenant == tenant, schema.versions.c.status.in_(KEPT))
    versions, stored = _count(connection, schema.versions, *kept)
    names = select(func.count()).select_from(schema.adapters).where(schema.adapters.c.tenant == tenant)
    adapters = connection.execute(names).scalar() or 0
    files, file_bytes = _count(connection, schema.files, schema.files.c.tenant == tenant)
    pending = (schema.uploads.c.tenant == tenant, schema.uploads.c.status == "pending")
    uploads, declared = _count(connection, schema.uploads, *pending)
    parts, _ = _count(connection, schema.upload_parts, schema.upload_parts.c.tenant == tenant)
    return Tenant(
        row.id,
        row.created_at,
        UseLimits.read(row.limits),
        adapters,
        versions,
        stored,
        files=files + uploads,
        file_bytes=file_bytes + declared,
        upload_parts=parts,
        export_bytes=_export_bytes(connection, tenant, time.time()),
    )


def _count(connection: Connection, table: Table, *where: ColumnElement[bool]) -> tuple[int, int]:
    """How many rows there are, and the sum of their bytes."""
    totals = select(func.count(), func.coalesce(func.sum(table.c.size_bytes), 0)).where(*where)
    rows, size_bytes = connection.execute(totals).one()
    return int(rows), int(size_bytes)


def _adapter_id(connection: Connection, tenant: str, name: str) -> int:
    where = (schema.adapters.c.tenant == tenant, schema.adapters.c.name == name)
    found = connection.execute(select(schema.adapters.c.id).where(*where)).scalar()
    if found is None:
        raise ModelNotFound(f"There is no adapter {tenant}/{name}.", param="name")
    return int(found)


def _grants(connection: Connection, adapter_id: int, grantee: str) -> list[Grant]:
    query = _grant_query().where(schema.grants.c.adapter_id == adapter_id, schema.grants.c.grantee == grantee)
    return [Grant(**row._mapping) for row in connection.execute(query)]


def _grant_query() -> Any:
    columns = (schema.grants.c.tenant, schema.adapters.c.name, schema.grants.c.grantee, schema.grants.c.created_at)
    return select(*columns).join_from(
        schema.grants, schema.adapters, schema.grants.c.adapter_id == schema.adapters.c.id
    )
