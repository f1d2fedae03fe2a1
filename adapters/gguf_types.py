"""Which types a GGUF export can be asked for, and their names."""

from __future__ import annotations

from adapters.errors import InvalidRequest

QUANTISATIONS = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
LORA_TYPES = ("f32", "f16")
# Of a weight, the scales of its block included: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
BITS = {"f32": 32.0, "f16": 16.0, "bf16": 16.0, "q8_0": 8.5, "q5_1": 6.0, "q5_0": 5.5, "q4_1": 5.0, "q4_0": 4.5}
SPELLINGS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


def check_type(dtype: str | None, *, is_lora: bool = False) -> str | None:
    """The type's own name, in lower case; None for None. Raises InvalidRequest."""
    if dtype is None:
        return None
    name, allowed = SPELLINGS.get(dtype.lower(), dtype.lower()), LORA_TYPES if is_lora else QUANTISATIONS
    if name not in allowed:
        form = "gguf-lora" if is_lora else "gguf"
        raise InvalidRequest(f"dtype {dtype[:40]!r} is not one of {', '.join(allowed)} for {form}.", param="dtype")
    return name
