"""What holds for every course of events: capacity, work conserving, and no wait beyond the stated bound."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.types import Priority
from server.admission import Admission, Admitted, Limits, Quantum, Queued, Ticket
from server.shares import WEIGHTS
from server.start_bound import Load, start_bound_seconds

LONGEST = 2.0  # seconds that a request of these tests runs at most
LIMITS = Limits(2, 3, 30, 0.5, None, Quantum(10.0, 0.25, 2.0))


@dataclass(frozen=True)
class Arrival:
    at: float
    adapter: str | None
    seconds: float
    tenant: str = ""
    priority: Priority = Priority.NORMAL


@dataclass
class Course:
    """One course of events at one door, checked after each."""

    admission: Admission
    waits: dict[Ticket, float] = field(default_factory=dict)
    running: set[Ticket] = field(default_factory=set)
    waiting: dict[Ticket, int] = field(default_factory=dict)  # with the requests of its flow that were before it
    after_event: Callable[[float], None] = lambda now: None
    _ends: list[tuple[float, int, Ticket, float]] = field(default_factory=list)
    _seconds: dict[Ticket, float] = field(default_factory=dict)

    def run(self, arrivals: Sequence[Arrival]) -> None:
        todo = deque(arrivals)
        while todo or self._ends:
            if self._ends and (not todo or self._ends[0][0] <= todo[0].at):
                now, _, ticket, seconds = heappop(self._ends)
                self.running.remove(ticket)
                self.admission.release(ticket, seconds, now)
            else:
                now = self._arrive(todo.popleft())
            for ticket in self.admission.admit_waiting(now):
                del self.waiting[ticket]
                self._begin(ticket, now)
            self._check()
            self.after_event(now)

    def _arrive(self, one: Arrival) -> float:
        answer = self.admission.ask(one.adapter, one.at, one.tenant, priority=one.priority)
        if isinstance(answer, Admitted | Queued):
            self._seconds[answer.ticket] = one.seconds
        if isinstance(answer, Queued):
            flow = (one.tenant, one.priority)
            self.waiting[answer.ticket] = sum((each.tenant, each.priority) == flow for each in self.waiting)
        if isinstance(answer, Admitted):
            self._begin(answer.ticket, one.at)
        return one.at

    def _begin(self, ticket: Ticket, now: float) -> None:
        self.waits[ticket] = now - ticket.arrived_at
        self.running.add(ticket)
        seconds = self._seconds[ticket]
        heappush(self._ends, (now + seconds, ticket.number, ticket, seconds))

    def _check(self) -> None:
        limits, admission = self.admission.limits, self.admission
        active = {ticket.adapter for ticket in self.running} - {None}
        assert len(self.running) == admission.running <= limits.max_running + limits.spare
        assert len(active) <= limits.slots
        assert len(self.waiting) == admission.waiting
        assert not max(Counter(ticket.tenant for ticket in self.waiting).values(), default=0) > limits.max_queued
        if len(self.running) < limits.max_running:
            assert all(ticket.adapter is not None for ticket in self.waiting)
            assert len(active) == limits.slots or not self.waiting
            closing = {owner.adapter for owner in admission.slots.owners.values() if owner.is_closing}
            assert {ticket.adapter for ticket in self.waiting} & active <= closing
        elif len(self.running) < limits.max_running + limits.spare:
            self._check_shares()

    def _check_shares(self) -> None:
        """A spare place is left: who waits for the base has its share of the places, or one request that runs."""
        limits = self.admission.limits
        runs, waits = (Counter((one.tenant, one.priority) for one in some) for some in (self.running, self.waiting))
        weights = {flow: limits.tenant_weights.get(flow[0], 1.0) * WEIGHTS[flow[1]] for flow in runs | waits}
        for tenant, priority in {(one.tenant, one.priority) for one in self.waiting if one.adapter is None}:
            share = limits.max_running * weights[tenant, priority] / sum(weights.values())
            assert runs[tenant, priority] + 1 > max(1.0, share) * (1 - 1e-9)


def bound(limits: Limits, arrivals: Sequence[Arrival], ticket: Ticket, before: int) -> float:
    flows = {(one.tenant, one.priority) for one in arrivals}
    weights = [limits.tenant_weights.get(tenant, 1.0) * WEIGHTS[priority] for tenant, priority in flows]
    own = limits.tenant_weights.get(ticket.tenant, 1.0) * WEIGHTS[ticket.priority]
    # Those of its flow that came within one patience after it may be before it too.
    early = sum(
        (one.tenant, one.priority) == (ticket.tenant, ticket.priority)
        and ticket.arrived_at <= one.at <= ticket.arrived_at + limits.patience_seconds
        for one in arrivals
    )
    load = Load(LONGEST, len(flows), sum(weights), min(weights))
    return start_bound_seconds(limits, load, own, before + early)


arrival = st.builds(
    Arrival,
    st.floats(0.0, 0.4),
    st.sampled_from([None, "a", "b", "c", "d"]),
    st.floats(0.01, LONGEST),
    st.sampled_from("xyz"),
    st.sampled_from(list(Priority)),
)


def in_time(gaps: Sequence[Arrival]) -> list[Arrival]:
    now, found = 0.0, []
    for one in gaps:
        now += one.at
        found.append(Arrival(now, one.adapter, one.seconds, one.tenant, one.priority))
    return found


@settings(max_examples=200, deadline=None)
@given(
    st.lists(arrival, max_size=80),
    st.integers(1, 3),
    st.integers(1, 4),
    st.dictionaries(st.sampled_from("xyz"), st.floats(0.01, 100.0)),
    st.integers(0, 4),
)
def test_capacity_holds_work_is_conserved_and_everybody_starts_within_the_bound(
    gaps: list[Arrival], slots: int, places: int, tenant_weights: dict[str, float], spare: int
) -> None:
    arrivals = in_time(gaps)
    limits = Limits(slots, places, 30, 0.5, None, LIMITS.quantum, tenant_weights, spare)
    course = Course(Admission(limits))
    before: dict[Ticket, int] = {}
    course.after_event = lambda now: before.update({one: n for one, n in course.waiting.items() if one not in before})
    course.run(arrivals)
    assert not course.waiting and not course.running
    assert not course.admission.waiting_by and not course.admission.running_by
    for ticket, wait in course.waits.items():
        assert wait <= bound(limits, arrivals, ticket, before.get(ticket, 0)), ticket


def flood(seconds: float, per_second: int, tenants: Sequence[str], adapters: Sequence[str]) -> list[Arrival]:
    """Endless hot traffic, as far as one request that comes after a second can tell."""
    return [
        Arrival(i / per_second, adapters[i % len(adapters)], 1.0, tenants[i % len(tenants)])
        for i in range(int(seconds * per_second))
    ]


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.sampled_from(["p", "q", "r", "s"]), min_size=1, max_size=4, unique=True),
    st.sampled_from([["hot"], ["hot", "warm"]]),
    st.sampled_from(["calm", "p"]),
)
def test_one_cold_adapter_starts_within_the_bound_against_endless_hot_traffic(
    tenants: list[str], adapters: list[str], whose: str
) -> None:
    limits = Limits(1, 4, 30, 0.5, None, LIMITS.quantum)
    cold = Arrival(1.01, "cold", 1.0, whose)
    arrivals = sorted([*flood(120.0, 9, tenants, adapters), cold], key=lambda one: one.at)
    course = Course(Admission(limits))
    course.run(arrivals)
    [(_, wait)] = [(one, wait) for one, wait in course.waits.items() if one.adapter == "cold"]
    flows = len({one.tenant for one in arrivals})
    load = Load(LONGEST, flows, float(flows), 1.0)
    assert wait <= start_bound_seconds(limits, load, 1.0, limits.max_queued)
    assert wait <= 60.0  # the bound is for the worst; half of the flood's time is far


def passed_over(arrivals: Sequence[Arrival], slots: int, places: int) -> dict[Arrival, float]:
    """Waits under vLLM's rule: the oldest whose adapter fits among those that run, nobody ageing."""
    waiting: list[Arrival] = []
    ends: list[tuple[float, int, Arrival]] = []
    todo, waits = deque(arrivals), dict[Arrival, float]()
    while todo:
        if ends and ends[0][0] <= todo[0].at:
            now = heappop(ends)[0]
        else:
            now = todo[0].at
            waiting.append(todo.popleft())
        for one in list(waiting):
            active = {running.adapter for _, _, running in ends}
            if len(ends) < places and (one.adapter in active or len(active) < slots):
                waiting.remove(one)
                waits[one] = now - one.at
                heappush(ends, (now + one.seconds, len(waits), one))
    return waits


def test_the_same_cold_adapter_never_starts_where_it_is_passed_over_without_ageing() -> None:
    cold = Arrival(1.01, "cold", 1.0, "calm")
    arrivals = sorted([*flood(120.0, 9, ["p"], ["hot"]), cold], key=lambda one: one.at)
    waits = passed_over(arrivals, slots=1, places=4)
    assert cold not in waits and len(waits) > 400
