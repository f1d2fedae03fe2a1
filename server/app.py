"""The service put together, from explicit lists: nothing registers itself by being imported."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import structlog
from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from adapters.bases import BaseModel
from adapters.embedded import open_base
from adapters.errors import ConfigInvalid, HotshoeError
from adapters.file_store import FileStore
from adapters.files import Files
from adapters.registry import Registry
from adapters.servable import Servable
from adapters.store import BlobStore
from server.access_log import AccessLog
from server.admission import Admission, Limits, Quantum
from server.agreement import Agreement
from server.door import Door
from server.ending import Ending
from server.engine.base import DEFAULT_SLOTS, Engine, EngineOptions
from server.engine.rundir import check_socket_path
from server.engine.vllm_flags import is_cpu_build
from server.errors import MethodNotAllowed, RouteNotFound, Unprocessable, WireError, to_wire, unexpected
from server.exports import ExportPlace, Exports
from server.file_expiry import FileExpiry
from server.gateway import Gateway
from server.holding import Holding
from server.job_room import with_reserve
from server.job_worker import JobPlace, JobWorker
from server.keyring import Keyring
from server.lifecycle import Lifecycle
from server.limits import Limiter
from server.memory_watch import MemoryWatch, Outlook, outlook_of
from server.merged import Bases, Merged, MergedResidents, prepare_merged
from server.metrics import Metrics
from server.openapi import openapi_of
from server.proving import Engaged, Prover
from server.proxy import EngineProxy
from server.residency import Residents
from server.resolve import Resolver
from server.routes import (
    adapters,
    exports,
    fine_tuning,
    gates,
    keys,
    models,
    ops,
    sources,
    tenants,
    uploads_api,
    usage,
    versions,
    vllm_compat,
)
from server.routes import files as files_api
from server.served import ServedProbe
from server.services import Caller, Services
from server.settings import MOST_RUNNING, RUNNING_PER_CORE, Settings, pepper_of
from server.source_sync import SourceSync
from server.sources import open_sources
from server.usage import UsageMeter
from server.vllm_plugin import turns
from server.vllm_plugin.kernel_build import is_kernel_there
from server.warm_ahead import WarmAhead
from server.warm_schedule import WarmSchedule

log = structlog.get_logger("hotshoe.app")

ROUTERS: tuple[Callable[[Services], APIRouter], ...] = (
    models.router,
    adapters.router,
    versions.router,
    gates.router,
    sources.router,
    vllm_compat.router,
    files_api.router,
    uploads_api.router,
    exports.router,
    fine_tuning.router,
    usage.router,
    keys.router,
    tenants.router,
    ops.router,
)


def create_app(settings: Settings, services: Services | None = None) -> Gateway:
    """The ASGI app of one server. Its lifespan starts and stops the engine and all that goes with it."""
    parts = services or build_services(settings)
    access_log = AccessLog(settings.access_log, parts.metrics.lost_lines.inc)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await parts.lifecycle.start(parts)
        try:
            yield
        finally:
            await parts.lifecycle.stop(parts)
            access_log.close()

    app = FastAPI(title="Hotshoe", lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False)
    for router in ROUTERS:
        app.include_router(router(parts))
    app.openapi = functools.cache(lambda: openapi_of(app))  # type: ignore[method-assign]
    app.exception_handler(HotshoeError)(_on_ours)
    app.exception_handler(RequestValidationError)(_on_validation)
    app.exception_handler(HTTPException)(_on_http)
    return Gateway(app, parts, access_log)


def build_services(settings: Settings, engine: Engine | None = None) -> Services:
    """Everything a server works with; opens the registry, starts nothing. An engine that is given is used as it is."""
    merge_base = open_base(settings.merge_base) if settings.merge_base else None
    family = (merge_base.id, *merge_base.names, merge_base.digest) if merge_base is not None else ()
    base = open_base(settings.base, (*settings.base_names, *family))
    fitted = fitting_engine(settings, base, engine) if settings.merged is None else None
    registry = Registry.open(settings.home)
    if (upgrade := registry.upgrade) is not None:
        log.warning("state upgraded", schema=upgrade.to_schema, before=upgrade.from_schema, copy=str(upgrade.backup))
    store = BlobStore(settings.home / "blobs")
    store.sweep(keep=registry.digests_in_use())
    servable = Servable(base.digest, base.id, settings.max_rank, registry.bases())
    merged = None
    if fitted is None:
        bases = Bases(base, merge_base or base, settings.dtype)
        merged = prepare_merged(settings.merged or "", bases, registry, store, servable)
        servable.merged = merged.version
        fitted = fitting_engine(settings, base, engine, merged)
    engine, outlook = fitted
    files = Files(registry, FileStore(settings.home / "files"))
    files.sweep()
    metrics = Metrics(settings.label_limit)
    proxy = EngineProxy(engine.socket_path)
    parts = (engine, registry, store, metrics, settings.staged_limit, servable, frozenset(settings.pinned))
    residents = MergedResidents(merged.version, *parts) if merged else Residents(*parts)
    door = Door(Admission(limits_of(settings)), metrics, settings.queue_seconds)
    residents.near, residents.on_loaded = door.near, door.loaded
    served = ServedProbe(residents, proxy, base.digest)
    agreement = Agreement(registry, store, merge_base or base, served, settings.compare_with_peft)
    engaged = Engaged(
        engine=engine,
        registry=registry,
        residents=residents,
        complete=proxy.complete,
        metrics=metrics,
        servable=servable,
        tolerance=settings.probe_tolerance,
        holding=Holding(store, base, settings.max_update_ratio),
        folder_of=store.folder,
        ending=Ending(proxy.ask, settings.probe_answer_tokens, settings.allow_chat_templates),
        on_ready=agreement.submit,
    )
    prover = Prover(engaged)
    residents.vet = prover.vet
    kept = ExportPlace(
        registry=registry,
        store=store,
        home=settings.home,
        keep_seconds=settings.export_days * 86_400 or None,
        keep_rows=settings.max_export_rows,
        on_end=lambda outcome: metrics.export_runs.labels(outcome).inc(),
    )
    jobs = Exports(kept, base, merge_base, served)
    place = JobPlace(
        registry=registry,
        files=files,
        store=store,
        base=merge_base or base,
        home=settings.home,
        prover=prover,
        context_for=lambda tenant, actor: services.publish_context(Caller(tenant, actor)),
        promote=lambda job, version, alias: versions.move(
            services, Caller(job.tenant, job.actor), (version.name, alias), version.number, None, job
        ),
        stop_seconds=settings.grace_seconds,
        memory_bytes=settings.job_memory_bytes,
        gpu_memory_bytes=settings.job_gpu_memory_bytes,
        checkpoint_seconds=settings.job_checkpoint_days * 86_400,
        wandb=wandb_variables(settings),
    )
    worker = JobWorker(place)
    operator_key = settings.api_key.get_secret_value() if settings.api_key else None
    meter = UsageMeter(registry)
    services = Services(
        settings=settings,
        base=base,
        merge_base=merge_base,
        registry=registry,
        store=store,
        engine=engine,
        proxy=proxy,
        door=door,
        resolver=Resolver(registry),
        residents=residents,
        servable=servable,
        prover=prover,
        metrics=metrics,
        lifecycle=Lifecycle(),
        exports=jobs,
        jobs=worker,
        keyring=Keyring(registry, pepper_of(settings), operator_key),
        limiter=Limiter(),
        usage=meter,
        files=files,
        memory=MemoryWatch(outlook, engine, residents),
        merged=merged,
        sources=open_sources(settings),
        workers=[*([merged] if merged else ()), jobs, worker, meter, FileExpiry(files), agreement],
    )
    services.warm_ahead = WarmAhead(services)
    services.workers += [SourceSync(services), services.warm_ahead, WarmSchedule(services)]
    return services


def slots_of(settings: Settings) -> int:
    """Adapters that may answer at the same time: where slots take no memory, as many as may be loaded."""
    if settings.slots is not None:
        return settings.slots
    are_free = _is_vllm_on_cpu(settings) and is_kernel_there()
    return settings.staged_limit if are_free else min(DEFAULT_SLOTS, settings.staged_limit)


def running_of(settings: Settings) -> int:
    """Requests at the engine: on a CPU no more than make it faster, as a step takes longer with each of them."""
    if settings.max_running is not None:
        return settings.max_running
    if not _is_vllm_on_cpu(settings):
        return MOST_RUNNING
    return min(MOST_RUNNING, RUNNING_PER_CORE * len(os.sched_getaffinity(0)))


def spare_of(settings: Settings) -> int:
    """Places beyond, which cost the others little where the engine shares its steps among tenants."""
    if settings.spare_running is not None:
        return settings.spare_running
    return running_of(settings) if _is_vllm_on_cpu(settings) and turns.is_wanted() else 0


def _is_vllm_on_cpu(settings: Settings) -> bool:
    return settings.engine == "vllm" and is_cpu_build()


def limits_of(settings: Settings) -> Limits:
    """What the settings say of places and slots."""
    return Limits(
        slots=slots_of(settings),
        max_running=running_of(settings),
        max_queued=settings.max_queued,
        patience_seconds=settings.patience_seconds,
        max_adapter_queued=settings.max_adapter_queued,
        quantum=Quantum(settings.quantum_loads, settings.quantum_floor_seconds, settings.quantum_ceiling_seconds),
        tenant_weights=settings.tenant_weights,
        spare=spare_of(settings),
    )


def wandb_variables(settings: Settings) -> dict[str, str]:
    """What the processes of jobs that report to Weights & Biases get of the server's, and no other process."""
    named = {"WANDB_BASE_URL": settings.wandb_base_url, "WANDB_MODE": os.environ.get("WANDB_MODE")}
    if settings.wandb_api_key is not None:
        named["WANDB_API_KEY"] = settings.wandb_api_key.get_secret_value()
    return {name: value for name, value in named.items() if value}


