"""How the server is: alive, ready, its metrics, and what is in memory."""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any

import psutil
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from adapters.chat_template import base_template, template_digest
from adapters.errors import EngineUnavailable
from adapters.types import VersionStatus
from server.errors import to_wire
from server.metrics import CONTENT_TYPE, passed_on
from server.resolve import Target
from server.restoring import key_of
from server.services import Caller, Services, caller_of
from server.sizing.served import served_sizing
from server.wire import version_row


def router(services: Services) -> APIRouter:
    routes = APIRouter(tags=["operations"])
    started_at = time.time()

    @routes.get("/health", summary="The process answers")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @routes.get("/ready", summary="The engine answers and the warm set is back; 503 until then")
    async def ready() -> JSONResponse:
        if services.lifecycle.is_ready(services):
            return JSONResponse({"status": "ready"})
        failure = services.lifecycle.failure or EngineUnavailable(services.lifecycle.why_not(services))
        wire = to_wire(EngineUnavailable(failure.message))
        return JSONResponse(wire.body, status_code=503, headers=wire.headers)

    @routes.get("/metrics", summary="Prometheus metrics: ours, then the engine's own")
    async def metrics() -> Response:
        services.metrics.engine_ready.set(services.lifecycle.is_ready(services))
        services.metrics.show_memory(await services.memory.read())
        await count_stored(services)
        body = services.metrics.render() + passed_on(await services.proxy.metrics())
        return Response(body, media_type=CONTENT_TYPE)

    @routes.get("/v1/system", summary="Engine, memory, slots, and every adapter's place in them")
    async def system(request: Request) -> dict[str, Any]:
        caller = caller_of(request)
        return {
            "object": "system",
            "status": "ready" if services.lifecycle.is_ready(services) else "not_ready",
            "pid": os.getpid(),
            "started_at": int(started_at),
            "base": {"id": services.base.id, "digest": services.base.digest},
            "chat_template": await asyncio.to_thread(template_row, services),
            "merge_base": services.merge_base.id if services.merge_base else None,
            "merge_base_folder": await merge_base_folder(services),
            "engine": await engine_row(services),
            "memory": await memory_row(services),
            "sizing": await sizing_row(services),
            "requests": {
                "running": services.door.admission.running,
                "queued": services.door.admission.waiting,
            },
            "adapters": await place_rows(services, caller),
        }

    return routes


def template_row(services: Services) -> dict[str, Any]:
    """The base's chat template by its digest, and whether a version may bring another."""
    template = base_template(services.base.folder)
    digest = template_digest(template) if template else None
    return {"digest": digest, "is_allowed": services.settings.allow_chat_templates}


async def merge_base_folder(services: Services) -> str | None:
    """Where exports on this machine find their base. Told only without keys: every caller is on this machine then."""
    return str((services.merge_base or services.base).folder) if await services.keyring.is_open() else None


async def engine_row(services: Services) -> dict[str, Any]:
    settings = services.settings
    row: dict[str, Any] = {
        "is_ready": services.engine.is_ready(),
        "slots": services.door.admission.limits.slots,
        "staged_limit": settings.staged_limit,
        "max_rank": settings.max_rank,
        "start_phases_seconds": dict(services.engine.phases),
    }
    try:
        capacity = await services.engine.capacity()
        usage = await services.engine.usage()
    except EngineUnavailable:
        return row
    return row | {
        "slots": capacity.slots,
        "staged_limit": capacity.staged_limit,
        "max_rank": capacity.max_rank,
        "dtype": capacity.dtype,
        "context_length_tokens": capacity.context_length_tokens,
        "engine_version": capacity.engine_version,
        "lora_kernel": usage.lora_kernel,
        "is_staging": usage.is_staging,
    }


