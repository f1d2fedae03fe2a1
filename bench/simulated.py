"""`python -m bench.simulated [--kept FILE]`: the simulator of admission beside a real run of `python -m bench many`.

The model's costs are taken from the run's own closed loads of one to sixteen clients and first tokens; what is then
predicted are other loads, the mix of 32 clients and the open ones, with the server's own admission, the same plans and
the same seeds. An error is predicted / measured - 1, within a round; its median over the rounds is reported.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from bench.many import cases as plans
from bench.many.cases import Case
from bench.many.kept import Kept, seen_of
from bench.many.plan import BASE, Shot
from bench.many.stats import Seen, quantile, waits
from bench.report import Report, machine, write
from bench.simulator import Arrivals, Clients, Coming, Costs, Model, Stage, play
from bench.simulator_policies import Ours
from bench.simulator_traces import Request
from server.admission import Limits
from server.app import running_of
from server.settings import load_settings

SIDE = "hotshoe"
PATIENCE_SECONDS = 0.5  # the server's default
PREDICTED = ("mix", "open")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.simulated", description=__doc__)
    parser.add_argument("--kept", type=Path, default=Path("build/bench/full/kept.jsonl"))
    parser.add_argument("--out", type=Path, default=Path("build/simulated.json"))
    parser.add_argument(
        "--places", type=int, default=running_of(load_settings()), help="HOTSHOE_MAX_RUNNING of the run"
    )
    given = parser.parse_args(arguments)
    every = plans.full()
    report = compare(Kept.open(given.kept, every), every, given.places)
    print(machine())
    report.print()
    write([report], given.out)


def compare(kept: Kept, cases: Sequence[Case], places: int) -> Report:
    """A row for each predicted load that was measured; raises SystemExit where there is nothing to take costs from."""
    costs = calibrated(kept, cases)
    report = Report("The simulator beside the real run")
    for case in (one for one in cases if one.table in PREDICTED and SIDE in one.sides):
        lines = [line for line in kept.of(case.table) if (line["case"], line["side"]) == (case.name, SIDE)]
        if lines:
            real = [figures(seen_of(line), case) for line in lines]
            made = [figures(replay(case, line["seed"], costs, places), case) for line in lines]
            report.rows.append({"table": case.table, "load": case.name, "rounds": len(lines), **_row(real, made)})
    report.notes.append(
        f"Costs, in seconds, from the run's closed loads and first tokens: step {costs.step:.4f}, a request "
        f"{costs.row:.5f}, an adapter {costs.adapter:.5f}, a prompt token {costs.prompt:.5f}; a switch nothing (a slot "
        f"is a pointer), and no load (all adapters are staged); {places} places. Errors are medians over the rounds."
    )
    return report


def _row(real: Sequence[dict[str, float]], made: Sequence[dict[str, float]]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for name in real[0]:
        row[name] = statistics.median(one[name] for one in real)
        row[f"{name}, simulated"] = statistics.median(one[name] for one in made)
        errors = [ours[name] / theirs[name] - 1 for ours, theirs in zip(made, real, strict=True) if theirs[name]]
        row[f"{name}, error"] = f"{100 * statistics.median(errors):+.0f}%" if errors else "-"
    return row


def figures(seen: Sequence[Seen], case: Case) -> dict[str, float]:
    """Tokens a second in the window that counts; times to the first token of what was asked."""
    times = waits(seen, case.window.seconds + case.window.drain_seconds)
    return {
        "tokens/s": sum(one.window_tokens for one in seen) / case.window.seconds,
        "TTFT p50, s": quantile(times, 0.5),
        "TTFT p95, s": quantile(times, 0.95),
    }


def calibrated(kept: Kept, cases: Sequence[Case]) -> Costs:
    """The model's costs from small loads: what a prompt token takes, and a step by how many rows and adapters it had.

    From one question to the next a client in a closed loop waits for its own prompt and one of each other client, and
    for as many steps as it has tokens. Raises SystemExit where one of these loads was not measured.
    """
    small = {case.name: case.load for case in cases if case.table in ("closed", "first") and case.load is not None}
    seen = {name: _seen(kept, name) for name in small}
    absent = [name for name, found in seen.items() if not found]
    if absent:
        raise SystemExit(f"The costs are taken from the tables closed and first of {SIDE}; without {absent[0]!r}.")
    step = statistics.median(one.tpot_seconds for one in seen["base, 1 at once"] if one.tpot_seconds is not None)
    prompt = statistics.median(
        (one.ttft_seconds - step) / small[name].prompt.median
        for name, found in seen.items()
        for one in found
        if one.ttft_seconds is not None and small[name].clients == 1
    )
    rows, values = [], []
    for name, load in small.items():
        if load.output.median > 2:
            whole = statistics.median(one.last - one.intended for one in seen[name] if one.last is not None)
            rows.append((1.0, load.clients, load.popularity.adapters))
            values.append((whole - load.clients * load.prompt.median * prompt) / load.output.median)
    step, row, adapter = np.linalg.lstsq(np.array(rows), np.array(values), rcond=None)[0]
    return Costs(float(step), float(row), max(0.0, float(adapter)), prompt, switch=0.0, load=0.0)


def _seen(kept: Kept, name: str) -> list[Seen]:
    """Of one load, all rounds together; of first tokens a round's last, before which the adapter came into its slot."""
    lines = [line for table in ("closed", "first") for line in kept.of(table)]
    found = [(line["table"], seen_of(line)) for line in lines if (line["case"], line["side"]) == (name, SIDE)]
    return [one for table, seen in found for one in (seen[-1:] if table == "first" else seen)]


