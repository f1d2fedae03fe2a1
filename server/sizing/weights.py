"""Bytes of a base's weights from its config.json alone, whole or divided over GPUs, in 16 bits, 32 or quantised.

    layer   = sum of in * out over the seven projections + biases of q, k, v (Qwen2) or head norms (Qwen3) + two norms
    model   = layers * layer + last norm + embeddings + output layer, where it is not tied
    CPU     = and a packed copy of embeddings and output layer, of each its own also where the two are one
    N GPUs  = projections, their biases, embeddings and output layer divided; norms whole; a key-value head that has no
              share is whole on each

Quantised are the projections only; bits of one weight:

    fp8         8                           `--quantization fp8`, one float32 scale a matrix (vllm Fp8LinearMethod)
    awq, gptq   b + (16 + b) / group size   a 16-bit scale and a zero point of b bits a group (AutoAWQ's, AutoGPTQ's)
    nf4         4 + 8 / 64 + 32 / (64*256)  blocks of 64, scales quantised in turn (QLoRA, arXiv 2305.14314, section 3)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapters.errors import ConfigInvalid
from server.memory import layer_projections, vocabulary_copies
from server.sizing.parts import Form

BIASED = ("q_proj", "k_proj", "v_proj")
VOCABULARY_PADDING = 64  # DEFAULT_VOCAB_PADDING_SIZE in vllm/model_executor/layers/vocab_parallel_embedding.py
QUANTIZATIONS = ("awq", "gptq", "fp8", "nf4")


def bits_of_a_weight(form: Form) -> float:
    """Bits that one weight of a projection takes, its share of scales included; raises ConfigInvalid."""
    if form.quantization is None:
        return 8.0 * form.dtype_bytes
    if form.quantization in ("awq", "gptq"):
        return form.bits + (16 + form.bits) / form.group_size
    if form.quantization == "fp8":
        return 8.0
    if form.quantization == "nf4":
        return 4 + 8 / 64 + 32 / (64 * 256)
    raise ConfigInvalid(
        f"quantization is {form.quantization!r}; known are {', '.join(QUANTIZATIONS)}. Size the base without it, or "
        "start the engine and read what it reports in /v1/system.",
        param="quantization",
    )


def projection_weights(config: Mapping[str, Any], split: int = 1) -> int:
    """Weights of all layers' projections in one of `split` workers."""
    layer = sum(inside * outside for _, inside, outside in layer_projections(config, split))
    return layer * int(config["num_hidden_layers"])


def other_weights(config: Mapping[str, Any], split: int = 1) -> int:
    """Norms, biases, embeddings and output layer in one of `split` workers: what is never quantised."""
    hidden, layers = int(config["hidden_size"]), int(config["num_hidden_layers"])
    small = 2 * hidden
    if config["architectures"][0] == "Qwen2ForCausalLM":
        small += sum(outside for name, _, outside in layer_projections(config, split) if name in BIASED)
    else:
        small += 2 * int(config.get("head_dim") or hidden // int(config["num_attention_heads"]))
    matrices = 1 if config.get("tie_word_embeddings") else 2
    return layers * small + hidden + matrices * _vocabulary(config, split)


def parameters(config: Mapping[str, Any]) -> int:
    """The base's parameters, a tied output layer counted once."""
    hidden, vocabulary = int(config["hidden_size"]), int(config["vocab_size"])
    matrices = 1 if config.get("tie_word_embeddings") else 2
    padding = matrices * (_vocabulary(config, 1) - vocabulary * hidden)
    return projection_weights(config) + other_weights(config) - padding


def served_weights_bytes(config: Mapping[str, Any], form: Form, *, is_cpu: bool, split: int = 1) -> int:
    """What the weights take in one of `split` workers; raises ConfigInvalid for a quantisation that is not known."""
    if is_cpu and form.quantization is not None:
        raise ConfigInvalid(
            f"quantization is {form.quantization!r} and the device is a CPU, where its layout is not known here: size "
            "the base unquantised, or a GPU.",
            param="quantization",
        )
    others = other_weights(config, split)
    if is_cpu:
        others += vocabulary_copies(_vocabulary(config, split), _vocabulary(config, split))
    projections = projection_weights(config, split) * bits_of_a_weight(form) / 8
    return int(projections) + others * form.dtype_bytes


def _vocabulary(config: Mapping[str, Any], split: int) -> int:
    """Numbers of one matrix of the vocabulary's size in one worker: rows padded, then divided."""
    rows = -(-int(config["vocab_size"]) // VOCABULARY_PADDING) * VOCABULARY_PADDING
    return -(-rows // split) * int(config["hidden_size"])
