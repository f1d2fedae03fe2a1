"""The waiting room before the engine: `admission.py` decides, here requests wait and are woken."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from adapters.errors import EngineBusy
from server.admission import Admission, Queued, Rejected, Ticket
from server.metrics import Metrics


class Door:
    """Lets requests through as the admission policy says; a request that leaves while it waits gives its place up."""

    def __init__(self, admission: Admission, metrics: Metrics, queue_seconds: float) -> None:
        self.admission = admission
        self.metrics = metrics
        self.queue_seconds = queue_seconds
        self._waiting: dict[Ticket, asyncio.Future[None]] = {}

    @asynccontextmanager
    async def place(self, adapter: str | None, tenant: str) -> AsyncIterator[float]:
        """A place at the engine while the block runs; yields the seconds waited. Raises EngineBusy."""
        came_at = time.monotonic()
        ticket = await self._enter(adapter, tenant, came_at)
        started_at = time.monotonic()
        self._show()
        try:
            yield started_at - came_at
        finally:
            self.admission.release(ticket, time.monotonic() - started_at)
            self._wake()

    def check_room(self, tenant: str) -> None:
        """Raises EngineBusy when a request of the tenant that came now would be refused; costs nothing."""
        if self.admission.is_full(tenant):
            raise self._refusal(self.admission.why_full(tenant))

    async def _enter(self, adapter: str | None, tenant: str, now: float) -> Ticket:
        answer = self.admission.ask(adapter, now, tenant)
        if isinstance(answer, Rejected):
            raise self._refusal(answer.reason, answer.retry_after_seconds)
        if isinstance(answer, Queued):
            await self._wait(answer.ticket)
        return answer.ticket

    async def _wait(self, ticket: Ticket) -> None:
        woken = asyncio.get_running_loop().create_future()
        self._waiting[ticket] = woken
        self._show()
        try:
            await asyncio.wait({woken}, timeout=self.queue_seconds)
        except asyncio.CancelledError:
            self._give_up(ticket, woken)
            raise
        finally:
            self._waiting.pop(ticket, None)
        if not woken.done():
            self._give_up(ticket, woken)
            raise self._refusal(f"No place at the engine within {self.queue_seconds:g} seconds.")

    def _give_up(self, ticket: Ticket, woken: asyncio.Future[None]) -> None:
        if woken.done():
            self.admission.release(ticket, 0.0)
        else:
            self.admission.leave(ticket)
        self._wake()

    def _wake(self) -> None:
        for ticket in self.admission.admit_waiting(time.monotonic()):
            self._waiting[ticket].set_result(None)
        self._show()

    def _show(self) -> None:
        self.metrics.running.set(self.admission.running)
        self.metrics.queued.set(len(self.admission.queue))

    def _refusal(self, reason: str, retry_after: float | None = None) -> EngineBusy:
        return EngineBusy(reason, retry_after=retry_after or self.admission.retry_after_seconds())
