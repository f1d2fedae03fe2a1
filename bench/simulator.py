"""`python -m bench.simulator [--requests N] [--adapters M] [--trace FILE]`: admission policies on a modelled engine.

The model: all running requests make one token in each step. A step takes `STEP + ROW * requests + ADAPTER * distinct
adapters` seconds; a prompt holds all of them up for `PROMPT` seconds a token, an adapter that is not in a slot for
`SWITCH`, and one that is not staged either for `LOAD`. The figures are of the embedded base on two cores (decode and
first token: docs/benchmarks.md; LOAD: 70-98 ms for 9.8 MB); SWITCH is an assumption. There is one slot more than is
given out, and the one not used for longest goes first, as vLLM has it. It tells orders and ratios, not milliseconds.
"""

from __future__ import annotations

import argparse
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from math import ceil, inf
from pathlib import Path
from typing import Any

from bench.many.stats import jain
from bench.report import Report, machine, write
from bench.simulator_policies import POLICIES, Policy
from bench.simulator_traces import Request, adversary, bursts, poisson, read_trace
from server.admission import Limits
from server.eviction import HALF_LIFE_SECONDS
from server.ordered import Order
from server.popularity import DecayingCount

STEP, ROW, ADAPTER = 0.0177, 0.0012, 0.0005
PROMPT, SWITCH, LOAD = 0.001, 0.005, 0.085
STAGED = 64
LIMITS = Limits(slots=8, max_running=32, max_queued=10**9, patience_seconds=0.5)
RATE = 3.0  # requests a second: about half of what the model serves when adapters are few
SEED = 20


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

    def __init__(self, slots: int, stage: Stage) -> None:
        self.slots, self.stage = slots, stage
        self.now, self.steps, self.stalled = 0.0, 0.0, 0.0
        self.rows = 0
        self.active: Counter[str] = Counter()
        self.in_slots: OrderedDict[str, None] = OrderedDict()
        self.switches = self.loads = 0
        self._marks: list[tuple[float, int, Request, bool]] = []  # steps, ..., whether it is its end
        self._numbers = count()

    def start(self, one: Request) -> None:
        self.stalled += PROMPT * one.prompt_tokens
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
        return STEP + ROW * self.rows + ADAPTER * len(self.active)

    def _into_slot(self, adapter: str) -> None:
        was_staged = self.stage.use(adapter, self.now)
        if adapter not in self.in_slots:
            if len(self.in_slots) > self.slots:
                del self.in_slots[next(name for name in self.in_slots if name not in self.active)]
            self.switches += 1
            self.loads += not was_staged
            self.stalled += SWITCH if was_staged else LOAD
        self.in_slots[adapter] = None
        self.in_slots.move_to_end(adapter)


def simulate(policy: Policy, requests: Iterable[Request], limits: Limits = LIMITS) -> Outcome:
    """Run a trace to its end."""
    outcome, model = Outcome(), Model(limits.slots, Stage(STAGED, policy.evicts_by_cost))
    started_at: dict[Request, float] = {}
    todo = iter(requests)
    coming = next(todo, None)

    def begin(started: list[Request]) -> None:
        for one in started:
            started_at[one] = model.now
            outcome.waits.append(model.now - one.arrival)
            model.start(one)

    while coming is not None or model.rows:
        if coming is not None and coming.arrival <= model.next_at():
            model.advance(coming.arrival)
            begin(policy.arrive(coming, model.now))
            coming = next(todo, None)
            continue
        one, is_end = model.reach()
        if is_end:
            outcome.tokens += one.output_tokens
            begin(policy.end(one, model.now - started_at.pop(one), model.now))
        else:
            outcome.first_tokens.append(model.now - one.arrival)
            outcome.by_tenant[one.tenant].append(model.now - one.arrival)
    outcome.seconds, outcome.switches, outcome.loads = model.now, model.switches, model.loads
    return outcome


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
        f"{LIMITS.slots} slots, {LIMITS.max_running} places, {STAGED} staged; seconds: step {STEP} + {ROW} a "
        f"request + {ADAPTER} an adapter, prompt token {PROMPT}, switch {SWITCH}, load {LOAD}. Jain: of the tenants' "
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
