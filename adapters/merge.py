"""base + adapter -> merged checkpoint, streamed: one block of rows at a time.

    merged = round(W + scaling * (B @ A))        W (out, in), A (rank, in), B (out, rank), all in float32, one rounding

W is the base's, or what NF4 leaves of it (adapters/nf4.py). Memory is BLOCK_BOUND_BYTES of blocks plus the A and B of
the few modules in work, whatever the size of the model or of its largest tensor. A block is always the same rows,
computed by one thread: the bytes depend neither on the number of workers nor on their order.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.bases import WEIGHT_INDEX
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
from adapters.durable import write_file
from adapters.errors import BaseInvalid, MergeFailed
from adapters.flushing import Flusher
from adapters.merge_plan import (
    BLOCK_BOUND_BYTES,
    BLOCK_ELEMENTS,
    MergePlan,
    PlannedFile,
    PlannedTensor,
    plan_merge,
)

if TYPE_CHECKING:
    import torch

    from adapters.nf4 import Nf4Scales

    Tensor = torch.Tensor

__all__ = ["BLOCK_BOUND_BYTES", "MergePlan", "Progress", "merge", "plan_merge"]


def merge(plan: MergePlan, out: Path, *, workers: int | None = None, progress: Progress | None = None) -> None:
    """Write the merged weight files (and their index) into the existing folder `out`, each fsynced.

    A file has its name once it is whole; one that is there already, from an earlier run of the same plan, stays. The
    disk works while the next blocks are computed. Raises MergeFailed where a result is not finite in the output dtype,
    and OSError as the disk does. What was written stays on an error: the caller owns `out`.
    """
    if plan.is_shape_only:
        raise BaseInvalid(f"{plan.base.folder} holds no weights: it can be planned, not merged.")
    tell = progress or (lambda _: None)
    with worker_pool(workers) as pool, Flusher() as flusher:
        for file in plan.files:
            if is_whole(file, out / file.name):
                tell(file.size_bytes - len(file.header))
                continue
            output = flusher.begin(out / file.name)
            os.posix_fallocate(output.handle, 0, file.size_bytes)
            write_all(output.handle, memoryview(file.header), 0)
            with ExitStack() as stack:
                pool.run(_tasks(file, output.handle, stack), output, tell)
            output.finish()
    tell(sum(len(file.header) for file in plan.files))  # all of it is on the disk
    if plan.index is not None:
        write_file(out / WEIGHT_INDEX, (json.dumps(plan.index, indent=2) + "\n").encode())


def is_whole(file: PlannedFile, path: Path) -> bool:
    """An earlier run of the same plan finished this file; its contents are for the read-back to judge."""
    if not path.is_file() or path.stat().st_size != file.size_bytes:
        return False
    with path.open("rb") as written:
        return written.read(len(file.header)) == file.header


def _tasks(file: PlannedFile, target: int, stack: ExitStack) -> Iterator[Task]:
    sources = open_sources((tensor.source.path for tensor in file.tensors), stack)
    local = threading.local()
    for tensor in file.tensors:
        source = sources[tensor.source.path]
        if tensor.is_copy:
            yield from copies(source, tensor.source.begin, target, tensor.begin, tensor.size_bytes)
            continue
        factors = read_factors(tensor.update)
        scales = read_scales(tensor.source, source) if tensor.through_nf4 else None
        for first, end in tensor.row_blocks():
            block = _Block(tensor, factors, scales, first, end, source, target)
            yield Task(partial(_run, block, local), block.elements * ITEM_BYTES[tensor.dtype])


@dataclass(frozen=True, slots=True)
class _Block:
    """Rows first..end of one tensor, from one open file into another.

    `factors` are A and B in float32, `scales` those of its NF4 form where it goes through that.
    """

    tensor: PlannedTensor
    factors: tuple[Tensor, Tensor] | None
    scales: Nf4Scales | None
    first: int
    end: int
    source: int
    target: int

    @property
    def elements(self) -> int:
        return (self.end - self.first) * self.tensor.matrix_shape[1]


class _Workspace:
    """The buffers of one worker, made once: as read, the result in float32 (and its bytes), B @ A, as written."""

    def __init__(self) -> None:
        import torch

        self.raw = bytearray(BLOCK_ELEMENTS * 4)
        self.weight = torch.empty(BLOCK_ELEMENTS)
        self.product = torch.empty(BLOCK_ELEMENTS)
        shared: Any = self.weight.numpy()
        self.weight_bytes = memoryview(shared).cast("B")
        self.written = bytearray(BLOCK_ELEMENTS * 4)


def _run(block: _Block, local: threading.local) -> None:
    if not hasattr(local, "workspace"):
        local.workspace = _Workspace()
    _merge_block(block, local.workspace)


def _merge_block(block: _Block, space: _Workspace) -> None:
    import torch

    tensor, count = block.tensor, block.elements
    columns = tensor.matrix_shape[1]
    item = ITEM_BYTES[tensor.source.dtype]
    result, is_wide = space.weight[:count], tensor.source.dtype == "F32"  # float32 is read and written in place
    raw = (space.weight_bytes if is_wide else memoryview(space.raw))[: count * item]
    read_all(block.source, raw, tensor.source.begin + block.first * columns * item)
    if not is_wide:
        result.copy_(torch.frombuffer(raw, dtype=_torch_dtype(tensor.source.dtype)))
    if block.scales is not None:
        result.copy_(block.scales.through(result, block.first * columns))
    if tensor.update is not None and block.factors is not None:
        matrix, product = (values.view(-1, columns) for values in (result, space.product[:count]))
        add_update(matrix, block.factors, block.first, tensor.update.scaling, product)
    if tensor.dtype == "F32":
        written, rounded = space.weight_bytes[: count * 4], result
    else:
        written = memoryview(space.written)[: count * ITEM_BYTES[tensor.dtype]]
        rounded = torch.frombuffer(written, dtype=_torch_dtype(tensor.dtype)).copy_(result)
    if not bool(torch.isfinite(torch.stack(rounded.aminmax())).all()):
        raise _not_finite(result, tensor)
    write_all(block.target, written, tensor.begin + block.first * columns * ITEM_BYTES[tensor.dtype])


def _torch_dtype(code: str) -> torch.dtype:
    import torch

    dtype: torch.dtype = getattr(torch, FLOATS[code])
    return dtype


def _not_finite(values: Tensor, tensor: PlannedTensor) -> MergeFailed:
    import torch

    low, high = (float(bound) for bound in values.aminmax())
    limit = torch.finfo(_torch_dtype(tensor.dtype)).max
    where = f"{tensor.source.name} is not finite in {FLOATS[tensor.dtype]}: values from {low:g} to {high:g}"
    return MergeFailed(f"{where}, the limit is {limit:g}. Choose a wider --dtype, or look for NaN in the adapter.")
