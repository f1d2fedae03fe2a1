"""The memory of an engine on GPUs, with a stand-in for NVML: parts by place, what is measured, the cache asked once."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest

from adapters.bases import BaseModel
from server.engine.base import EngineUsage
from server.machine import Gpus, Machine
from server.memory import MemoryPlan, plan_memory
from server.memory_flags import read_layout
from server.memory_watch import MemoryWatch, Outlook, PlaceMemory
from tests.fixtures.nvml import Nvml

FLAGS = ("--max-loras", "3", "--max-cpu-loras", "8", "--max-lora-rank", "8", "--dtype", "bfloat16")
USAGE = EngineUsage(0, 5_000, 0.0, 0, 0, 0)


@dataclass
class OnGpus:
    """An engine as far as a watch looks at it; the process is this one."""

    pid: int = field(default_factory=os.getpid)
    is_up: bool = True
    asked: int = 0

    def is_ready(self) -> bool:
        return self.is_up

    async def usage(self) -> EngineUsage:
        self.asked += 1
        return replace(USAGE, kv_cache_bytes=5_000 * self.asked)


def plan_for(base: BaseModel) -> MemoryPlan:
    return replace(plan_memory(read_layout(FLAGS, base.config, is_cpu=False), base), weights_bytes=700)


def watch(base: BaseModel, engine: Any, gpus: Gpus | None) -> MemoryWatch:
    rows = [SimpleNamespace(version=SimpleNamespace(rank=4, size_bytes=1 << 20))] * 2
    residents: Any = SimpleNamespace(rows=lambda: rows)
    return MemoryWatch(Outlook(plan_for(base), Machine(1 << 34, 24_000), gpus), engine, residents)


def read(one: MemoryWatch) -> list[PlaceMemory]:
    return asyncio.run(one.read())


def test_weights_slots_and_cache_are_on_the_gpus_and_the_stage_is_in_main_memory(tiny_base: BaseModel) -> None:
    gpus = Gpus(Nvml([(24_000, 20_000, {os.getpid(): 12_000, 1: 3_000})]))
    plan = plan_for(tiny_base)
    main, gpu = read(watch(tiny_base, OnGpus(), gpus))
    assert plan.rank_bytes is not None
    assert (main.place, dict(main.parts)) == ("main", {"stage": 2 * 4 * plan.rank_bytes})
    assert (gpu.place, dict(gpu.parts)) == ("gpu", {"weights": 700, "slots": plan.slots_bytes, "kv_cache": 5_000})
    assert (gpu.process_bytes, gpu.limit_bytes, gpu.is_of_all_processes) == (12_000, 24_000, False)
    assert gpu.unaccounted_bytes == 12_000 - 5_700 - (plan.slots_bytes or 0)
    assert main.process_bytes is not None and main.process_bytes > 10_000_000


def test_what_vllm_left_for_the_cache_is_asked_once_for_each_process(tiny_base: BaseModel) -> None:
    engine = OnGpus(is_up=False)
    one = watch(tiny_base, engine, None)
    _, gpu = read(one)
    assert gpu.unknown == ("kv_cache",) and engine.asked == 0, "nobody is there to ask"
    engine.is_up = True
    assert [read(one)[1].parts["kv_cache"] for _ in range(3)] == [5_000] * 3
    engine.pid = 2**22 + 1  # another process, that is gone already
    assert [read(one)[1].parts["kv_cache"] for _ in range(2)] == [10_000] * 2


@pytest.mark.parametrize("gpus", [None, Gpus(Nvml([(1, 1, {})], fails=True))])
def test_without_nvml_nothing_is_said_of_what_the_gpus_processes_take(gpus: Gpus | None, tiny_base: BaseModel) -> None:
    _, gpu = read(watch(tiny_base, OnGpus(), gpus))
    assert gpu.process_bytes is None and gpu.unaccounted_bytes is None
    assert gpu.parts["weights"] == 700


def test_where_nvml_shows_foreign_process_ids_everything_on_the_gpus_is_counted(tiny_base: BaseModel) -> None:
    _, gpu = read(watch(tiny_base, OnGpus(), Gpus(Nvml([(24_000, 20_000, {1: 3_000})]))))
    assert (gpu.process_bytes, gpu.limit_bytes, gpu.is_of_all_processes) == (20_000, 24_000, True)


def test_an_engine_on_two_gpus_is_measured_against_both(tiny_base: BaseModel) -> None:
    mine = {os.getpid(): 20_000}
    _, gpu = read(watch(tiny_base, OnGpus(), Gpus(Nvml([(24_000, 20_000, mine)] * 2 + [(24_000, 0, {})]))))
    assert (gpu.process_bytes, gpu.limit_bytes) == (40_000, 48_000)
