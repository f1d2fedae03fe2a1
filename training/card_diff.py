"""What differs between two cards, for people who ask why one adapter is better: figures first, then what made them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from training.card_page import number, text

TOPICS = (
    ("verdict", ("verdict",)),
    ("result", ("result", "evaluation", "check", "forgetting", "privacy", "adapter", "cost", "plan")),
    ("settings", ("goal", "settings")),
    ("data", ("data", "gate", "baseline")),
    ("lineage", ("parent", "base", "template", "lineage", "versions")),
)
LEFT_OUT = ("curve", "evidence", "figures", "samples", "cut", "dropped", "sources", "problems")
DEEPEST = 5


def diff(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each value that differs, by topic: its path, both values, and their ratio where both are numbers."""
    made = []
    for topic, keys in TOPICS:
        sides = [dict(_flat({key: card.get(key) for key in keys if key in card})) for card in (one, other)]
        for path in {**sides[0], **sides[1]}:
            before, after = (side.get(path) for side in sides)
            if before != after:
                made.append(
                    {"topic": topic, "path": path, "one": before, "other": after, "ratio": _ratio(before, after)}
                )
    return made


def lines(found: list[dict[str, Any]]) -> Iterator[str]:
    """For the terminal."""
    topic = None
    for row in found:
        if row["topic"] != topic:
            topic = row["topic"]
            yield topic
        times = f"  (x {row['ratio']:.3g})" if row["ratio"] is not None else ""
        yield f"  {row['path']}: {text(row['one'])} -> {text(row['other'])}{times}"


def _flat(values: Mapping[str, Any], before: str = "", depth: int = 1) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if key in LEFT_OUT:
            continue
        path = f"{before}{key}"
        if isinstance(value, Mapping) and depth < DEEPEST:
            yield from _flat(value, f"{path}.", depth + 1)
        else:
            yield path, value


def _ratio(before: Any, after: Any) -> float | None:
    first, second = number(before), number(after)
    return second / first if first and second is not None else None
