"""Files and open uploads whose time is over, taken out while the server runs."""

from __future__ import annotations

import asyncio
import time

import structlog

from adapters.errors import HotshoeError
from adapters.files import Files
from server.tasks import end_tasks

log = structlog.get_logger("hotshoe.files")
PAUSE_SECONDS = 60.0


class FileExpiry:
    """A worker that looks every minute. Who reads an upload before that finds it expired all the same."""

    def __init__(self, files: Files) -> None:
        self.files = files
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to look."""
        self._task = asyncio.create_task(self._work())

    async def stop(self) -> None:
        """Look no more."""
        await end_tasks(self._task)
        self._task = None

    async def _work(self) -> None:
        while True:
            await asyncio.sleep(PAUSE_SECONDS)
            try:
                gone = await asyncio.to_thread(self.files.expire, time.time())
            except HotshoeError as error:  # the next look may find the disk or the registry well again
                log.warning("files could not be expired", code=error.code, reason=error.message)
                continue
            if gone:
                log.info("files expired", count=gone)
