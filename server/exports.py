"""Export jobs: rows in the registry, worked off one at a time by a niced child process that dies with the server.

A job that ran when the server ended is queued again at the next start: a child leaves nothing that is not whole.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from adapters.errors import (
    BaseMismatch,
    Conflict,
    HotshoeError,
    InvalidRequest,
    MergeBaseMissing,
    RegistryBusy,
)
from adapters.export import FORMATS
from adapters.export_rows import ExportRow, ExportStatus
from adapters.merge_plan import check_dtype
from adapters.staging import sweep_partial
from adapters.types import AdapterRef, AdapterVersion
from server.tasks import end_tasks, insist

if TYPE_CHECKING:
    from adapters.bases import BaseModel
    from adapters.registry import Registry
    from adapters.store import BlobStore

log = structlog.get_logger("hotshoe.exports")
AskServed = Callable[[AdapterVersion], Awaitable[list[dict[str, Any]]]]  # the engine's answers to the parity probe
NICE = 10
CANCEL_GRACE_SECONDS = 5.0
TELL_SECONDS = 0.5  # between two writes of progress to the registry
MAX_LINE_BYTES = 64 << 20  # the report of a large model is one line
# How far an export is when a stage begins, and the part of the whole that the stage is.
STAGES = {"merging": (0.0, 0.5), "checking": (0.5, 0.3), "comparing logits": (0.8, 0.2)}


@dataclass(frozen=True, slots=True)
class ExportOrder:
    """What a client asks for."""

    model: str
    format: str = "hf"
    dtype: str | None = None
    with_parity: bool = True


@dataclass(frozen=True, slots=True)
class ExportPlace:
    """Where exports are kept: their rows, the adapters' files, and the state folder for what they make."""

    registry: Registry
    store: BlobStore
    home: Path


@dataclass
class _Running:
    row: ExportRow
    process: asyncio.subprocess.Process


