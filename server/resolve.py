"""From a model id on the wire to the base or one concrete version that may answer now."""

from __future__ import annotations

from dataclasses import dataclass

from adapters.errors import InvalidRequest, ModelNotFound, NameInvalid, NotFound
from adapters.registry import Registry
from adapters.types import DEFAULT_TENANT, AdapterRef, AdapterVersion, Split, check_name
from adapters.version_rows import no_adapter
from server.errors import Forbidden
from server.remembered import Remembered
from server.services import Caller, Services
from server.session import chosen


@dataclass(frozen=True, slots=True)
class Target:
    """What answers: the base (no version), or a version. `ref` is its concrete id as the caller writes it."""

    ref: str
    version: AdapterVersion | None = None

    @property
    def label(self) -> str:
        """Its name in metrics and logs, which tells the tenants' adapters of one name apart."""
        version = self.version
        if version is None or version.tenant == DEFAULT_TENANT:
            return version.ref if version else self.ref
        return f"{version.tenant}/{version.ref}"


async def resolve_model(services: Services, caller: Caller, model: str, session: str | None = None) -> Target:
    """Raises ModelNotFound for what is not there (or is not the caller's), NotServable for what may not answer.

    Requests of one session get the same of an alias's two versions; a candidate that may not answer gets none.
    """
    if model == services.base.id:
        if not caller.may_touch(model):
            raise unknown_model(model)
        return Target(model)
    split = await find_split(services, caller, model)
    version = split.version
    if split.candidate is not None and services.servable.may_answer(split.candidate):
        version = chosen(split, caller.tenant, session, services.keyring.pepper)
    services.servable.check(version)
    return Target(ref_for(caller, version), version)


async def find_version(services: Services, caller: Caller, model: str) -> AdapterVersion:
    """The version that a model id names, whatever its status and a candidate's share; raises ModelNotFound."""
    return (await find_split(services, caller, model)).version


async def find_split(services: Services, caller: Caller, model: str) -> Split:
    """What a model id names, whatever its status; raises ModelNotFound.

    `OWNER/NAME` is an adapter that the tenant OWNER shares with the caller's.
    """
    owner, slash, rest = model.rpartition("/")
    try:
        ref = AdapterRef.parse(rest, owner if slash else caller.tenant)
        if not caller.may_touch(f"{owner}/{ref.name}" if slash else ref.name):
            raise unknown_model(model)
        if slash and not await services.resolver.is_shared(owner, ref.name, caller.tenant):
            raise unknown_model(model)
        return await services.resolver.split(ref)
    except (NotFound, NameInvalid) as error:
        raise unknown_model(model) from error


def unknown_model(model: str) -> ModelNotFound:
    """The same for a model that is not there, is another tenant's, or is not this key's."""
    shown = model if len(model) <= 80 and model.isprintable() else "that id"
    return ModelNotFound(f"There is no model {shown} here; GET /v1/models lists the ones there are.", param="model")


def ref_for(caller: Caller, version: AdapterVersion) -> str:
    """The version's concrete id as this caller writes it."""
    return version.ref if version.tenant == caller.tenant else f"{version.tenant}/{version.ref}"


def own_name(caller: Caller, name: str) -> str:
    """The name, where the caller may touch it; raises NameInvalid, or NotFound as for an absent adapter."""
    check_name(name)
    if not caller.may_touch(name):
        raise no_adapter(name)
    return name


def name_to_make(caller: Caller, name: str) -> str:
    """The name, where the caller may make versions of it; raises NameInvalid, Forbidden."""
    check_name(name)
    if not caller.may_touch(name):
        raise Forbidden("This key may not make an adapter of that name: it is limited to others.", param="name")
    return name


def refuse_base_name(services: Services, name: str) -> None:
    """Raises InvalidRequest for the name under which the base itself answers."""
    if name.lower() == services.base.id.lower():
        raise InvalidRequest(f"{name} is the base's name: choose another.", param="name")


class Resolver:
    """Model ids to versions, read once per change of the registry."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self._remembered = Remembered(registry)

    async def split(self, ref: AdapterRef) -> Split:
        """What the id names now; raises ModelNotFound."""
        return await self._remembered.get(ref, lambda: self.registry.split(ref))

    async def is_shared(self, owner: str, name: str, grantee: str) -> bool:
        """Whether the adapter is shared with the tenant now."""
        grant = (owner, name, grantee)
        return await self._remembered.get(grant, lambda: self.registry.is_granted(*grant))
