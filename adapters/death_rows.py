"""How often an engine died with a version in hand, and what becomes of one with which it died too often."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from adapters.alias_rows import AliasRows
from adapters.errors import Conflict, Problem
from adapters.journal import add_event
from adapters.types import VersionStatus
from adapters.version_rows import update_version, version_row

ENGINE = "engine"  # who did it, in events
AT_STAKE = (VersionStatus.READY, VersionStatus.QUARANTINED)


class DeathRows(AliasRows):
    """The part of the registry that keeps an engine from being killed again and again by the same version."""

    def count_engine_death(self, tenant: str, name: str, number: int, *, most: int, reason: Problem) -> int:
        """Count one more death of an engine that had the version in hand; returns how many there were in a row.

        At `most` the version is quarantined with the reason, and an alias that names it goes back to its newest earlier
        version that is ready; without one it stays where it is. Raises ModelNotFound.
        """
        with self.database.writing() as connection:
            row = version_row(connection, tenant, name, number)
            deaths = int(row.engine_deaths) + 1
            values: dict[str, Any] = {"engine_deaths": deaths}
            add_event(connection, tenant, "engine_died", ENGINE, name, number, detail={"deaths": deaths})
            is_over = deaths >= most and row.status in AT_STAKE
            if is_over:
                values |= {"status": VersionStatus.QUARANTINED.value, "reasons": [reason.as_dict()], "is_warm": False}
                detail = {"from": row.status, "to": values["status"], "reasons": values["reasons"]}
                add_event(connection, tenant, "status_changed", ENGINE, name, number, detail=detail)
            update_version(connection, row, values)
        for alias in self.aliases(tenant, name) if is_over else ():
            if alias.number == number:
                with suppress(Conflict):
                    self.rollback(tenant, name, alias.alias, actor=ENGINE)
        return deaths

    def forgive_engine_deaths(self, tenant: str, name: str, number: int) -> None:
        """The version was loaded and answers, and the engine lives. Raises ModelNotFound."""
        with self.database.writing() as connection:
            update_version(connection, version_row(connection, tenant, name, number), {"engine_deaths": 0})
