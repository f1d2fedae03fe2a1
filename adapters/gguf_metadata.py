"""What a GGUF file says of its model, in llama.cpp's keys: sizes, heads, rotary embedding, tokenizer, chat template.

Keys and value types: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and llama.cpp's llama-arch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapters.bases import BaseModel
from adapters.errors import BaseInvalid, Problem
from adapters.gguf_vocabulary import Vocabulary

Metadata = dict[str, tuple[str, Any]]  # key -> (gguf's name of the value type, value); STRINGS and INT32S are arrays
QUANTISATION_VERSION = 2
ARCHITECTURES = {"Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}
YARN_OWN = ("attention_factor", "mscale", "mscale_all_dim")
ROLE_KEYS = {"bos": "bos", "eos": "eos", "eot": "eot", "eom": "eom", "pad": "padding", "unk": "unknown"}


def architecture(base: BaseModel) -> str:
    """llama.cpp's name of the base's architecture."""
    return ARCHITECTURES[base.config["architectures"][0]]


def model_metadata(base: BaseModel, name: str) -> Metadata:
    """The keys of the model itself; raises BaseInvalid with all that llama.cpp has no word for."""
    config, arch = base.config, architecture(base)
    problems: list[Problem] = []
    heads = int(config["num_attention_heads"])
    head_dim = int(config.get("head_dim") or config["hidden_size"] // heads)
    numbers = {
        "context_length": int(config["max_position_embeddings"]),
        "embedding_length": int(config["hidden_size"]),
        "block_count": int(config["num_hidden_layers"]),
        "feed_forward_length": int(config["intermediate_size"]),
        "attention.head_count": heads,
        "attention.head_count_kv": int(config.get("num_key_value_heads") or heads),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
        "vocab_size": int(config["vocab_size"]),
    }
    metadata: Metadata = {
        "general.type": ("STRING", "model"),
        "general.name": ("STRING", name),
        **{f"{arch}.{key}": ("UINT32", value) for key, value in numbers.items()},
        f"{arch}.attention.layer_norm_rms_epsilon": ("FLOAT32", float(config["rms_norm_eps"])),
        **{f"{arch}.rope.{key}": value for key, value in _rope(config, problems).items()},
    }
    _check_layers(config, problems)
    if problems:
        raise BaseInvalid(
            f"llama.cpp cannot run {base.folder} as its config.json has it, so it is not written as GGUF.",
            problems=tuple(problems),
        )
    return metadata


def _check_layers(config: Mapping[str, Any], problems: list[Problem]) -> None:
    if config.get("hidden_act", "silu") != "silu":
        problems.append(_problem("hidden_act", f"is {config['hidden_act']!r}; llama.cpp computes silu"))
    if config.get("attention_bias"):
        problems.append(_problem("attention_bias", "is on; llama.cpp's Qwen3 layers have no biases"))
    kinds = config.get("layer_types") or ()
    first_windowed = int(config.get("max_window_layers", 0))
    windows = first_windowed < int(config["num_hidden_layers"]) if not kinds else "sliding_attention" in kinds
    window = config.get("sliding_window")
    if config.get("use_sliding_window") and window and windows and window < config["max_position_embeddings"]:
        problems.append(_problem("use_sliding_window", f"some layers see {window} tokens; llama.cpp's see all"))


def _rope(config: Mapping[str, Any], problems: list[Problem]) -> Metadata:
    """Base frequency and scaling, from `rope_parameters` or the older `rope_theta` and `rope_scaling`."""
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    found: Metadata = {"freq_base": ("FLOAT32", float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0))}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        problems.append(_problem("partial_rotary_factor", "only part of each head is rotated; llama.cpp rotates all"))
    if kind not in ("default", "linear", "yarn"):
        problems.append(_problem("rope_scaling", f"is {kind!r}; llama.cpp's Qwen layers do default, linear and yarn"))
    elif kind != "default":
        found["scaling.type"] = ("STRING", kind)
        found["scaling.factor"] = ("FLOAT32", float(rope["factor"]))
    if kind == "yarn":
        context = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
        found["scaling.original_context_length"] = ("UINT32", int(context))
        for key, standard in {**dict.fromkeys(YARN_OWN, None), "beta_fast": 32, "beta_slow": 1}.items():
            if rope.get(key) not in (None, standard):
                problems.append(_problem(f"rope_scaling.{key}", f"is {rope[key]!r}; llama.cpp takes yarn's own"))
        if rope.get("truncate", True) is not True:
            problems.append(_problem("rope_scaling.truncate", "is off; llama.cpp rounds the range of yarn"))
    return found


def _problem(key: str, message: str) -> Problem:
    return Problem("feature_not_supported", f"config.{key}", message, "export the format hf instead")


def vocabulary_metadata(vocabulary: Vocabulary, chat_template: str | None) -> Metadata:
    """The tokenizer's keys, and the template of a conversation."""
    prefix = "tokenizer.ggml."
    metadata: Metadata = {
        f"{prefix}model": ("STRING", "gpt2"),  # llama.cpp's word for byte-level BPE
        f"{prefix}pre": ("STRING", vocabulary.pre),
        f"{prefix}tokens": ("STRINGS", vocabulary.tokens),
        f"{prefix}token_type": ("INT32S", vocabulary.types),
        f"{prefix}merges": ("STRINGS", vocabulary.merges),
        **{f"{prefix}{ROLE_KEYS[role]}_token_id": ("UINT32", number) for role, number in vocabulary.special.items()},
        f"{prefix}add_bos_token": ("BOOL", vocabulary.adds_bos),
        f"{prefix}add_eos_token": ("BOOL", vocabulary.adds_eos),
    }
    if chat_template is not None:
        metadata["tokenizer.chat_template"] = ("STRING", chat_template)
    return metadata
