"""Adapters, versions and aliases as JSON on the wire."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import Path, Query

from adapters.chat_template import template_digest
from adapters.magnitude import CODE as TOO_LARGE
from adapters.types import STABLE, AdapterVersion, Alias, VersionStatus
from server.catalogue import Adapter
from server.services import Services

MAX_NUMBER = 2**31 - 1
MOST_LISTED = 100
After = Annotated[str | None, Query(max_length=64)]  # the last id of the page before
Limit = Annotated[int, Query(ge=1, le=MOST_LISTED)]
VersionNumber = Annotated[int, Path(ge=1, le=MAX_NUMBER)]  # in a route's path


def version_row(services: Services, version: AdapterVersion, aliases: Sequence[Alias] = ()) -> dict[str, Any]:
    """Everything about one version but its card."""
    return {
        "id": version.ref,
        "object": "adapter.version",
        "name": version.name,
        "version": version.number,
        "status": str(version.status),
        "residency": str(services.residents.state_of(version)),
        "is_warm": version.is_warm,
        "aliases": [alias.alias for alias in aliases if alias.number == version.number],
        "candidate_of": shares_of(version, aliases),
        "digest": version.digest,
        "base_digest": version.base_digest,
        "is_for_served_base": version.base_digest == services.base.digest,
        "not_servable": why_not(services, version),
        "rank": version.rank,
        "size_bytes": version.size_bytes,
        "parent": version.parent,
        "created_at": int(version.created_at),
        "has_card": version.card is not None,
        "reasons": [dict(reason) for reason in version.reasons],
        "dropped": list(version.dropped),
        "proof": version.proof,
        "is_held": is_held(services, version),
        "serving": version.serving,
        "chat_template": template_digest(version.chat_template) if version.chat_template else None,
        "engine_deaths": version.engine_deaths,
    }


def why_not(services: Services, version: AdapterVersion) -> str | None:
    """Why the version may not answer on this server; None for one that may."""
    trouble = services.servable.trouble(version)
    return trouble.message if trouble else None


def is_held(services: Services, version: AdapterVersion) -> bool:
    """The version is kept, and not proven until the operator allows the size of its update."""
    is_large = any(reason["code"] == TOO_LARGE for reason in version.reasons)
    return is_large and version.status is VersionStatus.QUARANTINED and not services.prover.is_pending(version)


def shares_of(version: AdapterVersion, aliases: Sequence[Alias]) -> dict[str, float]:
    """The aliases that try the version, each with the share of its requests."""
    tried = {alias.alias: alias.candidate for alias in aliases}
    return {name: one.share for name, one in tried.items() if one is not None and one.number == version.number}


def alias_row(alias: Alias) -> dict[str, Any]:
    """One alias; `generation` is what If-Match compares."""
    return {
        "object": "adapter.alias",
        "name": alias.name,
        "alias": alias.alias,
        "model": alias.name if alias.alias == STABLE else f"{alias.name}@{alias.alias}",
        "version": alias.number,
        "generation": alias.generation,
        "previous": list(alias.previous),
        "candidate": alias.candidate.number if alias.candidate else None,
        "share": alias.candidate.share if alias.candidate else None,
    }


def adapter_row(services: Services, adapter: Adapter, *, is_short: bool = False) -> dict[str, Any]:
    """One adapter: its aliases, and its versions, newest first."""
    newest = sorted(adapter.versions, key=lambda version: -version.number)
    row: dict[str, Any] = {
        "id": adapter.name,
        "object": "adapter",
        "name": adapter.name,
        "created_at": int(min((version.created_at for version in newest), default=0)),
        "stable": adapter.stable.number if adapter.stable else None,
        "aliases": [alias_row(alias) for alias in adapter.aliases],
    }
    if is_short:
        row["versions"] = [{"version": one.number, "status": str(one.status)} for one in newest]
    else:
        row["versions"] = [version_row(services, one, adapter.aliases) for one in newest]
    return row


def listing(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"object": "list", "data": rows}
