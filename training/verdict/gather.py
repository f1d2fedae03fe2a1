"""A run's evidence, put together from its curve, its validations and what was measured before and after it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from training.compare import Outcome, own_sequences, seen_indices
from training.evaluation.similarity import FAR, Nearness, nearness
from training.goal import Goal
from training.groups import clusters_of
from training.sample import evenly
from training.verdict.evidence import Canaries, Evidence, General, HeldOut, Seen
from training.verdict.figures import middle_step
from training.verdict.rows import RowFiles

if TYPE_CHECKING:
    from training.callbacks import Curve
    from training.config import Settings
    from training.material import Material

MOST_COMPARED = 2000
LONGEST_SHORT = 64  # tokens; of a longer answer, another likely token is no other answer


def evidence_of(
    material: Material,
    settings: Settings,
    curve: Curve,
    best_step: int,
    folder: Path,
    outcome: Outcome | None,
    goal: Goal,
    near: Nearness | None,
    *,
    canaries: Canaries | None = None,
    general: General | None = None,
) -> Evidence:
    """The evidence of a finished run whose working files are in `folder`; `near` is as `nearness_of` has it."""
    counts = Counter(goal.labels[id(row)] for row in material.training.owners if id(row) in goal.labels)
    return Evidence(
        steps=curve.training[-1][0] if curve.training else 0,
        planned_steps=settings.steps,
        best_step=best_step,
        training=curve.training,
        validation=curve.validation,
        learning_rate=curve.learning_rate,
        held_out=_held_out(material, curve, folder, outcome, goal, near),
        seen=_seen(material, settings, outcome, goal) if outcome is not None else None,
        canaries=canaries,
        general=general,
        rows_of_label=dict(counts),
    )


def _held_out(
    material: Material, curve: Curve, folder: Path, outcome: Outcome | None, goal: Goal, near: Nearness | None
) -> HeldOut | None:
    if material.validation is None:
        return None
    files, owners = RowFiles(folder), material.validation.owners
    middle = middle_step(curve.validation, curve.learning_rate)
    last = files.read(curve.validation[-1][0]) if curve.validation else None
    labels = [goal.labels.get(id(row), "") for row in owners]
    return HeldOut(
        tokens=[sequence.supervised_tokens for sequence in material.validation.sequences],
        clusters=clusters_of(owners),
        base=outcome.base.rows if outcome is not None else [],
        start=outcome.start.rows if outcome is not None else [],
        middle=(files.read(middle) if middle is not None else None) or [],
        best=outcome.adapter.rows if outcome is not None else [],
        last=last or [],
        labels=labels if all(labels) else [],
        is_far=[bool(value < FAR) for value in near.similarity] if near is not None else [],
    )


def nearness_of(material: Material) -> Nearness | None:
    """How like each validation row is to the rows trained on, of which it is held against a few thousand."""
    trained = [material.training.owners[index] for index in evenly(own_sequences(material), MOST_COMPARED)]
    if material.validation is None or not trained:
        return None
    return nearness(material.validation.owners, trained)


def _seen(material: Material, settings: Settings, outcome: Outcome, goal: Goal) -> Seen | None:
    """The rows that were measured both times, within the time that was left."""
    chosen = seen_indices(material, settings.epochs)
    chosen = chosen[: min(len(outcome.start.seen), len(outcome.adapter.seen))]
    sequences = [material.training.sequences[index] for index in chosen]
    if not sequences:
        return None
    is_short = bool(goal.labels) and max(sequence.supervised_tokens for sequence in sequences) <= LONGEST_SHORT
    return Seen(
        tokens=[sequence.supervised_tokens for sequence in sequences],
        clusters=clusters_of([material.training.owners[index] for index in chosen]),
        start=outcome.start.seen[: len(chosen)],
        best=outcome.adapter.seen[: len(chosen)],
        doubts=outcome.adapter.doubts[: len(chosen)] if is_short else None,
    )
