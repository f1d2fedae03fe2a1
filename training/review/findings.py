"""A rule of the review, and one finding of it. The rules themselves are in `rules.py`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

KINDS = ("paper", "documentation", "issue", "measured", "arithmetic")
MOST_SHOWN = 200  # characters of a value


@dataclass(frozen=True)
class Rule:
    """One thing a setting can do to you. `block`: the run fails, or its result cannot be served.

    `evidence` names its kind first, then where it stands.
    """

    code: str
    level: str
    effect: str
    kind: str
    evidence: str
    advice: str


@dataclass(frozen=True)
class Finding:
    """A rule that fired: the setting by the user's own key, its value, and what to write instead."""

    rule: Rule
    setting: str
    value: Any
    line: int = 0  # 0: the dialect's default, or a key that is missing
    detail: str = ""
    suggestion: str = ""
    level: str | None = None  # where this case is less or more than the rule's own

    def as_dict(self, levels: Mapping[str, str]) -> dict[str, Any]:
        """As in the report and the card."""
        return {
            "rule": self.rule.code,
            "severity": levels.get(self.rule.code) or self.level or self.rule.level,
            "setting": self.setting[:MOST_SHOWN],
            "value": shown(self.value),
            "line": self.line or None,
            "is_default": self.line == 0,
            "effect": self.rule.effect,
            "detail": self.detail,
            "evidence": {"kind": self.rule.kind, "source": self.rule.evidence},
            "suggestion": self.suggestion or self.rule.advice,
        }


def shown(value: Any) -> Any:
    """A value as JSON has it, a long one cut."""
    if isinstance(value, tuple | list):
        return [shown(item) for item in list(value)[:20]]
    if value is None or isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    text = str(value)
    return text if len(text) <= MOST_SHOWN else f"{text[: MOST_SHOWN - 1]}…"
