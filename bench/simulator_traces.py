"""What the simulator is fed: requests in the order in which they come, generated or recorded.

A recorded trace is JSON lines: `{"arrival": SECONDS, "tenant": "...", "adapter": "..." or null, "prompt_tokens": N,
"output_tokens": N}`, in any order.
"""

from __future__ import annotations

import json
import random
from bisect import bisect
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path

MEDIAN_PROMPT, MEDIAN_OUTPUT = 64, 32
SPREAD = 0.8  # sigma of the logarithm: the 95th percentile is 3.7 times the median
LONGEST = 1024
BASE_SHARE = 0.1  # of generated requests ask for the base
TENANTS = 20


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One request of a trace."""

    arrival: float
    tenant: str
    adapter: str | None
    prompt_tokens: int
    output_tokens: int


def poisson(requests: int, adapters: int, per_second: float, alpha: float, seed: int) -> Iterator[Request]:
    """Arrivals at random, adapters by Zipf's law with the exponent `alpha`; each adapter belongs to one tenant."""
    drawn = random.Random(seed)
    weights = list(accumulate(rank**-alpha for rank in range(1, adapters + 1)))
    now = 0.0
    for _ in range(requests):
        now += drawn.expovariate(per_second)
        number = bisect(weights, drawn.random() * weights[-1])
        yield _request(now, number, drawn)


def bursts(requests: int, adapters: int, per_second: float, alpha: float, seed: int) -> Iterator[Request]:
    """The same at half the rate, and for one second in ten at five and a half times it."""
    now, last = 0.0, 0.0
    for one in poisson(requests, adapters, 1.0, alpha, seed):
        gap, last = one.arrival - last, one.arrival
        now += gap / (per_second * (5.5 if now % 10 < 1 else 0.5))
        yield Request(now, one.tenant, one.adapter, one.prompt_tokens, one.output_tokens)


def adversary(requests: int, adapters: int, per_second: float, slots: int, seed: int) -> Iterator[Request]:
    """One tenant floods as many adapters as there are slots; each hundredth request is a cold one of somebody else."""
    drawn = random.Random(seed)
    now = 0.0
    for i in range(requests):
        now += drawn.expovariate(per_second)
        if i % 100 == 99:
            number = drawn.randrange(slots, max(adapters, slots + 1))
            yield Request(now, f"calm{number % TENANTS}", f"cold{number}", *_lengths(drawn))
        else:
            yield Request(now, "flood", f"hot{drawn.randrange(slots)}", *_lengths(drawn))


def read_trace(path: Path) -> list[Request]:
    """A recorded trace, in the order of arrival. Raises ValueError with the line that is none."""
    found = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            found.append(Request(**json.loads(line)))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}:{number}: {error}; each line is as this module says") from error
    return sorted(found, key=lambda one: one.arrival)


def write_trace(path: Path, requests: Sequence[Request]) -> None:
    """A trace that `read_trace` reads."""
    path.write_text("".join(json.dumps(asdict(one)) + "\n" for one in requests))


def _request(now: float, number: int, drawn: random.Random) -> Request:
    adapter = None if drawn.random() < BASE_SHARE else f"adapter{number}"
    return Request(now, f"tenant{number % TENANTS}", adapter, *_lengths(drawn))


def _lengths(drawn: random.Random) -> tuple[int, int]:
    prompt = min(LONGEST, max(1, round(MEDIAN_PROMPT * drawn.lognormvariate(0.0, SPREAD))))
    return prompt, min(LONGEST, max(1, round(MEDIAN_OUTPUT * drawn.lognormvariate(0.0, SPREAD))))
