"""LLaMA-Factory's YAML in the neutral vocabulary: `src/llamafactory/hparams`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from training.review import arguments
from training.review.known_keys import LLAMA_FACTORY, TRAINING_ARGUMENTS, listed
from training.review.values import Convert, flag, lower, names, number, present, text, whole
from training.review.words import Given, Reading, is_set

WORDS: Mapping[str, tuple[str, Convert]] = {
    **arguments.WORDS,
    "model_name_or_path": ("base", text),
    "finetuning_type": ("method", lower),
    "quantization_bit": ("bits", whole),
    "quantization_method": ("quant_method", lower),
    "quantization_type": ("quant_type", lower),
    "double_quantization": ("double_quant", flag),
    "lora_rank": ("rank", whole),
    "lora_alpha": ("alpha", number),
    "lora_dropout": ("dropout", number),
    "lora_target": ("targets", names),
    "additional_target": ("modules_to_save", names),
    "use_dora": ("use_dora", flag),
    "use_rslora": ("use_rslora", flag),
    "pissa_init": ("init", flag),
    "pissa_convert": ("init_converts", flag),
    "warmup_ratio": ("warmup_ratio", number),
    "cutoff_len": ("max_length", whole),
    "packing": ("packing", flag),
    "neat_packing": ("packing_isolates", flag),
    "flash_attn": ("attention", lower),
    "train_on_prompt": ("trains_prompt", flag),
    "template": ("template", text),
    "enable_thinking": ("thinking", flag),
    "pure_bf16": ("pure_bf16", flag),
    "disable_gradient_checkpointing": ("gradient_checkpointing", flag),
    "val_size": ("validation", number),
    "early_stopping_steps": ("early_stopping", whole),
    "resize_vocab": ("added_tokens", present),
    "add_tokens": ("added_tokens", present),
    "add_special_tokens": ("added_tokens", present),
    "trust_remote_code": ("trust_remote_code", flag),
    "use_unsloth": ("unsloth", flag),
    "stage": ("stage", lower),
    "max_samples": ("row_limit", whole),
}
OF_GENERATION = frozenset(
    {"predict_with_generate", "generation_max_length", "generation_num_beams", "generation_config", "sortish_sampler"}
)  # transformers.Seq2SeqTrainingArguments, beside TrainingArguments
KNOWN = LLAMA_FACTORY | TRAINING_ARGUMENTS | OF_GENERATION | {"warmup_ratio"}
V1 = frozenset({"dist_config", "train_dataset", "model_class", "init_config"})  # of its new format, which is not read
RENAMED = {"evaluation_strategy": "eval_strategy", "group_by_length": "train_sampling_strategy"}
MARKS = listed("""
finetuning_type lora_target lora_rank cutoff_len quantization_bit dataset_dir stage template neat_packing
val_size mask_history pissa_init use_unsloth additional_target
""")
DEFAULTS: Mapping[str, tuple[str, Any]] = {
    **arguments.DEFAULTS,
    "method": ("finetuning_type", "lora"),
    "quant_type": ("quantization_type", "nf4"),
    "double_quant": ("double_quantization", True),
    "rank": ("lora_rank", 8),
    "dropout": ("lora_dropout", 0.0),
    "targets": ("lora_target", "all"),
    "learning_rate": ("learning_rate", 5e-5),
    "max_length": ("cutoff_len", 2048),
    "thinking": ("enable_thinking", True),
    "gradient_checkpointing": ("disable_gradient_checkpointing", False),
    "validation": ("val_size", 0.0),
    "stage": ("stage", "sft"),
}


def finish(reading: Reading, raw: Mapping[str, Given]) -> None:
    """lora_alpha is twice the rank; rows are cut; checkpointing is on unless it is disabled."""
    values = reading.values
    if "alpha" not in values and (rank := values.get("rank")):
        values["alpha"] = Given(2.0 * rank.value if rank.value else None, "lora_alpha")
    if (init := values.get("init")) is not None:
        reading.put("init", "pissa" if init.value else None, init)
    if (method := values.pop("quant_method", None)) and method.value not in ("bnb", "bitsandbytes"):
        reading.put("quant_type", method.value, method)
    if (off := values.get("gradient_checkpointing")) is not None:
        reading.put("gradient_checkpointing", not off.value, off)
    if early := values.pop("early_stopping", None):
        reading.put("keeps_best", True, early)
    if is_set(raw, "eval_dataset"):
        values["validation"] = raw["eval_dataset"]
    if "packing" not in values and reading.value("packing_isolates"):
        reading.put("packing", True, values["packing_isolates"])
    values["over_long"] = Given("cut", values["max_length"].key, values["max_length"].line)
    values.setdefault("packing_isolates", Given(False, "neat_packing"))
