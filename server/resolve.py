"""From a model id on the wire to the base or one concrete version that may answer now."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from adapters.errors import ModelNotFound, NameInvalid, NotFound, NotServable
from adapters.registry import Registry, not_servable
from adapters.types import AdapterRef, AdapterVersion, VersionStatus
from server.services import Caller, Services

MAX_KNOWN = 10_000


@dataclass(frozen=True, slots=True)
class Target:
    """What answers: the base (no version), or a version. `ref` is its concrete id."""

    ref: str
    version: AdapterVersion | None = None


async def resolve_model(services: Services, caller: Caller, model: str) -> Target:
    """Raises ModelNotFound for what is not there (or is not the caller's), NotServable for what may not answer."""
    if model == services.base.id:
        return Target(model)
    version = await find_version(services, caller, model)
    check_servable(version, services.base.digest)
    return Target(version.ref, version)


async def find_version(services: Services, caller: Caller, model: str) -> AdapterVersion:
    """The version that a model id names, whatever its status; raises ModelNotFound."""
    try:
        return await services.resolver.resolve(AdapterRef.parse(model, caller.tenant))
    except (NotFound, NameInvalid) as error:
        shown = model if len(model) <= 80 and model.isprintable() else "that id"
        raise ModelNotFound(
            f"There is no model {shown} here; GET /v1/models lists the ones there are.", param="model"
        ) from error


class Resolver:
    """Model ids to versions, read once per change of the registry: this process is the only one that changes it."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self._changes = -1
        self._known: dict[AdapterRef, AdapterVersion] = {}

    async def resolve(self, ref: AdapterRef) -> AdapterVersion:
        """The version that the id names now; raises ModelNotFound."""
        changes = self.registry.database.changes
        if changes != self._changes or len(self._known) >= MAX_KNOWN:
            self._changes, self._known = changes, {}
        version = self._known.get(ref)
        if version is None:
            version = await asyncio.to_thread(self.registry.resolve, ref)
            if self._changes == changes:  # else it may have been read before a change
                self._known[ref] = version
        return version


def check_servable(version: AdapterVersion, base_digest: str) -> None:
    """Raises NotServable, with the reason, for a version that may not answer on this base."""
    if version.status is not VersionStatus.READY:
        raise not_servable(version)
    if version.base_digest != base_digest:
        raise NotServable(
            f"{version.ref} was made for another base ({version.base_digest}), and this server runs {base_digest}: "
            "it can be exported with its own base.",
            param="model",
        )
