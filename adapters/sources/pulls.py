"""What was pulled before, read from the events: a server that starts again looks at nothing twice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from sqlalchemy import select

from adapters import schema
from adapters.registry import Registry
from adapters.sources.found import Found
from adapters.types import VersionStatus


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a version's files were pulled from, as its event tells: source, URL, fingerprint there, base it met."""

    source: str
    location: str
    fingerprint: str
    base_digest: str

    @classmethod
    def of(cls, source: str, found: Found, base_digest: str) -> Origin:
        return cls(source, found.location, found.fingerprint, base_digest)

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Pulled:
    """The last version that was made of what lies at one place."""

    name: str
    number: int
    fingerprint: str
    is_rejected: bool
    at: float


def last_pulls(registry: Registry, tenant: str, source: str, base_digest: str) -> Mapping[tuple[str, str], Pulled]:
    """By place and adapter name; what was pulled for another base counts as new."""
    events = schema.events
    query = (
        select(events)
        .where(
            events.c.tenant == tenant,
            events.c.kind == "version_added",
            events.c.detail["source"]["source"].as_string() == source,
            events.c.detail["source"]["base_digest"].as_string() == base_digest,
        )
        .order_by(events.c.id)
    )
    found = {}
    with registry.database.reading() as connection:
        for row in connection.execute(query):
            origin = row.detail["source"]
            is_rejected = row.detail["status"] == VersionStatus.REJECTED
            found[origin["location"], row.name] = Pulled(
                row.name, row.number, origin["fingerprint"], is_rejected, row.at
            )
    return found
