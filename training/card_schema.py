"""The published schema of `card.json`, and what of a card is not of its form."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

SCHEMA_FILE = "card.schema.json"
MOST_PROBLEMS = 20


def schema() -> dict[str, Any]:
    """The schema as JSON."""
    found: dict[str, Any] = json.loads(Path(__file__).with_name(SCHEMA_FILE).read_bytes())
    return found


def problems(card: Mapping[str, Any]) -> list[str]:
    """Where and why the card breaks the schema; empty for a valid one."""
    errors = list(_validator().iter_errors(dict(card)))[:MOST_PROBLEMS]
    return [f"{'.'.join(map(str, error.instance_path)) or 'card'}: {error.message}" for error in errors]


@cache
def _validator() -> Any:
    import jsonschema_rs

    return jsonschema_rs.Draft202012Validator(schema())
