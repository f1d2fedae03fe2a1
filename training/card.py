"""The card of a run: on what, how, and with what result it was trained. `card.json`, and `card.html` made from it."""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.card_page import card_html
from training.card_sections import (
    against,
    baseline_of_report,
    evaluation_of,
    forgetting_of,
    lineage_of,
    privacy_of,
    review_of,
)
from training.compare import Outcome, evaluating, last_turn, own_sequences
from training.data.dataset import duplicate_count
from training.goal import goal_of
from training.sample import evenly
from training.samples import samples_of
from training.saving import saved_bytes
from training.served_check import PROBES, Tokens, check_served
from training.verdict.evidence import Canaries, General
from training.verdict.gather import evidence_of, nearness_of
from training.verdict.judge import judge
from training.verdict.ranks import ranked

if TYPE_CHECKING:
    from training.data.rows import Row
    from training.material import Material
    from training.staging import Staging
    from training.trainer import Run

CARD_FILE, PAGE_FILE = "card.json", "card.html"
CARD_FORMAT = 1
LIBRARIES = ("hotshoe", "torch", "transformers", "peft", "bitsandbytes", "accelerate", "tokenizers", "safetensors")


def versions() -> dict[str, str]:
    """The versions of Python and of every library that has a part in the result."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def peak_memory_bytes(device: str) -> int:
    """The most memory that the run held: torch's allocator on a GPU, the process's resident set on a CPU."""
    if device == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated())
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def threads() -> int:
    """How many CPU threads torch computed with."""
    import torch

    return torch.get_num_threads()


def write_card(folder: Path, card: dict[str, Any]) -> None:
    """Write the card and its page; it is plain JSON that says nothing which JSON cannot (no NaN)."""
    card = {"format": CARD_FORMAT, **card}
    text = json.dumps(card, ensure_ascii=False, indent=2, allow_nan=False)
    (folder / CARD_FILE).write_text(text + "\n", encoding="utf-8")
    (folder / PAGE_FILE).write_text(card_html(json.loads(text)), encoding="utf-8")


def general_of(readings: Any) -> General | None:
    """What the verdict looks at of general text; None also where a prediction is no number, which `forgetting` says."""
    if readings is None:
        return None
    base, adapter = readings.base_loss.tolist(), readings.adapter_loss.tolist()
    return General(base, adapter) if all(map(math.isfinite, [*base, *adapter])) else None


def make_card(run: Run, staging: Staging) -> dict[str, Any]:
    """The card of a finished run whose weights are in the staging's result."""
    config, material, result = run.config, run.material, _result(run)
    trained = [value for value in run.model.parameters() if value.requires_grad]
    goal = goal_of(_rows(material), config.goal)
    outcome = run.baseline.outcome(run.model) if run.baseline is not None else None
    forgotten, readings = forgetting_of(run)
    served = check_served(run.model, material.base, staging.result, staging.root / "canonical", _probes(material))
    near = nearness_of(material)
    evidence = evidence_of(
        *(material, run.settings, run.curve, result["best_step"], staging.checkpoints, outcome, goal, near),
        canaries=_canaries(run),
        general=general_of(readings),
    )
    verdict = judge(evidence)
    gate = run.gate.summary() if run.gate is not None else None
    samples, cost = _samples(run, outcome), _cost(run)
    return {
        "name": config.name,
        "goal": goal.as_dict(),
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "parent": config.parent,
        "base": {"id": material.base.id, "digest": material.base.digest, "dtype": run.settings.dtype},
        "template": {"digest": material.template.digest, "enable_thinking": material.enable_thinking},
        "data": _data(material, config.columns),
        "gate": gate,
        "settings": run.settings.as_dict(),
        "review": review_of(run),
        "adapter": {
            "parameters": sum(value.numel() for value in trained),
            "bytes": saved_bytes(staging.result),
        },
        "result": result,
        "evaluation": evaluation_of(run, outcome, near, goal.label_field),
        "verdict": {**verdict.as_dict(), "evidence": evidence.as_dict()},
        "check": served,
        "baseline": baseline_of_report(run.baseline_report),
        "forgetting": forgotten,
        "privacy": privacy_of(gate, verdict.flags, samples),
        "samples": samples,
        "cost": cost,
        "plan": against(run.plan, cost),
        "lineage": lineage_of(run),
        "versions": versions(),
    }


def _probes(material: Material) -> list[Tokens]:
    """Prompts that the adapter is asked in serving, to compare its forms by."""
    return [last_turn(sequence)[0] for sequence in evenly(material.training.sequences, PROBES)]


def _samples(run: Run, outcome: Outcome | None) -> dict[str, Any] | None:
    if run.baseline is None or outcome is None or run.material.validation is None:
        return None
    owners = run.material.validation.owners
    return samples_of(run.baseline.comparison, owners, outcome.adapter, run.config.samples)


def _rows(material: Material) -> list[Row]:
    """The rows of the run's data, those held out too, each once."""
    owners = [material.training.owners[index] for index in own_sequences(material)]
    rows = [*owners, *(material.validation.owners if material.validation is not None else ())]
    return list({id(row): row for row in rows}.values())


def _canaries(run: Run) -> Canaries | None:
    planted, settings = run.material.canaries, run.settings
    if not planted:
        return None
    with evaluating(run.model):
        return ranked(run.model, run.material.template, planted, settings.seed, settings.supervise)


def _result(run: Run) -> dict[str, Any]:
    state, validated = run.state, dict(run.curve.validation)
    best = state.best_global_step if validated and state.best_global_step else state.global_step
    return {
        "steps": state.global_step,
        "is_stopped_early": state.global_step < run.settings.steps,
        "best_step": best,
        "training_loss": run.curve.training[-1][1] if run.curve.training else None,
        "validation_loss": validated.get(best),
        "curve": run.curve.as_dict(),
    }


def _cost(run: Run) -> dict[str, Any]:
    device = str(next(run.model.parameters()).device.type)
    return {
        "seconds": round(time.monotonic() - run.meter.started, 1),
        "training_seconds": round(run.meter.seconds, 1),
        "tokens": run.meter.tokens,
        "computed_tokens": run.meter.computed_tokens,
        "tokens_per_second": round(run.meter.tokens_per_second, 1),
        "peak_memory_bytes": peak_memory_bytes(device),
        "device": device,
        "threads": threads(),
    }


def _data(material: Material, columns: Sequence[str]) -> dict[str, Any]:
    training = {
        "file": material.file.path.name,
        "digest": material.file.digest,
        "columns": list(columns),
        "sources": [source.as_dict() for source in material.file.sources],
        **material.training.as_dict(),
        "duplicate_sequences": duplicate_count(material.training),
        "ignored_keys": dict(material.file.ignored_keys),
        **({"replay": material.replay.as_dict()} if material.replay is not None else {}),
    }
    if material.validation is None:
        return {"training": training, "validation": None}
    source = material.validation_file or material.file
    validation = {
        "file": source.path.name,
        "digest": source.digest,
        "sources": [part.as_dict() for part in source.sources],
        "is_held_out": material.validation_file is None,
        **material.validation.as_dict(),
    }
    return {"training": training, "validation": validation}
