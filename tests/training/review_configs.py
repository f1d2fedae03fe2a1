"""A config of each dialect that no rule of the review has anything to say about."""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]
LLAMA_FACTORY: Config = {
    "model_name_or_path": "Qwen/Qwen3-4B-Instruct-2507",
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "lora",
    "lora_rank": 16,
    "lora_alpha": 32,
    "lora_target": "all",
    "dataset": "tickets",
    "template": "qwen3_nothink",
    "cutoff_len": 4096,
    "output_dir": "saves/tickets",
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 4,
    "learning_rate": "2e-4",
    "num_train_epochs": 3.0,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.05,
    "bf16": True,
    "val_size": 0.1,
    "eval_strategy": "steps",
    "eval_steps": 50,
    "load_best_model_at_end": True,
    "seed": 17,
    "report_to": "tensorboard",
}
AXOLOTL: Config = {
    "base_model": "Qwen/Qwen2.5-7B-Instruct",
    "load_in_4bit": True,
    "adapter": "qlora",
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_target_linear": True,
    "chat_template": "tokenizer_default",
    "datasets": [{"path": "tickets.jsonl", "type": "chat_template", "message_property_mappings": {"role": "from"}}],
    "val_set_size": 0.1,
    "sequence_len": 4096,
    "sample_packing": True,
    "flash_attention": True,
    "micro_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "num_epochs": 3,
    "optimizer": "adamw_bnb_8bit",
    "lr_scheduler": "cosine",
    "learning_rate": 0.0002,
    "warmup_ratio": 0.05,
    "bf16": "auto",
    "gradient_checkpointing": True,
    "evals_per_epoch": 4,
    "early_stopping_patience": 3,
    "seed": 17,
    "use_tensorboard": True,
    "special_tokens": {"pad_token": "<|endoftext|>"},
}
TRL: Config = {
    "model": {"model_name_or_path": "Qwen/Qwen3-1.7B", "attn_implementation": "flash_attention_2"},
    "sft_config": {
        "output_dir": "out",
        "max_length": 2048,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "learning_rate": 2e-4,
        "num_train_epochs": 3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "assistant_only_loss": True,
        "bf16": True,
        "eval_strategy": "steps",
        "load_best_model_at_end": True,
        "seed": 17,
        "report_to": "tensorboard",
    },
    "lora_config": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"},
}
PEFT: Config = {
    "peft_type": "LORA",
    "base_model_name_or_path": "Qwen/Qwen2.5-1.5B-Instruct",
    "r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.0,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "init_lora_weights": True,
    "bias": "none",
}
OURS: Config = {"data": "tickets.jsonl", "name": "tickets", "base": "Qwen/Qwen3-4B", "method": "lora", "seed": 17}
CLEAN = {"llama-factory": LLAMA_FACTORY, "axolotl": AXOLOTL, "trl": TRL, "peft": PEFT, "hotshoe": OURS}
