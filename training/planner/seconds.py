"""How long a run takes: its arithmetic over a rate, and what stands between the passes.

forward  = 2 * tokens * (projections + adapter) + attention + 2 * supervised * vocabulary * hidden
backward = as much again for the inputs, and for each trained weight; with checkpointing the forward pass twice
NF4      = every weight made 16 or 32 bits wide again, forward and backward: bytes over bandwidth
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from training.planner.sizes import Architecture
from training.planner.work import Method, Pass
from training.planner.workload import average

SECONDS_A_LAYER = 4e-4  # of launching kernels, forward and backward, where the GPU waits for Python: judged


@dataclass(frozen=True)
class Rate:
    """What a machine computes a second, and how that is known. `error` is a factor either way."""

    flops: float
    bandwidth_bytes: float
    error: float
    evidence: str
    seconds_a_layer: float = SECONDS_A_LAYER


@dataclass(frozen=True)
class Time:
    """Seconds of a run with their error bar, and what they are made of."""

    seconds_a_step: float
    training_seconds: float
    validation_seconds: float
    error: float
    evidence: str

    @property
    def total(self) -> float:
        return self.training_seconds + self.validation_seconds

    def as_dict(self) -> dict[str, Any]:
        return {
            "seconds": self.total,
            "low": self.total / self.error,
            "high": self.total * self.error,
            "seconds_a_step": self.seconds_a_step,
            "training_seconds": self.training_seconds,
            "validation_seconds": self.validation_seconds,
            "evidence": self.evidence,
        }


def forward_flops(of: Architecture, tokens: float, supervised: float, attended: float, rank_parameters: int) -> float:
    """Multiplications and additions of one forward pass."""
    attention = 4 * attended * of.query_width * of.layers
    return (
        2 * tokens * (of.linear_parameters + rank_parameters) + attention + 2 * supervised * of.vocabulary * of.hidden
    )


def pass_flops(of: Architecture, method: Method, passes: Sequence[Pass]) -> float:
    """Of the average training pass."""
    mean = average(passes)
    adapter = 0 if method.trains_all else of.lora_parameters(method.rank, method.targets)
    parts = (mean["tokens"], mean["supervised"], mean["attended"])
    forward = forward_flops(of, *parts, adapter)
    backward = 2 * forward if method.trains_all else forward + 2 * mean["tokens"] * adapter
    logits = 2 * mean["supervised"] * of.vocabulary * of.hidden
    again = forward - logits if method.checkpoints else 0.0
    return forward + backward + again


def seconds(
    of: Architecture,
    method: Method,
    passes: Sequence[Pass],
    rate: Rate,
    accumulation: int,
    steps: int,
    validated: float,
) -> Time:
    """The time of `steps`; `validated` is the tokens that validations push through the model in all."""
    one = pass_flops(of, method, passes) / rate.flops + rate.seconds_a_layer * of.layers
    one += _unpacking(of, method, rate)
    forward = 2 * validated * of.linear_parameters / rate.flops
    step = one * accumulation
    return Time(step, steps * step, forward, rate.error, rate.evidence)


def _unpacking(of: Architecture, method: Method, rate: Rate) -> float:
    if not method.is_quantised:
        return 0.0
    moved = of.linear_parameters * (0.5 + 2 * method.itemsize)
    return (3 if method.checkpoints else 2) * moved / rate.bandwidth_bytes
