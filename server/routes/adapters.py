"""Adapters: upload, list, read, and the canonical files."""

from __future__ import annotations

import asyncio
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, PlainTextResponse, Response

from adapters.canonical import CONFIG_FILE, WEIGHTS_FILE
from adapters.errors import NotFound
from adapters.inspect import read_card
from adapters.limits import within
from adapters.publish import PublishContext, preview, publish
from adapters.serving import TEMPLATE_FILE
from adapters.strict_json import JsonInvalid as StrictJsonInvalid
from adapters.types import AdapterVersion, VersionStatus
from server.adapter_order import JSON_TYPE, order_bytes, put_together
from server.catalogue import all_adapters, one_adapter
from server.errors import JsonInvalid
from server.file_wire import owner_of
from server.idempotency import idempotent
from server.receiving import pieces_of, whole
from server.resolve import name_to_make, own_name, refuse_base_name
from server.services import Caller, Services, caller_of
from server.uploaded import serving_of
from server.uploads import Upload, UploadLimits, receive_upload
from server.wire import VersionNumber, adapter_row, listing, version_row

MAX_WAIT_SECONDS = 600.0
MAX_EVENT = 2**63 - 1
SHOWN_ONLY = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; sandbox",
    "x-content-type-options": "nosniff",
}
FILES = {CONFIG_FILE: "application/json", WEIGHTS_FILE: "application/octet-stream"}


def router(services: Services) -> APIRouter:
    routes = APIRouter(prefix="/v1/adapters", tags=["adapters"])

    @routes.post("", status_code=201, summary="Upload an adapter: multipart parts name, config, weights and more")
    async def upload(
        request: Request,
        wait: float = Query(0.0, ge=0, le=MAX_WAIT_SECONDS),
        dry_run: bool = Query(False, description="Check only: nothing is stored, and a refusal leaves no row"),
    ) -> JSONResponse:
        caller = caller_of(request)
        folder = await asyncio.to_thread(services.store.stage)
        try:
            found = await receive(services, request, folder)
            if dry_run:
                return JSONResponse(await tried(services, caller, found, folder))

            async def act() -> tuple[int, dict[str, Any]]:
                return await take(services, caller, found, folder)

            status, body = await idempotent(services, request, found.fingerprint, act)
        finally:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
        if wait:
            version = await asyncio.to_thread(
                services.registry.get, caller.tenant, str(body["name"]), int(body["version"])
            )
            body = await shown(services, await services.prover.wait(version, wait))
        return JSONResponse(body, status_code=status)

    @routes.get("", summary="Every adapter, with its aliases and its versions' statuses")
    async def list_adapters(request: Request) -> dict[str, Any]:
        found = await all_adapters(services.registry, caller_of(request))
        return listing([adapter_row(services, adapter, is_short=True) for adapter in found])

    @routes.get("/{name}", summary="One adapter with its versions")
    async def read_adapter(request: Request, name: str) -> dict[str, Any]:
        caller = caller_of(request)
        return adapter_row(services, await one_adapter(services.registry, caller.tenant, own_name(caller, name)))

    @routes.get("/{name}/versions", summary="The versions of one adapter, newest first")
    async def list_versions(request: Request, name: str) -> dict[str, Any]:
        caller = caller_of(request)
        found = await one_adapter(services.registry, caller.tenant, own_name(caller, name))
        return listing(adapter_row(services, found)["versions"])

    @routes.get(
        "/{name}/versions/{number}", summary="One version, with its card; wait for its proof with ?wait=SECONDS"
    )
    async def read_version(
        request: Request, name: str, number: VersionNumber, wait: float = Query(0.0, ge=0, le=MAX_WAIT_SECONDS)
    ) -> dict[str, Any]:
        version = await own_version(services, request, name, number)
        if wait:
            version = await services.prover.wait(version, wait)
        return {**await shown(services, version), "card": version.card}

    @routes.get(
        "/{name}/versions/{number}/card",
        summary="What the uploader says of the version: as JSON, a page, or the Hub's README.md",
        responses={200: {"content": {kind: {"schema": {"type": "string"}} for kind in ("text/html", "text/markdown")}}},
    )
    async def read_version_card(
        request: Request,
        name: str,
        number: VersionNumber,
        form: Literal["json", "html", "readme"] = Query("json", alias="format"),
    ) -> Response:
        version = await own_version(services, request, name, number)
        if version.card is None:
            raise NotFound(f"{version.ref} came without a card.")
        return await asyncio.to_thread(card_as, form, version.card)

    @routes.get(
        "/{name}/versions/{number}/files/{file}", summary="A canonical file of the version, or its chat template"
    )
    async def read_file(request: Request, name: str, number: VersionNumber, file: str) -> Response:
        version = await own_version(services, request, name, number)
        if file == TEMPLATE_FILE and version.chat_template is not None:
            return PlainTextResponse(version.chat_template)
        path = file_path(services, version, file)
        return FileResponse(path, media_type=FILES[file], filename=file, headers={"etag": f'"{version.digest}"'})

    @routes.get("/{name}/events", summary="What happened to the adapter, newest first; go on with ?before=ID")
    async def read_events(
        request: Request,
        name: str,
        before: int | None = Query(None, ge=1, le=MAX_EVENT),
        limit: int = Query(100, ge=1, le=1000),
    ) -> dict[str, Any]:
        caller = caller_of(request)
        await asyncio.to_thread(services.registry.versions, caller.tenant, own_name(caller, name))
        found = await asyncio.to_thread(
            lambda: services.registry.events(caller.tenant, name, before=before, limit=limit)
        )
        return listing([event.as_dict() for event in found])

    return routes


