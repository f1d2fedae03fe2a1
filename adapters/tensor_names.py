"""Tensor names of adapters: every spelling that trainers write is read into (module, part) and written in one."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum

PREFIX = "base_model.model."
# Wrappers whose names end up in saved keys: torch.compile, DDP, FSDP, activation checkpointing, Lightning.
WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
LORA_PART = re.compile(
    r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>[A-Za-z0-9_-]+))?\.(?P<kind>weight|bias)", re.ASCII
)
MAGNITUDE = re.compile(
    r"(?P<module>.+)\.lora_magnitude_vector(?:\.(?P<adapter>[A-Za-z0-9_-]+?))??(?:\.weight)?", re.ASCII
)
MLX_PART = re.compile(r"(?P<module>.+)\.(?P<kind>lora_a|lora_b|m)", re.ASCII)
MLX_EMBEDDING = {"lora_a": "lora_embedding_A", "lora_b": "lora_embedding_B"}
# What PEFT can train in full beside the projections, and the names it puts between a module and its trained copy.
TRAINED = re.compile(
    r"(model\.)?(embed_tokens|lm_head|norm)\b|(model\.)?layers\.\d+\.(input_layernorm|post_attention_layernorm|"
    r"self_attn\.(q_proj|k_proj|v_proj|o_proj|q_norm|k_norm)|mlp\.(gate_proj|up_proj|down_proj))\.(weight|bias)$",
    re.ASCII,
)
TRAINED_COPY = re.compile(r"\.(modules_to_save(\.default)?|original_module|base_layer)(?=\.)")


class Part(StrEnum):
    """What one tensor is to its module."""

    A = "lora_A.weight"  # (rank, in_features)
    B = "lora_B.weight"  # (out_features, rank)
    EXPORT_ONLY = "export only"  # DoRA magnitudes, biases, fully trained modules, embeddings
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class TensorName:
    """One key, read. `canonical` is the key that our own files use for it."""

    key: str
    part: Part
    module: str  # full name in the base (`model.layers.0.self_attn.q_proj`), or what the key says when unknown
    canonical: str
    adapter: str | None = None  # the PEFT adapter name that some writers leave in the key (`default`)

    @property
    def is_converted(self) -> bool:
        return self.key != self.canonical


def canonical_key(module: str, part: Part) -> str:
    """The key of our own files for one half of a module's update."""
    return f"{PREFIX}{module}.{part.value}"


def read_name(key: str, modules: Collection[str]) -> TensorName:
    """Read a key against the base's module names; an unknown module or a strange key gives Part.UNKNOWN."""
    match = LORA_PART.fullmatch(key)
    if match:
        module = resolve_module(match["module"], modules)
        if module is None:
            return _beyond_projections(key, match["module"], match["adapter"])
        if match["kind"] == "bias":
            canonical = f"{PREFIX}{module}.lora_{match['side']}.bias"
            return TensorName(key, Part.EXPORT_ONLY, module, canonical, match["adapter"])
        part = Part.A if match["side"] == "A" else Part.B
        return TensorName(key, part, module, canonical_key(module, part), match["adapter"])
    magnitude = MAGNITUDE.fullmatch(key)
    if magnitude:
        module = resolve_module(magnitude["module"], modules)
        if module is not None:
            canonical = f"{PREFIX}{module}.lora_magnitude_vector"
            return TensorName(key, Part.EXPORT_ONLY, module, canonical, magnitude["adapter"])
    return _beyond_projections(key, key, None)


def read_mlx_name(key: str, modules: Collection[str]) -> TensorName:
    """The same for MLX-LM's keys: `<module>.lora_a` and `.lora_b`, transposed, and `.m`, the magnitudes of DoRA."""
    match = MLX_PART.fullmatch(key)
    if match is None:
        return _beyond_projections(key, key, None)
    module, kind = resolve_module(match["module"], modules), match["kind"]
    if module is None:
        plain = match["module"]
        if plain in ("model.embed_tokens", "embed_tokens") and kind in MLX_EMBEDDING:
            canonical = f"{PREFIX}model.embed_tokens.{MLX_EMBEDDING[kind]}"
            return TensorName(key, Part.EXPORT_ONLY, plain, canonical)
        if plain == "lm_head" and kind in MLX_EMBEDDING:
            canonical = f"{PREFIX}lm_head.lora_{kind[-1].upper()}.weight"
            return TensorName(key, Part.EXPORT_ONLY, plain, canonical)
        return TensorName(key, Part.UNKNOWN, plain, key)
    if kind == "m":
        return TensorName(key, Part.EXPORT_ONLY, module, f"{PREFIX}{module}.lora_magnitude_vector")
    part = Part.A if kind == "lora_a" else Part.B
    return TensorName(key, part, module, canonical_key(module, part))


def unwrapped(name: str) -> str:
    """The name without wrappers and without PEFT's prefix, however often either is there."""
    if any(wrapper in name for wrapper in WRAPPERS):
        name = ".".join(part for part in name.split(".") if part not in WRAPPERS)
    while name.startswith(PREFIX):
        name = name[len(PREFIX) :]
    return name


def resolve_module(name: str, modules: Collection[str]) -> str | None:
    """The base's full module name for a name as saved: with or without PEFT's prefix, wrappers, or the model's own."""
    plain = unwrapped(name)
    candidates = (plain, f"model.{plain}", plain.removeprefix("model."))
    return next((candidate for candidate in candidates if candidate in modules), None)


def _beyond_projections(key: str, module: str, adapter: str | None) -> TensorName:
    """Embeddings, output layer and fully trained modules can be exported; any other name is unknown."""
    plain = unwrapped(key)
    is_known = TRAINED.match(TRAINED_COPY.sub("", plain))
    part = Part.EXPORT_ONLY if is_known else Part.UNKNOWN
    return TensorName(key, part, module, f"{PREFIX}{plain}", adapter)
