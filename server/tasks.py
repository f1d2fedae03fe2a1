"""Background tasks of the event loop: their patience with the registry, and their end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeVar

import structlog

from adapters.errors import RegistryBusy

log = structlog.get_logger("hotshoe.tasks")
T = TypeVar("T")
BUSY_PAUSE_SECONDS = 0.5


async def end_tasks(*tasks: asyncio.Task[Any] | None) -> None:
    """Cancel those that are there, and wait until each is over, however it ends."""
    there = [task for task in tasks if task is not None]
    for task in there:
        task.cancel()
    await asyncio.gather(*there, return_exceptions=True)


async def at_most(seconds: float, work: Awaitable[object]) -> None:
    """Wait for the work, but no longer; what has taken so long is cancelled.

    `asyncio.wait_for` of Python 3.11 loses a cancel of its caller that comes with the end of the work.
    """
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await work


async def insist(call: Callable[[], T]) -> T:
    """What a call of the registry gives, off the event loop; tried again for as long as somebody else has it locked."""
    while True:
        try:
            return await asyncio.to_thread(call)
        except RegistryBusy as error:
            log.warning("background work waits for the registry", reason=error.message)
            await asyncio.sleep(BUSY_PAUSE_SECONDS)
