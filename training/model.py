"""The base as it is trained: loaded in its dtype or in NF4, with a LoRA adapter on it, fresh or continued."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from adapters.bases import BaseModel
from adapters.errors import AdapterRefused, BaseInvalid, ConfigInvalid
from training.config import Settings, TrainingConfig
from training.packed import ATTENTION, register_attention


def load_model(base: BaseModel, settings: Settings, device: str, initial_adapter: Path | None = None) -> Any:
    """A model ready to train; raises BaseInvalid where the base cannot be read.

    For LoRA and QLoRA a PeftModel: base frozen, adapter in float32. For full every weight is trained and held in
    float32, whatever dtype is computed in: small updates would vanish in 16 bits.
    """
    if base.config.get("use_sliding_window"):
        raise BaseInvalid(f"{base.folder} uses sliding-window attention, which the trainer does not do.")
    register_attention()
    model = load_weights(
        base,
        dtype=torch.float32 if settings.method == "full" else getattr(torch, settings.dtype),
        attn_implementation=ATTENTION,
        device_map={"": device} if settings.method == "qlora" or device == "cuda" else None,
        quantization_config=nf4_config(settings) if settings.method == "qlora" else None,
    )
    keep_canonical_nf4(model)
    model.config.use_cache = False
    if settings.method == "full":
        return model
    return _with_adapter(model, settings, initial_adapter)


def load_weights(base: BaseModel, **options: Any) -> Any:
    """The base through transformers, every weight from its files; raises BaseInvalid where one is damaged or lacking.

    transformers fills in what a checkpoint lacks with random numbers, and says so only in its log.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            base.folder, local_files_only=True, output_loading_info=True, **options
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        why = "a weight has another shape than config.json says" if "mismatched" in str(error) else error
        raise BaseInvalid(f"{base.folder} cannot be loaded: {why}. Download it again.") from error
    lacking = sorted(loading["missing_keys"])
    if lacking:
        raise BaseInvalid(
            f"{base.folder} lacks {len(lacking):,} of its weights, {lacking[0]} among them; random ones would stand "
            "for them. Download the base again."
        )
    return model


def keep_canonical_nf4(model: torch.nn.Module) -> int:
    """Forbid bitsandbytes to repack NF4 weights for inference; returns how many layers that concerns.

    On CPUs with AVX512-BF16 a forward without gradients repacks the weights for a kernel that has no autograd, and
    later training steps silently go through it: after a validation, gradients point elsewhere. That layout only makes
    inference faster, so every layer is told that the CPU lacks it.
    """
    layers = [module for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    return len(layers)


def causal_lm(model: Any) -> Any:
    """The causal language model itself, out of its PEFT wrapper where it has one; the adapter works in it still."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def base_alone(model: Any) -> AbstractContextManager[Any]:
    """A context in which the model answers without its adapter, where it has one."""
    held: AbstractContextManager[Any] = model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext()
    return held


def lora_config(settings: Settings) -> Any:
    """The PEFT config of a fresh adapter."""
    from peft import LoraConfig

    return LoraConfig(
        r=settings.rank,
        lora_alpha=int(settings.alpha) if float(settings.alpha).is_integer() else settings.alpha,
        target_modules=list(settings.target_modules),
        lora_dropout=settings.dropout,
        use_rslora=settings.use_rslora,
        bias="none",
        task_type="CAUSAL_LM",
    )


def initial_shape(folder: Path) -> dict[str, Any]:
    """Rank, alpha and target modules of an adapter folder to go on from; raises AdapterRefused."""
    try:
        config = json.loads((folder / "adapter_config.json").read_bytes())
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise AdapterRefused(f"{folder} is no adapter folder to go on from: {error!r}.", param="from") from error
    if config.get("peft_type") != "LORA" or config.get("use_dora"):
        raise AdapterRefused(f"{folder} is not a plain LoRA adapter; only those can be gone on from.", param="from")
    if not (folder / "adapter_model.safetensors").is_file():
        raise AdapterRefused(f"{folder} has no adapter_model.safetensors.", param="from")
    return {"rank": rank, "alpha": alpha, "use_rslora": bool(config.get("use_rslora"))}


def with_initial_shape(config: TrainingConfig) -> TrainingConfig:
    """The config with the rank, alpha and scaling of the adapter it goes on from; raises ConfigInvalid for others."""
    if config.initial_adapter is None:
        return config
    shape = initial_shape(config.initial_adapter)
    for key in ("rank", "alpha"):
        asked = getattr(config, key)
        if asked is not None and float(asked) != float(shape[key]):
            raise ConfigInvalid(
                f"{key} is {asked}, but the adapter to go on from has {shape[key]:g}, which stays: leave it out.",
                param=key,
            )
    return replace(config, **shape)


def _with_adapter(model: Any, settings: Settings, initial_adapter: Path | None) -> Any:
    from peft import PeftModel, get_peft_model
    from safetensors import SafetensorError

    if initial_adapter is None:
        return get_peft_model(model, lora_config(settings))
    try:
        return PeftModel.from_pretrained(model, str(initial_adapter), is_trainable=True)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise AdapterRefused(
            f"{initial_adapter} does not fit this base, so it cannot be gone on from: {error}", param="from"
        ) from error


def nf4_config(settings: Settings) -> Any:
    """How the base is quantised for QLoRA: NF4 with double quantisation, computed in the run's dtype."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, settings.dtype),
    )
