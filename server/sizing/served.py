"""The sizing of the engine that runs: what is predicted beside what it reports, what still fits, what is recommended.

Predictions are those of `hotshoe size`: from config.json, flags and the machine, never from weight files or the engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from adapters.bases import BaseModel
from adapters.errors import BaseInvalid, ConfigInvalid
from server.engine.base import EngineUsage
from server.machine import Machine
from server.memory import Layout, MemoryPlan
from server.memory_flags import CPU_BLOCK_TOKENS, GPU_BLOCK_TOKENS
from server.sizing.parts import Device, Form, Traffic
from server.sizing.placed import Chosen, Placed
from server.sizing.report import settings_of
from server.sizing.size import size

DTYPES = {2: "bfloat16", 4: "float32"}  # by bytes: all that a sizing asks of a dtype
Staged = Sequence[tuple[int, int]]  # rank and file bytes of each adapter in the engine


def served_sizing(
    base: BaseModel, plan: MemoryPlan, machine: Machine, staged: Staged, usage: EngineUsage | None
) -> dict[str, Any]:
    """The row of /v1/system. `unknown` says why there is no prediction; `reported` is None while no engine answers."""
    row: dict[str, Any] = {"reported": None if usage is None else _reported(usage)}
    placed, why = _placed(base, plan, machine)
    if placed is None:
        return {**row, "predicted": None, "unknown": why, "room": None, "recommended": None, "notes": []}
    try:
        best = size(base.id, base.config, placed.form, placed.device, _traffic(plan.layout))
    except (BaseInvalid, ConfigInvalid) as error:
        return {**row, "predicted": None, "unknown": error.message, "room": None, "recommended": None, "notes": []}
    return {
        **row,
        "predicted": _predicted(placed, plan, staged),
        "unknown": None,
        "room": _room(placed, plan.layout, machine, staged, usage),
        "recommended": settings_of(best) if best.fits else None,
        "notes": [*best.notes, *(f"would fit with {change}" for change in best.changes)],
    }


def _placed(base: BaseModel, plan: MemoryPlan, machine: Machine) -> tuple[Placed | None, str]:
    """The running engine as a sizing sees it, or why that cannot be."""
    layout = plan.layout
    if not layout.has_plain_weights:
        return None, "the base is quantised, or a flag changes its weights"
    if "vocab_size" not in base.config:
        return None, "the base's config.json has no vocab_size"
    if layout.pipeline_parallel != 1 or layout.is_fully_sharded:
        return None, "pipeline parallelism and fully sharded LoRAs are not sized"
    if layout.block_tokens != (CPU_BLOCK_TOKENS if layout.is_cpu else GPU_BLOCK_TOKENS):
        return None, "blocks of the KV cache are not of vLLM's own size"
    known = (layout.dtype_bytes, layout.kv_bytes, layout.context_tokens, layout.block_tokens, layout.tensor_parallel)
    if None in known or layout.lora_bytes != layout.dtype_bytes or plan.token_bytes is None:
        return None, "a flag, or the base's config.json, leaves a size unknown"
    gpu, fraction = machine.gpu_bytes, layout.memory_fraction
    if not layout.is_cpu and (gpu is None or fraction is None):
        return None, "the memory of the GPU is not known"
    dtype, kv, context, block, split = (int(value or 0) for value in known)
    memory = machine.main_bytes if layout.is_cpu else int(gpu or 0)
    device = Device(
        "this machine",
        memory,
        is_cpu=layout.is_cpu,
        count=split,
        main_bytes=None if layout.is_cpu else machine.main_bytes,
        slots_are_pointers=layout.slots_are_pointers,
    )
    cache = (layout.kv_cache_bytes or 0) // (plan.block_bytes or 1)
    chosen = Chosen(
        slots=layout.max_loras - 1,
        max_rank=layout.max_rank,
        context_tokens=context,
        staged=0,
        staged_rank=layout.max_rank,
        sequences=max(1, (cache - 1) // -(-context // block)) if layout.is_cpu else 1,
        memory_fraction=1.0 if layout.is_cpu else float(fraction or 0),
    )
    return Placed(base.config, Form(DTYPES.get(dtype, "float32"), dtype, kv), device, chosen), ""


def _traffic(layout: Layout) -> Traffic:
    """As many adapters as may be loaded, of the largest rank, at the context that is served."""
    return Traffic(layout.staged_limit, layout.max_rank, layout.context_tokens)


def _predicted(placed: Placed, plan: MemoryPlan, staged: Staged) -> dict[str, int | None]:
    cache, tokens = _cache(placed, plan)
    sizes = [plan.staged_bytes(rank, file_bytes) for rank, file_bytes in staged]
    return {
        "weights_bytes": placed.plan.weights_bytes,
        "one_slot_bytes": placed.plan.slot_bytes,
        "slot_bytes": placed.plan.slots_bytes,
        "kv_cache_bytes": cache,
        "kv_cache_tokens": tokens,
        "one_staged_bytes": placed.staged_adapter_bytes,
        "stage_bytes": sum(size or 0 for size in sizes),
    }


def _cache(placed: Placed, plan: MemoryPlan) -> tuple[int, int]:
    """Bytes and tokens of the KV cache: whole blocks of what is set for it, on a GPU else of what is left."""
    set_bytes = plan.kv_cache_bytes
    if set_bytes is None:
        return placed.cache_bytes * placed.device.count, placed.cache_tokens
    block = placed.block_bytes * placed.device.count
    return set_bytes, max(0, set_bytes // block - 1) * placed.block_tokens


def _reported(usage: EngineUsage) -> dict[str, int]:
    return {
        "weights_bytes": usage.weights_bytes,
        "slot_bytes": usage.slot_bytes,
        "kv_cache_bytes": usage.kv_cache_bytes,
        "kv_cache_tokens": usage.kv_cache_tokens,
        "stage_bytes": usage.stage_bytes,
    }


def _room(
    placed: Placed, layout: Layout, machine: Machine, staged: Staged, usage: EngineUsage | None
) -> Mapping[str, int | None]:
    """Adapters of the largest rank, and tokens, that still fit. None is what nobody can tell just now."""
    allowed = max(0, layout.staged_limit - len(staged))
    by_memory = None
    if usage is not None:
        by_memory = max(0, machine.main_bytes - usage.rss_bytes) // placed.staged_adapter_bytes
    free = None if usage is None else int(usage.kv_cache_tokens * (1 - usage.kv_cache_used_fraction))
    return {
        "adapters": allowed if by_memory is None else min(allowed, by_memory),
        "adapters_by_setting": allowed,
        "adapters_by_memory": by_memory,
        "kv_cache_tokens": free,
        "sequences": None if free is None else free // placed.chosen.context_tokens,
    }
