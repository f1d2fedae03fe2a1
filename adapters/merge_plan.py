"""The plan of a merge: every tensor of base and adapter accounted for, every size known, before a byte is written."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from adapters.bases import SINGLE_WEIGHTS, BaseModel, stored_dtype
from adapters.checkpoint import (
    FLOATS,
    ITEM_BYTES,
    StoredTensor,
    encode_header,
    expected_tensors,
    read_checkpoint,
    read_header,
)
from adapters.errors import BaseInvalid, InvalidRequest, MergeFailed, Problem

BLOCK_ELEMENTS = 1 << 20
NF4_BLOCK = 64  # weights that share a scale in NF4
MAX_WORKERS = 4
BLOCK_BOUND_BYTES = MAX_WORKERS * BLOCK_ELEMENTS * (4 + 4 + 4 + 4)  # as read, the result, B @ A, as written; 64 MiB
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KEY_PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class Update:
    """What the adapter adds to one module: scaling * B @ A with A (rank, in_features) and B (out_features, rank)."""

    module: str
    scaling: float
    a: StoredTensor
    b: StoredTensor

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def float32_bytes(self) -> int:
        return 4 * (self.a.elements + self.b.elements)


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One tensor of the output: where it comes from, what is added, and where in its file it goes."""

    source: StoredTensor
    dtype: str
    begin: int
    update: Update | None = None
    through_nf4: bool = False  # W is what NF4 leaves of it, see adapters/nf4.py

    @property
    def is_copy(self) -> bool:
        return self.update is None and self.dtype == self.source.dtype and not self.through_nf4

    @property
    def size_bytes(self) -> int:
        return self.source.elements * ITEM_BYTES[self.dtype]

    def row_blocks(self) -> Iterator[tuple[int, int]]:
        """(first row, end row) of every block; a vector is a matrix of one column."""
        rows, columns = self.matrix_shape
        step = max(1, BLOCK_ELEMENTS // max(1, columns))
        for first in range(0, rows, step):
            yield first, min(rows, first + step)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        shape = self.source.shape
        return (shape[0], self.source.elements // max(1, shape[0])) if len(shape) > 1 else (self.source.elements, 1)


@dataclass(frozen=True, slots=True)
class PlannedFile:
    name: str
    header: bytes
    tensors: tuple[PlannedTensor, ...]

    @property
    def size_bytes(self) -> int:
        return len(self.header) + sum(tensor.size_bytes for tensor in self.tensors)


@dataclass(frozen=True)
class MergePlan:
    """Everything a merge will do, decided from headers and configs. `dtype` is None for the base's own."""

    adapter: Path | None
    base: BaseModel
    dtype: str | None
    files: tuple[PlannedFile, ...]
    is_shape_only: bool = False
    through_nf4: bool = False

    @cached_property
    def updates(self) -> tuple[Update, ...]:
        return tuple(tensor.update for file in self.files for tensor in file.tensors if tensor.update)

    @property
    def weight_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)

    @property
    def changed_bytes(self) -> int:
        return sum(tensor.size_bytes for file in self.files for tensor in file.tensors if not tensor.is_copy)

    @property
    def memory_bound_bytes(self) -> int:
        """The most that a merge holds at once: the blocks of all workers, and A and B of every module in work."""
        return BLOCK_BOUND_BYTES + 2 * MAX_WORKERS * max((update.float32_bytes for update in self.updates), default=0)

    @property
    def index(self) -> dict[str, Any] | None:
        """The weight index of the output; None where the base has a single file without one."""
        if not self.is_sharded:
            return None
        tensors = [(tensor, file.name) for file in self.files for tensor in file.tensors]
        total = sum(tensor.size_bytes for tensor, _ in tensors)
        return {
            "metadata": {"total_size": total},
            "weight_map": {
                tensor.source.name: name for tensor, name in sorted(tensors, key=lambda pair: pair[0].source.name)
            },
        }

    @property
    def is_sharded(self) -> bool:
        return [file.name for file in self.files] != [SINGLE_WEIGHTS]

    def as_dict(self) -> dict[str, Any]:
        """What a person may want to know before it runs."""
        return {
            "files": {file.name: file.size_bytes for file in self.files},
            "weight_bytes": self.weight_bytes,
            "changed_bytes": self.changed_bytes,
            "changed_tensors": len(self.updates),
            "memory_bound_bytes": self.memory_bound_bytes,
            "ranks": sorted({update.rank for update in self.updates}),
            "scalings": sorted({update.scaling for update in self.updates}),
            "dtype": self.dtype or "as the base",
            "is_shape_only": self.is_shape_only,
        }


def plan_merge(
    adapter: Path | None,
    base: BaseModel,
    *,
    dtype: str | None = None,
    shard_bytes: int | None = None,
    through_nf4: bool = False,
    allow_shape_only: bool = False,
) -> MergePlan:
    """Account for every tensor of base and adapter; raises BaseInvalid or MergeFailed with all that does not fit.

    `adapter` is a PEFT-layout folder, canonical or not; None plans the base as it is. `dtype` is float32, bfloat16 or
    float16 for all weights. `shard_bytes` lays the tensors out anew, in files of at most so many bytes (a larger tensor
    has one to itself). `through_nf4` merges into what NF4 leaves of each projection. A base without weights is planned
    from its config when `allow_shape_only`; such a plan can be read but not merged.
    """
    code = check_inputs(base, dtype)
    is_shape_only = allow_shape_only and not any(base.folder.glob("*.safetensors"))
    shards = _shape_only_shards(base) if is_shape_only else read_checkpoint(base)
    if shard_bytes is not None:
        shards = _laid_out(shards, code, shard_bytes)
    if through_nf4:
        _check_nf4(base)
    chosen = _Chosen(code, read_updates(adapter, base) if adapter else {}, base.shapes if through_nf4 else {})
    files = tuple(_plan_file(name, tensors, chosen) for name, tensors in shards.items())
    return MergePlan(adapter, base, dtype, files, is_shape_only, through_nf4)


def _check_nf4(base: BaseModel) -> None:
    """bitsandbytes reads a matrix back by rows, and rows that share a block of 64 get each other's scale."""
    uneven = sorted({shape.in_features for shape in base.shapes.values() if shape.in_features % NF4_BLOCK})
    if uneven:
        raise InvalidRequest(
            f"The projections of {base.id} are {', '.join(map(str, uneven))} wide, which is not divisible by "
            f"{NF4_BLOCK}: merge into the original weights.",
            param="merge_into",
        )


def _laid_out(
    shards: Mapping[str, list[StoredTensor]], code: str | None, shard_bytes: int
) -> dict[str, list[StoredTensor]]:
    """The same tensors in the same order, in files of at most `shard_bytes` of data each."""
    groups: list[list[StoredTensor]] = [[]]
    held = 0
    for tensor in (tensor for tensors in shards.values() for tensor in tensors):
        size = tensor.elements * ITEM_BYTES[_dtype_in(tensor, code)]
        if groups[-1] and held + size > shard_bytes:
            groups.append([])
            held = 0
        groups[-1].append(tensor)
        held += size
    if len(groups) == 1:
        return {SINGLE_WEIGHTS: groups[0]}
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": tensors for i, tensors in enumerate(groups, 1)}


def check_inputs(base: BaseModel, dtype: str | None) -> str | None:
    """What every merge needs; the safetensors code of the output dtype. Raises InvalidRequest, BaseInvalid."""
    code = check_dtype(dtype)
    if base.config.get("quantization_config"):
        raise BaseInvalid(
            f"{base.folder} holds quantised weights; a merge needs the 16 or 32-bit ones: pass --base with them."
        )
    return code


def checkpoint_bytes(base: BaseModel, code: str | None) -> int:
    """Bytes of all weights of a base, written as `code` where they are floating point; raises BaseInvalid."""
    tensors = [tensor for shard in read_checkpoint(base).values() for tensor in shard]
    return sum(tensor.elements * ITEM_BYTES[_dtype_in(tensor, code)] for tensor in tensors)


def _dtype_in(tensor: StoredTensor, code: str | None) -> str:
    return code if code and tensor.dtype in FLOATS else tensor.dtype


def check_dtype(dtype: str | None) -> str | None:
    """The safetensors code of an output dtype, None for None; raises InvalidRequest."""
    codes = {name: code for code, name in FLOATS.items()}
    if dtype is not None and dtype not in codes:
        raise InvalidRequest(f"dtype {dtype[:40]!r} is not one of {', '.join(codes)}.", param="dtype")
    return codes[dtype] if dtype else None


@dataclass(frozen=True, slots=True)
class _Chosen:
    """What is done to tensors: the dtype code of all, updates by module, and the modules that go through NF4."""

    code: str | None
    updates: Mapping[str, Update]
    nf4: Collection[str]


def _plan_file(name: str, tensors: list[StoredTensor], chosen: _Chosen) -> PlannedFile:
    outputs = [(tensor, _dtype_in(tensor, chosen.code)) for tensor in tensors]
    header = encode_header((tensor.name, code, tensor.shape) for tensor, code in outputs)
    planned, position = [], len(header)
    for tensor, code in outputs:
        module, is_matrix = tensor.name.removesuffix(".weight"), tensor.name.endswith(".weight")
        update = chosen.updates.get(module) if is_matrix else None
        planned.append(PlannedTensor(tensor, code, position, update, is_matrix and module in chosen.nf4))
        position += planned[-1].size_bytes
    return PlannedFile(name, header, tuple(planned))


def _shape_only_shards(base: BaseModel) -> dict[str, list[StoredTensor]]:
    named = stored_dtype(base.config) or "bfloat16"
    code = next((code for code, name in FLOATS.items() if name == named), "BF16")
    required, _ = expected_tensors(base.config)
    path = base.folder / SINGLE_WEIGHTS
    return {SINGLE_WEIGHTS: [StoredTensor(name, code, shape, path, 0) for name, shape in sorted(required.items())]}


def read_updates(adapter: Path, base: BaseModel) -> dict[str, Update]:
    """Module name -> its update, from an adapter folder. Raises MergeFailed with all that has no place in a merge."""
    try:
        config = json.loads((adapter / ADAPTER_CONFIG).read_bytes())
        tensors = {tensor.name: tensor for tensor in read_header(adapter / ADAPTER_WEIGHTS)}
    except FileNotFoundError as error:
        raise InvalidRequest(f"{adapter} is no adapter folder: {Path(error.filename).name} is missing.") from error
    except (ValueError, BaseInvalid) as error:
        raise MergeFailed(f"The adapter in {adapter} cannot be read: {error}") from error
    problems = _config_problems(config)
    updates: dict[str, Update] = {}
    for name in [] if problems else sorted({_module_of(key) for key in tensors}):
        try:
            updates[name] = _update_of(name, tensors, config, base)
        except MergeFailed as error:
            problems += error.problems
    used = {tensor.name for update in updates.values() for tensor in (update.a, update.b)}
    if not problems:
        problems = [
            Problem("tensor_set_invalid", key, "has no place in a merge") for key in sorted(tensors.keys() - used)
        ]
    if not problems and not updates:
        problems = [Problem("tensor_set_invalid", ADAPTER_WEIGHTS, "holds no tensor: there is nothing to merge")]
    if problems:
        raise MergeFailed(f"The adapter in {adapter} does not fit the base {base.id}.", problems=tuple(problems))
    return updates


def _module_of(key: str) -> str:
    return key.removeprefix(KEY_PREFIX).removesuffix(".lora_A.weight").removesuffix(".lora_B.weight")


def _config_problems(config: Mapping[str, Any]) -> list[Problem]:
    """Fields that mean more than W + scaling * B @ A."""
    wanted: dict[str, tuple[Any, ...]] = {
        "peft_type": ("LORA",),
        "bias": ("none", None),
        **dict.fromkeys(("use_dora", "fan_in_fan_out", "lora_bias", "use_qalora", "arrow_config"), (False, None)),
        **dict.fromkeys(("modules_to_save", "trainable_token_indices", "layer_replication"), (None, [], {})),
        **dict.fromkeys(("target_parameters", "alora_invocation_tokens"), (None, [], {})),
    }
    return [
        Problem(
            "feature_not_supported", f"config.{field}", f"is {config.get(field)!r}: this merge does plain LoRA only"
        )
        for field, values in wanted.items()
        if config.get(field) not in values
    ]


def _update_of(name: str, tensors: Mapping[str, StoredTensor], config: Mapping[str, Any], base: BaseModel) -> Update:
    a = tensors.get(f"{KEY_PREFIX}{name}.lora_A.weight")
    b = tensors.get(f"{KEY_PREFIX}{name}.lora_B.weight")
    shape = base.shapes.get(name)
    if shape is None or a is None or b is None:
        lacks = "is no layer of this base" if shape is None else f"has no lora_{'B' if a else 'A'}"
        raise _refused("tensor_set_invalid", name, lacks)
    rank = int(by_pattern(config.get("rank_pattern"), name, config["r"]))
    alpha = float(by_pattern(config.get("alpha_pattern"), name, config["lora_alpha"]))
    if a.shape != (rank, shape.in_features) or b.shape != (shape.out_features, rank):
        wanted = f"[{rank}, {shape.in_features}] and [{shape.out_features}, {rank}]"
        raise _refused("shape_mismatch", name, f"A and B are {list(a.shape)} and {list(b.shape)}, not {wanted}")
    if not {a.dtype, b.dtype} <= FLOATS.keys():
        raise _refused(
            "dtype_not_allowed", name, f"A and B are {a.dtype} and {b.dtype}; allowed are {', '.join(FLOATS)}"
        )
    return Update(name, alpha / (rank**0.5 if config.get("use_rslora") else rank), a, b)


def by_pattern(pattern: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """The first key that is the module's name or its ending, as PEFT matches; keys are literal, never compiled."""
    return next((value for key, value in (pattern or {}).items() if name == key or name.endswith(f".{key}")), default)


def _refused(code: str, path: str, message: str) -> MergeFailed:
    return MergeFailed(message, problems=(Problem(code, path, message),))
