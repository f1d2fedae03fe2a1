"""Names, versions and aliases as rows. Every change is one transaction that also writes its event.

The state machine of a version: quarantined -> ready | export_only | rejected; ready -> quarantined | retired;
export_only -> retired, or quarantined again once what kept it out no longer does (ProofRows); rejected and retired are
final. Numbers count per adapter from 1 and are never used again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Row, func, insert, select

from adapters import schema
from adapters.base_rows import BaseRows
from adapters.database import FILE, Database
from adapters.death_rows import DeathRows
from adapters.errors import Conflict, NotServable, Problem, StorageDamaged
from adapters.export_rows import ExportRows
from adapters.file_rows import FileRows
from adapters.gate_rows import GateRows
from adapters.job_rows import JobRow, JobRows, note_version
from adapters.journal import Journal, add_event, ensure_tenant
from adapters.keys import KeyRows
from adapters.proof_rows import ProofRows
from adapters.serving import Serving, is_same
from adapters.store import disk_errors
from adapters.tenants import TenantRows, check_quota
from adapters.types import DEFAULT_TENANT, STABLE, AdapterRef, AdapterVersion, Alias, Split, VersionStatus, check_name
from adapters.upgrade import Upgrade
from adapters.usage import UsageRows
from adapters.version_rows import find_version, no_adapter, update_version, version_query, version_row

NEXT = {
    VersionStatus.QUARANTINED: (VersionStatus.READY, VersionStatus.EXPORT_ONLY, VersionStatus.REJECTED),
    VersionStatus.READY: (VersionStatus.QUARANTINED, VersionStatus.RETIRED),
    VersionStatus.EXPORT_ONLY: (VersionStatus.RETIRED,),
    VersionStatus.REJECTED: (),
    VersionStatus.RETIRED: (),
}
WITH_FILES = (VersionStatus.QUARANTINED, VersionStatus.READY, VersionStatus.EXPORT_ONLY)
OPERATOR = "operator"
RESTORING = ".restoring"  # in a folder into which a backup is being restored


@dataclass(frozen=True)
class NewVersion:
    """What is to become a row. A rejected upload has reasons and no digest."""

    name: str
    status: VersionStatus = VersionStatus.QUARANTINED
    tenant: str = DEFAULT_TENANT
    digest: str | None = None
    base_digest: str | None = None
    rank: int | None = None
    size_bytes: int = 0
    parent: str | None = None
    reasons: Sequence[Problem] = ()
    dropped: Sequence[str] = ()
    card: dict[str, Any] | None = None
    number: int | None = None  # the number the uploader expects it to get
    actor: str = OPERATOR
    source: Mapping[str, Any] | None = None  # where the files were pulled from; None for an upload
    serving: Serving = field(default_factory=Serving)
    job: JobRow | None = None  # the fine-tuning job that it comes of, which then names it
    created_at: float = field(default_factory=time.time)


class Registry(
    BaseRows, DeathRows, ExportRows, FileRows, GateRows, JobRows, Journal, KeyRows, ProofRows, TenantRows, UsageRows
):
    """The registry of one state folder. Synchronous and safe to call from many threads and processes."""

    def __init__(self, database: Database, upgrade: Upgrade | None = None) -> None:
        self.database = database
        self.upgrade = upgrade  # what opening it changed, where an older release had written it

    @classmethod
    def open(cls, home: Path) -> Registry:
        """Open `home`/registry.sqlite3, made and migrated as needed; raises StateNewer and then changes nothing."""
        with disk_errors(home):
            home.mkdir(mode=0o700, parents=True, exist_ok=True)
        if (home / RESTORING).exists():
            raise StorageDamaged(f"{home}: a restore into it was cut off. Run the same `hotshoe restore` again.")
        database = Database(home / FILE)
        return cls(database, database.migrate())

    def close(self) -> None:
        self.database.close()

    def add_version(self, new: NewVersion) -> AdapterVersion:
        """Add the next version, or return the one that holds these files for this base, to be served with the same
        defaults and template (`is_new` is False).

        Raises Conflict when `new.number` is another number than the files have or would get, PayloadTooLarge or
        QuotaExceeded when the tenant has no room for it, LeaseLost when its job is another worker's by now.
        """
        check_name(new.name)
        with self.database.writing() as connection:
            adapter_id = _ensure_adapter(connection, new.tenant, new.name, new.created_at)
            same = _same_files(connection, adapter_id, new)
            if same is not None:
                version = to_version(same)
                if new.job is not None:
                    note_version(connection, new.job, version.number)
                _expect_number(new, version.number, "these files, served the same way, are that version already")
                return version
            highest = select(func.max(schema.versions.c.number)).where(schema.versions.c.adapter_id == adapter_id)
            number = (connection.execute(highest).scalar() or 0) + 1
            _expect_number(new, number, "that number is taken or is not the next one")
            if new.status in WITH_FILES:
                check_quota(connection, new.tenant, new.size_bytes)
            if new.job is not None:
                note_version(connection, new.job, number)
            connection.execute(insert(schema.versions).values(_row(new, adapter_id, number)))
            add_event(connection, new.tenant, "version_added", new.actor, new.name, number, detail=_added(new))
            return to_version(version_row(connection, new.tenant, new.name, number), is_new=True)

    def set_status(
        self,
        tenant: str,
        name: str,
        number: int,
        status: VersionStatus,
        *,
        reasons: Sequence[Problem] = (),
        proof: dict[str, Any] | None = None,
        actor: str = OPERATOR,
    ) -> AdapterVersion:
        """Move a version on in its life; the first that becomes ready becomes `stable` in the same transaction."""
        with self.database.writing() as connection:
            row = version_row(connection, tenant, name, number)
            found = VersionStatus(row.status)
            if found is not status:
                _check_step(row, found, status)
            values: dict[str, Any] = {"status": str(status)}
            if reasons:
                values["reasons"] = [problem.as_dict() for problem in reasons]
            if proof is not None:
                values["proof"] = proof
            if status is not VersionStatus.READY:
                values["is_warm"] = False
            update_version(connection, row, values)
            detail = {"from": str(found), "to": str(status), "reasons": values.get("reasons", [])}
            add_event(connection, tenant, "status_changed", actor, row.name, number, detail=detail)
            if status is VersionStatus.READY:
                self._first_ready(connection, row, actor)
            return to_version(version_row(connection, tenant, name, number))

    def get(self, tenant: str, name: str, number: int) -> AdapterVersion:
        """One version; raises ModelNotFound."""
        with self.database.reading() as connection:
            return to_version(version_row(connection, tenant, name, number))

    def resolve(self, ref: AdapterRef) -> AdapterVersion:
        """The version that a model id means now, whatever share a candidate has; raises ModelNotFound."""
        return self.split(ref).version

    def split(self, ref: AdapterRef) -> Split:
        """What a model id means now, with the candidate where there is one that is ready; raises ModelNotFound."""
        with self.database.reading() as connection:
            if ref.number is not None:
                return Split(to_version(version_row(connection, ref.tenant, ref.name, ref.number)))
            alias = self._alias(connection, ref.tenant, ref.name, ref.alias or STABLE)
            own = to_version(version_row(connection, ref.tenant, ref.name, alias.number))
            if alias.candidate is None:
                return Split(own, alias.alias)
            row = find_version(connection, ref.tenant, ref.name, alias.candidate.number)
            candidate = to_version(row) if row and row.status == VersionStatus.READY else None
            return Split(own, alias.alias, candidate, alias.candidate.share)

    def adapters(self, tenant: str) -> list[str]:
        """Names of the tenant's adapters, sorted."""
        names = select(schema.adapters.c.name).where(schema.adapters.c.tenant == tenant)
        with self.database.reading() as connection:
            return list(connection.execute(names.order_by(schema.adapters.c.name_key)).scalars())

    def versions(self, tenant: str, name: str) -> list[AdapterVersion]:
        """All versions of an adapter, oldest first; raises ModelNotFound when there is no such adapter."""
        query = version_query(tenant).where(schema.adapters.c.name == name).order_by(schema.versions.c.number)
        with self.database.reading() as connection:
            found = [to_version(row) for row in connection.execute(query)]
        if not found:
            raise no_adapter(name)
        return found

    def all_versions(self, tenant: str | None = None) -> list[AdapterVersion]:
        """Of one tenant, or of every one, in the order they were made."""
        with self.database.reading() as connection:
            rows = connection.execute(version_query(tenant).order_by(schema.versions.c.id))
            return [to_version(row) for row in rows]

    def quarantined(self) -> list[AdapterVersion]:
        """Versions that wait for their proof, of all tenants, oldest first."""
        query = version_query().where(schema.versions.c.status == VersionStatus.QUARANTINED)
        with self.database.reading() as connection:
            return [to_version(row) for row in connection.execute(query.order_by(schema.versions.c.id))]

    def status_counts(self) -> dict[VersionStatus, int]:
        """How many versions have each status, of all tenants; every status is there."""
        query = select(schema.versions.c.status, func.count()).group_by(schema.versions.c.status)
        with self.database.reading() as connection:
            found = {row[0]: row[1] for row in connection.execute(query)}
        return {status: found.get(str(status), 0) for status in VersionStatus}

    def retire(
        self, tenant: str, name: str, number: int, *, actor: str = OPERATOR, with_aliases: bool = False
    ) -> AdapterVersion:
        """Take a version out of service for good; raises Conflict while an alias points at it or tries it.

        `with_aliases` takes aliases of the adapter's only ready version with it, since there is none to promote first.
        """
        with self.database.writing() as connection:
            row = version_row(connection, tenant, name, number)
            if with_aliases and not _has_other_ready(connection, row):
                self._remove_aliases_of(connection, row, name, actor)
            self._check_unnamed(connection, row.adapter_id, f"{name}@{number}", number)
            found = VersionStatus(row.status)
            if found is not VersionStatus.RETIRED:
                _check_step(row, found, VersionStatus.RETIRED)
                update_version(connection, row, {"status": str(VersionStatus.RETIRED), "is_warm": False})
                add_event(connection, tenant, "retired", actor, name, number)
            return to_version(version_row(connection, tenant, name, number))

    def digests_in_use(self) -> set[str]:
        """Of every version whose files must be there; a blob with another digest may go."""
        with self.database.reading() as connection:
            return digests_in_use(connection)

    def set_warm(self, tenant: str, name: str, number: int, is_warm: bool, *, actor: str = OPERATOR) -> AdapterVersion:
        """Whether the version should come back into the engine after a restart; raises NotServable unless ready."""
        with self.database.writing() as connection:
            row = version_row(connection, tenant, name, number)
            if is_warm and row.status != VersionStatus.READY:
                raise not_servable(to_version(row))
            if row.is_warm != is_warm:
                update_version(connection, row, {"is_warm": is_warm})
                add_event(connection, tenant, "warmed" if is_warm else "cooled", actor, name, number)
            return to_version(version_row(connection, tenant, name, number))

    def warm_set(self) -> list[AdapterVersion]:
        """Ready versions that should be in the engine, of all tenants, oldest first."""
        query = version_query().where(schema.versions.c.is_warm, schema.versions.c.status == VersionStatus.READY)
        with self.database.reading() as connection:
            return [to_version(row) for row in connection.execute(query.order_by(schema.versions.c.id))]

    def engine_id(self, tenant: str, name: str, number: int) -> int:
        """The version's integer id in an engine: one for the row, given at first use and used again after that."""
        with self.database.reading() as connection:
            found = version_row(connection, tenant, name, number).engine_id
        return found or self._new_engine_id(tenant, name, number, only_if_none=True)

    def burn_engine_id(self, tenant: str, name: str, number: int) -> int:
        """A new id for the version; the old one, which a failed load may have left registered, is never used again."""
        return self._new_engine_id(tenant, name, number, only_if_none=False)

    def _new_engine_id(self, tenant: str, name: str, number: int, *, only_if_none: bool) -> int:
        with self.database.writing() as connection:
            row = version_row(connection, tenant, name, number)
            if row.engine_id and only_if_none:
                return int(row.engine_id)
            values = {"tenant": tenant, "adapter_id": row.adapter_id, "number": number}
            inserted = connection.execute(insert(schema.engine_ids).values(values)).inserted_primary_key
            engine_id = int(inserted[0])  # type: ignore[index]
            update_version(connection, row, {"engine_id": engine_id})
            return engine_id

    def _first_ready(self, connection: Connection, row: Row[Any], actor: str) -> None:
        if self._find_alias(connection, row.adapter_id, STABLE) is None:
            self._write_alias(connection, row, STABLE, None, (), actor, "promoted")


