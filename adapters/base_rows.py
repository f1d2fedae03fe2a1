"""The bases that a state was served with, as rows: what a version of another base was made for, and what runs now."""

from __future__ import annotations

import time
from dataclasses import dataclass

from sqlalchemy import insert, select, update

from adapters import schema
from adapters.database import Database


@dataclass(frozen=True, slots=True)
class ServedBase:
    """A base as the state was last served with it. The engine's part is None where it never answered."""

    digest: str
    name: str
    max_rank: int
    is_served: bool = True  # at the last start
    dtype: str | None = None
    engine_version: str | None = None


class BaseRows:
    """The part of the registry that knows bases by name."""

    database: Database

    def note_base(self, base: ServedBase) -> None:
        """From now on this is the base that the state is served with."""
        values = {
            "name": base.name[:255],
            "is_served": True,
            "max_rank": base.max_rank,
            "dtype": base.dtype,
            "engine_version": base.engine_version,
            "served_at": time.time(),
        }
        bases = schema.bases
        with self.database.writing() as connection:
            connection.execute(update(bases).values(is_served=False))
            if connection.execute(update(bases).where(bases.c.digest == base.digest).values(values)).rowcount == 0:
                connection.execute(insert(bases).values(digest=base.digest, **values))

    def bases(self) -> dict[str, ServedBase]:
        """Every base that the state was served with, by its digest."""
        names = ("digest", "name", "max_rank", "is_served", "dtype", "engine_version")
        with self.database.reading() as connection:
            rows = connection.execute(select(*(schema.bases.c[name] for name in names)))
            return {row.digest: ServedBase(**row._mapping) for row in rows}

    def served_base(self) -> ServedBase | None:
        """The base of the last start; None for a state that was never served, or not since bases are noted."""
        return next((base for base in self.bases().values() if base.is_served), None)
