"""The review of a training config, ours or another trainer's: what each of its settings does, with evidence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def of_settings(settings: Mapping[str, Any], facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The findings on a run's own settings, for its card: `Settings.as_dict()`, and what is known beside them.

    Facts, each of which may be missing: base (its id), parameters, context_length_tokens, rows, longest_row_tokens,
    tokens, has_validation, has_reasoning, device (cpu or cuda), gpu, max_rank.
    """
    from training.review.check import review_of_settings

    return review_of_settings(settings, facts)
