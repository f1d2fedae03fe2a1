"""Exports as rows: what was asked, how far it is, where it lies, what it found.

    queued ──claim──► running ──► succeeded | failed
      ▲  ▲              │ └─────► cancelled   (also of a queued one)
      │  └───requeue────┘
      └── an order

Orders of one tenant with the same `result` are one piece of work: a claim takes all of them, what is told of the work
is told of all that run, and an order that comes while it runs, or while its result is kept, joins them.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from sqlalchemy import ColumnElement, Connection, and_, delete, func, insert, or_, select, update

from adapters import schema
from adapters.database import Database
from adapters.errors import Conflict, NotFound
from adapters.file_rows import SERVER, new_id
from adapters.journal import add_event, ensure_tenant
from adapters.paging import FIRST_PAGE, Page, beyond
from adapters.tenants import check_export_quota
from adapters.turn_rows import Queue, begin_turn, last_turns
from adapters.turns import Turn, choose

MOST_LOSSES = 5  # of the server while it runs; then it is most likely the export that ends servers
NOTED = ("progress", "stage", "bytes_done", "bytes_total")
SHARED = (*NOTED, "attempts", "deaths", "losses", "started_at")  # of an order that joins work under way
OF_A_RESULT = (*NOTED, "path", "report", "size_bytes", "attempts")  # of one whose result is there already


class ExportStatus(StrEnum):
    """Where an export stands."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        return self in (ExportStatus.SUCCEEDED, ExportStatus.FAILED, ExportStatus.CANCELLED)


OPEN = (ExportStatus.QUEUED, ExportStatus.RUNNING)


@dataclass(frozen=True, slots=True)
class NewExport:
    """An order. `result` names what comes of it: the same for orders that give the same bytes."""

    tenant: str
    ref: str  # NAME@N
    result: str
    actor: str
    format: str = "hf"
    options: Mapping[str, Any] = field(default_factory=dict)
    size_bytes: int = 0  # as it is estimated
    keep_seconds: float | None = None  # for the result; None: until it is deleted
    keep_rows: int | None = None  # of the tenant's exports that have ended; None: all


@dataclass(frozen=True, slots=True)
class ExportRow:
    """One export of one version. `path` is there for as long as its result is."""

    id: str
    tenant: str
    ref: str  # NAME@N
    format: str
    options: Mapping[str, Any] = field(default_factory=dict)
    status: ExportStatus = ExportStatus.QUEUED
    progress: float = 0.0  # 0 to 1
    path: str | None = None
    report: Mapping[str, Any] | None = None
    error: Mapping[str, Any] | None = None
    created_at: float = 0.0
    finished_at: float | None = None
    result: str = ""
    stage: str | None = None
    bytes_done: int = 0
    bytes_total: int = 0
    size_bytes: int = 0
    attempts: int = 0
    deaths: int = 0  # of its process, without a word
    losses: int = 0  # of its server
    started_at: float | None = None
    expires_at: float | None = None

    def has_result(self, now: float) -> bool:
        """Its files are there and their time is not over."""
        return self.path is not None and (self.expires_at is None or now < self.expires_at)


@dataclass(frozen=True, slots=True)
class ExportEnd:
    """How a piece of work ended: `path`, `report` and `size_bytes` where it succeeded, `error` where it failed."""

    status: ExportStatus
    path: str | None = None
    report: Mapping[str, Any] | None = None
    error: Mapping[str, Any] | None = None
    size_bytes: int | None = None
    keep_seconds: float | None = None
    keep_rows: int | None = None  # of the tenant's exports that have ended; None: all


@dataclass(frozen=True, slots=True)
class StoredExports:
    """Of all tenants: orders that wait, orders that run, and the bytes of the results that are kept."""

    queued: int
    running: int
    result_bytes: int


