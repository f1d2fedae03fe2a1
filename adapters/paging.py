"""Pages of lists: what comes behind a row that a client has seen, by the time that rows were made."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import ColumnElement, Connection, Table, and_, or_, select

from adapters.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Page:
    """Which part of a list is asked for: what comes behind `after`, at most `limit`."""

    after: str | None = None
    limit: int = 20


FIRST_PAGE = Page()


def beyond(
    connection: Connection, table: Table, listed: ColumnElement[bool], after: str, *, is_ascending: bool = False
) -> ColumnElement[bool]:
    """Rows behind `after` by `created_at` and `id`; raises InvalidRequest where it is none of those listed."""
    rows = table.c
    seen = connection.execute(select(rows.created_at, rows.id).where(listed, rows.id == after)).first()
    if seen is None:
        raise unknown_after(after)
    if is_ascending:
        return or_(rows.created_at > seen[0], and_(rows.created_at == seen[0], rows.id > seen[1]))
    return or_(rows.created_at < seen[0], and_(rows.created_at == seen[0], rows.id < seen[1]))


def unknown_after(after: str) -> InvalidRequest:
    return InvalidRequest(f"after is {after[:80]!r}, which is nothing of this list.", param="after")
