"""What a run needs beside its activations: bytes of weights, gradients and optimizer, by the planner's arithmetic.

LoRA parameters = sum over target modules of rank * (in + out)
"""

from __future__ import annotations

from dataclasses import dataclass

from adapters.bases import BaseModel
from training.config import Settings
from training.planner.sizes import of_config
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
    of = of_config(base.config, base.id, f"{base.folder}/config.json")
    fixed = fixed_bytes(of, method_of(settings), settings.optimizer)
    return Memory(fixed.weights + fixed.adapter, fixed.gradients, fixed.optimizer)


def linear_parameters(base: BaseModel) -> int:
    """Weights of the projections, from shapes alone."""
    return sum(shape.in_features * shape.out_features for shape in base.shapes.values())


def embedding_parameters(base: BaseModel) -> int:
    """Weights of the embedding and, where it is not tied, of the output layer."""
    return int(base.config["vocab_size"]) * int(base.config["hidden_size"]) * (1 if base.is_tied else 2)


def lora_parameters(settings: Settings, base: BaseModel) -> int:
    """How many weights the adapter has."""
    adapted = (shape for name, shape in base.shapes.items() if name.rpartition(".")[2] in settings.target_modules)
    return sum(settings.rank * (shape.in_features + shape.out_features) for shape in adapted)
