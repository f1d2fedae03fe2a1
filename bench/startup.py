"""Seconds from `hotshoe serve` to ready, and where they go: as stock vLLM starts on a CPU, and as ours does."""

from __future__ import annotations

import statistics

from bench.report import Report, spread
from bench.served import serve

FORMS: dict[str, dict[str, str]] = {"stock": {"HOTSHOE_ENGINE_WORKER": "1"}, "ours": {}}  # docs/engine.md, Start-up


def run(rounds: int) -> list[Report]:
    """Start and stop each form in turn, `rounds` times, from an empty state folder; the base is in the page cache."""
    total: dict[str, list[float]] = {form: [] for form in FORMS}
    phases: dict[str, dict[str, list[float]]] = {}
    for turn in range(rounds):
        for form in FORMS if turn % 2 else reversed(FORMS):
            with serve(environment=FORMS[form]) as served:
                total[form].append(served.ready_seconds)
                for name, seconds in served.start_phases().items():
                    phases.setdefault(name, {}).setdefault(form, []).append(seconds)
    report = Report(f"`hotshoe serve` to ready, embedded base, seconds ({rounds} starts of each)")
    report.rows = [
        {"phase": name, **{form: statistics.median(seen[form]) for form in FORMS}}
        for name, seen in [*phases.items(), ("total", total)]
    ]
    ratios = Report("`hotshoe serve` to ready, of the stock start of the same round")
    ratios.rows = [
        {"form": form, **spread([ours / stock for ours, stock in zip(total[form], total["stock"], strict=True)])}
        for form in FORMS
        if form != "stock"
    ]
    return [report, ratios]
