"""Every Qwen2.5 and Qwen3 dense size and the embedded base, as numbers; the same from any `config.json`.

The figures are those of the sizes' `config.json` files as they are known, so that a plan needs no network. Parameter
counts follow from them; tests hold these to transformers' models and to published counts.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.bases import PROJECTIONS, BaseModel, stored_dtype
from adapters.errors import BaseInvalid

APACHE, RESEARCH, QWEN = (
    "Apache-2.0",
    "Qwen Research License: not for commercial use",
    "Qwen License: free below 100 million monthly users",
)
NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
KINDS = {"Qwen2ForCausalLM": (True, False), "Qwen3ForCausalLM": (False, True)}  # biased q/k/v, norms of each head
BIASED = ("q_proj", "k_proj", "v_proj")
NORMS, HEAD_NORMS = ("first_norm", "second_norm"), ("query_norm", "key_norm")
UNSUPPORTED = {
    "qwen3_moe": "is a mixture of experts (Qwen3 MoE): the trainer has no expert layers",
    "qwen2_moe": "is a mixture of experts (Qwen2 MoE): the trainer has no expert layers",
    "qwen3_next": "is Qwen3-Next, a mixture of experts with linear attention: not trained here",
    "qwen3_5": "is Qwen3.5, which the trainer does not know",
    "qwen3_5_moe": "is Qwen3.5 MoE, which the trainer does not know",
}
UNSUPPORTED_NAMES = (
    ("qwen3.5", "Qwen3.5 is not supported: the trainer knows Qwen2.5 and Qwen3 dense"),
    ("qwen3-next", "Qwen3-Next is a mixture of experts with linear attention, which the trainer does not know"),
    ("30b-a3b", "Qwen3-30B-A3B is a mixture of experts, which the trainer does not know"),
    ("235b-a22b", "Qwen3-235B-A22B is a mixture of experts, which the trainer does not know"),
)


@dataclass(frozen=True)
class Architecture:
    """A decoder's shape, and what a choice between decoders needs to know of it."""

    name: str
    hidden: int
    layers: int
    heads: int
    key_value_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    is_tied: bool
    has_bias: bool  # of q_proj, k_proj and v_proj
    has_head_norms: bool  # RMSNorm of each head's query and key
    context_tokens: int
    thinks: bool  # its template has reasoning that can be turned on
    licence: str = APACHE
    dtype: str = "bfloat16"

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def key_value_width(self) -> int:
        return self.key_value_heads * self.head_dim

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """(out, in) of each projection of a layer."""
        hidden, query, key = self.hidden, self.query_width, self.key_value_width
        shapes = (
            *((query, hidden), (key, hidden), (key, hidden), (hidden, query)),
            *((self.intermediate, hidden), (self.intermediate, hidden), (hidden, self.intermediate)),
        )
        return dict(zip(PROJECTIONS, shapes, strict=True))

    @property
    def linear_parameters(self) -> int:
        """Weights of the projections of all layers: what is quantised, and what a token is multiplied with."""
        return self.layers * sum(out * into for out, into in self.projections.values())

    @property
    def embedding_parameters(self) -> int:
        """The embedding's weights, and the output layer's where it has its own."""
        return self.vocabulary * self.hidden * (1 if self.is_tied else 2)

    @property
    def small_parameters(self) -> int:
        """Norms and biases."""
        small = sum(size for name, size in self.layer_tensors().items() if name not in PROJECTIONS)
        return self.layers * small + self.hidden

    @property
    def parameters(self) -> int:
        return self.linear_parameters + self.embedding_parameters + self.small_parameters

    def layer_tensors(self) -> dict[str, int]:
        """The size of each weight of a layer: projections, each with its bias where it has one, then norms."""
        sizes: dict[str, int] = {}
        for name, (out, into) in self.projections.items():
            sizes[name] = out * into
            if self.has_bias and name in BIASED:
                sizes[f"{name}.bias"] = out
        sizes |= dict.fromkeys(NORMS, self.hidden)
        return sizes | dict.fromkeys(HEAD_NORMS, self.head_dim) if self.has_head_norms else sizes

    def lora_parameters(self, rank: int, targets: tuple[str, ...] = PROJECTIONS) -> int:
        """rank * (in + out) over the targets of all layers."""
        shapes = (shape for name, shape in self.projections.items() if name in targets)
        return self.layers * rank * sum(out + into for out, into in shapes)


def _qwen2_5(
    size: str, shape: tuple[int, int, int, int, int], tied: bool, vocabulary: int, licence: str = APACHE
) -> Architecture:
    hidden, layers, heads, key_value_heads, intermediate = shape
    return Architecture(
        f"Qwen2.5-{size}", hidden, layers, heads, key_value_heads, hidden // heads, intermediate, vocabulary, tied,
        has_bias=True, has_head_norms=False, context_tokens=32_768, thinks=False, licence=licence,
    )  # fmt: skip


