"""Export jobs: orders in the registry, worked off one at a time by a niced child process that dies with the server.

Orders of one tenant that would give the same files are one piece of work (`adapters/export_rows.py`). What ran when the
server ended is queued again at the next start, and goes on with the weight files that were finished.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import structlog

from adapters.errors import BaseMismatch, Conflict, HotshoeError, NotFound, StorageDamaged, StorageFull
from adapters.export import check_order
from adapters.export_request import HF
from adapters.export_rows import ExportEnd, ExportRow, ExportStatus, NewExport
from adapters.types import AdapterRef, AdapterVersion
from server.export_order import ExportOrder, check_bases, check_unchanged, estimated_bytes, order_of, result_of
from server.export_results import Results
from server.export_run import ExportRun, ProcessKilled, failed
from server.tasks import at_most, end_tasks, insist

if TYPE_CHECKING:
    from adapters.bases import BaseModel
    from adapters.registry import Registry
    from adapters.store import BlobStore

T = TypeVar("T")
log = structlog.get_logger("hotshoe.exports")
AskServed = Callable[[AdapterVersion], Awaitable[list[dict[str, Any]]]]  # the engine's answers to the parity probe
NICE = 10
MOST_DEATHS = 3  # of one export's process, killed without a word; then it has failed
PUT_OFF_SECONDS = 5.0  # after something that may go better later: a full disk, say
SWEEP_SECONDS = 60.0  # between two looks at what is over
STOP_SECONDS = 5.0  # for the registry to take an export back when the server stops


@dataclass(frozen=True, slots=True)
class ExportPlace:
    """Where exports are kept: their rows, the adapters' files, and the state folder for what they make.

    `keep_seconds` is how long results stay, None for as long as nobody deletes them; `keep_rows` how many of a tenant's
    exports that have ended are kept, None for all; `on_end` hears how work ended.
    """

    registry: Registry
    store: BlobStore
    home: Path
    keep_seconds: float | None = None
    keep_rows: int | None = None
    on_end: Callable[[str], None] = lambda _: None


class Exports:
    """The queue and its worker. Results lie in `home`/exports until their time is over or their orders are deleted."""

    def __init__(self, where: ExportPlace, base: BaseModel, merge_base: BaseModel | None, ask: AskServed) -> None:
        self.where = where
        self.registry = where.registry
        self.store = where.store
        self.results = Results(where.home / "exports")
        self.served_base = base
        self.merge_base = merge_base or base
        self.ask = ask
        self._poked = asyncio.Event()
        self._running: ExportRun | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Queue again what was running, remove what nobody needs any more, and begin to work."""
        await asyncio.to_thread(self._recover)
        self._poked.set()
        self._tasks = [asyncio.create_task(self._work()), asyncio.create_task(self._expire())]

    async def stop(self) -> None:
        """End the running child; its orders are queued for the next start."""
        await end_tasks(*self._tasks)
        self._tasks = []

    async def submit(self, tenant: str, order: ExportOrder, actor: str) -> ExportRow:
        """Queue an order, or join it to the same work; raises what is wrong with it before any work is done."""
        check_order(order.format, order.dtype, order.shard_bytes, order.merge_into)
        ref = AdapterRef.parse(order.model, tenant)
        version = await asyncio.to_thread(self.registry.resolve, ref)
        self._check(version, order.format)
        new = NewExport(
            tenant=tenant,
            ref=version.ref,
            result=result_of(order, version, self.merge_base.digest),
            actor=actor,
            format=order.format,
            options=order.options(),
            size_bytes=await asyncio.to_thread(estimated_bytes, order, version, self.merge_base),
            keep_seconds=self.where.keep_seconds,
            keep_rows=self.where.keep_rows,
        )
        row = await asyncio.to_thread(self._place, new)
        self._poked.set()
        return row

    async def cancel(self, tenant: str, export_id: str) -> ExportRow:
        """End an order that is queued or running; one that ended already stays as it is.

        The work ends with its last order.
        """
        row = await asyncio.to_thread(self.registry.cancel_export, tenant, export_id)
        running = self._running
        if running is not None and running.is_of(row):
            if not await asyncio.to_thread(self.registry.is_wanted, running.row):
                await running.stop()
        else:
            await asyncio.to_thread(self._sweep)
        return row

    async def delete(self, tenant: str, export_id: str, actor: str) -> ExportRow:
        """Forget an order that has ended, and its result with the last one that has it; raises NotFound or Conflict."""
        row = await asyncio.to_thread(lambda: self.registry.delete_export(tenant, export_id, actor=actor))
        await asyncio.to_thread(self._sweep)
        return row

    def check_content(self, row: ExportRow) -> None:
        """Raises Conflict before the result is finished, NotFound when its time is over."""
        if row.status is not ExportStatus.SUCCEEDED:
            raise Conflict(f"{row.id} is {row.status}: its content is there once it has succeeded.", param="id")
        if not row.has_result(time.time()):
            raise NotFound(f"The files of {row.id} are no longer there: export {row.ref} again.", param="id")

    def _check(self, version: AdapterVersion, format: str) -> None:
        """Raises what is wrong with an export of this version."""
        if version.digest is None or not self.store.has(version.digest):
            raise Conflict(f"{version.ref} is {version.status} and has no files to export.", param="model")
        check_bases(version, format, self.merge_base, self.served_base)

    def _place(self, new: NewExport) -> ExportRow:
        with self.results.lock:
            kept = self.registry.kept_export(new.tenant, new.result)
            if kept is not None and not self.results.is_whole(new.result, (kept.report or {}).get("files", {})):
                log.warning("the result of an export is damaged and made again", export=kept.id)
                self.registry.forget_results([new.result])
            return self.registry.add_export(new)

    def _recover(self) -> None:
        self.registry.free_exports()
        self.registry.expire_exports(time.time())
        self.results.open()
        self._sweep()

    def _sweep(self) -> None:
        """Remove what nobody needs any more, and forget what is not there; what does not go now goes later."""
        try:
            with self.results.lock:
                missing = self.results.set_aside(*self.registry.results())
                if missing:  # pruned, or not in the backup that this state is of
                    self.registry.forget_results(missing)
            self.results.clear()
        except (HotshoeError, OSError) as error:
            log.warning("results of exports not removed", error=type(error).__name__, reason=str(error)[:500])

    async def _expire(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            with contextlib.suppress(HotshoeError):  # the next look may find the registry well again
                gone = await asyncio.to_thread(self.registry.expire_exports, time.time())
                if gone:
                    log.info("exports expired", count=gone)
                await asyncio.to_thread(self._sweep)

    async def _work(self) -> None:
        while True:
            await self._poked.wait()
            self._poked.clear()
            try:
                while await insist(self.registry.has_queued_export):
                    row = await insist(self.registry.claim_export)
                    if row is not None:
                        await self._run(row)
            except Exception as error:  # noqa: BLE001 - a full disk, say: later orders must find a worker all the same
                log.error("the queue of exports waits", error=type(error).__name__, reason=str(error)[:500])
                await asyncio.sleep(PUT_OFF_SECONDS)
                self._poked.set()

    async def _run(self, row: ExportRow) -> None:
        """Carry out one piece of work; whatever is wrong with it, the next one gets its turn."""
        try:
            end = await self._export(row)
        except asyncio.CancelledError:
            with contextlib.suppress(HotshoeError):
                await at_most(STOP_SECONDS, insist(lambda: self.registry.requeue_export(row)))
            raise
        except ProcessKilled as error:
            if row.deaths + 1 < MOST_DEATHS:
                log.warning(
                    "the export's process was killed and is started again", export=row.id, deaths=row.deaths + 1
                )
                await self._written(lambda: self.registry.requeue_export(row, has_died=True))
                return
            end = ExportEnd(ExportStatus.FAILED, error=_died(error))
        except HotshoeError as error:
            end = failed(error)
        except Exception as error:
            log.exception("export failed", export=row.id)
            end = failed(HotshoeError(f"The export failed: {type(error).__name__}. The server's log says more."))
        await self._ended(row, end)

    async def _ended(self, row: ExportRow, end: ExportEnd) -> None:
        if end.status is ExportStatus.SUCCEEDED:
            await self._note_agreement(row, end.report)
        end = replace(end, keep_seconds=self.where.keep_seconds, keep_rows=self.where.keep_rows)
        orders = await self._written(lambda: self.registry.end_export(row, end))
        outcome = str(end.status if orders else ExportStatus.CANCELLED)
        log.info("export ended", export=row.id, model=row.ref, status=outcome, orders=orders)
        self.where.on_end(outcome)
        await asyncio.to_thread(self._sweep)

    async def _written(self, change: Callable[[], T]) -> T:
        """What became of a piece of work, written down however long the registry's disk is full: its orders wait."""
        while True:
            try:
                return await insist(change)
            except (StorageFull, StorageDamaged) as error:
                log.error("the end of an export cannot be written", code=error.code, reason=error.message)
                await asyncio.sleep(PUT_OFF_SECONDS)

    async def _export(self, row: ExportRow) -> ExportEnd:
        """One attempt, to its end."""
        version = await insist(lambda: self.registry.resolve(AdapterRef.parse(row.ref, row.tenant)))
        self._check(version, row.format)
        if row.result not in (row.id, result_of(order_of(row), version, self.merge_base.digest)):
            raise BaseMismatch(
                f"{row.id} was ordered of a server with another merge base, or of another release: order it again.",
                param="model",
            )
        await asyncio.to_thread(self.store.verify, version.digest or "")
        await asyncio.to_thread(check_unchanged, self.merge_base)
        is_asked = row.options.get("parity", True) and row.format == HF  # the others are compared with no server
        served = await self.ask(version) if is_asked else []
        place = self.results.place(row.result)
        # What a run left that ended before its row could be written, or one that is fetched still and has expired.
        await asyncio.to_thread(self.results.free, row.result)
        self._running = ExportRun(self.registry, row, place)
        try:
            return await self._running.run({**self._spec(row, version), "served": served})
        finally:
            self._running = None

    async def _note_agreement(self, row: ExportRow, report: Any) -> None:
        """Keep with the version's proof what the report says of its engine's answers beside PEFT's."""
        found = ((report.get("parity") or {}).get("logits") or {}).get("served_against_peft")
        if not found:
            return
        ref = AdapterRef.parse(row.ref, row.tenant)
        noted = (ref.tenant, ref.name, ref.number or 0, found)
        try:
            await insist(lambda: self.registry.note_agreement(*noted, actor="exports"))
        except HotshoeError as error:  # a side note ends no queue
            log.warning("agreement not noted", export=row.id, code=error.code, reason=error.message)

    def _spec(self, row: ExportRow, version: AdapterVersion) -> dict[str, Any]:
        """What the process is told: the fields of an ExportRequest."""
        place, order = self.results.place(row.result), order_of(row)
        spec = {
            "adapter": str(self.store.folder(version.digest or "")),
            "base": str(self.merge_base.folder),
            "out": str(place.out),
            "work": str(place.work),
            "source": row.ref,
            "format": row.format,
            "dtype": order.dtype,
            "with_logits": order.with_parity,
            "base_digest": version.base_digest,
            "accepted_digests": [self.merge_base.digest, self.served_base.digest],
            "card": version.card,
            "chat_template": version.chat_template,
            "nice": NICE,
        }
        further = {"shard_bytes": order.shard_bytes, "merge_into": order.merge_into}
        return {**spec, **{name: value for name, value in further.items() if value is not None}}


def _died(error: ProcessKilled) -> dict[str, Any]:
    message = (
        f"{error} That was the last of {MOST_DEATHS} tries. Most likely the machine's memory ran out: order it "
        "without parity, or when less is running."
    )
    return {"code": "worker_lost", "message": message, "param": None}
