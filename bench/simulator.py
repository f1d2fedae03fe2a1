"""`python -m bench.simulator [--requests N] [--adapters M] [--trace FILE]`: admission policies on a modelled engine.

The model: all running requests make one token in each step. A step takes `step + row * requests + adapter * distinct
adapters` seconds; a prompt holds all of them up for `prompt` seconds a token, an adapter that is not in a slot for
`switch`, and one that is not staged either for `load`. The figures (COSTS) are of the embedded base on two cores
(decode and first token: docs/benchmarks.md; a load: 70-98 ms for 9.8 MB, as vLLM makes it); that of a switch is an
assumption. There is one slot more than is given out, and the one not used for longest goes first, as vLLM has it. It
tells orders and ratios, not milliseconds; with costs taken from a real run `python -m bench.simulated` holds it to it.
"""

from __future__ import annotations

import argparse
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from itertools import count
from math import ceil, inf
from pathlib import Path
from typing import Any, Protocol

from bench.many.stats import jain
from bench.report import Report, machine, write
from bench.simulator_policies import POLICIES, Policy
from bench.simulator_traces import Request, adversary, bursts, poisson, read_trace
from server.admission import Limits
from server.eviction import HALF_LIFE_SECONDS
from server.ordered import Order
from server.popularity import DecayingCount

STAGED = 64
SAME_STEP = 1e-6  # of a step
LIMITS = Limits(slots=8, max_running=32, max_queued=10**9, patience_seconds=0.5)
RATE = 3.0  # requests a second: about half of what the model serves when adapters are few
SEED = 20


@dataclass(frozen=True)
class Costs:
    """Seconds that the modelled engine takes for what."""

    step: float = 0.0177
    row: float = 0.0012
    adapter: float = 0.0005
    prompt: float = 0.001  # a token
    switch: float = 0.005
    load: float = 0.085


COSTS = Costs()


class Coming(Protocol):
    """Requests on their way to the policy."""

    def next_at(self) -> float:
        """When the next one comes; infinite where none does before another is answered."""
        ...

    def take(self) -> Request: ...

    def ended(self, now: float) -> None:
        """A request was answered."""


class Arrivals:
    """Requests as they come, whatever is answered."""

    def __init__(self, requests: Iterable[Request]) -> None:
        self._todo = iter(requests)
        self._coming = next(self._todo, None)

    def next_at(self) -> float:
        return inf if self._coming is None else self._coming.arrival

    def take(self) -> Request:
        one = self._coming
        if one is None:
            raise RuntimeError("no request comes any more: next_at is asked before")
        self._coming = next(self._todo, None)
        return one

    def ended(self, now: float) -> None:
        """A request was answered; here nobody waited for that to ask the next."""


class Clients:
    """So many clients, each of which asks its next request when its last was answered; a request's arrival is made."""

    def __init__(self, requests: Iterable[Request], clients: int) -> None:
        self._todo = iter(requests)
        self._coming = next(self._todo, None)
        self._free_at = deque([0.0] * clients)  # in order, since time goes on

    def next_at(self) -> float:
        return self._free_at[0] if self._free_at and self._coming is not None else inf

    def take(self) -> Request:
        one = self._coming
        if one is None:
            raise RuntimeError("no request comes any more: next_at is asked before")
        self._coming = next(self._todo, None)
        return replace(one, arrival=self._free_at.popleft())

    def ended(self, now: float) -> None:
        self._free_at.append(now)


class Watcher(Protocol):
    """Who is told what becomes of a request, and when."""

    def started(self, one: Request, now: float) -> None: ...

    def first_token(self, one: Request, now: float) -> None: ...

    def ended(self, one: Request, now: float) -> None: ...


