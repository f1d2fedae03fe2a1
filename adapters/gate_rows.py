"""What a promote of `stable` has to show: kept with the adapter; and what was shown, kept with the version's proof."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, Row, select, update

from adapters import schema
from adapters.alias_rows import no_adapter
from adapters.database import Database
from adapters.errors import ModelNotFound
from adapters.journal import add_event


class GateRows:
    """The part of the registry that keeps gates and the scores of versions at them."""

    database: Database

    def gate(self, tenant: str, name: str) -> dict[str, Any] | None:
        """What a promote has to show; None for nothing. Raises ModelNotFound without the adapter."""
        with self.database.reading() as connection:
            found: dict[str, Any] | None = _adapter(connection, tenant, name).gate
            return found

    def set_gate(
        self, tenant: str, name: str, gate: dict[str, Any] | None, *, about: dict[str, Any], actor: str
    ) -> None:
        """Put the gate up, or take it away with None; `about` is what its event says of it. Raises ModelNotFound."""
        with self.database.writing() as connection:
            row = _adapter(connection, tenant, name)
            connection.execute(update(schema.adapters).where(schema.adapters.c.id == row.id).values(gate=gate))
            kind = "gate_set" if gate else "gate_removed"
            add_event(connection, tenant, kind, actor, name, None, detail=about)

    def note_score(self, tenant: str, name: str, number: int, score: dict[str, Any], *, actor: str) -> None:
        """Write what the version scored at the gate into its proof. Raises ModelNotFound."""
        with self.database.writing() as connection:
            adapter = _adapter(connection, tenant, name)
            of_version = (schema.versions.c.adapter_id == adapter.id, schema.versions.c.number == number)
            row = connection.execute(select(schema.versions.c.proof).where(*of_version)).first()
            if row is None:
                raise ModelNotFound(f"There is no model {name}@{number}.", param="model")
            proof = {**(row.proof or {}), "gate": score}
            connection.execute(update(schema.versions).where(*of_version).values(proof=proof))
            add_event(connection, tenant, "gate_scored", actor, name, number, detail=score)

    def note_gate(
        self, tenant: str, name: str, number: int, figures: dict[str, Any], *, is_passed: bool, actor: str
    ) -> None:
        """An event: a version came to the gate, with its figures, and was let through or not."""
        kind = "gate_passed" if is_passed else "gate_refused"
        with self.database.writing() as connection:
            add_event(connection, tenant, kind, actor, name, number, detail=figures)


def _adapter(connection: Connection, tenant: str, name: str) -> Row[Any]:
    of_adapter = (schema.adapters.c.tenant == tenant, schema.adapters.c.name == name)
    row = connection.execute(select(schema.adapters).where(*of_adapter)).first()
    if row is None:
        raise no_adapter(name)
    return row