class ExportRows:
    """The part of the registry that keeps exports."""

    database: Database

    def add_export(self, new: NewExport) -> ExportRow:
        """An order with a new id: queued, or where the same work runs or is done already, as far as that is.

        The tenant's oldest that have ended go where there are more than `keep_rows`. Raises QuotaExceeded where it may
        have no more exports, or no more bytes of them.
        """
        now = time.time()
        with self.database.writing() as connection:
            ensure_tenant(connection, new.tenant, now)
            twin = _twin(connection, new)
            if twin is None or not twin.status.is_final:
                size_bytes = new.size_bytes if twin is None else 0
                check_export_quota(connection, new.tenant, size_bytes, now)
            row = ExportRow(
                id=new_id("export-"),
                tenant=new.tenant,
                ref=new.ref,
                format=new.format,
                options=dict(new.options),
                created_at=now,
                result=new.result,
                size_bytes=new.size_bytes,
            )
            values = {**asdict(row), **_like(twin, now, new.keep_seconds)}
            connection.execute(insert(schema.exports).values(values))
            detail = {"export": row.id, "ref": new.ref}
            add_event(connection, new.tenant, "export_added", new.actor, new.ref.partition("@")[0], detail=detail)
            _forget_oldest(connection, new.tenant, new.keep_rows)
            return _export(connection, new.tenant, row.id)

    def get_export(self, tenant: str, export_id: str) -> ExportRow:
        """One export; raises NotFound."""
        with self.database.reading() as connection:
            return _export(connection, tenant, export_id)

    def exports(self, tenant: str, page: Page = FIRST_PAGE, adapters: Collection[str] | None = None) -> list[ExportRow]:
        """The tenant's exports, newest first; those of these adapters. Raises InvalidRequest for `after`."""
        exports = schema.exports.c
        where: list[ColumnElement[bool]] = [exports.tenant == tenant]
        if adapters is not None:
            where.append(func.substr(exports.ref, 1, func.instr(exports.ref, "@") - 1).in_(sorted(adapters)))
        with self.database.reading() as connection:
            if page.after is not None:
                where.append(beyond(connection, schema.exports, exports.tenant == tenant, page.after))
            query = select(schema.exports).where(*where).order_by(exports.created_at.desc(), exports.id.desc())
            return [_to_export(row._mapping) for row in connection.execute(query.limit(page.limit))]

    def kept_export(self, tenant: str, result: str) -> ExportRow | None:
        """An order that has this result, whose time is not over; None where there is none."""
        with self.database.reading() as connection:
            exports = schema.exports.c
            return next(
                iter(_exports(connection, exports.tenant == tenant, exports.result == result, _is_kept())), None
            )

    # What a user does.

    def cancel_export(self, tenant: str, export_id: str) -> ExportRow:
        """End an order that is queued or running; one that ended already stays as it is. Others of its work go on."""
        with self.database.writing() as connection:
            row = _export(connection, tenant, export_id)
            if not row.status.is_final:
                values = {"status": ExportStatus.CANCELLED, "finished_at": time.time()}
                connection.execute(update(schema.exports).where(schema.exports.c.id == export_id).values(values))
            return _export(connection, tenant, export_id)

    def delete_export(self, tenant: str, export_id: str, *, actor: str) -> ExportRow:
        """Forget an order that has ended, whose result may then go; raises NotFound, or Conflict for an open one."""
        with self.database.writing() as connection:
            row = _export(connection, tenant, export_id)
            if not row.status.is_final:
                raise Conflict(f"{export_id} is {row.status}: cancel it first.", param="id")
            connection.execute(delete(schema.exports).where(schema.exports.c.id == export_id))
            detail = {"export": export_id, "ref": row.ref}
            add_event(connection, tenant, "export_deleted", actor, row.ref.partition("@")[0], detail=detail)
        return row

    # What the worker does.

    def claim_export(self) -> ExportRow | None:
        """The order whose turn it is (`adapters/turns.py`), running, with all of its work; None where nothing waits."""
        exports = schema.exports.c
        with self.database.writing() as connection:
            waiting = _exports(connection, exports.status == ExportStatus.QUEUED)
            begun = last_turns(connection, Queue.EXPORTS, {row.tenant for row in waiting})
            chosen = choose(waiting, {tenant: Turn(last_begun=at) for tenant, at in begun.items()})
            if chosen is None:
                return None
            now = time.time()
            where = (*_work(chosen), exports.status == ExportStatus.QUEUED)
            values = {"status": ExportStatus.RUNNING, "attempts": exports.attempts + 1, "started_at": now}
            connection.execute(update(schema.exports).where(*where).values(values))
            begin_turn(connection, Queue.EXPORTS, chosen.tenant, now)
            return _export(connection, chosen.tenant, chosen.id)

    def has_queued_export(self) -> bool:
        """Something waits."""
        query = select(schema.exports.c.id).where(schema.exports.c.status == ExportStatus.QUEUED)
        with self.database.reading() as connection:
            return connection.execute(query.limit(1)).first() is not None

    def note_export(self, row: ExportRow, **found: Any) -> None:
        """Write down how far the work is: any of `progress`, `stage`, `bytes_done`, `bytes_total`."""
        if unknown := set(found) - set(NOTED):
            raise TypeError(f"an export has no such fields to note: {sorted(unknown)}")
        with self.database.writing() as connection:
            _change(connection, row, found)

    def is_wanted(self, row: ExportRow) -> bool:
        """Some order still waits for this work."""
        query = select(schema.exports.c.id).where(*_work(row), schema.exports.c.status == ExportStatus.RUNNING)
        with self.database.reading() as connection:
            return connection.execute(query.limit(1)).first() is not None

    def end_export(self, row: ExportRow, end: ExportEnd) -> int:
        """The work is over, for all orders that run; how many these were, 0 where all of them were cancelled."""
        now = time.time()
        values: dict[str, Any] = {"status": end.status, "finished_at": now, "report": end.report, "error": end.error}
        if end.status is ExportStatus.SUCCEEDED:
            values |= {"path": end.path, "progress": 1.0, "size_bytes": end.size_bytes or 0}
            values |= {"expires_at": _end_of(now, end.keep_seconds), "bytes_done": schema.exports.c.bytes_total}
        with self.database.writing() as connection:
            ended = _change(connection, row, values)
            _forget_oldest(connection, row.tenant, end.keep_rows)
            return ended

    def requeue_export(self, row: ExportRow, *, has_died: bool = False) -> None:
        """Back into the queue: the server stops, or the process died and is tried again."""
        exports = schema.exports.c
        with self.database.writing() as connection:
            _change(connection, row, {"status": ExportStatus.QUEUED, "deaths": exports.deaths + has_died})

    def free_exports(self) -> None:
        """What ran when the last server ended waits again; what it ended with too often has failed."""
        running = schema.exports.c.status == ExportStatus.RUNNING
        with self.database.writing() as connection:
            for row in _exports(connection, running):
                values: dict[str, Any] = {"status": ExportStatus.QUEUED, "losses": row.losses + 1}
                if row.losses + 1 >= MOST_LOSSES:
                    values |= {"status": ExportStatus.FAILED, "finished_at": time.time(), "error": _lost()}
                connection.execute(update(schema.exports).where(schema.exports.c.id == row.id).values(values))

    # What becomes of results.

    def expire_exports(self, now: float) -> int:
        """Results whose time is over are there no more; how many orders had them."""
        exports = schema.exports.c
        where = (exports.path.is_not(None), exports.expires_at <= now)
        with self.database.reading() as connection:
            if connection.execute(select(exports.id).where(*where).limit(1)).first() is None:
                return 0
        with self.database.writing() as connection:
            return connection.execute(update(schema.exports).where(*where).values(path=None)).rowcount

    def forget_results(self, results: Collection[str]) -> None:
        """The files of these results are gone or damaged: no order has them any more."""
        where = (schema.exports.c.result.in_(sorted(results)), schema.exports.c.path.is_not(None))
        with self.database.writing() as connection:
            connection.execute(update(schema.exports).where(*where).values(path=None))

    def results(self) -> tuple[frozenset[str], frozenset[str]]:
        """Names of results that orders wait for, and of those that are kept."""
        with self.database.reading() as connection:
            rows = _exports(connection, or_(_is_open(), schema.exports.c.path.is_not(None)))
        waited = frozenset(row.result for row in rows if not row.status.is_final)
        return waited, frozenset(row.result for row in rows if row.path is not None)

    def stored_exports(self) -> StoredExports:
        """What waits, runs and is kept now."""
        exports = schema.exports.c
        kept = select(func.max(exports.size_bytes).label("size")).where(exports.path.is_not(None))
        sizes = kept.group_by(exports.tenant, exports.result).subquery()
        with self.database.reading() as connection:
            counts = {
                status: connection.execute(select(func.count()).where(exports.status == status)).scalar() or 0
                for status in OPEN
            }
            stored = connection.execute(select(func.sum(sizes.c.size))).scalar() or 0
        return StoredExports(counts[ExportStatus.QUEUED], counts[ExportStatus.RUNNING], int(stored))


