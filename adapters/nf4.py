"""What NF4 leaves of a weight: the values that QLoRA training computed with, by bitsandbytes' own arithmetic.

NF4 (QLoRA, arXiv 2305.14314) keeps one of 16 values per weight and a scale per 64 of them; scales are themselves kept
in 8 bits, per 256, around their mean. So a matrix needs its scales first, which takes one pass over it, and then any
rows that begin on a block of 64 can be put through alone: nothing of the size of the matrix is in memory. The mean of
the scales is that of one thread.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapters.checkpoint import FLOATS, ITEM_BYTES, StoredTensor
from adapters.errors import BaseInvalid
from adapters.merge_plan import NF4_BLOCK

if TYPE_CHECKING:
    import torch

SCALE_BLOCK = 256
CHUNK = 1 << 20  # weights looked at together; a multiple of NF4_BLOCK


@dataclass(frozen=True)
class Nf4Scales:
    """The scales of one matrix as training reads them back: float32, one per 64 weights in row-major order."""

    scales: torch.Tensor
    dtype: torch.dtype  # that the matrix is stored in, and so handed to the layer in

    def through(self, values: torch.Tensor, first: int) -> torch.Tensor:
        """The weights `first`, `first` + 1, ... after NF4, in float32 and flat; `first` is a multiple of 64."""
        import torch
        from bitsandbytes import functional

        block = first // NF4_BLOCK
        count = -(-values.numel() // NF4_BLOCK)
        packed, state = functional.quantize_4bit(values, blocksize=NF4_BLOCK, quant_type="nf4")
        back: torch.Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
            packed, self.scales[block : block + count], NF4_BLOCK, state.quant_type, tuple(values.shape), self.dtype
        )
        return back.reshape(-1).float()


def nf4_scales(stored: StoredTensor, source: int) -> Nf4Scales:
    """Read a matrix once, from the open file that holds it, for the scales of its NF4 form."""
    import torch
    from bitsandbytes import functional

    dtype = getattr(torch, FLOATS[stored.dtype])
    largest = []
    for first in range(0, stored.elements, CHUNK):
        count = min(CHUNK, stored.elements - first)
        raw = os.pread(source, count * ITEM_BYTES[stored.dtype], stored.begin + first * ITEM_BYTES[stored.dtype])
        if len(raw) != count * ITEM_BYTES[stored.dtype]:
            raise BaseInvalid("A weight file of the base ended early: it changed during the merge.")
        values = torch.frombuffer(bytearray(raw), dtype=dtype).float().abs()
        padded = torch.nn.functional.pad(values, (0, -count % NF4_BLOCK))
        largest.append(padded.view(-1, NF4_BLOCK).amax(dim=1))
    scales = torch.cat(largest)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the last place of a long sum depends on how many add it up
    mean = scales.mean()
    torch.set_num_threads(threads)
    kept, state = functional.quantize_blockwise(scales - mean, blocksize=SCALE_BLOCK)
    return Nf4Scales(functional.dequantize_blockwise(kept, state) + mean, dtype)


def nf4_weight(weight: torch.Tensor) -> torch.Tensor:
    """A whole matrix after NF4, in its own dtype, with nested scales, as a QLoRA layer holds it."""
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(
        weight.contiguous(), blocksize=NF4_BLOCK, compress_statistics=True, quant_type="nf4"
    )
    back: torch.Tensor = functional.dequantize_4bit(packed, state)
    return back.reshape(weight.shape)
