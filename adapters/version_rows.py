"""How every part of the registry finds the row of an adapter or of a version, and changes it."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, Row, Select, select, update

from adapters import schema
from adapters.errors import ModelNotFound


def no_adapter(name: str) -> ModelNotFound:
    """What every call says of an adapter that is not the tenant's: nothing tells a foreign one from an absent one."""
    return ModelNotFound(f"There is no adapter {name!r}.", param="model")


def adapter_row(connection: Connection, tenant: str, name: str) -> Row[Any]:
    """The tenant's adapter; raises `no_adapter`. Names are compared exactly: a model id has one spelling."""
    where = (schema.adapters.c.tenant == tenant, schema.adapters.c.name == name)
    row = connection.execute(select(schema.adapters).where(*where)).first()
    if row is None:
        raise no_adapter(name)
    return row


def version_query(tenant: str | None = None) -> Select[Any]:
    """Versions with their adapters' names, of one tenant or of all."""
    query = select(schema.versions, schema.adapters.c.name).join_from(
        schema.versions, schema.adapters, schema.versions.c.adapter_id == schema.adapters.c.id
    )
    return query if tenant is None else query.where(schema.versions.c.tenant == tenant)


def find_version(connection: Connection, tenant: str, name: str, number: int) -> Row[Any] | None:
    """The row of one version; None where there is none."""
    query = version_query(tenant).where(schema.adapters.c.name == name, schema.versions.c.number == number)
    return connection.execute(query).first()


def version_row(connection: Connection, tenant: str, name: str, number: int) -> Row[Any]:
    """The row of one version; raises ModelNotFound."""
    row = find_version(connection, tenant, name, number)
    if row is None:
        adapter_row(connection, tenant, name)
        raise ModelNotFound(f"There is no model {name}@{number}.", param="model")
    return row


def update_version(connection: Connection, row: Row[Any], values: dict[str, Any]) -> None:
    """Change columns of a version."""
    connection.execute(update(schema.versions).where(schema.versions.c.id == row.id).values(values))
