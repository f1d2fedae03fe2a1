"""Who may be handed to the engine now, who waits, who is refused: policy over plain values, with the clock passed in.

The engine batches at most `slots` distinct adapters, and a request whose adapter is not among them is passed over there
without ageing. So fairness is decided here, in two questions that are asked whenever a place is free:

- Which adapter has the next turn in a slot (`server/slots.py`: quanta, and when a slot is closed)? One of the flow (a
  tenant's requests of one priority, `server/shares.py`) that had the fewest turns for its weight: the adapter that has
  waited longest, and among those that came within one patience the one with most waiting requests.
- Who gets the place? The flow that was charged the fewest seconds for its weight, among those with a request that can
  start: for the base, for an adapter whose slot is open, or the one that has the next turn. Within a flow the turn goes
  first, then the oldest. So requests of an adapter in a slot batch along, and the base's run beside.

Where the engine shares its steps among flows (`server/vllm_plugin/turns.py`), one row more of somebody else costs a
flood nothing that it would not lose anyway. There a flow that runs less than its share of the places does not wait for
one of them: it has one of the `spare` ones.

Nothing that could start waits, but for two stated reasons: its adapter's slot is closing, or a free slot is another's
turn. Every admitted request starts within `server/start_bound.py`. A tenant may have `max_queued` waiting requests,
an adapter `max_adapter_queued`; a request whose client would be gone before its estimated start is refused at once, and
one whose client is gone is not started. An arrival or an end costs O(slots), and O(log n) of what waits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from adapters.types import Priority
from server.shares import SERVICE_SECONDS_AT_START, SMOOTHING, Line, Shares, Ticket
from server.slots import Quantum, Slots
from server.waiting import Waiting, count_down

__all__ = ["Admission", "Admitted", "Limits", "Quantum", "Queued", "Refusal", "Rejected", "Ticket"]
LEAST_RETRY_SECONDS, MOST_RETRY_SECONDS = 1.0, 60.0


@dataclass(frozen=True, slots=True)
class Limits:
    slots: int
    max_running: int
    max_queued: int
    patience_seconds: float
    max_adapter_queued: int | None = None  # None: as many as its tenants may have
    quantum: Quantum = field(default_factory=Quantum)
    tenant_weights: Mapping[str, float] = field(default_factory=dict)  # of their shares; 1 where nothing is said
    spare: int = 0  # places beyond `max_running`, for flows that run less than their share of those


class Refusal(StrEnum):
    """Why a request is refused at the door."""

    TENANT_QUEUE = "tenant_queue"
    ADAPTER_QUEUE = "adapter_queue"
    CLIENT_TIMEOUT = "client_timeout"


@dataclass(frozen=True, slots=True)
class Admitted:
    ticket: Ticket


@dataclass(frozen=True, slots=True)
class Queued:
    ticket: Ticket
    needs_slot: bool = False  # else it waits for a place only


@dataclass(frozen=True, slots=True)
class Rejected:
    why: Refusal
    reason: str
    retry_after_seconds: float


class Admission:
    """The state of one engine's door. Not thread-safe: one event loop owns it."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.slots = Slots(limits.slots, limits.quantum)
        self.shares = Shares(limits.tenant_weights)
        self.service_seconds = SERVICE_SECONDS_AT_START
        self.running_by: Counter[str] = Counter()  # by tenant
        self._room = Waiting(self.shares, self.slots, limits.patience_seconds)
        self._charges: dict[Ticket, float] = {}  # of those that run
        self._number = 0

    @property
    def running(self) -> int:
        return len(self._charges)

    @property
    def waiting(self) -> int:
        return self._room.number

    @property
    def waiting_by(self) -> Counter[str]:
        """Requests that wait, by tenant."""
        return self._room.by_tenant

    @property
    def waiting_for(self) -> Counter[str | None]:
        """The same by adapter."""
        return self._room.by_adapter

    def weight(self, tenant: str, priority: Priority) -> float:
        """What its requests weigh against others', at the door and in the engine's steps."""
        return self.shares.seen_flow(tenant, priority).weight

    def ask(
        self,
        adapter: str | None,
        now: float,
        tenant: str = "",
        *,
        priority: Priority = Priority.NORMAL,
        timeout_seconds: float | None = None,
        is_whole: bool = False,
    ) -> Admitted | Queued | Rejected:
        """Take a place. A Queued ticket comes back from a later `admit_waiting`, or is given up with `leave`.

        A client that hears nothing until the whole answer is there (`is_whole`) needs it within its timeout, and so an
        earlier start.
        """
        self._settle(now)
        own = self.shares.seen_flow(tenant, priority).service_seconds if is_whole else 0.0
        deadline = None if timeout_seconds is None else now + timeout_seconds - own
        self._number += 1
        ticket = Ticket(adapter, now, tenant, priority, deadline, self._number)
        self._room.join(ticket, now)
        line, is_turn = self._next()
        if line is not None and line.head is ticket:
            self._start(line, is_turn, now)
            return Admitted(ticket)
        self._room.take_out(ticket, now)
        refused = self._refusal(ticket, timeout_seconds, own)
        if refused is None:
            self._room.join(ticket, now)
        return refused or Queued(ticket, needs_slot=not self.slots.is_open(adapter))

    def admit_waiting(self, now: float) -> list[Ticket]:
        """The waiting requests that may start now, in their order. Call it after every `ask`, `release` and `leave`."""
        started: list[Ticket] = []
        while True:
            self._settle(now)  # again after each: with the one who started a slot may be needed no more
            line, is_turn = self._next()
            if line is None:
                return started
            started.append(self._start(line, is_turn, now))

    def release(self, ticket: Ticket, ran_seconds: float, now: float) -> None:
        """An admitted request ended, however it ended."""
        flow = self.shares.flow(ticket.tenant, ticket.priority)
        self.shares.ended(flow, self._charges.pop(ticket), ran_seconds)
        self.service_seconds += SMOOTHING * (ran_seconds - self.service_seconds)
        count_down(self.running_by, ticket.tenant)
        if ticket.adapter is not None:
            self.slots.owners[ticket.adapter].running -= 1
            if self.slots.free_if_drained(ticket.adapter, now):
                self._room.arrange_all(ticket.adapter, now, cold_since=now)
            self._room.show_work(ticket.adapter, now)

    def leave(self, ticket: Ticket, now: float) -> None:
        """A queued request gave up; one that waits no more is left alone."""
        if self._room.holds(ticket):
            self._room.take_out(ticket, now)

    def loaded(self, adapter: str, seconds: float, now: float) -> None:
        """A load of the adapter into the engine took so long."""
        self.slots.loaded(adapter, seconds, now)

    def next_adapters(self, number: int) -> list[str]:
        """The waiting adapters without a slot that will have their turns first: what to bring near meanwhile."""
        found: dict[str, None] = {}
        for flow in self.shares.by_turn.least(number):
            found |= {line.adapter: None for line in flow.cold.least(1) if line.adapter is not None}
        for flow in self.shares.by_turn.least(number):
            found |= {line.adapter: None for line in flow.cold.least(number) if line.adapter is not None}
        return list(found)[:number]

    def estimated_seconds(self, adapter: str | None, tenant: str = "", priority: Priority = Priority.NORMAL) -> float:
        """About how long one more such request would wait: by the seconds that requests and turns took until now."""
        flow = self.shares.seen_flow(tenant, priority)
        weight = self.shares.waiting_weight + (0.0 if flow.waiting else flow.weight)
        rounds, seconds = weight / flow.weight, 0.0
        if self.running >= self.limits.max_running:
            seconds = (flow.waiting + 1) * rounds * self.service_seconds / self.limits.max_running
        if not self.slots.is_open(adapter) and not self.slots.has_room:
            turns = min((len(flow.cold) + 1) * rounds, len(self._room.lines) + 1.0)
            seconds += turns * self.slots.turn_seconds / self.limits.slots
        return seconds

    def retry_after_seconds(
        self, adapter: str | None = None, tenant: str = "", priority: Priority = Priority.NORMAL
    ) -> float:
        """When a place is likely, 1 to 60 seconds."""
        return _bounded(self.estimated_seconds(adapter, tenant, priority))

    def why_full(self, tenant: str) -> str:
        """For the tenant, in its own numbers."""
        return f"{self.running_by[tenant]} of your requests run and {self.waiting_by[tenant]} wait, which is the limit."

    def _refusal(self, ticket: Ticket, timeout_seconds: float | None, own_seconds: float) -> Rejected | None:
        """Why the ticket may not wait. `own_seconds` is how long it runs before its client hears of it."""
        limits, most = self.limits, self.limits.max_adapter_queued
        estimated = self.estimated_seconds(ticket.adapter, ticket.tenant, ticket.priority)
        retry_after = _bounded(estimated)
        if self.waiting_by[ticket.tenant] >= limits.max_queued:
            return Rejected(Refusal.TENANT_QUEUE, self.why_full(ticket.tenant), retry_after)
        if ticket.adapter is not None and most is not None and self.waiting_for[ticket.adapter] >= most:
            reason = f"{most} requests wait for this adapter, which is the limit."
            return Rejected(Refusal.ADAPTER_QUEUE, reason, retry_after)
        if timeout_seconds is not None and estimated + own_seconds > timeout_seconds:
            would = "be answered" if own_seconds else "start"
            seconds = estimated + own_seconds
            reason = f"It would {would} in about {seconds:.3g} s, and its client waits {timeout_seconds:g} s."
            return Rejected(Refusal.CLIENT_TIMEOUT, reason, retry_after)
        return None

    def _next(self) -> tuple[Line | None, bool]:
        """The line whose head starts next, and whether by a turn in a slot; None when nothing may start."""
        limits, shares = self.limits, self.shares
        if self.running < limits.max_running:
            ready, turn = shares.by_place.first(), shares.by_turn.first()
        elif self.running < limits.max_running + limits.spare:
            orders = (shares.by_place, shares.by_turn)
            ready, turn = (shares.first_below_share(order, limits.max_running) for order in orders)
        else:
            return None, False
        if not self.slots.has_room:
            turn = None
        if turn is not None and (ready is None or turn.charged <= ready.charged):
            return turn.cold.first(), True
        return (None if ready is None else ready.ready.first()), False

    def _start(self, line: Line, is_turn: bool, now: float) -> Ticket:
        ticket, flow = line.head, line.flow
        if is_turn:
            self.shares.turned(flow)
            self.slots.open(ticket.adapter or "", now)
            self._room.arrange_all(ticket.adapter or "", now)
        self._charges[ticket] = self.shares.started(flow)
        self._room.take_out(ticket, now)
        self.running_by[ticket.tenant] += 1
        if ticket.adapter is not None:
            self.slots.owners[ticket.adapter].running += 1
            self._room.show_work(ticket.adapter, now)
        return ticket

    def _settle(self, now: float) -> None:
        """What the time that passed brings: clients gone, patience over, slots to close or to keep."""
        room, slots = self._room, self.slots
        room.drop_expired(now)
        room.lose_patience(now)
        wanted = len(room.overdue)
        if wanted:
            wanted = min(wanted + slots.slow(self.limits.patience_seconds, now), slots.number)
        while slots.coming < wanted and (closed := slots.close_one(now)) is not None:
            room.arrange_all(closed, now, cold_since=now)
        while slots.coming > wanted and (reopened := slots.reopen_one()) is not None:
            room.arrange_all(reopened, now)


def _bounded(seconds: float) -> float:
    """A wait as a client is told it."""
    return min(MOST_RETRY_SECONDS, max(LEAST_RETRY_SECONDS, seconds))
