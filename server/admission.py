"""Who may be handed to the engine now, who waits, who is refused: policy over plain values, with the clock passed in.

The engine batches at most `slots` distinct adapters, and a request whose adapter is not among them is passed over there
without ageing. So fairness is decided here: arrivals are served oldest first; a request that finds every slot taken by
other adapters lets younger ones pass for `patience_seconds`, after which no younger adapter request is admitted until
it is. The base needs no slot.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

SERVICE_SECONDS_AT_START = 2.0
SMOOTHING = 0.2


@dataclass(frozen=True, slots=True)
class Limits:
    slots: int
    max_running: int
    max_queued: int
    patience_seconds: float


@dataclass(frozen=True, slots=True, eq=False)
class Ticket:
    """One request's place: which adapter it needs (None for the base) and when it came."""

    adapter: str | None
    arrived_at: float


@dataclass(frozen=True, slots=True)
class Admitted:
    ticket: Ticket


@dataclass(frozen=True, slots=True)
class Queued:
    ticket: Ticket


@dataclass(frozen=True, slots=True)
class Rejected:
    reason: str
    retry_after_seconds: float


class Admission:
    """The state of one engine's door. Not thread-safe: one event loop owns it."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.running = 0
        self.queue: list[Ticket] = []  # oldest first
        self.active: Counter[str] = Counter()  # running requests by adapter
        self._service_seconds = SERVICE_SECONDS_AT_START

    def ask(self, adapter: str | None, now: float) -> Admitted | Queued | Rejected:
        """Take a place. A Queued ticket comes back from a later `admit_waiting`, or is given up with `leave`."""
        ticket = Ticket(adapter, now)
        if self._fits(ticket) and not self._is_held_back(adapter, now):
            return Admitted(self._start(ticket))
        if len(self.queue) >= self.limits.max_queued:
            return Rejected(
                f"{self.running} requests run and {len(self.queue)} wait, which is the limit.",
                self.retry_after_seconds(),
            )
        self.queue.append(ticket)
        return Queued(ticket)

    def admit_waiting(self, now: float) -> list[Ticket]:
        """The waiting requests that may start now, oldest first. Call it after every `release` and `leave`."""
        started = []
        for ticket in list(self.queue):
            if self.running >= self.limits.max_running:
                break
            if self._fits(ticket) and not self._is_held_back(ticket.adapter, now, before=ticket):
                self.queue.remove(ticket)
                started.append(self._start(ticket))
        return started

    def release(self, ticket: Ticket, ran_seconds: float) -> None:
        """An admitted request ended, however it ended."""
        self.running -= 1
        self._service_seconds += SMOOTHING * (ran_seconds - self._service_seconds)
        if ticket.adapter is not None:
            self.active[ticket.adapter] -= 1
            if not self.active[ticket.adapter]:
                del self.active[ticket.adapter]

    def leave(self, ticket: Ticket) -> None:
        """A queued request gave up."""
        if ticket in self.queue:
            self.queue.remove(ticket)

    def retry_after_seconds(self) -> float:
        """When a place is likely: the queue's length in rounds of the running requests, 1 to 60 seconds."""
        rounds = 1 + len(self.queue) / self.limits.max_running
        return min(60.0, max(1.0, rounds * self._service_seconds))

    def is_full(self) -> bool:
        """A request that came now would be refused."""
        return self.running >= self.limits.max_running and len(self.queue) >= self.limits.max_queued

    def _fits(self, ticket: Ticket) -> bool:
        return self.running < self.limits.max_running and self._has_slot(ticket.adapter)

    def _has_slot(self, adapter: str | None) -> bool:
        return adapter is None or adapter in self.active or len(self.active) < self.limits.slots

    def _is_held_back(self, adapter: str | None, now: float, before: Ticket | None = None) -> bool:
        """An older request comes first: one that only lacks room in the batch, or one whose patience is over."""
        is_barred = False  # for adapters: somebody older has waited long enough for a slot
        for older in self.queue:
            if older is before:
                break
            if is_barred and older.adapter is not None:
                continue
            if self._has_slot(older.adapter):
                return True
            is_barred = is_barred or now - older.arrived_at >= self.limits.patience_seconds
        return is_barred and adapter is not None

    def _start(self, ticket: Ticket) -> Ticket:
        self.running += 1
        if ticket.adapter is not None:
            self.active[ticket.adapter] += 1
        return ticket
