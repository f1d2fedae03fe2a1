"""The compiled LoRA kernel as Python calls it: slots packed in its layout, a batch's groups, one call for each layer.

What it computes and how the weights lie is said at the top of lora_kernel.c; the structures here are that file's.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_float, c_int32, c_long, c_void_p, cast
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from server.vllm_plugin.grouped import is_hollow, matrix, used_rank

ABI = 1
TILE, STEP = 32, 8  # columns of a tile; the last one of A, and of a B, is as wide as a multiple of STEP
LINE = 64  # bytes of a cache line, at which each matrix begins
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ERRORS = {
    -1: "the batch has more rows than the layer's input",
    -2: "there is no memory for the sums between A and B",
    -3: "the batch names a slot that the layer does not have",
}


class _Part(Structure):
    _fields_ = (
        ("b", c_void_p),
        *((name, c_int32) for name in ("b_dtype", "rank", "s_first", "first", "size", "reserved")),
    )


class _Slot(Structure):
    _fields_ = (
        ("a", c_void_p),
        *((name, c_int32) for name in ("a_dtype", "columns", "num_parts", "reserved")),
        ("parts", POINTER(_Part)),
    )


class _Layer(Structure):
    _fields_ = (("in", c_int32), ("num_slots", c_int32), ("slots", POINTER(_Slot)))


class _Batch(Structure):
    _fields_ = (
        ("num_groups", c_int32),
        ("num_rows", c_int32),
        *((name, c_void_p) for name in ("slots", "starts", "rows")),
    )


class KernelError(RuntimeError):
    """The kernel refused a call: a bug of ours, never a request's fault."""


class Kernel:
    """The library at `path`, on the threads of this process's OpenMP runtime; OSError for what cannot be loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path
        library = ctypes.CDLL(str(path))
        if library.hotshoe_lora_abi() != ABI:
            raise OSError(f"{path} is a kernel of version {library.hotshoe_lora_abi()}, not {ABI}.")
        self.apply = library.hotshoe_lora_apply
        self.apply.argtypes = (
            *(c_void_p, c_void_p, c_void_p, c_void_p),
            *(c_long, c_long, c_long, ctypes.c_int, ctypes.c_int, c_float),
        )
        self.is_threaded = _share_threads(library)


def _share_threads(library: ctypes.CDLL) -> bool:
    """Give the library torch's own OpenMP runtime; False where torch has another one, and the kernel one thread."""
    torch_library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    try:
        names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
        functions = [cast(getattr(torch_library, name), c_void_p) for name in names]
    except AttributeError:
        return False
    library.hotshoe_lora_threads(*functions)
    return True


class KernelBatch:
    """The rows of one batch by slot. `slots` is (num_rows,), -1 for a row of the base, which is in no group."""

    def __init__(self, slots: np.ndarray) -> None:
        order = np.argsort(slots, kind="stable")
        ordered = slots[order]
        first = int(np.searchsorted(ordered, 0))
        present, starts = np.unique(ordered[first:], return_index=True)
        self._arrays = (
            present.astype(np.int32),
            np.append(starts, len(ordered) - first).astype(np.int32),
            order[first:].astype(np.int32),
        )
        self.is_empty = not len(present)
        self._struct = _Batch(len(present), len(slots), *(array.ctypes.data for array in self._arrays))
        self.address = ctypes.addressof(self._struct)


Place = tuple[int, int, int, int, int, int]  # of one B: byte in the image, dtype, rank, first of x @ a, of y, columns


@dataclass(frozen=True, slots=True)
class SlotImage:
    """One slot of one layer as bytes in the kernel's layout, A first and then every B, with no address in it."""

    stream: torch.Tensor  # (bytes,), uint8; each matrix begins at a multiple of LINE
    a_dtype: int
    columns: int  # of x @ a, with the last tile's padding
    parts: tuple[Place, ...]


