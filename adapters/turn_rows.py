"""When a tenant's last piece of work was begun, by queue: kept apart from the work, which a tenant may delete."""

from __future__ import annotations

from collections.abc import Collection
from enum import StrEnum

from sqlalchemy import Connection, insert, select, update

from adapters import schema


class Queue(StrEnum):
    """A queue that tenants share."""

    EXPORTS = "exports"
    JOBS = "jobs"


def begin_turn(connection: Connection, queue: Queue, tenant: str, now: float) -> None:
    """Write down that something of the tenant was begun now. Call it in the transaction that begins it."""
    turns = schema.turns
    mine = (turns.c.queue == queue, turns.c.tenant == tenant)
    if not connection.execute(update(turns).where(*mine).values(begun_at=now)).rowcount:
        connection.execute(insert(turns).values(queue=queue, tenant=tenant, begun_at=now))


def last_turns(connection: Connection, queue: Queue, tenants: Collection[str]) -> dict[str, float]:
    """When each of these tenants' last one was begun; 0 of one that has had no turn."""
    turns = schema.turns.c
    query = select(turns.tenant, turns.begun_at).where(turns.queue == queue, turns.tenant.in_(sorted(tenants)))
    return {**dict.fromkeys(tenants, 0.0), **{row.tenant: row.begun_at for row in connection.execute(query)}}
