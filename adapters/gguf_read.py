"""Reads a GGUF file: its header whole, its tensors a few rows at a time as float64.

It shares nothing with what writes ours, so that reading back says something: offsets and types come from the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from adapters.errors import BaseInvalid
from adapters.gguf_k import K_LIMITS, decode_k

Floats = npt.NDArray[np.float64]
# gguf_metadata_value_type -> little-endian numpy type; 8 is a string, 9 an array.
_SCALARS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
_TEXT, _ARRAY = 8, 9
# ggml_type -> its name, elements of a block, bytes of a block.
_TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    30: ("BF16", 1, 2),
}
_SIZES = {name: (elements, size) for name, elements, size in _TYPES.values()}
MAX_HEADER_ITEMS = 10_000_000


@dataclass(frozen=True, slots=True)
class ReadTensor:
    """One tensor of a file; `shape` is (rows, columns) or (elements,), `begin` counts from the start of the file."""

    name: str
    type: str
    shape: tuple[int, ...]
    begin: int
    size_bytes: int


@dataclass(frozen=True)
class GgufFile:
    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, ReadTensor]


def read_gguf(path: Path) -> GgufFile:
    """The header of a file. Raises BaseInvalid unless it can be read and its tensors lie inside the file."""
    with path.open("rb") as file:
        try:
            magic, version = file.read(4), _number(file, "<u4")
            if magic != b"GGUF" or version != 3:
                raise ValueError(f"it begins with {magic!r} and version {version}")
            count, keys = _number(file, "<u8"), _number(file, "<u8")
            metadata = {_text(file): _value(file, _number(file, "<u4")) for _ in range(keys)}
            entries = [_entry(file) for _ in range(count)]
            alignment = int(metadata.get("general.alignment", 32))
            start = -(-file.tell() // alignment) * alignment
            tensors = {name: _placed(name, shape, kind, start + offset) for name, shape, kind, offset in entries}
        except (ValueError, KeyError) as error:
            raise BaseInvalid(f"{path} cannot be read as GGUF: {error}.") from error
    size = path.stat().st_size
    outside = sorted(tensor.name for tensor in tensors.values() if tensor.begin + tensor.size_bytes > size)
    if outside or len(tensors) != count:
        raise BaseInvalid(f"{path} has {size:,} bytes and tensors beyond them or named twice: {outside[:5]}.")
    return GgufFile(path, metadata, tensors)


def _exactly(file: BinaryIO, size: int) -> bytes:
    raw = file.read(size)
    if len(raw) != size:
        raise ValueError("its header ends early")
    return raw


def _number(file: BinaryIO, kind: str) -> int:
    return int(np.frombuffer(_exactly(file, np.dtype(kind).itemsize), kind)[0])


def _text(file: BinaryIO) -> str:
    return _exactly(file, _number(file, "<u8")).decode()


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _TEXT:
        return _text(file)
    if kind != _ARRAY:
        return np.frombuffer(_exactly(file, np.dtype(_SCALARS[kind]).itemsize), _SCALARS[kind])[0].item()
    inner, count = _number(file, "<u4"), _number(file, "<u8")
    if count > MAX_HEADER_ITEMS:
        raise ValueError(f"an array of {count:,} items")
    if inner == _TEXT:
        return [_exactly(file, int.from_bytes(_exactly(file, 8), "little")).decode() for _ in range(count)]
    return np.frombuffer(_exactly(file, count * np.dtype(_SCALARS[inner]).itemsize), _SCALARS[inner]).tolist()


def _entry(file: BinaryIO) -> tuple[str, tuple[int, ...], int, int]:
    name, dimensions = _text(file), _number(file, "<u4")
    shape = tuple(_number(file, "<u8") for _ in range(dimensions))
    return name, shape[::-1], _number(file, "<u4"), _number(file, "<u8")


def _placed(name: str, shape: tuple[int, ...], kind: int, begin: int) -> ReadTensor:
    label, elements, size = _TYPES[kind]
    total = int(np.prod(shape, dtype=np.int64))
    if shape[-1] % elements:
        raise ValueError(f"{name} has rows of {shape[-1]} elements in blocks of {elements}")
    return ReadTensor(name, label, shape, begin, total // elements * size)


def read_blocks(path: Path, tensor: ReadTensor, first: int, end: int) -> npt.NDArray[np.uint8]:
    """The bytes of elements first..end of a tensor, in whole blocks: (blocks, bytes of one)."""
    elements, size = _SIZES[tensor.type]
    with path.open("rb") as file:
        file.seek(tensor.begin + first // elements * size)
        return np.frombuffer(_exactly(file, (end - first) // elements * size), np.uint8).reshape(-1, size)


def read_elements(path: Path, tensor: ReadTensor, first: int, end: int) -> Floats:
    """Elements first..end of a tensor, flat and as float64; a quantised one is read in whole blocks."""
    blocks = read_blocks(path, tensor, first, end)
    raw = blocks.reshape(-1)
    if tensor.type == "F32":
        return raw.view("<f4").astype(np.float64)
    if tensor.type == "F16":
        return raw.view("<f2").astype(np.float64)
    if tensor.type == "BF16":
        return (raw.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
    return (
        decode_k(blocks, tensor.type).values.reshape(-1)
        if tensor.type in K_LIMITS
        else _dequantised(blocks, tensor.type)
    )


def _dequantised(blocks: npt.NDArray[np.uint8], kind: str) -> Floats:
    """(blocks, bytes) -> (32 * blocks,). Layouts: ggml's block_q8_0, block_q4_0, block_q4_1, block_q5_0, block_q5_1."""
    step = blocks[:, :2].copy().view("<f2").astype(np.float64)
    if kind == "Q8_0":
        values: Floats = step * blocks[:, 2:].copy().view(np.int8)
        return values.reshape(-1)
    low, packed = 2, blocks[:, -16:]
    numbers = np.concatenate([packed & 15, packed >> 4], axis=1).astype(np.float64)
    if kind.endswith("_1"):
        base, low = blocks[:, 2:4].copy().view("<f2").astype(np.float64), 4
    if kind.startswith("Q5"):
        fifth = blocks[:, low : low + 4].copy().view("<u4")
        numbers += 16.0 * ((fifth >> np.arange(32, dtype=np.uint32)) & np.uint32(1))
    values = step * numbers + base if kind.endswith("_1") else step * (numbers - (16 if kind == "Q5_0" else 8))
    return values.reshape(-1)
