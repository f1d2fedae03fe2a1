"""TRL's and transformers' arguments with PEFT's LoraConfig, flat or in sections, and an adapter_config.json alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapters.lora_fields import DEFAULTS as DEFAULTS_OF_FIELDS
from adapters.lora_fields import TRAINING_ONLY, UNSUPPORTED
from training.review import arguments
from training.review.known_keys import BITS_AND_BYTES, LORA, SCRIPT, SFT, TRAINING_ARGUMENTS, listed
from training.review.values import Convert, flag, lower, names, number, present, text, whole
from training.review.words import Given, Reading

PEFT_WORDS: Mapping[str, tuple[str, Convert]] = {
    "base_model_name_or_path": ("base", text),
    "r": ("rank", whole),
    "lora_alpha": ("alpha", number),
    "lora_dropout": ("dropout", number),
    "target_modules": ("targets", names),
    "modules_to_save": ("modules_to_save", names),
    "use_dora": ("use_dora", flag),
    "use_rslora": ("use_rslora", flag),
    "bias": ("bias", lower),
    "init_lora_weights": ("init", lower),
    "lora_bias": ("bias", present),
    "trainable_token_indices": ("added_tokens", present),
    **dict.fromkeys(UNSUPPORTED, ("feature", present)),
}
WORDS: Mapping[str, tuple[str, Convert]] = {
    **arguments.WORDS,
    **PEFT_WORDS,
    "model_name_or_path": ("base", text),
    "use_peft": ("use_peft", flag),
    "lora_r": ("rank", whole),
    "lora_target_modules": ("targets", names),
    "lora_modules_to_save": ("modules_to_save", names),
    "load_in_4bit": ("four", flag),
    "load_in_8bit": ("eight", flag),
    "bnb_4bit_quant_type": ("quant_type", lower),
    "bnb_4bit_use_double_quant": ("double_quant", flag),
    "use_bnb_nested_quant": ("double_quant", flag),
    "max_length": ("max_length", whole),
    "packing": ("packing", flag),
    "packing_strategy": ("packing_strategy", lower),
    "attn_implementation": ("attention", lower),
    "assistant_only_loss": ("answers_only", flag),
    "completion_only_loss": ("completions_only", flag),
    "chat_template_path": ("template", text),
    "gradient_checkpointing": ("gradient_checkpointing", flag),
    "pad_token": ("pad_token", text),
    "eos_token": ("eos_token", text),
    "trust_remote_code": ("trust_remote_code", flag),
    "fsdp": ("devices", present),
}
SECTIONS = listed("""
sft_config training_args training_arguments args trainer training lora lora_config peft peft_config model
model_config model_init_kwargs quantization quantization_config bnb_config script_args dataset
""")
KNOWN = TRAINING_ARGUMENTS | SFT | SCRIPT | LORA | BITS_AND_BYTES | set(PEFT_WORDS)
PEFT_KNOWN = LORA | set(DEFAULTS_OF_FIELDS) | set(TRAINING_ONLY) | set(PEFT_WORDS)  # PEFT of any age, and its kin
PEFT_MARKS = frozenset({"peft_type"})
MARKS = listed("""
per_device_train_batch_size num_train_epochs assistant_only_loss completion_only_loss packing_strategy
dataset_name use_peft lora_config peft_config sft_config training_args lr_scheduler_type r load_in_4bit
""")
RENAMED = {
    "warmup_ratio": "warmup_steps (below 1 it is the share)",
    "max_seq_length": "max_length",
    "evaluation_strategy": "eval_strategy",
    "group_by_length": "train_sampling_strategy: group_by_length",
    "torch_dtype": "dtype",
    "no_cuda": "use_cpu",
    "tokenizer": "processing_class",
    "dataset_batch_size": "dataset_num_proc",
}
DEFAULTS: Mapping[str, tuple[str, Any]] = {
    **arguments.DEFAULTS,
    "learning_rate": ("learning_rate", 2e-5),
    "max_length": ("max_length", 1024),
    "gradient_checkpointing": ("gradient_checkpointing", True),
    "reports": ("report_to", ("none",)),
    "evaluates": ("eval_strategy", False),
    "template": ("chat_template_path", "base"),
    "stage": ("stage", "sft"),
}
OF_SCRIPT = frozenset({"use_peft", "lora_r", "lora_target_modules", "use_bnb_nested_quant", "lora_task_type"})
OF_LORA = frozenset({"r", "lora_r", "lora_alpha", "peft_type", "target_modules", "lora_target_modules"})


def finish(reading: Reading, raw: Mapping[str, Given]) -> None:
    """There is an adapter where PEFT is asked for; bf16 is on unless fp16 is; only FlashAttention isolates."""
    values = reading.values
    asked = values.pop("use_peft", None)
    is_script = asked is not None or bool(OF_SCRIPT & {key.rpartition(".")[2] for key in raw})
    lora = [key for key in raw if key.rpartition(".")[2] in OF_LORA]
    has_lora = asked.value if asked is not None else bool(lora)
    reading.put("method", "lora" if has_lora else "full", raw[lora[0]] if lora else Given(None, "use_peft"))
    if has_lora:
        _lora_defaults(reading, from_script=is_script)
    _bits(reading, from_script=is_script)
    if "bf16" not in values:
        values["bf16"] = Given(not reading.value("fp16", False), "bf16")
    strategy = values.pop("packing_strategy", None)
    if packing := values.get("packing"):
        flash = "flash" in str(reading.value("attention", ""))
        reading.put("packing_isolates", flash, values.get("attention", packing))
        if strategy is not None:
            reading.put("packing_wraps", strategy.value == "wrapped", strategy)
    values["over_long"] = Given("cut", values["max_length"].key, values["max_length"].line)
    _trained_part(reading)
    if reading.value("evaluates"):
        values["validation"] = Given("eval_dataset", values["evaluates"].key, values["evaluates"].line)
    if not any(key.rpartition(".")[2] in TRAINING_ARGUMENTS | SFT for key in raw):
        _keep_only_given(reading)


def alone(reading: Reading, raw: Mapping[str, Given]) -> None:
    """An adapter's own config says nothing of the training."""
    reading.put("method", "lora", raw.get("peft_type", Given(None, "peft_type")))
    _lora_defaults(reading, from_script=False)


