"""What every tenant used: counted in memory as requests end, written to the registry every few seconds and at the end.

A kill of the process loses at most the last FLUSH_SECONDS of counts; a write that fails is tried again with the next.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from datetime import UTC, datetime

import structlog

from adapters.errors import HotshoeError
from adapters.registry import Registry
from adapters.usage import UsageRow
from server.tasks import end_tasks

log = structlog.get_logger("hotshoe.usage")
FLUSH_SECONDS = 5.0


class UsageMeter:
    """The counts that are not in the registry yet. A Worker: one event loop owns it."""

    def __init__(self, registry: Registry, clock: Callable[[], float] = time.time) -> None:
        self.registry = registry
        self._clock = clock
        self._rows: dict[tuple[str, str, str], UsageRow] = {}
        self._writing = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    def completed(self, tenant: str, model: str, prompt_tokens: int, completion_tokens: int) -> None:
        """A request that was answered to its end, with the numbers of its `usage` object."""
        self._add(UsageRow(tenant, self._today(), model, 1, prompt_tokens, completion_tokens))

    def partial(self, tenant: str, model: str, delivered_tokens: int) -> None:
        """A request that ended early after this much of its answer was delivered."""
        row = UsageRow(tenant, self._today(), model, partial_requests=1, partial_completion_tokens=delivered_tokens)
        self._add(row)

    async def flush(self) -> None:
        """Write what was counted; after it the registry holds everything that was counted before the call."""
        await asyncio.shield(asyncio.ensure_future(self._flush()))  # a caller that leaves must not undo half of it

    async def _flush(self) -> None:
        async with self._writing:
            rows, self._rows = self._rows, {}
            if not rows:
                return
            try:
                await asyncio.to_thread(self.registry.add_usage, list(rows.values()))
            except Exception:
                for row in rows.values():
                    self._add(row)
                raise

    async def start(self) -> None:
        self._task = asyncio.create_task(self._work())

    async def stop(self) -> None:
        """End with everything written."""
        await end_tasks(self._task)
        self._task = None
        with contextlib.suppress(HotshoeError):
            await self.flush()
        if self._rows:
            log.error("usage could not be written at the end", rows=len(self._rows))

    async def _work(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_SECONDS)
            try:
                await self.flush()
            except HotshoeError as error:
                log.warning("usage could not be written yet", code=error.code, rows=len(self._rows))

    def _add(self, row: UsageRow) -> None:
        key = (row.tenant, row.day, row.model)
        found = self._rows.get(key)
        self._rows[key] = row if found is None else found.plus(row)

    def _today(self) -> str:
        return datetime.fromtimestamp(self._clock(), UTC).strftime("%Y-%m-%d")
