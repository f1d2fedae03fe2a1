"""What a promote of `stable` has to show: kept with the adapter; and what was shown, kept with the version's proof."""

from __future__ import annotations

from typing import Any

from sqlalchemy import update

from adapters import schema
from adapters.database import Database
from adapters.journal import add_event
from adapters.version_rows import adapter_row, update_version, version_row


class GateRows:
    """The part of the registry that keeps gates and the scores of versions at them."""

    database: Database

    def gate(self, tenant: str, name: str) -> dict[str, Any] | None:
        """What a promote has to show; None for nothing. Raises ModelNotFound without the adapter."""
        with self.database.reading() as connection:
            found: dict[str, Any] | None = adapter_row(connection, tenant, name).gate
            return found

    def set_gate(
        self, tenant: str, name: str, gate: dict[str, Any] | None, *, about: dict[str, Any], actor: str
    ) -> None:
        """Put the gate up, or take it away with None; `about` is what its event says of it. Raises ModelNotFound."""
        with self.database.writing() as connection:
            row = adapter_row(connection, tenant, name)
            connection.execute(update(schema.adapters).where(schema.adapters.c.id == row.id).values(gate=gate))
            kind = "gate_set" if gate else "gate_removed"
            add_event(connection, tenant, kind, actor, name, None, detail=about)

    def note_score(self, tenant: str, name: str, number: int, score: dict[str, Any], *, actor: str) -> None:
        """Write what the version scored at the gate into its proof. Raises ModelNotFound."""
        with self.database.writing() as connection:
            row = version_row(connection, tenant, name, number)
            update_version(connection, row, {"proof": {**(row.proof or {}), "gate": score}})
            add_event(connection, tenant, "gate_scored", actor, name, number, detail=score)

    def note_gate(
        self, tenant: str, name: str, number: int, figures: dict[str, Any], *, is_passed: bool, actor: str
    ) -> None:
        """An event: a version came to the gate, with its figures, and was let through or not."""
        kind = "gate_passed" if is_passed else "gate_refused"
        with self.database.writing() as connection:
            add_event(connection, tenant, kind, actor, name, number, detail=figures)
