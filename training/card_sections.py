"""The sections of a card that others' parts fill: the plan against what came, the review, forgetting, privacy, lineage.

A section that was not made is None, or says why under `left_out`; a card never says less than it knows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.errors import HotshoeError
from training.gate.privacy import MASKABLE

if TYPE_CHECKING:
    from training.compare import Outcome
    from training.evaluation.similarity import Nearness
    from training.trainer import Run

SHORTEST_RUN_SECONDS = 30.0  # of training; what a shorter one forgot would take longer to measure than it took
OPERATIONS_A_TOKEN, LEAST_OPERATIONS = 6, 1e12  # of a parameter, forward and back; some ten seconds of a CPU
BAR = ("peak_bytes", "peak_low_bytes", "peak_high_bytes", "seconds", "seconds_low", "seconds_high")


def plan_of(run: Run) -> dict[str, Any]:
    """What the planner expects of the run, asked before the model is loaded; `left_out` where it cannot tell."""
    from training.material import parameter_count
    from training.planner.run import predicted, resident_set_bytes

    tokens = run.material.training.tokens * run.settings.epochs
    if OPERATIONS_A_TOKEN * parameter_count(run.material.base) * tokens < LEAST_OPERATIONS:
        return {"left_out": "the run is too short for a plan to mean something"}
    try:
        found = predicted(
            run.settings, run.material.base, run.material.training.sequences, resident_bytes=resident_set_bytes()
        )
    except HotshoeError as error:
        return {"left_out": error.message}
    kept = {key: round(found[key], 1) if isinstance(found[key], float) else found[key] for key in BAR}
    return {**kept, "machine": found["machine"], "is_validated": found["is_validated"], "evidence": found["evidence"]}


def against(plan: Mapping[str, Any] | None, cost: Mapping[str, Any]) -> dict[str, Any] | None:
    """The plan with what came of it: how many times the expected memory and time the run took."""
    if plan is None or "left_out" in plan:
        return dict(plan) if plan is not None else None
    actual = {"peak_bytes": cost["peak_memory_bytes"], "seconds": cost["training_seconds"]}
    return {
        "expected": dict(plan),
        "actual": actual,
        "ratio": {key: round(value / plan[key], 3) if plan[key] else None for key, value in actual.items()},
    }


def review_of(run: Run) -> list[dict[str, Any]]:
    """What the config review says of the settings that were used."""
    from training.config import SERVED_RANK
    from training.material import facts
    from training.review import of_settings

    material, known = run.material, facts(run.material)
    return of_settings(
        run.settings.as_dict(),
        {
            "base": material.base.id,
            "parameters": known.parameters,
            "context_length_tokens": known.context_length_tokens,
            "rows": known.rows,
            "longest_row_tokens": known.longest_row_tokens,
            "tokens": material.training.tokens,
            "has_validation": known.has_validation,
            "has_reasoning": bool(material.turns[0]),
            "device": known.device,
            "max_rank": SERVED_RANK,
        },
    )


def forgetting_of(run: Run) -> tuple[dict[str, Any], Any]:
    """(the section, the readings or None): general text and instructions under the base and under the adapter."""
    if not hasattr(run.model, "disable_adapter"):
        return {"left_out": "every weight was trained, so the base is not there to compare with"}, None
    if run.baseline is None:
        return {"left_out": "nothing was compared with the base"}, None
    if run.meter.seconds < SHORTEST_RUN_SECONDS:
        why = f"training took under {SHORTEST_RUN_SECONDS:g} s: `hotshoe eval` measures it"
        return {"left_out": why}, None
    from training.compare import evaluating
    from training.evaluation.forgetting import forgetting

    with evaluating(run.model):
        readings = forgetting(run.model, run.material.template)
    return readings.as_dict(), readings


def evaluation_of(run: Run, outcome: Outcome | None, near: Nearness | None, label: str | None) -> dict[str, Any] | None:
    """Base against adapter: both losses, and the answers' figures with intervals, by likeness to training rows.

    `near` is of all validation rows, and `label` is the field of the goal's labels.
    """
    if run.baseline is None or outcome is None or run.material.validation is None:
        return None
    from training.compare import report
    from training.evaluation.card import figures_of
    from training.evaluation.similarity import Nearness

    comparison = run.baseline.comparison
    made = report(comparison, outcome, label)
    count = min(len(outcome.base.answers), len(outcome.adapter.answers))
    if not count:
        return {**made, "figures": None}
    places = comparison.asked[:count]
    asked = [run.material.validation.owners[place] for place in places]
    if near is not None:
        near = Nearness(near.similarity[places], [near.places[place] for place in places])
    answers = (outcome.adapter.answers[:count], outcome.base.answers[:count])
    return {**made, "figures": figures_of(asked, comparison.expected[:count], *answers, near, label)}


def baseline_of_report(path: Path | None) -> dict[str, Any] | None:
    """What a report of `hotshoe baseline` says, where one is named; raises ConfigInvalid where it is none."""
    if path is None:
        return None
    from training.baseline.report import summary

    return summary(path)


def privacy_of(gate: Mapping[str, Any] | None, flags: tuple[str, ...], samples: Mapping[str, Any] | None) -> Any:
    """What the data check found of private things, and whether the adapter gives single rows away."""
    found = {code: count for code, count in (gate or {}).get("findings", {}).items() if code in MASKABLE}
    return {
        "is_checked": gate is not None,
        "findings": found,
        "memorised": "memorised" in flags,
        "samples_left_out": samples["left_out_private"] if samples else 0,
    }


def lineage_of(run: Run) -> dict[str, Any]:
    """What the adapter comes from, as digests: the same ones and the same seed give the same weights."""
    material = run.material
    source = material.validation_file or material.file
    return {
        "parent": run.config.parent,
        "base": material.base.digest,
        "template": material.template.digest,
        "data": material.file.digest,
        "validation": source.digest if material.validation is not None else None,
        "gate": run.gate.digest if run.gate is not None else None,
        "code": code_digest(),
        "seed": run.settings.seed,
    }


def code_digest() -> str:
    """sha256 over the names and the text of the trainer's modules."""
    digest = hashlib.sha256()
    root = Path(__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return f"sha256:{digest.hexdigest()}"
