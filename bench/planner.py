"""The planner's memory against torch's own accounting, against real runs, and against published peaks.

Torch's accounting runs on fake tensors; each real run is `hotshoe train` in a process of its own, whose peak resident
set is compared with what the planner says before.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import median

from bench.planner_fake import Case, cases, predicted_bytes, tracked_bytes
from bench.planner_published import PUBLISHED, predicted_peak_of
from bench.planner_runs import RUNS, base_of, config_of, data_of, measured
from bench.report import Report
from training.planner.machines import GIB


def run(rounds: int) -> list[Report]:
    """All three comparisons, once each: memory does not vary from round to round."""
    return [accounted(), real(), published()]


def accounted() -> Report:
    """Against MemTracker."""
    report = Report("Planned peaks against torch's MemTracker on fake tensors, two layers of each size")
    errors = []
    for case in cases():
        said, found = predicted_bytes(case), tracked_bytes(case)
        errors.append(said / found - 1)
        measured_mb = f"{found / 1e6:.1f}"
        report.rows.append({**_named(case), "MemTracker, MB": measured_mb, "error, %": f"{100 * errors[-1]:+.2f}"})
    worst = max(abs(error) for error in errors)
    report.notes.append(
        f"{len(errors)} configurations; median error {100 * median(map(abs, errors)):.2f}%, worst {100 * worst:.2f}%."
    )
    return report


def real() -> Report:
    """Against the peak resident set of real runs."""
    from training.config import choose
    from training.material import facts, gather
    from training.planner.run import predicted

    report = Report("Planned peaks against the peak resident set of real runs on this CPU")
    errors = []
    for one in RUNS:
        with tempfile.TemporaryDirectory(prefix="bench-planner-") as scratch:
            folder = Path(scratch)
            data, base = data_of(one, folder), base_of(one, folder)
            found = measured(one, data, base, folder / "out")
            config = config_of(one, data, base)
            material = gather(config)
            said = predicted(choose(config, facts(material)), material.base, material.training.sequences, gpu="cpu")
        errors.append(said["peak_bytes"] / found["peak_memory_bytes"] - 1)
        report.rows.append(
            {
                "run": one.name,
                "planned, MB": f"{said['peak_bytes'] / 1e6:.0f}",
                "measured, MB": f"{found['peak_memory_bytes'] / 1e6:.0f}",
                "error, %": f"{100 * errors[-1]:+.1f}",
            }
        )
    off = [100 * abs(error) for error in errors]
    report.notes.append(f"{len(errors)} runs; median error {median(off):.1f}%, worst {max(off):.1f}%.")
    return report


def published() -> Report:
    """Against figures of others, which mix GB with GiB and allocated with reserved: listed, with no bar."""
    report = Report("Planned peaks beside published ones")
    for one in PUBLISHED:
        said = predicted_peak_of(one)
        report.rows.append(
            {
                "source": one.source,
                "setting": one.setting,
                "published": f"{one.figure:g} {one.unit}",
                "planned, GiB": f"{said / GIB:.1f}",
                "error, %": f"{100 * (said / one.bytes - 1):+.0f}",
            }
        )
    return report


def _named(case: Case) -> dict[str, str]:
    of, method, work = case
    trained = "full" if method.trains_all else f"LoRA r {method.rank}, {len(method.targets)} targets"
    return {
        "base": of.name,
        "trained": trained,
        "precision": "16 bits" if method.itemsize == 2 else "32 bits",
        "tokens": f"{work.tokens:,}",
        "checkpointing": "yes" if method.checkpoints else "no",
    }