async def memory_row(services: Services) -> dict[str, Any]:
    """What is computed beside what is measured, and what the engine itself says of its parts."""
    plan = services.memory.outlook.plan
    row: dict[str, Any] = {
        "server_rss_bytes": psutil.Process().memory_info().rss,
        "sequence_bytes": plan.sequence_bytes if plan else None,
        "stage_most_bytes": plan.stage_most_bytes if plan else None,
        "places": [
            {
                "place": found.place,
                "computed": dict(found.parts),
                "unknown": list(found.unknown),
                "computed_bytes": found.computed_bytes,
                "process_bytes": found.process_bytes,
                "unaccounted_bytes": found.unaccounted_bytes,
                "limit_bytes": found.limit_bytes,
                "is_of_all_processes": found.is_of_all_processes,
            }
            for found in await services.memory.read()
        ],
    }
    try:
        usage = await services.engine.usage()
    except EngineUnavailable:
        return row
    return row | {
        "engine_rss_bytes": usage.rss_bytes,
        "weights_bytes": usage.weights_bytes,
        "slot_bytes": usage.slot_bytes,
        "packed_bytes": usage.packed_bytes,
        "kv_cache_bytes": usage.kv_cache_bytes,
        "kv_cache_used_fraction": usage.kv_cache_used_fraction,
        "stage_bytes": usage.stage_bytes,
    }


async def sizing_row(services: Services) -> dict[str, Any] | None:
    """Predicted beside reported, what still fits, and what would be recommended; None where no model is loaded."""
    outlook = services.memory.outlook
    if outlook.plan is None:
        return None
    staged = [(row.version.rank or 0, row.version.size_bytes) for row in services.residents.rows()]
    try:
        usage = await services.engine.usage()
    except EngineUnavailable:
        usage = None
    return await asyncio.to_thread(served_sizing, services.base, outlook.plan, outlook.machine, staged, usage)


async def place_rows(services: Services, caller: Caller) -> list[dict[str, Any]]:
    """Per version: `absent`, `staged` in the engine's main memory, or `resident` in a slot; and its bytes."""
    try:
        in_slot = {row.engine_name for row in await services.engine.loaded() if row.is_in_slot}
    except EngineUnavailable:
        in_slot = set()
    residents = {
        (row.version.name, row.version.number): row
        for row in services.residents.rows()
        if row.version.tenant == caller.tenant
    }
    left_out = services.residents.left_out()
    rows = []
    for version in await asyncio.to_thread(services.registry.all_versions, caller.tenant):
        if not caller.may_touch(version.name):
            continue
        resident = residents.get((version.name, version.number))
        trouble = left_out.get(key_of(version)) if version.is_warm else None
        place = "absent" if resident is None else "resident" if resident.engine_name in in_slot else "staged"
        place = "merged" if resident is not None and services.merged is not None else place
        short = {
            key: version_row(services, version)[key]
            for key in ("id", "status", "residency", "is_warm", "rank", "size_bytes")
        }
        rows.append(
            {
                **short,
                "place": place,
                "why_not_back": {"code": trouble.wire_code, "message": trouble.message} if trouble else None,
                "references": resident.references if resident else 0,
                "load_seconds": resident.load_seconds if resident else None,
            }
        )
    return rows


async def count_stored(services: Services) -> None:
    """Set the gauges of what the registry holds, and let the labels of retired versions go."""
    metrics, registry = services.metrics, services.registry
    versions, stored, exports = await asyncio.to_thread(
        lambda: (registry.all_versions(), registry.stored_files(), registry.stored_exports())
    )
    for status in VersionStatus:
        sizes = [version.size_bytes for version in versions if version.status is status]
        metrics.versions.labels(status).set(len(sizes))
        metrics.version_bytes.labels(status).set(sum(sizes))
    for row in stored:
        metrics.files.labels(row.purpose).set(row.files)
        metrics.file_bytes.labels(row.purpose).set(row.file_bytes)
        metrics.open_uploads.labels(row.purpose).set(row.open_uploads)
        metrics.upload_bytes.labels(row.purpose).set(row.upload_bytes)
    metrics.exports.labels("queued").set(exports.queued)
    metrics.exports.labels("running").set(exports.running)
    metrics.export_bytes.set(exports.result_bytes)
    gone = {Target(version.ref, version).label for version in versions if version.status is VersionStatus.RETIRED}
    metrics.retired(gone, time.monotonic())
