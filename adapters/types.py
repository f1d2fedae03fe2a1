"""The words of the product as values: references, versions, aliases, module shapes. Everything else speaks in these."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from adapters.errors import NameInvalid

DEFAULT_TENANT = "default"
STABLE = "stable"
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", re.ASCII)


class VersionStatus(StrEnum):
    """Where a version stands in its life, durably. Whether it is in an engine just now is residency, another matter."""

    QUARANTINED = "quarantined"
    READY = "ready"
    EXPORT_ONLY = "export_only"
    RETIRED = "retired"
    REJECTED = "rejected"


class Priority(StrEnum):
    """What a key's requests weigh beside others when places at the engine are shared."""

    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"


def check_name(name: str, what: str = "name") -> str:
    """The name itself when it may name an adapter, alias or tenant; raises NameInvalid otherwise."""
    if not NAME_PATTERN.fullmatch(name):
        shown = name if len(name) <= 80 else name[:77] + "..."
        raise NameInvalid(
            f"{what} {shown!r} is not allowed: it must match {NAME_PATTERN.pattern} (1 to 63 ASCII characters).",
            param=what,
        )
    return name


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """A model id that names an adapter: `NAME` (its stable version), `NAME@3` or `NAME@canary`, of one tenant."""

    name: str
    number: int | None = None
    alias: str | None = None
    tenant: str = DEFAULT_TENANT

    @classmethod
    def parse(cls, text: str, tenant: str = DEFAULT_TENANT) -> AdapterRef:
        """Read a model id; raises NameInvalid. A number never has leading zeros, so that an id has one spelling."""
        name, separator, selector = text.partition("@")
        check_name(name, "model")
        if not separator:
            return cls(name, alias=STABLE, tenant=tenant)
        if re.fullmatch(r"[1-9][0-9]{0,8}", selector, re.ASCII):
            return cls(name, number=int(selector), tenant=tenant)
        if selector.isdigit():
            raise NameInvalid(f"version {selector[:20]!r} is not a version number: they count from 1.", param="model")
        return cls(name, alias=check_name(selector, "alias"), tenant=tenant)

    def __str__(self) -> str:
        if self.number is not None:
            return f"{self.name}@{self.number}"
        return self.name if self.alias in (None, STABLE) else f"{self.name}@{self.alias}"


@dataclass(frozen=True, slots=True)
class ModuleShape:
    """One linear layer of a base that an adapter can sit on: W has shape (out_features, in_features)."""

    name: str
    out_features: int
    in_features: int


@dataclass(frozen=True, slots=True)
class AdapterVersion:
    """One immutable version of an adapter: what its row in the registry says."""

    tenant: str
    name: str
    number: int
    status: VersionStatus
    digest: str | None  # of the canonical files; None when the upload was rejected before there were any
    base_digest: str | None  # of the base it was checked against
    rank: int | None
    size_bytes: int
    parent: str | None  # NAME@N it was trained from, as the uploader claims
    created_at: float  # seconds since the epoch
    reasons: tuple[dict[str, Any], ...] = ()  # why it is rejected or export-only: code, path, message, advice
    dropped: tuple[str, ...] = ()  # config fields and parts that the upload held and the version does not
    card: dict[str, Any] | None = None  # the uploader's claim
    proof: dict[str, Any] | None = None  # what was shown of it through an engine
    is_warm: bool = False  # desired: back in the engine after a restart
    is_new: bool = False  # True only in the answer of the call that added it; the same files again add nothing
    serving: dict[str, Any] = field(default_factory=dict)  # fields of a request, where it does not set them itself
    chat_template: str | None = None  # None: the base's
    engine_deaths: int = 0  # in a row, each while this version was loaded or probed

    @property
    def ref(self) -> str:
        """The concrete model id on the wire."""
        return f"{self.name}@{self.number}"


@dataclass(frozen=True, slots=True)
class Candidate:
    """Another version of the adapter, which is tried on a share of an alias's requests."""

    number: int
    share: float  # more than 0, less than 1


@dataclass(frozen=True, slots=True)
class Alias:
    """A movable name for a version. `generation` counts its changes and is what a promote compares."""

    tenant: str
    name: str
    alias: str
    number: int
    generation: int
    previous: tuple[int, ...] = field(
        default=()
    )  # numbers it pointed at before, newest first: what a roll-back returns to
    candidate: Candidate | None = None


@dataclass(frozen=True, slots=True)
class Split:
    """What a model id means now: a version, and beside it an alias's candidate, where it is ready, with its share."""

    version: AdapterVersion
    alias: str | None = None  # None: the id names the version by its number
    candidate: AdapterVersion | None = None
    share: float = 0.0
