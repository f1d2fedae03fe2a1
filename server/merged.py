"""`serve --merged`: one version in the engine's own weights, at the base's speed, under the names that it always has.

The engine is started on base + version (adapters/merged_cache.py) without LoRA, and calls those weights by the
version's engine name. So it holds that version and nothing else: neither the base nor another version answers here,
which `Servable.merged` says to whoever asks for them.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import structlog

from adapters.bases import BaseModel, load_base, stored_dtype
from adapters.embedded import cache_folder
from adapters.errors import ConfigInvalid, ModelNotFound, NameInvalid
from adapters.export_request import HF, ExportRequest
from adapters.merged_cache import MergedFolder, find_or_make
from adapters.types import DEFAULT_TENANT, AdapterRef, AdapterVersion
from server.engine.base import engine_name
from server.engine.vllm_flags import is_cpu_build, resolve_dtype
from server.export_order import check_bases
from server.residency import Resident, Residents
from server.restoring import Plan, key_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from adapters.registry import Registry
    from adapters.servable import Servable
    from adapters.store import BlobStore

log = structlog.get_logger("hotshoe.merged")
DTYPES = {"float": "float32", "half": "float16"} | {name: name for name in ("float32", "float16", "bfloat16")}


@dataclass
class Merged:
    """A version and the base that it is merged into. A worker of the server, which holds the folder until it stops."""

    version: AdapterVersion
    base: BaseModel
    folder: MergedFolder

    @property
    def engine_name(self) -> str:
        """What the engine calls its own weights."""
        return engine_name(*key_of(self.version))

    async def start(self) -> None:
        """The folder is held since it was found."""

    async def stop(self) -> None:
        self.folder.release()


@dataclass(frozen=True)
class Bases:
    """What the server runs with: the base it serves, the one it merges into, and the number format that it asks for."""

    served: BaseModel
    merge: BaseModel
    dtype: str


def prepare_merged(model: str, bases: Bases, registry: Registry, store: BlobStore, servable: Servable) -> Merged:
    """Merge what `--merged` names, or find it merged. Takes as long as an export; raises what is wrong with it.

    ConfigInvalid where there is no such version, NotServable where it may not answer, and as an export raises.
    """
    version = named_version(registry, model)
    servable.check(version)
    check_bases(version, HF, bases.merge, bases.served)
    digest = version.digest or ""
    store.verify(digest)
    request = ExportRequest(
        adapter=store.folder(digest),
        base=bases.merge,
        out=cache_folder(),
        source=version.ref,
        dtype=format_of(bases),
        with_logits=False,
        base_digest=version.base_digest,
        accepted_digests=(bases.merge.digest, bases.served.digest),
    )
    folder = find_or_make(cache_folder(), request, _tell(version))
    log.info("merged into the base", model=version.ref, folder=str(folder.path))
    return Merged(version, load_base(folder.path), folder)


def named_version(registry: Registry, model: str) -> AdapterVersion:
    """The version that NAME@N, NAME@ALIAS or NAME means now, `TENANT/` before it where it is not the default's."""
    tenant, slash, rest = model.rpartition("/")
    try:
        return registry.resolve(AdapterRef.parse(rest, tenant if slash else DEFAULT_TENANT))
    except (ModelNotFound, NameInvalid) as error:
        raise ConfigInvalid(
            f"merged names {model[:80]!r}, and no such version is in this state folder: give NAME@N of one that "
            "`hotshoe ls` shows as ready, TENANT/NAME@N of another tenant's.",
            param="merged",
        ) from error


def format_of(bases: Bases) -> str | None:
    """The format to write: the one that the engine computes in, so that nothing is rounded twice; None: the base's."""
    config = bases.merge.config
    asked = DTYPES.get(resolve_dtype(bases.dtype, config, is_cpu=is_cpu_build()))
    return None if asked == stored_dtype(config) else asked


def _tell(version: AdapterVersion) -> Any:
    stages: set[str] = set()

    def tell(message: Mapping[str, Any]) -> None:
        if message["stage"] not in stages:
            stages.add(message["stage"])
            log.info("merging into the base", model=version.ref, stage=message["stage"])

    return tell


class MergedResidents(Residents):
    """The residents of an engine that has one version in its weights: there from its start to its end, and alone."""

    def __init__(self, merged: AdapterVersion, *parts: Any) -> None:
        super().__init__(*parts)
        self.merged = merged

    async def _hold(self, version: AdapterVersion, patience_seconds: float | None) -> Resident:
        misfit = self.servable.misfit(version)
        if misfit is not None:
            raise misfit
        return await super()._hold(version, patience_seconds)

    async def _plan(self) -> Plan:
        """The merged version is there whether or not it is wanted, unless it was retired meanwhile."""
        plan = await super()._plan()
        version = await asyncio.to_thread(self.registry.get, *key_of(self.merged))
        return Plan((version,) if self.servable.may_answer(version) else (), plan.left_out)

    async def _hand_over(self, version: AdapterVersion, name: str, digest: str) -> None:
        """The engine has it in its weights since it began."""

    async def _vet(self, version: AdapterVersion, name: str) -> None:
        """Nothing to probe it against: its weights were read back, and the base is not here to differ from."""
