"""Our own two files for an adapter, written tensor by tensor from a checked source: the only files an engine ever sees.

The bytes depend on the adapter alone: keys sorted, source dtype kept, no time, no path. Canonical files are a fixpoint:
inspected, checked and written again they are the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from adapters.check import ModuleAdapter, Verdict, VerdictKind, check
from adapters.errors import AdapterRefused, Problem, StorageDamaged
from adapters.header import ITEM_BYTES, TensorInfo, cap_problems
from adapters.inspect import CONFIG_FILE, INITIAL_ADAPTER_FILE, WEIGHTS_FILE, Inspection
from adapters.lora_config import LoraSettings

__all__ = [
    "CONFIG_FILE",
    "WEIGHTS_FILE",
    "CanonicalAdapter",
    "ModuleAdapter",
    "Verdict",
    "VerdictKind",
    "canonicalise",
    "check",
    "digest_folder",
]

CHUNK_BYTES = 4 << 20
CANONICAL_FILES = (CONFIG_FILE, WEIGHTS_FILE)
LARGEST = {"float32": 3.4028235e38, "bfloat16": 3.3895314e38, "float16": 65504.0}


@dataclass(frozen=True)
class CanonicalAdapter:
    """Canonical files in `folder`, named by `digest` (sha256 over both files' names and contents)."""

    folder: Path
    digest: str
    rank: int
    size_bytes: int
    modules: Mapping[str, ModuleAdapter]


@dataclass(frozen=True, slots=True)
class _Planned:
    key: str
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[tuple[Path, TensorInfo, bool], ...]  # file, tensor in it, whether its sign is turned
    axis: int = 0  # pieces are joined along it
    is_transposed: bool = False

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def canonicalise(
    source: Path, inspection: Inspection, verdict: Verdict, out: Path, *, serving_dtype: str = "bfloat16"
) -> CanonicalAdapter:
    """Write the canonical files of a checked adapter into the empty folder `out`; memory is bounded by one chunk.

    Raises AdapterRefused when the verdict refuses, or when a value is not finite or overflows in `serving_dtype`.
    """
    settings = inspection.settings
    if verdict.verdict is VerdictKind.REFUSE or settings is None:
        raise refused(verdict.reasons)
    plan = _plan(source, inspection.weights_file, verdict)
    out.mkdir(parents=True, exist_ok=True)
    config = canonical_config(settings, verdict)
    (out / CONFIG_FILE).write_bytes(json.dumps(config, indent=2, sort_keys=True).encode() + b"\n")
    problems: list[Problem] = []
    with (out / WEIGHTS_FILE).open("wb", buffering=CHUNK_BYTES) as file:
        file.write(_header(plan))
        for planned in plan:
            trouble = _copy(planned, file, LARGEST[serving_dtype])
            if trouble:
                problems.append(
                    Problem("non_finite", planned.key, trouble, "The training run diverged; do not use it.")
                )
    if problems:
        raise refused(cap_problems(problems))
    size = sum((out / name).stat().st_size for name in CANONICAL_FILES)
    return CanonicalAdapter(out, digest_folder(out), verdict.rank, size, verdict.modules)


def refused(reasons: tuple[Problem, ...]) -> AdapterRefused:
    """The error for an upload that cannot become a version, carrying every reason."""
    first = reasons[0]
    more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
    return AdapterRefused(f"{first.path} {first.message}{more}.", param=first.path, problems=reasons)


def digest_folder(folder: Path) -> str:
    """`sha256:...` over names, sizes and contents of the canonical files in `folder`."""
    digest = hashlib.sha256()
    for name in CANONICAL_FILES:
        digest.update(f"{name} {(folder / name).stat().st_size}\n".encode())
        with (folder / name).open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
    return f"sha256:{digest.hexdigest()}"


def canonical_config(settings: LoraSettings, verdict: Verdict) -> dict[str, Any]:
    """The least adapter_config.json with the adapter's meaning; it claims the base it was checked against by digest."""
    ranks = [module.rank for module in verdict.modules.values()]
    alphas = [module.alpha for module in verdict.modules.values()]
    rank = _commonest(ranks, settings.rank)
    alpha = _commonest(alphas, settings.alpha)
    modules = sorted(verdict.modules)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": verdict.base_digest,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _plain_number(alpha),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": settings.use_rslora,
        "target_modules": sorted(_adapted(verdict)),
        "rank_pattern": {n: verdict.modules[n].rank for n in modules if verdict.modules[n].rank != rank},
        "alpha_pattern": {
            n: _plain_number(verdict.modules[n].alpha) for n in modules if verdict.modules[n].alpha != alpha
        },
        **settings.extras,
    }


