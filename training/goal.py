"""What a run is for: said in the settings, or as its rows look. The card says it; nothing is trained differently."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from training.data.rows import Row
from training.gate import labels
from training.gate.subject import Subject

PERSONA = re.compile(r"\b(role[- ]?play|in character|persona|pretend to be|you play)\b", re.IGNORECASE)
SOURCES = re.compile(r"^\W*(context|passages?|documents?|sources?|reference|retrieved)\b.*[:>\]]", re.I | re.M)
HALF = 0.5  # of the rows show it


@dataclass(frozen=True)
class Goal:
    """The task, whether it was detected, and why; `labels` of each row where there are, by the row's identity."""

    task: str
    is_detected: bool
    why: str
    label_field: str | None = None  # "" where the whole answer is the label
    labels: Mapping[int, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return {
            "task": self.task,
            "is_detected": self.is_detected,
            "why": self.why,
            "label_field": self.label_field,
            "labels": len(set(self.labels.values())),
        }


def goal_of(rows: Sequence[Row], said: str | None = None) -> Goal:
    """The goal of a run on these rows, training and validation together."""
    found = labels.detect(Subject.of_rows(rows))
    of_rows = {id(row): value for row, value in zip(rows, found.values, strict=True) if value} if found else {}
    task, why = _look(rows, found)
    if said is not None:
        task, why = said, "the settings say so"
    return Goal(task, said is None, why, found.field if found else None, of_rows)


def _look(rows: Sequence[Row], found: labels.Labels | None) -> tuple[str, str]:
    kinds: tuple[tuple[str, str, Callable[[Row], bool]], ...] = (
        ("agent routing", "the rows call tools or declare them", _has_tools),
        ("role play", "the system prompts give a character to play", lambda row: _says(row, PERSONA, ("system",))),
        ("rag", "the questions bring sources", lambda row: _says(row, SOURCES, ("system", "user"))),
    )
    for task, why, shows in kinds:
        if sum(map(shows, rows)) > HALF * len(rows):
            return task, why
    if found is None:
        return "generation", "the answers are free text"
    if found.field:
        return "agent routing", f"the answers are objects whose {found.field!r} is one of {len(found.counts)}"
    return "classification", f"the answers are {len(found.counts)} short texts"


def _has_tools(row: Row) -> bool:
    return bool(row.tools) or any(message.get("tool_calls") for message in row.messages)


def _says(row: Row, pattern: re.Pattern[str], roles: tuple[str, ...]) -> bool:
    return any(message["role"] in roles and pattern.search(message["content"]) for message in row.messages)