def _qwen3(size: str, shape: tuple[int, int, int, int, int], tied: bool) -> Architecture:
    hidden, layers, heads, key_value_heads, intermediate = shape
    return Architecture(
        f"Qwen3-{size}", hidden, layers, heads, key_value_heads, 128, intermediate, 151_936, tied,
        has_bias=False, has_head_norms=True, context_tokens=40_960, thinks=True,
    )  # fmt: skip


EMBEDDED = Architecture(
    "embedded", 576, 30, 9, 3, 64, 1536, 49_152, True,
    has_bias=True, has_head_norms=False, context_tokens=8192, thinks=False, dtype="float32",
)  # fmt: skip

SIZES = (
    EMBEDDED,
    _qwen2_5("0.5B", (896, 24, 14, 2, 4864), True, 151_936),
    _qwen2_5("1.5B", (1536, 28, 12, 2, 8960), True, 151_936),
    _qwen2_5("3B", (2048, 36, 16, 2, 11_008), True, 151_936, RESEARCH),
    _qwen2_5("7B", (3584, 28, 28, 4, 18_944), False, 152_064),
    _qwen2_5("14B", (5120, 48, 40, 8, 13_824), False, 152_064),
    _qwen2_5("32B", (5120, 64, 40, 8, 27_648), False, 152_064),
    _qwen2_5("72B", (8192, 80, 64, 8, 29_568), False, 152_064, QWEN),
    _qwen3("0.6B", (1024, 28, 16, 8, 3072), True),
    _qwen3("1.7B", (2048, 28, 16, 8, 6144), True),
    _qwen3("4B", (2560, 36, 32, 8, 9728), True),
    _qwen3("8B", (4096, 36, 32, 8, 12_288), False),
    _qwen3("14B", (5120, 40, 40, 8, 17_408), False),
    _qwen3("32B", (5120, 64, 64, 8, 25_600), False),
)


def find(source: str) -> Architecture:
    """The base that a name, a folder or a `config.json` says; raises BaseInvalid with the nearest names."""
    path = Path(source)
    if path.is_dir():
        path = path / "config.json"
    if path.suffix == ".json" or path.is_file():
        return read(path)
    wanted = _plain(source)
    for size in SIZES:
        if wanted == _plain(size.name):
            return size
    for part, reason in UNSUPPORTED_NAMES:
        if part in source.lower():
            raise BaseInvalid(f"{source}: {reason}.", param="base")
    names = [size.name for size in SIZES]
    near = difflib.get_close_matches(wanted, [_plain(name) for name in names], n=3, cutoff=0.4)
    nearest = [name for name in names if _plain(name) in near] or names
    raise BaseInvalid(
        f"{source} is no base that is known here, no folder and no config.json. Nearest: {', '.join(nearest)}.",
        param="base",
    )


def read(path: Path) -> Architecture:
    """The architecture in a `config.json`; raises BaseInvalid for what is missing or not supported, by name."""
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise BaseInvalid(f"{path} cannot be read as JSON: {error}.", param="base") from error
    if not isinstance(config, dict):
        raise BaseInvalid(f"{path} holds no JSON object.", param="base")
    return of_config(config, path.parent.resolve().name, str(path))


def of_base(base: BaseModel) -> Architecture:
    """The architecture of a base that is opened."""
    return of_config(base.config, base.id, f"{base.folder}/config.json")


def of_config(config: Mapping[str, Any], name: str, where: str) -> Architecture:
    """The same from the parsed file."""
    kind = (config.get("architectures") or ["(none)"])[0]
    if (reason := UNSUPPORTED.get(str(config.get("model_type")))) is not None:
        raise BaseInvalid(f"{where} {reason}.", param="base")
    if kind not in KINDS:
        raise BaseInvalid(f"{where} is a {kind}; supported are {' and '.join(KINDS)}.", param="base")
    missing = [key for key in NEEDED if not isinstance(config.get(key), int)]
    if missing:
        raise BaseInvalid(f"{where} lacks {', '.join(missing)}: without them nothing can be planned.", param="base")
    hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    has_bias, has_head_norms = KINDS[kind]
    return Architecture(
        name,
        hidden,
        int(config["num_hidden_layers"]),
        heads,
        int(config.get("num_key_value_heads") or heads),
        int(config.get("head_dim") or hidden // heads),
        int(config["intermediate_size"]),
        int(config["vocab_size"]),
        bool(config.get("tie_word_embeddings", False)),
        has_bias=has_bias,
        has_head_norms=has_head_norms,
        context_tokens=int(config.get("max_position_embeddings") or 32_768),
        thinks=kind == "Qwen3ForCausalLM",
        licence="as its folder says",
        dtype=stored_dtype(config) or "float32",
    )


def _plain(name: str) -> str:
    last = name.lower().rpartition("/")[2].partition("@")[0]
    return last.removesuffix("-instruct").replace("_", "-").replace("smollm2-135m", "embedded")
