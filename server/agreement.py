"""Whether the engine computes what PEFT computes from a version's files: asked in the background once it is ready.

PEFT needs the base in float32 beside the engine, so it runs in a niced child, one version at a time, and only where
there is memory for it. The outcome goes into the version's proof and changes nothing else.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog

from adapters.bases import BaseModel, weight_files
from adapters.errors import HotshoeError
from adapters.parity_report import available_memory_bytes
from adapters.registry import Registry
from adapters.store import BlobStore
from adapters.types import AdapterVersion
from server.child import end_group
from server.exports import AskServed
from server.restoring import key_of
from server.tasks import end_tasks, insist

log = structlog.get_logger("hotshoe.agreement")
LIBRARIES_BYTES = 1_000_000_000  # torch and transformers, and the activations of a short text
GROWTH = 2  # of a checkpoint in 16 bits that is loaded in float32; one in float32 is counted double


@dataclass
class Agreement:
    """A queue of versions that became ready; `is_wanted` is the operator's setting."""

    registry: Registry
    store: BlobStore
    base: BaseModel
    ask: AskServed
    is_wanted: bool
    free_bytes: Callable[[], int] = available_memory_bytes
    _queue: asyncio.Queue[AdapterVersion] = field(default_factory=asyncio.Queue)
    _worker: asyncio.Task[None] | None = None

    def submit(self, version: AdapterVersion) -> None:
        """Have the version compared when its turn comes."""
        if self.is_wanted:
            self._queue.put_nowait(version)

    async def start(self) -> None:
        self._worker = asyncio.create_task(self._work())

    async def stop(self) -> None:
        """End the comparison that is under way; it is not made up for."""
        await end_tasks(self._worker)
        self._worker = None

    async def _work(self) -> None:
        while True:
            version = await self._queue.get()
            try:
                await self.compare(version)
            except HotshoeError as error:
                log.warning("not compared with PEFT", model=version.ref, code=error.code, reason=error.message)
            except Exception:
                log.exception("not compared with PEFT", model=version.ref)

    async def compare(self, version: AdapterVersion) -> None:
        """Compare one version now, where there is memory and the engine says something."""
        if self.base.config.get("quantization_config"):
            log.info("not compared with PEFT: the base is quantised", model=version.ref)
            return
        needed, free = needed_bytes(self.base), self.free_bytes()
        if needed > free:
            log.info("no room to compare with PEFT", model=version.ref, needed_bytes=needed, free_bytes=free)
            return
        current = await asyncio.to_thread(self.registry.get, *key_of(version))
        served = await self.ask(current)
        if not served or current.digest is None:
            return
        spec = {"base": str(self.base.folder), "adapter": str(self.store.folder(current.digest)), "served": served}
        found = await run_child(json.dumps(spec).encode())
        await insist(lambda: self.registry.note_agreement(*key_of(version), found, actor="agreement"))
        log.info("compared with PEFT", model=version.ref, **found)


def needed_bytes(base: BaseModel) -> int:
    """What PEFT takes at most: the base in float32, and the libraries."""
    files = sum(path.stat().st_size for path in weight_files(base.folder))
    return files * GROWTH + LIBRARIES_BYTES


async def run_child(spec: bytes) -> dict[str, float]:
    """What the child found; raises HotshoeError where it ends without a word."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "adapters.agreement", stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True
    )
    try:
        said, complaints = await process.communicate(spec)
    finally:
        await end_group(process)
    if process.returncode != 0:
        tail = complaints.decode(errors="replace")[-500:]
        raise HotshoeError(f"The comparison's process ended with status {process.returncode}: {tail}")
    found: dict[str, float] = json.loads(said.splitlines()[-1])
    return found
