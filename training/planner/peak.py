"""The most memory that a run holds at once, by part: fixed bytes, and the passes played through on the tape."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

from training.planner.decoder import Decoder
from training.planner.operators import FLOAT32_BYTES
from training.planner.sizes import Architecture
from training.planner.tape import ACTIVATIONS, GRADIENTS, LOGITS, Arena
from training.planner.weights import EIGHT_BIT, fixed_bytes, trained_tensors
from training.planner.work import Method, Pass

FEWEST_LAYERS, NEXT_LAYERS = 4, 5  # from here on one more layer adds the same to every part


@dataclass(frozen=True)
class Peak:
    """Bytes by part when there are most; `workspace` is what the process and its libraries hold beside."""

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    workspace: int = 0

    @property
    def total(self) -> int:
        return sum(asdict(self).values())

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "total": self.total}


def peak(of: Architecture, method: Method, work: Pass, optimizer: str, accumulation: int = 1) -> Peak:
    """The largest of the moments: in a pass, with the gradients of those before it, or in the optimizer's step."""
    fixed = fixed_bytes(of, method, optimizer)
    in_pass = _in_pass(of, method, work, accumulation > 1)
    in_step = Peak(
        *(fixed.weights, fixed.adapter, fixed.gradients, fixed.optimizer, _step_bytes(of, method, optimizer), 0),
    )
    activations, logits, gradients = in_pass
    passing = Peak(fixed.weights, fixed.adapter, gradients, fixed.optimizer, activations, logits)
    return max(passing, in_step, key=lambda moment: moment.total)


def _step_bytes(of: Architecture, method: Method, optimizer: str) -> int:
    """AdamW one tensor at a time makes two of the largest's size; the 8-bit one none."""
    if optimizer == EIGHT_BIT:
        return 0
    return 2 * FLOAT32_BYTES * max(size for size, _ in trained_tensors(of, method))


@cache
def _in_pass(of: Architecture, method: Method, work: Pass, has_gradients: bool) -> tuple[int, int, int]:
    """(activations, logits, gradients) at the peak of a pass.

    A deep LoRA model is not played through where a layer's saved values outweigh its gradients: its peak lies at the
    last layer or after it, so it grows evenly with the layers. Else it may lie at either end, and all are played.
    """
    if method.trains_all or of.layers <= NEXT_LAYERS:
        return _played(of, method, work, has_gradients)
    few = _played(replace(of, layers=FEWEST_LAYERS), method, work, has_gradients)
    more = _played(replace(of, layers=NEXT_LAYERS), method, work, has_gradients)
    gradients = FLOAT32_BYTES * of.lora_parameters(method.rank, method.targets) // of.layers
    if more[0] - few[0] <= gradients:
        return _played(of, method, work, has_gradients)
    layers = of.layers - FEWEST_LAYERS
    return tuple(one + layers * (other - one) for one, other in zip(few, more, strict=True))  # type: ignore[return-value]


def _played(of: Architecture, method: Method, work: Pass, has_gradients: bool) -> tuple[int, int, int]:
    arena = Arena()
    decoder = Decoder(arena, of, method)
    if has_gradients:
        decoder.give_gradients()
    decoder.train(work)
    return arena.peak[ACTIVATIONS], arena.peak[LOGITS], arena.peak[GRADIENTS]