@dataclass
class Outcome:
    """What one policy made of one trace."""

    first_tokens: list[float] = field(default_factory=list)  # seconds from arrival
    waits: list[float] = field(default_factory=list)  # seconds from arrival to start
    by_tenant: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    tokens: int = 0
    seconds: float = 0.0
    switches: int = 0
    loads: int = 0

    def started(self, one: Request, now: float) -> None:
        self.waits.append(now - one.arrival)

    def first_token(self, one: Request, now: float) -> None:
        self.first_tokens.append(now - one.arrival)
        self.by_tenant[one.tenant].append(now - one.arrival)

    def ended(self, one: Request, now: float) -> None:
        self.tokens += one.output_tokens

    def row(self, trace: str, policy: str) -> dict[str, Any]:
        """One row of the table."""
        shares = [len(values) / max(sum(values), 1e-9) for values in self.by_tenant.values()]
        heaviest = max(self.by_tenant, key=lambda tenant: len(self.by_tenant[tenant]))
        others = [value for tenant, values in self.by_tenant.items() if tenant != heaviest for value in values]
        return {
            "trace": trace,
            "policy": policy,
            "tokens/s": self.tokens / self.seconds,
            **{f"TTFT p{part}, s": percentile(self.first_tokens, part) for part in (50, 95, 99)},
            "p95 of the lighter tenants, s": percentile(others, 95),
            "longest wait, s": max(self.waits),
            "slot switches": self.switches,
            "loads": self.loads,
            "Jain": jain(shares),
        }


def percentile(values: Sequence[float], part: int) -> float:
    """The least of the values that so many percent are not above; of none it is nothing."""
    return sorted(values)[ceil(len(values) * part / 100) - 1] if values else 0.0


class Stage:
    """The adapters in the engine's memory."""

    def __init__(self, size: int, evicts_by_cost: bool) -> None:
        self.size, self.evicts_by_cost = size, evicts_by_cost
        self.order: Order[str] = Order()
        self.popularity: dict[str, DecayingCount] = {}

    def use(self, adapter: str, now: float) -> bool:
        """Whether it was there; it is now."""
        was_there = adapter in self.order
        if not was_there and len(self.order) >= self.size:
            self.order.drop(self.order.first() or "")
        known = self.popularity.setdefault(adapter, DecayingCount(HALF_LIFE_SECONDS))
        known.add(now)
        self.order.put(adapter, known.rank() if self.evicts_by_cost else now)
        return was_there


class Model:
    """The engine: virtual time in steps, so that a change of the batch costs O(log n) whatever runs."""

    def __init__(self, slots: int, stage: Stage, costs: Costs = COSTS) -> None:
        self.slots, self.stage, self.costs = slots, stage, costs
        self.now, self.steps, self.stalled = 0.0, 0.0, 0.0
        self.rows = 0
        self.active: Counter[str] = Counter()
        self.in_slots: OrderedDict[str, None] = OrderedDict()
        self.switches = self.loads = 0
        self._marks: list[tuple[float, int, Request, bool]] = []  # steps, ..., whether it is its end
        self._numbers = count()

    def start(self, one: Request) -> None:
        self.stalled += self.costs.prompt * one.prompt_tokens
        if one.adapter is not None:
            self._into_slot(one.adapter)
            self.active[one.adapter] += 1
        self.rows += 1
        heappush(self._marks, (self.steps + 1, next(self._numbers), one, False))
        heappush(self._marks, (self.steps + one.output_tokens, next(self._numbers), one, True))

    def next_at(self) -> float:
        """When the next request has its first token, or its last."""
        if not self._marks:
            return inf
        if self._marks[0][0] <= self.steps + SAME_STEP:  # of the step that was just made: no stall comes before it
            return self.now
        return self.now + self.stalled + max(0.0, self._marks[0][0] - self.steps) * self._step()

    def advance(self, now: float) -> None:
        passed = now - self.now
        stalled = min(passed, self.stalled)
        self.stalled -= stalled
        if self.rows:
            self.steps += (passed - stalled) / self._step()
        self.now = now

    def reach(self) -> tuple[Request, bool]:
        """Go on to the next mark: a request, and whether it has ended."""
        self.advance(self.next_at())
        steps, _, one, is_end = heappop(self._marks)
        self.steps = max(self.steps, steps)
        if is_end:
            self.rows -= 1
            if one.adapter is not None:
                self.active[one.adapter] -= 1
                if not self.active[one.adapter]:
                    del self.active[one.adapter]
        return one, is_end

    def _step(self) -> float:
        return self.costs.step + self.costs.row * self.rows + self.costs.adapter * len(self.active)

    def _into_slot(self, adapter: str) -> None:
        was_staged = self.stage.use(adapter, self.now)
        if adapter not in self.in_slots:
            if len(self.in_slots) > self.slots:
                del self.in_slots[next(name for name in self.in_slots if name not in self.active)]
            self.switches += 1
            self.loads += not was_staged
            self.stalled += self.costs.switch if was_staged else self.costs.load
        self.in_slots[adapter] = None
        self.in_slots.move_to_end(adapter)