def _adapted(verdict: Verdict) -> set[str]:
    """Last names of the modules with a low-rank update: projections, and in export-only versions embeddings too."""
    owners = (key.partition(".lora_")[0] for key in verdict.tensors if ".lora_" in key)
    return {owner.rpartition(".")[2] for owner in owners}


def _commonest(values: list[Any], default: Any) -> Any:
    """The value that most layers have, of equals the larger: patterns stay short and one form is canonical."""
    return max(set(values), key=lambda value: (values.count(value), value)) if values else default


def _plain_number(value: float) -> float:
    return int(value) if float(value).is_integer() else float(value)


def _plan(source: Path, weights: str, verdict: Verdict) -> list[_Planned]:
    plan = []
    for key, tensor in verdict.tensors.items():
        pieces = [(source / weights, tensor, False)]
        shape, axis, is_b = list(tensor.shape), 0, ".lora_B." in key
        if verdict.is_transposed:
            shape.reverse()
        if key in verdict.initial:
            pieces.append((source / INITIAL_ADAPTER_FILE, verdict.initial[key], is_b))
            axis = 1 if is_b else 0
            shape[axis] *= 2
        is_transposed = verdict.is_transposed and len(shape) == 2
        dtypes = {piece.dtype for _, piece, _ in pieces}
        dtype = tensor.dtype if len(dtypes) == 1 else "F32"  # holds what either half held
        plan.append(_Planned(key, dtype, tuple(shape), tuple(pieces), axis, is_transposed))
    return sorted(plan, key=lambda planned: (-ITEM_BYTES[planned.dtype], planned.key))


def _header(plan: list[_Planned]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for planned in plan:
        end = offset + planned.size_bytes
        header[planned.key] = {"dtype": planned.dtype, "shape": list(planned.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _copy(planned: _Planned, file: BinaryIO, largest: float) -> str:
    """Write one tensor; the reason when a value cannot be served, else an empty string."""
    is_made = len(planned.pieces) > 1 or planned.is_transposed
    chunks = _joined(planned) if is_made else _chunks(*planned.pieces[0][:2])
    trouble = ""
    for chunk in chunks:
        trouble = trouble or _trouble(chunk, planned.dtype, largest)
        file.write(chunk)
    return trouble


def _chunks(path: Path, tensor: TensorInfo) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(tensor.offset)
        left = tensor.size_bytes
        while left:
            chunk = file.read(min(left, CHUNK_BYTES))
            if not chunk:
                raise StorageDamaged(f"{path} ended inside tensor {tensor.name}: it changed while it was read.")
            left -= len(chunk)
            yield chunk


def _joined(planned: _Planned) -> Iterator[bytes]:
    """[A; A0] row-wise or [B, -B0] column-wise, or a transpose; one tensor pair in memory, which rank bounds."""
    arrays = []
    for path, tensor, is_negated in planned.pieces:
        array = to_float32(b"".join(_chunks(path, tensor)), tensor.dtype).reshape(tensor.shape)
        array = array.T if planned.is_transposed else array
        arrays.append(-array if is_negated else array)
    yield from_float32(np.concatenate(arrays, axis=planned.axis), planned.dtype)


def _trouble(chunk: bytes, dtype: str, largest: float) -> str:
    magnitudes = np.abs(to_float32(chunk, dtype))
    top = float(magnitudes.max(initial=0.0))  # NaN wins over every number
    if math.isnan(top):
        return "holds NaN"
    if math.isinf(top):
        return "holds infinity"
    return f"holds {top:g}, which overflows in the serving dtype (largest {largest:g})" if top > largest else ""


def read_tensor(path: Path, tensor: TensorInfo) -> npt.NDArray[np.float32]:
    """All values of one tensor of a safetensors file, in a row."""
    with path.open("rb") as file:
        file.seek(tensor.offset)
        return to_float32(file.read(tensor.size_bytes), tensor.dtype)


def to_float32(raw: bytes, dtype: str) -> npt.NDArray[np.float32]:
    """Little-endian bytes of F32, F16 or BF16 as float32, exactly."""
    readers: dict[str, Callable[[], npt.NDArray[np.float32]]] = {
        "F32": lambda: np.frombuffer(raw, "<f4"),
        "F16": lambda: np.frombuffer(raw, "<f2").astype(np.float32),
        "BF16": lambda: (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32),
    }
    return readers[dtype]()


def from_float32(array: npt.NDArray[np.float32], dtype: str) -> bytes:
    """Back to bytes of `dtype`; exact for values that came from it."""
    if dtype == "BF16":
        bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()
    return np.ascontiguousarray(array, "<f4" if dtype == "F32" else "<f2").tobytes()
