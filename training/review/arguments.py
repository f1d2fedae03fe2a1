"""transformers' TrainingArguments in the neutral vocabulary, and their defaults: LLaMA-Factory and TRL use both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from training.review.values import Convert, flag, lower, names, number, present, text, whole

WORDS: Mapping[str, tuple[str, Convert]] = {
    "learning_rate": ("learning_rate", number),
    "lr_scheduler_type": ("scheduler", lower),
    "warmup_steps": ("warmup_steps", number),
    "weight_decay": ("weight_decay", number),
    "max_grad_norm": ("max_gradient_norm", number),
    "optim": ("optimizer", lower),
    "num_train_epochs": ("epochs", number),
    "max_steps": ("max_steps", whole),
    "per_device_train_batch_size": ("batch", whole),
    "gradient_accumulation_steps": ("accumulation", whole),
    "bf16": ("bf16", flag),
    "fp16": ("fp16", flag),
    "eval_strategy": ("evaluates", present),
    "load_best_model_at_end": ("keeps_best", flag),
    "metric_for_best_model": ("best_by", lower),
    "seed": ("seed", whole),
    "save_strategy": ("saves", present),
    "save_steps": ("save_steps", number),
    "neftune_noise_alpha": ("neftune", number),
    "report_to": ("reports", names),
    "use_cpu": ("on_cpu", flag),
    "deepspeed": ("devices", text),
}
DEFAULTS: Mapping[str, tuple[str, Any]] = {
    "scheduler": ("lr_scheduler_type", "linear"),
    "warmup_steps": ("warmup_steps", 0.0),
    "weight_decay": ("weight_decay", 0.0),
    "max_gradient_norm": ("max_grad_norm", 1.0),
    "epochs": ("num_train_epochs", 3.0),
    "batch": ("per_device_train_batch_size", 8),
    "accumulation": ("gradient_accumulation_steps", 1),
    "seed": ("seed", 42),
    "saves": ("save_strategy", True),
    "save_steps": ("save_steps", 500.0),
}
