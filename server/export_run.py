"""One attempt at an export: its process from start to end, what it tells written into the rows of all its orders."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import structlog

from adapters.errors import HotshoeError, RegistryBusy
from adapters.export_rows import ExportEnd, ExportRow, ExportStatus
from server.child import Child, Program
from server.tasks import at_most, insist

if TYPE_CHECKING:
    from adapters.registry import Registry
    from server.export_results import WorkPlace

log = structlog.get_logger("hotshoe.exports")
TELL_SECONDS = 0.5  # between two writes of progress to the registry
ENDING_SECONDS = 60.0  # from its last word to its end
KILLED = (137, 143)  # exit statuses of a process that somebody killed, beside the negative ones
# How far an export is when a stage begins, and the part of the whole that the stage is.
STAGES = {"merging": (0.0, 0.5), "checking": (0.5, 0.3), "comparing logits": (0.8, 0.2)}
FIRST = "merging"  # the stage in which the bytes are written
LAST_WORDS = ("result", "error")


class ProcessKilled(Exception):
    """The process was killed before it said how it ended."""


class Standing:
    """How far the work is. It goes forward only: a new attempt says nothing until it is beyond the one before."""

    def __init__(self, row: ExportRow) -> None:
        self.progress = row.progress
        self.bytes_done = row.bytes_done
        self.bytes_total = row.bytes_total or row.size_bytes
        self.stage = row.stage

    def take(self, message: Mapping[str, Any]) -> None:
        """What a message says of it."""
        stage, percent = str(message["stage"])[:40], float(message.get("percent", 0))
        self.stage = stage
        self.bytes_total = int(message.get("weight_bytes", self.bytes_total))
        if stage in STAGES:
            begin, part = STAGES[stage]
            self.progress = max(self.progress, round(begin + part * percent / 100, 3))
            done = self.bytes_total * (percent / 100 if stage == FIRST else 1)
            self.bytes_done = min(max(self.bytes_done, round(done)), self.bytes_total)

    def as_dict(self) -> dict[str, Any]:
        return {
            "progress": self.progress,
            "stage": self.stage,
            "bytes_done": self.bytes_done,
            "bytes_total": self.bytes_total,
        }


class ExportRun:
    """One attempt. `stop` ends its process when nobody waits for it any more."""

    def __init__(self, registry: Registry, row: ExportRow, place: WorkPlace) -> None:
        self.registry = registry
        self.row = row
        self.place = place
        self._child: Child | None = None
        self._is_stopped = False
        self._standing = Standing(row)
        self._told_at = float("-inf")
        self._parity: dict[str, Any] | None = None

    def is_of(self, row: ExportRow) -> bool:
        """It is the work of this order."""
        return (row.tenant, row.result) == (self.row.tenant, self.row.result)

    async def stop(self) -> None:
        """End the process, where there is one: nobody waits for it any more."""
        self._is_stopped = True
        if self._child is not None:
            await self._child.leave()

    async def run(self, spec: Mapping[str, Any]) -> ExportEnd:
        """Have the process work to its end; raises ProcessKilled where it was killed before it said how that was."""
        await asyncio.to_thread(self.place.spec.write_text, json.dumps(spec))
        names = {str(self.place.out.parent): "exports", spec["adapter"]: "the adapter", spec["base"]: "the base"}
        program = Program("adapters.export", self.place.spec, self.place.log, "stage", names)
        child = await Child.start(program)
        self._child = child
        try:
            if not await insist(lambda: self.registry.is_wanted(self.row)):
                await self.stop()
            last = await self._follow(child)
            await self._note()
            await at_most(ENDING_SECONDS, child.process.wait())
            await child.leave()  # where it hangs
            return await self._end(child, last)
        finally:
            await child.leave()
            await child.gone()
            self.place.spec.unlink(missing_ok=True)
            self.place.log.unlink(missing_ok=True)

    async def _follow(self, child: Child) -> dict[str, Any]:
        """The process's last word: its result or its error, or nothing."""
        last: dict[str, Any] = {}
        with contextlib.suppress(TimeoutError):  # it hangs, and is ended without a word
            async for message in child.messages():
                if message["stage"] in LAST_WORDS:
                    last = message
                elif message["stage"] == "failed":
                    self._parity = message["parity"]
                else:
                    await self._tell(message)
        return last

    async def _tell(self, message: Mapping[str, Any]) -> None:
        """Write down how far it is: at once when a stage begins, and now and then within one."""
        is_new = message["stage"] != self._standing.stage
        self._standing.take(message)
        if is_new or time.monotonic() - self._told_at > TELL_SECONDS:
            self._told_at = time.monotonic()
            await self._note()

    async def _note(self) -> None:
        with contextlib.suppress(RegistryBusy):
            await asyncio.to_thread(lambda: self.registry.note_export(self.row, **self._standing.as_dict()))

    async def _end(self, child: Child, last: Mapping[str, Any]) -> ExportEnd:
        if "result" in last:
            report = last["result"]
            path = str(self.place.out)
            return ExportEnd(ExportStatus.SUCCEEDED, path=path, report=report, size_bytes=report["size_bytes"])
        if "error" in last:
            report = {"parity": self._parity} if self._parity else None
            return ExportEnd(ExportStatus.FAILED, error=last["error"], report=report)
        if self._is_stopped:
            return ExportEnd(ExportStatus.CANCELLED)
        code, words = child.process.returncode, await asyncio.to_thread(child.last_words)
        log.error("the export's process ended without a word", export=self.row.id, exit_code=code, stderr=words)
        if code is not None and (code < 0 or code in KILLED):
            raise ProcessKilled(f"The export's process was killed (status {code}).")
        return failed(HotshoeError(f"The export's process ended with status {code}; the server's log says more."))


def failed(error: HotshoeError) -> ExportEnd:
    return ExportEnd(ExportStatus.FAILED, error=error.as_dict())