def simulate(policy: Policy, requests: Iterable[Request], limits: Limits = LIMITS) -> Outcome:
    """Run a trace to its end."""
    outcome, model = Outcome(), Model(limits.slots, Stage(STAGED, policy.evicts_by_cost))
    play(policy, model, Arrivals(requests), outcome)
    outcome.seconds, outcome.switches, outcome.loads = model.now, model.switches, model.loads
    return outcome


def play(policy: Policy, model: Model, arrivals: Coming, watcher: Watcher, until_seconds: float = inf) -> None:
    """Let requests come, start and end, until there are none or the model's clock is there."""
    started_at: dict[Request, float] = {}

    def begin(started: list[Request]) -> None:
        for one in started:
            started_at[one] = model.now
            watcher.started(one, model.now)
            model.start(one)

    while (next_at := min(arrivals.next_at(), model.next_at())) < inf and next_at <= until_seconds:
        if arrivals.next_at() <= model.next_at():
            coming = arrivals.take()
            model.advance(coming.arrival)
            begin(policy.arrive(coming, model.now))
            continue
        one, is_end = model.reach()
        if not is_end:
            watcher.first_token(one, model.now)
            continue
        watcher.ended(one, model.now)
        arrivals.ended(model.now)
        begin(policy.end(one, model.now - started_at.pop(one), model.now))


def traces(requests: int, adapters: int) -> dict[str, Callable[[], Iterable[Request]]]:
    """The generated traces, each made anew for every policy."""
    made: dict[str, Callable[[], Iterable[Request]]] = {
        f"Zipf {alpha:g}": lambda alpha=alpha: poisson(requests, adapters, RATE, alpha, SEED)  # type: ignore[misc]
        for alpha in (0.6, 1.0, 1.4)
    }
    made["bursts"] = lambda: bursts(requests, adapters, RATE, 1.0, SEED)
    made["adversary"] = lambda: adversary(requests, adapters, 1.5 * RATE, LIMITS.slots, SEED)
    made["adversary, overload"] = lambda: adversary(requests, adapters, 2.5 * RATE, LIMITS.slots, SEED)
    return made


def compare(made: dict[str, Callable[[], Iterable[Request]]], policies: Sequence[str] = tuple(POLICIES)) -> Report:
    """Each of the policies on every trace."""
    report = Report("Admission, simulated")
    for trace, make in made.items():
        for policy in policies:
            report.rows.append(simulate(POLICIES[policy](LIMITS), make()).row(trace, policy))
    report.notes.append(
        f"{LIMITS.slots} slots, {LIMITS.max_running} places, {STAGED} staged; seconds: step {COSTS.step} + "
        f"{COSTS.row} a request + {COSTS.adapter} an adapter, prompt token {COSTS.prompt}, switch {COSTS.switch}, load "
        f"{COSTS.load}. Jain: of the tenants' "
        "inverse mean TTFT; the lighter tenants: all but the one with most requests."
    )
    return report


def run(rounds: int) -> list[Report]:
    """A run of 2,000 requests for each of the rounds; `python -m bench.simulator` has choices."""
    return [compare(traces(2000 * rounds, 2000))]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.simulator", description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--adapters", type=int, default=2000)
    parser.add_argument("--trace", type=Path, help="a recorded trace in place of the generated ones")
    parser.add_argument("--only", help="one of the generated traces, by its name in the table")
    parser.add_argument("--policy", choices=POLICIES, help="one of the policies in place of all")
    parser.add_argument("--out", type=Path, default=Path("build/simulator.json"))
    given = parser.parse_args(arguments)
    made = traces(given.requests, given.adapters)
    if given.only is not None:
        made = {given.only: made[given.only]}
    if given.trace is not None:
        recorded = read_trace(given.trace)
        made = {given.trace.name: lambda: recorded}
    print(machine())
    report = compare(made, tuple(POLICIES) if given.policy is None else (given.policy,))
    report.print()
    write([report], given.out)


if __name__ == "__main__":
    main()
