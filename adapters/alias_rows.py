"""Aliases: movable names for versions. Each move is a compare-and-swap on the alias's generation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Row, Select, delete, insert, select, update

from adapters import schema
from adapters.database import Database
from adapters.errors import Conflict, GenerationMismatch, ModelNotFound, NotServable
from adapters.journal import add_event
from adapters.types import STABLE, Alias, VersionStatus, check_name

MAX_PREVIOUS = 50


class AliasRows:
    """The part of the registry that moves aliases."""

    database: Database

    def aliases(self, tenant: str, name: str | None = None) -> list[Alias]:
        """All aliases of an adapter, or of all the tenant's when none is named, sorted; empty where there are none."""
        query = _query().where(schema.aliases.c.tenant == tenant)
        if name is not None:
            query = query.where(schema.adapters.c.name == name)
        with self.database.reading() as connection:
            return [_to_alias(row) for row in connection.execute(query.order_by(schema.aliases.c.alias_key))]

    def move_alias(
        self, tenant: str, name: str, alias: str, number: int, *, expected_generation: int | None, actor: str
    ) -> Alias:
        """Point `alias` at a ready version, making it when it is new (generation 1).

        Raises GenerationMismatch unless the alias has the expected generation (0: it must not exist yet; None: any),
        NotServable when the version is not ready.
        """
        check_name(alias, "alias")
        if alias.isdigit():
            raise Conflict(f"Alias {alias!r} would read as a version number; choose a word.", param="alias")
        with self.database.writing() as connection:
            row = self._servable(connection, tenant, name, number)
            found = self._find_alias(connection, row.adapter_id, alias)
            generation = found.generation if found else 0
            if expected_generation is not None and expected_generation != generation:
                raise GenerationMismatch(
                    f"{name}@{alias} is at generation {generation}, not {expected_generation}: somebody moved it.",
                    param="If-Match",
                )
            if found and found.number == number and expected_generation is None:
                return found
            return self._write_alias(connection, row, alias, found, _history(found, number), actor, "promoted")

    def rollback(self, tenant: str, name: str, alias: str = STABLE, *, actor: str) -> Alias:
        """Point the alias at the newest of its earlier versions that is still ready; raises Conflict without one."""
        with self.database.writing() as connection:
            found = self._alias(connection, tenant, name, alias)
            for i, number in enumerate(found.previous):
                row = _version(connection, tenant, name, number)
                if row is not None and row.status == VersionStatus.READY:
                    rest = found.previous[i + 1 :]
                    return self._write_alias(connection, row, alias, found, rest, actor, "rolled_back")
            raise Conflict(f"{name}@{alias} has no earlier version that is still ready to return to.", param="alias")

    def remove_alias(self, tenant: str, name: str, alias: str, *, actor: str) -> None:
        """Take the alias away; raises ModelNotFound. Without `stable` the bare name means nothing until a promote."""
        with self.database.writing() as connection:
            found = self._alias(connection, tenant, name, alias)
            adapter = select(schema.adapters.c.id).where(
                schema.adapters.c.tenant == tenant, schema.adapters.c.name == name
            )
            connection.execute(
                delete(schema.aliases).where(
                    schema.aliases.c.adapter_id == adapter.scalar_subquery(),
                    schema.aliases.c.alias_key == alias.lower(),
                )
            )
            add_event(connection, tenant, "alias_removed", actor, name, found.number, alias=found.alias)

    def _servable(self, connection: Connection, tenant: str, name: str, number: int) -> Row[Any]:
        row = _version(connection, tenant, name, number)
        if row is None:
            check_adapter(connection, tenant, name)
            raise ModelNotFound(f"There is no model {name}@{number}.", param="model")
        if row.status != VersionStatus.READY:
            raise NotServable(
                f"{name}@{number} is {row.status}; only a ready version can be promoted.", param="version"
            )
        return row

    def _alias(self, connection: Connection, tenant: str, name: str, alias: str) -> Alias:
        query = _query().where(
            schema.aliases.c.tenant == tenant, schema.adapters.c.name == name, schema.aliases.c.alias == alias
        )
        row = connection.execute(query).first()
        if row is None:
            check_adapter(connection, tenant, name)
            shown = name if alias == STABLE else f"{name}@{alias}"
            raise ModelNotFound(f"There is no model {shown!r}.", param="model")
        return _to_alias(row)

    def _find_alias(self, connection: Connection, adapter_id: int, alias: str) -> Alias | None:
        query = _query().where(schema.aliases.c.adapter_id == adapter_id, schema.aliases.c.alias_key == alias.lower())
        row = connection.execute(query).first()
        return _to_alias(row) if row else None

    def _aliases_at(self, connection: Connection, adapter_id: int, number: int) -> list[str]:
        query = select(schema.aliases.c.alias).where(
            schema.aliases.c.adapter_id == adapter_id, schema.aliases.c.number == number
        )
        return sorted(connection.execute(query).scalars())

    def _write_alias(
        self,
        connection: Connection,
        version: Row[Any],
        alias: str,
        found: Alias | None,
        previous: Sequence[int],
        actor: str,
        kind: str,
    ) -> Alias:
        generation = (found.generation if found else 0) + 1
        moved = {"number": version.number, "generation": generation, "previous": list(previous)[:MAX_PREVIOUS]}
        if found is None:
            identity = {"tenant": version.tenant, "adapter_id": version.adapter_id}
            names = {"alias": alias, "alias_key": alias.lower()}
            connection.execute(insert(schema.aliases).values({**identity, **names, **moved}))
        else:
            connection.execute(
                update(schema.aliases)
                .where(
                    schema.aliases.c.adapter_id == version.adapter_id,
                    schema.aliases.c.alias_key == alias.lower(),
                    schema.aliases.c.generation == found.generation,
                )
                .values(moved)
            )
        detail = {"from": found.number if found else None, "generation": generation}
        add_event(connection, version.tenant, kind, actor, version.name, version.number, alias=alias, detail=detail)
        shown = found.alias if found else alias
        return Alias(version.tenant, version.name, shown, version.number, generation, tuple(moved["previous"]))


def no_adapter(name: str) -> ModelNotFound:
    """What every call says of an adapter that is not the tenant's: nothing tells a foreign one from an absent one."""
    return ModelNotFound(f"There is no adapter {name!r}.", param="model")


def check_adapter(connection: Connection, tenant: str, name: str) -> None:
    """Raises `no_adapter` unless the tenant has the adapter."""
    where = (schema.adapters.c.tenant == tenant, schema.adapters.c.name == name)
    if connection.execute(select(schema.adapters.c.id).where(*where)).first() is None:
        raise no_adapter(name)


def _history(found: Alias | None, number: int) -> tuple[int, ...]:
    if found is None:
        return ()
    if found.number == number:
        return found.previous
    return (found.number, *found.previous)


def _query() -> Select[Any]:
    return select(schema.aliases, schema.adapters.c.name).join_from(
        schema.aliases, schema.adapters, schema.aliases.c.adapter_id == schema.adapters.c.id
    )


def _version(connection: Connection, tenant: str, name: str, number: int) -> Row[Any] | None:
    query = (
        select(schema.versions, schema.adapters.c.name)
        .join_from(schema.versions, schema.adapters, schema.versions.c.adapter_id == schema.adapters.c.id)
        .where(schema.versions.c.tenant == tenant, schema.adapters.c.name == name, schema.versions.c.number == number)
    )
    return connection.execute(query).first()


def _to_alias(row: Row[Any]) -> Alias:
    return Alias(row.tenant, row.name, row.alias, row.number, row.generation, tuple(row.previous))