def fitting_engine(
    settings: Settings, base: BaseModel, given: Engine | None, merged: Merged | None = None
) -> tuple[Engine, Outlook]:
    """The engine, the given one or the settings', and what its memory goes to; raises ConfigInvalid without room."""
    engine = given or build_engine(settings, base, merged)
    return engine, outlook_of(engine, merged.base if merged else base)


def build_engine(settings: Settings, base: BaseModel, merged: Merged | None = None) -> Engine:
    """The engine that the settings name, not started."""
    options = EngineOptions(
        base_folder=merged.base.folder if merged else base.folder,
        base_id=merged.engine_name if merged else base.id,
        run_dir=run_dir_of(settings.home),
        slots=0 if merged else slots_of(settings),
        max_rank=settings.max_rank,
        staged_limit=settings.staged_limit,
        dtype=settings.dtype,
        context_length_tokens=settings.context_length_tokens,
        kv_cache_bytes=settings.kv_cache_bytes,
        takes_templates=settings.allow_chat_templates,
        extra_args=with_reserve(settings.engine_args, settings.job_gpu_memory_bytes),
        log_path=settings.home / "engine.log",
    )
    return _engine_class(settings.engine)(options)


def run_dir_of(home: Path) -> Path:
    """The engine's private folder: in the state folder, or a temporary one where its path would be too long."""
    folder = home.absolute() / "run"
    try:
        check_socket_path(folder)
    except ConfigInvalid:
        return Path(tempfile.mkdtemp(prefix="hotshoe-"))
    return folder


