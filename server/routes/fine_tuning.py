"""Fine-tuning jobs, as OpenAI's client calls them: create, watch, cancel, pause, resume."""

from __future__ import annotations

import asyncio
import importlib.util
import shutil
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, StreamingResponse

from adapters.canonical import CONFIG_FILE, WEIGHTS_FILE
from adapters.errors import Conflict, InvalidRequest, NotFound
from adapters.file_rows import FINE_TUNE
from adapters.job_history import JobCheckpoint, event_number, no_job
from adapters.job_rows import JobRow
from adapters.paging import Page
from adapters.publish import publish
from adapters.store import disk_error
from adapters.types import AdapterVersion, VersionStatus
from server.file_wire import owner_of
from server.idempotency import idempotent
from server.job_order import JobBody, check_settings, check_texts, order_of
from server.job_wire import (
    CheckpointList,
    EventList,
    Job,
    JobList,
    checkpoint_of,
    event_of,
    job_of,
)
from server.job_worker import check_base
from server.resolve import find_version, name_to_make, refuse_base_name
from server.room import size
from server.routes.adapters import shown as version_shown
from server.services import Caller, Services, caller_of
from server.stream import DONE
from server.wire import After, Limit

METADATA = "metadata["
LOOK_SECONDS, KEEP_ALIVE_SECONDS = 0.5, 15.0


def router(services: Services) -> APIRouter:
    routes = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["fine-tuning"])
    registry = services.registry

    @routes.post("", summary="Train an adapter of a file that was sent, and serve it", response_model=Job)
    async def create(request: Request, body: JobBody) -> JSONResponse:
        caller = caller_of(request)
        check_texts(body)

        async def act() -> tuple[int, dict[str, Any]]:
            job = await ordered(services, caller, body)
            row = await asyncio.to_thread(registry.add_job, job)
            services.jobs.poke()
            return 200, shown(services, row).model_dump(mode="json")

        status, answer = await idempotent(services, request, body.model_dump_json(), act)
        return JSONResponse(answer, status_code=status)

    @routes.get("", summary="The jobs, newest first; go on with ?after=ID")
    async def list_jobs(request: Request, after: After = None, limit: Limit = 20) -> JobList:
        caller, wanted = caller_of(request), metadata_of(request)
        adapters = caller.key.adapters if caller.key is not None else None
        found = await asyncio.to_thread(registry.jobs, caller.tenant, Page(after, limit + 1), wanted, adapters)
        seen = [shown(services, job) for job in found[:limit]]
        return JobList(data=seen, has_more=len(found) > limit)

    @routes.get("/{job_id}", summary="One job")
    async def read(request: Request, job_id: str) -> Job:
        return shown(services, await own_job(services, caller_of(request), job_id))

    @routes.post("/{job_id}/cancel", summary="End a job for good; its checkpoints stay listed")
    async def cancel(request: Request, job_id: str) -> Job:
        return await turn(services, request, job_id, registry.cancel_job)

    @routes.post("/{job_id}/pause", summary="Let a job rest: its process saves its step and ends")
    async def pause(request: Request, job_id: str) -> Job:
        return await turn(services, request, job_id, registry.pause_job)

    @routes.post("/{job_id}/resume", summary="Go on with a job that was paused")
    async def resume(request: Request, job_id: str) -> Job:
        return await turn(services, request, job_id, registry.resume_job)

    @routes.get(
        "/{job_id}/events",
        summary="What the job said, newest first; go on with ?after=ID",
        response_model=EventList,
        responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
    )
    async def events(
        request: Request,
        job_id: str,
        after: After = None,
        limit: Limit = 20,
        stream: bool = Query(False, description="As server-sent events, oldest first, until the job ends"),
    ) -> Any:
        job = await own_job(services, caller_of(request), job_id)
        if stream:
            first = event_number(after) if after is not None else 0
            return StreamingResponse(told(services, job, first), media_type="text/event-stream")
        found = await asyncio.to_thread(registry.job_events, job.tenant, job.id, Page(after, limit + 1))
        return EventList(data=[event_of(event) for event in found[:limit]], has_more=len(found) > limit)

    @routes.get("/{job_id}/checkpoints", summary="The job's checkpoints, newest first; go on with ?after=ID")
    async def checkpoints(request: Request, job_id: str, after: After = None, limit: Limit = 10) -> CheckpointList:
        job = await own_job(services, caller_of(request), job_id)
        found = await asyncio.to_thread(registry.job_checkpoints, job.tenant, job.id, Page(after, limit + 1))
        data = [checkpoint_of(one, job) for one in found[:limit]]
        first, last = (data[0].id, data[-1].id) if data else (None, None)
        return CheckpointList(data=data, first_id=first, last_id=last, has_more=len(found) > limit)

    @routes.post("/{job_id}/checkpoints/{checkpoint_id}/publish", summary="A checkpoint's adapter as a version")
    async def publish_checkpoint(request: Request, job_id: str, checkpoint_id: str) -> dict[str, Any]:
        caller = caller_of(request)
        job = await own_job(services, caller, job_id)
        async with services.lifecycle.one_at_a_time(f"checkpoint {checkpoint_id}"):
            version = await published(services, caller, job, checkpoint_id)
        return await version_shown(services, version)

    @routes.delete("/{job_id}/checkpoints/{checkpoint_id}", summary="Remove a checkpoint's files")
    async def delete_checkpoint(request: Request, job_id: str, checkpoint_id: str) -> dict[str, Any]:
        job = await own_job(services, caller_of(request), job_id)
        found = await asyncio.to_thread(registry.get_checkpoint, job.tenant, job.id, checkpoint_id)
        async with services.lifecycle.one_at_a_time(f"checkpoint {checkpoint_id}"):
            await asyncio.to_thread(services.jobs.folders.drop, found)
        return {"id": found.id, "object": "fine_tuning.job.checkpoint", "deleted": True}

    return routes


