"""What the engine's memory is used for as the server runs: the computed parts, and beside them what processes take."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from adapters.errors import EngineUnavailable
from server.engine.vllm_flags import is_cpu_build
from server.machine import Gpus, Machine, open_gpus, process_tree, read_machine, rss_of
from server.memory import MemoryPlan, plan_memory
from server.memory_flags import read_layout
from server.room import check_room, memory_lines
from server.vllm_plugin.kernel_build import is_kernel_there

if TYPE_CHECKING:
    from adapters.bases import BaseModel
    from server.engine.base import Engine, EngineUsage
    from server.residency import Residents

MAIN, GPU = "main", "gpu"
PARTS = ("weights", "slots", "packed", "kv_cache", "stage")
Staged = Sequence[tuple[int, int]]  # rank and file bytes of each adapter in the engine


@dataclass(frozen=True, slots=True)
class PlaceMemory:
    """One kind of memory, main or the GPUs'. `parts` are computed; one that is not known is in `unknown`."""

    place: str
    parts: Mapping[str, int]
    unknown: tuple[str, ...] = ()
    process_bytes: int | None = None  # of the server and the engine; None where it cannot be read
    limit_bytes: int | None = None  # what there is
    is_of_all_processes: bool = False  # NVML does not tell ours apart
    is_up: bool = True  # the engine runs and has allocated what is computed

    @property
    def computed_bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def unaccounted_bytes(self) -> int | None:
        """What the processes take beyond the parts; None where that would not be true."""
        if self.process_bytes is None or self.unknown or not self.parts or not self.is_up:
            return None
        return self.process_bytes - self.computed_bytes


@dataclass(frozen=True, slots=True)
class Outlook:
    """An engine's memory by arithmetic, and what there is for it. `plan` is None for one that loads no model."""

    plan: MemoryPlan | None
    machine: Machine
    gpus: Gpus | None = None

    def lines(self) -> list[str]:
        """For the person who starts the server."""
        return memory_lines(self.plan, self.machine) if self.plan else []


def outlook_of(engine: Engine, base: BaseModel) -> Outlook:
    """For an engine that is not started yet; raises ConfigInvalid when it has no room on this machine, BaseInvalid."""
    flags: Sequence[str] | None = getattr(engine, "flags", None)
    if not flags:
        return Outlook(None, read_machine(None))
    is_cpu = is_cpu_build()
    gpus = None if is_cpu else open_gpus()
    layout = read_layout(flags, base.config, is_cpu=is_cpu, has_kernel=is_cpu and is_kernel_there())
    plan = plan_memory(layout, base)
    machine = read_machine(gpus)
    check_room(plan, machine)
    return Outlook(plan, machine, gpus)


@dataclass
class MemoryWatch:
    """The memory of one server and its engine, as it is now."""

    outlook: Outlook
    engine: Engine
    residents: Residents
    _told: tuple[int | None, EngineUsage | None] = field(default=(None, None))  # by the engine with this pid

    async def read(self) -> list[PlaceMemory]:
        """Main memory, then the GPUs' where the engine is on them."""
        staged = [(row.version.rank or 0, row.version.size_bytes) for row in self.residents.rows()]
        pid: int | None = getattr(self.engine, "pid", None)
        told = await self._ask_once(pid) if self.outlook.plan else None
        return await asyncio.to_thread(self._measure, staged, pid, told)

    async def _ask_once(self, pid: int | None) -> EngineUsage | None:
        """What an engine says of itself that stays so for its life: whether it stages adapters, and on a GPU the bytes
        of its KV cache, which is what vLLM finds left."""
        if self._told[0] != pid and self.engine.is_ready():
            with suppress(EngineUnavailable):
                self._told = (pid, await self.engine.usage())
        return self._told[1] if self._told[0] == pid else None

    def _measure(self, staged: Staged, pid: int | None, told: EngineUsage | None) -> list[PlaceMemory]:
        engine = process_tree(pid) if pid is not None else []
        rss = rss_of([*process_tree(os.getpid())[:1], *engine])
        parts = self._parts(self.outlook.plan, staged, told) if self.outlook.plan else {}
        is_up = self.engine.is_ready()
        if self.outlook.plan is None or self.outlook.plan.layout.is_cpu:
            return [_place(MAIN, parts, rss, self.outlook.machine.main_bytes, is_up)]
        stage = {"stage": parts.pop("stage")}
        found = _place(MAIN, stage, rss, self.outlook.machine.main_bytes, is_up)
        use = self.outlook.gpus.used_by({process.pid for process in engine}) if self.outlook.gpus else None
        used, limit = (use.used_bytes, use.limit_bytes) if use else (None, self.outlook.machine.gpu_bytes)
        is_all = use is not None and use.is_of_all_processes
        return [found, _place(GPU, parts, used, limit, is_up, is_all)]

    def _parts(self, plan: MemoryPlan, staged: Staged, told: EngineUsage | None) -> dict[str, int | None]:
        cache = plan.kv_cache_bytes if plan.layout.is_cpu else told.kv_cache_bytes if told else None
        return computed_parts(plan, staged, cache, is_staging=told is not None and told.is_staging)


def computed_parts(
    plan: MemoryPlan, staged: Staged, cache_bytes: int | None, *, is_staging: bool = False
) -> dict[str, int | None]:
    """The parts of an engine that holds these adapters; None for what is not known. One that `is_staging` copies none
    of them for its slots."""
    # What is merged into the weights is a resident too, and takes nothing beside them.
    sizes = [plan.staged_bytes(rank, file_bytes) for rank, file_bytes in staged if plan.layout.max_loras]
    known = sorted((size for size in sizes if size is not None), reverse=True)
    is_known = plan.rank_bytes is not None
    parts = {
        "weights": plan.weights_bytes,
        "slots": plan.slots_bytes,
        "packed": 0 if is_staging else sum(known[: plan.layout.max_loras]) if is_known else None,
        "kv_cache": cache_bytes,
        "stage": sum(known) if is_known else None,
    }
    if not plan.layout.is_cpu:
        del parts["packed"]
    return parts


def _place(
    place: str, parts: Mapping[str, int | None], used: int | None, limit: int | None, is_up: bool, is_all: bool = False
) -> PlaceMemory:
    known = {name: part for name, part in parts.items() if part is not None}
    unknown = tuple(name for name in parts if name not in known)
    return PlaceMemory(place, known, unknown, used, limit, is_all, is_up)
