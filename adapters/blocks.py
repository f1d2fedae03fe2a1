"""Files made from files in bounded blocks: a few tasks in flight, bytes copied by the kernel, one thread to a block."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from adapters.checkpoint import FLOATS, StoredTensor
from adapters.errors import BaseInvalid
from adapters.flushing import Output
from adapters.merge_plan import MAX_WORKERS, Update

if TYPE_CHECKING:
    import torch

    from adapters.nf4 import Nf4Scales

    Tensor = torch.Tensor

COPY_BYTES = 16 << 20  # unchanged bytes copied by the kernel in one go
Progress = Callable[[int], None]  # bytes of weights done since the last call


@dataclass(frozen=True, slots=True)
class Task:
    """One step of the stream: `run` in a worker; `size_bytes` of output are done after it."""

    run: Callable[[], None]
    size_bytes: int


@dataclass
class Workers:
    """Threads that run tasks, a few more than there are threads at a time."""

    pool: ThreadPoolExecutor
    count: int
    _running: dict[Future[None], int] = field(default_factory=dict)

    def run(self, tasks: Iterator[Task], output: Output, tell: Progress) -> None:
        """Run a file's tasks, telling the bytes of each that finished; none runs any more when this ends or raises."""
        try:
            for task in tasks:
                if len(self._running) > self.count:
                    self._collect(wait(self._running, return_when=FIRST_COMPLETED).done, output, tell)
                self._running[self.pool.submit(task.run)] = task.size_bytes
            self._collect(wait(self._running).done, output, tell)
        finally:
            wait(self._running)
            self._running.clear()

    def _collect(self, finished: set[Future[None]], output: Output, tell: Progress) -> None:
        for future in finished:
            size = self._running.pop(future)
            future.result()
            output.wrote(size)
            tell(size)


@contextmanager
def worker_pool(wanted: int | None) -> Iterator[Workers]:
    """As many as the machine has cores unless `wanted`; one thread computes a block, so no bit depends on how many."""
    import torch

    count = max(1, min(wanted or os.cpu_count() or 1, MAX_WORKERS))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        with ThreadPoolExecutor(count, initializer=partial(torch.set_num_threads, 1)) as pool:
            yield Workers(pool, count)
    finally:
        torch.set_num_threads(before)


def open_sources(paths: Iterator[Path], stack: ExitStack) -> dict[Path, int]:
    """A descriptor for each file, closed with the stack."""
    opened = {}
    for path in dict.fromkeys(paths):
        opened[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, opened[path])
    return opened


def copies(source: int, begin: int, target: int, to: int, size: int) -> Iterator[Task]:
    """Tasks that copy bytes from one open file to another."""
    for start in range(0, size, COPY_BYTES):
        part = min(COPY_BYTES, size - start)
        yield Task(partial(copy_range, source, begin + start, target, to + start, part), part)


def copy_range(source: int, source_offset: int, target: int, target_offset: int, size: int) -> None:
    """Copy bytes between files inside the kernel where it can, through a buffer where it cannot."""
    while size:
        try:
            copied = os.copy_file_range(source, target, size, source_offset, target_offset)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            chunk = os.pread(source, min(size, 1 << 20), source_offset)
            write_all(target, memoryview(chunk), target_offset)
            copied = len(chunk)
        if copied == 0:
            raise _ended_early()
        source_offset, target_offset, size = source_offset + copied, target_offset + copied, size - copied


def write_all(target: int, view: memoryview, offset: int) -> None:
    """Write the bytes at `offset` of an open file."""
    while view:
        written = os.pwrite(target, view, offset)
        view, offset = view[written:], offset + written


def read_all(source: int, view: memoryview, offset: int) -> None:
    """Fill the view from `offset` of an open file; raises BaseInvalid where it ends before."""
    while view:
        read = os.preadv(source, [view], offset)
        if read == 0:
            raise _ended_early()
        view, offset = view[read:], offset + read


def read_factors(update: Update | None) -> tuple[Tensor, Tensor] | None:
    """A (rank, in) and B (out, rank) in float32 as they are: scaling is applied to the product, as PEFT does."""
    return (_read_matrix(update.a), _read_matrix(update.b)) if update else None


def add_update(weight: Tensor, factors: tuple[Tensor, Tensor], first: int, scaling: float, product: Tensor) -> None:
    """weight (rows, in) += scaling * B[first : first + rows] @ A, in float32; `product` (rows, in) is written over.

    Some kernels of `addmm` sum into the weight term by term, each time rounded in the weight's place, which loses up to
    a unit for each rank: so the product is summed by itself.
    """
    import torch

    a, b = factors
    torch.mm(b[first : first + len(weight)], a, out=product)
    weight.add_(product, alpha=scaling)


def read_scales(stored: StoredTensor, source: int) -> Nf4Scales:
    """The scales of a matrix's NF4 form; only who wants them imports what quantises."""
    from adapters.nf4 import nf4_scales

    return nf4_scales(stored, source)


def _read_matrix(stored: StoredTensor) -> Tensor:
    import torch

    raw = bytearray(stored.size_bytes)
    with stored.path.open("rb") as file:
        read_all(file.fileno(), memoryview(raw), stored.begin)
    return torch.frombuffer(raw, dtype=getattr(torch, FLOATS[stored.dtype])).reshape(stored.shape).float()


def _ended_early() -> BaseInvalid:
    return BaseInvalid("A weight file ended early: it changed during the export.")