def not_servable(version: AdapterVersion) -> NotServable:
    """Why a version cannot answer requests, with its first reason and what to change."""
    reason = version.reasons[0] if version.reasons else {}
    more = f": {reason['path']} {reason['message']}. {reason.get('advice', '')}".rstrip() if reason else ""
    return NotServable(f"{version.ref} is {version.status} and cannot be served{more}", param="model")


def digests_in_use(connection: Connection) -> set[str]:
    query = select(schema.versions.c.digest).where(schema.versions.c.status.in_([str(s) for s in WITH_FILES]))
    return {digest for digest in connection.execute(query).scalars() if digest}


def to_version(row: Row[Any], *, is_new: bool = False) -> AdapterVersion:
    return AdapterVersion(
        tenant=row.tenant,
        name=row.name,
        number=row.number,
        status=VersionStatus(row.status),
        digest=row.digest,
        base_digest=row.base_digest,
        rank=row.rank,
        size_bytes=row.size_bytes,
        parent=row.parent,
        created_at=row.created_at,
        reasons=tuple(row.reasons),
        dropped=tuple(row.dropped),
        card=row.card,
        proof=row.proof,
        is_warm=row.is_warm,
        is_new=is_new,
        serving=dict((row.serving or {}).get("defaults") or {}),
        chat_template=(row.serving or {}).get("chat_template"),
        engine_deaths=row.engine_deaths,
    )


