"""The header of a safetensors file from a stranger, checked before anything is parsed and without loading a tensor.

Format: 8 bytes little-endian header length N, N bytes of JSON (name -> dtype, shape, data_offsets), then the data.
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from adapters.errors import Problem
from adapters.strict_json import JsonInvalid, parse_json

ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
MAX_TENSORS = 3_000  # both halves of every projection of a 72B model are 1,120; with DoRA and biases 2,240
MAX_HEADER_BYTES = 2 << 20
MAX_VALUES = 1 << 15  # ten for a tensor, metadata included
FORMAT_MAX_HEADER_BYTES = 100_000_000
MAX_NAME_CHARACTERS = 512
MAX_PROBLEMS = 50
SCAN_BYTES = 1 << 20

FOREIGN_FORMATS = (
    (b"PK\x03\x04", "a PyTorch or NumPy zip archive (.bin, .pt, .npz)"),
    (b"\x80\x02", "a Python pickle"),
    (b"\x80\x03", "a Python pickle"),
    (b"\x80\x04", "a Python pickle"),
    (b"\x80\x05", "a Python pickle"),
    (b"GGUF", "a GGUF file"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\x89HDF", "an HDF5 file"),
)
LFS_POINTER = b"version https://git-lfs"
CONVERT_ADVICE = (
    "Load it where you trust it and save it again with model.save_pretrained(folder, safe_serialization=True); "
    "only safetensors files are read here."
)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as the header describes it; its bytes lie in the file at `offset`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int  # absolute, in bytes
    size_bytes: int


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """The tensors of a file in the order of their data, every problem found, and the metadata (never trusted)."""

    tensors: tuple[TensorInfo, ...] = ()
    metadata: Mapping[str, Any] | None = None
    problems: tuple[Problem, ...] = ()


class _Refused(Exception):
    def __init__(self, code: str, message: str, advice: str = "") -> None:
        super().__init__(message)
        self.code, self.message, self.advice = code, message, advice


def read_header(path: Path) -> SafetensorsHeader:
    """The checked header of `path`. Problems are returned, all at once where the structure allows, never raised."""
    try:
        with path.open("rb", buffering=0) as file:
            details = os.fstat(file.fileno())
            if not stat.S_ISREG(details.st_mode):
                raise _Refused("safetensors_invalid", "is not a regular file")
            raw = _header_bytes(file, details.st_size)
        value = parse_json(raw, max_values=MAX_VALUES)
    except _Refused as refusal:
        return _only_problem(path, refusal.code, refusal.message, refusal.advice)
    except JsonInvalid as error:
        code = error.code if error.code == "duplicate_key" else "safetensors_invalid"
        return _only_problem(path, code, f"the header {error}")
    except OSError as error:
        return _only_problem(path, "safetensors_invalid", f"cannot be read: {error.strerror}")
    if not isinstance(value, dict):
        return _only_problem(path, "safetensors_invalid", "the header is not a JSON object")
    metadata = value.pop("__metadata__", None)
    if metadata is not None and not _is_string_map(metadata):
        return _only_problem(path, "safetensors_invalid", "__metadata__ is not an object of strings")
    return _check_tensors(path, value, metadata, data_start=8 + len(raw), file_bytes=details.st_size)


def _only_problem(path: Path, code: str, message: str, advice: str = "") -> SafetensorsHeader:
    return SafetensorsHeader(problems=(Problem(code, path.name, message, advice),))


def _header_bytes(file: BinaryIO, file_bytes: int) -> bytes:
    """The JSON part, read only when its length is plausible and it cannot hold more than MAX_TENSORS objects."""
    start = file.read(len(LFS_POINTER))
    length = int.from_bytes(start[:8], "little")
    is_framed = 2 <= length <= file_bytes - 8 and start[8:9] == b"{"  # a header may well be 0x380 bytes long
    for magic, what in () if is_framed else FOREIGN_FORMATS:
        if start.startswith(magic):
            raise _Refused("format_not_allowed", f"is {what}, not safetensors", CONVERT_ADVICE)
    if start == LFS_POINTER:
        raise _Refused("git_lfs_pointer", "is a Git LFS pointer, not the file itself", "Run `git lfs pull` and retry.")
    if file_bytes < 8:
        raise _Refused("safetensors_invalid", f"has {file_bytes} bytes; a safetensors file has at least 8")
    if not 2 <= length <= min(file_bytes - 8, FORMAT_MAX_HEADER_BYTES):
        raise _Refused(
            "safetensors_invalid",
            f"claims a header of {length} bytes in a file of {file_bytes}; the format allows 2 to 100,000,000 bytes",
        )
    file.seek(8)
    chunks, objects, left = [], 0, min(length, MAX_HEADER_BYTES)
    while left:
        chunk = file.read(min(left, SCAN_BYTES))
        if not chunk:
            raise _Refused("safetensors_invalid", "ended while its header was read")
        left -= len(chunk)
        objects += chunk.count(b"{")
        if objects > MAX_TENSORS + 2:
            raise _Refused("too_many_tensors", f"describes more than {MAX_TENSORS:,} tensors")
        chunks.append(chunk)
    if length > MAX_HEADER_BYTES:
        raise _Refused(
            "safetensors_invalid", f"has a header of {length:,} bytes; at most {MAX_HEADER_BYTES:,} are read"
        )
    return b"".join(chunks)


def _is_string_map(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(item, str) for item in value.values())


def _check_tensors(
    path: Path, entries: dict[str, Any], metadata: Any, *, data_start: int, file_bytes: int
) -> SafetensorsHeader:
    tensors: list[TensorInfo] = []
    problems: list[Problem] = []
    for name, entry in entries.items():
        try:
            tensors.append(_tensor(name, entry, data_start))
        except _Refused as refusal:
            problems.append(Problem(refusal.code, name[:MAX_NAME_CHARACTERS], refusal.message, refusal.advice))
    if not entries:
        problems.append(Problem("tensor_set_invalid", path.name, "holds no tensor"))
    if not problems:
        problems += _check_layout(path, tensors, data_start, file_bytes)
    tensors.sort(key=lambda tensor: tensor.offset)
    return SafetensorsHeader(tuple(tensors), metadata, cap_problems(problems))


def cap_problems(problems: list[Problem]) -> tuple[Problem, ...]:
    """The first MAX_PROBLEMS, and one that counts the rest."""
    if len(problems) <= MAX_PROBLEMS:
        return tuple(problems)
    rest = Problem(problems[MAX_PROBLEMS].code, "...", f"and {len(problems) - MAX_PROBLEMS:,} more problems")
    return (*problems[:MAX_PROBLEMS], rest)


def _tensor(name: str, entry: Any, data_start: int) -> TensorInfo:
    if len(name) > MAX_NAME_CHARACTERS:
        raise _Refused("safetensors_invalid", f"has a name of {len(name)} characters; at most {MAX_NAME_CHARACTERS}")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _Refused("safetensors_invalid", "is not described by exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise _Refused(
            "dtype_not_allowed",
            f"has dtype {str(dtype)[:40]}; allowed are {', '.join(ITEM_BYTES)}",
            "Save the adapter in float32, float16 or bfloat16.",
        )
    _check_shape(shape)
    if not (_is_naturals(offsets) and len(offsets) == 2):
        raise _Refused("safetensors_invalid", "data_offsets is not a pair of non-negative integers")
    begin, end = offsets
    size = math.prod(shape) * ITEM_BYTES[dtype]
    if end - begin != size:
        raise _Refused("safetensors_invalid", f"has {end - begin} bytes of data where shape and dtype need {size}")
    return TensorInfo(name, dtype, tuple(shape), data_start + begin, size)


def _check_shape(shape: Any) -> None:
    if not _is_naturals(shape):
        raise _Refused("shape_invalid", f"shape {str(shape)[:80]} is not a list of non-negative integers")
    if not 1 <= len(shape) <= 2:
        raise _Refused("shape_invalid", f"has {len(shape)} dimensions; tensors of an adapter have 1 or 2")
    if 0 in shape:
        raise _Refused(
            "shape_invalid",
            f"is empty: its shape is {shape}; DeepSpeed ZeRO-3 leaves such placeholders when weights were not gathered",
            "Gather first (zero_to_fp32.py, or stage3_gather_16bit_weights_on_model_save) and save again.",
        )
    if max(shape) >= 1 << 40:
        raise _Refused("shape_invalid", f"shape {shape} is larger than any layer")


def _is_naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_layout(path: Path, tensors: list[TensorInfo], data_start: int, file_bytes: int) -> list[Problem]:
    """Data must be one run without gaps or overlaps that ends with the file."""
    expected = data_start
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.size_bytes)):
        if tensor.offset != expected:
            kind = "overlaps its neighbour" if tensor.offset < expected else "leaves a gap before it"
            return [
                Problem("safetensors_invalid", tensor.name, f"its data {kind} (offset {tensor.offset - data_start})")
            ]
        expected += tensor.size_bytes
    if expected != file_bytes:
        message = f"has {file_bytes:,} bytes where its header needs {expected:,}: cut short or padded"
        return [Problem("safetensors_invalid", path.name, message)]
    return []