def card_as(form: str, card: dict[str, Any]) -> Response:
    """A card in one of its forms. It is the uploader's claim: a browser may do nothing with it but show it."""
    if form == "html":
        from training.card_page import card_html

        return HTMLResponse(card_html(card), headers=SHOWN_ONLY)
    if form == "readme":
        from training.card_readme import readme

        return PlainTextResponse(readme(card), media_type="text/markdown", headers=SHOWN_ONLY)
    return JSONResponse(card)


async def own_version(services: Services, request: Request, name: str, number: int) -> AdapterVersion:
    """One version of the caller's tenant; raises ModelNotFound."""
    caller = caller_of(request)
    return await asyncio.to_thread(services.registry.get, caller.tenant, own_name(caller, name), number)


async def receive(services: Services, request: Request, folder: Path) -> Upload:
    settings = services.settings
    quota = (await services.keyring.limits_of(caller_of(request).tenant)).stored_bytes
    limits = UploadLimits(within(settings.max_weights_bytes, quota), settings.max_config_bytes)
    pieces, content_type = pieces_of(request, settings.body_seconds), request.headers.get("content-type", "")
    if content_type.partition(";")[0].strip().lower() == JSON_TYPE:
        owner, raw = owner_of(caller_of(request)), await whole(pieces, order_bytes(limits))
        async with services.bulk:
            upload = await asyncio.to_thread(put_together, services.files, owner, raw, folder, limits)
    else:
        upload = await receive_upload(pieces, content_type, folder, limits)
    refuse_base_name(services, upload.name)
    name_to_make(caller_of(request), upload.name)
    return upload


async def take(services: Services, caller: Caller, upload: Upload, folder: Path) -> tuple[int, dict[str, Any]]:
    """Check, store and register the upload, and have it proven; 200 where the same bytes were there already."""
    context, card = await context_of(services, caller, upload, folder)
    version = await asyncio.to_thread(
        lambda: publish(folder, upload.name, context=context, card=card, base_is_served=upload.is_base_served)
    )
    if version.status is VersionStatus.QUARANTINED:
        await services.prover.take(version)
    return 201 if version.is_new else 200, await shown(services, version)


async def tried(services: Services, caller: Caller, upload: Upload, folder: Path) -> dict[str, Any]:
    """What the upload would become; raises AdapterRefused as the upload itself would."""
    context, card = await context_of(services, caller, upload, folder)
    found = await asyncio.to_thread(
        lambda: preview(folder, context=context, card=card, base_is_served=upload.is_base_served)
    )
    return {"object": "adapter.check", "name": upload.name, **found}


async def context_of(
    services: Services, caller: Caller, upload: Upload, folder: Path
) -> tuple[PublishContext, dict[str, Any] | None]:
    """What publishing needs to know of the upload: where it goes and how it is served, and its card."""
    context = await services.publish_context(caller)
    card = await asyncio.to_thread(card_of, folder)
    is_allowed = services.settings.allow_chat_templates
    serving = await asyncio.to_thread(serving_of, upload, services.base, card, allows_templates=is_allowed)
    return replace(context, serving=serving), card


def card_of(folder: Path) -> dict[str, Any] | None:
    try:
        return read_card(folder)
    except StrictJsonInvalid as error:
        raise JsonInvalid(f"card.json {error}.", param="card") from None


async def shown(services: Services, version: AdapterVersion) -> dict[str, Any]:
    """A version's row as it is now."""
    aliases = await asyncio.to_thread(services.registry.aliases, version.tenant, version.name)
    return version_row(services, version, aliases)


def file_path(services: Services, version: AdapterVersion, file: str) -> Path:
    """Where a canonical file of the version lies; the name is one of two, never a path of the client's."""
    if file not in FILES:
        raise NotFound(f"The files of a version are {', '.join(FILES)}, and {TEMPLATE_FILE} where it has its own.")
    if version.digest is None or version.status is VersionStatus.RETIRED:
        raise NotFound(f"{version.ref} has no files.")
    path = services.store.folder(version.digest) / file
    if not path.is_file():
        raise NotFound(f"{version.ref} has no files.")
    return path
