"""base + adapter -> merged checkpoint, streamed: one block of rows at a time.

    merged = round(W + scaling * (B @ A))        W (out, in), A (rank, in), B (out, rank), all in float32, one rounding

Memory is BLOCK_BOUND_BYTES of blocks plus the A and B of the few modules in work, whatever the size of the model or of
its largest tensor. A block is always the same rows, computed by one thread: the bytes depend neither on the number of
workers nor on their order.
"""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adapters.bases import WEIGHT_INDEX
from adapters.checkpoint import FLOATS, ITEM_BYTES, StoredTensor
from adapters.durable import write_file
from adapters.errors import BaseInvalid, MergeFailed
from adapters.merge_plan import (
    BLOCK_BOUND_BYTES,
    BLOCK_ELEMENTS,
    MAX_WORKERS,
    MergePlan,
    PlannedFile,
    PlannedTensor,
    Update,
    plan_merge,
)

if TYPE_CHECKING:
    import torch

    Tensor = torch.Tensor

__all__ = ["BLOCK_BOUND_BYTES", "MergePlan", "Progress", "merge", "plan_merge"]
COPY_BYTES = 16 << 20  # unchanged bytes copied by the kernel in one go
Progress = Callable[[int], None]  # bytes of weights done since the last call


@dataclass(frozen=True, slots=True)
class _Task:
    """One step of the stream: `run` in a worker; `size_bytes` of output are done after it."""

    run: Callable[[], None]
    size_bytes: int


def merge(plan: MergePlan, out: Path, *, workers: int | None = None, progress: Progress | None = None) -> None:
    """Write the merged weight files (and their index) into the existing folder `out`, each fsynced.

    Raises MergeFailed where a result is not finite in the output dtype, and OSError as the disk does. What was
    written stays on an error: the caller owns `out`.
    """
    if plan.is_shape_only:
        raise BaseInvalid(f"{plan.base.folder} holds no weights: it can be planned, not merged.")
    count = max(1, min(workers or os.cpu_count() or 1, MAX_WORKERS))
    with _single_threaded_kernels() as start_worker, ThreadPoolExecutor(count, initializer=start_worker) as pool:
        for file in plan.files:
            for finished in _run_bounded(pool, count, file, out / file.name):
                if progress:
                    progress(finished)
    if plan.index is not None:
        write_file(out / WEIGHT_INDEX, (json.dumps(plan.index, indent=2) + "\n").encode())


@contextmanager
def _single_threaded_kernels() -> Iterator[Callable[[], None]]:
    """Yields what each worker calls first: one thread computes a block, so no bit depends on how many there are."""
    import torch

    before = torch.get_num_threads()
    try:
        yield lambda: torch.set_num_threads(1)
    finally:
        torch.set_num_threads(before)


def _run_bounded(pool: ThreadPoolExecutor, workers: int, file: PlannedFile, path: Path) -> Iterator[int]:
    """Run a file's tasks with few in flight, yielding the bytes of each that finished; fsyncs at the end."""
    running: dict[Future[None], int] = {}
    with ExitStack() as stack:
        target = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        stack.callback(os.close, target)
        stack.callback(lambda: wait(running))  # no worker may use the descriptors after they are closed
        os.posix_fallocate(target, 0, file.size_bytes)
        _write_all(target, memoryview(file.header), 0)
        yield len(file.header)
        for task in _tasks(file, target, stack):
            if len(running) > workers:
                finished, _ = wait(running, return_when=FIRST_COMPLETED)
                yield from _collect(finished, running)
            running[pool.submit(task.run)] = task.size_bytes
        yield from _collect(wait(running).done, running)
        os.fsync(target)


def _collect(finished: set[Future[None]], running: dict[Future[None], int]) -> Iterator[int]:
    for future in finished:
        size = running.pop(future)
        future.result()
        yield size


def _tasks(file: PlannedFile, target: int, stack: ExitStack) -> Iterator[_Task]:
    sources = {tensor.source.path: -1 for tensor in file.tensors}
    for path in sources:
        sources[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, sources[path])
    local = threading.local()
    for tensor in file.tensors:
        source = sources[tensor.source.path]
        if tensor.is_copy:
            yield from _copy_tasks(tensor, source, target)
        else:
            factors = _read_factors(tensor.update) if tensor.update else None
            for first, end in tensor.row_blocks():
                yield _block_task(_Block(tensor, factors, first, end, source, target), local)


def _copy_tasks(tensor: PlannedTensor, source: int, target: int) -> Iterator[_Task]:
    for start in range(0, tensor.size_bytes, COPY_BYTES):
        size = min(COPY_BYTES, tensor.size_bytes - start)
        arguments = (source, tensor.source.begin + start, target, tensor.begin + start, size)
        yield _Task(lambda arguments=arguments: copy_range(*arguments), size)  # type: ignore[misc]


