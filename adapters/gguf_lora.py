"""An adapter alone as a GGUF file for llama.cpp's `--lora`, beside a GGUF of its base.

llama.cpp has one alpha for a file and scales each layer's B @ A by alpha / rank, rank being that of the layer. PEFT's
scaling may be another in each layer (rank_pattern, alpha_pattern, rsLoRA). So alpha is what most layers need, and B of
the others is multiplied, once and rounded once to float32, by what is left:

    alpha / rank * (factor * B) @ A = scaling * B @ A        factor = scaling * rank / alpha
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from adapters.bases import BaseModel
from adapters.checkpoint import StoredTensor
from adapters.gguf_metadata import QUANTISATION_VERSION, Metadata, architecture
from adapters.gguf_plan import GgufPlan, GgufTensor, encode_header, gguf_name
from adapters.gguf_read import GgufFile, read_elements, read_gguf
from adapters.gguf_types import FILE_TYPES, check_type
from adapters.gguf_verify import verify_gguf
from adapters.gguf_write import write_gguf
from adapters.merge import Progress
from adapters.merge_plan import Update, read_updates
from adapters.readback import EPSILON32, WeightsReport, read_floats, unit

ALPHA = "adapter.lora.alpha"


@dataclass(frozen=True)
class GgufLoraPlan:
    """A whole adapter file, decided. `folded` are the layers whose B takes up what one alpha cannot say."""

    file: GgufPlan
    updates: tuple[Update, ...]
    alpha: float
    folded: tuple[str, ...]

    @property
    def size_bytes(self) -> int:
        return self.file.size_bytes

    def as_dict(self) -> dict[str, Any]:
        """What a person may want to know of the file."""
        return {
            "dtype": self.file.quantisation,
            "size_bytes": self.size_bytes,
            "layers": len(self.updates),
            "ranks": sorted({update.rank for update in self.updates}),
            "alpha": self.alpha,
            "scaled_into_b": list(self.folded),
            "notes": list(self.file.notes),
        }


def plan_gguf_lora(adapter: Path, base: BaseModel, *, dtype: str = "f32", name: str = "adapter") -> GgufLoraPlan:
    """Every tensor of a PEFT-layout folder under llama.cpp's name; `dtype` is f32 or f16.

    Raises InvalidRequest, and MergeFailed for what is more than low-rank updates: llama.cpp adds those only.
    """
    kind = (check_type(dtype, is_lora=True) or "").upper()
    updates = tuple(read_updates(adapter, base).values())
    alpha = _alpha(updates)
    metadata: Metadata = {
        "general.architecture": ("STRING", architecture(base)),
        "general.type": ("STRING", "adapter"),
        "general.name": ("STRING", name),
        "general.file_type": ("UINT32", FILE_TYPES[kind]),
        "general.quantization_version": ("UINT32", QUANTISATION_VERSION),
        "adapter.type": ("STRING", "lora"),
        ALPHA: ("FLOAT32", alpha),
    }
    factors = {update.module: _factor(update, alpha) for update in updates}
    folded = tuple(sorted(module for module, factor in factors.items() if factor != 1.0))
    halves = [half for update in updates for half in _halves(update, factors[update.module])]
    header, begins = encode_header(metadata, [(name, kind, source.shape) for name, source, _ in halves])
    tensors = tuple(
        GgufTensor(name, kind, source, begin, factor=factor)
        for (name, source, factor), begin in zip(halves, begins, strict=True)
    )
    notes = (f"B of {len(folded)} layers is scaled: llama.cpp has one alpha for all.",) if folded else ()
    return GgufLoraPlan(GgufPlan(kind.lower(), metadata, header, tensors, {}, notes=notes), updates, alpha, folded)


def _alpha(updates: tuple[Update, ...]) -> float:
    """The alpha that most layers need, as float32 holds it; never 0, which llama.cpp reads as no scaling at all."""
    needed = Counter(update.scaling * update.rank for update in updates if update.scaling != 0)
    return float(np.float32(max(needed, key=lambda alpha: (needed[alpha], alpha)))) if needed else 1.0


def _factor(update: Update, alpha: float) -> float:
    factor = update.scaling * update.rank / alpha
    return 1.0 if abs(factor - 1.0) <= EPSILON32 else factor  # no more than alpha itself lost


def _halves(update: Update, factor: float) -> list[tuple[str, StoredTensor, float]]:
    name = gguf_name(f"{update.module}.weight")
    return [(f"{name}.lora_a", update.a, 1.0), (f"{name}.lora_b", update.b, factor)]


def write_gguf_lora(
    plan: GgufLoraPlan, path: Path, *, workers: int | None = None, progress: Progress | None = None
) -> None:
    """Write the file, which must not exist, and fsync it; raises as write_gguf does."""
    write_gguf(plan.file, path, workers=workers, progress=progress)


def verify_gguf_lora(plan: GgufLoraPlan, path: Path, progress: Callable[[int], None] | None = None) -> WeightsReport:
    """Read the whole file back, and compare alpha / rank * B with PEFT's scaling * B in float64, layer by layer.

    alpha and rank are those in the file. `problems` is empty when all of it is right.
    """
    report = verify_gguf(plan.file, path, progress)
    if not report.problems:
        file = read_gguf(path)
        report.problems += [text for update in plan.updates if (text := _scaling_problem(update, file))]
    return report


def _scaling_problem(update: Update, file: GgufFile) -> str | None:
    written = file.tensors[f"{gguf_name(f'{update.module}.weight')}.lora_b"]
    scaling = file.metadata[ALPHA] / written.shape[1]
    stored = read_elements(file.path, written, 0, update.b.elements)
    wanted = read_floats(update.b) * update.scaling
    bound = abs(scaling) * unit(stored, written.type) / 2 + 4 * EPSILON32 * np.abs(wanted)
    wrong = int((~(np.abs(scaling * stored - wanted) <= bound)).sum())
    return f"{update.module}: {wrong} elements of alpha / rank * B are not scaling * B" if wrong else None
