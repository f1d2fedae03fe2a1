"""A base model as a folder: its identity, and the shapes of the layers that an adapter may sit on.

Shapes come from `config.json` alone, never from weight headers, which are packed in a quantised base. So a base can be
planned against without its weights (a shape-only folder holds just `config.json`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from adapters.errors import BaseInvalid
from adapters.types import ModuleShape

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SUPPORTED_ARCHITECTURES = ("Qwen2ForCausalLM", "Qwen3ForCausalLM")
WEIGHT_INDEX = "model.safetensors.index.json"
SINGLE_WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class BaseModel:
    """One base, read from its folder. `id` is its name on the wire; `digest` its identity."""

    folder: Path
    id: str
    config: Mapping[str, Any]
    digest: str
    names: tuple[str, ...] = ()  # other spellings an adapter may claim: its path, Hub id, declared family members

    @cached_property
    def shapes(self) -> Mapping[str, ModuleShape]:
        """Every layer an adapter may adapt, by full module name (`model.layers.0.self_attn.q_proj`)."""
        return module_shapes(self.config)

    @property
    def context_length_tokens(self) -> int:
        return int(self.config["max_position_embeddings"])

    @property
    def is_tied(self) -> bool:
        """The output layer shares the embedding matrix."""
        return bool(self.config.get("tie_word_embeddings", False))


def stored_dtype(config: Mapping[str, Any]) -> str | None:
    """The number format that a config.json names for its weights, under either key, without torch's prefix."""
    named = config.get("dtype") or config.get("torch_dtype")
    return str(named).removeprefix("torch.") if named else None


def module_shapes(config: Mapping[str, Any]) -> dict[str, ModuleShape]:
    """The seven projections of every decoder layer of a Qwen2 or Qwen3 dense model, from its `config.json`."""
    hidden, middle = int(config["hidden_size"]), int(config["intermediate_size"])
    heads = int(config["num_attention_heads"])
    key_value_heads = int(config.get("num_key_value_heads") or heads)
    head_dim = int(config.get("head_dim") or hidden // heads)
    query, key_value = heads * head_dim, key_value_heads * head_dim
    layer = {
        "self_attn.q_proj": (query, hidden),
        "self_attn.k_proj": (key_value, hidden),
        "self_attn.v_proj": (key_value, hidden),
        "self_attn.o_proj": (hidden, query),
        "mlp.gate_proj": (middle, hidden),
        "mlp.up_proj": (middle, hidden),
        "mlp.down_proj": (hidden, middle),
    }
    names = (
        (f"model.layers.{i}.{short}", shape)
        for i in range(int(config["num_hidden_layers"]))
        for short, shape in layer.items()
    )
    return {name: ModuleShape(name, *shape) for name, shape in names}


def load_base(source: str | Path, *, names: tuple[str, ...] = ()) -> BaseModel:
    """The base in a local folder, or `OWNER/NAME@COMMIT` from the Hub, fetched once; raises BaseInvalid.

    `names` are further spellings that adapters of this base may claim, such as an operator's model family.
    """
    folder = Path(source)
    if not (folder / "config.json").is_file():
        folder = _from_hub(str(source))
    try:
        config = json.loads((folder / "config.json").read_bytes())
        architecture = (config.get("architectures") or ["(none)"])[0]
        if architecture not in SUPPORTED_ARCHITECTURES:
            supported = ", ".join(SUPPORTED_ARCHITECTURES)
            raise BaseInvalid(f"{folder} is a {architecture}; supported are {supported} (Qwen2.5 and Qwen3 dense).")
        module_shapes(config)
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise BaseInvalid(f"{folder}/config.json does not describe a base: {error!r}.") from error
    hub_id = str(source).partition("@")[0]
    spellings = dict.fromkeys((str(source), hub_id, str(folder), str(folder.resolve()), *names))
    return BaseModel(folder.resolve(), wire_id(hub_id), config, base_digest(folder), tuple(spellings))


def wire_id(source: str) -> str:
    """The last part of a folder or Hub id in lower case, as the base is named on the wire."""
    last = source.replace("\\", "/").rstrip("/").rpartition("/")[2]
    return re.sub(r"[^a-z0-9._-]+", "-", last.lower()) or "base"


def base_digest(folder: Path) -> str:
    """sha256 over what makes a base itself: its config, and each weight file's size, header and samples of its data.

    Samples stand for the weights, so that a 72B base is identified in milliseconds and yet two fine-tunes of one
    architecture differ. A shape-only base has no weights to sample.
    """
    config = json.loads((folder / "config.json").read_bytes())
    for volatile in ("transformers_version", "_name_or_path", "torch_dtype", "use_cache"):
        config.pop(volatile, None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, separators=(",", ":")).encode())
    for shard in weight_files(folder):
        digest.update(f"\n{shard.name} {shard.stat().st_size}\n".encode())
        digest.update(_header_bytes(shard))
        for sample in _samples(shard):
            digest.update(sample)
    return f"sha256:{digest.hexdigest()}"


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a base, in a fixed order; none for a shape-only folder. A missing one is BaseInvalid."""
    index = folder / WEIGHT_INDEX
    if index.is_file():
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    else:
        names = [SINGLE_WEIGHTS] if (folder / SINGLE_WEIGHTS).is_file() else []
    if any("/" in name or name.startswith(".") for name in names):
        raise BaseInvalid(f"{index} names a shard outside its folder.")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise BaseInvalid(
            f"{folder} lacks {', '.join(missing)}, which its weight index names: download the base again."
        )
    return [folder / name for name in names]


def _header_bytes(shard: Path) -> bytes:
    with shard.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > 100_000_000:
            raise BaseInvalid(f"{shard} has a safetensors header of {length} bytes; the format allows 100 MB.")
        return file.read(length)


def _samples(shard: Path, count: int = 16, size: int = 4096) -> Iterator[bytes]:
    length = shard.stat().st_size
    with shard.open("rb") as file:
        for i in range(count):
            file.seek(max(0, (length - size) * i // (count - 1)))
            yield file.read(size)


def _from_hub(source: str) -> Path:
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([0-9a-f]{40}))?", source, re.ASCII)
    if match is None:
        raise BaseInvalid(f"{source} is neither a folder with a config.json nor a Hub id (OWNER/NAME@COMMIT).")
    hub_id, revision = match.groups()
    if not revision:
        raise BaseInvalid(
            f"A base from the Hub needs a pinned revision: write {hub_id}@COMMIT with the 40 hex digits of its commit, "
            "so that it cannot change under its adapters."
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(hub_id, revision=revision, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt"])
        )
    except Exception as error:  # the hub client raises a dozen unrelated types
        raise BaseInvalid(f"Could not fetch {hub_id} at revision {revision}: {error}") from error
