"""The sources of one server: what is known of each, which of them a path lies in, and how one adapter is pulled.

A pull ends in the same `publish` as an upload, so its checks, limits and quota are the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import structlog

from adapters.errors import (
    AdapterRefused,
    Conflict,
    HotshoeError,
    InvalidRequest,
    PayloadTooLarge,
    SourceChanged,
)
from adapters.limits import within
from adapters.publish import publish
from adapters.sources.found import Found, Source, check_fetchable
from adapters.sources.pulls import Origin, Pulled
from adapters.types import AdapterVersion, VersionStatus
from server.errors import Forbidden
from server.resolve import refuse_base_name
from server.source_settings import SourceSettings, open_source

if TYPE_CHECKING:
    from server.services import Caller, Services
    from server.settings import Settings

log = structlog.get_logger("hotshoe.sources")
SETTING = "HOTSHOE_SOURCES"
FETCHES_AT_A_TIME = 2  # from one source, however many ask
T = TypeVar("T")


@dataclass(slots=True)
class Seen:
    """What became of one adapter of a source when it was last looked at."""

    name: str
    location: str
    fingerprint: str
    state: str  # taken | refused | waiting (still being written) | failed (to be tried again)
    version: str | None = None
    code: str | None = None
    message: str | None = None
    at: float = field(default_factory=time.time)
    attempts: int = 0
    retry_at: float = 0.0  # monotonic seconds

    def is_done(self, found: Found) -> bool:
        """Nothing is to be done about what was found now."""
        if self.fingerprint != found.fingerprint:
            return False
        return self.state in ("taken", "refused") or (self.state == "failed" and time.monotonic() < self.retry_at)


@dataclass
class WatchedSource:
    """One source with what is known of it. `error` is why the last look failed."""

    settings: SourceSettings
    source: Source
    seen: dict[str, Seen] = field(default_factory=dict)
    error: HotshoeError | None = None
    looked_at: float | None = None
    failures: int = 0
    before: Mapping[tuple[str, str], Pulled] | None = None  # what earlier runs pulled; None until it was read
    places: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(FETCHES_AT_A_TIME))


@dataclass(frozen=True, slots=True)
class Pull:
    """One adapter that is to become a version: where it lies, as which name, and who wants it."""

    watched: WatchedSource
    found: Found
    name: str
    caller: Caller
    is_base_served: bool = False


def open_sources(settings: Settings) -> tuple[WatchedSource, ...]:
    """One for each entry of the setting; raises ConfigInvalid, InvalidRequest."""
    return tuple(WatchedSource(one, open_source(one)) for one in settings.sources)


def locate(services: Services, caller: Caller, text: str) -> tuple[WatchedSource, str]:
    """The source of the caller's tenant that a path or URL lies in, and where in it.

    Raises Forbidden for what is in none of them, whether or not it exists.
    """
    for watched in services.sources:
        if watched.settings.tenant == caller.tenant:
            inner = watched.source.inner(text)
            if inner is not None:
                return watched, inner
    raise Forbidden(
        f"That is in no source that the operator allows for this tenant: {SETTING} lists them (docs/sources.md).",
        param="source",
    )


async def pull(services: Services, wanted: Pull) -> AdapterVersion:
    """Fetch, check and publish it, and have it proven; raises what an upload of the same files would raise."""
    source = wanted.watched.settings.name
    try:
        version = await with_files(services, wanted, lambda folder: _published(services, wanted, folder))
    except HotshoeError as error:
        services.metrics.source_pulls.labels(source, state_after(error)).inc()
        raise
    services.metrics.source_pulls.labels(source, "new" if version.is_new else "same").inc()
    log.info("adapter pulled", source=source, model=version.ref, is_new=version.is_new)
    if version.status is VersionStatus.QUARANTINED:
        await services.prover.take(version)
    return version


async def with_files(services: Services, wanted: Pull, use: Callable[[Path], Awaitable[T]]) -> T:
    """Have its files in a folder of ours while `use` runs; they are gone afterwards."""
    settings = services.settings
    refuse_base_name(services, wanted.name)
    quota = (await services.keyring.limits_of(wanted.caller.tenant)).stored_bytes
    check_fetchable(wanted.found, within(settings.max_weights_bytes, quota), settings.max_config_bytes)
    async with wanted.watched.places:
        folder = await asyncio.to_thread(services.store.stage)
        stop = threading.Event()
        try:
            await detached(lambda: wanted.watched.source.fetch(wanted.found, folder, stop))
            return await use(folder)
        finally:
            stop.set()
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)


def is_for_served_base(wanted: Pull) -> bool:
    """The caller or the operator says so, whatever the adapter's config claims."""
    return wanted.is_base_served or wanted.watched.settings.base_is == "served"


def state_after(error: HotshoeError) -> str:
    """`refused` until the files change, `waiting` while they are being written, `failed` when it may work later."""
    if isinstance(error, SourceChanged):
        return "waiting"
    is_of_the_tenant = error.param == "stored_bytes"  # its quota, not the file's size
    is_final = isinstance(error, (AdapterRefused, InvalidRequest, PayloadTooLarge, Conflict)) and not is_of_the_tenant
    return "refused" if is_final else "failed"


async def detached(work: Callable[[], T]) -> T:
    """Run it in a thread of its own that nothing waits for at the end: a network may not answer for minutes.

    When the caller is cancelled the thread goes on to its next look at its stop event, and its result is dropped.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(set_outcome: Callable[[Any], None], outcome: Any) -> None:
        if not future.done():
            set_outcome(outcome)

    def run() -> None:
        try:
            outcome: tuple[Callable[[Any], None], Any] = (future.set_result, work())
        except Exception as error:  # noqa: BLE001  whoever awaits raises it
            outcome = (future.set_exception, error)
        except BaseException as error:  # noqa: BLE001  a panic of obstore's, which must not end the loop's task
            outcome = (future.set_exception, RuntimeError(f"{type(error).__name__}: {error}"))
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(settle, *outcome)

    threading.Thread(target=run, name="hotshoe-source", daemon=True).start()
    return await future


async def _published(services: Services, wanted: Pull, folder: Path) -> AdapterVersion:
    origin = Origin.of(wanted.watched.settings.name, wanted.found, services.base.digest)
    context = replace(await services.publish_context(wanted.caller), source=origin.as_dict())
    is_served = is_for_served_base(wanted)
    return await asyncio.to_thread(lambda: publish(folder, wanted.name, context=context, base_is_served=is_served))
