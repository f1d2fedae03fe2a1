"""What a version is served with where a request says nothing: default fields of a request, and a chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

SERVING_FILE = "serving.json"
TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_KWARGS = "chat_template_kwargs"
THINKING = "enable_thinking"


@dataclass(frozen=True, slots=True)
class Serving:
    """Checked by who takes it in. It is part of what a version is: the same files with another one are another version.

    `dropped` says what came with the upload and is not kept.
    """

    defaults: Mapping[str, Any] = field(default_factory=dict)
    chat_template: str | None = None
    dropped: tuple[str, ...] = ()

    def with_card(self, card: Mapping[str, Any] | None) -> Serving:
        """With `enable_thinking` as the adapter was trained, where its card says so and its uploader says nothing."""
        template = card.get("template") if card else None
        thinking = template.get(THINKING) if isinstance(template, Mapping) else None
        if not isinstance(thinking, bool):
            return self
        given = self.defaults.get(TEMPLATE_KWARGS) or {}
        return replace(self, defaults={**self.defaults, TEMPLATE_KWARGS: {THINKING: thinking, **given}})

    def as_row(self) -> dict[str, Any] | None:
        """As the registry keeps it; None for nothing."""
        row: dict[str, Any] = {"defaults": dict(self.defaults)} if self.defaults else {}
        if self.chat_template is not None:
            row["chat_template"] = self.chat_template
        return row or None


def is_same(row: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> bool:
    """Two rows say the same. True is not 1 here, which Python's own comparison takes it for."""
    return json.dumps(row or {}, sort_keys=True) == json.dumps(other or {}, sort_keys=True)
