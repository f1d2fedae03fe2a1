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
from adapters.parity import verify_weights
from adapters.parity_answers import MAX_NEW_TOKENS
from adapters.parity_forms import Form, compare_form
from adapters.parity_prompts import KEPT_LOGITS_BYTES
from adapters.parity_streamed import memory_bytes
from adapters.parity_verdict import logits_problems

LOGITS_MEMORY_FACTOR = 6  # bytes per weight: one float32 model at a time, its adapter, and room to load the next
KEPT_RUNS = 4  # whose logits lie beside each other at most
Tell = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Questions:
    """What a merge is asked beyond the probe. `evaluation` are rows as parity_prompts takes them, `served` a server's
    answers to the probe (parity_served.read_answer), `forms` other forms of the same merge.
    """

    evaluation: Sequence[Any] = ()
    served: Sequence[Mapping[str, Any]] = ()
    forms: Sequence[Form] = ()
    chat_template: str | None = None

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
        if asked.forms:
            parity["forms"] = [_left_out(form, parity["reason"]) for form in asked.forms]
    else:
        tell({"stage": "comparing logits"})
        found, more = judged(_logits(module, plan, folder, asked), asked.forms, tell)
        parity.update(found)
        problems += more
    return with_verdict(parity, problems)


def judged(found: dict[str, Any], forms: Sequence[Form], tell: Tell) -> tuple[dict[str, Any], list[str]]:
    """The part of a report that comes of what a comparison of logits `found`, and what is wrong in it.

    The forms are run here, each on the prompts that the reference answered.
    """
    logits = {key: value for key, value in found.items() if key != "material"}
    parity: dict[str, Any] = {"level": "logits", "logits": logits}
    problems = logits_problems(logits)
    if forms:
        parity["forms"] = forms_compared(forms, found.get("material"), logits, tell)
        problems += [problem for form in parity["forms"] for problem in form.get("problems", ())]
    return parity, problems


def with_verdict(parity: Mapping[str, Any], problems: Sequence[str]) -> dict[str, Any]:
    """The report with its verdict; a figure that is not finite becomes null, as JSON has no NaN."""
    found: dict[str, Any] = _finite({"verdict": "failed" if problems else "passed", **parity})
    return {**found, "problems": list(problems)} if problems else found


def forms_compared(
    forms: Sequence[Form], material: Mapping[str, Any] | None, logits: Mapping[str, Any], tell: Tell
) -> list[dict[str, Any]]:
    """Each form's answers to the probe against the `material`, the answers of PEFT and of the merged folder.

    Without material a form is not run, and its entry says why.
    """
    found = []
    for form in forms:
        if material is None:
            found.append(_left_out(form, logits["answers_left_out"]))
            continue
        tell({"stage": f"comparing {form.name}"})
        other = form.run([answer["ids"] for answer in material["peft"]], MAX_NEW_TOKENS)
        found.append(compare_form(form.name, form.dtype, material["peft"], material["merged"], other))
    return found


def _left_out(form: Form, reason: str) -> dict[str, Any]:
    return {"name": form.name, "dtype": form.dtype, "left_out": reason}


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
        "with_answers": bool(asked.forms),
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
