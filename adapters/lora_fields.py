"""The fields of adapter_config.json, by what a value in them means for the saved tensors. Tables only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# What PEFT 0.21.2 writes for a LoraConfig nobody touched, and what older and other writers add (0.2: enable_lora,
# merge_weights, fan_in_fan_out; ms-swift: lora_dtype, lorap_*). A field with one of these values says nothing.
DEFAULTS: Mapping[str, tuple[Any, ...]] = {
    "alora_invocation_tokens": (None, []),
    "alpha_pattern": ({}, None),
    "arrow_config": (None,),
    "auto_mapping": (None,),
    "bias": ("none",),
    "corda_config": (None,),
    "ensure_weight_tying": (False,),
    "eva_config": (None,),
    "exclude_modules": (None, [], ""),
    "fan_in_fan_out": (False,),
    "inference_mode": (False, True),
    "init_lora_weights": (True, False),
    "kasa_config": (None,),
    "layer_replication": (None, []),
    "layers_pattern": (None, [], ""),
    "layers_to_transform": (None, []),
    "loftq_config": ({}, None),
    "lora_bias": (False,),
    "lora_dropout": (0.0, 0),
    "lora_ga_config": (None,),
    "megatron_config": (None, {}),
    "megatron_core": ("megatron.core", None),
    "modules_to_save": (None, []),
    "monteclora_config": (None,),
    "qalora_group_size": (16,),
    "rank_pattern": ({}, None),
    "revision": (None,),
    "runtime_config": ({"ephemeral_gpu_offload": False}, None, {}),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "use_bdlora": (None, False),
    "use_dora": (False, None),
    "use_qalora": (False,),
    "use_rslora": (False, None),
    "velora_config": (None,),
    "enable_lora": (None,),
    "merge_weights": (False,),
    "lora_dtype": (None,),
    "lorap_lr_ratio": (None,),
    "lorap_emb_lr": (1e-6,),
}
ESSENTIAL = ("peft_type", "r", "lora_alpha", "base_model_name_or_path", "task_type", "target_modules")

# Any value but the default is refused: it changes what the adapter computes, in a way no engine here serves.
UNSUPPORTED = {
    "alora_invocation_tokens": "aLoRA adapters act only after their invocation tokens",
    "arrow_config": "Arrow routes between several adapters",
    "kasa_config": "KaSA rescales the base weights by singular values",
    "layer_replication": "it duplicates layers of the base",
    "monteclora_config": "MonteCLoRA samples its weights",
    "target_parameters": "it adapts bare parameters, not linear layers",
    "use_bdlora": "BD-LoRA is block-diagonal",
    "use_qalora": "QALoRA pools its input",
    "enable_lora": "it adapts parts of fused projections",
}
# Any value but the default is refused: it names code, files or a mapping that a loader would follow.
FORBIDDEN = ("auto_map", "megatron_config", "megatron_core", "cache_file", "covariance_file")
# Accepted and kept, but the version can only be exported.
EXPORT_ONLY = {
    "use_dora": "DoRA rescales each output row by a trained magnitude; vLLM does not serve it",
    "lora_bias": "a bias on lora_B is not served by vLLM",
    "modules_to_save": "fully trained modules cannot be swapped per request",
    "trainable_token_indices": "trained token embeddings cannot be swapped per request",
}
EXPORT_ADVICE = {
    "use_dora": "Train with use_dora=False to serve it.",
    "lora_bias": "Train with lora_bias=False to serve it.",
    "modules_to_save": "Train without modules_to_save to serve it.",
    "trainable_token_indices": "Train without trainable_token_indices to serve it.",
    "bias": 'Train with bias="none" to serve it.',
}
# Chose layers, or shaped training only: no effect on what the saved tensors compute.
SELECTION = {
    "exclude_modules": (str, list),
    "layers_pattern": (str, list),
    "layers_to_transform": (int, list),
    "target_modules": (str, list),
}
TRAINING_ONLY = (
    "eva_config",
    "velora_config",
    "revision",
    "runtime_config",
    "qalora_group_size",
    "torch_dtype",
    "transformers_version",
    "unsloth_version",
)
# What people write beside PEFT's own fields: about the adapter, or about how it was trained. PEFT reads none of it.
ANNOTATIONS = (
    *("author", "description", "domain", "language", "license", "metadata", "name", "note", "notes", "tags", "task"),
    *("_name_or_path", "adapter_name", "base_model", "created_at", "dataset", "date", "framework", "library_name"),
    *("model_name", "model_type", "trainer", "version", "batch_size", "epochs", "learning_rate", "max_seq_length"),
    *("num_epochs", "num_train_epochs", "seed", "load_in_4bit", "load_in_8bit", "quantization_config"),
    "loraplus_lr_ratio",
)
TRAINING_ONLY_FLAGS = ("ensure_weight_tying", "fan_in_fan_out", "inference_mode", "merge_weights")
PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")
SUBTRACTED_INITS = ("pissa", "olora", "loftq", "corda", "lora_ga")
TASK_TYPES = ("", "CAUSAL_LM")
# Name the class that PEFT wraps around the base, and add nothing to it.
CLAIMED_TASKS = ("SEQ_2_SEQ_LM", "FEATURE_EXTRACTION")
CLASSIFIER_TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
# Names that hand-made configs use for the two numbers that every LoRA needs, less case and separators.
LOOK_ALIKES: Mapping[str, tuple[str, ...]] = {
    "r": ("rank", "lorar", "lorarank", "dim", "loradim", "networkdim"),
    "lora_alpha": ("alpha", "networkalpha", "loraalfa", "lorascale", "scale", "scaling"),
}
