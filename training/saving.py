"""What a run leaves: an adapter as PEFT's two files, or after full fine-tuning a Hugging Face folder of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from adapters.bases import BaseModel, stored_dtype, weight_files
from adapters.errors import TrainingStopped

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
COPIED = (  # of the base: what a full result has in common with it, byte for byte
    *("config.json", "generation_config.json", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
)


def save_result(model: Any, folder: Path, base: BaseModel, source: str | None = None) -> None:
    """Write an adapter or, where every weight was trained, a whole model; `source` is how the base was named.

    Raises TrainingStopped for weights that are not finite or that training has not changed.
    """
    if hasattr(model, "peft_config"):
        save_adapter(model, folder, source)
    else:
        save_full(model, folder, base)


def save_adapter(model: Any, folder: Path, base: str | None = None) -> None:
    """Write PEFT's two files; raises TrainingStopped for an adapter that is not finite or that changes nothing."""
    import torch

    updates = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
    broken = [name for name, value in updates if not bool(torch.isfinite(value).all())]
    if broken:
        raise TrainingStopped(f"{broken[0]} is not finite after training: nothing was saved. Lower --learning-rate.")
    if not any(bool(value.any()) for name, value in updates if "lora_B" in name):
        raise TrainingStopped(
            "The adapter changes nothing after training: every lora_B is zero. Nothing was saved. Train for more "
            "steps, or raise --learning-rate."
        )
    _name_base(model, base)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # an empty model card that PEFT puts there
    config = json.loads((folder / CONFIG_FILE).read_bytes())
    config["target_modules"] = sorted(config["target_modules"])  # PEFT writes a set, in another order each time
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    (folder / WEIGHTS_FILE).chmod((folder / CONFIG_FILE).stat().st_mode)


def save_full(model: Any, folder: Path, base: BaseModel) -> None:
    """Write every weight in the dtype that the base's config names, with the base's config, tokenizer and template.

    A tied output layer stays tied: it is not written. Raises TrainingStopped as `save_adapter` does.
    """
    import torch

    model.to(getattr(torch, stored_dtype(base.config) or "float32"))
    broken = next((name for name, value in model.named_parameters() if not bool(torch.isfinite(value).all())), None)
    if broken is not None:
        raise TrainingStopped(f"{broken} is not finite after training: nothing was saved. Lower --learning-rate.")
    if _equals(model, base):
        raise TrainingStopped(
            "Training changed no weight of the base. Nothing was saved. Train for more steps, or raise --learning-rate."
        )
    model.save_pretrained(str(folder))
    for name in COPIED:
        if (base.folder / name).is_file():
            shutil.copyfile(base.folder / name, folder / name)
    for path in folder.glob("*.safetensors"):
        path.chmod((folder / "config.json").stat().st_mode)


def saved_bytes(folder: Path) -> int:
    """How large the weights are that a run has written."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _equals(model: Any, base: BaseModel) -> bool:
    """Whether every weight is still that of the base's files."""
    import torch
    from safetensors import safe_open

    weights = dict(model.named_parameters())
    for shard in weight_files(base.folder):
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - a safe_open handle is no mapping
                if name in weights and not torch.equal(
                    weights[name].cpu(), file.get_tensor(name).to(weights[name].dtype)
                ):
                    return False
    return True


def _name_base(model: Any, source: str | None) -> None:
    """A base from the Hub is named in the adapter's config by its id, not by where this machine keeps it."""
    if source is None or Path(source).exists() or "/" not in source:
        return
    name, _, revision = source.partition("@")
    for config in model.peft_config.values():
        config.base_model_name_or_path, config.revision = name, revision or None
