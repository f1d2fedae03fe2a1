"""How heavy a finding is, for the data check and the config review alike, and how a user sets a rule's level."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable

from adapters.errors import ConfigInvalid

LEVELS = ("block", "warn", "note", "off")  # the heaviest first


def levels_of(overrides: Iterable[str], rules: Collection[str], page: str) -> dict[str, str]:
    """The level that each `code=level` sets in place of the rule's own; raises ConfigInvalid. `page` lists them."""
    levels: dict[str, str] = {}
    for text in overrides:
        code, _, level = text.partition("=")
        if code not in rules:
            near = difflib.get_close_matches(code, rules, n=1)
            hint = f"did you mean {near[0]}?" if near else f"{page} lists them."
            raise ConfigInvalid(f"There is no rule {code[:80]!r}; {hint}", param="rules")
        if level not in LEVELS:
            raise ConfigInvalid(
                f"{code} is set to {level[:80]!r}; it must be one of {', '.join(LEVELS)}.", param="rules"
            )
        levels[code] = level
    return levels
