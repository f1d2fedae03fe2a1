"""Axolotl's YAML in the neutral vocabulary: `src/axolotl/utils/schemas`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from training.review.known_keys import AXOLOTL, AXOLOTL_DATASET, listed
from training.review.values import Convert, flag, lower, names, number, present, text, whole
from training.review.words import Given, Reading, Unknown, is_set

ATTENTION_SWITCHES = {
    "flash_attention": "flash_attention_2",
    "xformers_attention": "xformers",
    "sage_attention": "sage",
    "flex_attention": "flex_attention",
    "sdp_attention": "sdpa",
    "eager_attention": "eager",
}
WORDS: Mapping[str, tuple[str, Convert]] = {
    "base_model": ("base", text),
    "adapter": ("method", lower),
    "load_in_8bit": ("eight", flag),
    "load_in_4bit": ("four", flag),
    "lora_r": ("rank", whole),
    "lora_alpha": ("alpha", number),
    "lora_dropout": ("dropout", number),
    "lora_target_modules": ("targets", names),
    "lora_target_linear": ("all_linear", flag),
    "lora_modules_to_save": ("modules_to_save", names),
    "peft_use_dora": ("use_dora", flag),
    "peft_use_rslora": ("use_rslora", flag),
    "peft_init_lora_weights": ("init", lower),
    "learning_rate": ("learning_rate", number),
    "lr_scheduler": ("scheduler", lower),
    "warmup_ratio": ("warmup_ratio", number),
    "warmup_steps": ("warmup_steps", number),
    "weight_decay": ("weight_decay", number),
    "max_grad_norm": ("max_gradient_norm", number),
    "optimizer": ("optimizer", lower),
    "num_epochs": ("epochs", number),
    "max_steps": ("max_steps", whole),
    "micro_batch_size": ("batch", whole),
    "gradient_accumulation_steps": ("accumulation", whole),
    "sequence_len": ("max_length", whole),
    "excess_length_strategy": ("over_long", lower),
    "sample_packing": ("packing", flag),
    "pad_to_sequence_len": ("pads_to_length", flag),
    "attn_implementation": ("attention", lower),
    "train_on_inputs": ("trains_prompt", flag),
    "chat_template": ("template", text),
    "bf16": ("bf16", lower),
    "bfloat16": ("bf16", lower),
    "fp16": ("fp16", flag),
    "float16": ("fp16", flag),
    "gradient_checkpointing": ("gradient_checkpointing", flag),
    "val_set_size": ("validation", number),
    "early_stopping_patience": ("early_stopping", whole),
    "load_best_model_at_end": ("keeps_best", flag),
    "metric_for_best_model": ("best_by", lower),
    "seed": ("seed", whole),
    "save_strategy": ("saves", present),
    "save_steps": ("save_steps", number),
    "saves_per_epoch": ("saves", present),
    "neftune_noise_alpha": ("neftune", number),
    "tokens": ("added_tokens", present),
    "added_tokens_overrides": ("added_tokens", present),
    "resize_token_embeddings_to_32x": ("added_tokens", present),
    "special_tokens.pad_token": ("pad_token", text),
    "special_tokens.eos_token": ("eos_token", text),
    "special_tokens.additional_special_tokens": ("added_tokens", present),
    "trust_remote_code": ("trust_remote_code", flag),
    "rl": ("stage", lower),
    "deepspeed": ("devices", text),
    "fsdp": ("devices", present),
    "fsdp_config": ("devices", present),
}
EVALUATIONS = ("eval_steps", "evals_per_epoch", "eval_strategy")
KNOWN = AXOLOTL | set(WORDS) | {"special_tokens.bos_token", "special_tokens.unk_token"}
RENAMED = {
    "noisy_embedding_alpha": "neftune_noise_alpha",
    "evaluation_strategy": "eval_strategy",
    "max_packed_sequence_len": "sequence_len",
    "group_by_length": "sample_packing",
}
MARKS = listed("""
base_model adapter micro_batch_size sequence_len lora_r lora_target_linear sample_packing val_set_size datasets
num_epochs lr_scheduler train_on_inputs special_tokens pad_to_sequence_len wandb_project strict
""")
DEFAULTS: Mapping[str, tuple[str, Any]] = {
    "method": ("adapter", None),
    "dropout": ("lora_dropout", 0.0),
    "scheduler": ("lr_scheduler", "cosine"),
    "warmup_ratio": ("warmup_ratio", 0.03),
    "weight_decay": ("weight_decay", 0.0),
    "epochs": ("num_epochs", 1.0),
    "batch": ("micro_batch_size", 1),
    "accumulation": ("gradient_accumulation_steps", 1),
    "max_length": ("sequence_len", 512),
    "over_long": ("excess_length_strategy", "drop"),
    "bf16": ("bf16", "auto"),
    "gradient_checkpointing": ("gradient_checkpointing", False),
    "validation": ("val_set_size", 0.0),
    "template": ("chat_template", "base"),
    "saves": ("saves_per_epoch", True),
    "quant_type": ("bnb_config_kwargs", "nf4"),
    "double_quant": ("bnb_config_kwargs", True),
    "trains_prompt": ("train_on_inputs", False),
}


def finish(reading: Reading, raw: Mapping[str, Given]) -> None:
    """One adapter word and two switches say method and bits; attention has a switch for each kind."""
    values = reading.values
    _method(reading)
    every = values.pop("all_linear", None)
    if every is not None and every.value and "targets" not in values:
        reading.put("targets", "all", every)
    for key, kind in ATTENTION_SWITCHES.items():
        if is_set(raw, key):
            reading.put("attention", kind, raw[key])
    if (template := values["template"]).value in ("tokenizer_default", "base"):
        reading.put("template", "base", template)
    if (over_long := values["over_long"]).value in ("truncate", "raise", "drop"):
        reading.put("over_long", {"truncate": "cut", "raise": "error"}.get(over_long.value, "drop"), over_long)
    if (bf16 := values["bf16"]) and isinstance(bf16.value, str):
        reading.put("pure_bf16", bf16.value == "full", bf16)
        reading.put("bf16", flag(bf16.value) and not reading.value("fp16"), bf16)
    if is_set(raw, "test_datasets"):
        reading.put("validation", "test_datasets", raw["test_datasets"])
    if asked := [key for key in EVALUATIONS if is_set(raw, key)]:
        reading.put("evaluates", True, raw[asked[0]])
    elif "eval_strategy" in raw:
        reading.put("evaluates", False, raw["eval_strategy"])
    if early := values.pop("early_stopping", None):
        reading.put("keeps_best", True, early)
    if packing := values.get("packing"):
        reading.put(
            "packing_isolates", reading.value("attention") not in (None, "fp8"), values.get("attention", packing)
        )
    if reading.value("stage") is None:
        values["stage"] = Given("sft", "rl")
    _datasets(reading, raw)
    _reports(reading, raw)


def _method(reading: Reading) -> None:
    adapter = reading.values["method"]
    reading.put("method", "lora" if adapter.value == "qlora" else adapter.value or "full", adapter)
    reading.take_bits()
    if adapter.value == "qlora" and reading.value("bits") != 4:
        reading.unread.append((adapter, "qlora together with load_in_4bit: true, as Axolotl demands"))


def _datasets(reading: Reading, raw: Mapping[str, Given]) -> None:
    """Each dataset says which roles and ends of turns are learned; its keys, too, may be misspelt."""
    for key in ("datasets", "test_datasets"):
        entries = raw[key].value if key in raw else None
        for index, entry in enumerate(entries if isinstance(entries, list) else ()):
            for inner, value in entry.items() if isinstance(entry, dict) else ():
                place = Given(value, f"{key}[{index}].{inner}", raw[key].line)
                if inner not in AXOLOTL_DATASET:
                    reading.unknown.append(Unknown(place.key, place.line, None, value))
                elif inner in ("train_on_eos", "train_on_eot") and str(value).lower() in ("none", "false"):
                    reading.put("trains_end", False, place)
                elif inner == "roles_to_train" and isinstance(value, list) and {"user", "human"} & set(map(str, value)):
                    reading.put("trains_prompt", True, place)


def _reports(reading: Reading, raw: Mapping[str, Given]) -> None:
    used = ("wandb_project", "use_tensorboard", "use_mlflow", "use_comet", "use_trackio", "use_wandb")
    asked = [key for key in used if is_set(raw, key)]
    place = raw[asked[0]] if asked else Given(None, "use_tensorboard")
    reading.put("reports", tuple(asked) or ("none",), place)
