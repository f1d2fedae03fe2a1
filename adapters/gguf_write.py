"""Writes a planned GGUF file as a stream of row blocks; the bytes depend on no number of threads.

    tensor = quantised(factor * W + scaling * (B @ A))        all in float32, rounded or quantised once at the end

Blocks are those of adapters.merge, so memory is bounded alike, whatever the size of the model or its largest matrix.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.blocks import (
    Progress,
    Task,
    add_update,
    copies,
    open_sources,
    read_all,
    read_factors,
    read_scales,
    worker_pool,
    write_all,
)
from adapters.checkpoint import FLOATS, ITEM_BYTES
from adapters.errors import MergeFailed
from adapters.flushing import Flusher
from adapters.gguf_k import K_LIMITS
from adapters.gguf_plan import NEGLIGIBLE, GgufPlan, GgufTensor, size_bytes

if TYPE_CHECKING:
    import torch

    from adapters.nf4 import Nf4Scales

    Tensor = torch.Tensor

# The largest number that a type can hold. A quantised block keeps its largest number over so many steps in float16.
F16_MAX = 65504.0
LIMITS = {"F16": F16_MAX, "Q8_0": 127 * F16_MAX, "Q4_0": 8 * F16_MAX, "Q5_0": 16 * F16_MAX}
LIMITS |= {"Q4_1": F16_MAX, "Q5_1": F16_MAX, **dict.fromkeys(K_LIMITS, 63 * F16_MAX)}
QUANTISED_AT_ONCE = 1 << 16  # elements, a multiple of every block: the library takes ten times their bytes meanwhile


@dataclass(frozen=True, slots=True)
class _Job:
    """Rows first..end of one tensor, from one open file into another. `factors` are A and B in float32."""

    tensor: GgufTensor
    factors: tuple[Tensor, Tensor] | None
    scales: Nf4Scales | None
    first: int
    end: int
    source: int
    target: int


def write_gguf(plan: GgufPlan, path: Path, *, workers: int | None = None, progress: Progress | None = None) -> None:
    """Write the file and fsync it; it has its name once it is whole. `progress` gets the bytes of each step done.

    Raises MergeFailed where a result is not finite in its type, and OSError as the disk does. What was written stays
    on an error: the caller owns the folder.
    """
    tell = progress or (lambda _: None)
    with worker_pool(workers) as pool, Flusher() as flusher, ExitStack() as stack:
        output = flusher.begin(path)
        os.posix_fallocate(output.handle, 0, plan.size_bytes)  # what lies between tensors stays zero
        write_all(output.handle, memoryview(plan.header), 0)
        sources = open_sources((tensor.source.path for tensor in plan.tensors), stack)
        pool.run(_tasks(plan, sources, output.handle), output, tell)
        output.finish()
    tell(len(plan.header))


def _tasks(plan: GgufPlan, sources: dict[Path, int], target: int) -> Iterator[Task]:
    for tensor in plan.tensors:
        source = sources[tensor.source.path]
        if tensor.is_copy:
            yield from copies(source, tensor.source.begin, target, tensor.begin, tensor.size_bytes)
            continue
        factors = read_factors(tensor.update)
        scales = read_scales(tensor.source, source) if tensor.through_nf4 else None
        for first, end in tensor.row_blocks():
            job = _Job(tensor, factors, scales, first, end, source, target)
            yield Task(partial(_write_block, job), size_bytes(tensor.type, (end - first) * tensor.matrix_shape[1]))


def _write_block(job: _Job) -> None:
    import torch

    tensor, columns = job.tensor, job.tensor.matrix_shape[1]
    count, item = (job.end - job.first) * columns, ITEM_BYTES[tensor.source.dtype]
    raw = bytearray(count * item)
    read_all(job.source, memoryview(raw), tensor.source.begin + job.first * columns * item)
    result = torch.frombuffer(raw, dtype=getattr(torch, FLOATS[tensor.source.dtype])).to(torch.float32)
    if tensor.factor != 1.0:
        result = result.double().mul_(tensor.factor).float()
    if job.scales is not None:
        result = job.scales.through(result, job.first * columns)
    if tensor.update is not None and job.factors is not None:
        matrix = result.view(-1, columns)
        add_update(matrix, job.factors, job.first, tensor.update.scaling, torch.empty_like(matrix))
    _check_finite(result, tensor)
    written = _encoded(result.view(-1, columns), tensor.type)
    write_all(job.target, written, tensor.begin + size_bytes(tensor.type, job.first * columns))


def _encoded(values: Tensor, kind: str) -> memoryview:
    """(rows, columns) of float32 as the bytes of a type."""
    import torch

    if kind in FLOATS:
        rounded = values.to(getattr(torch, FLOATS[kind])).contiguous()
        raw: Any = rounded.view(torch.uint8).numpy()
        return memoryview(raw).cast("B")
    if kind in K_LIMITS:
        from adapters.ggml import quantise

        quantised: Any = quantise(values.numpy(), kind)
        return memoryview(quantised).cast("B")
    from gguf import GGMLQuantizationType, quantize

    numbers: Any = torch.nn.functional.hardshrink(values, NEGLIGIBLE).view(1, -1).numpy()
    written = bytearray()
    for first in range(0, numbers.size, QUANTISED_AT_ONCE):
        written += quantize(numbers[:, first : first + QUANTISED_AT_ONCE], GGMLQuantizationType[kind]).tobytes()
    return memoryview(written)


def _check_finite(values: Tensor, tensor: GgufTensor) -> None:
    import torch

    limit = LIMITS.get(tensor.type) or torch.finfo(getattr(torch, FLOATS[tensor.type])).max
    low, high = (float(bound) for bound in values.aminmax())
    if not (low >= -limit and high <= limit):  # written so that NaN fails, too
        where = f"{tensor.source.name} does not fit {tensor.type}: values from {low:g} to {high:g}"
        raise MergeFailed(f"{where}, the limit is {limit:g}. Choose bf16 or f32, or look for NaN in the adapter.")
