"""What the tests of exports share: a message to wait for, what a folder holds, and a base that is damaged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from adapters.bases import BaseModel

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
