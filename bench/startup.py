"""Seconds from `hotshoe serve` to ready, and where they go."""

from __future__ import annotations

from bench.report import Report, spread
from bench.served import serve


def run(rounds: int) -> list[Report]:
    """Start and stop the server `rounds` times, each from an empty state folder; the base is in the page cache."""
    total: list[float] = []
    phases: dict[str, list[float]] = {}
    for _ in range(rounds):
        with serve() as served:
            total.append(served.ready_seconds)
            for name, seconds in served.start_phases().items():
                phases.setdefault(name, []).append(seconds)
    report = Report(f"`hotshoe serve` to ready, embedded base, seconds ({rounds} starts)")
    report.rows = [{"phase": name, **spread(values)} for name, values in [*phases.items(), ("total", total)]]
    return [report]