def _row(new: NewVersion, adapter_id: int, number: int) -> dict[str, Any]:
    return {
        "tenant": new.tenant,
        "adapter_id": adapter_id,
        "number": number,
        "status": str(new.status),
        "digest": new.digest,
        "base_digest": new.base_digest,
        "rank": new.rank,
        "size_bytes": new.size_bytes,
        "parent": new.parent[:255] if new.parent else None,
        "created_at": new.created_at,
        "reasons": [problem.as_dict() for problem in new.reasons],
        "dropped": list(new.dropped),
        "card": new.card,
        "proof": None,
        "is_warm": False,
        "serving": new.serving.as_row(),
    }


def _added(new: NewVersion) -> dict[str, Any]:
    detail = {"status": str(new.status), "digest": new.digest, "reasons": [problem.code for problem in new.reasons]}
    return detail if new.source is None else {**detail, "source": dict(new.source)}


def _ensure_adapter(connection: Connection, tenant: str, name: str, now: float) -> int:
    ensure_tenant(connection, tenant, now)
    query = select(schema.adapters.c.id, schema.adapters.c.name).where(
        schema.adapters.c.tenant == tenant, schema.adapters.c.name_key == name.lower()
    )
    row = connection.execute(query).first()
    if row is None:
        values = {"tenant": tenant, "name": name, "name_key": name.lower(), "created_at": now}
        return int(connection.execute(insert(schema.adapters).values(values)).inserted_primary_key[0])  # type: ignore[index]
    if row.name != name:
        raise Conflict(f"The name {name!r} differs only in case from {row.name!r}, which is taken.", param="name")
    return int(row.id)


