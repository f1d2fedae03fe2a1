"""The parts of one running server, built once in `server/app.py` and handed to every router.

A router module of `server/routes/` has one function, `router(services: Services) -> APIRouter`; `create_app` calls each
from an explicit list. Registry and store are synchronous: a route calls them through `asyncio.to_thread`. Who is asking
is `caller_of(request)`: the gateway has put it there.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

from fastapi import Request

from adapters.keys import SCOPES, ApiKey
from adapters.types import DEFAULT_TENANT, Priority

if TYPE_CHECKING:
    from adapters.bases import BaseModel
    from adapters.files import Files
    from adapters.publish import PublishContext
    from adapters.registry import Registry
    from adapters.servable import Servable
    from adapters.store import BlobStore
    from server.door import Door
    from server.engine.base import Engine
    from server.exports import Exports
    from server.job_worker import JobWorker
    from server.keyring import Keyring
    from server.lifecycle import Lifecycle
    from server.limits import Limiter
    from server.memory_watch import MemoryWatch
    from server.merged import Merged
    from server.metrics import Metrics
    from server.proving import Prover
    from server.proxy import EngineProxy
    from server.residency import Residents
    from server.resolve import Resolver
    from server.settings import Settings
    from server.sources import WatchedSource
    from server.usage import UsageMeter
    from server.warm_ahead import WarmAhead

CALLER_KEY = "hotshoe.caller"
BULK_AT_A_TIME = 2  # threads that read or write whole large files: the others are for everything else
ALL_SCOPES = frozenset(SCOPES)


@dataclass(frozen=True, slots=True)
class Caller:
    """Whose request this is: the tenant, who acts for it, and what they may do."""

    tenant: str = DEFAULT_TENANT
    actor: str = "operator"
    scopes: frozenset[str] = ALL_SCOPES
    key: ApiKey | None = None  # None for the operator's own key, and without keys

    @property
    def priority(self) -> Priority:
        """What its requests weigh; the operator's own key and a server without keys are normal."""
        return Priority.NORMAL if self.key is None else self.key.priority

    def may_touch(self, name: str) -> bool:
        """Its key is not limited to adapters of other names."""
        return self.key is None or self.key.adapters is None or name in self.key.adapters


def caller_of(request: Request) -> Caller:
    """The caller that the gateway found. A request that did not pass the gateway has none, which is our bug."""
    caller: Caller = request.scope[CALLER_KEY]
    return caller


class Worker(Protocol):
    """Something that works in the background for as long as the server runs: export jobs, later training jobs."""

    async def start(self) -> None: ...
    async def stop(self) -> None: ...


@dataclass
class Services:
    """Everything a route may need. `merge_base` is None where exports have nothing to merge into."""

    settings: Settings
    base: BaseModel
    merge_base: BaseModel | None
    registry: Registry
    store: BlobStore
    engine: Engine
    proxy: EngineProxy
    door: Door
    resolver: Resolver
    residents: Residents
    servable: Servable
    prover: Prover
    metrics: Metrics
    lifecycle: Lifecycle
    exports: Exports
    jobs: JobWorker
    keyring: Keyring
    limiter: Limiter
    usage: UsageMeter
    files: Files
    memory: MemoryWatch
    merged: Merged | None = None  # what the engine runs in place of the base
    warm_ahead: WarmAhead = field(init=False)
    sources: tuple[WatchedSource, ...] = ()
    bulk: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(BULK_AT_A_TIME))
    workers: list[Worker] = field(default_factory=list)  # started before the engine, stopped before it

    @property
    def engine_base(self) -> str:
        """The name by which the engine knows its own weights."""
        return self.merged.engine_name if self.merged else self.base.id

    async def publish_context(self, caller: Caller) -> PublishContext:
        """What `adapters.publish.publish` needs to work for this caller."""
        from adapters.publish import PublishContext

        capacity = await self.lifecycle.capacity(self)
        context = PublishContext(
            registry=self.registry,
            store=self.store,
            base=self.base,
            max_rank=self.settings.max_rank,
            max_update_ratio=self.settings.max_update_ratio,
            tenant=caller.tenant,
            actor=caller.actor,
        )
        return replace(context, serving_dtype=capacity.dtype) if capacity else context
