"""What a run needs beside its activations: bytes of weights, gradients and optimizer, by the planner's arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from adapters.bases import BaseModel
from training.config import Settings
from training.planner.sizes import of_base
from training.planner.weights import fixed_bytes
from training.planner.work import method_of


@dataclass(frozen=True)
class Memory:
    """Bytes of one run, activations not counted."""

    weights_bytes: float
    gradients_bytes: float
    optimizer_bytes: float

    @property
    def total_bytes(self) -> float:
        return self.weights_bytes + self.gradients_bytes + self.optimizer_bytes

    def line(self) -> str:
        """For people."""
        parts = (
            ("weights", self.weights_bytes),
            ("gradients", self.gradients_bytes),
            ("optimizer", self.optimizer_bytes),
        )
        named = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts)
        return f"memory: {self.total_bytes / 1e9:.2f} GB ({named}), and activations beside them"


def memory(settings: Settings, base: BaseModel) -> Memory:
    """What the method needs for this base."""
    fixed = fixed_bytes(of_base(base), method_of(settings), settings.optimizer)
    return Memory(fixed.weights + fixed.adapter, fixed.gradients, fixed.optimizer)
