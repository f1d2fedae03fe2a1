"""What was used, summed by tenant, day (UTC) and model."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from sqlalchemy import insert, select, update

from adapters import schema
from adapters.database import Database
from adapters.journal import ensure_tenant


@dataclass(frozen=True, slots=True)
class UsageRow:
    """Sums for one tenant, day and model.

    `requests`, `prompt_tokens` and `completion_tokens` are of completed requests and add up to their `usage` objects.
    A request that ended early is in `partial_requests`, with the tokens that were delivered of it.
    """

    tenant: str
    day: str  # YYYY-MM-DD
    model: str  # NAME@N, OWNER/NAME@N for a shared one, or the base's id
    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    partial_requests: int = 0
    partial_completion_tokens: int = 0

    def plus(self, other: UsageRow) -> UsageRow:
        """The sums of both, which must be of the same tenant, day and model."""
        sums = {name: getattr(self, name) + getattr(other, name) for name in COUNTS}
        return replace(self, **sums)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


COUNTS = ("requests", "prompt_tokens", "completion_tokens", "partial_requests", "partial_completion_tokens")


class UsageRows:
    """The part of the registry that sums usage."""

    database: Database

    def add_usage(self, rows: Iterable[UsageRow]) -> None:
        """Add to the sums, all in one transaction."""
        table = schema.usage_days
        with self.database.writing() as connection:
            for row in rows:
                where = (table.c.tenant == row.tenant, table.c.day == row.day, table.c.model == row.model)
                changes = {name: table.c[name] + getattr(row, name) for name in COUNTS}
                if not connection.execute(update(table).where(*where).values(changes)).rowcount:
                    ensure_tenant(connection, row.tenant, time.time())
                    connection.execute(insert(table).values(row.as_dict()))

    def usage(
        self, tenant: str | None = None, *, start: str | None = None, end: str | None = None, model: str | None = None
    ) -> list[UsageRow]:
        """Sums of days from `start` to `end`, both included, by tenant, day and model."""
        table = schema.usage_days
        query = select(table).order_by(table.c.tenant, table.c.day, table.c.model)
        if tenant is not None:
            query = query.where(table.c.tenant == tenant)
        if start is not None:
            query = query.where(table.c.day >= start)
        if end is not None:
            query = query.where(table.c.day <= end)
        if model is not None:
            query = query.where(table.c.model == model)
        with self.database.reading() as connection:
            return [UsageRow(**row._mapping) for row in connection.execute(query)]