def copy_range(source: int, source_offset: int, target: int, target_offset: int, size: int) -> None:
    """Copy bytes between files inside the kernel where it can, through a buffer where it cannot."""
    while size:
        try:
            copied = os.copy_file_range(source, target, size, source_offset, target_offset)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            chunk = os.pread(source, min(size, 1 << 20), source_offset)
            _write_all(target, memoryview(chunk), target_offset)
            copied = len(chunk)
        if copied == 0:
            raise BaseInvalid("A weight file of the base ended early: it changed during the merge.")
        source_offset, target_offset, size = source_offset + copied, target_offset + copied, size - copied


def _write_all(target: int, view: memoryview, offset: int) -> None:
    while view:
        written = os.pwrite(target, view, offset)
        view, offset = view[written:], offset + written


def _read_all(source: int, view: memoryview, offset: int) -> None:
    while view:
        read = os.preadv(source, [view], offset)
        if read == 0:
            raise BaseInvalid("A weight file of the base ended early: it changed during the merge.")
        view, offset = view[read:], offset + read


def _read_factors(update: Update) -> tuple[Tensor, Tensor]:
    """scaling is applied to the product, as PEFT does: A and B come as they are, in float32."""
    import torch

    def read(stored: StoredTensor) -> Tensor:
        raw = bytearray(stored.size_bytes)
        with stored.path.open("rb") as file:
            file.seek(stored.begin)
            if file.readinto(raw) != len(raw):
                raise MergeFailed(f"{stored.path} ended early: it changed during the merge.")
        return torch.frombuffer(raw, dtype=getattr(torch, FLOATS[stored.dtype])).reshape(stored.shape).float()

    return read(update.a), read(update.b)


@dataclass(frozen=True, slots=True)
class _Block:
    """Rows first..end of one tensor, from one open file into another. `factors` are A and B in float32."""

    tensor: PlannedTensor
    factors: tuple[Tensor, Tensor] | None
    first: int
    end: int
    source: int
    target: int

    @property
    def elements(self) -> int:
        return (self.end - self.first) * self.tensor.matrix_shape[1]


class _Workspace:
    """The buffers of one worker, made once: as read, W in float32, the update, as written."""

    def __init__(self) -> None:
        import torch

        self.raw = bytearray(BLOCK_ELEMENTS * 4)
        self.weight = torch.empty(BLOCK_ELEMENTS)
        self.update = torch.empty(BLOCK_ELEMENTS)
        self.written = bytearray(BLOCK_ELEMENTS * 4)


def _block_task(block: _Block, local: threading.local) -> _Task:
    def run() -> None:
        if not hasattr(local, "workspace"):
            local.workspace = _Workspace()
        _merge_block(block, local.workspace)

    return _Task(run, block.elements * ITEM_BYTES[block.tensor.dtype])


def _merge_block(block: _Block, space: _Workspace) -> None:
    import torch

    tensor, count = block.tensor, block.elements
    columns = tensor.matrix_shape[1]
    item = ITEM_BYTES[tensor.source.dtype]
    raw = memoryview(space.raw)[: count * item]
    _read_all(block.source, raw, tensor.source.begin + block.first * columns * item)
    result = space.weight[:count].copy_(torch.frombuffer(raw, dtype=_torch_dtype(tensor.source.dtype)))
    if tensor.update is not None and block.factors is not None:
        a, b = block.factors
        delta = space.update[:count].view(-1, columns)
        torch.mm(b[block.first : block.end], a, out=delta).mul_(tensor.update.scaling)
        result = delta.view(-1).add_(result)
    dtype = _torch_dtype(tensor.dtype)
    _check_finite(result, torch.finfo(dtype).max, tensor)
    written = memoryview(space.written)[: count * ITEM_BYTES[tensor.dtype]]
    torch.frombuffer(written, dtype=dtype).copy_(result)
    _write_all(block.target, written, tensor.begin + block.first * columns * ITEM_BYTES[tensor.dtype])


def _torch_dtype(code: str) -> torch.dtype:
    import torch

    dtype: torch.dtype = getattr(torch, FLOATS[code])
    return dtype


def _check_finite(values: Tensor, limit: float, tensor: PlannedTensor) -> None:
    low, high = (float(bound) for bound in values.aminmax())
    if not (low >= -limit and high <= limit):  # written so that NaN fails, too
        where = f"{tensor.source.name} is not finite in {FLOATS[tensor.dtype]}: values from {low:g} to {high:g}"
        raise MergeFailed(f"{where}, the limit is {limit:g}. Choose a wider --dtype, or look for NaN in the adapter.")