def no_export(export_id: str) -> NotFound:
    return NotFound(f"There is no export {export_id[:80]!r}.", param="id")


def _twin(connection: Connection, new: NewExport) -> ExportRow | None:
    """An order of the same work that waits, runs, or has its result; the one that is furthest."""
    exports = schema.exports.c
    found = _exports(
        connection, exports.tenant == new.tenant, exports.result == new.result, or_(_is_open(), _is_kept())
    )
    order = (ExportStatus.QUEUED, ExportStatus.RUNNING, ExportStatus.SUCCEEDED)
    return max(found, key=lambda row: order.index(row.status), default=None)


def _like(twin: ExportRow | None, now: float, keep_seconds: float | None) -> dict[str, Any]:
    """What an order has of one that came before it."""
    if twin is None:
        return {}
    if not twin.status.is_final:
        return {"status": twin.status, **{name: getattr(twin, name) for name in SHARED}}
    ended = {"status": twin.status, "finished_at": now, "expires_at": _end_of(now, keep_seconds)}
    return {**ended, **{name: getattr(twin, name) for name in OF_A_RESULT}}


def _end_of(now: float, keep_seconds: float | None) -> float | None:
    return None if keep_seconds is None else now + keep_seconds


def _is_open() -> ColumnElement[bool]:
    return schema.exports.c.status.in_(OPEN)


