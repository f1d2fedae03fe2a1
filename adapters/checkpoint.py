"""A base checkpoint as tensors in safetensors files: read by header offsets, checked against its config.

The format: 8 bytes of little-endian header length, a JSON header (name -> dtype, shape, data_offsets), then the data
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from adapters.bases import WEIGHT_INDEX, BaseModel, module_shapes, weight_files
from adapters.errors import BaseInvalid, Problem

MAX_HEADER_BYTES = 100_000_000
ITEM_BYTES = dict.fromkeys(("F64", "I64", "U64"), 8) | dict.fromkeys(("F32", "I32", "U32"), 4)
ITEM_BYTES |= dict.fromkeys(("F16", "BF16", "I16", "U16"), 2) | dict.fromkeys(
    ("F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"), 1
)
# What a merge can compute with and write; `dtype` as config.json spells it.
FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor in a safetensors file: `size_bytes` bytes at `begin`, counted from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    begin: int

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def size_bytes(self) -> int:
        return self.elements * ITEM_BYTES[self.dtype]


def read_header(path: Path) -> list[StoredTensor]:
    """Every tensor of a safetensors file, in file order. Raises BaseInvalid unless they fill the file exactly."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 10 or length > min(MAX_HEADER_BYTES, size - 8):
            raise BaseInvalid(f"{path} is no safetensors file: {size} bytes with a header of {length}.")
        raw = file.read(length)
    try:
        entries = json.loads(raw)
        entries.pop("__metadata__", None)
        spans = {name: (entry["data_offsets"][0], entry["data_offsets"][1]) for name, entry in entries.items()}
        tensors = [
            StoredTensor(name, str(entry["dtype"]), tuple(map(int, entry["shape"])), path, 8 + length + spans[name][0])
            for name, entry in entries.items()
        ]
        tensors.sort(key=lambda tensor: (tensor.begin, tensor.size_bytes))
        _check_spans(path, tensors, {name: end - begin for name, (begin, end) in spans.items()}, 8 + length)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise BaseInvalid(f"{path} has a safetensors header that cannot be read: {error!r}.") from error
    return tensors


def _check_spans(path: Path, tensors: list[StoredTensor], spans: Mapping[str, int], start: int) -> None:
    position = start
    for tensor in tensors:
        if tensor.size_bytes != spans[tensor.name] or tensor.begin != position:
            raise BaseInvalid(f"{path}: the offsets of {tensor.name} do not fit its shape {list(tensor.shape)}.")
        position += tensor.size_bytes
    actual = path.stat().st_size
    if actual != position:
        raise BaseInvalid(f"{path} has {actual:,} bytes where its header needs {position:,}: download it again.")


def encode_header(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> bytes:
    """Length prefix and header for (name, dtype, shape) in file order, padded so that the data begins on 8 bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, dtype, shape in tensors:
        end = position + prod(shape) * ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read_checkpoint(base: BaseModel) -> dict[str, list[StoredTensor]]:
    """File name -> its tensors, for every weight file of a base; raises BaseInvalid with every tensor unaccounted for.

    The index, the headers and the config must tell one story: no tensor missing, surplus, doubled or of another shape.
    """
    shards = {path.name: read_header(path) for path in weight_files(base.folder)}
    if not shards:
        raise BaseInvalid(
            f"{base.folder} holds no safetensors weights (model.safetensors or an index with its shards)."
        )
    problems = [*_index_problems(base.folder, shards), *_config_problems(base.config, shards)]
    if problems:
        raise BaseInvalid(f"The weights of {base.folder} do not match its config and index.", problems=tuple(problems))
    return shards


def _index_problems(folder: Path, shards: Mapping[str, list[StoredTensor]]) -> list[Problem]:
    held = [(tensor.name, name) for name, tensors in shards.items() for tensor in tensors]
    counts = Counter(name for name, _ in held)
    problems = [_problem(name, f"is in {count} weight files") for name, count in counts.items() if count > 1]
    if (folder / WEIGHT_INDEX).is_file():
        indexed = set(json.loads((folder / WEIGHT_INDEX).read_bytes())["weight_map"].items())
        problems += [
            _problem(name, f"is in {file} but not so in the index") for name, file in sorted(set(held) - indexed)
        ]
        problems += [
            _problem(name, f"is not in {file}, where the index puts it") for name, file in sorted(indexed - set(held))
        ]
    return problems


def _config_problems(config: Mapping[str, Any], shards: Mapping[str, list[StoredTensor]]) -> list[Problem]:
    held = {tensor.name: tensor for tensors in shards.values() for tensor in tensors}
    required, optional = expected_tensors(config)
    known = {**required, **optional}
    problems = [_problem(name, "is missing from the weight files") for name in required if name not in held]
    for name, tensor in held.items():
        if name.endswith("rotary_emb.inv_freq"):  # a buffer that old checkpoints carry
            continue
        if name not in known:
            problems.append(_problem(name, "is not a tensor of this architecture"))
        elif tensor.shape != known[name]:
            problems.append(_problem(name, f"has shape {list(tensor.shape)}, the config says {list(known[name])}"))
        elif tensor.dtype not in FLOATS:
            problems.append(_problem(name, f"is {tensor.dtype}: a merge base has 16 or 32-bit float weights"))
    return problems


def _problem(name: str, message: str) -> Problem:
    return Problem("tensor_set_invalid", name, message, "use an unchanged download of the base")


def expected_tensors(config: Mapping[str, Any]) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """(required, optional) names with shapes of a Qwen2 or Qwen3 dense checkpoint, from its config alone."""
    hidden, vocabulary = int(config["hidden_size"]), int(config["vocab_size"])
    embedding = (vocabulary, hidden)
    is_qwen3 = str(config["architectures"][0]).startswith("Qwen3")
    required: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": embedding, "model.norm.weight": (hidden,)}
    optional: dict[str, tuple[int, ...]] = {}
    (optional if config.get("tie_word_embeddings") else required)["lm_head.weight"] = embedding
    for name, shape in module_shapes(config).items():
        required[f"{name}.weight"] = (shape.out_features, shape.in_features)
        if _has_bias(config, name, is_qwen3):
            required[f"{name}.bias"] = (shape.out_features,)
    for layer in range(int(config["num_hidden_layers"])):
        prefix = f"model.layers.{layer}"
        required[f"{prefix}.input_layernorm.weight"] = required[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
        if is_qwen3:
            head_dim = int(config.get("head_dim") or hidden // int(config["num_attention_heads"]))
            required[f"{prefix}.self_attn.q_norm.weight"] = required[f"{prefix}.self_attn.k_norm.weight"] = (head_dim,)
    return required, optional


def _has_bias(config: Mapping[str, Any], module: str, is_qwen3: bool) -> bool:
    """Qwen2 has biases on q, k and v; Qwen3 on all of q, k, v and o where its config asks for them."""
    projection = module.rpartition(".")[2]
    if is_qwen3:
        return bool(config.get("attention_bias")) and projection in {"q_proj", "k_proj", "v_proj", "o_proj"}
    return projection in {"q_proj", "k_proj", "v_proj"}
