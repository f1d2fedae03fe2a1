"""What is measured on which sides for how long, and how long that takes: the whole of the bench as plain values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from bench.many.drive import Window
from bench.many.plan import Lengths, Load, Popularity
from bench.many.sides import SETTLE_SECONDS, Setup
from bench.many.stats import Slo

MANY = Setup("many", adapters=64, slots=64, staged=64)
SCARCE = Setup("scarce", adapters=64, slots=4, staged=64)  # sixteen adapters for each slot
HOT = 4  # the most popular adapters, by which the others are called warm and cold
RELOADED = Setup("reloaded", adapters=16, slots=4, staged=6)  # so that an adapter asked for in turn is on disk only
TABLES = ("mix", "closed", "first", "open", "stalls")
TRIAL = Setup("trial", adapters=8, slots=4, staged=8)
SLO = Slo(ttft_seconds=2.0, tpot_seconds=0.2)
PROMPTS, OUTPUTS = Lengths(64, 0.8, 8, 512), Lengths(24, 0.6, 4, 96)
BASE_SHARE = 0.1  # of the requests of an open load
SERVERS = ("hotshoe", "stock", "llama.cpp")
START_SECONDS = {"hotshoe": 90, "stock": 45, "bare": 60, "llama.cpp": 30, "peft": 45}  # about, with its adapters
PREFILL_SECONDS = 0.004  # a token, over all sides
STALL_EVENTS = 4  # of each kind in a round
STALL_WINDOW = Window(0.0, 20.0)  # about: the events end it


@dataclass(frozen=True)
class Case:
    """One load of one table on some sides. `load` is None for the stalls."""

    table: str
    name: str
    sides: tuple[str, ...]
    load: Load | None = None
    window: Window = STALL_WINDOW
    setup: Setup = MANY

    @property
    def seconds(self) -> float:
        """Of one measurement, about."""
        if self.load and self.window.requests:  # it ends with them
            return self.window.requests * self.load.prompt.median * PREFILL_SECONDS + SETTLE_SECONDS
        return self.window.total_seconds + SETTLE_SECONDS + 0.5


def full() -> list[Case]:
    """An hour and a half with five rounds: what says least about a peer that has been seen elsewhere is left out."""
    return [*mix(), *closed(), *first_tokens(), *opened(), *stalls()]


def short() -> list[Case]:
    """What fits into ten minutes with five rounds: fewer sides and loads, shorter windows."""
    window = Window(1.0, 3.5)
    base, four, popular, _ = mix(window, ("hotshoe", "stock"))
    four = Case(four.table, four.name, SERVERS, four.load, window)
    return [base, four, popular, open_case(1.0, window=Window(2.0, 10.0, 5.0), sides=("hotshoe", "stock"))]


def trial() -> list[Case]:
    """A load of every table on every side, as short as can be: to see that they run. Its figures say nothing."""
    wanted = ("base", "64 Zipf", "one adapter, 4 at once", "128 prompt tokens, one adapter", "alpha 1, 2/s")
    found = [case for case in full() if case.name in wanted or case.table == "stalls"]
    return [_small(case) for case in found]


def _small(case: Case) -> Case:
    if case.load is None:
        return case
    adapters = min(case.load.popularity.adapters, TRIAL.adapters)
    load = replace(case.load, popularity=replace(case.load.popularity, adapters=adapters))
    window = replace(case.window, warm_seconds=0.5, seconds=min(case.window.seconds, 2.0), drain_seconds=1.0)
    return replace(case, load=load, window=window if not case.window.requests else case.window, setup=TRIAL)


def mix(window: Window = Window(4.0, 12.0), sides: tuple[str, ...] = SERVERS) -> list[Case]:  # noqa: B008 - frozen
    """32 clients in a closed loop, 32 prompt and 24 output tokens: base, four adapters, 64 by Zipf, 64 in turn; of the
    last two also with four slots, on the servers that have them."""
    who = {
        "base": Popularity(0),
        "four adapters": Popularity(4),
        "64 Zipf": Popularity(MANY.adapters, alpha=1.0),
        "64 round-robin": Popularity(MANY.adapters),
    }
    found = []
    for name, popularity in who.items():
        load = Load(f"mix {name}", popularity, Lengths(32), Lengths(24), clients=32)
        with_bare = ("bare",) if name == "base" and sides == SERVERS else ()
        found.append(Case("mix", name, (*sides, *with_bare), load, window))
        if popularity.adapters == MANY.adapters and sides == SERVERS:
            found.append(Case("mix", f"{name}, four slots", ("hotshoe", "stock"), load, window, SCARCE))
    return found


def closed() -> Iterator[Case]:
    """1, 4 and 16 clients, 32 prompt and 48 output tokens: base, one adapter, four in turn."""
    for clients in (1, 4, 16):
        for count, who in ((0, "base"), (1, "one adapter"), (4, "four adapters")):
            if count > clients:
                continue
            name = f"{who}, {clients} at once"
            load = Load(f"closed {name}", Popularity(count), Lengths(32), Lengths(48), clients=clients)
            more = {0: ("bare",), 1: ("peft",)}.get(count, ())
            yield Case("closed", name, (*SERVERS, *more), load, Window(1.0, 4.0))


def first_tokens() -> Iterator[Case]:
    """One request after the other with a long prompt, for its first token."""
    for prompt in (128, 512, 1400):
        for count, who in ((0, "base"), (1, "one adapter")):
            name = f"{prompt} prompt tokens, {who}"
            load = Load(f"first {name}", Popularity(count), Lengths(prompt), Lengths(2), clients=1)
            window = Window(0.0, 60.0, requests=2 if prompt < 1000 else 1)
            yield Case("first", name, (*SERVERS, "peft" if count else "bare"), load, window)


def opened() -> Iterator[Case]:
    """Every skew beside stock vLLM at 2 a second; the middle one on all sides, and at twice the rate on all servers."""
    yield open_case(0.6, sides=("hotshoe", "stock"))
    yield open_case(1.0, sides=(*SERVERS, "peft"))
    yield open_case(1.4, sides=("hotshoe", "stock"))
    yield open_case(1.0, rate=4.0)


def open_case(
    alpha: float,
    rate: float = 2.0,
    window: Window = Window(3.0, 20.0, 6.0),  # noqa: B008 - frozen
    sides: tuple[str, ...] = SERVERS,
) -> Case:
    """Poisson arrivals for 64 adapters by Zipf's law and the base, prompts and answers of realistic lengths."""
    name = f"alpha {alpha:g}, {rate:g}/s"
    load = Load(f"open {name}", Popularity(MANY.adapters, alpha, BASE_SHARE), PROMPTS, OUTPUTS, rate=rate)
    return Case("open", name, sides, load, window)


def stalls() -> Iterator[Case]:
    yield Case("stalls", "adapters asked for from disk", ("hotshoe", "stock"), setup=RELOADED)


def expected_seconds(todo: Sequence[tuple[int, Case, str]]) -> float:
    """How long these measurements take, starts included; about, since some of it is the machine's and the peers'."""
    starts = {(case.setup.name, side) for _, case, side in todo}
    return sum(START_SECONDS[side] for _, side in starts) + sum(case.seconds for _, case, _ in todo)
