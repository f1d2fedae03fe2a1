"""What an adapter loses where an engine holds it in another number format than its canonical files.

Canonical files keep the source's format, so that a digest depends on no machine; the copy that answers is rounded from
them once, when it is loaded. Its loss is |W - rounded W| / |W| over all tensors, both Frobenius norms: 0 where the
serving format holds every value, about 0.0017 from float32 to bfloat16.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from adapters.canonical import from_float32, read_tensor, to_float32
from adapters.inspect import inspect_folder

STORED = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True, slots=True)
class Rounding:
    """`stored` are the files' formats, as safetensors names them; `tensor` is the one that loses most of itself."""

    stored: tuple[str, ...]
    served: str
    relative_error: float
    tensor: str
    tensor_relative_error: float

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "stored": list(self.stored)}


def rounding(folder: Path, serving_dtype: str) -> Rounding | None:
    """Of the canonical files in `folder`, a tensor at a time; None for a format that is unknown or too narrow."""
    served = STORED.get(serving_dtype)
    if served is None:
        return None
    inspection = inspect_folder(folder)
    lost = norm = most = 0.0
    worst = inspection.tensors[0].name
    with np.errstate(over="ignore"):
        for tensor in inspection.tensors:
            values = read_tensor(folder / inspection.weights_file, tensor)
            away, whole = _squared(values - to_float32(from_float32(values, served), served)), _squared(values)
            lost, norm = lost + away, norm + whole
            if whole and away / whole > most:
                worst, most = tensor.name, away / whole
    if not math.isfinite(lost):  # a value is beyond the format's largest; the probe says so by its answers
        return None
    stored = tuple(sorted({tensor.dtype for tensor in inspection.tensors}))
    return Rounding(stored, served, math.sqrt(lost / norm) if norm else 0.0, worst, math.sqrt(most))


def _squared(values: npt.NDArray[np.float32]) -> float:
    wide = values.astype(np.float64)
    return float(wide @ wide)