def _engine_class(name: str) -> Callable[[EngineOptions], Engine]:
    if name == "scripted":
        from server.engine.scripted import ScriptedEngine

        return ScriptedEngine
    from server.engine.vllm import VllmEngine

    return VllmEngine


async def _on_ours(request: Request, error: HotshoeError) -> JSONResponse:
    wire = to_wire(error)
    if wire.status == 500:
        log.error("request failed", code=error.code, reason=error.message)
    return _answer(wire)


async def _on_validation(request: Request, error: RequestValidationError) -> JSONResponse:
    """Which field, and what is wrong with it; never the value that was sent."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"][1:]) or str(first["loc"][0])
    if first["type"] == "json_invalid":
        where = "body"
    return _answer(to_wire(Unprocessable(f"{where}: {first['msg']}.", param=where)))


async def _on_http(request: Request, error: HTTPException) -> JSONResponse:
    if error.status_code == 404:
        return _answer(to_wire(RouteNotFound("There is no such path here; docs/http.md lists the routes.")))
    if error.status_code == 405:
        return _answer(to_wire(MethodNotAllowed("The path exists, with other methods.")))
    if error.status_code < 500:
        return _answer(to_wire(Unprocessable("The request cannot be read.")))
    return _answer(unexpected())


def _answer(wire: WireError) -> JSONResponse:
    return JSONResponse(wire.body, status_code=wire.status, headers=wire.headers)
