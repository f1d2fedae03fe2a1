"""The waiting room before the engine: `admission.py` decides, here requests wait and are woken.

While a request waits for a slot, its version is brought into the engine as soon as its turn is near.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from adapters.errors import EngineBusy
from adapters.types import Priority
from server.admission import Admission, Queued, Rejected, Ticket
from server.metrics import Metrics

BROUGHT_AHEAD = 2  # waiting adapters whose versions are loaded before their turn
QUEUE_TIMEOUT = "queue_timeout"  # a reason of the door's own, beside admission's


@dataclass(frozen=True, slots=True)
class Asked:
    """Who asks for a place: the tenant, what its key weighs, how long its client waits for a first byte if known."""

    tenant: str
    priority: Priority = Priority.NORMAL
    timeout_seconds: float | None = None
    bring: Callable[[], Awaitable[None]] | None = None  # has the version in the engine; raises nothing
    is_whole: bool = False  # its first byte comes with the last


@dataclass(eq=False)
class Waiter:
    """A request in the room."""

    asked: Asked
    woken: asyncio.Future[None]


class Door:
    """Lets requests through as the admission policy says; a request that leaves while it waits gives its place up."""

    def __init__(self, admission: Admission, metrics: Metrics, queue_seconds: float) -> None:
        self.admission = admission
        self.metrics = metrics
        self.queue_seconds = queue_seconds
        self._waiting: dict[Ticket, Waiter] = {}
        self._brought: dict[str, asyncio.Future[None]] = {}  # by adapter, for as long as requests wait for it
        self._switches = 0

    @asynccontextmanager
    async def place(self, adapter: str | None, asked: Asked) -> AsyncIterator[float]:
        """A place at the engine while the block runs; yields the seconds waited. Raises EngineBusy."""
        came_at = time.monotonic()
        ticket = await self._enter(adapter, asked, came_at)
        started_at = time.monotonic()
        self._show()
        try:
            yield started_at - came_at
        finally:
            now = time.monotonic()
            self.admission.release(ticket, now - started_at, now)
            self._wake()

    def loaded(self, adapter: str, seconds: float) -> None:
        """A load of the adapter into the engine took so long."""
        self.admission.loaded(adapter, seconds, time.monotonic())

    def near(self) -> set[str]:
        """The adapters that have their turn now or soon: they should stay in the engine's memory."""
        return {*self.admission.slots.owners, *self.admission.next_adapters(BROUGHT_AHEAD)}

    async def _enter(self, adapter: str | None, asked: Asked, now: float) -> Ticket:
        answer = self.admission.ask(
            adapter,
            now,
            asked.tenant,
            priority=asked.priority,
            timeout_seconds=asked.timeout_seconds,
            is_whole=asked.is_whole,
        )
        if isinstance(answer, Rejected):
            raise self._refusal(answer.why, answer.reason, answer.retry_after_seconds)
        if isinstance(answer, Queued):
            await self._wait(answer.ticket, asked)
            reason = "slot" if answer.needs_slot else "place"
            self.metrics.waits.labels(reason).observe(time.monotonic() - now)
        return answer.ticket

    async def _wait(self, ticket: Ticket, asked: Asked) -> None:
        waiter = Waiter(asked, asyncio.get_running_loop().create_future())
        self._waiting[ticket] = waiter
        latest = math.inf if ticket.deadline is None else ticket.deadline - ticket.arrived_at
        seconds = max(0.0, min(self.queue_seconds, latest))
        self._wake()
        try:
            await asyncio.wait({waiter.woken}, timeout=seconds)
        except asyncio.CancelledError:
            self._give_up(ticket, waiter)
            raise
        finally:
            self._waiting.pop(ticket, None)
        if not waiter.woken.done():
            self._give_up(ticket, waiter)
            retry_after = self.admission.retry_after_seconds(ticket.adapter, asked.tenant, asked.priority)
            raise self._refusal(QUEUE_TIMEOUT, f"No place at the engine within {seconds:g} seconds.", retry_after)

    def _give_up(self, ticket: Ticket, waiter: Waiter) -> None:
        now = time.monotonic()
        if waiter.woken.done():
            self.admission.release(ticket, 0.0, now)
        else:
            self.admission.leave(ticket, now)
        self._wake()

    def _wake(self) -> None:
        for ticket in self.admission.admit_waiting(time.monotonic()):
            self._waiting[ticket].woken.set_result(None)
        self._bring_near()
        self._show()

    def _bring_near(self) -> None:
        """Load what has its turn soon, while what has it now still answers."""
        waiting_for = self.admission.waiting_for
        self._brought = {name: task for name, task in self._brought.items() if not task.done() or waiting_for[name]}
        for name in self.admission.next_adapters(BROUGHT_AHEAD):
            if name in self._brought:
                continue
            bring = next((one.asked.bring for ticket, one in self._waiting.items() if ticket.adapter == name), None)
            if bring is not None:
                self._brought[name] = asyncio.ensure_future(bring())

    def _show(self) -> None:
        self.metrics.running.set(self.admission.running)
        self.metrics.queued.set(self.admission.waiting)
        self.metrics.slot_switches.inc(self.admission.slots.switches - self._switches)
        self._switches = self.admission.slots.switches

    def _refusal(self, why: str, reason: str, retry_after: float) -> EngineBusy:
        self.metrics.refusals.labels(why).inc()
        return EngineBusy(f"{reason} Try again in {math.ceil(retry_after)} s.", retry_after=retry_after)