class Exports:
    """The queue and its worker. Results lie in `home`/exports/ID until they are removed by hand."""

    def __init__(self, where: ExportPlace, base: BaseModel, merge_base: BaseModel | None, ask: AskServed) -> None:
        self.registry = where.registry
        self.store = where.store
        self.root = where.home / "exports"
        self.served_base = base
        self.merge_base = merge_base or base
        self.ask = ask
        self._wake = asyncio.Event()
        self._running: _Running | None = None
        self._worker: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Sweep what killed exports left, queue again what was running, and begin to work."""
        await asyncio.to_thread(self._recover)
        self._wake.set()
        self._worker = asyncio.create_task(self._work())

    async def stop(self) -> None:
        """End the running child; its job stays queued for the next start."""
        await end_tasks(self._worker)
        self._worker = None

    async def submit(self, tenant: str, order: ExportOrder, actor: str) -> ExportRow:
        """Queue an export; raises what is wrong with the order before any work is done."""
        check_dtype(order.dtype)
        if order.format not in FORMATS:
            raise InvalidRequest(f"format {order.format!r} is not one of {', '.join(FORMATS)}.", param="format")
        ref = AdapterRef.parse(order.model, tenant)
        version = await asyncio.to_thread(self.registry.resolve, ref)
        self._check_exportable(version)
        options = {"dtype": order.dtype, "parity": order.with_parity}
        row = await asyncio.to_thread(
            lambda: self.registry.add_export(tenant, version.ref, format=order.format, options=options, actor=actor)
        )
        self._wake.set()
        return row

    async def cancel(self, tenant: str, export_id: str) -> ExportRow:
        """End an export that is queued or running; one that ended already stays as it is."""
        row = await asyncio.to_thread(
            lambda: self.registry.update_export(tenant, export_id, status=ExportStatus.CANCELLED)
        )
        if self._running is not None and self._running.row.id == export_id:
            await end_group(self._running.process)
        return row

    def folder(self, row: ExportRow) -> Path:
        """Where the finished export lies; raises Conflict before it is finished."""
        if row.status is not ExportStatus.SUCCEEDED:
            raise Conflict(f"{row.id} is {row.status}: its content is there once it has succeeded.", param="id")
        return self.root / row.id

    def _check_exportable(self, version: AdapterVersion) -> None:
        if version.digest is None or not self.store.has(version.digest):
            raise Conflict(f"{version.ref} is {version.status} and has no files to export.", param="model")
        if self.merge_base.config.get("quantization_config"):
            raise MergeBaseMissing(
                f"The served base {self.served_base.id} is quantised, and an export needs its 16-bit weights: set "
                "merge_base (HOTSHOE_MERGE_BASE) to a folder with them.",
                param="merge_base",
            )
        if version.base_digest not in (None, self.merge_base.digest, self.served_base.digest):
            raise BaseMismatch(
                f"{version.ref} was made for the base {version.base_digest}; this server merges into "
                f"{self.merge_base.id} ({self.merge_base.digest}). Set merge_base to the base it was made for.",
                param="model",
            )

    def _recover(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        sweep_partial(self.root)
        for spec in self.root.glob(".*.spec.json"):
            spec.unlink()
        for row in self.registry.exports(status=ExportStatus.RUNNING):
            self.registry.update_export(row.tenant, row.id, status=ExportStatus.QUEUED, progress=0.0)

    async def _work(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while rows := await insist(lambda: self.registry.exports(status=ExportStatus.QUEUED)):
                await self._run(rows[0])

    async def _run(self, row: ExportRow) -> None:
        try:
            changes = await self._export(row)
        except asyncio.CancelledError:
            self.registry.update_export(row.tenant, row.id, status=ExportStatus.QUEUED, progress=0.0)
            raise
        except HotshoeError as error:
            changes = failed(error)
        except Exception as error:  # noqa: BLE001 - one broken job must not end the queue
            log.error("export failed", export=row.id, error=type(error).__name__, reason=str(error)[:500])
            changes = failed(HotshoeError(f"The export failed: {type(error).__name__}."))
        else:
            await self._note_agreement(row, changes.get("report") or {})
        ended = await insist(lambda: self.registry.update_export(row.tenant, row.id, **changes))
        log.info("export ended", export=row.id, model=row.ref, status=str(ended.status))
        if ended.status is ExportStatus.CANCELLED:
            await asyncio.to_thread(lambda: shutil.rmtree(self.root / row.id, ignore_errors=True))

    async def _export(self, row: ExportRow) -> dict[str, Any]:
        """Run one child to its end; what to write into the row."""
        version = await insist(lambda: self.registry.resolve(AdapterRef.parse(row.ref, row.tenant)))
        self._check_exportable(version)
        await asyncio.to_thread(self.store.verify, version.digest or "")
        started = await insist(lambda: self.registry.update_export(row.tenant, row.id, status=ExportStatus.RUNNING))
        if started.status is not ExportStatus.RUNNING:  # cancelled meanwhile
            return {}
        # What a run left that ended before its row could be written: the row says that nothing is there.
        await asyncio.to_thread(shutil.rmtree, self.root / row.id, ignore_errors=True)
        served = await self.ask(version) if row.options.get("parity", True) else []
        spec = self.root / f".{row.id}.spec.json"
        await asyncio.to_thread(spec.write_text, json.dumps({**self._spec(row, version), "served": served}))
        process = await start_child(spec)
        self._running = _Running(row, process)
        try:
            return await self._follow(row, process)
        finally:
            self._running = None
            await end_group(process)
            spec.unlink(missing_ok=True)

    async def _note_agreement(self, row: ExportRow, report: dict[str, Any]) -> None:
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
        return {
            "adapter": str(self.store.folder(version.digest or "")),
            "base": str(self.merge_base.folder),
            "out": str(self.root / row.id),
            "source": row.ref,
            "format": row.format,
            "dtype": row.options.get("dtype"),
            "with_logits": row.options.get("parity", True),
            "base_digest": version.base_digest,
            "accepted_digests": [self.merge_base.digest, self.served_base.digest],
            "card": version.card,
            "chat_template": version.chat_template,
            "nice": NICE,
        }

    async def _follow(self, row: ExportRow, process: asyncio.subprocess.Process) -> dict[str, Any]:
        output, complaints = streams_of(process)
        ended: dict[str, Any] = {}
        parity: dict[str, Any] | None = None
        told_at = 0.0
        async for line in output:
            message = json.loads(line)
            if message["stage"] in ("result", "error"):
                ended = message
            elif message["stage"] == "failed":
                parity = message["parity"]
            elif message["stage"] in STAGES and time.monotonic() - told_at > TELL_SECONDS:
                told_at = time.monotonic()
                await self._tell(row, message)
        code = await process.wait()
        tail = (await complaints).decode(errors="replace")[-2000:]
        if "result" in ended:
            path = str(self.root / row.id)
            return {"status": ExportStatus.SUCCEEDED, "progress": 1.0, "path": path, "report": ended["result"]}
        if "error" in ended:
            return {"status": ExportStatus.FAILED, "error": ended["error"], "report": parity and {"parity": parity}}
        log.error("the export's process ended without a word", export=row.id, exit_code=code, stderr=tail)
        return failed(
            HotshoeError(f"The export's process ended with status {code}; the server's log has its last words.")
        )

    async def _tell(self, row: ExportRow, message: dict[str, Any]) -> None:
        begin, part = STAGES[message["stage"]]
        progress = round(begin + part * message.get("percent", 0) / 100, 3)
        with contextlib.suppress(RegistryBusy):
            await asyncio.to_thread(lambda: self.registry.update_export(row.tenant, row.id, progress=progress))


def failed(error: HotshoeError) -> dict[str, Any]:
    return {"status": ExportStatus.FAILED, "error": error.as_dict()}


async def start_child(spec: Path) -> asyncio.subprocess.Process:
    """`python -m adapters.export SPEC` in a process group of its own; it ends when our end of its stdin closes."""
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "adapters.export",
        str(spec),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
        limit=MAX_LINE_BYTES,
    )


def streams_of(process: asyncio.subprocess.Process) -> tuple[asyncio.StreamReader, asyncio.Task[bytes]]:
    """The child's lines, and its complaints, which are read along so that it never waits for us."""
    if process.stdout is None or process.stderr is None:
        raise RuntimeError("the child was started without pipes")
    return process.stdout, asyncio.create_task(process.stderr.read())


async def end_group(process: asyncio.subprocess.Process) -> None:
    """SIGTERM to the child and its own children, SIGKILL when they do not go; returns when the child is gone."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), CANCEL_GRACE_SECONDS)
