"""What a verdict is made from: the curves of a run, and the loss of the same rows before, during and after it.

Plain values only, so that a card can hold them and anybody can judge them again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

Points = Sequence[tuple[int, float]]


@dataclass(frozen=True)
class HeldOut:
    """Nats of each validation row, summed over its `tokens` learned ones, under each state of the model.

    `base` is without an adapter, `start` before the first step (another only where a run goes on from an adapter),
    `middle` at the validation nearest to half of the learning, `best` what is kept, `last` after the last step.
    """

    tokens: Sequence[int]
    clusters: Sequence[str]
    base: Sequence[float]
    start: Sequence[float]
    middle: Sequence[float]
    best: Sequence[float]
    last: Sequence[float]
    labels: Sequence[str] = ()  # of a classification
    is_far: Sequence[bool] = ()  # whether it is unlike every row trained on


@dataclass(frozen=True)
class Seen:
    """A sample of the rows trained on, as `HeldOut`; `doubts` says how sure the kept model is of another answer.

    A doubt is the largest log-ratio, at any learned token, between the likeliest token and the row's own, counted where
    the likeliest has a probability of at least 0.6. Only for short answers, where one other token is another answer.
    """

    tokens: Sequence[int]
    clusters: Sequence[str]
    start: Sequence[float]
    best: Sequence[float]
    doubts: Sequence[float] | None = None


@dataclass(frozen=True)
class General:
    """Nats a token of each piece of general text, under the base and under the kept weights."""

    base: Sequence[float]
    best: Sequence[float]


@dataclass(frozen=True)
class Canaries:
    """The rank of each planted row's loss, 1 the lowest, among itself and so many unused ones like it."""

    planted: int
    ranks: Sequence[int]
    candidates: int


@dataclass(frozen=True)
class Evidence:
    """One run that came to its end; what the guard stops leaves no card, and so nothing to judge."""

    steps: int
    planned_steps: int
    best_step: int
    training: Points
    validation: Points
    learning_rate: Points
    held_out: HeldOut | None = None
    seen: Seen | None = None
    general: General | None = None
    canaries: Canaries | None = None
    rows_of_label: Mapping[str, int] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The rows' part of it, as a card keeps it: the curves stand in the card already."""
        kept = asdict(self)
        rows = {"rows_of_label": kept["rows_of_label"]} if kept["rows_of_label"] else {}
        return rows | {
            key: _short(kept[key]) for key in ("held_out", "seen", "general", "canaries") if kept[key] is not None
        }


def evidence_of_card(card: Mapping[str, Any]) -> Evidence:
    """The evidence that a card holds, to judge it again."""
    result, kept = card["result"], card["verdict"]["evidence"]
    curve = {name: [(int(step), float(value)) for step, value in points] for name, points in result["curve"].items()}
    kinds: dict[str, Any] = {"held_out": HeldOut, "seen": Seen, "general": General, "canaries": Canaries}
    return Evidence(
        steps=result["steps"],
        planned_steps=card["settings"]["steps"],
        best_step=result["best_step"],
        training=curve["training"],
        validation=curve["validation"],
        learning_rate=curve["learning_rate"],
        rows_of_label=kept.get("rows_of_label", {}),
        **{name: kind(**kept[name]) for name, kind in kinds.items() if name in kept},
    )


def _short(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _short(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_short(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value