def shown(services: Services, job: JobRow) -> Job:
    return job_of(job, is_working=services.jobs.working_on == job.id)


async def told(services: Services, job: JobRow, last: int) -> AsyncIterator[bytes]:
    """What a job says after the event of this number, as it says it, until it has ended or the server does."""
    quiet_since = time.monotonic()
    while not (services.lifecycle.is_stopping or services.lifecycle.is_leaving()):
        job = await asyncio.to_thread(services.registry.get_job, job.tenant, job.id)  # before its events are read
        for event in await asyncio.to_thread(services.registry.job_events_since, job.tenant, job.id, last):
            last, quiet_since = event.id, time.monotonic()
            yield b"data: " + event_of(event).model_dump_json().encode() + b"\n\n"
        if job.status.is_final:
            yield DONE
            return
        if time.monotonic() - quiet_since > KEEP_ALIVE_SECONDS:
            quiet_since = time.monotonic()
            yield b": still there\n\n"
        await asyncio.sleep(LOOK_SECONDS)


async def ordered(services: Services, caller: Caller, body: JobBody) -> JobRow:
    """The job that a body asks for, its files and its model there; raises InvalidRequest, NotFound, ModelNotFound."""
    job = order_of(body, caller)
    check_gpu(services)
    check_integrations(services, body)
    refuse_base_name(services, job.adapter)
    name_to_make(caller, job.adapter)
    await asyncio.to_thread(check_settings, job)
    for param in ("training_file", "validation_file"):
        await check_file(services, caller, getattr(job, param), param)
    trained_on = {**job.request, "base_digest": services.jobs.where.base.digest}
    if (body.hotshoe.rank or 0) > services.settings.max_rank:
        raise InvalidRequest(
            f"rank {body.hotshoe.rank} is above {services.settings.max_rank}, the largest that this server serves.",
            param="rank",
        )
    if job.model != services.base.id:
        parent = await parent_version(services, caller, job.model)
        if body.hotshoe.rank not in (None, parent.rank):
            raise InvalidRequest(
                f"{parent.ref} has rank {parent.rank}; a job that goes on from it keeps it.", param="rank"
            )
        trained_on["from"] = {"name": parent.name, "number": parent.number}
    return replace(job, request=trained_on)


async def parent_version(services: Services, caller: Caller, model: str) -> AdapterVersion:
    """The version to go on from; raises ModelNotFound, or InvalidRequest where it cannot be."""
    version = await find_version(services, caller, model)
    if version.tenant != caller.tenant:  # it is shared to be asked, not to be taken further
        raise InvalidRequest(f"{model} is another tenant's: a job goes on from versions of your own.", param="model")
    if version.status not in (VersionStatus.READY, VersionStatus.QUARANTINED):
        raise InvalidRequest(f"{version.ref} is {version.status}: a job cannot go on from it.", param="model")
    services.servable.check(version)
    return version


async def check_file(services: Services, caller: Caller, file_id: str | None, param: str) -> None:
    """Raises InvalidRequest where the file is not there, or was sent for something else."""
    if file_id is None:
        return
    try:
        file = await asyncio.to_thread(services.registry.get_file, owner_of(caller), file_id)
    except NotFound as error:
        raise InvalidRequest(f"There is no file {file_id!r}: send it first.", param=param) from error
    if file.purpose != FINE_TUNE:
        raise InvalidRequest(f"{file_id} was sent for {file.purpose}; send it with purpose {FINE_TUNE}.", param=param)


