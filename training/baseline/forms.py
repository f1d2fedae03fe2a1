"""The adapter on the base as it was trained on it: in NF4 for QLoRA, in the run's dtype else.

Served, the base is in another form (16 bits for a QLoRA adapter), and the score drifts by that. Both are measured on
the same rows with the same prompts.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapters.bases import BaseModel, stored_dtype
from training.config import Settings
from training.model import load_model
from training.reference import Reference, read_card


def trained_settings(adapter: Path) -> Settings | None:
    """The settings that an adapter's card says it was trained with; None where it does not say them all."""
    settings: Any = read_card(adapter).get("settings")
    if not isinstance(settings, Mapping):
        return None
    try:
        made = Settings(**{**settings, "target_modules": tuple(settings.get("target_modules", ()))})
    except TypeError:  # a card of another release, or of somebody else
        return None
    return made if made.method in ("lora", "qlora") and isinstance(made.dtype, str) else None


def form_of(settings: Settings) -> str:
    """The form of the base in training, in words."""
    return f"NF4, computed in {settings.dtype}" if settings.method == "qlora" else settings.dtype


def stored_form(base: BaseModel) -> str:
    """The form of the base on the reference path."""
    return stored_dtype(base.config) or "float32"


def as_trained(base: BaseModel, adapter: Path, settings: Settings) -> Reference:
    """The adapter ready to answer on the base in the form of its training."""
    import torch

    reference = Reference(base)
    reference.model = None  # one base in memory at a time
    device = "cuda" if torch.cuda.is_available() else "cpu"
    reference.model = load_model(base, settings, device, adapter).eval()
    return reference
