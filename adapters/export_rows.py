"""Exports as rows: what was asked, how far it is, where it lies, what it found."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from sqlalchemy import insert, select, update

from adapters import schema
from adapters.database import Database
from adapters.errors import NotFound
from adapters.journal import add_event, ensure_tenant


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


@dataclass(frozen=True, slots=True)
class ExportRow:
    """One export of one version."""

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


class ExportRows:
    """The part of the registry that keeps exports."""

    database: Database

    def add_export(
        self, tenant: str, ref: str, *, format: str = "hf", options: Mapping[str, Any] | None = None, actor: str
    ) -> ExportRow:
        """A queued export with a new id."""
        now = time.time()
        row = ExportRow(f"export-{uuid.uuid4().hex[:24]}", tenant, ref, format, dict(options or {}), created_at=now)
        names = ("id", "tenant", "ref", "format", "options", "status", "progress", "created_at")
        with self.database.writing() as connection:
            ensure_tenant(connection, tenant, now)
            connection.execute(insert(schema.exports).values({name: getattr(row, name) for name in names}))
            name = ref.partition("@")[0]
            add_event(connection, tenant, "export_added", actor, name, detail={"export": row.id, "ref": ref})
        return row

    def get_export(self, tenant: str, export_id: str) -> ExportRow:
        """One export; raises NotFound."""
        query = select(schema.exports).where(schema.exports.c.tenant == tenant, schema.exports.c.id == export_id)
        with self.database.reading() as connection:
            row = connection.execute(query).first()
        if row is None:
            raise no_export(export_id)
        return _to_export(row._mapping)

    def exports(self, tenant: str | None = None, *, status: ExportStatus | None = None) -> list[ExportRow]:
        """Exports, oldest first; of one tenant or status when named."""
        query = select(schema.exports)
        if tenant is not None:
            query = query.where(schema.exports.c.tenant == tenant)
        if status is not None:
            query = query.where(schema.exports.c.status == status)
        with self.database.reading() as connection:
            return [_to_export(row._mapping) for row in connection.execute(query.order_by(schema.exports.c.created_at))]

    def update_export(self, tenant: str, export_id: str, **changes: Any) -> ExportRow:
        """Change status, progress, path, report or error; a final status sets the time and is not left again."""
        unknown = set(changes) - {"status", "progress", "path", "report", "error"}
        if unknown:
            raise TypeError(f"an export has no such fields to change: {sorted(unknown)}")
        with self.database.writing() as connection:
            query = select(schema.exports).where(schema.exports.c.tenant == tenant, schema.exports.c.id == export_id)
            row = connection.execute(query).first()
            if row is None:
                raise no_export(export_id)
            if not ExportStatus(row.status).is_final:
                if "status" in changes and ExportStatus(changes["status"]).is_final:
                    changes["finished_at"] = time.time()
                connection.execute(update(schema.exports).where(schema.exports.c.id == export_id).values(changes))
        return self.get_export(tenant, export_id)


def no_export(export_id: str) -> NotFound:
    return NotFound(f"There is no export {export_id[:80]!r}.", param="id")


def _to_export(row: Mapping[Any, Any]) -> ExportRow:
    return ExportRow(**{**row, "status": ExportStatus(row["status"])})
