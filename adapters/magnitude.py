"""How large an adapter's update is beside the weights it changes: |s B A| / |W|, both Frobenius norms.

|B A|^2 is the sum over (B^T B) * (A A^T), two (rank, rank) matrices, so no full update is made. |W| is estimated from
evenly spaced rows, which is plenty where a factor of ten is the question.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from adapters.bases import BaseModel, weight_files
from adapters.canonical import check, read_tensor, to_float32
from adapters.checkpoint import FLOATS, StoredTensor, read_header
from adapters.errors import Problem
from adapters.header import TensorInfo
from adapters.inspect import inspect_folder
from adapters.lora_config import MAX_RANK
from adapters.tensor_names import Part, canonical_key

MAX_UPDATE_RATIO = 10.0
CODE = "update_too_large"
SAMPLED_ROWS = 32


@dataclass(frozen=True, slots=True)
class LargestUpdate:
    """The layer whose scaled update is largest beside its weights."""

    module: str
    ratio: float

    def problem(self, limit: float) -> Problem:
        message = f"its scaled update is {self.ratio:.3g} times as large as the layer's weights; {limit:g} is the most"
        advice = (
            "It is kept and not served. Look at lora_alpha and the training; if it is meant, the operator starts the "
            "server with HOTSHOE_MAX_UPDATE_RATIO above that."
        )
        return Problem(CODE, self.module, message, advice)


def largest_update(folder: Path, base: BaseModel) -> LargestUpdate | None:
    """Of the canonical files in `folder`; None where the base's weights are not at hand in floating point."""
    weights = {tensor.name: tensor for shard in weight_files(base.folder) for tensor in read_header(shard)}
    if not weights:
        return None
    inspection = inspect_folder(folder)
    verdict = check(inspection, base, max_rank=MAX_RANK, base_is_served=True)
    found = []
    for name, module in verdict.modules.items():
        norm = _row_norm(weights.get(f"{name}.weight"))
        if norm:
            update = module.scaling * _product_norm(folder / inspection.weights_file, verdict.tensors, name)
            found.append(LargestUpdate(name, update / norm))
    return max(found, key=lambda update: update.ratio, default=None)


def _row_norm(tensor: StoredTensor | None) -> float:
    """The norm of a stored matrix, from a sample of its rows; 0 when it is packed or not there."""
    if tensor is None or tensor.dtype not in FLOATS or len(tensor.shape) != 2:
        return 0.0
    rows, columns = tensor.shape
    row_bytes = tensor.size_bytes // rows
    count = min(rows, SAMPLED_ROWS)
    total = 0.0
    with tensor.path.open("rb") as file:
        for i in range(count):
            file.seek(tensor.begin + (i * rows // count) * row_bytes)
            row = to_float32(file.read(columns * (row_bytes // columns)), tensor.dtype).astype(np.float64)
            total += float(row @ row)
    return math.sqrt(total * rows / count)


def _product_norm(path: Path, tensors: Mapping[str, TensorInfo], module: str) -> float:
    a, b = (_matrix(path, tensors[canonical_key(module, part)]) for part in (Part.A, Part.B))
    return math.sqrt(max(0.0, float(np.sum((b.T @ b) * (a @ a.T)))))


def _matrix(path: Path, tensor: TensorInfo) -> npt.NDArray[np.float64]:
    return read_tensor(path, tensor).reshape(tensor.shape).astype(np.float64)
