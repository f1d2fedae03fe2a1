"""What the tests of exports share: a message to wait for, what a folder holds, and a base that is damaged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from adapters.bases import BaseModel
from adapters.llamacpp import Continuation
from adapters.parity_logits import forward

MERGED = {"stage": "merging", "percent": 100}


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def damage(base: BaseModel, folder: Path, change: Callable[[Path], None]) -> Path:
    """A sharded copy of the base with something wrong."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="100KB")
    change(folder)
    return folder


def compared(reference: Any, prompts: Sequence[list[int]], continuations: Sequence[Continuation]) -> Mapping[str, Any]:
    """How far the log-probabilities that llama.cpp named are from ours, and where the top token is the same."""
    differences: list[float] = []
    agreements: list[list[bool]] = []
    for prompt, continuation in zip(prompts, continuations, strict=True):
        logits = forward(reference, [[*prompt, *continuation.tokens]])[0].astype(np.float64)
        rows = logits[len(prompt) - 1 : -1]
        shifted = rows - rows.max(axis=1, keepdims=True)
        ours = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        for row, top in zip(ours, continuation.top, strict=True):
            differences += [abs(float(row[token]) - value) for token, value in top.items()]
        agreements.append((rows.argmax(axis=1) == np.array(continuation.tokens)).tolist())
    flat = [same for one in agreements for same in one]
    return {
        "prompts": len(prompts),
        "positions": len(flat),
        "log_probabilities": len(differences),
        "max_abs": float(f"{max(differences):.3g}"),
        "mean_abs": float(f"{sum(differences) / len(differences):.3g}"),
        "top1_agreement": float(f"{sum(flat) / len(flat):.6g}"),
        "same_continuations": sum(map(all, agreements)),
    }
