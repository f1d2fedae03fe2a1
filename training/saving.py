"""The trained adapter as PEFT's two files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from adapters.errors import TrainingStopped

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


def save_adapter(model: Any, folder: Path, base: str | None = None) -> None:
    """Write PEFT's two files; raises TrainingStopped for an adapter that is not finite or that changes nothing."""
    import torch

    updates = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
    broken = [name for name, value in updates if not bool(torch.isfinite(value).all())]
    if broken:
        raise TrainingStopped(f"{broken[0]} is not finite after training: nothing was saved. Lower --learning-rate.")
    if not any(bool(value.any()) for name, value in updates if "lora_B" in name):
        raise TrainingStopped("The adapter changes nothing after training: every lora_B is zero. Train for more steps.")
    _name_base(model, base)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # an empty model card that PEFT puts there
    config = json.loads((folder / CONFIG_FILE).read_bytes())
    config["target_modules"] = sorted(config["target_modules"])  # PEFT writes a set, in another order each time
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    (folder / WEIGHTS_FILE).chmod((folder / CONFIG_FILE).stat().st_mode)


def _name_base(model: Any, source: str | None) -> None:
    """A base from the Hub is named in the adapter's config by its id, not by where this machine keeps it."""
    if source is None or Path(source).exists() or "/" not in source:
        return
    name, _, revision = source.partition("@")
    for config in model.peft_config.values():
        config.base_model_name_or_path, config.revision = name, revision or None
