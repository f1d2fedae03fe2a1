"""Our own config, and the settings of a run of ours, in the neutral vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from training.config import SMALL_MODEL_PARAMETERS, Facts, TrainingConfig, choose, held_out
from training.review.facts import Known
from training.review.values import Convert, flag, lower, names, number, strict_flag, text, whole
from training.review.words import Given, Reading, is_set

WORDS: Mapping[str, tuple[str, Convert]] = {
    "base": ("base", text),
    "method": ("method", lower),
    "rank": ("rank", whole),
    "alpha": ("alpha", number),
    "dropout": ("dropout", number),
    "target_modules": ("targets", names),
    "use_rslora": ("use_rslora", strict_flag),
    "learning_rate": ("learning_rate", number),
    "scheduler": ("scheduler", lower),
    "warmup_ratio": ("warmup_ratio", number),
    "weight_decay": ("weight_decay", number),
    "max_gradient_norm": ("max_gradient_norm", number),
    "optimizer": ("optimizer", lower),
    "epochs": ("epochs", number),
    "batch_size": ("batch", whole),
    "max_length": ("max_length", whole),
    "over_long": ("over_long", lower),
    "dtype": ("dtype", lower),
    "gradient_checkpointing": ("gradient_checkpointing", flag),
    "validation_share": ("validation", number),
    "patience": ("keeps_best", whole),
    "seed": ("seed", whole),
    "checkpoint_steps": ("save_steps", whole),
    "data_check": ("checks_data", strict_flag),
    "report_to": ("reports", names),
}
# What a run's own settings have beside what a config asks for.
OF_A_RUN = frozenset({"pass_size", "accumulation", "evaluation_pass_size", "steps", "evaluation_steps", "optimizer"})
# Settings that `hotshoe train` chooses by the data and the base, with a word here.
OPEN = (
    *("rank", "alpha", "learning_rate", "epochs", "batch_size"),
    *("gradient_checkpointing", "optimizer", "checkpoint_steps"),
)
KNOWN = frozenset({item.name for item in fields(TrainingConfig)} | {"from"}) | OF_A_RUN
MARKS = frozenset({"data", "name", "tokens_per_pass", "over_long", "supervise", "columns", "evaluations", "from"})
DEFAULTS: Mapping[str, tuple[str, Any]] = {
    "dropout": ("dropout", 0.0),
    "weight_decay": ("weight_decay", 0.0),
    "max_gradient_norm": ("max_gradient_norm", 1.0),
    "scheduler": ("scheduler", "cosine"),
    "warmup_ratio": ("warmup_ratio", 0.05),
    "over_long": ("over_long", "error"),
    "seed": ("seed", 17),
}


def chosen(reading: Reading, config: TrainingConfig, known: Known) -> None:
    """What `hotshoe train` would choose for this data and base where the file leaves a setting open."""
    data, base = known.data, known.base
    if data is None:
        return
    held = held_out(data.rows, config.validation_share) if config.validation is None else 0
    facts = Facts(
        rows=data.rows - held,
        longest_row_tokens=data.longest,
        has_validation=bool(held or config.validation),
        parameters=int(base.parameters or SMALL_MODEL_PARAMETERS),
        context_length_tokens=base.context_length_tokens or data.longest or 1,
        base_dtype="float32" if known.is_cpu else "bfloat16",
        device="cpu" if known.is_cpu or known.gpu is None else "cuda",
        device_memory_bytes=1 << 50,  # the memory decides between lora and qlora, which is not reviewed here
        has_bfloat16=not known.is_cpu,
    )
    settings = choose(config, facts).as_dict()
    for key in OPEN:
        if key in settings:
            reading.values.setdefault(WORDS[key][0], Given(settings[key], key))
    reading.values.setdefault("validation", Given(held, "validation_share"))


def finish(reading: Reading, raw: Mapping[str, Given]) -> None:
    """QLoRA is LoRA on four bits; a dtype is one of two switches; a validation file wins over a share."""
    values = reading.values
    if (method := values.get("method")) and method.value == "qlora":
        reading.put("method", "lora", method)
        reading.put("bits", 4, method)
        reading.put("quant_type", "nf4", method)
        reading.put("double_quant", True, method)
    dtype = values.pop("dtype", None)
    if dtype is not None:
        reading.put("bf16", dtype.value == "bfloat16", dtype)
        reading.put("fp16", dtype.value == "float16", dtype)
    if is_set(raw, "validation"):
        values["validation"] = raw["validation"]
    if patience := values.get("keeps_best"):
        reading.put("keeps_best", True, patience)  # the best adapter is kept, whether or not the run stops early
    reading.values.setdefault("accumulation", Given(1, "batch_size"))
