"""Peaks that others published, as this project's facts about training list them, and what the planner says of the same.

They are listed with their error and no bar: they mix GB with GiB, allocated with reserved, and other trainers' ways.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from adapters.bases import PROJECTIONS
from training.planner.machines import GIB
from training.planner.peak import peak
from training.planner.sizes import Architecture, find
from training.planner.usual import usual_peak
from training.planner.weights import ADAMW, EIGHT_BIT
from training.planner.work import Method, Pass

LLAMA_2_7B = Architecture("Llama-2-7B", 4096, 32, 32, 32, 128, 11_008, 32_000, False, False, False, 4096, False)
LLAMA_2_13B = Architecture("Llama-2-13B", 5120, 40, 40, 40, 128, 13_824, 32_000, False, False, False, 4096, False)
LLAMA_3_1_8B = Architecture("Llama-3.1-8B", 4096, 32, 32, 8, 128, 14_336, 128_256, False, False, False, 131_072, False)


@dataclass(frozen=True)
class Published:
    """One published peak, and how the run was set as far as that was said."""

    source: str
    setting: str
    figure: float
    unit: Literal["GB", "GiB"]
    base: Architecture
    method: Method
    work: Pass
    optimizer: str = ADAMW
    has_chunked_loss: bool = False  # as ours; else logits of all positions at once

    @property
    def bytes(self) -> float:
        return self.figure * (1e9 if self.unit == "GB" else GIB)


def _rows(count: int, length: int) -> Pass:
    return Pass(count, 0, length, count * length, count * length)


def _lora(rank: int, is_quantised: bool = False, checkpoints: bool = True) -> Method:
    return Method(rank, PROJECTIONS, 2, is_quantised, checkpoints)


_FULL = Method(0, (), 4, checkpoints=True)
_LONG, _SHORT, _TWO = _rows(1, 2048), _rows(1, 512), _rows(2, 2048)
_QWEN2_5, _QWEN3 = find("Qwen2.5-7B"), find("Qwen3-8B")
_PLAIN, _NF4 = _lora(8, checkpoints=False), _lora(8, is_quantised=True, checkpoints=False)

PUBLISHED = (
    Published("ms-swift", "Qwen2.5-7B, LoRA r 8, 2,048 tokens", 22, "GB", _QWEN2_5, _lora(8), _LONG),
    Published("ms-swift", "Qwen2.5-7B, QLoRA r 8, 2,048 tokens", 10, "GB", _QWEN2_5, _lora(8, True), _LONG),
    Published("ms-swift", "Qwen2.5-7B, full, 2,048 tokens", 76, "GB", _QWEN2_5, _FULL, _LONG, EIGHT_BIT),
    Published("ms-swift", "Qwen3-8B, LoRA r 8, 2,048 tokens", 22, "GB", _QWEN3, _lora(8), _LONG),
    Published("litgpt", "Llama-2-7B, LoRA bf16", 21.3, "GB", LLAMA_2_7B, _PLAIN, _SHORT),
    Published("litgpt", "Llama-2-7B, LoRA nf4, double", 13.8, "GB", LLAMA_2_7B, _NF4, _SHORT),
    Published("litgpt", "Llama-2-13B, LoRA bf16", 38.1, "GB", LLAMA_2_13B, _PLAIN, _SHORT),
    Published("litgpt", "Llama-2-13B, LoRA nf4, double", 22.6, "GB", LLAMA_2_13B, _NF4, _SHORT),
    Published("torchtune", "Llama-3.1-8B, LoRA, 2 x 2,048", 16.2, "GiB", LLAMA_3_1_8B, _lora(8), _TWO, ADAMW, True),
    Published(
        "torchtune", "Llama-3.1-8B, QLoRA, 2 x 2,048", 7.4, "GiB", LLAMA_3_1_8B, _lora(8, True), _TWO, ADAMW, True
    ),
)


def predicted_peak_of(one: Published) -> int:
    """The planner's figure for the same base, method and tokens, a GPU's context left out."""
    if one.has_chunked_loss:
        return peak(one.base, one.method, one.work, one.optimizer).total
    return usual_peak(one.base, one.method, one.work, one.optimizer).total
