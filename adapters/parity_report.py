"""The parity report of one export: weights always, logits where the model fits in memory, and the verdict on both."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.checkpoint import FLOATS
from adapters.child import run_child
from adapters.errors import ParityFailed
from adapters.merge_plan import MergePlan
from adapters.parity_prompts import KEPT_LOGITS_BYTES
from adapters.parity_streamed import memory_bytes
from adapters.parity_verdict import logits_problems
from adapters.readback import verify_weights

LOGITS_MEMORY_FACTOR = 6  # bytes per weight: one float32 model at a time, its adapter, and room to load the next
KEPT_RUNS = 4  # whose logits lie beside each other at most
Tell = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Questions:
    """What a merge is asked beyond the probe. `evaluation` are rows as parity_prompts takes them, `served` a server's
    answers to the probe (parity_served.read_answer).
    """

    evaluation: Sequence[Any] = ()
    served: Sequence[Mapping[str, Any]] = ()
    chat_template: str | None = None
    trained_on_nf4: bool = False
    tokenizer: Path | None = None  # a folder, in place of the base's

    @property
    def num_sets(self) -> int:
        return 2 if self.evaluation else 1

    @property
    def kept_bytes(self) -> int:
        """The logits that whole models leave behind at most, to be compared."""
        return KEPT_RUNS * self.num_sets * KEPT_LOGITS_BYTES


def prove(
    plan: MergePlan,
    folder: Path,
    *,
    with_logits: bool,
    questions: Questions | None = None,
    free_bytes: int | None = None,
    tell: Tell,
) -> dict[str, Any]:
    """Check the merged files in `folder` against the plan's inputs: `verdict` passed, or failed with `problems`.

    `level` says how far it went: `logits` (of whole models, or `forward: layer_by_layer` where these do not fit into
    `free_bytes`, which are measured unless given), or `weights_only` with the `reason`.
    """
    asked = questions or Questions()
    weights = verify_weights(plan, folder, percents(tell, "checking", plan.weight_bytes))
    problems = list(weights.problems)
    parity: dict[str, Any] = {"level": "weights_only", "weights": weights.as_dict()}
    module, reason = way_of(plan, asked, free_bytes) if with_logits else (None, "not asked for")
    if module is None or problems:
        parity["reason"] = reason or "the weights failed already"
    else:
        tell({"stage": "comparing logits"})
        parity["level"], parity["logits"] = "logits", _logits(module, plan, folder, asked)
        problems += logits_problems(parity["logits"])
    return with_verdict(parity, problems)


def with_verdict(parity: Mapping[str, Any], problems: Sequence[str]) -> dict[str, Any]:
    """The report with its verdict; a figure that is not finite becomes null, as JSON has no NaN."""
    found: dict[str, Any] = _finite({"verdict": "failed" if problems else "passed", **parity})
    return {**found, "problems": list(problems)} if problems else found


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


def _logits(module: str, plan: MergePlan, folder: Path, asked: Questions) -> dict[str, Any]:
    """Run the comparison in a child: it imports transformers and PEFT, and gives its memory back."""
    spec = {
        "base": str(plan.base.folder),
        "adapter": str(plan.adapter),
        "merged": str(folder),
        "dtype": dtype_of(plan),
        "plan_dtype": plan.dtype,
        "served": list(asked.served),
        "evaluation": list(asked.evaluation),
        "chat_template": asked.chat_template,
        "through_nf4": plan.through_nf4,
        "trained_on_nf4": asked.trained_on_nf4,
        "tokenizer": str(asked.tokenizer or plan.base.folder),
    }
    return run_child(
        module,
        spec,
        lambda said: ParityFailed(f"The logits could not be compared: {said}. --no-parity leaves them out."),
    )


def dtype_of(plan: MergePlan) -> str:
    """The float type most of the changed weights are written in."""
    codes = [tensor.dtype for file in plan.files for tensor in file.tensors if tensor.update]
    return FLOATS[max(set(codes), key=codes.count)]


def way_of(plan: MergePlan, asked: Questions, free_bytes: int | None = None) -> tuple[str | None, str | None]:
    """The module that compares the logits in the memory there is; None, with the reason, where none can.

    Whole models where they fit: only they can answer.
    """
    weights = sum(tensor.source.elements for file in plan.files for tensor in file.tensors)
    free = available_memory_bytes() if free_bytes is None else free_bytes
    whole = weights * LOGITS_MEMORY_FACTOR + asked.kept_bytes
    if whole <= free:
        return "adapters.parity_logits", None
    if plan.through_nf4:  # the layers are read as they are stored
        return None, f"the logits need about {whole:,} bytes of memory; {free:,} are free"
    by_layers = memory_bytes(plan, asked.num_sets)
    if by_layers <= free:
        return "adapters.parity_streamed", None
    needs = f"the logits need about {whole:,} bytes of memory, or {by_layers:,} layer by layer"
    return None, f"{needs}; {free:,} are free"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def available_memory_bytes() -> int:
    """What this process may still take: the machine's available memory, less where a cgroup is tighter."""
    with Path("/proc/meminfo").open() as file:
        free = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):
        limit = int((group / "memory.max").read_text())
        free = min(free, limit - int((group / "memory.current").read_text()))
    return free
