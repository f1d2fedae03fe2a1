"""The plan of a GGUF file: every tensor with its name, type and place, and the whole header, before a byte is written.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (version 3, little-endian). Norms, biases and
other vectors stay F32, as in llama.cpp's own files; Qwen2 and Qwen3 rows keep their order.
"""

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.bases import BaseModel
from adapters.chat_template import base_template
from adapters.checkpoint import StoredTensor, read_checkpoint
from adapters.errors import BaseInvalid, MergeFailed, Problem
from adapters.gguf_metadata import QUANTISATION_VERSION, Metadata, architecture, model_metadata, vocabulary_metadata
from adapters.gguf_types import BLOCK_SIZES, FILE_TYPES, TYPE_CODES, check_type, chosen_type, tensor_type
from adapters.gguf_vocabulary import read_vocabulary
from adapters.merge_plan import BLOCK_BOUND_BYTES, BLOCK_ELEMENTS, MAX_WORKERS, MergePlan, Update

Sourced = tuple[StoredTensor, Update | None, bool]  # and whether the weight is what NF4 leaves of it
ALIGNMENT = 32
# Far below what the smallest float16 step can tell from zero; without this the step's reciprocal may overflow.
NEGLIGIBLE = 2.0**-60
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
VALUE_TYPES = {"UINT32": (4, "<I"), "INT32": (5, "<i"), "FLOAT32": (6, "<f"), "BOOL": (7, "<?"), "STRING": (8, "")}
ARRAY, ARRAYS = 9, {"STRINGS": "STRING", "INT32S": "INT32"}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor of the file: `factor` times its source, plus its update, as `type` at byte `begin`."""

    name: str
    type: str
    source: StoredTensor
    begin: int
    update: Update | None = None
    factor: float = 1.0
    through_nf4: bool = False

    @property
    def is_copy(self) -> bool:
        is_same = self.update is None and self.factor == 1.0 and not self.through_nf4
        return is_same and self.type == self.source.dtype

    @property
    def size_bytes(self) -> int:
        return size_bytes(self.type, self.source.elements)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(rows, columns); a vector is a matrix of one column."""
        shape = self.source.shape
        return (shape[0], shape[1]) if len(shape) == 2 else (self.source.elements, 1)

    def row_blocks(self) -> Iterator[tuple[int, int]]:
        """(first row, end row) of every block."""
        rows, columns = self.matrix_shape
        step = max(1, BLOCK_ELEMENTS // max(1, columns))
        for first in range(0, rows, step):
            yield first, min(rows, first + step)


@dataclass(frozen=True)
class GgufPlan:
    """A whole file, decided. `fallbacks` maps tensors that could not have the type asked for to the one they get."""

    quantisation: str
    metadata: Metadata
    header: bytes
    tensors: tuple[GgufTensor, ...]
    fallbacks: Mapping[str, str]
    left_out: tuple[str, ...] = ()  # tensors of the base that llama.cpp has no use for
    notes: tuple[str, ...] = ()

    @property
    def size_bytes(self) -> int:
        return self.tensors[-1].begin + padded(self.tensors[-1].size_bytes)

    @property
    def memory_bound_bytes(self) -> int:
        """The most that writing holds at once, beside the header: blocks of all workers, A and B of modules in work."""
        largest = max((tensor.update.float32_bytes for tensor in self.tensors if tensor.update), default=0)
        return BLOCK_BOUND_BYTES + 2 * MAX_WORKERS * largest

    def as_dict(self) -> dict[str, Any]:
        """What a person may want to know of the file."""
        return {
            "quantisation": self.quantisation,
            "size_bytes": self.size_bytes,
            "tensors": dict(sorted(Counter(tensor.type for tensor in self.tensors).items())),
            "fallbacks": dict(self.fallbacks),
            "left_out": list(self.left_out),
            "pre_tokenizer": self.metadata.get("tokenizer.ggml.pre", ("", None))[1],
            "notes": list(self.notes),
        }


def plan_gguf(
    plan: MergePlan, *, quantisation: str, name: str, chat_template: str | None = None, tokenizer: Path | None = None
) -> GgufPlan:
    """The merge of `plan` as one GGUF file; template and tokenizer (a folder) are the base's own unless given.

    Raises InvalidRequest for an unknown quantisation, BaseInvalid for what llama.cpp cannot do as the base does it, and
    MergeFailed for a tensor without a name there.
    """
    if plan.is_shape_only:
        raise BaseInvalid(f"{plan.base.folder} holds no weights: it can be planned as a merge, not written as GGUF.")
    sources = [(one.source, one.update, one.through_nf4) for file in plan.files for one in file.tensors]
    return _plan(plan.base, sources, check_quantisation(quantisation), name, chat_template, tokenizer)


def plan_base_gguf(base: BaseModel, *, quantisation: str, name: str, chat_template: str | None = None) -> GgufPlan:
    """The base alone, for adapters to be loaded on; raises as plan_gguf does."""
    sources = [(tensor, None, False) for shard in read_checkpoint(base).values() for tensor in shard]
    return _plan(base, sources, check_quantisation(quantisation), name, chat_template)


def _plan(
    base: BaseModel,
    sources: Sequence[Sourced],
    wanted: str,
    name: str,
    chat_template: str | None,
    tokenizer: Path | None = None,
) -> GgufPlan:
    vocabulary = read_vocabulary(tokenizer or base.folder, base.config, generation=base.folder)
    template = chat_template if chat_template is not None else base_template(tokenizer or base.folder)
    metadata: Metadata = {
        "general.architecture": ("STRING", architecture(base)),
        **model_metadata(base, name),
        "general.file_type": ("UINT32", FILE_TYPES[wanted]),
        "general.quantization_version": ("UINT32", QUANTISATION_VERSION),
        **vocabulary_metadata(vocabulary, template),
    }
    found, left_out = _named(base, sources)
    layers = int(base.config["num_hidden_layers"])
    typed = [(name, tensor_type(name, sourced[0].shape, wanted, layers), sourced) for name, sourced in found]
    header, begins = encode_header(metadata, [(name, kind, source.shape) for name, kind, (source, _, _) in typed])
    tensors = tuple(
        GgufTensor(name, kind, source, begin, update, through_nf4=through_nf4)
        for (name, kind, (source, update, through_nf4)), begin in zip(typed, begins, strict=True)
    )
    matrices = (tensor for tensor in tensors if len(tensor.source.shape) == 2)
    fallbacks = {one.name: one.type for one in matrices if one.type != chosen_type(one.name, wanted, layers)}
    notes = vocabulary.notes if template is not None else (*vocabulary.notes, "The base has no chat template.")
    return GgufPlan(wanted.lower(), metadata, header, tensors, fallbacks, left_out, notes)


def check_quantisation(quantisation: str) -> str:
    """The tensor type of a quantisation's name; raises InvalidRequest."""
    return (check_type(quantisation) or "").upper()


def _named(base: BaseModel, sources: Sequence[Sourced]) -> tuple[list[tuple[str, Sourced]], tuple[str, ...]]:
    """Every tensor under llama.cpp's name, in order of the layers, and those that it has no use for."""
    named: list[tuple[str, Sourced]] = []
    left_out, problems = [], []
    for sourced in sources:
        name = sourced[0].name
        if name.endswith("rotary_emb.inv_freq") or (base.is_tied and name == "lm_head.weight"):
            left_out.append(name)  # a buffer of old checkpoints; a copy of the embedding, which llama.cpp takes
        elif (short := gguf_name(name)) is None:
            problems.append(Problem("tensor_set_invalid", name, "has no name in llama.cpp"))
        else:
            named.append((short, sourced))
    if problems:
        raise MergeFailed("The model has tensors that GGUF has no place for.", problems=tuple(problems))
    named.sort(key=lambda item: _place(item[0]))
    return named, tuple(sorted(left_out))


def gguf_name(name: str) -> str | None:
    """llama.cpp's name for a tensor of Qwen2 or Qwen3; None where it has none."""
    module, _, part = name.rpartition(".")
    if part == "weight" and module in OUTSIDE:
        return f"{OUTSIDE[module]}.weight"
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
    if layer and layer[2] in NAMES and part in ("weight", "bias"):
        return f"blk.{layer[1]}.{NAMES[layer[2]]}.{part}"
    return None


def _place(name: str) -> tuple[int, int, str]:
    parts = name.split(".")
    if parts[0] == "blk":
        return 1, int(parts[1]), name
    return (0 if parts[0] == "token_embd" else 2), 0, name


def size_bytes(kind: str, elements: int) -> int:
    """Bytes of so many elements of a type, in whole blocks."""
    block, size = BLOCK_SIZES[kind]
    return elements // block * size


def padded(size: int) -> int:
    """Up to the next multiple of the alignment."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def encode_header(
    metadata: Metadata, tensors: Sequence[tuple[str, str, tuple[int, ...]]]
) -> tuple[bytes, tuple[int, ...]]:
    """The file up to its first tensor, and at which byte of the file each (name, type, shape) begins."""
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    for key, (kind, value) in metadata.items():
        parts += [_string(key), *_value(kind, value)]
    offset, offsets = 0, []
    for name, kind, shape in tensors:
        offsets.append(offset)
        dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))  # the fastest varying first
        parts += [_string(name), dimensions, struct.pack("<IQ", TYPE_CODES[kind], offset)]
        offset += padded(size_bytes(kind, _elements(shape)))
    header = b"".join(parts)
    header += bytes(padded(len(header)) - len(header))
    return header, tuple(len(header) + offset for offset in offsets)


def _elements(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _value(kind: str, value: Any) -> Iterator[bytes]:
    if kind in ARRAYS:
        code, pattern = VALUE_TYPES[ARRAYS[kind]]
        yield struct.pack("<IIQ", ARRAY, code, len(value))
        yield from map(_string, value) if not pattern else (struct.pack(f"<{len(value)}{pattern[1]}", *value),)
    else:
        code, pattern = VALUE_TYPES[kind]
        yield struct.pack("<I", code)
        yield _string(value) if not pattern else struct.pack(pattern, value)


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw
