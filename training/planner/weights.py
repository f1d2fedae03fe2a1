"""What a run holds from its first step to its last, to the byte: weights, adapter, gradients, the optimizer's state.

NF4 weight  = 4 bits, a byte of scale for 64 of them, a float32 for 256 scales (double quantisation, arXiv 2305.14314)
AdamW       = two moments of each trained weight in float32; paged_adamw_8bit: in 8 bits with two float32 for 256
              weights, but in float32 below 4,096 weights and for embeddings, as bitsandbytes and Trainer have it
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

from training.planner.operators import FLOAT32_BYTES
from training.planner.sizes import Architecture
from training.planner.work import Method

NF4_BLOCK, NESTED_BLOCK, NF4_CODE, NESTED_CODE = 64, 256, 16, 256
EIGHT_BIT_BLOCK, SMALLEST_EIGHT_BIT = 256, 4096
ADAMW, EIGHT_BIT = "adamw_torch", "paged_adamw_8bit"


@dataclass(frozen=True)
class Fixed:
    """Bytes of a run beside its activations."""

    weights: int  # of the base, trained or not
    adapter: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.weights + self.adapter + self.gradients + self.optimizer


def fixed_bytes(of: Architecture, method: Method, optimizer: str) -> Fixed:
    """The bytes that do not depend on the data."""
    trained = sum(size for size, _ in trained_tensors(of, method))
    state = sum(_state_bytes(size, optimizer, is_embedding) for size, is_embedding in trained_tensors(of, method))
    if method.trains_all:
        return Fixed(FLOAT32_BYTES * trained, 0, FLOAT32_BYTES * trained, state)
    return Fixed(frozen_bytes(of, method), FLOAT32_BYTES * trained, FLOAT32_BYTES * trained, state)


def frozen_bytes(of: Architecture, method: Method) -> int:
    """The base's weights where they are not trained."""
    if not method.is_quantised:
        return method.itemsize * of.parameters
    layer = sum(nf4_bytes(out * into) for out, into in of.projections.values())
    return of.layers * layer + method.itemsize * (of.embedding_parameters + of.small_parameters)


def nf4_bytes(count: int) -> int:
    """One quantised matrix with its scales, its scales' scales and their codes."""
    blocks = ceil(count / NF4_BLOCK)
    scales = blocks + FLOAT32_BYTES * ceil(blocks / NESTED_BLOCK)
    return ceil(count / 2) + scales + FLOAT32_BYTES * (NF4_CODE + 1)


def trained_tensors(of: Architecture, method: Method) -> Iterator[tuple[int, bool]]:
    """The size of each trained tensor, and whether it is an embedding."""
    if not method.trains_all:
        for name in method.targets:
            out_width, in_width = of.projections[name]
            for width in (in_width, out_width):
                yield from ((method.rank * width, False) for _ in range(of.layers))
        return
    yield of.vocabulary * of.hidden, True
    if not of.is_tied:
        yield of.vocabulary * of.hidden, False
    yield of.hidden, False
    for _ in range(of.layers):
        yield from ((size, False) for size in of.layer_tensors().values())


def _state_bytes(size: int, optimizer: str, is_embedding: bool) -> int:
    if optimizer != EIGHT_BIT or size < SMALLEST_EIGHT_BIT or is_embedding:
        return 2 * FLOAT32_BYTES * size
    return 2 * size + 2 * FLOAT32_BYTES * ceil(size / EIGHT_BIT_BLOCK)
