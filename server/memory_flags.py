"""The engine's flags, as far as its memory goes: what they say of sizes, and where they make the arithmetic impossible.

vLLM's own parser decides what a flag means; this reader of ours is for a start that says its figures at once. A flag
in a spelling that it does not know (an abbreviation), a value that it cannot read and a feature that it does not
compute make a size unknown, and nothing is ever refused for a size that is unknown.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from adapters.bases import stored_dtype
from server.engine.vllm_flags import OWN_FLAGS, flag_name
from server.memory import Layout

DTYPE_BYTES = {"float32": 4, "float": 4, "float16": 2, "half": 2, "bfloat16": 2}
KV_DTYPE_BYTES = {**DTYPE_BYTES, "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1, "fp8_inc": 1}
CPU_BLOCK_TOKENS, GPU_BLOCK_TOKENS = 128, 16  # vLLM's own
MEMORY_FRACTION = 0.92  # vLLM's own --gpu-memory-utilization
SHORT = {
    "tp": "tensor-parallel-size", "pp": "pipeline-parallel-size", "q": "quantization", "sc": "speculative-config",
    "dcp": "decode-context-parallel-size", "pcp": "prefill-context-parallel-size",
}  # fmt: skip
READ = frozenset({
    "block-size", "dtype", "fully-sharded-loras", "gpu-memory-utilization", "kv-cache-dtype", "kv-cache-memory-bytes",
    "lora-dtype", "max-cpu-loras", "max-lora-rank", "max-loras", "max-model-len", "pipeline-parallel-size",
    "tensor-parallel-size",
})  # fmt: skip
ANOTHER_MODEL = frozenset({"hf-config-path", "hf-overrides", "model-impl", "spec-method", "spec-model"})
ANOTHER_MODEL |= {"speculative-config"}
OTHER_WEIGHTS = ANOTHER_MODEL | {"cpu-offload-gb", "load-format", "model-loader-extra-config", "quantization"}
OTHER_WEIGHTS |= {"offload-backend", "offload-group-size", "quantization-config"}
OTHER_CACHE = ANOTHER_MODEL | {"num-gpu-blocks-override", "kv-cache-dtype-skip-layers", "kv-sharing-fast-prefill"}
OTHER_CACHE |= {"decode-context-parallel-size", "prefill-context-parallel-size", "kv-transfer-config"}
RELEVANT = READ | OTHER_WEIGHTS | OTHER_CACHE
UNREADABLE = "?"
NUMBER, FRACTION = re.compile(r"-?\d*\.?\d+"), re.compile(r"0?\.\d+|1(\.0*)?")
READABLE = re.compile(r"(\d+(?:\.\d+)?)([kKmMgGtT]?)")
POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def read_layout(flags: Sequence[str], config: Mapping[str, Any], *, is_cpu: bool, has_kernel: bool = False) -> Layout:
    """How an engine with these flags on a base of this config is laid out. Ours among the flags are all there."""
    given = given_flags(flags)
    dtype = _dtype_bytes(given.get("dtype", "auto"), config)
    loras = given.get("lora-dtype", "auto")
    block = CPU_BLOCK_TOKENS if is_cpu else GPU_BLOCK_TOKENS
    fraction = given.get("gpu-memory-utilization", str(MEMORY_FRACTION))
    return Layout(
        is_cpu=is_cpu,
        max_loras=int(given.get("max-loras", 0)),  # an engine without LoRA has none of the three
        max_rank=int(given.get("max-lora-rank", 0)),
        staged_limit=int(given.get("max-cpu-loras", 0)),
        dtype_bytes=dtype,
        lora_bytes=dtype if loras == "auto" else DTYPE_BYTES.get(loras),
        kv_bytes=_kv_bytes(given, config, dtype),
        context_tokens=_context_tokens(given, config),
        block_tokens=_count(given.get("block-size", str(block))),
        tensor_parallel=_count(given.get("tensor-parallel-size", "1")),
        pipeline_parallel=_count(given.get("pipeline-parallel-size", "1")),
        is_fully_sharded="fully-sharded-loras" in given,
        slots_are_pointers=has_kernel and "fully-sharded-loras" not in given,
        has_plain_weights=not config.get("quantization_config") and not OTHER_WEIGHTS & given.keys(),
        kv_cache_bytes=_count(given.get("kv-cache-memory-bytes", "")),
        memory_fraction=float(fraction) if FRACTION.fullmatch(fraction) else None,
    )


def given_flags(words: Sequence[str]) -> dict[str, str]:
    """The flags that matter here by their whole names, each with its last value; `?` for one that may be meant."""
    found: dict[str, str] = {}
    for word, after in zip(words, [*words[1:], "--"], strict=True):
        if not _is_flag(word):
            continue
        name = flag_name(word)
        if not word.startswith("--"):
            name = SHORT.get(name, name)
        value = word.partition("=")[2] if "=" in word else "" if _is_flag(after) else after
        if name in RELEVANT:
            found[name] = value
        elif word.startswith("--") and name not in OWN_FLAGS:  # argparse takes the beginning of a name for the name
            found |= {whole: UNREADABLE for whole in RELEVANT - OWN_FLAGS.keys() if whole.startswith(name)}
    return found


def _is_flag(word: str) -> bool:
    return word.startswith("-") and not NUMBER.fullmatch(word)


def _dtype_bytes(asked: str, config: Mapping[str, Any]) -> int | None:
    """vLLM's `auto` serves every float checkpoint in 16 bits."""
    if asked == "auto":
        return 2 if stored_dtype(config) in DTYPE_BYTES else None
    return DTYPE_BYTES.get(asked)


def _kv_bytes(given: Mapping[str, str], config: Mapping[str, Any], dtype_bytes: int | None) -> int | None:
    asked = given.get("kv-cache-dtype", "auto")
    if OTHER_CACHE & given.keys():
        return None
    if asked == "auto":
        names_cache = "kv_cache" in json.dumps(config.get("quantization_config") or {}, default=str)
        return None if names_cache else dtype_bytes
    return KV_DTYPE_BYTES.get(asked)


def _context_tokens(given: Mapping[str, str], config: Mapping[str, Any]) -> int | None:
    if "max-model-len" in given:
        return _count(given["max-model-len"])
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    is_scaled = (scaling.get("rope_type") or scaling.get("type") or "default") != "default"
    if is_scaled or ANOTHER_MODEL & given.keys():
        return None
    return int(config["max_position_embeddings"])


def _count(text: str) -> int | None:
    """A whole number above zero as vLLM writes them: `4096`, `4k` for 4,000, `4K` for 4,096."""
    match = READABLE.fullmatch(text.strip())
    if match is None:
        return None
    number, unit = match.groups()
    step = 1000 if unit.islower() else 1024
    return int(float(number) * step ** POWERS[unit.lower()]) or None
