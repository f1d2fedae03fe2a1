"""Which types a GGUF export can be asked for, their names, and which type each tensor gets."""

from __future__ import annotations

from collections.abc import Sequence

from adapters.errors import InvalidRequest
from adapters.llamacpp import missing

QUANTISATIONS = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
K_QUANTS = ("q6_k", "q5_k_m", "q4_k_m")  # made by llama.cpp's own code, where it is installed
LORA_TYPES = ("f32", "f16")
# Of a weight, the scales of its block included: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
BITS = {"f32": 32.0, "f16": 16.0, "bf16": 16.0, "q8_0": 8.5, "q5_1": 6.0, "q5_0": 5.5, "q4_1": 5.0, "q4_0": 4.5}
BITS |= {"q6_k": 6.5625, "q5_k_m": 5.7, "q4_k_m": 4.85}  # of the mixtures about
SPELLINGS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
TYPE_CODES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "BF16": 30}  # ggml_type
TYPE_CODES |= {"Q4_K": 12, "Q5_K": 13, "Q6_K": 14}
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "BF16": 32}  # llama_ftype
FILE_TYPES |= {"Q4_K_M": 15, "Q5_K_M": 17, "Q6_K": 18}
BLOCK_SIZES = {"F32": (1, 4), "F16": (1, 2), "BF16": (1, 2)}  # elements and bytes of a block
BLOCK_SIZES |= {"Q8_0": (32, 34), "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24)}
BLOCK_SIZES |= {"Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210)}
MIXTURES = {"Q5_K_M": "Q5_K", "Q4_K_M": "Q4_K"}
# Of a matrix whose rows are not whole blocks, as llama.cpp has it for K-quants; at last F16.
FALLBACKS = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
FALLBACK = "F16"
EMBEDDINGS = ("token_embd.weight", "output.weight")  # more bits than the rest: they lose the most by rounding
SENSITIVE = ("attn_v.weight", "ffn_down.weight")  # Q6_K in some layers of a mixture, as in llama.cpp's own


def check_type(dtype: str | None, *, is_lora: bool = False) -> str | None:
    """The type's own name, in lower case; None for None. Raises InvalidRequest."""
    if dtype is None:
        return None
    known = LORA_TYPES if is_lora else (*QUANTISATIONS, *K_QUANTS)
    name = SPELLINGS.get(dtype.lower(), dtype.lower())
    if name not in known:
        form = "gguf-lora" if is_lora else "gguf"
        raise InvalidRequest(f"dtype {dtype[:40]!r} is not one of {', '.join(known)} for {form}.", param="dtype")
    if name in K_QUANTS and (reason := missing()):
        raise InvalidRequest(f"{name} is made by llama.cpp's own code. {reason}.", param="dtype")
    return name


def tensor_type(name: str, shape: Sequence[int], wanted: str, layers: int) -> str:
    """The type of one tensor: vectors are F32, and a row that is no whole number of blocks falls back."""
    if len(shape) < 2:
        return "F32"
    kind = chosen_type(name, wanted, layers)
    while shape[1] % BLOCK_SIZES[kind][0]:
        kind = FALLBACKS.get(kind, FALLBACK)
    return kind


def chosen_type(name: str, wanted: str, layers: int) -> str:
    """The type of a matrix in a file of the type `wanted`, whatever its width."""
    is_k = wanted.lower() in K_QUANTS
    if name in EMBEDDINGS and BLOCK_SIZES[MIXTURES.get(wanted, wanted)][0] > 1:
        return "Q6_K" if is_k else "Q8_0"
    if wanted in MIXTURES and name.endswith(SENSITIVE) and _has_more_bits(int(name.split(".")[1]), layers):
        return "Q6_K"
    return MIXTURES.get(wanted, wanted)


def _has_more_bits(layer: int, layers: int) -> bool:
    """The first and last eighth of the layers, and every third between (`use_more_bits` in llama-quant.cpp)."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
