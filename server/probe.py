"""Proof of effect: an adapter that was loaded must change what the engine computes, to finite values.

A file can load and do nothing (names under a wrong prefix, zero weights) or overflow in the serving number format. So
the log-probabilities of fixed prompts are asked of base and adapter; the base is asked twice, which measures the noise
of the batch around it.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from adapters.errors import EngineFailed

PROMPTS = (
    "The quick brown fox jumps over the lazy dog.",
    '{"intent": "turn_on", "area": "kitchen", "name": "desk lamp"}',
    "Xin chào, hôm nay trời đẹp quá. 1 + 1 = 2",
)
NOISE_FACTOR = 3.0


class Completions(Protocol):
    """Asks an engine's completions route; returns status and body."""

    async def __call__(self, body: dict[str, Any]) -> tuple[int, bytes]: ...


@dataclass(frozen=True, slots=True)
class Proof:
    """What was shown of one version through one engine, and whether that is enough to serve it."""

    is_proven: bool
    code: str  # proven | no_effect | non_finite
    message: str
    largest_change: float | None  # of a token's log-probability, adapter against base
    noise: float | None  # the same between two runs of the base
    tokens: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def judge(base: Sequence[float], again: Sequence[float], adapter: Sequence[float], tolerance: float) -> Proof:
    """Pure verdict over three runs of log-probabilities, token by token."""
    if not all(math.isfinite(value) for value in adapter):
        return Proof(False, "non_finite", "The adapter's log-probabilities are not finite.", None, None, len(adapter))
    noise = _largest_difference(base, again)
    change = _largest_difference(base, adapter)
    floor = max(tolerance, NOISE_FACTOR * noise)
    if change <= floor:
        message = (
            f"The adapter changes nothing: the largest change of a log-probability over {len(adapter)} tokens is "
            f"{change:.3g}, and at least {floor:.3g} counts as an effect."
        )
        return Proof(False, "no_effect", message, change, noise, len(adapter))
    return Proof(True, "proven", "", change, noise, len(adapter))


async def probe(complete: Completions, base_id: str, adapter_name: str, tolerance: float) -> Proof:
    """Ask base, adapter, base; raises EngineFailed when the base does not answer as it must."""
    first = await _log_probabilities(complete, base_id)
    changed = await _log_probabilities(complete, adapter_name, may_be_non_finite=True)
    second = await _log_probabilities(complete, base_id)
    return judge(first, second, changed, tolerance)


async def _log_probabilities(complete: Completions, model: str, may_be_non_finite: bool = False) -> list[float]:
    """Of every prompt's tokens, the prompts in one batch."""
    answers = await asyncio.gather(*(complete(_question(model, prompt)) for prompt in PROMPTS))
    values: list[float] = []
    for status, raw in answers:
        if status != 200:
            if may_be_non_finite and is_non_finite_error(raw):
                return [math.nan]
            raise EngineFailed(f"The probe of {model} was answered {status}.")
        values.extend(read_log_probabilities(raw))
    return values


def _question(model: str, prompt: str) -> dict[str, Any]:
    return {"model": model, "prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True}


def read_log_probabilities(raw: bytes) -> list[float]:
    """The prompt's tokens' log-probabilities; of the generated one it only counts whether it is finite."""
    choice = json.loads(raw)["choices"][0]
    found = [float(value) for value in choice["logprobs"]["token_logprobs"] if value is not None]
    return found[:-1] if math.isfinite(found[-1]) else [math.nan]


def is_non_finite_error(raw: bytes) -> bool:
    """The engine ended the request for it (not_finite.py), or failed to write a NaN or an infinity as JSON."""
    return any(words in raw for words in (b"were not finite", b"Out of range float values", b"not JSON compliant"))


def _largest_difference(one: Sequence[float], other: Sequence[float]) -> float:
    if len(one) != len(other):
        raise EngineFailed(f"The probe's runs have {len(one)} and {len(other)} tokens: they cannot be compared.")
    return max((abs(a - b) for a, b in zip(one, other, strict=True)), default=0.0)
