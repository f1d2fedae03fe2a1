"""From quarantined to ready or rejected, in the background: load beside live traffic, probe, write down what was shown.

A quarantined row is the only state this needs, so a restart resumes where it was: every version found quarantined is
proven again, unless the engine died of it. One version is proven at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import structlog

from adapters.base_rows import ServedBase
from adapters.errors import EngineFailed, EngineUnavailable, HotshoeError, Problem, RegistryBusy
from adapters.proof_rows import EFFECT, ProofKey
from adapters.registry import Registry
from adapters.rounding import rounding
from adapters.servable import Servable, unproven
from adapters.types import AdapterVersion, VersionStatus
from server.ending import Ending
from server.engine.base import Engine
from server.holding import Holding
from server.metrics import Metrics
from server.probe import Completions, Proof, probe
from server.residency import Residents, death_problem, is_deadly
from server.restoring import Key, key_of
from server.tasks import at_most

log = structlog.get_logger("hotshoe.proving")
ENGINE_POLL_SECONDS, REGISTRY_POLL_SECONDS = 0.2, 0.5
RANK_TOO_LARGE = "rank_too_large"


@dataclass(frozen=True, slots=True)
class Engaged:
    """What the prover works with."""

    engine: Engine
    registry: Registry
    residents: Residents
    complete: Completions
    metrics: Metrics
    servable: Servable
    tolerance: float
    holding: Holding
    folder_of: Callable[[str], Path]  # of a digest's canonical files
    ending: Ending
    on_ready: Callable[[AdapterVersion], None]


@dataclass
class Prover:
    """Proves quarantined versions one after the other; `wait` for the outcome of one."""

    parts: Engaged
    _queue: asyncio.Queue[AdapterVersion] = field(default_factory=asyncio.Queue)
    _pending: dict[Key, asyncio.Event] = field(default_factory=dict)
    _task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin, with every version that an earlier run left quarantined, or out for a limit that is no longer one."""
        while not await self._take_up():  # noqa: ASYNC110 - nothing says when another process lets go of the registry
            await asyncio.sleep(REGISTRY_POLL_SECONDS)
        self._task = asyncio.create_task(self._run())

    async def _take_up(self) -> bool:
        """False while the registry is locked, or the engine went away: to be tried again."""
        parts = self.parts
        try:
            key = await self.engine_key()
            note = ServedBase(parts.servable.base_digest, parts.servable.base_name, parts.servable.max_rank)
            await asyncio.to_thread(
                parts.registry.note_base, replace(note, dtype=key.dtype, engine_version=key.engine_version)
            )
            for version in await asyncio.to_thread(parts.registry.all_versions):
                if is_out_for_its_rank(version) and parts.servable.misfit(version) is None:
                    version = await asyncio.to_thread(self._let_in, version)
                if version.status is VersionStatus.QUARANTINED:
                    await self.take(version)
        except (RegistryBusy, EngineUnavailable) as error:
            log.warning("proofs cannot begin yet", code=error.code, reason=error.message)
            return False
        return True

    def _let_in(self, version: AdapterVersion) -> AdapterVersion:
        """An export-only version whose rank is within the limit now, quarantined; held if its update is too large."""
        problem = self.parts.holding.problem(version)
        reasons = (problem,) if problem else ()
        self.parts.registry.try_again(*key_of(version), reasons=reasons, actor="prover")
        log.info("adapter tried again", model=version.ref, rank=version.rank)
        return self.parts.registry.get(*key_of(version))

    async def engine_key(self) -> ProofKey:
        """What a proof made now holds for; raises EngineUnavailable."""
        capacity = await self.parts.engine.capacity()
        key = ProofKey(self.parts.servable.base_digest, capacity.dtype, capacity.engine_version)
        self.parts.servable.engine = key
        return key

    async def vet(self, version: AdapterVersion, engine_name: str) -> None:
        """Prove a ready version anew, in the engine that has just loaded it, where its proof is another engine's.

        Its status and its aliases stay as they are. Raises NotServable where it fails, EngineUnavailable.
        """
        key = await self.engine_key()
        if key.has_passed(version.proof):
            return
        started = time.monotonic()
        proof = await probe(self.parts.complete, self.parts.servable.base_name, engine_name, self.parts.tolerance)
        record = await self._recorded(version, proof, key, started)
        await asyncio.to_thread(lambda: self.parts.registry.renew_proof(*key_of(version), record, actor="prover"))
        self.parts.metrics.proofs.labels(proof.code).inc()
        if proof.is_proven:
            log.info("adapter proven anew", model=version.ref, engine=str(key), seconds=record["seconds"])
            return
        log.error("adapter not proven on this engine", model=version.ref, engine=str(key), code=proof.code)
        raise unproven(await asyncio.to_thread(self.parts.registry.get, *key_of(version)), key)

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def take(self, version: AdapterVersion) -> None:
        """Have the version proven, unless it does not fit, is held for the size of its update, or the engine died."""
        misfit = self.parts.servable.misfit(version)
        if misfit is not None:
            log.info("adapter left quarantined", model=version.ref, reason=misfit.message)
        elif is_deadly(version):
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
            await at_most(timeout_seconds, event.wait())
        return await asyncio.to_thread(self.parts.registry.get, *key_of(version))

    async def _run(self) -> None:
        while True:
            version = await self._queue.get()
            is_done = True
            try:
                is_done = await self._prove(version)
            except RegistryBusy as error:
                log.warning("proof put off", model=version.ref, code=error.code, reason=error.message)
                is_done = False
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
                proof = await probe(parts.complete, parts.servable.base_name, resident.engine_name, parts.tolerance)
                warnings = await parts.ending.warnings(version, resident.engine_name) if proof.is_proven else []
            key = await self.engine_key()
        except EngineFailed as error:
            await self._reject(version, Problem("load_failed", "adapter_model.safetensors", error.message))
            return True
        except EngineUnavailable:
            return await self._engine_went_away(version)
        except RegistryBusy:
            raise  # it says nothing of the version
        except HotshoeError as error:
            await self._reject(version, Problem(error.wire_code, "adapter_model.safetensors", error.message))
            return True
        if current.engine_deaths:
            await asyncio.to_thread(parts.registry.forgive_engine_deaths, *key_of(version))
        record = await self._recorded(version, proof, key, started)
        await self._settle(version, proof, {**record, "warnings": warnings})
        return True

    async def _recorded(self, version: AdapterVersion, proof: Proof, key: ProofKey, started: float) -> dict[str, Any]:
        """What the version's row keeps of a proof, with what the engine's copy lost by its number format."""
        record, last = _record(proof, key, started), version.proof or {}
        if last.get("dtype") == key.dtype and "rounding" in last:  # of the same files: a warm set is not read again
            return {**record, "rounding": last["rounding"]}
        folder = self.parts.folder_of(version.digest) if version.digest and proof.is_proven else None
        lost = await asyncio.to_thread(rounding, folder, key.dtype) if folder is not None else None
        return {**record, "rounding": lost.as_dict() if lost is not None else None}

    async def _engine_went_away(self, version: AdapterVersion) -> bool:
        """True once it died too often of this version; false to try again, also where it was only busy."""
        current = await asyncio.to_thread(self.parts.registry.get, *key_of(version))
        if not is_deadly(current):
            return False
        await self._reject(version, death_problem(version))
        return True

    async def _settle(self, version: AdapterVersion, proof: Proof, record: dict[str, Any]) -> None:
        if not proof.is_proven:
            advice = (
                "Check that training changed the weights (lora_B is not zero) and that values fit the serving dtype."
            )
            problem = Problem(proof.code, "adapter_model.safetensors", proof.message, advice)
            await self._reject(version, problem, proof.as_dict())
            return
        await asyncio.to_thread(
            lambda: self.parts.registry.set_status(*key_of(version), VersionStatus.READY, proof=record, actor="prover")
        )
        await self.parts.residents.want(version)
        self.parts.on_ready(version)
        self.parts.metrics.proofs.labels("proven").inc()
        codes = [warning["code"] for warning in record["warnings"]]
        log.info("adapter ready", model=version.ref, seconds=record["seconds"], warnings=codes)

    async def _reject(self, version: AdapterVersion, problem: Problem, proof: dict[str, Any] | None = None) -> None:
        await asyncio.to_thread(
            lambda: self.parts.registry.set_status(
                *key_of(version), VersionStatus.REJECTED, reasons=(problem,), proof=proof, actor="prover"
            )
        )
        await self.parts.residents.drop(version)
        self.parts.metrics.proofs.labels(problem.code).inc()
        log.warning("adapter rejected", model=version.ref, code=problem.code)


def _record(proof: Proof, key: ProofKey, started: float) -> dict[str, Any]:
    """What a version's row keeps of a proof."""
    seconds = round(time.monotonic() - started, 3)
    return {**proof.as_dict(), **asdict(key), "shows": [EFFECT], "proved_at": time.time(), "seconds": seconds}


def is_out_for_its_rank(version: AdapterVersion) -> bool:
    """It is export-only, and for no other reason than its rank."""
    is_rank = all(reason["code"] == RANK_TOO_LARGE for reason in version.reasons)
    return version.status is VersionStatus.EXPORT_ONLY and bool(version.reasons) and is_rank
