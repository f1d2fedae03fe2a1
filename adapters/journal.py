"""Events, written with the change they tell of, and the answers kept for idempotency keys."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, delete, insert, or_, select

from adapters import schema
from adapters.database import Database
from adapters.errors import IdempotencyReused

KEEP_KEYS_SECONDS = 24 * 3600.0


@dataclass(frozen=True, slots=True)
class Origin:
    """Who sent the request in hand, and from which address."""

    actor: str
    client: str


_ORIGIN: ContextVar[Origin | None] = ContextVar("origin of the request in hand", default=None)


@contextmanager
def coming_from(origin: Origin | None) -> Iterator[None]:
    """Changes that the origin's actor makes in the block, and in threads that it waits for, say the address."""
    token = _ORIGIN.set(origin)
    try:
        yield
    finally:
        _ORIGIN.reset(token)


@dataclass(frozen=True, slots=True)
class Event:
    """One change: what, of which adapter, by whom, when (seconds since the epoch)."""

    id: int
    tenant: str
    at: float
    kind: str
    name: str | None
    number: int | None
    alias: str | None
    actor: str
    detail: Mapping[str, Any]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Journal:
    """The part of the registry that remembers what happened."""

    database: Database

    def events(
        self, tenant: str, name: str | None = None, *, before: int | None = None, limit: int = 100
    ) -> list[Event]:
        """The tenant's newest events, newest first; with an id below `before` and of one adapter when given."""
        query = select(schema.events).where(schema.events.c.tenant == tenant)
        if before is not None:
            query = query.where(schema.events.c.id < before)
        if name is not None:
            query = query.where(schema.events.c.name == name)
        with self.database.reading() as connection:
            rows = connection.execute(query.order_by(schema.events.c.id.desc()).limit(limit))
            return [Event(**row._mapping) for row in rows]

    def recall(self, tenant: str, key: str, request_hash: str) -> dict[str, Any] | None:
        """The answer kept for this key, or None; raises IdempotencyReused when it was another request's."""
        keys = schema.idempotency_keys
        query = select(keys).where(keys.c.tenant == tenant, keys.c.key == key, ~_is_over(time.time()))
        with self.database.reading() as connection:
            row = connection.execute(query).first()
        if row is None:
            return None
        if row.request_hash != request_hash:
            raise IdempotencyReused(
                f"Idempotency key {key[:80]!r} was used for another request; use a new one.", param="Idempotency-Key"
            )
        return dict(row.response)

    def remember(self, tenant: str, key: str, request_hash: str, response: Mapping[str, Any]) -> None:
        """Keep the answer of a request that was carried out, for a day; the first one kept stays."""
        now = time.time()
        keys = schema.idempotency_keys
        with self.database.writing() as connection:
            ensure_tenant(connection, tenant, now)
            connection.execute(delete(keys).where(_is_over(now)))
            kept = connection.execute(select(keys.c.key).where(keys.c.tenant == tenant, keys.c.key == key)).first()
            if kept is None:
                values = {"tenant": tenant, "key": key, "request_hash": request_hash, "created_at": now}
                connection.execute(insert(keys).values({**values, "response": dict(response)}))


def _is_over(now: float) -> ColumnElement[bool]:
    """Of more than a day ago; or of more than a day ahead, made by a clock that was wrong and has been set since."""
    at = schema.idempotency_keys.c.created_at
    return or_(at <= now - KEEP_KEYS_SECONDS, at > now + KEEP_KEYS_SECONDS)


def add_event(
    connection: Connection,
    tenant: str,
    kind: str,
    actor: str,
    name: str | None = None,
    number: int | None = None,
    *,
    alias: str | None = None,
    detail: Mapping[str, Any] | None = None,
) -> None:
    """Write an event in the transaction of the change; what a request's own actor did says from where."""
    origin = _ORIGIN.get()
    came = {"client": origin.client} if origin is not None and origin.actor == actor else {}
    values = {"tenant": tenant, "at": time.time(), "kind": kind, "actor": actor[:120]}
    about = {"name": name, "number": number, "alias": alias, "detail": {**(detail or {}), **came}}
    connection.execute(insert(schema.events).values({**values, **about}))


def ensure_tenant(connection: Connection, tenant: str, now: float) -> None:
    """Tenants exist from their first row on."""
    if connection.execute(select(schema.tenants.c.id).where(schema.tenants.c.id == tenant)).first() is None:
        connection.execute(insert(schema.tenants).values(id=tenant, created_at=now))