async def own_job(services: Services, caller: Caller, job_id: str) -> JobRow:
    """One job of the caller's tenant, of an adapter that its key may touch; raises NotFound."""
    job = await asyncio.to_thread(services.registry.get_job, caller.tenant, job_id)
    if not caller.may_touch(job.adapter):
        raise no_job(job_id)
    return job


async def turn(services: Services, request: Request, job_id: str, change: Callable[..., JobRow]) -> Job:
    """Cancel, pause or resume, and have the worker look at once."""
    caller = caller_of(request)
    job = await own_job(services, caller, job_id)
    changed = await asyncio.to_thread(lambda: change(job.tenant, job.id, actor=caller.actor))
    services.jobs.poke()
    return shown(services, changed)


async def published(services: Services, caller: Caller, job: JobRow, checkpoint_id: str) -> AdapterVersion:
    """The checkpoint's version, made and on its way to be proven, or the one that is there already."""
    registry = services.registry
    checkpoint = await asyncio.to_thread(registry.get_checkpoint, job.tenant, job.id, checkpoint_id)
    if checkpoint.number is not None:
        return await asyncio.to_thread(registry.get, job.tenant, job.adapter, checkpoint.number)
    name_to_make(caller, job.adapter)
    check_base(job, services.jobs.where.base)
    source = await asyncio.to_thread(services.jobs.folders.checkpoint, checkpoint)
    context, card = await services.publish_context(caller), checkpoint_card(job, checkpoint)
    staged = await asyncio.to_thread(services.store.stage)
    try:
        try:
            for name in (CONFIG_FILE, WEIGHTS_FILE):
                await asyncio.to_thread(shutil.copyfile, source / name, staged / name)
        except FileNotFoundError:  # a newer one has just taken its place
            raise services.jobs.folders.gone(checkpoint) from None
        except OSError as error:
            raise disk_error(error, staged) from error
        version = await asyncio.to_thread(lambda: publish(staged, job.adapter, context=context, card=card))
    finally:
        await asyncio.to_thread(shutil.rmtree, staged, ignore_errors=True)
    await asyncio.to_thread(registry.name_checkpoint, checkpoint, version.number)
    if version.status is VersionStatus.QUARANTINED:
        await services.prover.take(version)
    return version


def checkpoint_card(job: JobRow, checkpoint: JobCheckpoint) -> dict[str, Any]:
    """What is known of an adapter whose run had not ended: where it comes from, and its losses then."""
    return {
        "name": job.adapter,
        "base": {"digest": job.request["base_digest"]},
        "settings": dict(job.settings or {}),
        "checkpoint": {"job": job.id, "id": checkpoint.id, "step": checkpoint.step, **checkpoint.metrics},
    }


def check_gpu(services: Services) -> None:
    """Raises Conflict where jobs would take the memory of a GPU that the engine has planned for itself."""
    outlook, settings = services.memory.outlook, services.settings
    if outlook.plan is None or outlook.plan.layout.is_cpu or settings.job_gpu_memory_bytes is not None:
        return
    share, total = outlook.plan.layout.memory_fraction, outlook.machine.gpu_bytes
    figures = f" ({share:.0%} of {size(total)})" if share is not None and total is not None else ""
    raise Conflict(
        f"The engine takes the GPU's memory for serving{figures} and nothing is kept for training: have the operator "
        "start the server with HOTSHOE_JOB_GPU_MEMORY_BYTES; `hotshoe plan` says how much a run needs."
    )


def check_integrations(services: Services, body: JobBody) -> None:
    """Raises InvalidRequest where the server cannot report where the job asks it to."""
    if not body.integrations:
        return
    key = services.settings.wandb_api_key
    if key is None or not key.get_secret_value():
        how = "have the operator set HOTSHOE_WANDB_API_KEY"
    elif importlib.util.find_spec("wandb") is None:
        how = "have the operator install it (`pip install wandb`)"
    else:
        return
    raise InvalidRequest(
        f"This server does not report to Weights & Biases: {how}, or leave integrations out.", param="integrations"
    )


def metadata_of(request: Request) -> dict[str, str]:
    """`metadata[KEY]=VALUE`, as the client sends what it looks for."""
    found = {key: value for key, value in request.query_params.multi_items() if key.startswith(METADATA)}
    return {key.removeprefix(METADATA).removesuffix("]"): value for key, value in found.items()}
