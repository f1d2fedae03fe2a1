"""Canaries: random rows planted among those trained on, to see whether the adapter gives away single rows.

A canary asks for the code of a locker and answers with eight random digits. Its loss is ranked among those of 1,000
codes like it, for the same locker, that were not planted. Nothing but memory can put it first: without memory every
rank is equally likely (Carlini et al., The Secret Sharer, arXiv 1802.08232).
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from training.data.rows import Place, Row

CANDIDATES = 1000
DIGITS = 8
FORM = "messages"


@dataclass(frozen=True)
class Canary:
    """One planted row."""

    question: str
    code: str


def canaries_of(count: int, seed: int) -> list[Canary]:
    """The canaries of a run, the same for the same seed."""
    draw = random.Random(f"canaries {seed}")  # noqa: S311 - reproducible, no secret
    lockers = draw.sample(range(1000, 10_000), count)
    return [Canary(f"What is the code of locker {locker}?", _code(draw)) for locker in lockers]


def row_of(canary: Canary, code: str | None = None) -> Row:
    """The canary as a row to train on, or with another code."""
    messages = (
        {"role": "user", "content": canary.question},
        {"role": "assistant", "content": code or canary.code},
    )
    return Row(messages, None, (0, 1), Place("canaries", 1, 1), FORM)


def unused_codes(canary: Canary, seed: str) -> list[str]:
    """The codes that a canary's own is ranked among, the same for the same seed."""
    draw = random.Random(f"candidates {seed}")  # noqa: S311 - reproducible, no secret
    codes: set[str] = set()
    while len(codes) < CANDIDATES:
        codes.add(_code(draw))
        codes.discard(canary.code)
    return sorted(codes)


def _code(draw: random.Random) -> str:
    return "".join(draw.choices("0123456789", k=DIGITS))
