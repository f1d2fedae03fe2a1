"""Who may be handed to the engine now, who waits, who is refused: policy over plain values, with the clock passed in.

The engine batches at most `slots` distinct adapters, and a request whose adapter is not among them is passed over there
without ageing. So fairness is decided here. Between tenants places go in turn: a tenant's n-th request, running or
waiting, comes before another's n+1-th; within one tenant the oldest comes first. A request that finds every slot taken
by other adapters lets younger ones pass for `patience_seconds`, after which no younger adapter request is admitted
until it is. The base needs no slot. Each tenant may have `max_queued` requests waiting.
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
    """One request's place: which adapter it needs (None for the base), when it came, and whose it is."""

    adapter: str | None
    arrived_at: float
    tenant: str = ""


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
        self.running_by: Counter[str] = Counter()  # by tenant
        self._service_seconds = SERVICE_SECONDS_AT_START

    def ask(self, adapter: str | None, now: float, tenant: str = "") -> Admitted | Queued | Rejected:
        """Take a place. A Queued ticket comes back from a later `admit_waiting`, or is given up with `leave`."""
        ticket = Ticket(adapter, now, tenant)
        if self._next([*self.queue, ticket], now) is ticket:
            return Admitted(self._start(ticket))
        if self._waiting(tenant) >= self.limits.max_queued:
            return Rejected(self.why_full(tenant), self.retry_after_seconds())
        self.queue.append(ticket)
        return Queued(ticket)

    def admit_waiting(self, now: float) -> list[Ticket]:
        """The waiting requests that may start now, in their order. Call it after every `release` and `leave`."""
        started = []
        while (ticket := self._next(self.queue, now)) is not None:
            self.queue.remove(ticket)
            started.append(self._start(ticket))
        return started

    def release(self, ticket: Ticket, ran_seconds: float) -> None:
        """An admitted request ended, however it ended."""
        self.running -= 1
        self.running_by[ticket.tenant] -= 1
        if not self.running_by[ticket.tenant]:
            del self.running_by[ticket.tenant]
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

    def is_full(self, tenant: str = "") -> bool:
        """A request of the tenant that came now would be refused."""
        return self.running >= self.limits.max_running and self._waiting(tenant) >= self.limits.max_queued

    def why_full(self, tenant: str) -> str:
        """For the tenant, in its own numbers."""
        return f"{self.running_by[tenant]} of your requests run and {self._waiting(tenant)} wait, which is the limit."

    def _waiting(self, tenant: str) -> int:
        return sum(ticket.tenant == tenant for ticket in self.queue)

    def _has_slot(self, adapter: str | None) -> bool:
        return adapter is None or adapter in self.active or len(self.active) < self.limits.slots

    def _in_turn(self, tickets: list[Ticket]) -> list[Ticket]:
        """By each ticket's number among its tenant's running and waiting requests, then by age."""
        counts = Counter(self.running_by)
        ranks: list[tuple[int, int, Ticket]] = []
        for i, ticket in enumerate(tickets):
            ranks.append((counts[ticket.tenant], i, ticket))
            counts[ticket.tenant] += 1
        return [ticket for _, _, ticket in sorted(ranks, key=lambda row: row[:2])]

    def _next(self, tickets: list[Ticket], now: float) -> Ticket | None:
        """The one of these, oldest first, that starts next: in turn, past those without a slot and those held back."""
        if self.running >= self.limits.max_running:
            return None
        barred = self._barred(tickets, now)
        waiting = (one for one in self._in_turn(tickets) if one not in barred and self._has_slot(one.adapter))
        return next(waiting, None)

    def _barred(self, tickets: list[Ticket], now: float) -> set[Ticket]:
        """The adapter requests younger than the oldest that has waited long enough for a slot."""
        for i, ticket in enumerate(tickets):
            if not self._has_slot(ticket.adapter) and now - ticket.arrived_at >= self.limits.patience_seconds:
                return {one for one in tickets[i + 1 :] if one.adapter is not None}
        return set()

    def _start(self, ticket: Ticket) -> Ticket:
        self.running += 1
        self.running_by[ticket.tenant] += 1
        if ticket.adapter is not None:
            self.active[ticket.adapter] += 1
        return ticket
