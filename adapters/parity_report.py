"""The parity report of one export: weights always, logits where the model fits in memory, and the verdict on both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from adapters.checkpoint import FLOATS
from adapters.child import run_child
from adapters.errors import ParityFailed
from adapters.merge_plan import MergePlan
from adapters.readback import verify_weights

LOGITS_MEMORY_FACTOR = 6  # bytes per weight: one float32 model at a time, its adapter, and room to load the next
Tell = Callable[[dict[str, Any]], None]


def prove(
    plan: MergePlan, folder: Path, *, with_logits: bool, served: Sequence[Mapping[str, Any]] = (), tell: Tell
) -> dict[str, Any]:
    """Check the merged files in `folder` against the plan's inputs: `verdict` passed, or failed with `problems`.

    `level` says how far it went: `logits`, or `weights_only` with the `reason`. `served` are a server's answers to the
    probe, as `parity_served.read_answer` gives them.
    """
    weights = verify_weights(plan, folder, percents(tell, "checking", plan.weight_bytes))
    problems = list(weights.problems)
    parity: dict[str, Any] = {"verdict": "passed", "level": "weights_only", "weights": weights.as_dict()}
    reason = _no_room(plan) if with_logits else "not asked for"
    if reason or problems:
        parity["reason"] = reason or "the weights failed already"
    else:
        tell({"stage": "comparing logits"})
        parity["level"], parity["logits"] = "logits", _logits(plan, folder, served)
        problems += logits_problems(parity["logits"])
    if problems:
        parity.update(verdict="failed", problems=problems)
    return parity


def percents(tell: Tell, stage: str, total: int) -> Callable[[int], None]:
    """Takes sizes as they get done and tells whole per cents, each once."""
    done, last = 0, -1

    def advance(size: int) -> None:
        nonlocal done, last
        done += size
        if (percent := done * 100 // max(1, total)) > last:
            last = percent
            tell({"stage": stage, "percent": percent})

    return advance


def logits_problems(logits: Mapping[str, Any]) -> list[str]:
    """Merged may be as far from PEFT as rounding alone is, doubled, plus what float32 sums leave; more is a bug."""
    merged, floor = logits["merged_against_peft"], logits["rounding_floor"]
    tolerance = 1e-4 * max(1.0, merged["largest_logit"])
    problems = []
    for figure in ("max_abs", "mean_abs"):
        limit = 2 * floor[figure] + tolerance
        if not merged[figure] <= limit:
            problems.append(f"logits: {figure} difference to PEFT is {merged[figure]:g}, the limit is {limit:g}")
    return problems


def _logits(plan: MergePlan, folder: Path, served: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Run the comparison in a child: it imports transformers and PEFT, and gives its memory back."""
    spec = {
        "base": str(plan.base.folder),
        "adapter": str(plan.adapter),
        "merged": str(folder),
        "dtype": dtype_of(plan),
        "served": list(served),
    }
    return run_child(
        "adapters.parity_logits",
        spec,
        lambda said: ParityFailed(f"The logits could not be compared: {said}. --no-parity leaves them out."),
    )


def dtype_of(plan: MergePlan) -> str:
    """The float type most of the changed weights are written in."""
    codes = [tensor.dtype for file in plan.files for tensor in file.tensors if tensor.update]
    return FLOATS[max(set(codes), key=codes.count)]


def _no_room(plan: MergePlan) -> str | None:
    weights = sum(tensor.source.elements for file in plan.files for tensor in file.tensors)
    needed, free = weights * LOGITS_MEMORY_FACTOR, available_memory_bytes()
    return f"the logits need about {needed:,} bytes of memory, {free:,} are free" if needed > free else None


def available_memory_bytes() -> int:
    """What this process may still take: the machine's available memory, less where a cgroup is tighter."""
    with Path("/proc/meminfo").open() as file:
        free = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):
        limit = int((group / "memory.max").read_text())
        free = min(free, limit - int((group / "memory.current").read_text()))
    return free