def _lora_defaults(reading: Reading, from_script: bool) -> None:
    """peft.LoraConfig's defaults, or those of `trl sft`; attention's q and v are its targets for Qwen2 and Qwen3."""
    for name, key, value in (
        ("rank", "r", 16 if from_script else 8),
        ("alpha", "lora_alpha", 32.0 if from_script else 8.0),
        ("dropout", "lora_dropout", 0.05 if from_script else 0.0),
        ("targets", "target_modules", ("q_proj", "v_proj")),
    ):
        reading.values.setdefault(name, Given(value, key))
    _init(reading)


def _init(reading: Reading) -> None:
    init = reading.values.get("init")
    if init is not None and init.value in ("true", "false", "gaussian", "orthogonal", "eva", "none"):
        reading.put("init", None, init)


def _bits(reading: Reading, from_script: bool) -> None:
    reading.take_bits()
    if reading.value("bits") == 4:
        kind = "nf4" if from_script else "fp4"  # trl's ModelConfig, or transformers' BitsAndBytesConfig
        reading.values.setdefault("quant_type", Given(kind, "bnb_4bit_quant_type"))
        reading.values.setdefault("double_quant", Given(False, "bnb_4bit_use_double_quant"))


def _trained_part(reading: Reading) -> None:
    """The whole sequence is learned unless one of two switches says otherwise."""
    switches = [reading.values.pop(name, None) for name in ("answers_only", "completions_only")]
    given = [switch for switch in switches if switch is not None]
    if any(switch.value for switch in given):
        return
    first = given[0] if given else Given(False, "assistant_only_loss")
    reading.put("trains_prompt", True, first)


def _keep_only_given(reading: Reading) -> None:
    """A LoraConfig without training arguments: their defaults are not this file's."""
    kept = ("method", "rank", "alpha", "dropout", "targets", "quant_type", "double_quant")
    for name, given in list(reading.values.items()):
        if given.is_default and name not in kept:
            del reading.values[name]
    reading.values.pop("over_long", None)
    reading.values.pop("trains_prompt", None)
