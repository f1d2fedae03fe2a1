"""The policies that the simulator compares. Each owns a queue and says, after every event, who starts.

Ours is the very `server.admission.Admission`. The others are models of what is published, under the same limits of
places and distinct adapters: they show what their order of requests does, not those systems' speed.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from itertools import islice
from typing import Protocol

from bench.simulator_traces import Request
from server.admission import Admission, Admitted, Limits, Queued, Ticket
from server.ordered import Order


class Policy(Protocol):
    """`evicts_by_cost`: which staged adapter goes; else the one that was not used for longest."""

    evicts_by_cost: bool

    def arrive(self, one: Request, now: float) -> list[Request]:
        """A request came; who starts now."""
        ...

    def end(self, one: Request, ran_seconds: float, now: float) -> list[Request]:
        """A request ended; who starts now."""
        ...


class Ours:
    evicts_by_cost = True

    def __init__(self, limits: Limits) -> None:
        self.admission = Admission(limits)
        self._requests: dict[Ticket, Request] = {}
        self._tickets: dict[Request, Ticket] = {}

    def arrive(self, one: Request, now: float) -> list[Request]:
        answer = self.admission.ask(one.adapter, now, one.tenant)
        if not isinstance(answer, Admitted | Queued):
            raise RuntimeError(f"refused where nothing is to be: {answer}")
        self._requests[answer.ticket], self._tickets[one] = one, answer.ticket
        started = [one] if isinstance(answer, Admitted) else []
        return started + self._admit(now)

    def end(self, one: Request, ran_seconds: float, now: float) -> list[Request]:
        ticket = self._tickets.pop(one)
        del self._requests[ticket]
        self.admission.release(ticket, ran_seconds, now)
        return self._admit(now)

    def _admit(self, now: float) -> list[Request]:
        return [self._requests[ticket] for ticket in self.admission.admit_waiting(now)]


class Counted:
    """What the others share: who runs, and who could in that place and slot."""

    evicts_by_cost = False

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.running = 0
        self.active: Counter[str] = Counter()

    def arrive(self, one: Request, now: float) -> list[Request]:
        self.add(one)
        return self._started()

    def end(self, one: Request, ran_seconds: float, now: float) -> list[Request]:
        self.running -= 1
        if one.adapter is not None:
            self.active[one.adapter] -= 1
            if not self.active[one.adapter]:
                del self.active[one.adapter]
                self.lost_slot(one.adapter)
        return self._started()

    def fits(self, adapter: str | None) -> bool:
        return adapter is None or adapter in self.active or len(self.active) < self.limits.slots

    def _started(self) -> list[Request]:
        started = []
        while self.running < self.limits.max_running and (one := self.take()) is not None:
            self.running += 1
            if one.adapter is not None:
                self.active[one.adapter] += 1
                self.got_slot(one.adapter)
            started.append(one)
        return started

    def add(self, one: Request) -> None:
        raise NotImplementedError

    def take(self) -> Request | None:
        raise NotImplementedError

    def got_slot(self, adapter: str) -> None:
        """Its first request runs, or a further one."""

    def lost_slot(self, adapter: str) -> None:
        """Its last request ended."""


class Fcfs(Counted):
    """First come, first served: one that has no slot holds up all behind it."""

    def __init__(self, limits: Limits) -> None:
        super().__init__(limits)
        self.queue: deque[Request] = deque()

    def add(self, one: Request) -> None:
        self.queue.append(one)

    def take(self) -> Request | None:
        return self.queue.popleft() if self.queue and self.fits(self.queue[0].adapter) else None


class PassedOver(Counted):
    """vLLM's scheduler: the oldest that fits; one without a slot is passed over, and does not age."""

    def __init__(self, limits: Limits) -> None:
        super().__init__(limits)
        self._count = 0
        self._lines: dict[str | None, deque[tuple[int, Request]]] = {}
        self._fitting: Order[str | None] = Order()
        self._others: Order[str | None] = Order()

    def add(self, one: Request) -> None:
        self._count += 1
        line = self._lines.setdefault(one.adapter, deque())
        line.append((self._count, one))
        self._arrange(one.adapter)

    def take(self) -> Request | None:
        orders = [self._fitting, self._others] if len(self.active) < self.limits.slots else [self._fitting]
        heads = [(self._lines[order.first()][0][0], order.first()) for order in orders if len(order)]
        if not heads:
            return None
        _, adapter = min(heads, key=lambda head: head[0])
        _, one = self._lines[adapter].popleft()
        self._arrange(adapter)
        return one

    def got_slot(self, adapter: str) -> None:
        self._arrange(adapter)

    def lost_slot(self, adapter: str) -> None:
        self._arrange(adapter)

    def _arrange(self, adapter: str | None) -> None:
        self._fitting.drop(adapter)
        self._others.drop(adapter)
        line = self._lines.get(adapter)
        if not line:
            self._lines.pop(adapter, None)
            return
        order = self._fitting if adapter is None or adapter in self.active else self._others
        order.put(adapter, line[0][0])


class Clustered(Counted):
    """S-LoRA's clustering: of the oldest `window` requests those whose adapters are in go first, else the oldest."""

    window = 32

    def __init__(self, limits: Limits) -> None:
        super().__init__(limits)
        self.queue: OrderedDict[Request, None] = OrderedDict()

    def add(self, one: Request) -> None:
        self.queue[one] = None

    def take(self) -> Request | None:
        seen = list(islice(self.queue, self.window))
        found = next((one for one in seen if one.adapter is None or one.adapter in self.active), None)
        found = found or next((one for one in seen if self.fits(one.adapter)), None)
        if found is not None:
            del self.queue[found]
        return found


class Sized(Counted):
    """Chameleon's order: queues by size with shares of the places, small past large, and a cost-aware cache."""

    evicts_by_cost = True
    sizes = (80, 200)  # tokens of prompt and output: about a third of the requests in each

    def __init__(self, limits: Limits) -> None:
        super().__init__(limits)
        self.queues = [PassedOver(limits) for _ in range(len(self.sizes) + 1)]
        for queue in self.queues:
            queue.active = self.active
        self.taken = Counter[int]()

    def add(self, one: Request) -> None:
        self.queues[self.size(one)].add(one)

    def size(self, one: Request) -> int:
        return sum(one.prompt_tokens + one.output_tokens > size for size in self.sizes)

    def take(self) -> Request | None:
        """From the queue that has the smallest part of the places, of those that have one that fits."""
        for number in sorted(range(len(self.queues)), key=lambda each: self.taken[each]):
            one = self.queues[number].take()
            if one is not None:
                self.taken[number] += 1
                return one
        return None

    def end(self, one: Request, ran_seconds: float, now: float) -> list[Request]:
        self.taken[self.size(one)] -= 1
        return super().end(one, ran_seconds, now)

    def got_slot(self, adapter: str) -> None:
        for queue in self.queues:
            queue.got_slot(adapter)

    def lost_slot(self, adapter: str) -> None:
        for queue in self.queues:
            queue.lost_slot(adapter)


POLICIES: dict[str, Callable[[Limits], Policy]] = {
    "ours": Ours,
    "first come, first served": Fcfs,
    "passed over (vLLM)": PassedOver,
    "clustered (S-LoRA-like)": Clustered,
    "by size (Chameleon-like)": Sized,
}