def lay_out(a: torch.Tensor, parts: Sequence[tuple[int, int, int, int, torch.Tensor]]) -> SlotImage:
    """Each matrix in its narrowest dtype.

    `a` is (in_features, sum of ranks); a part is (first column of y, columns, first of x @ a, rank, b).
    """
    tiles = [tiled(narrowest(matrix)) for matrix in (a, *(part[4] for part in parts))]
    places = np.cumsum([0, *(-(-tile.nbytes // LINE) * LINE for tile in tiles)]).tolist()
    stream = torch.zeros(places[-1], dtype=torch.uint8)
    for tile, place in zip(tiles, places[:-1], strict=True):
        stream[place : place + tile.nbytes] = tile.view(torch.uint8)
    found = (
        (place, DTYPES[tile.dtype], rank, shrunk, first, size)
        for (first, size, shrunk, rank, _), tile, place in zip(parts, tiles[1:], places[1:-1], strict=True)
    )
    return SlotImage(stream, DTYPES[tiles[0].dtype], -(-a.shape[1] // STEP) * STEP, tuple(found))


class KernelSlot:
    """An image in memory at `start`, as the kernel is told of it. `owner` keeps that memory for as long as this is."""

    def __init__(self, owner: object, start: int, a_dtype: int, columns: int, parts: Sequence[Sequence[int]]) -> None:
        self._owner = owner
        self._parts = (_Part * len(parts))(
            *(
                _Part(start + place, dtype, rank, shrunk, first, size, 0)
                for place, dtype, rank, shrunk, first, size in parts
            )
        )
        self.struct = _Slot(start, a_dtype, columns, len(parts), 0, self._parts)


class KernelLayer:
    """The slots of one layer. `stale` are those whose stacked weights were set since they were packed last; weights
    without memory (cpu_lora.py) are never packed from: all that comes into their slots is put."""

    def __init__(
        self, lora_a: tuple[torch.Tensor, ...], lora_b: tuple[torch.Tensor, ...], output_slices: tuple[int, ...]
    ) -> None:
        """lora_a[i] is (slots, 1, max_rank, in_features), lora_b[i] (slots, 1, output_slices[i], max_rank)."""
        self._weights, self._output_slices = (lora_a, lora_b), output_slices
        count = lora_a[0].shape[0]
        self.stale = set() if is_hollow(lora_a[0]) else set(range(count))
        self._held: dict[int, KernelSlot] = {}
        self._packed_bytes: dict[int, int] = {}  # of the slots that were packed here
        self._slots = (_Slot * count)()
        self._struct = _Layer(lora_a[0].shape[-1], count, self._slots)
        self.address = ctypes.addressof(self._struct)

    @property
    def nbytes(self) -> int:
        """Of the copies that were made here; a KernelSlot that was put is another's memory."""
        return sum(self._packed_bytes.values())

    def put(self, slot: int, content: KernelSlot | SlotImage | None) -> None:
        """Have `slot` be this from the next call on, whatever the stacked weights are; None: no slice is adapted."""
        self.stale.discard(slot)
        self._packed_bytes.pop(slot, None)
        if isinstance(content, SlotImage):
            self._packed_bytes[slot] = content.stream.nbytes
            content = _own(content)
        self._slots[slot] = content.struct if content is not None else _Slot()
        if content is not None:
            self._held[slot] = content
        else:
            self._held.pop(slot, None)

    def refresh(self) -> None:
        """Pack again what is stale."""
        for slot in tuple(self.stale):
            self.put(slot, pack_slot(*self._weights, slot, self._output_slices))


def _own(image: SlotImage) -> KernelSlot:
    return KernelSlot(image.stream, image.stream.data_ptr(), image.a_dtype, image.columns, image.parts)


def pack_slot(
    lora_a: tuple[torch.Tensor, ...], lora_b: tuple[torch.Tensor, ...], slot: int, output_slices: tuple[int, ...]
) -> SlotImage | None:
    """Copy what slot `slot` of a layer holds, without the unused rank; None when no slice of it is adapted."""
    pairs = [(matrix(a, slot), matrix(b, slot)) for a, b in zip(lora_a, lora_b, strict=True)]
    return pack_matrices(pairs, output_slices)


def pack_matrices(
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor] | None], output_slices: tuple[int, ...]
) -> SlotImage | None:
    """One adapter's update of one layer, slice by slice: A (rank, in_features) and B (columns, rank), None for none.

    Rows of A that are zero to the end are left out with their columns of B. None when no slice is adapted.
    """
    pieces, parts, shrunk, offset = [], [], 0, 0
    for pair, size in zip(pairs, output_slices, strict=True):
        rank = used_rank(pair[0]) if pair is not None else 0
        if pair is not None and rank:
            a, b = pair
            pieces.append(a[:rank])
            parts.append((offset, size, shrunk, rank, b[:size, :rank].t()))
        shrunk += rank
        offset += size
    return lay_out(torch.cat(pieces).t(), parts) if pieces else None


def narrowest(values: torch.Tensor) -> torch.Tensor:
    """The same numbers in 16 bits where they all fit exactly, as those of a 16-bit adapter do; else as they are."""
    if values.dtype == torch.float32:
        for dtype in (torch.bfloat16, torch.float16):
            short = values.to(dtype)
            if torch.equal(short.float(), values):
                return short
    return values


def tiled(values: torch.Tensor) -> torch.Tensor:
    """(k, columns) as [columns / TILE][k][TILE], flat; zeros widen the last tile to the next multiple of STEP."""
    k, columns = values.shape
    whole = columns // TILE * TILE
    tiles = values[:, :whole].reshape(k, -1, TILE).transpose(0, 1).reshape(-1)
    if whole == columns:
        return tiles.contiguous()
    last = torch.zeros(k, -(-(columns - whole) // STEP) * STEP, dtype=values.dtype)
    last[:, : columns - whole] = values[:, whole:]
    return torch.cat((tiles, last.reshape(-1)))


def apply(
    kernel: Kernel, layer: KernelLayer, batch: KernelBatch, y: torch.Tensor, x: torch.Tensor, threads: int, scale: float
) -> None:
    """y[rows of slot s] += scale * (x @ A_s) @ B_s, in place; y (num_rows, out_features), x (num_rows, in_features)."""
    if layer.stale:
        layer.refresh()
    (y_step, y_next), (x_step, x_next) = y.stride(), x.stride()
    if y_next != 1 or x_next != 1 or y.dtype != x.dtype:
        raise KernelError(f"x and y must be rows of one dtype: {x.dtype} {x.stride()}, {y.dtype} {y.stride()}.")
    status = kernel.apply(
        layer.address,
        batch.address,
        y.data_ptr(),
        x.data_ptr(),
        y_step,
        x_step,
        x.shape[0],
        DTYPES[x.dtype],
        threads,
        scale,
    )
    if status:
        raise KernelError(f"LoRA kernel: {ERRORS[status]}.")