class Watched:
    """What a client would have seen of each request, by the simulated clock; times from the start of what counts."""

    def __init__(self, case: Case, shots: Iterable[Shot]) -> None:
        self.case = case
        self._todo = shots
        self._first: dict[Request, float] = {}
        self._last: dict[Request, float] = {}
        self._asked: list[Request] = []

    def requests(self) -> Iterator[Request]:
        """The plan's, each for the adapter that it names."""
        for shot in self._todo:
            adapter = None if shot.model == BASE else f"adapter{shot.model}"
            yield Request(shot.at_seconds, "default", adapter, shot.prompt_tokens, shot.output_tokens)

    def started(self, one: Request, now: float) -> None:
        """It waits no more; its client does not see that."""

    def first_token(self, one: Request, now: float) -> None:
        self._first[one] = now

    def ended(self, one: Request, now: float) -> None:
        self._last[one] = now

    def asked(self, one: Request) -> None:
        self._asked.append(one)

    def seen(self) -> list[Seen]:
        """As `bench.many.drive.measure` gives them."""
        warm, pace = self.case.window.warm_seconds, self._pace()
        found = []
        for one in self._asked:
            first, last = self._first.get(one), self._last.get(one)
            times = [time - warm for time in self._times(one, pace)]
            found.append(
                Seen(
                    model=BASE if one.adapter is None else int(one.adapter.removeprefix("adapter")),
                    tenant=0,
                    intended=one.arrival - warm,
                    sent=one.arrival - warm,
                    first=None if first is None else first - warm,
                    last=None if last is None else last - warm,
                    asked_tokens=one.output_tokens,
                    got_tokens=len(times),
                    window_tokens=sum(0 <= time < self.case.window.seconds for time in times),
                )
            )
        if self.case.load is not None and self.case.load.rate is not None:
            return [one for one in found if one.intended >= 0]
        return [one for one in found if one.last is None or one.last >= 0]

    def _pace(self) -> float:
        """Seconds between two tokens, of the answers that ended."""
        paces = [
            (last - self._first[one]) / (one.output_tokens - 1)
            for one, last in self._last.items()
            if one.output_tokens > 1
        ]
        return statistics.median(paces) if paces else 0.0

    def _times(self, one: Request, pace: float) -> list[float]:
        """Of its tokens: evenly from the first to the last, and of an answer that was cut off at the others' pace."""
        first = self._first.get(one)
        if first is None:
            return []
        last = self._last.get(one, first + pace * (one.output_tokens - 1))
        times = (first + (last - first) * n / max(1, one.output_tokens - 1) for n in range(one.output_tokens))
        return [time for time in times if time <= self.case.window.total_seconds]


class Noted:
    """Arrivals that are told to a Watched as they are taken."""

    def __init__(self, arrivals: Coming, watched: Watched) -> None:
        self._arrivals, self._watched = arrivals, watched

    def next_at(self) -> float:
        return self._arrivals.next_at()

    def ended(self, now: float) -> None:
        self._arrivals.ended(now)

    def take(self) -> Request:
        one = self._arrivals.take()
        self._watched.asked(one)
        return one


def replay(case: Case, seed: int, costs: Costs, places: int) -> list[Seen]:
    """The load of one measurement on the modelled engine, behind the server's own admission."""
    load, window, setup = case.load, case.window, case.setup
    if load is None:
        raise ValueError(f"{case.name} is no load of requests.")
    limits = Limits(setup.slots, places, max_queued=10**9, patience_seconds=PATIENCE_SECONDS)
    stage = Stage(setup.staged, evicts_by_cost=True)
    for number in range(min(setup.staged, setup.adapters)):
        stage.use(f"adapter{number}", 0.0)
    if load.rate is not None:
        watched = Watched(case, load.arrivals(seed, window.warm_seconds + window.seconds))
        arrivals: Coming = Arrivals(watched.requests())
    else:
        watched = Watched(case, islice(load.shots(seed), window.requests or None))
        arrivals = Clients(watched.requests(), load.clients)
    play(Ours(limits), Model(setup.slots, stage, costs), Noted(arrivals, watched), watched, window.total_seconds)
    return watched.seen()


if __name__ == "__main__":
    main()
