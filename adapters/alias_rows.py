"""Aliases: movable names for versions. Each change is a compare-and-swap on the alias's generation.

A move ends the share of a candidate: it was given against the version that the alias named then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from sqlalchemy import Connection, Row, Select, delete, insert, select, update

from adapters import schema
from adapters.database import Database
from adapters.errors import Conflict, GenerationMismatch, InvalidRequest, ModelNotFound, NotServable
from adapters.job_rows import JobRow, check_held
from adapters.journal import add_event
from adapters.types import STABLE, Alias, Candidate, VersionStatus, check_name
from adapters.version_rows import adapter_row, find_version, version_row

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
        self,
        tenant: str,
        name: str,
        alias: str,
        number: int,
        *,
        expected_generation: int | None,
        actor: str,
        job: JobRow | None = None,
    ) -> Alias:
        """Point `alias` at a ready version, making it when it is new (generation 1).

        Raises GenerationMismatch unless the alias has the expected generation (0: it must not exist yet; None: any),
        NotServable when the version is not ready, LeaseLost where a fine-tuning job asks that is not its worker's any
        more.
        """
        check_name(alias, "alias")
        if alias.isdigit():
            raise Conflict(f"Alias {alias!r} would read as a version number; choose a word.", param="alias")
        with self.database.writing() as connection:
            if job is not None:
                check_held(connection, job)
            row = self._servable(connection, tenant, name, number)
            found = self._find_alias(connection, row.adapter_id, alias)
            _check_generation(f"{name}@{alias}", found, expected_generation)
            if found and found.number == number and found.candidate is None and expected_generation is None:
                return found
            return self._write_alias(connection, row, alias, found, _history(found, number), actor, "promoted")

    def set_candidate(
        self,
        tenant: str,
        name: str,
        alias: str,
        candidate: Candidate | None,
        *,
        expected_generation: int | None,
        actor: str,
    ) -> Alias:
        """Give a ready version a share of the alias's requests, in place of any other; None ends the share.

        Raises ModelNotFound without the alias, GenerationMismatch as `move_alias` does, NotServable when the version is
        not ready, Conflict when the alias names it already, InvalidRequest for a share that is none.
        """
        if candidate is not None:
            check_share(candidate.share)
        with self.database.writing() as connection:
            found = self._alias(connection, tenant, name, alias)
            _check_generation(f"{name}@{alias}", found, expected_generation)
            if found.candidate == candidate and expected_generation is None:
                return found
            if candidate is not None:
                self._servable(connection, tenant, name, candidate.number)
                _check_other(found, candidate)
            changed = replace(found, candidate=candidate, generation=found.generation + 1)
            self._save(connection, adapter_row(connection, tenant, name).id, found, changed)
            detail = {"of": found.number, "share": candidate.share if candidate else 0.0, **_ended(found)}
            kind, about = "candidate_set" if candidate else "candidate_ended", candidate or found.candidate
            self._tell(connection, changed, kind, actor, about.number if about else None, detail)
            return changed

    def rollback(self, tenant: str, name: str, alias: str = STABLE, *, actor: str) -> Alias:
        """Point the alias at the newest of its earlier versions that is still ready; raises Conflict without one."""
        with self.database.writing() as connection:
            found = self._alias(connection, tenant, name, alias)
            for i, number in enumerate(found.previous):
                row = find_version(connection, tenant, name, number)
                if row is not None and row.status == VersionStatus.READY:
                    rest = found.previous[i + 1 :]
                    return self._write_alias(connection, row, alias, found, rest, actor, "rolled_back")
            more = f"; its candidate {name}@{found.candidate.number} can be ended alone" if found.candidate else ""
            raise Conflict(
                f"{name}@{alias} has no earlier version that is still ready to return to{more}.", param="alias"
            )

    def remove_alias(self, tenant: str, name: str, alias: str, *, actor: str) -> None:
        """Take the alias away; raises ModelNotFound. Without `stable` the bare name means nothing until a promote."""
        with self.database.writing() as connection:
            found = self._alias(connection, tenant, name, alias)
            adapter_id = adapter_row(connection, tenant, name).id
            row = (schema.aliases.c.adapter_id == adapter_id, schema.aliases.c.alias_key == alias.lower())
            connection.execute(delete(schema.aliases).where(*row))
            detail = _ended(found)
            add_event(connection, tenant, "alias_removed", actor, name, found.number, alias=found.alias, detail=detail)

    def _remove_aliases_of(self, connection: Connection, version: Row[Any], name: str, actor: str) -> None:
        """Remove the aliases that name the version."""
        aliases = schema.aliases
        named = (aliases.c.adapter_id == version.adapter_id, aliases.c.number == version.number)
        for alias in connection.execute(select(aliases.c.alias).where(*named)).scalars().all():
            connection.execute(delete(aliases).where(*named, aliases.c.alias == alias))
            add_event(connection, version.tenant, "alias_removed", actor, name, version.number, alias=alias)

    def _servable(self, connection: Connection, tenant: str, name: str, number: int) -> Row[Any]:
        row = version_row(connection, tenant, name, number)
        if row.status != VersionStatus.READY:
            raise NotServable(
                f"{name}@{number} is {row.status}; only a ready version can be promoted or tried.", param="version"
            )
        return row

    def _alias(self, connection: Connection, tenant: str, name: str, alias: str) -> Alias:
        query = _query().where(
            schema.aliases.c.tenant == tenant, schema.adapters.c.name == name, schema.aliases.c.alias == alias
        )
        row = connection.execute(query).first()
        if row is None:
            adapter_row(connection, tenant, name)
            shown = name if alias == STABLE else f"{name}@{alias}"
            raise ModelNotFound(f"There is no model {shown!r}.", param="model")
        return _to_alias(row)

    def _find_alias(self, connection: Connection, adapter_id: int, alias: str) -> Alias | None:
        query = _query().where(schema.aliases.c.adapter_id == adapter_id, schema.aliases.c.alias_key == alias.lower())
        row = connection.execute(query).first()
        return _to_alias(row) if row else None

    def _check_unnamed(self, connection: Connection, adapter_id: int, ref: str, number: int) -> None:
        """Raises Conflict while an alias names the version or gives it a share."""
        query = select(schema.aliases).where(schema.aliases.c.adapter_id == adapter_id)
        rows = connection.execute(query.order_by(schema.aliases.c.alias)).all()
        pointing = [row.alias for row in rows if row.number == number]
        if pointing:
            raise Conflict(
                f"{ref} is {', '.join(pointing)}: promote another version first, then retire it.", param="version"
            )
        tried = [row.alias for row in rows if row.candidate == number]
        if tried:
            raise Conflict(
                f"{ref} is the candidate of {', '.join(tried)}: end its share first (`hotshoe rollback --candidate`), "
                "then retire it.",
                param="version",
            )

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
        shown, generation = (found.alias, found.generation + 1) if found else (alias, 1)
        kept = tuple(previous)[:MAX_PREVIOUS]
        moved = Alias(version.tenant, version.name, shown, version.number, generation, kept)
        self._save(connection, version.adapter_id, found, moved)
        detail = {"from": found.number if found else None, **_ended(found)}
        self._tell(connection, moved, kind, actor, version.number, detail)
        return moved

    def _save(self, connection: Connection, adapter_id: int, found: Alias | None, alias: Alias) -> None:
        """Write the row; `found` is what it was, None for a new one."""
        candidate = alias.candidate
        values: dict[str, Any] = {
            "number": alias.number,
            "generation": alias.generation,
            "previous": list(alias.previous),
            "candidate": candidate.number if candidate else None,
            "candidate_share": candidate.share if candidate else None,
        }
        key = alias.alias.lower()
        if found is None:
            values |= {"tenant": alias.tenant, "adapter_id": adapter_id, "alias": alias.alias, "alias_key": key}
            connection.execute(insert(schema.aliases).values(values))
        else:
            row = (
                schema.aliases.c.adapter_id == adapter_id,
                schema.aliases.c.alias_key == key,
                schema.aliases.c.generation == found.generation,
            )
            connection.execute(update(schema.aliases).where(*row).values(values))

    @staticmethod
    def _tell(
        connection: Connection, alias: Alias, kind: str, actor: str, number: int | None, detail: dict[str, Any]
    ) -> None:
        detail = {**detail, "generation": alias.generation}
        add_event(connection, alias.tenant, kind, actor, alias.name, number, alias=alias.alias, detail=detail)


def check_share(share: float) -> float:
    """The share itself; raises InvalidRequest unless it is more than 0 and less than 1."""
    if not 0 < share < 1:
        raise InvalidRequest(
            f"A candidate's share is more than 0 and less than 1, and not {share:g}: promote the version for all of "
            "the requests, take the candidate away for none.",
            param="share",
        )
    return share


def _check_generation(shown: str, found: Alias | None, expected: int | None) -> None:
    generation = found.generation if found else 0
    if expected is not None and expected != generation:
        raise GenerationMismatch(
            f"{shown} is at generation {generation}, not {expected}: somebody changed it.", param="If-Match"
        )


def _check_other(found: Alias, candidate: Candidate) -> None:
    if candidate.number == found.number:
        raise Conflict(
            f"{found.name}@{found.alias} is version {found.number} already: a candidate is another version.",
            param="candidate",
        )


def _ended(found: Alias | None) -> dict[str, Any]:
    """For an event: the candidate whose share the change ends."""
    return {"ended": asdict(found.candidate)} if found and found.candidate else {}


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


def _to_alias(row: Row[Any]) -> Alias:
    candidate = None if row.candidate is None else Candidate(row.candidate, row.candidate_share)
    return Alias(row.tenant, row.name, row.alias, row.number, row.generation, tuple(row.previous), candidate)
