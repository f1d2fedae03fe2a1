"""What a run that is about to start will need and take: for the trainer's announcement and the card."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from adapters.bases import BaseModel
from training.config import Settings
from training.data.template import Rendered
from training.planner.candidates import beside, peak_of, time_of
from training.planner.seconds import pass_flops
from training.planner.sizes import of_base
from training.planner.target import LATER_BYTES, target_of
from training.planner.work import method_of
from training.planner.workload import Workload


def predicted(
    settings: Settings,
    base: BaseModel,
    sequences: Sequence[Rendered],
    *,
    gpu: str = "auto",
    report: dict[str, Any] | None = None,
    resident_bytes: int | None = None,
) -> dict[str, Any]:
    """Peak memory by part and seconds of training, each with its error bar and evidence; plain JSON.

    Called before the model is loaded. `resident_bytes` is what the process holds then, on a CPU: see
    `resident_set_bytes`; without it the usual figure is taken.
    """
    work, target = Workload(tuple(sequences), settings.seed), target_of(gpu, report)
    of, method = of_base(base), method_of(settings)
    if resident_bytes is not None and target.device == "cpu":
        target = replace(target, workspace_bytes=resident_bytes + LATER_BYTES)
    passes = work.passes(settings.pass_size, shares_prefix=not settings.dropout)
    found = replace(peak_of(of, method, passes, settings), workspace=beside(of, method, target))
    spent = time_of(of, method, passes, settings, work, target)
    low, high = target.error
    return {
        "peak_bytes": found.total,
        "peak_low_bytes": round(found.total * (1 - low)),
        "peak_high_bytes": round(found.total * (1 + high)),
        "parts": found.as_dict(),
        "seconds": spent.training_seconds,
        "seconds_low": spent.training_seconds / spent.error,
        "seconds_high": spent.training_seconds * spent.error,
        "flops_a_step": settings.accumulation * pass_flops(of, method, passes),
        "itemsize": method.itemsize,
        "machine": target.name,
        "is_validated": target.is_validated,
        "evidence": {"memory": target.status, "time": spent.evidence},
    }


def resident_set_bytes() -> int:
    """What this process holds in memory now."""
    fields = Path("/proc/self/status").read_text("ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in fields if line.startswith("VmRSS"))
