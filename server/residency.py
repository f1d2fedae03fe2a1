"""Which versions are in the engine: loaded on demand once, counted while they answer, drained before they leave.

Residency is volatile and of one engine; what is *wanted* there is the registry's `is_warm`, which follows it: loading a
version makes it warm, evicting or dropping it makes it cold. After a restart of engine or server the warm set is loaded
again. The same bytes keep one (engine name, path, engine id) for ever; a failed load burns the id. A version with which
the engine died twice in a row is quarantined, for good.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from enum import StrEnum

import structlog

from adapters.errors import (
    EngineBusy,
    EngineFailed,
    EngineUnavailable,
    HotshoeError,
    ModelNotFound,
    NotServable,
    Problem,
    StorageDamaged,
)
from adapters.publish import remove_files
from adapters.registry import Registry
from adapters.servable import Servable
from adapters.store import BlobStore
from adapters.types import DEFAULT_TENANT, AdapterVersion, VersionStatus
from server.cold_start import ColdStarts
from server.engine.base import Engine, EngineAdapter, engine_name
from server.eviction import HALF_LIFE_SECONDS, Candidate, choose_victim
from server.metrics import Metrics
from server.popularity import DecayingCount
from server.restoring import Key, Plan, key_of, plan_restore

log = structlog.get_logger("hotshoe.residency")
Vet = Callable[[AdapterVersion, str], Awaitable[None]]  # a version, and its name in the engine that just loaded it
MOST_DEATHS = 2  # in a row, with one version in hand
DEATH_SEEN_SECONDS, DEATH_POLL_SECONDS = 2.5, 0.02  # an engine that died is not ready within two seconds


class Residency(StrEnum):
    """Where a version is with regard to one engine, just now."""

    ABSENT = "absent"
    STAGING = "staging"
    RESIDENT = "resident"
    DRAINING = "draining"


@dataclass(eq=False)
class Resident:
    """One version in the engine, with the count of requests that hold it there."""

    version: AdapterVersion
    engine_name: str
    state: Residency = Residency.STAGING
    is_evicted: bool = False  # draining to make room, and not because nobody may use it any more
    references: int = 0
    last_used: float = 0.0
    load_seconds: float | None = None
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    popularity: DecayingCount = field(default_factory=lambda: DecayingCount(HALF_LIFE_SECONDS))

    def hold(self) -> None:
        self.references += 1
        self.last_used = time.monotonic()
        self.popularity.add(self.last_used)
        self.idle.clear()

    def let_go(self) -> None:
        self.references -= 1
        self.last_used = time.monotonic()
        if not self.references:
            self.idle.set()


def names_of(version: AdapterVersion) -> set[str]:
    """As what an operator may name it: NAME and NAME@N, of another tenant than `default` with TENANT/ before it."""
    names = {version.name, version.ref}
    return names if version.tenant == DEFAULT_TENANT else {f"{version.tenant}/{name}" for name in names}


def is_deadly(version: AdapterVersion) -> bool:
    """The engine died with it as often as is borne: it is not loaded again."""
    return version.engine_deaths >= MOST_DEATHS


def death_problem(version: AdapterVersion) -> Problem:
    message = f"The engine died {MOST_DEATHS} times in a row while {version.ref} was loaded or probed."
    advice = "engine.log says of what; upload another adapter."
    return Problem("engine_died", "adapter_model.safetensors", message, advice)


class Residents:
    """The versions in one engine. Loads go one at a time; requests for one absent version share its load."""

    def __init__(
        self,
        engine: Engine,
        registry: Registry,
        store: BlobStore,
        metrics: Metrics,
        staged_limit: int,
        servable: Servable,
        pinned: frozenset[str] = frozenset(),
    ) -> None:
        self.engine = engine
        self.registry = registry
        self.store = store
        self.metrics = metrics
        self.staged_limit = staged_limit
        self.servable = servable
        self.cold_starts = ColdStarts(metrics)
        self.pinned = pinned  # NAME, NAME@N or TENANT/NAME of versions that are not evicted
        self.near: Callable[[], set[str]] = set  # engine names of versions that are wanted next
        self.on_loaded: Callable[[str, float], None] = lambda name, seconds: None
        self.vet: Vet | None = None  # proves a ready version again where its proof is another engine's
        self.is_restored = False
        self.is_closed = False
        self._engines = 0  # that came and went
        self._rows: dict[Key, Resident] = {}
        self._loads: dict[Key, asyncio.Task[Resident]] = {}
        self._awaited: Counter[Key] = Counter()  # how many wait for a load, to hold the version then
        self._left_out: dict[Key, HotshoeError] = {}
        self._lock = asyncio.Lock()

    def state_of(self, version: AdapterVersion) -> Residency:
        row = self._rows.get(key_of(version))
        if row is not None:
            return row.state
        return Residency.STAGING if key_of(version) in self._loads else Residency.ABSENT

    def rows(self) -> list[Resident]:
        return list(self._rows.values())

    @property
    def is_loading(self) -> bool:
        return bool(self._loads)

    @asynccontextmanager
    async def holding(self, version: AdapterVersion, patience_seconds: float | None = None) -> AsyncIterator[Resident]:
        """The version in the engine for as long as the block runs; loads it first when it is absent.

        Raises EngineUnavailable, EngineBusy when everything loaded is in use, AdapterLoading when the load takes longer
        than `patience_seconds` (None: it is waited for), EngineFailed when the files do not load.
        """
        row = await self._hold(version, patience_seconds)
        try:
            yield row
        finally:
            row.let_go()

    async def warm(self, version: AdapterVersion) -> Resident:
        """Have the version in the engine, and wanted there."""
        async with self.holding(version) as row:
            return row

    async def bring(self, version: AdapterVersion) -> None:
        """Have the version in the engine if it is absent. What goes wrong is told to the request that needs it then."""
        if key_of(version) in self._rows or key_of(version) in self._loads or not self.engine.is_ready():
            return
        try:
            await self._shared_load(version, None)
        except HotshoeError as error:
            log.info("version not loaded ahead of its turn", model=version.ref, code=error.code)

    @asynccontextmanager
    async def blaming(self, version: AdapterVersion) -> AsyncIterator[None]:
        """Around what the engine does with one version: should it die of it, that is counted against the version."""
        engine = self._engines
        try:
            yield
        except (EngineBusy, EngineFailed):
            raise
        except EngineUnavailable:
            if await self._died_since(engine):
                deaths = await asyncio.to_thread(
                    lambda: self.registry.count_engine_death(
                        *key_of(version), most=MOST_DEATHS, reason=death_problem(version)
                    )
                )
                log.error("the engine died with an adapter in hand", model=version.ref, deaths=deaths)
            raise

    async def _died_since(self, engine: int) -> bool:
        """Whether this engine is gone, or another is there already; a server that stops ends its engine itself."""
        deadline = time.monotonic() + DEATH_SEEN_SECONDS
        while time.monotonic() < deadline and not self.is_closed:
            if self._engines != engine or not self.engine.is_ready():
                return not self.is_closed
            await asyncio.sleep(DEATH_POLL_SECONDS)
        return False

    async def want(self, version: AdapterVersion) -> None:
        """Have the version back after a restart, when it is in the engine now."""
        if key_of(version) in self._rows:
            with contextlib.suppress(NotServable):  # retired or rejected meanwhile: nobody wants it
                await asyncio.to_thread(self.registry.set_warm, *key_of(version), True)

    async def drop(self, version: AdapterVersion) -> None:
        """Take the version out once nobody holds it; its files go too when no version needs them any more."""
        await self._leave(version)
        if version.digest is not None:
            await asyncio.to_thread(remove_files, self.registry, self.store, version.digest)

    async def _leave(self, version: AdapterVersion) -> None:
        row = self._rows.get(key_of(version))
        if row is None or row.state is Residency.DRAINING:
            return
        row.state = Residency.DRAINING
        self._count()
        if row.references:
            await row.idle.wait()
        async with self._lock:
            await self._remove(row)

    def forget_all(self) -> None:
        """The engine is a new one and holds nothing. Requests that hold a version of the old one end by themselves."""
        self.is_restored = False
        self._engines += 1
        self._rows.clear()
        self._count()

    async def restore(self) -> None:
        """Load the warm set into a new engine, whose old one was forgotten. What cannot be loaded stays wanted, and
        `left_out` says why; raises EngineUnavailable only for an engine that is gone, RegistryBusy for such a registry.
        May be called again after either."""
        self._left_out.clear()
        plan = await self._plan()
        for version in plan.wanted:
            await self._bring_back(version)
        self._count()
        self.is_restored = True

    def left_out(self) -> dict[Key, HotshoeError]:
        """Warm versions that could not be brought back at the last start of the engine, and were not loaded since."""
        return dict(self._left_out)

    async def _plan(self) -> Plan:
        warm = await asyncio.to_thread(self.registry.warm_set)
        named = await asyncio.to_thread(self._named_by_aliases, {version.tenant for version in warm})
        plan = plan_restore(warm, named, self.staged_limit, self.servable.misfit)
        for version in warm:
            if (error := plan.left_out.get(key_of(version))) is not None:
                self._leave_out(version, error)
        return plan

    async def _bring_back(self, version: AdapterVersion) -> None:
        try:
            await self.warm(version)
        except EngineUnavailable as error:
            if not self.engine.is_ready():
                raise
            self._leave_out(version, error)
        except HotshoeError as error:
            self._leave_out(version, error)
        except Exception as error:  # noqa: BLE001 - whatever is wrong with one version must not keep the others out
            self._leave_out(version, HotshoeError(f"{version.ref} did not load: {type(error).__name__}."))

    def _leave_out(self, version: AdapterVersion, error: HotshoeError) -> None:
        self._left_out[key_of(version)] = error
        log.warning("warm version not brought back", model=version.ref, code=error.code, reason=error.message)

    def _named_by_aliases(self, tenants: set[str]) -> set[Key]:
        """Versions that answer under an alias, as the one it means or as its candidate."""
        found: set[Key] = set()
        for alias in (alias for tenant in tenants for alias in self.registry.aliases(tenant)):
            numbers = {alias.number, *([alias.candidate.number] if alias.candidate else ())}
            found |= {(alias.tenant, alias.name, number) for number in numbers}
        return found

    async def _hold(self, version: AdapterVersion, patience_seconds: float | None) -> Resident:
        key = key_of(version)
        while True:
            if not self.engine.is_ready():
                raise EngineUnavailable("The engine is starting or restarting; try again shortly.")
            row = self._rows.get(key)
            if row is None or row.is_evicted:  # loaded again, once it has left
                row = await self._awaited_load(version, patience_seconds)
            if row.state is Residency.DRAINING and not row.is_evicted:
                raise NotServable(f"{version.ref} is leaving the engine.", param="model")
            if self._rows.get(key) is row and not row.is_evicted:
                row.hold()
                return row

    async def _awaited_load(self, version: AdapterVersion, patience_seconds: float | None) -> Resident:
        """Load it and let no other load have its place before the caller holds it: two would take it in turns."""
        self._awaited[key_of(version)] += 1
        try:
            return await self._shared_load(version, patience_seconds)
        finally:
            self._awaited[key_of(version)] -= 1
            if not self._awaited[key_of(version)]:
                del self._awaited[key_of(version)]

    async def _shared_load(self, version: AdapterVersion, patience_seconds: float | None) -> Resident:
        key = key_of(version)
        task = self._loads.get(key)
        if task is None:
            task = asyncio.create_task(self._load(version))
            self._loads[key] = task
            task.add_done_callback(lambda done: self._load_ended(key, done))
            self._count()
        if patience_seconds is None:
            return await asyncio.shield(task)
        return await self.cold_starts.wait(version.ref, task, patience_seconds, lambda: self._loads_before(key))

    def _loads_before(self, key: Key) -> int:
        """Loads that came before this one's and are not over: they go in the order in which they came."""
        return list(self._loads).index(key) if key in self._loads else 0

    def _load_ended(self, key: Key, task: asyncio.Task[Resident]) -> None:
        if self._loads.get(key) is task:
            del self._loads[key]
        if not task.cancelled() and (error := task.exception()) is not None:  # perhaps nobody waits for it any more
            log.warning("adapter not loaded", model=engine_name(*key), error=type(error).__name__, reason=str(error))
        self._count()

    async def _load(self, version: AdapterVersion) -> Resident:
        async with self._lock, self.cold_starts.loading():
            await self._make_room()
            digest = version.digest
            if digest is None:
                raise NotServable(f"{version.ref} has no files.", param="model")
            try:
                await asyncio.to_thread(self.store.verify, digest)
            except StorageDamaged:
                self.metrics.loads.labels("damaged").inc()
                raise
            row = Resident(version, engine_name(*key_of(version)))
            started = time.monotonic()
            await self._hand_over(version, row.engine_name, digest)
            await self._vet(version, row.engine_name)
            row.load_seconds = time.monotonic() - started
            row.state, row.last_used = Residency.RESIDENT, time.monotonic()
            self._rows[key_of(version)] = row
            self._left_out.pop(key_of(version), None)
            self.metrics.loads.labels("loaded").inc()
            self.metrics.load_seconds.observe(row.load_seconds)
            self.on_loaded(row.engine_name, row.load_seconds)
            log.info("adapter loaded", model=version.ref, seconds=round(row.load_seconds, 3))
            if version.status is VersionStatus.READY:
                await self.want(version)
                if version.engine_deaths:
                    await asyncio.to_thread(self.registry.forgive_engine_deaths, *key_of(version))
            self._count()
            return row

    async def _hand_over(self, version: AdapterVersion, name: str, digest: str) -> None:
        engine_id = await asyncio.to_thread(self.registry.engine_id, *key_of(version))
        path = self.store.folder(digest)
        try:
            async with self.blaming(version):
                await self.engine.load(EngineAdapter(name, path, engine_id))
        except EngineFailed:
            self.metrics.loads.labels("failed").inc()
            await asyncio.to_thread(self.registry.burn_engine_id, *key_of(version))
            raise
        except EngineUnavailable:
            self.metrics.loads.labels("unavailable").inc()
            raise

    async def _vet(self, version: AdapterVersion, name: str) -> None:
        """Raises NotServable for a ready version that this engine does not serve rightly; it is out again then."""
        if self.vet is None or version.status is not VersionStatus.READY:
            return
        try:
            async with self.blaming(version):
                await self.vet(version, name)
        except BaseException:
            with contextlib.suppress(HotshoeError):
                await self.engine.unload(name)
            raise

    async def _make_room(self) -> None:
        """Evict the idle version that costs least when the engine holds as many as it may. The lock is held."""
        while len(self._rows) >= self.staged_limit:
            victim = self._victim()
            if victim is None:
                raise EngineBusy(
                    f"All {self.staged_limit} adapters in the engine are in use or pinned: try again, or raise "
                    "staged_limit."
                )
            victim.state, victim.is_evicted = Residency.DRAINING, True
            await self._remove(victim)
            await asyncio.to_thread(self.registry.set_warm, *key_of(victim.version), False)
            self.metrics.evictions.inc()

    def _victim(self) -> Resident | None:
        now = time.monotonic()
        idle = {
            row.engine_name: row
            for row in self._rows.values()
            if not row.references and row.state is Residency.RESIDENT and key_of(row.version) not in self._awaited
        }
        candidates = [
            Candidate(name, row.version.size_bytes, row.load_seconds, row.popularity.at(now), row.last_used)
            for name, row in idle.items()
        ]
        pinned = [name for name, row in idle.items() if self.pinned & names_of(row.version)]
        name = choose_victim(candidates, pinned, self.near())
        return None if name is None else idle[name]

    async def _remove(self, row: Resident) -> None:
        """Unload a draining row that nobody holds. The lock is held."""
        if self._rows.get(key_of(row.version)) is not row:
            return
        try:
            await self.engine.unload(row.engine_name)
        except ModelNotFound:
            pass  # a new engine that never had it
        except EngineUnavailable as error:
            if self.engine.is_ready():
                log.error("adapter did not leave the engine", model=row.version.ref, reason=error.message)
        if self._rows.get(key_of(row.version)) is row:
            del self._rows[key_of(row.version)]
        self._count()

    def _count(self) -> None:
        staging = sum(key not in self._rows for key in self._loads)
        self.metrics.residents.labels(Residency.STAGING).set(staging)
        for state in (Residency.RESIDENT, Residency.DRAINING):
            self.metrics.residents.labels(state).set(sum(row.state is state for row in self._rows.values()))
        self.metrics.resident_bytes.set(sum(row.version.size_bytes for row in self._rows.values()))
