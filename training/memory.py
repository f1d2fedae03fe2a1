"""What a run needs beside its activations: bytes of the weights, the gradients and the optimizer, by arithmetic.

LoRA parameters = sum over target modules of rank * (in + out)
NF4 weight      = 4.127 bits: 4, and 0.127 for the scales of 64 weights in double quantisation (arXiv 2305.14314)
AdamW           = two moments of each trained weight, in 32 bits or (paged_adamw_8bit) in 8
"""

from __future__ import annotations

from dataclasses import dataclass

from adapters.bases import BaseModel
from training.config import Settings

NF4_BITS = 4.127
FLOAT32_BYTES, SHORT_BYTES = 4, 2


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
    linear, embedding = linear_parameters(base), embedding_parameters(base)
    moments = 2 * (1 if "8bit" in settings.optimizer else FLOAT32_BYTES)
    if settings.method == "full":
        trained = linear + embedding
        return Memory(FLOAT32_BYTES * trained, FLOAT32_BYTES * trained, moments * trained)
    trained = lora_parameters(settings, base)
    each = FLOAT32_BYTES if settings.dtype == "float32" else SHORT_BYTES
    of_linear = NF4_BITS / 8 if settings.method == "qlora" else each
    weights = of_linear * linear + each * embedding + FLOAT32_BYTES * trained
    return Memory(weights, FLOAT32_BYTES * trained, moments * trained)


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
