"""The requests that wait at the door, in lines: what may start now, what needs a turn in a slot, who waited too long.

A line is ready (the base's, or its adapter's slot is open) or cold. A cold line whose adapter is in no slot becomes
overdue when its head has waited for the patience, or the patience is over since the adapter lost its slot; one whose
adapter is still in a slot that closes may go on there once that is done.
"""

from __future__ import annotations

from collections import Counter
from math import inf
from typing import TypeVar

from server.ordered import Order
from server.shares import Line, Shares, Ticket
from server.slots import Slots

Key = TypeVar("Key")


class Waiting:
    """Keeps lines, shares and slots in step: every change of a line goes through here."""

    def __init__(self, shares: Shares, slots: Slots, patience_seconds: float) -> None:
        self.shares = shares
        self.slots = slots
        self.patience_seconds = patience_seconds
        self.number = 0
        self.by_tenant: Counter[str] = Counter()
        self.by_adapter: Counter[str | None] = Counter()
        self.lines: dict[str, dict[Line, None]] = {}  # of each adapter
        self.overdue: dict[str, dict[Line, None]] = {}
        self._patient: Order[Line] = Order()  # cold lines, by when they are overdue
        self._deadlines: Order[Ticket] = Order()

    def join(self, ticket: Ticket, now: float) -> None:
        """The ticket waits from now on."""
        flow = self.shares.flow(ticket.tenant, ticket.priority)
        line = flow.lines.get(ticket.adapter)
        if line is None:
            line = flow.lines[ticket.adapter] = Line(flow, ticket.adapter)
            if ticket.adapter is not None:
                self.lines.setdefault(ticket.adapter, {})[line] = None
        line.tickets[ticket] = None
        if ticket.deadline is not None:
            self._deadlines.put(ticket, ticket.deadline)
        self.number += 1
        self.by_tenant[ticket.tenant] += 1
        self.by_adapter[ticket.adapter] += 1
        self.shares.joined(flow)
        self.arrange(line, now)

    def take_out(self, ticket: Ticket, now: float) -> None:
        """The ticket, which waits, does so no more."""
        flow = self.shares.flow(ticket.tenant, ticket.priority)
        line = flow.lines[ticket.adapter]
        del line.tickets[ticket]
        if not line.tickets:
            del flow.lines[ticket.adapter]
            if ticket.adapter is not None:
                _discard(self.lines, ticket.adapter, line)
        self._deadlines.drop(ticket)
        self.number -= 1
        count_down(self.by_tenant, ticket.tenant)
        count_down(self.by_adapter, ticket.adapter)
        self.arrange(line, now)
        self.shares.left(flow)

    def holds(self, ticket: Ticket) -> bool:
        """The ticket waits."""
        flow = self.shares.flows.get((ticket.tenant, ticket.priority))
        line = flow.lines.get(ticket.adapter) if flow is not None else None
        return line is not None and ticket in line.tickets

    def drop_expired(self, now: float) -> None:
        """Take those out whose client has stopped waiting."""
        while (ticket := self._deadlines.first()) is not None and self._deadlines.key(ticket) <= now:
            self.take_out(ticket, now)

    def lose_patience(self, now: float) -> None:
        """Count the lines as overdue that are by now."""
        while (line := self._patient.first()) is not None and self._patient.key(line) <= now:
            self._patient.drop(line)
            self._set_overdue(line, True)

    def arrange(self, line: Line, now: float) -> None:
        """Put the line where it belongs, after its tickets or its adapter's slot changed."""
        flow, adapter = line.flow, line.adapter
        is_ready = bool(line.tickets) and self.slots.is_open(adapter)
        is_cold = bool(line.tickets) and not is_ready
        flow.ready.put(line, line.head.number) if is_ready else flow.ready.drop(line)
        flow.cold.put(line, self._turn_key(line)) if is_cold else flow.cold.drop(line)
        needs_slot = is_cold and adapter not in self.slots.owners
        due = max(line.head.arrived_at, line.cold_since) + self.patience_seconds if needs_slot else inf
        self._patient.put(line, due) if now < due < inf else self._patient.drop(line)
        self._set_overdue(line, due <= now)
        if adapter is not None:
            self.show_work(adapter, now)
        self.shares.refresh(flow)

    def arrange_all(self, adapter: str, now: float, cold_since: float = -inf) -> None:
        """The same for all lines of an adapter; where it lost its slot, since when."""
        self.show_work(adapter, now)
        for line in list(self.lines.get(adapter, ())):
            line.cold_since = cold_since
            self.arrange(line, now)

    def show_work(self, adapter: str, now: float) -> None:
        """Tell the slots whether the adapter has something to do."""
        owner = self.slots.owners.get(adapter)
        if owner is not None:
            self.slots.show_work(adapter, owner.running > 0 or adapter in self.lines, now)

    def _turn_key(self, line: Line) -> tuple[int, int, int]:
        """Longest waiting first, in steps of one patience; within one the line with most requests."""
        head = line.head
        return int(head.arrived_at // self.patience_seconds), -len(line.tickets), head.number

    def _set_overdue(self, line: Line, is_overdue: bool) -> None:
        if line.adapter is None:
            return
        if is_overdue:
            self.overdue.setdefault(line.adapter, {})[line] = None
        else:
            _discard(self.overdue, line.adapter, line)


def count_down(counter: Counter[Key], key: Key) -> None:
    """One less; a count of nothing is not kept."""
    counter[key] -= 1
    if not counter[key]:
        del counter[key]


def _discard(lines: dict[str, dict[Line, None]], adapter: str, line: Line) -> None:
    found = lines.get(adapter, {})
    found.pop(line, None)
    if not found:
        lines.pop(adapter, None)
