"""What goes through a model at once, and how the model is trained: the two things that its memory depends on."""

from __future__ import annotations

from dataclasses import dataclass

from adapters.bases import PROJECTIONS
from training.config import Settings

ITEMSIZES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Pass:
    """`rows` that share `prefix` tokens, the longest with `longest_rest` more.

    `tokens` are the packed ones, the prefix counted once; of `supervised` the next token is learned.
    """

    rows: int
    prefix: int
    longest_rest: int
    tokens: int
    supervised: int

    @property
    def padded_rest(self) -> int:
        return self.rows * self.longest_rest


@dataclass(frozen=True)
class Method:
    """How a base is trained. `itemsize` is the bytes of a number in activations and in frozen, not quantised weights.

    `rank` 0 trains every weight.
    """

    rank: int
    targets: tuple[str, ...]
    itemsize: int
    is_quantised: bool = False
    checkpoints: bool = False

    @property
    def trains_all(self) -> bool:
        return self.rank == 0


def method_of(settings: Settings) -> Method:
    """The settings as the memory model knows them. Full fine-tuning computes in float32, whatever the dtype says."""
    if settings.method == "full":
        return Method(0, (), 4, checkpoints=settings.gradient_checkpointing)
    targets = tuple(name for name in PROJECTIONS if name in settings.target_modules)
    is_quantised = settings.method == "qlora"
    return Method(settings.rank, targets, ITEMSIZES[settings.dtype], is_quantised, settings.gradient_checkpointing)
