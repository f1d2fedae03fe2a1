"""Writes a planned GGUF file as a stream of row blocks; the bytes depend on no number of threads.

    tensor = quantised(factor * W + scaling * (B @ A))        all in float32, rounded or quantised once at the end

Blocks are those of adapters.merge, so memory is bounded alike, whatever the size of the model or its largest matrix.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.checkpoint import FLOATS, ITEM_BYTES, StoredTensor
from adapters.errors import BaseInvalid, MergeFailed
from adapters.gguf_plan import GgufPlan, GgufTensor, size_bytes
from adapters.merge import COPY_BYTES, Progress, copy_range
from adapters.merge_plan import MAX_WORKERS

if TYPE_CHECKING:
    import torch

    Tensor = torch.Tensor
    Factors = tuple[Tensor, Tensor] | None

# The largest number that a type can hold. A quantised block keeps its largest number over so many steps in float16.
F16_MAX = 65504.0
LIMITS = {"F16": F16_MAX, "Q8_0": 127 * F16_MAX, "Q4_0": 8 * F16_MAX, "Q5_0": 16 * F16_MAX}
LIMITS |= {"Q4_1": F16_MAX, "Q5_1": F16_MAX}
# Far below what the smallest float16 step can tell from zero; without this the step's reciprocal may overflow.
NEGLIGIBLE = 2.0**-60
QUANTISED_AT_ONCE = 1 << 16  # elements, a multiple of every block: the library takes ten times their bytes meanwhile


@dataclass(frozen=True, slots=True)
class _Job:
    """Rows first..end of one tensor, from one open file into another. `factors` are A and B in float32."""

    tensor: GgufTensor
    factors: Factors
    first: int
    end: int
    source: int
    target: int


def write_gguf(plan: GgufPlan, path: Path, *, workers: int | None = None, progress: Progress | None = None) -> None:
    """Write the file, which must not exist, and fsync it. `progress` gets the bytes of each step that is done.

    Raises MergeFailed where a result is not finite in its type, and OSError as the disk does. What was written stays
    on an error: the caller owns the folder.
    """
    count = max(1, min(workers or os.cpu_count() or 1, MAX_WORKERS))
    with ExitStack() as stack:
        target = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        stack.callback(os.close, target)
        os.posix_fallocate(target, 0, plan.size_bytes)  # what lies between tensors stays zero
        _write_all(target, memoryview(plan.header), 0)
        sources = _open_sources(plan, stack)
        start_worker = stack.enter_context(_single_threaded_kernels())
        # Entered last, so that it is left first: no worker may use the descriptors after they are closed.
        pool = stack.enter_context(ThreadPoolExecutor(count, initializer=start_worker))
        for size in (len(plan.header), *_finished(pool, count, _tasks(plan, sources, target))):
            if progress:
                progress(size)
        os.fsync(target)


def _open_sources(plan: GgufPlan, stack: ExitStack) -> dict[Path, int]:
    sources = {}
    for path in dict.fromkeys(tensor.source.path for tensor in plan.tensors):
        sources[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, sources[path])
    return sources


@contextmanager
def _single_threaded_kernels() -> Iterator[Callable[[], None]]:
    """Yields what each worker calls first: one thread computes a block, so no bit depends on how many there are."""
    import torch

    before = torch.get_num_threads()
    try:
        yield lambda: torch.set_num_threads(1)
    finally:
        torch.set_num_threads(before)


def _finished(pool: ThreadPoolExecutor, workers: int, tasks: Iterator[tuple[Callable[[], None], int]]) -> Iterator[int]:
    """Run tasks with few in flight, yielding the bytes of each that finished."""
    running: dict[Future[None], int] = {}
    for run, size in tasks:
        if len(running) > workers:
            yield from _collect(wait(running, return_when=FIRST_COMPLETED).done, running)
        running[pool.submit(run)] = size
    yield from _collect(wait(running).done, running)


def _collect(finished: set[Future[None]], running: dict[Future[None], int]) -> Iterator[int]:
    for future in finished:
        size = running.pop(future)
        future.result()
        yield size


def _tasks(plan: GgufPlan, sources: Mapping[Path, int], target: int) -> Iterator[tuple[Callable[[], None], int]]:
    for tensor in plan.tensors:
        source = sources[tensor.source.path]
        if tensor.is_copy:
            yield from _copies(tensor, source, target)
            continue
        factors = (_read(tensor.update.a), _read(tensor.update.b)) if tensor.update else None
        for first, end in tensor.row_blocks():
            job = _Job(tensor, factors, first, end, source, target)
            yield partial(_write_block, job), size_bytes(tensor.type, (end - first) * tensor.matrix_shape[1])


def _copies(tensor: GgufTensor, source: int, target: int) -> Iterator[tuple[Callable[[], None], int]]:
    for start in range(0, tensor.size_bytes, COPY_BYTES):
        size = min(COPY_BYTES, tensor.size_bytes - start)
        yield partial(copy_range, source, tensor.source.begin + start, target, tensor.begin + start, size), size


def _read(stored: StoredTensor) -> Tensor:
    """One factor of an update in float32, as it is: scaling is applied to the product."""
    import torch

    raw = bytearray(stored.size_bytes)
    with stored.path.open("rb") as file:
        file.seek(stored.begin)
        if file.readinto(raw) != len(raw):
            raise MergeFailed(f"{stored.path} ended early: it changed during the export.")
    return torch.frombuffer(raw, dtype=getattr(torch, FLOATS[stored.dtype])).reshape(stored.shape).float()


def _write_block(job: _Job) -> None:
    import torch

    tensor, columns = job.tensor, job.tensor.matrix_shape[1]
    count, item = (job.end - job.first) * columns, ITEM_BYTES[tensor.source.dtype]
    raw = bytearray(count * item)
    _read_all(job.source, memoryview(raw), tensor.source.begin + job.first * columns * item)
    result = torch.frombuffer(raw, dtype=getattr(torch, FLOATS[tensor.source.dtype])).to(torch.float32)
    if tensor.factor != 1.0:
        result = result.double().mul_(tensor.factor).float()
    if tensor.update is not None and job.factors is not None:
        a, b = job.factors
        delta = torch.mm(b[job.first : job.end], a).mul_(tensor.update.scaling)
        result = delta.view(-1).add_(result)
    _check_finite(result, tensor)
    written = _encoded(result.view(-1, columns), tensor.type)
    _write_all(job.target, written, tensor.begin + size_bytes(tensor.type, job.first * columns))


def _encoded(values: Tensor, kind: str) -> memoryview:
    """(rows, columns) of float32 as the bytes of a type."""
    import torch

    if kind in FLOATS:
        rounded = values.to(getattr(torch, FLOATS[kind])).contiguous()
        raw: Any = rounded.view(torch.uint8).numpy()
        return memoryview(raw).cast("B")
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


def _write_all(target: int, view: memoryview, offset: int) -> None:
    while view:
        written = os.pwrite(target, view, offset)
        view, offset = view[written:], offset + written


def _read_all(source: int, view: memoryview, offset: int) -> None:
    while view:
        read = os.preadv(source, [view], offset)
        if read == 0:
            raise BaseInvalid("A weight file ended early: it changed during the export.")
        view, offset = view[read:], offset + read