def _same_files(connection: Connection, adapter_id: int, new: NewVersion) -> Row[Any] | None:
    if new.digest is None:
        return None
    query = version_query(new.tenant).where(
        schema.versions.c.adapter_id == adapter_id,
        schema.versions.c.digest == new.digest,
        schema.versions.c.base_digest == new.base_digest,
        schema.versions.c.status.in_([str(status) for status in WITH_FILES]),
    )
    wanted = new.serving.as_row()
    rows = connection.execute(query.order_by(schema.versions.c.number))
    return next((row for row in rows if is_same(row.serving, wanted)), None)


def _expect_number(new: NewVersion, number: int, why: str) -> None:
    if new.number is not None and new.number != number:
        raise Conflict(f"{new.name}@{new.number} was asked for, {number} is it: {why}.", param="version")


def _has_other_ready(connection: Connection, row: Row[Any]) -> bool:
    """Another version of the adapter can answer."""
    versions = schema.versions.c
    others = (versions.adapter_id == row.adapter_id, versions.id != row.id, versions.status == VersionStatus.READY)
    return connection.execute(select(versions.id).where(*others).limit(1)).first() is not None


def _check_step(row: Row[Any], found: VersionStatus, status: VersionStatus) -> None:
    if status not in NEXT[found]:
        allowed = ", ".join(NEXT[found]) or "nothing: it is final"
        raise Conflict(
            f"{row.name}@{row.number} is {found}; it cannot become {status} (possible: {allowed}).", param="version"
        )


__all__ = ["Alias", "NewVersion", "Registry", "not_servable"]
