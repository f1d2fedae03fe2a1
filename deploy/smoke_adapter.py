"""Adapters that were never trained, of the right shapes for a base: enough to see loads, swaps and mixed batches."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from adapters.bases import BaseModel

RANK = 16
B_DEVIATION = 0.03  # of the elements of B, where those of A have 1 / sqrt(in): it moves answers and keeps them finite


def write_adapter(folder: Path, base: BaseModel, seed: int) -> Path:
    """A LoRA of all seven projections in PEFT's layout, drawn from `seed`."""
    from safetensors.numpy import save_file

    draw = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    for name, shape in base.shapes.items():
        a = draw.standard_normal((RANK, shape.in_features), dtype=np.float32) / np.sqrt(shape.in_features)
        b = draw.standard_normal((shape.out_features, RANK), dtype=np.float32) * B_DEVIATION
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.astype(np.float32)
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.astype(np.float32)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base.folder),
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": sorted({name.rpartition(".")[2] for name in base.shapes}),
    }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return folder
