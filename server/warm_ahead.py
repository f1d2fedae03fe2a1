"""Loads before they are asked for: while the engine is idle and has room, the most popular absent version."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import structlog

from adapters.errors import EngineUnavailable, HotshoeError, RegistryBusy
from adapters.types import AdapterVersion, VersionStatus
from server.popularity import Popularity
from server.residency import Residency, is_deadly
from server.restoring import key_of
from server.tasks import end_tasks

if TYPE_CHECKING:
    from server.services import Services

log = structlog.get_logger("hotshoe.warm_ahead")
LOOK_SECONDS = 5.0
HALF_LIFE_SECONDS = 1800.0
LEAST_SCORE = 1.5  # one request alone foretells nothing, and two have decayed a little by the time of a look


class WarmAhead:
    """A worker that counts requests, and loads when HOTSHOE_WARM_AHEAD is set."""

    def __init__(self, services: Services, look_seconds: float = LOOK_SECONDS) -> None:
        self._services = services
        self._look_seconds = look_seconds
        self._popularity = Popularity(HALF_LIFE_SECONDS)
        self._task: asyncio.Task[None] | None = None

    def note(self, version: AdapterVersion) -> None:
        """A client asks for it."""
        self._popularity.note(key_of(version), time.monotonic())

    async def start(self) -> None:
        if self._services.settings.warm_ahead:
            self._task = asyncio.create_task(self._run(), name="warm ahead")

    async def stop(self) -> None:
        await end_tasks(self._task)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._look_seconds)
            try:
                await self.look()
            except (EngineUnavailable, RegistryBusy) as error:
                log.info("nothing is loaded ahead just now", reason=error.message)

    async def look(self) -> AdapterVersion | None:
        """Load one version ahead if now is the time for it; the version, or None."""
        if not self._is_idle():
            return None
        version = await asyncio.to_thread(self._next)
        if version is None or not self._is_idle():
            return None
        try:
            await self._services.residents.warm(version)
        except EngineUnavailable:
            raise
        except HotshoeError as error:  # its own fault: it is not tried again until it is asked for
            self._popularity.forget(key_of(version))
            log.warning("not loaded ahead", model=version.ref, code=error.code, reason=error.message)
            return None
        log.info("adapter loaded ahead", model=version.ref)
        return version

    def _is_idle(self) -> bool:
        """Nobody is being answered, nothing is being loaded, and there is room without an eviction."""
        services, residents = self._services, self._services.residents
        is_up = services.engine.is_ready() and residents.is_restored and not residents.is_loading
        return is_up and not services.door.admission.running and len(residents.rows()) < residents.staged_limit

    def _next(self) -> AdapterVersion | None:
        for key in self._popularity.ranking(time.monotonic(), LEAST_SCORE):
            try:
                version = self._services.registry.get(*key)
            except RegistryBusy:
                raise
            except HotshoeError:
                self._popularity.forget(key)  # it is gone
                continue
            is_ready = version.status is VersionStatus.READY and not is_deadly(version)
            if is_ready and self._services.residents.state_of(version) is Residency.ABSENT:
                return version
        return None
