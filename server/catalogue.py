"""Adapters with their versions and aliases together, as the listing routes show them: two queries for all of them."""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from dataclasses import dataclass

from adapters.errors import ModelNotFound
from adapters.registry import Registry
from adapters.types import STABLE, AdapterRef, AdapterVersion, Alias
from server.services import Caller


@dataclass(frozen=True, slots=True)
class Adapter:
    """One name with its versions, oldest first, and its aliases."""

    name: str
    versions: tuple[AdapterVersion, ...]
    aliases: tuple[Alias, ...]

    @property
    def stable(self) -> AdapterVersion | None:
        """The version that the bare name means."""
        number = next((alias.number for alias in self.aliases if alias.alias == STABLE), None)
        return next((version for version in self.versions if version.number == number), None)


async def all_adapters(registry: Registry, caller: Caller) -> list[Adapter]:
    """The adapters of the caller's tenant that its key may touch, sorted by name regardless of case."""
    found = await asyncio.to_thread(_read, registry, caller.tenant)
    return [adapter for adapter in found if caller.may_touch(adapter.name)]


async def shared_adapters(registry: Registry, caller: Caller) -> list[tuple[str, AdapterVersion]]:
    """What other tenants share with the caller's: OWNER/NAME and what its `stable` is, where it has one."""
    return await asyncio.to_thread(_read_shared, registry, caller)


async def one_adapter(registry: Registry, tenant: str, name: str) -> Adapter:
    """Raises ModelNotFound."""
    versions = await asyncio.to_thread(registry.versions, tenant, name)
    aliases = await asyncio.to_thread(registry.aliases, tenant, name)
    return Adapter(name, tuple(versions), tuple(aliases))


def _read_shared(registry: Registry, caller: Caller) -> list[tuple[str, AdapterVersion]]:
    found = []
    for grant in registry.grants(grantee=caller.tenant):
        shown = f"{grant.tenant}/{grant.name}"
        if caller.may_touch(shown):
            with contextlib.suppress(ModelNotFound):
                found.append((shown, registry.resolve(AdapterRef(grant.name, tenant=grant.tenant))))
    return found


def _read(registry: Registry, tenant: str) -> list[Adapter]:
    versions: dict[str, list[AdapterVersion]] = defaultdict(list)
    aliases: dict[str, list[Alias]] = defaultdict(list)
    for alias in registry.aliases(tenant):
        aliases[alias.name].append(alias)
    for version in registry.all_versions(tenant):
        versions[version.name].append(version)
    names = sorted(versions, key=lambda name: (name.lower(), name))
    return [Adapter(name, tuple(versions[name]), tuple(aliases[name])) for name in names]