def _is_kept() -> ColumnElement[bool]:
    exports = schema.exports.c
    return and_(exports.path.is_not(None), or_(exports.expires_at.is_(None), exports.expires_at > time.time()))


def _work(row: ExportRow) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    """All orders of the same work."""
    return schema.exports.c.tenant == row.tenant, schema.exports.c.result == row.result


def _change(connection: Connection, row: ExportRow, values: Mapping[str, Any]) -> int:
    """Change all orders of the work that run; how many."""
    where = (*_work(row), schema.exports.c.status == ExportStatus.RUNNING)
    return connection.execute(update(schema.exports).where(*where).values(dict(values))).rowcount


def _forget_oldest(connection: Connection, tenant: str, keep_rows: int | None) -> None:
    """Forget the tenant's oldest exports that have ended, beyond so many; results that only they have may then go."""
    if keep_rows is None:
        return
    exports = schema.exports.c
    has_ended = and_(exports.tenant == tenant, exports.status.not_in(OPEN))
    newest_first = (
        select(exports.id, exports.ref).where(has_ended).order_by(exports.created_at.desc(), exports.id.desc())
    )
    for export_id, ref in connection.execute(newest_first.limit(-1).offset(keep_rows)).all():
        connection.execute(delete(schema.exports).where(exports.id == export_id))
        detail = {"export": export_id, "ref": ref, "keep_rows": keep_rows}
        add_event(connection, tenant, "export_deleted", SERVER, ref.partition("@")[0], detail=detail)


def _lost() -> dict[str, Any]:
    message = (
        f"The server ended {MOST_LOSSES} times while this export ran, most likely because memory ran out: order it "
        "without parity, or have the operator look into the server's log."
    )
    return {"code": "worker_lost", "message": message, "param": None}


def _exports(connection: Connection, *where: ColumnElement[bool]) -> list[ExportRow]:
    order = (schema.exports.c.created_at, schema.exports.c.id)
    rows = connection.execute(select(schema.exports).where(*where).order_by(*order))
    return [_to_export(row._mapping) for row in rows]


def _export(connection: Connection, tenant: str, export_id: str) -> ExportRow:
    query = select(schema.exports).where(schema.exports.c.tenant == tenant, schema.exports.c.id == export_id)
    row = connection.execute(query).first()
    if row is None:
        raise no_export(export_id)
    return _to_export(row._mapping)


def _to_export(row: Mapping[Any, Any]) -> ExportRow:
    return ExportRow(**{**row, "status": ExportStatus(row["status"]), "result": row["result"] or row["id"]})
