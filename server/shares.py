"""Whose turn it is: each tenant's requests of one priority are a flow, and flows share places and slots by weight.

Places are shared in seconds: a flow is charged for a place what its requests usually take, corrected when they end, and
divided by its weight; the flow that was charged least comes first. Slots are shared in turns, because an adapter that
waits for one must not pay for what another of its tenant does in its own. A flow that comes back after a while begins
where the others are (start-time fair queueing, Goyal et al., SIGCOMM 1996): nobody saves up, nobody pays for the past.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from types import MappingProxyType

from adapters.types import Priority
from server.ordered import Order

SMOOTHING = 0.2
SERVICE_SECONDS_AT_START = 2.0
# Weights, not ranks: the least of them still gets its share.
WEIGHTS = {Priority.HIGH: 4.0, Priority.NORMAL: 1.0, Priority.LOW: 0.25}


@dataclass(frozen=True, slots=True, eq=False)
class Ticket:
    """One request's place: which adapter it needs (None: the base), when it came, whose it is, how long it waits."""

    adapter: str | None
    arrived_at: float
    tenant: str = ""
    priority: Priority = Priority.NORMAL
    deadline: float | None = None
    number: int = 0  # tickets are numbered as they come


@dataclass(eq=False)
class Line:
    """The waiting requests of one flow for one adapter, oldest first."""

    flow: Flow
    adapter: str | None
    tickets: OrderedDict[Ticket, None] = field(default_factory=OrderedDict)
    cold_since: float = -inf  # when its adapter lost its slot

    @property
    def head(self) -> Ticket:
        return next(iter(self.tickets))


@dataclass(eq=False)
class Flow:
    """One tenant's requests of one priority: what runs, what waits, and what it was charged."""

    tenant: str
    priority: Priority
    tenant_weight: float = 1.0
    running: int = 0
    waiting: int = 0
    charged: float = 0.0  # seconds of places over weight
    turns: float = 0.0  # slots that were opened for it, over weight
    service_seconds: float = SERVICE_SECONDS_AT_START
    lines: dict[str | None, Line] = field(default_factory=dict)
    ready: Order[Line] = field(default_factory=Order)  # the base's, and those whose adapter takes requests
    cold: Order[Line] = field(default_factory=Order)  # those whose adapter needs a turn in a slot

    @property
    def weight(self) -> float:
        return self.tenant_weight * WEIGHTS[self.priority]


class Shares:
    """All flows, in the order in which they get the next place, and the next turn in a slot."""

    def __init__(self, tenant_weights: Mapping[str, float] = MappingProxyType({})) -> None:
        self._tenant_weights = tenant_weights  # 1 for one that is not among them
        self.flows: dict[tuple[str, Priority], Flow] = {}
        self.by_place: Order[Flow] = Order()
        self.by_turn: Order[Flow] = Order()
        self.waiting_weight = 0.0
        self._charged = 0.0  # where the flow stood that got the last place
        self._turns = 0.0

    def flow(self, tenant: str, priority: Priority) -> Flow:
        key = (tenant, priority)
        found = self.flows.get(key)
        if found is None:
            found = self.flows[key] = self.seen_flow(tenant, priority)
        return found

    def seen_flow(self, tenant: str, priority: Priority) -> Flow:
        """The flow to look at; where there is none yet, what it would begin as, which is not among the flows."""
        return self.flows.get((tenant, priority)) or Flow(tenant, priority, self._tenant_weights.get(tenant, 1.0))

    def joined(self, flow: Flow) -> None:
        """One more of the flow waits."""
        if not flow.waiting:
            self.waiting_weight += flow.weight
        flow.waiting += 1

    def left(self, flow: Flow) -> None:
        """One less of the flow waits."""
        flow.waiting -= 1
        if not flow.waiting:
            self.waiting_weight -= flow.weight

    def started(self, flow: Flow) -> float:
        """The flow got a place; returns the seconds that it is charged until its request ends."""
        flow.running += 1
        self._charged = flow.charged = max(self._charged, flow.charged)
        flow.charged += flow.service_seconds / flow.weight
        return flow.service_seconds

    def ended(self, flow: Flow, charged_seconds: float, ran_seconds: float) -> None:
        """A request of the flow ended: it is charged what it took."""
        flow.running -= 1
        flow.charged = max(self._charged, flow.charged + (ran_seconds - charged_seconds) / flow.weight)
        flow.service_seconds += SMOOTHING * (ran_seconds - flow.service_seconds)
        self.refresh(flow)

    def first_below_share(self, order: Order[Flow], places: int) -> Flow | None:
        """The first flow of the order that would run no more than its share of the places, or one request; O(flows)."""
        active_weight = sum(flow.weight for flow in self.flows.values() if flow.running or flow.waiting)
        for flow in order.least(len(order)):
            if flow.running + 1 <= max(1.0, places * flow.weight / active_weight):
                return flow
        return None

    def turned(self, flow: Flow) -> None:
        """A slot was opened for the flow."""
        self._turns = max(self._turns, flow.turns)
        flow.turns += 1 / flow.weight

    def refresh(self, flow: Flow) -> None:
        """Put the flow where it belongs, after its lines or charges changed."""
        ready, cold = flow.ready.first(), flow.cold.first()
        if ready is None:
            self.by_place.drop(flow)
        else:
            if flow not in self.by_place:
                flow.charged = max(flow.charged, self._charged)
            self.by_place.put(flow, (flow.charged, flow.ready.key(ready)))
        if cold is None:
            self.by_turn.drop(flow)
            return
        if flow not in self.by_turn:
            flow.turns = max(flow.turns, self._turns)
        self.by_turn.put(flow, (flow.turns, flow.cold.key(cold)))
