"""From quarantined to ready or rejected, in the background: load beside live traffic, probe, write down what was shown.

A quarantined row is the only state this needs, so a restart resumes where it was: every version found quarantined is
proven again, unless the engine died of it. One version is proven at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass, field
from typing import Any

import structlog

from adapters.errors import EngineFailed, EngineUnavailable, HotshoeError, Problem
from adapters.registry import Registry
from adapters.types import AdapterVersion, VersionStatus
from server.engine.base import Engine
from server.holding import Holding
from server.metrics import Metrics
from server.probe import Completions, Proof, probe
from server.residency import Key, Residents, death_problem, is_deadly, key_of

log = structlog.get_logger("hotshoe.proving")
ENGINE_POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Engaged:
    """What the prover works with."""

    engine: Engine
    registry: Registry
    residents: Residents
    complete: Completions
    metrics: Metrics
    base_id: str
    base_digest: str
    tolerance: float
    holding: Holding


@dataclass
class Prover:
    """Proves quarantined versions one after the other; `wait` for the outcome of one."""

    parts: Engaged
    _queue: asyncio.Queue[AdapterVersion] = field(default_factory=asyncio.Queue)
    _pending: dict[Key, asyncio.Event] = field(default_factory=dict)
    _task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin, with every version of this base that an earlier run left quarantined and that is not held."""
        for version in await asyncio.to_thread(self.parts.registry.all_versions):
            if version.status is VersionStatus.QUARANTINED and version.base_digest == self.parts.base_digest:
                await self.take(version)
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def take(self, version: AdapterVersion) -> None:
        """Have the version proven, unless it is held back for the size of its update, or the engine died of it."""
        if is_deadly(version):
            log.warning("adapter not tried again", model=version.ref, code="engine_died")
        elif await asyncio.to_thread(self.parts.holding.holds, version):
            log.warning("adapter held", model=version.ref, code="update_too_large")
        else:
            self.submit(version)

    def submit(self, version: AdapterVersion) -> None:
        """Have the version proven, unless that is under way."""
        if key_of(version) not in self._pending:
            self._pending[key_of(version)] = asyncio.Event()
            self._queue.put_nowait(version)

    def is_pending(self, version: AdapterVersion) -> bool:
        """Its proof is under way, or waits for its turn."""
        return key_of(version) in self._pending

    async def wait(self, version: AdapterVersion, timeout_seconds: float) -> AdapterVersion:
        """The version's row after its proof, or after the timeout, whichever is first."""
        event = self._pending.get(key_of(version))
        if event is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(event.wait(), timeout_seconds)
        return await asyncio.to_thread(self.parts.registry.get, *key_of(version))

    async def _run(self) -> None:
        while True:
            version = await self._queue.get()
            is_done = True
            try:
                is_done = await self._prove(version)
            except HotshoeError as error:
                log.error("proof failed", model=version.ref, code=error.code, reason=error.message)
            except Exception:
                log.exception("proof failed", model=version.ref)
            if is_done:
                self._pending.pop(key_of(version)).set()
            else:
                self._queue.put_nowait(version)
                await asyncio.sleep(ENGINE_POLL_SECONDS)

    async def _prove(self, version: AdapterVersion) -> bool:
        """False when the engine went away meanwhile: to be tried again."""
        parts = self.parts
        if not (parts.engine.is_ready() and parts.residents.is_restored):
            return False
        current = await asyncio.to_thread(parts.registry.get, *key_of(version))
        if current.status is not VersionStatus.QUARANTINED:
            return True
        started = time.monotonic()
        try:
            async with parts.residents.holding(version) as resident, parts.residents.blaming(version):
                proof = await probe(parts.complete, parts.base_id, resident.engine_name, parts.tolerance)
        except EngineFailed as error:
            await self._reject(version, Problem("load_failed", "adapter_model.safetensors", error.message))
            return True
        except EngineUnavailable:
            return await self._engine_went_away(version)
        except HotshoeError as error:
            await self._reject(version, Problem(error.wire_code, "adapter_model.safetensors", error.message))
            return True
        if current.engine_deaths:
            await asyncio.to_thread(parts.registry.forgive_engine_deaths, *key_of(version))
        await self._settle(version, proof, time.monotonic() - started)
        return True

    async def _engine_went_away(self, version: AdapterVersion) -> bool:
        """True once it died too often of this version; false to try again, also where it was only busy."""
        current = await asyncio.to_thread(self.parts.registry.get, *key_of(version))
        if not is_deadly(current):
            return False
        await self._reject(version, death_problem(version))
        return True

    async def _settle(self, version: AdapterVersion, proof: Proof, seconds: float) -> None:
        if not proof.is_proven:
            advice = (
                "Check that training changed the weights (lora_B is not zero) and that values fit the serving dtype."
            )
            problem = Problem(proof.code, "adapter_model.safetensors", proof.message, advice)
            await self._reject(version, problem, proof.as_dict())
            return
        record: dict[str, Any] = {**proof.as_dict(), "base_digest": self.parts.base_digest, "proved_at": time.time()}
        capacity = await self.parts.engine.capacity()
        record |= {"dtype": capacity.dtype, "engine_version": capacity.engine_version, "seconds": round(seconds, 3)}
        await asyncio.to_thread(
            lambda: self.parts.registry.set_status(*key_of(version), VersionStatus.READY, proof=record, actor="prover")
        )
        await self.parts.residents.want(version)
        self.parts.metrics.proofs.labels("proven").inc()
        log.info("adapter ready", model=version.ref, seconds=record["seconds"])

    async def _reject(self, version: AdapterVersion, problem: Problem, proof: dict[str, Any] | None = None) -> None:
        await asyncio.to_thread(
            lambda: self.parts.registry.set_status(
                *key_of(version), VersionStatus.REJECTED, reasons=(problem,), proof=proof, actor="prover"
            )
        )
        await self.parts.residents.drop(version)
        self.parts.metrics.proofs.labels(problem.code).inc()
        log.warning("adapter rejected", model=version.ref, code=problem.code)
